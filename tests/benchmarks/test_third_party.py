"""Agents of stable-baselines3 and sb3-contrib in the runner: small runs, and what they start from."""

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.cells import cells
from benchmarks.metrics import policy_of
from benchmarks.play import make_env, play
from benchmarks.suites import THIRD_PARTY, THIRD_PARTY_TEXT

TINY = {"vocab_size": 3, "horizon": 2}
TASK = replace(THIRD_PARTY.tasks["random"], settings=TINY | {"structure": "random"})


def small(name, **config):
    """The row of a short run on a tiny tree."""
    preset = THIRD_PARTY.agents[name]
    preset = replace(preset, tokens=64, lanes=8, config=dict(preset.config) | config)
    (cell,) = cells("third-party", replace(THIRD_PARTY, tasks={"random": TASK}, agents={name: preset}, seeds=1))
    row = play(cell)
    assert "error" not in row, row.get("traceback")
    return cell, row


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("sb3 PPO", {"n_steps": 4, "batch_size": 32}),
        ("sb3-contrib MaskablePPO", {"n_steps": 4, "batch_size": 32}),
        ("sb3-contrib TRPO", {"n_steps": 4, "batch_size": 32}),
        ("sb3 A2C", {}),
    ],
)
def test_policies_over_our_model_learn_from_the_reference_on(name, config):
    _, row = small(name, **config)
    assert row["accounts"]["timesteps"] >= 64
    assert 0 < row["metrics"]["kl"] < 5
    assert row["curve"]["score"][-1] == row["metrics"]["score"]


def test_dqn_ends_and_begins_as_a_greedy_policy():
    untrained = replace(THIRD_PARTY.agents["sb3 DQN"], trains=False)
    assert THIRD_PARTY.agents["sb3 DQN untrained"] == untrained
    cell, trained = small("sb3 DQN", learning_starts=8)
    _, before = small("sb3 DQN untrained")
    leaves = make_env(cell, 2).unwrapped.leaves
    # One completion always: its reward, and a KL of -log ref. All of them, one by one:
    beta, optimum = trained["metrics"]["beta"], trained["metrics"]["optimum"]
    floor = sum(np.exp(log_ref) * reward for log_ref, reward in zip(leaves.log_ref, leaves.rewards, strict=True))
    values = [reward - beta * -log_ref for log_ref, reward in zip(leaves.log_ref, leaves.rewards, strict=True)]
    scores = [(value - floor) / (optimum - floor) for value in values]
    for row in (before, trained):
        assert min(abs(row["metrics"]["score"] - score) for score in scores) < 1e-6
        assert row["metrics"]["best_greedy_score"] == pytest.approx(max(scores))


def test_what_is_gained_on_text_is_measured_against_the_reference_on_the_same_prompts():
    task = replace(THIRD_PARTY_TEXT.tasks["assistant"], prompts=8)
    sb3 = THIRD_PARTY_TEXT.agents["sb3 PPO"]
    sb3 = replace(sb3, lanes=8, config=dict(sb3.config) | {"n_steps": 24, "batch_size": 64})
    agents = {"sb3 PPO": sb3, "Reference": THIRD_PARTY_TEXT.agents["Reference"]}
    suite = replace(THIRD_PARTY_TEXT, tasks={"assistant": task}, agents=agents, seeds=1, tokens=1)
    after, before = map(play, cells("third-party-text", suite))
    assert "error" not in after, after.get("traceback")
    assert [s["prompt"] for s in after["samples"]] == [s["prompt"] for s in before["samples"]]
    assert before["metrics"]["kl"] == pytest.approx(0, abs=1e-5)
    assert before["metrics"]["objective"] == pytest.approx(before["metrics"]["reward"], abs=1e-5)
    assert abs(after["metrics"]["kl"]) > 1e-3
    assert after["metrics"]["objective"] == pytest.approx(
        after["metrics"]["reward"] - after["metrics"]["beta"] * after["metrics"]["kl"]
    )


def test_without_a_policy_there_is_no_exact_score():
    with pytest.raises(ValueError, match="object has no `policy` with `log_probs`"):
        policy_of(object())
