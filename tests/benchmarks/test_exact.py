"""The exact suite at its smallest: a few completions, a few hundred tokens."""

import json
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.cells import cells
from benchmarks.metrics import exact_figures
from benchmarks.play import make_env, play
from benchmarks.run import run_suite
from benchmarks.suites import EXACT, PRESETS, STRUCTURES, tree


def small(suite, tokens=300, agents=tuple(PRESETS), tasks=STRUCTURES, **changes):
    """The suite with tasks of a handful of completions and short runs."""
    settings = {"vocab_size": 3, "horizon": 2}
    return replace(
        suite,
        agents={name: replace(suite.agents[name], tokens=tokens) for name in agents},
        tasks={
            name: replace(suite.tasks[name], settings=dict(suite.tasks[name].settings) | settings) for name in tasks
        },
        **changes,
    )


@pytest.mark.parametrize("name", PRESETS)
def test_no_agent_is_above_the_frontier(name):
    (cell,) = cells("exact", small(EXACT, agents=(name,), tasks=("trap",), seeds=1))
    row = play(cell)
    assert "error" not in row, row.get("traceback")
    figures = row["metrics"]
    assert figures["reward"] <= figures["frontier_reward"] + 1e-6
    assert figures["score"] <= 1 + 1e-6
    assert figures["objective"] == pytest.approx(figures["reward"] - figures["beta"] * figures["kl"], abs=1e-12)
    assert figures["regret"] == pytest.approx(figures["optimum"] - figures["objective"], abs=1e-12)
    assert row["curve"]["score"][-1] == pytest.approx(figures["score"], abs=1e-12)
    if cell.trains:
        assert 300 <= row["accounts"]["timesteps"] == row["curve"]["tokens"][-1]
        assert cell.agent_settings["decay_timesteps"] == 300 or not PRESETS[name].decay
    # The bound again, from its definition: reward <= beta' log E_ref[exp(r / beta')] + beta' KL for any beta'.
    leaves = make_env(cell, 2).unwrapped.leaves
    for beta in (0.05, 0.3, 0.5, 2.0):
        value = beta * np.log(np.exp(leaves.log_ref) @ np.exp(leaves.rewards / beta))
        assert figures["reward"] <= value + beta * figures["kl"] + 1e-6


@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_optimum_lies_on_the_frontier_and_what_is_more_would_be_seen(structure):
    (cell,) = cells("exact", small(EXACT, agents=("PPO",), tasks=(structure,), seeds=1))
    lanes = make_env(cell, 2).unwrapped
    best = exact_figures(lanes, lanes.solve().policy)
    assert best["score"] == pytest.approx(1)
    assert best["frontier_reward"] == pytest.approx(best["reward"], abs=1e-4)
    assert best["reward"] == pytest.approx(best["optimum_reward"])
    assert best["kl"] == pytest.approx(best["optimum_kl"])


def test_best_of_n_has_a_point_per_n():
    (cell,) = cells("exact", small(EXACT, agents=("BestOfN",), tasks=("random",), seeds=1))
    curve = play(cell)["curve"]
    lanes = make_env(cell, 2).unwrapped
    assert curve["score"] == pytest.approx([lanes.best_of_n(n).score for n in (1, 2, 4, 8)], abs=1e-6)
    # n times the reference's mean length, token by token: 1 + P(the first token is not the stop token).
    log_ref = lanes.leaves.log_ref
    stops = float(np.exp(log_ref[(lanes.leaves.tokens < 3).sum(axis=1) == 1]).sum())
    assert curve["tokens"] == pytest.approx([n * (2 - stops) for n in (1, 2, 4, 8)])


def test_presets_do_not_know_the_tasks_that_are_played(tmp_path):
    assert EXACT.seeds >= 10
    found = cells("exact", EXACT)
    assert len(found) == len(PRESETS) * len(STRUCTURES) * EXACT.seeds
    assert {(cell.seed, cell.env_settings["seed_of_task"]) for cell in found} == {(s, 1000 + s) for s in range(10)}
    assert tree("random").first_task_seed == 1000


def test_the_suite_runs_and_its_rows_are_json(tmp_path):
    rows = run_suite("exact", small(EXACT, agents=("RLOO", "BestOfN"), tasks=("trap",), seeds=2), tmp_path)
    stored = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert len(stored) == 4
    for row in rows:
        assert row in stored
        assert set(row["versions"]) >= {"textenv", "torch", "transformers"}
