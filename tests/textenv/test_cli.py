"""The `textenv` program, as typed: what it prints, what it leaves behind, and how it answers mistakes."""

import json
import os
import signal

import pytest
import torch

from textenv.cli import main
from textenv.cli.arguments import policy_of, set_threads, whole_number

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
    out = " ".join(capsys.readouterr().out.split())  # a long path wraps the title
    assert "reference" in out
    assert "paired difference" in out
    assert "split 'test'" in out
    main(["eval", str(run / "checkpoint"), "--episodes", "4", "--samples", "0"])
    assert "split 'train'" in " ".join(capsys.readouterr().out.split())


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
        (["train", "agents:PPOConfig", "textenv/Arithmetic-v0"], "is no agent: it has no learn, predict, save, load"),
        (["eval", "nowhere"], "No checkpoint"),
        (["envs", "please"], "takes no arguments"),
        (["train", "rewardModel", "--rankings", "r.jsonl"], "Expected textenv train AGENT ENV"),
        (["train", "rewardModel", "textenv/Tree-v0"], "Did you mean `RewardModel`?"),
        (["train", "PPO", "textenv/Prompts-v0"], "Missing: --model, --prompts."),
        (["train", "PPO", "textenv/Arithmetic-v0", "--reward", "runs/reward"], "no such directory"),
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


@pytest.mark.parametrize(("text", "number"), [("1e4", 10_000), ("2.5e3", 2500), ("10_000", 10_000), ("7", 7)])
def test_numbers_of_tokens_may_be_written_as_people_write_them(text, number):
    assert whole_number(text) == number


@pytest.mark.parametrize("text", ["1.5", "many", "nan", "inf"])
def test_half_a_token_is_a_mistake(text, capsys):
    with pytest.raises(ValueError, match="whole number"):
        whole_number(text)
    with pytest.raises(SystemExit) as stopped:
        main(["train", "PPO", "textenv/Arithmetic-v0", "--total-timesteps", text])
    assert stopped.value.code == 2
    assert "whole number" in capsys.readouterr().err


def test_a_stopped_run_is_saved_and_says_so_in_its_exit_status(tmp_path, capsys):
    (tmp_path / "stop.py").write_text(
        "import os, signal\n\ndef stop(completions, **columns):\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n    return [0.0] * len(completions)\n"
    )
    before = signal.getsignal(signal.SIGINT)
    command = ["train", "PPO", "textenv/Arithmetic-v0", "--total-timesteps", "1e4", "--out", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--reward", f"{tmp_path / 'stop.py'}:stop", *SMALL])
    assert stopped.value.code == 130
    assert "--resume" in capsys.readouterr().out
    assert (tmp_path / "run" / "checkpoint" / "agent.json").is_file()
    assert signal.getsignal(signal.SIGINT) is before


def test_a_reward_that_raises_is_shown_with_its_line(tmp_path, capsys):
    (tmp_path / "mine.py").write_text("def mine(completions, **columns):\n    return [1 / 0 for _ in completions]\n")
    command = ["train", "PPO", "textenv/Arithmetic-v0", "--out", str(tmp_path / "run")]
    with pytest.raises(SystemExit, match=r"(?s)'mine' raised ZeroDivisionError.*traceback is above"):
        main([*command, "--reward", f"{tmp_path / 'mine.py'}:mine", *SMALL])
    assert 'mine.py", line 2, in mine' in capsys.readouterr().err


def test_agents_of_other_libraries_are_trained_from_python():
    assert "docs/clients.md" in fails(["train", "stable_baselines3:PPO", "textenv/Tree-v0"])


# ---------------------------------------------------------------------- one's own data: imitate, rank, reinforce

PROMPTS = ["a", "b", "c", "d", "e", "f", "ab", "cd", "ef", "gh"]


@pytest.fixture
def own(tmp_path, model_dir, monkeypatch):
    """A working directory with a model, demonstrations, and rankings that prefer `j` to `i`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "model").symlink_to(model_dir)
    rows = {
        "demos.jsonl": [{"prompt": p, "demonstration": "jj"} for p in PROMPTS],
        "rankings.jsonl": [{"prompt": p, "completions": ["jj", "ij", "ii"]} for p in PROMPTS]
        + [{"prompt": p, "chosen": "j", "rejected": "iii"} for p in PROMPTS],
    }
    for name, lines in rows.items():
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def train_reward(*flags):
    main(["train", "RewardModel", "--rankings", "rankings.jsonl", "--model", "model", "--threads", "1", *flags])


def test_a_reward_model_is_learnt_from_rankings(own, capsys):
    from transformers import AutoModelForSequenceClassification

    from rewards import RewardModel

    flags = ["--demonstrations", "demos.jsonl", "--epochs", "15", "--learning-rate", "0.01", "--validation", "0.2"]
    train_reward(*flags, "--batch-prompts", "4", "--out", "learnt/reward")
    out = capsys.readouterr().out
    for words in ("accuracy", "95% interval", "length alone", "calibration", "10 demonstrations", "learnt/reward"):
        assert words in out
    report = json.loads((own / "learnt/reward/report.json").read_text())
    assert report["validation"]["accuracy"] == 1.0  # `j` beats `i`, a rule that holds for any prompt
    assert report["validation"]["pairs"] == 2 * (3 + 1)  # two prompts of ten, each with a ranking of three and of two
    assert report["settings"]["epochs"] == 15
    assert report["settings"]["rankings"] == str(own / "rankings.jsonl")
    reward = RewardModel.from_pretrained("learnt/reward")
    demonstrated = reward(prompts=PROMPTS, completions=["jj"] * 10)
    assert sum(demonstrated) / 10 == pytest.approx(0, abs=1e-4)
    assert AutoModelForSequenceClassification.from_pretrained("learnt/reward").config.num_labels == 1
    assert [path.name for path in (own / "learnt").iterdir()] == ["reward"]  # nothing lies about beside it


def test_other_rankings_can_validate_and_none_need_be_held_out(own, capsys):
    (own / "others.jsonl").write_text('{"prompt": "a", "chosen": "i", "rejected": "j"}\n')
    train_reward("--validation", "others.jsonl")
    report = json.loads((own / "runs/reward/report.json").read_text())  # where it goes unless told
    assert (report["validation"]["pairs"], report["train"]["prompts"]) == (1, 20)
    train_reward("--validation", "0", "--out", "all")
    assert json.loads((own / "all/report.json").read_text())["validation"] is None
    assert "ranked completions score 0" in capsys.readouterr().out


def test_an_interrupted_reward_model_says_that_nothing_was_saved(own, capsys, monkeypatch):
    def interrupted(*_, progress, **__):
        progress(1, 10, 0.5)
        raise KeyboardInterrupt

    monkeypatch.setattr("rewards.train_reward_model", interrupted)
    before = sorted(path.name for path in own.iterdir())
    with pytest.raises(SystemExit) as stopped:
        train_reward()
    assert stopped.value.code == 130  # as of any program that Ctrl-C ends
    assert "nothing was saved" in capsys.readouterr().err
    assert sorted(path.name for path in own.iterdir()) == before


@pytest.mark.filterwarnings("ignore:.*No reward= was given")
def test_the_three_commands_of_the_recipe(own, capsys):
    tiny = ["--threads", "1", "--max-new-tokens", "4", "--num-envs", "4"]
    prompts = ["textenv/Prompts-v0", "--prompts", "demos.jsonl"]
    main(["train", "SFT", *prompts, "--model", "model", "--total-timesteps", "60", "--out", "sft", *tiny])
    assert "validation_loss" in capsys.readouterr().out
    main(["train", "RewardModel", "--rankings", "rankings.jsonl", "--model", "sft", "--out", "reward"])
    ppo = ["--model", "sft", "--reward", "reward", "--total-timesteps", "30", "--out", "ppo", *SMALL, *tiny]
    main(["train", "PPO", *prompts, *ppo])
    run = json.loads((own / "ppo/run.json").read_text())
    assert [run[name] for name in ("model", "reward", "prompts")] == [
        str(own / name) for name in ("sft", "reward", "demos.jsonl")
    ]
    sft, start = (own / "sft/checkpoint/policy", json.loads((own / "reward/report.json").read_text())["settings"])
    assert start["model"] == str(own / "sft")
    assert sft.is_dir()
    (own / "elsewhere").mkdir()
    os.chdir(own / "elsewhere")  # the run knows where its files are
    main(["eval", str(own / "ppo"), "--episodes", "4", "--samples", "1"])
    assert "paired difference" in capsys.readouterr().out


def test_a_run_in_place_of_a_model_means_its_policy(own):
    (own / "run/checkpoint/policy").mkdir(parents=True)
    (own / "run/checkpoint/policy/config.json").write_text("{}")
    for name in ("run", "run/checkpoint", "run/checkpoint/policy"):
        assert own / policy_of(name) == own / "run/checkpoint/policy"
    assert policy_of("model") == "model"
    assert policy_of("gpt2") == "gpt2"


def test_a_reward_model_is_not_overwritten(own):
    (own / "runs/reward").mkdir(parents=True)
    train_reward()  # over an empty directory
    before = {path.name: path.read_bytes() for path in (own / "runs/reward").iterdir()}
    with pytest.raises(SystemExit, match="exists already"):
        train_reward()
    assert {path.name: path.read_bytes() for path in (own / "runs/reward").iterdir()} == before


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--rankings", "ranking.jsonl"], "Did you mean `rankings.jsonl`?"),
        (["--rankings", "model"], "No such file for --rankings"),
        (["--demonstrations", "demo.jsonl"], "Did you mean `demos.jsonl`?"),
        (["--demonstrations", "rankings.jsonl"], "No row of rankings.jsonl has a `demonstration`"),
        (["--model", "./modell"], "Could not load a causal language model"),
        (["--validation", "others.jsonl"], "No such file for --validation"),
        (["--validation", "1.5"], "no share"),
        (["--epochs", "0"], "Expected --epochs >= 1"),
        (["--learning-rate", "0"], "Expected --learning-rate > 0"),
    ],
    ids=" ".join,
)
def test_a_reward_model_asked_for_wrongly(own, flags, expected, monkeypatch):
    before = sorted(path.name for path in own.iterdir())
    command = ["train", "RewardModel", "--rankings", "rankings.jsonl", "--model", "model"]
    assert expected in fails(command + flags)
    assert sorted(path.name for path in own.iterdir()) == before


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{", "line 2 of rankings.jsonl is not JSON"),
        ('{"chosen": "a", "rejected": "b"}', "line 2 of rankings.jsonl has no `prompt`"),
        ('{"prompt": "a", "chosen": "b"}', "expected {prompt, completions[, ranks]} or {prompt, chosen, rejected}"),
        ('{"prompt": "a", "completions": ["b"]}', "at least two completions"),
        ('{"prompt": "a", "completions": ["b", "c"], "ranks": [1]}', "1 ranks for 2 completions"),
        ('{"prompt": "a", "completions": ["b", "%s"]}' % ("j" * 60), "the context of the reward model"),
    ],
)
def test_a_malformed_ranking_is_named_by_its_line(own, line, expected):
    (own / "rankings.jsonl").write_text(f'{{"prompt": "f", "chosen": "b", "rejected": "c"}}\n{line}\n')
    assert expected in fails(["train", "RewardModel", "--rankings", "rankings.jsonl", "--model", "model"])
    assert not (own / "runs").exists()


def test_too_few_prompts_to_hold_one_out(own):
    (own / "rankings.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    assert "pass --validation 0" in fails(["train", "RewardModel", "--rankings", "rankings.jsonl", "--model", "model"])


def test_wrong_names_of_options(own, capsys):
    for flags in (["--ranking", "rankings.jsonl", "--model", "model"], ["--model", "model"], ["--learning-rat", "1"]):
        with pytest.raises(SystemExit) as stopped:
            main(["train", "RewardModel", *flags])
        assert stopped.value.code == 2
        assert "--rankings" in capsys.readouterr().err
    assert "in no environment" in fails(["train", "RewardModel", "textenv/Prompts-v0", "--model", "model"])


def test_help_of_the_reward_model(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["train", "RewardModel", "--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    for flag in ("--rankings", "--model", "--out", "--demonstrations", "--validation", "--epochs", "--learning-rate"):
        assert flag in out


def test_what_is_no_reward_model_is_refused_as_a_reward(own):
    (own / "empty").mkdir()
    train = ["train", "PPO", "textenv/Prompts-v0", "--model", "model", "--prompts", "demos.jsonl"]
    assert "train_reward_model" in fails([*train, "--reward", "model"])
    assert "empty" in fails([*train, "--reward", "empty"])


def test_a_wrong_suite_is_answered_with_the_nearest():
    with pytest.raises(SystemExit, match=r"Unknown suite 'exakt'.*Did you mean `exact`"):
        main(["bench", "exakt"])


@pytest.mark.parametrize(("asked", "width", "expected"), [(None, 8, 1), (None, 3_000, 3), (2, 8, 2), (2, 3_000, 2)])
def test_a_small_model_runs_on_one_thread_unless_told_otherwise(monkeypatch, asked, width, expected):
    threads = [3]
    monkeypatch.setattr("torch.set_num_threads", threads.append)
    set_threads(asked, torch.nn.Linear(width, 2_000, device="meta"))
    assert threads[-1] == expected
