"""The exact benchmark at its smallest: seven completions, a few hundred tokens."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest

from benchmarks import exact
from benchmarks.exact import PRESETS, STRUCTURES, Cell, ExactArguments, cells, figures, make_env, play, run_exact

TINY = {"vocab_size": 3, "horizon": 2, "tokens": 300, "jobs": 1}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run, and its rows."""
    options = ExactArguments(
        agents=("RLOO", "BestOfN"), structures=("random", "trap"), seeds=3, out=tmp_path_factory.mktemp("exact"), **TINY
    )
    return options, run_exact(options)


def test_every_cell_has_its_row(run):
    options, rows = run
    assert len(rows) == 2 * 2 * 3
    assert {(row["seed"], row["task_seed"]) for row in rows} == {(0, 1000), (1, 1001), (2, 1002)}
    stored = [json.loads(line) for line in (options.out / "rows.jsonl").read_text().splitlines()]
    assert json.loads(json.dumps(rows)) == stored
    for row in rows:
        assert "error" not in row
        assert row["objective"] == pytest.approx(row["reward"] - row["beta"] * row["kl"], abs=1e-12)
        assert row["regret"] == pytest.approx(row["optimum"] - row["objective"], abs=1e-12)
        assert row["curve"][-1] == [row["tokens"], row["score"]] or row["curve"][-1] == (row["tokens"], row["score"])
        assert set(row["versions"]) >= {"textenv", "torch", "transformers"}
    trained = next(row for row in rows if row["name"] == "RLOO")
    assert trained["config"]["decay_timesteps"] == 300
    assert 300 <= trained["tokens"] == trained["accounts"]["timesteps"]


def test_the_table_has_the_figures_of_the_rows(run):
    options, rows = run
    lines = (options.out / "table.md").read_text().splitlines()
    columns = [part.strip() for part in next(line for line in lines if line.startswith("| agent")).split("|")[1:-1]]
    assert columns == ["agent", "random", "trap", "all", "tokens", "minutes"]
    for name in options.agents:
        line = next(line for line in lines if re.match(rf"\| {name}( \*)? \|", line))
        shown = dict(zip(columns, [part.strip() for part in line.split("|")[1:-1]], strict=True))
        for group in ("random", "trap", "all"):
            scores = sorted(row["score"] for row in rows if row["name"] == name and group in (row["structure"], "all"))
            # By hand: of three the middle one, and half-way between the first two; of six likewise.
            median = scores[1] if len(scores) == 3 else (scores[2] + scores[3]) / 2
            lower = (scores[0] + scores[1]) / 2 if len(scores) == 3 else scores[1] + 0.25 * (scores[2] - scores[1])
            assert shown[group] == f"{median:.3f} / {lower:.3f}"
    assert lines[0] == (
        "`textenv bench exact --agents RLOO BestOfN --structures random trap --seeds 3 --tokens 300 --vocab-size 3 --horizon 2`"
    )
    assert (options.out / "exact.png").read_bytes().startswith(b"\x89PNG")


def test_finished_cells_are_not_run_again(run, monkeypatch):
    options, rows = run
    monkeypatch.setattr(exact, "play", lambda cell: pytest.fail(f"{cell.file} was run again"))
    assert run_exact(options) == json.loads(json.dumps(rows))


def test_a_cell_under_other_settings_is_run_again(run, tmp_path, monkeypatch):
    options, _ = run
    (tmp_path / "cells").mkdir()
    for file in (options.out / "cells").iterdir():
        (tmp_path / "cells" / file.name).write_text(file.read_text())
    played = []
    monkeypatch.setattr(exact, "play", lambda cell: (played.append(cell.file), play(cell))[1])
    run_exact(replace(options, agents=("BestOfN",), structures=("trap",), seeds=1, task_seed=1001, out=tmp_path))
    assert played == ["BestOfN-trap-0.json"]


def test_a_failure_is_a_row_and_is_tried_again(tmp_path, monkeypatch):
    broken = replace(PRESETS["RLOO"], config={"minibatch_episodes": 0})
    monkeypatch.setitem(PRESETS, "RLOO", broken)
    options = ExactArguments(agents=("RLOO", "BestOfN"), structures=("trap",), seeds=1, out=tmp_path, **TINY)
    failed, finished = run_exact(options)
    assert failed["error"].startswith("ValueError: Expected minibatch_episodes >= 1")
    assert "score" in finished
    assert "RLOO (1 failed)" in (tmp_path / "table.md").read_text()
    played = []
    monkeypatch.setattr(exact, "play", lambda cell: (played.append(cell.name), play(cell))[1])
    run_exact(options)
    assert played == ["RLOO"]


@pytest.mark.parametrize("name", PRESETS)
def test_no_agent_is_above_the_frontier(name):
    (cell,) = cells(ExactArguments(agents=(name,), structures=("trap",), seeds=1, **TINY))
    row = play(cell)
    assert "error" not in row, row.get("traceback")
    assert row["reward"] <= row["frontier_reward"] + 1e-6
    assert row["score"] <= 1 + 1e-6
    # The bound again, from its definition: reward <= beta' log E_ref[exp(r / beta')] + beta' KL for any beta'.
    leaves = make_env(cell).unwrapped.leaves
    for beta in (0.05, 0.3, 0.5, 2.0):
        value = beta * np.log(np.exp(leaves.log_ref) @ np.exp(leaves.rewards / beta))
        assert row["reward"] <= value + beta * row["kl"] + 1e-6


@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_optimum_lies_on_the_frontier_and_what_is_more_would_be_seen(structure):
    cell = Cell(
        name="PPO", agent="PPO", config={}, structure=structure, seed=0, task_seed=1000, vocab_size=3, horizon=2, lanes=2,
        group_size=1, token_budget=1,
    )  # fmt: skip
    lanes = make_env(cell).unwrapped
    best = figures(lanes, lanes.solve().policy)
    assert best["score"] == pytest.approx(1)
    assert best["frontier_reward"] == pytest.approx(best["reward"], abs=1e-4)


def test_presets_do_not_know_the_tasks_that_are_played():
    assert ExactArguments().task_seed >= 1000
    assert len(cells(ExactArguments())) == len(PRESETS) * len(STRUCTURES) * 5


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"Did you mean .RLOO"):
        ExactArguments(agents=("RLO",))
