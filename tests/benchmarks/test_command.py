"""`textenv bench` at the command line: which parts of which suite are run."""

import json
from pathlib import Path

import pytest

from benchmarks.cells import cells
from benchmarks.command import SuiteArguments, command, find_suite, selected
from benchmarks.metrics import METRICS, Answers, distinct
from benchmarks.play import find_agent
from benchmarks.suites import SUITES
from textenv.cli import main

OWN = str(Path(__file__).parent / "suite_for_tests.py")


@pytest.mark.parametrize("name", [name for name in SUITES if name != "custom"])
def test_every_suite_can_be_run_as_it_stands(name):
    suite = SUITES[name]
    found = cells(name, suite)
    assert len(found) == len(suite.agents) * len(suite.tasks) * suite.seeds
    assert set(suite.metrics) <= set(METRICS)
    for cell in found:
        assert json.loads(json.dumps(cell.config)) == cell.config  # plain data
    for preset in suite.agents.values():
        assert callable(find_agent(preset.agent))


def test_parts_of_a_suite():
    options = SuiteArguments(
        agents=("PPO", f"{OWN}:Mine"), tasks=("trap", "textenv/Arithmetic-v0"), seeds=3, tokens=500, task_seed=7,
        env_arg=["beta=0.2", "model=x"], agent_arg=["learning_rate=1e-3"],
    )  # fmt: skip
    suite = selected("exact", SUITES["exact"], options)
    assert list(suite.agents) == ["PPO", "Mine"]
    assert suite.agents["Mine"].group_size == 4  # it compares completions of one prompt
    assert [preset.tokens for preset in suite.agents.values()] == [500, 500]
    assert [preset.config["learning_rate"] for preset in suite.agents.values()] == [1e-3, 1e-3]
    assert suite.tasks["trap"].settings == {"structure": "trap", "beta": 0.2, "model": "x"}
    assert suite.tasks["textenv/Arithmetic-v0"].env == "textenv/Arithmetic-v0"
    assert [cell.env_settings["seed_of_task"] for cell in cells("exact", suite) if cell.task == "trap"][::2] == [
        7,
        8,
        9,
    ]
    assert suite.seeds == 3
    assert selected("exact", SUITES["exact"], SuiteArguments()) == SUITES["exact"]


def test_the_command_of_a_report_is_what_makes_its_rows():
    options = SuiteArguments(
        agents=("PPO", "a b.py:C"), seeds=3, env_arg=["beta=0.2"], jobs=2, out=Path("x"), resume=True, ray=""
    )
    assert command("exact", options) == "textenv bench exact --agents PPO 'a b.py:C' --seeds 3 --env-arg beta=0.2"
    assert command("exact", SuiteArguments()) == "textenv bench exact"


def test_a_suite_of_ones_own_is_run_and_reported(tmp_path, capsys):
    flags = ["--agents", "BestOfN", "--tasks", "trap", "--seeds", "2", "--out", str(tmp_path)]
    main(["bench", f"{OWN}:suite", *flags])
    shown = capsys.readouterr().out
    assert "2 runs, 0 of them finished before." in shown
    assert "Leaderboard: score" in shown
    assert {path.name for path in tmp_path.iterdir()} >= {
        "rows",
        "rows.jsonl",
        "suite.json",
        "report.html",
        "report.md",
    }
    with pytest.raises(SystemExit, match="--resume"):
        main(["bench", f"{OWN}:suite", *flags])
    main(["bench", f"{OWN}:suite", *flags, "--resume"])
    assert "2 runs, 2 of them finished before." in capsys.readouterr().out


@pytest.mark.parametrize("others", [[], ["BestOfN"]])
def test_when_a_run_fails_the_status_says_so(others, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "custom", "--tasks", "textenv/Tree-v0", "--agents", f"{OWN}:Failing", *others, "--seeds", "1",
              "--tokens", "50", "--agent-arg", "episodes_per_update=8", "--env-arg", "horizon=2", "--out", str(tmp_path)])  # fmt: skip
    assert stopped.value.code == 1
    assert "this agent cannot learn" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["exakt"], "Did you mean `exact`"),
        ([OWN], "suite_for_tests.py:suite"),
        ([f"{OWN}:siute"], "Did you mean `suite`"),
        ([f"{OWN}:mine"], "to be a benchmarks.suites.Suite"),
        (["exact", "--agents", "PPPO"], "Did you mean `PPO`"),
        (["exact", "--tasks", "trapp"], "Did you mean `trap`"),
        (["exact", "--tasks", "textenv/Tre-v0"], "Did you mean `textenv/Tree-v0`"),
        (["exact", "--seeds", "0"], "Expected --seeds >= 1"),
        (["exact", "--resume", "--overwrite"], "got both"),
        (["exact", "--env-arg", "beta"], "Expected --env-arg name=value"),
        (["custom"], "give --agents and --tasks"),
    ],
    ids=lambda value: " ".join(value)[-30:] if isinstance(value, list) else "",
)
def test_what_the_user_can_mend_is_answered(arguments, expected, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        main(["bench", *arguments, *(["--out", str(tmp_path)] if len(arguments) > 1 else [])])
    assert expected in str(stopped.value.code)
    assert not list(tmp_path.iterdir())


def test_tokens_are_a_whole_number(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "exact", "--tokens", "ten"])
    assert "expected a whole number such as 1000 or 1e3" in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_suites_are_listed(capsys):
    main(["bench"])
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in (*SUITES, "speed", "instructgpt"))
    assert find_suite("exact") == ("exact", SUITES["exact"])


def test_distinct_n_grams_by_hand():
    texts = [[1, 2, 1, 2], [2, 1]]
    assert distinct(texts, 1) == pytest.approx(2 / 6)
    assert distinct(texts, 2) == pytest.approx(2 / 4)  # 12 21 12 and 21
    assert distinct([[1]], 2) != distinct([[1]], 2)  # nan: there are none


def test_the_assistants_measures_are_against_the_reference():
    import gymnasium as gym
    import numpy as np

    import textenv  # noqa: F401  # registers the ids
    from agents import BestOfN
    from agents.base import LanguageModelAgent
    from agents.rollout import run_prompts
    from textenv.tasks.assistant.gold import judge
    from textenv.tasks.assistant.task import requests_of

    def answers_of(agent_class, split, **settings):
        lanes = gym.make_vec("textenv/Assistant-v0", num_envs=8, split=split).unwrapped
        return Answers(
            agent=agent_class(lanes, seed=0, **settings),
            env_id="textenv/Assistant-v0",
            lanes=lanes,
            split=split,
            prompt_ids=np.arange(16),
            samples=1,
            seed=5,
            elsewhere=lambda other: answers_of(agent_class, other, **settings),
        )

    def measured(agent_class, **settings):
        answers = answers_of(agent_class, "test", **settings)
        return METRICS["assistant"](answers) | METRICS["wording"](answers), METRICS["sampled"](answers)

    same, sampled = measured(LanguageModelAgent)
    assert (same["win_rate"], same["labelers_win_rate"], sampled["kl"]) == pytest.approx((0.5, 0.5, 0.0), abs=1e-5)
    better, chosen = measured(BestOfN, n=4)
    assert chosen["reward"] > sampled["reward"]
    assert better["win_rate_low"] < better["win_rate"] < better["win_rate_high"]
    assert better["lm_loss"] == pytest.approx(same["lm_loss"])  # nothing was trained
    for figures in (same, better):
        assert figures["cost_of_wording"] == pytest.approx(figures["gold"] - figures["gold_unseen_wording"])
    unseen = gym.make_vec("textenv/Assistant-v0", num_envs=8, split="test_paraphrases").unwrapped
    agent = LanguageModelAgent(unseen, seed=0)
    agent.set_random_seed(5)
    answers = unseen.completions(run_prompts(agent, unseen, np.arange(16)))
    by_hand = [judge(*pair).total for pair in zip(requests_of("test_paraphrases"), answers, strict=False)]
    assert same["gold_unseen_wording"] == pytest.approx(np.mean(by_hand))
