"""Over-optimisation: the estimators against enumeration, the fits against known curves, and the experiment at its smallest."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest

from benchmarks import overoptimization as oo
from benchmarks.overoptimization import Experiment, OveroptimizationArguments, Plan, Proxy
from benchmarks.overoptimization_report import reinforced
from textenv.tasks.assistant import gold
from textenv.tasks.assistant.task import requests_of


@pytest.mark.parametrize("n", [1, 2, 3, 6, 7])
def test_the_best_of_n_is_that_of_all_subsets(n):
    scores = np.array([0.3, -1.0, 2.0, 0.3])  # the first and the last tie
    counts = np.array([2, 1, 1, 3])
    drawn = np.repeat(np.arange(4), counts)  # the pool, sample by sample
    expected = np.zeros(4)
    subsets = list(itertools.combinations(range(7), n))
    for subset in subsets:
        best = scores[drawn[list(subset)]].max()
        among = [drawn[i] for i in subset if scores[drawn[i]] == best]
        for answer in among:
            expected[answer] += 1 / len(among) / len(subsets)
    np.testing.assert_allclose(oo.best_of_n_weights(scores, counts, n), expected, atol=1e-12)


def test_best_of_more_than_there_are_is_refused():
    with pytest.raises(ValueError, match="from 1 to 3, the number of samples, got 4"):
        oo.best_of_n_weights(np.zeros(2), np.array([1, 2]), 4)


def test_the_estimate_of_best_of_n_is_unbiased():
    """Averaged over all pools of four samples it is the exact expectation under the policy, which has three answers."""
    p, scores, worth = np.array([0.5, 0.3, 0.2]), np.array([0.0, 1.0, 2.0]), np.array([0.1, 0.9, 0.4])
    average = 0.0
    for pool in itertools.product(range(3), repeat=4):
        counts = np.bincount(pool, minlength=3)
        seen = counts > 0
        weights = oo.best_of_n_weights(scores[seen], counts[seen], 3)
        average += p[list(pool)].prod() * (weights @ worth[seen])
    best = np.array([0.5**3, 0.8**3 - 0.5**3, 1 - 0.8**3])  # F(y)^n - F-(y)^n
    assert average == pytest.approx(best @ worth, abs=1e-12)


def test_the_kl_of_best_of_n_by_hand_and_below_its_bound():
    # Two answers, each half of the pool: the better one is the best of two with 3/4.
    by_hand = 0.75 * np.log(1.5) + 0.25 * np.log(0.5)
    assert oo.kl_of_best_of_n(np.array([1.0, 0.0]), np.array([5, 5]), 2) == pytest.approx(by_hand)
    assert by_hand < oo.kl_bound(2) == pytest.approx(np.log(2) - 0.5)
    # Without repeated answers the bound is nearly met, until n comes near the size of the pool.
    many = oo.kl_of_best_of_n(np.arange(4096.0), np.ones(4096, np.int64), 16)
    assert many == pytest.approx(oo.kl_bound(16), abs=0.01)


@pytest.mark.parametrize(("g", "peak"), [(oo.best_of_n_form, 1.5 / (2 * 0.4)), (oo.rl_form, np.exp(1.5 / 0.4 - 1))])
def test_a_fit_recovers_its_curve_and_foretells_it(g, peak):
    d = np.linspace(0, 1.5 * peak, 40)
    gain = np.array([x * (1.5 - 0.4 * (x if g is oo.best_of_n_form else np.log(x))) if x else 0.0 for x in d])
    assert d[gain.argmax()] == pytest.approx(peak, rel=0.05)  # where Gao et al.'s forms have their peaks
    found = oo.fit_quality(d, gain, g)
    assert (found["a"], found["b"]) == pytest.approx((1.5, 0.4))
    assert (found["a_low"], found["b_low"]) == pytest.approx((1.5, 0.4))
    assert found["r2"] == pytest.approx(1)
    assert found["r2_out_of_sample"] == pytest.approx(1)
    assert found["error_out_of_sample"] == pytest.approx(0, abs=1e-9)
    other = oo.fit_quality(d, np.sqrt(d), g)
    assert other["r2_out_of_sample"] < other["r2"] < 0.99


def test_a_fall_is_measured_and_luck_is_not():
    rng = np.random.default_rng(0)
    level = rng.normal(size=400)  # prompts differ, and so does every measurement
    path = np.concatenate([np.linspace(0, 0.5, 6), np.linspace(0.5, 0.2, 7)[1:]])

    def measure(path):
        return path[None, :, None] + level + rng.normal(scale=0.2, size=(3, len(path), 400))

    found = oo.fall(measure(path), repetitions=500)
    assert found["peaks"] == [5, 5]
    assert found["low"] < 0.3 < found["high"]
    assert found["high"] - found["low"] < 0.1
    flat = [oo.fall(measure(np.zeros(12)), repetitions=10)["fall"] for _ in range(60)]
    assert abs(np.mean(flat)) < 4 * np.std(flat) / np.sqrt(60)
    lucky = [(m := measure(np.zeros(12)).mean(axis=(0, 2))).max() - m[-1] for _ in range(60)]
    assert np.mean(lucky) > 4 * np.std(lucky) / np.sqrt(60)


def test_ranks_have_ties():
    assert oo.ranks([0.5, 1.0, 0.1 + 0.2, 0.3]) == [2, 1, 3, 3]


def test_a_quarter_of_the_labels_is_wrong():
    rows = [{"prompt": str(i), "completions": list("abcd"), "ranks": [1, 2, 2, 4]} for i in range(4000)]
    noisy = oo.with_noise(rows, 0.25, seed=0)
    turned = [row["ranks"] != [1, 2, 2, 4] for row in noisy]
    assert abs(np.mean(turned) - 0.25) < 4 * np.sqrt(0.25 * 0.75 / 4000)
    assert {tuple(row["ranks"]) for row in noisy} == {(1, 2, 2, 4), (4, 3, 3, 1)}
    assert [row["ranks"] for row in oo.with_noise(rows, 0.0, seed=0)] == [row["ranks"] for row in rows]
    assert oo.with_noise(rows, 0.25, seed=0) == noisy != oo.with_noise(rows, 0.25, seed=1)
    assert all(row["ranks"] == [1, 2, 2, 4] for row in rows)  # what was given is left as it was


# ---------------------------------------------------------------------- the experiment at its smallest

PLAN = Plan(6, 16, (4, 6, 8, 12), 6, members=2, seeds=1, tokens=500, evaluations=2, answers=1)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run and its rows."""
    patch = pytest.MonkeyPatch()
    patch.setitem(oo.PLANS, "tiny", PLAN)
    patch.setitem(oo.PPO_SETTINGS, "episodes_per_update", 32)
    options = OveroptimizationArguments(size="tiny", out=tmp_path_factory.mktemp("run") / "overoptimization")
    yield options, oo.run_overoptimization(options)
    patch.undo()


def test_every_proxy_ensemble_and_run_of_ppo_has_its_row(run):
    options, rows = run
    named = "middle-8"
    proxies = {f"{size}-{k}" for size in ("small", "middle", "large") for k in PLAN.rankings}
    noisy = {f"middle-{k}-noise0.25" for k in PLAN.rankings}
    others = {f"{named}-seed1", "ensemble-mean", "ensemble-worst"}
    ppo = {f"ppo-{name}-0" for name in (named, "large-12")}
    assert set(rows) == proxies | noisy | others | ppo
    assert {path.stem for path in (options.out / "rows").iterdir()} == set(rows)
    assert PLAN.named.name == named
    tables = (options.out / "tables.md").read_text()
    assert all(f"| {name} |" in tables for name in proxies | noisy | others)
    assert (options.out / "overoptimization.png").read_bytes().startswith(b"\x89PNG")


def test_the_curve_of_best_of_n_begins_at_the_mean_of_the_pool_and_ends_at_its_best(run):
    options, rows = run
    pool = json.loads((options.out / "pool.json").read_text())
    requests = requests_of("validation")[: PLAN.prompts]
    assert all(sum(row["counts"]) == PLAN.samples for row in pool)
    for request, row in zip(requests, pool, strict=True):
        assert row["gold"] == [gold.judge(request, text).total for text in row["texts"]]
    scores = np.load(options.out / "proxies" / "small-12" / "scores.npy")
    best, start = [], 0
    for row in pool:
        part = scores[start : start + len(row["texts"])]
        best.append(row["gold"][part.argmax()])
        start += len(part)
    curve = rows["small-12"]["curve"]
    average = np.mean([np.average(row["gold"], weights=row["counts"]) for row in pool])
    assert curve[0]["gold"] == pytest.approx(average)
    assert curve[0]["promised"] == pytest.approx(average)
    assert curve[-1]["n"] == PLAN.samples
    assert curve[-1]["gold"] == pytest.approx(np.mean(best))
    assert [point["kl_bound"] for point in curve] == sorted(point["kl_bound"] for point in curve)


def test_ensembles_take_the_mean_and_the_worst_of_their_members(run):
    options, rows = run
    members = np.stack(
        [np.load(options.out / "proxies" / name / "scores.npy") for name in ("middle-8", "middle-8-seed1")]
    )
    experiment = Experiment(options)
    for how, scores in (("mean", members.sum(axis=0) / 2), ("worst", np.minimum(*members))):
        expected = experiment.best_of_n(scores)
        assert rows[f"ensemble-{how}"]["curve"] == expected["curve"]


def test_ppo_is_watched_from_its_start_to_its_end(run):
    _, rows = run
    for name in ("ppo-middle-8-0", "ppo-large-12-0"):
        curve = rows[name]["curve"]
        assert curve[0]["tokens"] == 0
        assert curve[0]["kl"] == pytest.approx(0, abs=1e-4)
        assert curve[-1]["tokens"] >= PLAN.tokens
        assert len(curve[-1]["gold_by_prompt"]) == PLAN.prompts
        assert abs(curve[-1]["kl"]) > 1e-3  # it has moved; over so few answers the mean of log-ratios may be negative


def test_seeds_of_ppo_are_taken_together(run):
    _, rows = run
    row = rows["ppo-middle-8-0"]
    better = [point | {"gold_by_prompt": [g + 0.1 for g in point["gold_by_prompt"]]} for point in row["curve"]]
    together = reinforced(rows | {"ppo-middle-8-1": row | {"curve": better}}, PLAN.named)
    expected = np.array([np.mean(point["gold_by_prompt"]) for point in row["curve"]])
    np.testing.assert_allclose(together["gold"], [expected, expected + 0.1])
    np.testing.assert_allclose(together["kl"], [[point["kl"] for point in row["curve"]]] * 2)


def test_a_run_goes_on_with_what_is_missing(run, monkeypatch):
    options, rows = run
    gone = ("small-6", "ensemble-worst", "ppo-large-12-0")
    for name in gone:
        (options.out / "rows" / f"{name}.json").unlink()
    told = []
    monkeypatch.setattr(Experiment, "sample", lambda *_, **__: pytest.fail("answers were drawn again"))
    begun = []
    for method in ("train", "combine", "reinforce"):
        real = getattr(Experiment, method)
        monkeypatch.setattr(Experiment, method, lambda *args, real=real: begun.append(args[1:]) or real(*args))
    again = Experiment(options).run(told.append)
    assert begun == [(Proxy(size="large", rankings=12), 0), (Proxy(size="small", rankings=6),), ("worst",)]
    assert len(told) == len(rows)
    for name, row in rows.items():
        assert {k: v for k, v in again[name].items() if k != "cpu_seconds"} == {
            k: v for k, v in row.items() if k != "cpu_seconds"
        }


def test_a_directory_of_other_settings_is_refused(run):
    options, _ = run
    with pytest.raises(ValueError, match=r"holds a run with \{'seed': 0\}, not \{'seed': 1\}"):
        Experiment(replace(options, seed=1))
