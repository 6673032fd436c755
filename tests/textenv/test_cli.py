"""The `textenv` program, as typed: what it prints, what it leaves behind, and how it answers mistakes."""

import json

import pytest

from textenv.cli import main

SMALL = [
    "--num-envs",
    "8",
    "--episodes-per-update",
    "8",
    "--minibatch-episodes",
    "8",
    "--epochs",
    "1",
    "--threads",
    "1",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of PPO on sums."""
    out = tmp_path_factory.mktemp("cli") / "run"
    main(
        ["train", "PPO", "textenv/Arithmetic-v0", "--total-timesteps", "60", "--beta", "0.3", "--out", str(out), *SMALL]
    )
    return out


def fails(arguments):
    """The one line that a mistake is answered with."""
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    message = str(stopped.value.code)
    assert message.startswith("textenv: ")
    assert "\n" not in message
    return message


def test_training_leaves_a_checkpoint_the_curves_and_its_command_line(run):
    assert (run / "checkpoint" / "policy" / "config.json").is_file()
    assert "rollout/task_reward" in (run / "progress.csv").read_text().splitlines()[0]
    about = json.loads((run / "run.json").read_text())
    assert (about["agent"], about["env"], about["beta"], about["num_envs"]) == ("PPO", "textenv/Arithmetic-v0", 0.3, 8)


def test_a_run_is_not_overwritten(run):
    before = (run / "progress.csv").read_bytes()
    assert "--resume" in fails(["train", "PPO", "textenv/Arithmetic-v0", "--out", str(run)])
    assert (run / "progress.csv").read_bytes() == before


def test_resuming_needs_no_flag_again(run, tmp_path, capsys):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    rows = len((copy / "progress.csv").read_text().splitlines())
    main(["train", "PPO", "textenv/Arithmetic-v0", "--out", str(copy), "--resume", "--total-timesteps", "120"])
    after = (copy / "progress.csv").read_text().splitlines()
    assert len(after) > rows
    column = after[0].split(",").index("rollout/beta")
    assert {line.split(",")[column] for line in after[1:]} == {"0.3"}
    main(["train", "PPO", "textenv/Arithmetic-v0", "--out", str(copy), "--resume", "--total-timesteps", "120"])
    assert "already" in capsys.readouterr().out


def test_settings_cannot_change_on_the_way(run):
    assert "checkpoint" in fails(
        ["train", "PPO", "textenv/Arithmetic-v0", "--out", str(run), "--resume", "--learning-rate", "0.1"]
    )


def test_evaluation_shows_agent_and_reference(run, capsys):
    main(["eval", str(run), "--split", "test", "--episodes", "16", "--samples", "1"])
    out = capsys.readouterr().out
    assert "reference" in out
    assert "paired difference" in out


@pytest.mark.parametrize("part", ["", "checkpoint"])
def test_generation_from_a_run_or_its_checkpoint(run, capsys, part):
    main(["generate", str(run / part), "--text", "12+30=", "--text", "1+1="])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("=")[0] for line in lines] == ["12+30", "1+1"]


def test_lists_hold_every_id_and_every_agent(capsys):
    main(["envs"])
    main(["agents"])
    out = capsys.readouterr().out
    for name in ("textenv/Arithmetic-v0", "textenv/Prompts-v0", "textenv/Tree-v0", "PPO", "SFT", "RandomAgent"):
        assert name in out


def test_a_reward_of_ones_own_from_a_file(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n\n"
        "@dataclass(frozen=True)\nclass Short:\n    weight: float = 1.0\n"
        "    def __call__(self, completions, **columns):\n        return [-self.weight * len(c) for c in completions]\n\n"
        "short = Short()\n"
    )
    out = tmp_path / "run"
    reward = ["--reward", f"{tmp_path / 'mine.py'}:short"]
    main(["train", "PPO", "textenv/Arithmetic-v0", "--total-timesteps", "20", "--out", str(out), *reward, *SMALL])
    header, row = (out / "progress.csv").read_text().splitlines()[:2]
    assert float(row.split(",")[header.split(",").index("rollout/task_reward")]) < 0


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["tran"], "Did you mean `train`?"),
        (["train", "ppo", "textenv/Arithmetic-v0"], "Did you mean `PPO`?"),
        (["train", "PPO", "textenv/Arithmetik-v0"], "Did you mean `textenv/Arithmetic-v0`?"),
        (["train", "PPO"], "Expected textenv train AGENT ENV"),
        (["train", "PPO", "textenv/Arithmetic-v0", "--epochs", "0"], "Expected epochs >= 1"),
        (["train", "PPO", "textenv/Arithmetic-v0", "--reward", "missing.py:f"], "No such file"),
        (["train", "PPO", "textenv/Arithmetic-v0", "--reward", "rewards:exact_macth"], "Did you mean `exact_match`?"),
        (["train", "PPO", "textenv/Arithmetic-v0", "--env-arg", "groupsize=2"], "Did you mean `group_size`?"),
        (["train", "PPO", "textenv/Arithmetic-v0", "--out", "nowhere", "--resume"], "Nothing to resume"),
        (["train", "my_module:Agent", "textenv/Arithmetic-v0"], "Cannot import"),
        (["eval", "nowhere"], "No checkpoint"),
        (["envs", "please"], "takes no arguments"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_mistake_is_answered_in_one_line_with_the_remedy(arguments, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert expected in fails(arguments)
    assert not any(tmp_path.iterdir())  # nothing half-written


@pytest.mark.parametrize("command", ["train", "eval", "generate", "demo"])
def test_help_lists_the_flags(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    assert "--seed" in capsys.readouterr().out


def test_the_agents_own_settings_are_in_its_help(capsys):
    with pytest.raises(SystemExit):
        main(["train", "PPO", "textenv/Arithmetic-v0", "--help"])
    out = capsys.readouterr().out
    assert "--clip-range" in out
    assert "probability ratio" in out


def test_a_run_goes_on_in_its_own_environment_with_its_own_objective(run):
    before = (run / "checkpoint" / "agent.json").read_bytes()
    resume = ["--out", str(run), "--resume", "--total-timesteps", "500"]
    assert "a run of textenv/Arithmetic-v0" in fails(["train", "PPO", "textenv/Tree-v0", *resume])
    assert "leave --beta away" in fails(["train", "PPO", "textenv/Arithmetic-v0", *resume, "--beta", "0.5"])
    assert (run / "checkpoint" / "agent.json").read_bytes() == before


def test_a_run_that_died_before_its_first_checkpoint_is_begun_anew(tmp_path):
    file, out = tmp_path / "mine.py", tmp_path / "run"
    command = ["train", "PPO", "textenv/Arithmetic-v0", "--total-timesteps", "20", "--out", str(out)]
    command += ["--reward", f"{file}:mine", *SMALL]
    file.write_text("def mine(completions, **columns):\n    return [float('nan')] * len(completions)\n")
    assert "nan" in fails(command)
    file.write_text("def mine(completions, **columns):\n    return [1.0] * len(completions)\n")
    main(command)
    assert (out / "checkpoint" / "agent.json").is_file()


def test_no_tokens_is_no_run(tmp_path):
    assert ">= 1" in fails(
        ["train", "PPO", "textenv/Arithmetic-v0", "--out", str(tmp_path / "r"), "--total-timesteps", "0"]
    )
    assert not (tmp_path / "r").exists()
