"""Report and comparison, from rows whose figures are made up, so that every number shown can be worked by hand."""

import json
import re

import pytest

from benchmarks.comparison import compare_results
from benchmarks.report import sample_groups, write_report
from benchmarks.results import read_results
from benchmarks.tables import leaderboard
from textenv.cli import main

SCORES = {"good": [[0.8, 0.6], [0.9, 0.7], [1.0, 0.8]], "plain": [[0.5, 0.4], [0.6, 0.5], [0.7, 0.6]]}
"""By seed, on the tasks a and b."""


def write_rows(out, scores=SCORES, failing=(), exact=False, bounded="score", samples=True):
    (out / "rows").mkdir(parents=True)
    manifest = {
        "suite": "own", "title": "A title", "headline": "score", "bounded": bounded, "frontier": ["reward"],
        "columns": ["reward", "kl"], "lower_is_better": [], "tasks": ["a", "b"], "commands": ["textenv bench own"],
        "agents": {name: {"follows_j": name != "plain"} for name in scores},
    }  # fmt: skip
    (out / "suite.json").write_text(json.dumps(manifest))
    for agent, by_seed in scores.items():
        for seed, by_task in enumerate(by_seed):
            for task, score in zip("ab", by_task, strict=True):
                row = {
                    "suite": "own", "task": task, "agent": agent, "seed": seed, "commit": "c0ffee" * 6 + "0000",
                    "config": {"agent_class": agent, "env_settings": {"seed_of_task": seed}},
                    "versions": {"textenv": "0.1.0"}, "time": {"cpu_seconds": 30.0, "seconds": 31.0},
                }  # fmt: skip
                if (agent, task, seed) in failing:
                    row |= {"error": "ValueError: no", "traceback": "Traceback: it failed"}
                else:
                    figures = {"score": score, "reward": 2 * score, "kl": 1 + score, "beta": 0.5}
                    if exact:
                        figures |= {"optimum_reward": 2.0, "optimum_kl": 2.0, "reward_reference": 0.0}
                    row |= {
                        "metrics": figures,
                        "accounts": {"timesteps": 1000},
                        "curve": {"tokens": [10, 1000], "seconds": [0.1, 2.0], "score": [0.0, score]},
                        "frontier": {"kl": [1.0, 3.0], "reward": [1.0, 3.0]} if exact else {},
                        "samples": [{"prompt": "1+1=", "answer": f"<{agent}>", "reward": score}] if samples else [],
                    }
                (out / "rows" / f"{agent}--{task}--{seed}.json").write_text(json.dumps(row))
    return out


def test_the_leaderboard_by_hand(tmp_path):
    ranks, by_task, by_metric, versus = leaderboard(write_rows(tmp_path))
    assert ranks.header == ["agent", "IQM", "95% interval", "median", "gap", "seeds", "tokens", "CPU min"]
    good, plain = ranks.rows
    # Six runs: one is cut at each end. (.7 + .8 + .8 + .9) / 4; tasks' means .9 and .7; gap 1 - .8; six runs of 30 s.
    assert [good[0], good[1], *good[3:]] == ["good", "0.800", "0.800", "0.200", "3", "1,000", "3.0"]
    assert [plain[0], plain[1], plain[3]] == ["plain *", "0.550", "0.550"]
    low, high = map(float, good[2].split(" to "))
    assert 0.6 <= low < 0.8 < high <= 1
    assert by_task.rows[0] == ["good", "0.900 / 0.850", "0.700 / 0.650", "0.800 / 0.725"]
    assert by_metric.rows[0][1].startswith("1.600 ± ")
    # Every run of good beats every one of plain on a; on b too, but for .6 against .6, a tie: (1 + 8.5 / 9) / 2.
    assert versus.rows[0][:2] == ["plain *", f"{(1 + 8.5 / 9) / 2:.3f}"]
    # Differences by seed: (.3 + .2) / 2 each, so the interval has no width.
    assert versus.rows[0][3:] == ["+0.250", "0.250 to 0.250"]


def test_few_seeds_are_said_to_be_few(tmp_path):
    note = leaderboard(write_rows(tmp_path))[0].note
    share = float(re.search(r"With 3 seeds on 2 tasks .* really covers (\d+)%", note).group(1))
    assert 80 <= share <= 90
    many = {"good": [[0.1 * s, 0.2] for s in range(10)]}
    assert "really covers" not in leaderboard(write_rows(tmp_path / "many", many))[0].note
    assert "no interval" in leaderboard(write_rows(tmp_path / "one", {"good": [[0.1, 0.2]]}))[0].note


def test_failures_are_counted_and_their_seeds_left_out(tmp_path):
    out = write_rows(tmp_path, failing={("good", "b", 2), ("plain", "a", 0), ("plain", "a", 1), ("plain", "a", 2)})
    ranks = leaderboard(out)[0]
    good, plain = ranks.rows
    assert good[:2] == ["good (1 failed)", "0.750"]  # .6 .7 .8 .9: one cut at each end
    assert plain[:4] == ["plain * (3 failed)", "-", "-", "-"]
    pages = [path.read_text() for path in write_report(out)]
    assert "Traceback: it failed" in pages[0]
    assert "Failed: plain, a, seed 1: ValueError: no" in pages[1]


@pytest.mark.parametrize("exact", [False, True])
def test_the_report_is_one_file_and_says_what_made_every_figure(tmp_path, exact):
    out = write_rows(tmp_path, exact=exact)
    page, text = (path.read_text() for path in write_report(out))
    pictures = ["frontier", "curves-tokens", "curves-seconds", "profile"]
    assert sorted(path.stem for path in (out / "pictures").iterdir()) == sorted(pictures)
    assert page.count("data:image/png;base64,") == 4
    assert not re.findall(r"(?:src|href)='(?!data:)", page)  # self-contained
    figures = page.count("<figure>") + page.count("<table>")
    assert page.count("<code>textenv bench own</code>, commit c0ffeec0ffee") >= figures + 1  # and the lead
    assert "&lt;good&gt;" in page  # an answer is text, not markup
    for name in pictures:
        assert f"(pictures/{name}.png)" in text
    assert "| good | 0.800 |" in text
    assert "plain \\*" in text


def test_a_report_without_samples_or_a_bounded_metric(tmp_path):
    page, _ = (path.read_text() for path in write_report(write_rows(tmp_path, bounded=None, samples=False)))
    assert "Performance profile" not in page
    assert "Answers to the same prompts" not in page


def test_answers_to_one_prompt_stand_together(tmp_path):
    ((prompt, answers, seed),) = sample_groups(read_results(write_rows(tmp_path)))
    assert (prompt, seed) == ("1+1=", 0)
    assert answers == [("good", "<good>", 0.8), ("plain", "<plain>", 0.5)]


def test_comparing_by_hand(tmp_path):
    better = {"good": [[0.9, 0.7], [1.1, 0.9], [1.3, 1.1]], "new": SCORES["plain"]}
    comparison = compare_results(str(write_rows(tmp_path / "a")), str(write_rows(tmp_path / "b", better)))
    assert comparison.alone == ["new", "plain"]
    by_metric = {d.metric: d for d in comparison.differences}
    assert list(by_metric) == ["score", "reward", "kl"]  # the headline first; beta is the task's
    score = by_metric["score"]
    assert (score.before, score.after) == pytest.approx((0.8, 1.0))
    # Differences .1, .2, .3: t(0.975, 2) = 4.3027 times a standard error of .1 / sqrt(3).
    assert score.difference == pytest.approx((0.2, 0.2 - 0.24841, 0.2 + 0.24841), abs=1e-4)
    assert (score.verdict, by_metric["kl"].verdict) == ("undecided", "")
    assert {d.metric: d.verdict for d in compare_results(f"{tmp_path}/a:plain", f"{tmp_path}/a:good").differences} == {
        "score": "better", "reward": "better", "kl": "",
    }  # fmt: skip


def test_the_exit_status_says_whether_the_headline_is_worse(tmp_path, capsys):
    write_rows(tmp_path / "a")
    main(["compare", f"{tmp_path}/a:plain", f"{tmp_path}/a:good"])
    assert "score (headline): 1 better." in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        main(["compare", f"{tmp_path}/a:good", f"{tmp_path}/a:plain"])
    assert stopped.value.code == 1
    assert "score (headline): 1 worse." in capsys.readouterr().out


def test_what_cannot_be_compared_is_answered(tmp_path):
    write_rows(tmp_path / "a")
    with pytest.raises(SystemExit, match=r"has no agent 'goood'.*Did you mean `good`"):
        main(["compare", f"{tmp_path}/a:goood", f"{tmp_path}/a:plain"])
    with pytest.raises(SystemExit, match="DIR:AGENT twice"):
        main(["compare", f"{tmp_path}/a", f"{tmp_path}/a:plain"])
    with pytest.raises(SystemExit, match="No results in"):
        main(["report", str(tmp_path / "b")])
    write_rows(tmp_path / "c", {"other": SCORES["good"]})
    with pytest.raises(SystemExit, match="agents and tasks in common"):
        main(["compare", f"{tmp_path}/a", f"{tmp_path}/c"])
    path = write_rows(tmp_path / "d") / "rows/good--a--1.json"
    row = json.loads(path.read_text())
    row["config"]["env_settings"]["seed_of_task"] = 7
    path.write_text(json.dumps(row))
    with pytest.raises(SystemExit, match="a of seed 1 is not the same task in both: seed_of_task 1 and 7"):
        main(["compare", f"{tmp_path}/a", f"{tmp_path}/d"])


def test_the_report_at_the_command_line(tmp_path, capsys):
    out = write_rows(tmp_path / "a")
    main(["report", str(out)])
    shown = capsys.readouterr().out
    assert "Leaderboard: score" in shown
    assert str(out / "report.html").replace("\n", "") in shown.replace("\n", "")
