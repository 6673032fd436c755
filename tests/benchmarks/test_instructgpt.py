"""The recipe in miniature, at its smallest: every stage runs, nothing is done twice, the gold standard comes last."""

import json
import shutil

import numpy as np
import pytest

from benchmarks import instructgpt
from benchmarks.instructgpt import STAGES, DemoArguments, Recipe, run_demo
from benchmarks.records import locked
from textenv.cli.arguments import UsageError
from textenv.tasks.assistant import gold, labelers
from textenv.tasks.assistant.requests import make_requests


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run, and the stages during which the gold standard was asked."""
    out = tmp_path_factory.mktemp("demo") / "run"
    options = DemoArguments(size="tiny", out=out, cores=1)  # in this process, where it can be watched
    judged_in, stage_now = set(), [None]
    real = gold.judge

    def watched(request, answer):
        judged_in.add(stage_now[0])
        return real(request, answer)

    patch = pytest.MonkeyPatch()
    patch.setattr(gold, "judge", watched)
    for stage in STAGES:
        method = getattr(Recipe, f"make_{stage}")

        def noted(self, *args, _method=method, _stage=stage, **kwargs):
            stage_now[0] = _stage
            return _method(self, *args, **kwargs)

        patch.setattr(Recipe, f"make_{stage}", noted)
    run_demo(options)
    patch.undo()
    return options, judged_in


def test_the_gold_standard_is_asked_in_the_last_stage_only(run):
    _, judged_in = run
    assert judged_in == {"judged"}


def test_report_and_summary_hold_the_same_figures(run):
    options, _ = run
    summary = json.loads((options.out / "summary.json").read_text())
    report = (options.out / "report.html").read_text()
    rows = summary["stages"]["judged"]["rows"]
    for row in rows.values():
        assert row["wins"] + row["ties"] + row["losses"] == summary["stages"]["judged"]["prompts"]
        assert f"<td>{row['gold']:.3f}</td>" in report
    assert "src='data:image/png" in report
    assert "http" not in report.replace("http-equiv", "")  # nothing is fetched


def test_a_finished_run_is_not_done_again(run, monkeypatch):
    options, _ = run
    for stage in STAGES:
        monkeypatch.setattr(Recipe, f"make_{stage}", lambda self: pytest.fail("a finished stage was run again"))
    assert set(Recipe(options).run()) == set(STAGES)


def test_an_interrupted_run_goes_on_where_it_stopped(run, tmp_path, monkeypatch):
    options, _ = run
    part = DemoArguments(size="tiny", out=tmp_path / "part")
    Recipe(part)
    stages = json.loads((options.out / "stages.json").read_text())
    (part.out / "stages.json").write_text(json.dumps({"base": stages["base"]}))
    begun = []
    for stage in STAGES:
        monkeypatch.setattr(Recipe, f"make_{stage}", lambda self, stage=stage: begun.append(stage) or {})
    Recipe(part).run()
    assert begun == list(STAGES)[1:]


def test_a_directory_of_another_seed_is_refused(run):
    options, _ = run
    with pytest.raises(ValueError, match="holds a run with"):
        Recipe(DemoArguments(size="tiny", out=options.out, seed=options.seed + 1))


def test_what_cannot_begin_is_said_in_one_line(run, tmp_path):
    options, _ = run
    (tmp_path / "file").write_text("")
    for wrong, message in [
        (DemoArguments(size="tiny", out=options.out, seed=options.seed + 1), "holds a run with"),
        (DemoArguments(size="tiny", out=tmp_path / "file"), "file"),
        (DemoArguments(size="tiny", out=tmp_path / "run", cores=0), "--cores to be at least 1, got 0"),
    ]:
        with pytest.raises(UsageError, match=message):
            run_demo(wrong)
    with locked(options.out), pytest.raises(UsageError, match="Another run is writing"):
        run_demo(options)


def test_wins_and_losses_are_counted_per_request():
    import numpy as np

    counts = instructgpt.against(np.array([1.0, 0.5, 0.2, 0.9]), np.array([0.5, 0.5, 0.5, 0.1]))
    assert (counts["wins"], counts["ties"], counts["losses"]) == (2, 1, 1)
    assert counts["net_win_rate"] == pytest.approx(0.25)


def test_two_processes_write_what_one_would(run, tmp_path):
    options, _ = run
    part = DemoArguments(size="tiny", out=tmp_path / "part", cores=2)
    Recipe(part)
    for name in ("base", "sft"):
        shutil.copytree(options.out / name, part.out / name)
    Recipe(part).make_rankings()
    assert (part.out / "rankings.jsonl").read_text() == (options.out / "rankings.jsonl").read_text()


def test_a_job_that_fails_is_named(run, tmp_path, capfd):
    recipe = Recipe(DemoArguments(size="tiny", out=tmp_path / "part", cores=2))
    job = (instructgpt.write_answers, (make_requests("train", 2, seed=0), np.array([4, 4]), 0, "answers"))
    with pytest.raises(RuntimeError, match="answers failed"):
        recipe.side_by_side({"answers": job})  # there is no model yet
    assert "sft" in capfd.readouterr().err


def test_one_of_the_ranked_answers_is_to_another_prompt(run):
    options, _ = run
    rows = [json.loads(line) for line in (options.out / "rankings.jsonl").read_text().splitlines()]
    assert all(4 <= len(row["completions"]) <= 9 for row in rows)
    people = len(labelers.TRAINING_LABELERS)  # each of them ranks the same answers, row by row
    assert all(row["completions"] == rows[i - i % people]["completions"] for i, row in enumerate(rows))
    own = [text for row in rows for text in row["completions"][:-1]]
    assert all(row["completions"][-1] in own for row in rows)
