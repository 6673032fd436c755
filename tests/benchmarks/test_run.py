"""The runner: rows, resuming, failures, and the same rows wherever cells run."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import engines
from benchmarks.cells import IDENTITY, cells
from benchmarks.engines import Engine
from benchmarks.play import finite, play, without_time
from benchmarks.progress import Table
from benchmarks.records import ResultsExist, locked, read_row
from benchmarks.run import run_suite
from tests.benchmarks.suite_for_tests import mine, suite

ONE = replace(suite, tasks={"trap": suite.tasks["trap"]}, agents={"RLOO": suite.agents["RLOO"]}, seeds=1)


@pytest.fixture(scope="module")
def serial(tmp_path_factory):
    """The rows of an undisturbed run, and where they are."""
    out = tmp_path_factory.mktemp("serial")
    return out, run_suite("own", suite, out)


def pretend(monkeypatch):
    """Have cells answered at once; returns the names of the files that were played."""
    played = []

    def answer(cell, commit=None):
        played.append(cell.file)
        identity = {name: getattr(cell, name) for name in IDENTITY}
        figures = {"metrics": {"score": 0.5}, "accounts": {}, "curve": {}, "frontier": {}, "samples": []}
        time = {"began": 0.0, "seconds": 1.0, "cpu_seconds": 1.0}
        return identity | {"config": cell.config, "versions": {}, "commit": commit, "time": time, "host": {}} | figures

    monkeypatch.setattr(engines, "play", answer)
    return played


def test_every_cell_has_its_row(serial):
    out, rows = serial
    assert [(r["seed"], r["agent"], r["task"]) for r in rows] == [
        (seed, agent, task) for seed in (0, 1) for agent in ("RLOO", "Mine", "BestOfN") for task in ("random", "trap")
    ]
    assert len(list((out / "rows").iterdir())) == len(rows) == 12
    for row in rows:
        assert "error" not in row, row.get("traceback")
        assert {"config", "versions", "commit", "time", "host", "metrics", "accounts", "curve", "samples"} <= set(row)
        assert row["config"]["env_settings"]["seed_of_task"] == 1000 + row["seed"]
        assert row["metrics"]["brevity"] == pytest.approx(-row["metrics"]["length"])
        assert row["time"]["cpu_seconds"] > 0
        assert len(row["samples"]) == 1  # the task has one prompt
    trained = rows[0]
    assert trained["accounts"]["timesteps"] >= 130
    assert trained["accounts"]["gradient_tokens"] > 0
    assert trained["curve"]["tokens"] == sorted(trained["curve"]["tokens"])
    assert len(trained["curve"]["seconds"]) == len(trained["curve"]["score"]) > 1


def test_an_agent_of_ones_own_is_run_like_ours(serial):
    _, rows = serial
    ours, theirs = ([r for r in rows if r["agent"] == name] for name in ("RLOO", "Mine"))
    for a, b in zip(ours, theirs, strict=True):
        assert a["metrics"] == b["metrics"]


def test_evaluation_asks_all_agents_the_same_prompts():
    from benchmarks.suites import SMOKE

    task = replace(SMOKE.tasks["arithmetic"], prompts=4)
    agents = {name: SMOKE.agents[name] for name in ("PPO", "BestOfN", "Reference")}
    found = cells("smoke", replace(SMOKE, tasks={"arithmetic": task}, agents=agents, seeds=2, tokens=40))
    rows = [play(cell) for cell in found]
    assert not [row["traceback"] for row in rows if "error" in row]
    assert len({tuple(sample["prompt"] for sample in row["samples"]) for row in rows}) == 1
    by_name = {row["agent"]: row["metrics"] for row in rows}
    assert by_name["Reference"]["kl"] == pytest.approx(0, abs=1e-5)
    assert by_name["BestOfN"]["kl"] == pytest.approx(1.3863 - 0.75, abs=1e-4)  # log 4 - 3/4
    for figures in by_name.values():
        assert figures["objective"] == pytest.approx(figures["reward"] - 0.02 * figures["kl"])
        assert 0 <= figures["reward"] <= figures["pass_at_2"] <= 1


def test_results_are_kept_unless_asked(serial, monkeypatch):
    out, rows = serial
    played = pretend(monkeypatch)
    with pytest.raises(ResultsExist, match=r"--resume.*--overwrite"):
        run_suite("own", suite, out)
    assert run_suite("own", suite, out, resume=True) == rows
    with pytest.raises(
        ResultsExist, match=r"RLOO--random--0.json was made with other settings \(agent_settings, tokens\)"
    ):
        run_suite("own", replace(suite, tokens=131), out, resume=True)
    with pytest.raises(ResultsExist, match="of suite 'own', not 'other'"):
        run_suite("other", suite, out, overwrite=True)
    assert not played


def test_overwriting_runs_what_is_asked_for_anew(tmp_path, monkeypatch):
    played = pretend(monkeypatch)
    run_suite("own", suite, tmp_path)
    kept = (tmp_path / "rows/RLOO--random--0.json").stat().st_mtime_ns
    played.clear()
    run_suite("own", ONE, tmp_path, overwrite=True)
    assert played == ["RLOO--trap--0.json"]
    assert (tmp_path / "rows/RLOO--random--0.json").stat().st_mtime_ns == kept
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 12


def test_resuming_runs_what_is_missing_failed_or_half_written(tmp_path, monkeypatch):
    played = pretend(monkeypatch)
    rows = run_suite("own", suite, tmp_path)
    folder = tmp_path / "rows"
    (folder / "RLOO--random--0.json").unlink()
    (folder / "RLOO--trap--1.json").write_text('{"suite": "own", "ta')
    failed = json.loads((folder / "Mine--trap--0.json").read_text()) | {"error": "OSError: no space"}
    (folder / "Mine--trap--0.json").write_text(json.dumps(failed))
    (folder / ".BestOfN--trap--0.json.123").write_text("{")  # its writer was killed
    played.clear()
    assert run_suite("own", suite, tmp_path, resume=True) == rows
    assert sorted(played) == ["Mine--trap--0.json", "RLOO--random--0.json", "RLOO--trap--1.json"]
    assert not list(folder.glob(".*"))


def test_a_directory_has_one_writer_at_a_time(tmp_path, monkeypatch):
    pretend(monkeypatch)
    with locked(tmp_path), pytest.raises(ResultsExist, match="Another run is writing"):
        run_suite("own", suite, tmp_path)
    run_suite("own", suite, tmp_path)


def test_a_failure_is_a_row_and_the_rest_goes_on(tmp_path):
    agents = {"Failing": mine("Failing"), "BestOfN": suite.agents["BestOfN"]}
    failed, finished = run_suite("own", replace(ONE, agents=agents), tmp_path)
    assert failed["error"] == "RuntimeError: this agent cannot learn"
    assert "in update" in failed["traceback"]
    assert finished["metrics"]["score"] <= 1


def test_processes_give_the_rows_of_a_serial_run_and_survive_one_that_dies(serial, tmp_path):
    _, rows = serial
    agents = {"Dying": mine("Dying"), "RLOO": suite.agents["RLOO"]}
    found = run_suite(
        "own", replace(suite, tasks={"trap": suite.tasks["trap"]}, agents=agents), tmp_path, engine=Engine(jobs=2)
    )
    died, ours, lived, ours_too = found
    assert died["error"] == "Lost: its process died (exit code 9)"
    assert lived["metrics"] == ours_too["metrics"]  # under another name it is the same agent
    same = [row for row in rows if (row["agent"], row["task"]) == ("RLOO", "trap")]
    assert [without_time(ours), without_time(ours_too)] == list(map(without_time, same))


def test_without_time_leaves_all_that_a_run_has_computed():
    row = {
        "metrics": {"a": 1},
        "time": {"seconds": 3},
        "host": {},
        "curve": {"tokens": [1], "seconds": [2], "score": [3]},
    }
    assert without_time(row) == {"metrics": {"a": 1}, "curve": {"tokens": [1], "score": [3]}}


def test_what_json_does_not_know_is_none():
    assert finite({"a": float("nan"), "b": [1.0, (float("inf"), "x", 2)]}) == {"a": None, "b": [1.0, [None, "x", 2]]}


def test_two_cells_never_share_a_file():
    agents = {"a/b": suite.agents["RLOO"], "a b": suite.agents["RLOO"]}
    with pytest.raises(ValueError, match="special characters"):
        cells("own", replace(suite, agents=agents))
    assert len({cell.file for cell in cells("own", suite)}) == 12


def test_the_time_left_is_by_what_agents_took(monkeypatch):
    found = cells("own", replace(suite, agents={name: suite.agents[name] for name in ("RLOO", "Mine")}, seeds=2))
    table = Table(suite, found, found, {}, parallel=2)
    assert table.seconds_left() is None
    for cell in found[:2]:  # RLOO at seed 0: 6 and 12 seconds for equally many tokens
        table.started(cell)
        seconds = 6.0 if cell.task == "random" else 12.0
        table.finished(cell, {"agent": cell.agent, "time": {"seconds": seconds}})
    assert table.seconds_left() == pytest.approx(6 * 9 / 2)  # six cells of nine seconds, two at a time


def test_rows_of_a_row_file_that_is_no_row_are_not_read(tmp_path):
    (tmp_path / "x.json").write_text("[1]")
    assert read_row(tmp_path / "x.json") is None
    assert read_row(Path(tmp_path / "absent.json")) is None
