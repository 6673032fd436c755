"""Statistics against values worked by hand, other libraries, and data whose truth is known."""

import numpy as np
import pytest
from scipy import stats as scipy_stats

from benchmarks.stats import (
    Interval,
    coverage,
    iqm,
    mean,
    mean_interval,
    median,
    optimality_gap,
    paired_difference,
    performance_profile,
    probability_of_improvement,
    stratified_bootstrap,
    verdict,
)

TWO_TASKS = np.array([[0.0, 1.0], [0.2, 0.8], [0.4, 3.0], [0.6, 0.6]])
"""Four runs on two tasks."""


def test_estimates_by_hand():
    # All eight sorted: 0 .2 .4 .6 .6 .8 1 3. Two are cut at each end: (.4 + .6 + .6 + .8) / 4.
    assert iqm(TWO_TASKS) == pytest.approx(0.6)
    # Means of the tasks: 0.3 and 1.35; half-way between.
    assert median(TWO_TASKS) == pytest.approx(0.825)
    assert mean(TWO_TASKS) == pytest.approx(0.825)
    # The 3 counts as 1: 1 - (0 + .2 + .4 + .6 + 1 + .8 + 1 + .6) / 8.
    assert optimality_gap(TWO_TASKS) == pytest.approx(1 - 4.6 / 8)
    assert optimality_gap(TWO_TASKS, gamma=0.5) == pytest.approx(0.5 - (0 + 0.2 + 0.4 + 0.5 * 5) / 8)
    # Above 0.5 lie .6, .6, .8, 1 and 3; above 0.6 only .8, 1 and 3: "above" is strict.
    assert performance_profile(TWO_TASKS, [-1, 0.5, 0.6, 3]).tolist() == [1, 5 / 8, 3 / 8, 0]


def test_nine_runs_keep_five():
    # floor(9 / 4) = 2 are cut at each end.
    assert iqm(np.array([[100, 1, 2], [3, 4, 5], [6, 7, -100.0]])) == pytest.approx((2 + 3 + 4 + 5 + 6) / 5)


def test_probability_of_improvement_by_hand_and_by_mann_whitney():
    x, y = np.array([[1.0, 5.0], [2.0, 5.0]]), np.array([[1.0, 5.0], [0.0, 5.0], [3.0, 5.0]])
    # First task: 1 beats 0, ties 1: 1.5 of 3; 2 beats 1 and 0: 2 of 3; together 3.5 of 6. Second: all ties, a half.
    assert probability_of_improvement(x, y) == pytest.approx((3.5 / 6 + 0.5) / 2)
    rng = np.random.default_rng(0)
    x, y = rng.integers(5, size=(8, 1)).astype(float), rng.integers(5, size=(11, 1)).astype(float)
    u = scipy_stats.mannwhitneyu(x[:, 0], y[:, 0]).statistic
    assert probability_of_improvement(x, y) == pytest.approx(u / 88)
    assert probability_of_improvement(x, x) == pytest.approx(0.5)


def test_leading_axes_are_kept():
    scores = np.random.default_rng(0).normal(size=(3, 5, 4, 2))
    for statistic in (iqm, median, mean, optimality_gap):
        values = statistic(scores)
        assert values.shape == (3, 5)
        assert values[2, 1] == pytest.approx(statistic(scores[2, 1]))
    assert performance_profile(scores, [0.0, 0.5]).shape == (3, 5, 2)


def test_the_bootstrap_honours_its_seed_and_nothing_else():
    np.random.seed(0)  # noqa: NPY002  # the global generator, which must not matter
    first = stratified_bootstrap(iqm, TWO_TASKS, repetitions=300, seed=3)
    np.random.seed(1)  # noqa: NPY002
    assert stratified_bootstrap(iqm, TWO_TASKS, repetitions=300, seed=3) == first
    assert stratified_bootstrap(iqm, TWO_TASKS, repetitions=300, seed=4) != first


def test_the_bootstrap_stays_within_a_task():
    # Tasks without any spread: a bootstrap that mixed them would have some.
    interval = stratified_bootstrap(mean, np.array([[1.0, 5.0]] * 4), repetitions=200)
    assert interval == Interval(3.0, 3.0, 3.0)
    wider = stratified_bootstrap(mean, np.array([[1.0, 5.0]] * 4), repetitions=500, task_bootstrap=True)
    assert (wider.low, wider.high) == (1.0, 5.0)


def test_the_bootstrap_of_a_mean_is_that_of_scipy():
    scores = np.random.default_rng(1).normal(size=(20, 1))
    ours = stratified_bootstrap(mean, scores, repetitions=20_000)
    theirs = scipy_stats.bootstrap(
        (scores[:, 0],), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    assert ours.low == pytest.approx(theirs.low, abs=0.02)
    assert ours.high == pytest.approx(theirs.high, abs=0.02)


def test_intervals_of_arrays():
    interval = stratified_bootstrap(lambda s: performance_profile(s, [0.0, 0.5]), TWO_TASKS, repetitions=200)
    assert [value.shape for value in interval] == [(2,)] * 3
    assert (interval.low <= interval.estimate).all()
    assert (interval.estimate <= interval.high).all()


@pytest.mark.parametrize(("runs", "expected"), [(3, 0.73), (5, 0.90), (10, 0.94)])
def test_coverage_of_the_iqm(runs, expected):
    assert coverage(runs, trials=600, repetitions=300) == pytest.approx(expected, abs=0.04)  # three standard errors


@pytest.mark.parametrize("runs", [3, 10])
def test_paired_differences_cover_what_they_say_with_few_seeds_too(runs):
    rng, hits = np.random.default_rng(0), 0
    for _ in range(1000):
        luck = rng.normal(size=(runs, 1)) * 3  # of the seed, common to both
        x, y = (luck + rng.normal(size=(runs, 2)) + shift for shift in (0.4, 0.0))
        interval = paired_difference(x, y)
        hits += interval.low <= 0.4 <= interval.high
    assert hits / 1000 == pytest.approx(0.95, abs=0.022)


def test_paired_differences_by_hand():
    # Differences by seed, mean over tasks: 1, 2, 3. Standard error 1 / sqrt(3), t(0.975, 2) = 4.3027.
    x = np.array([[1.0, 1.0], [2.0, 2.0], [4.0, 2.0]])
    interval = paired_difference(x, np.zeros((3, 2)))
    assert interval == pytest.approx((2.0, 2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5), abs=1e-4)
    assert np.isnan(paired_difference([[1.0]], [[0.0]]).low)
    assert mean_interval([2.0, 2.0, 2.0]) == (2.0, 2.0, 2.0)


def test_verdicts():
    up, down, across = Interval(1, 0.5, 2), Interval(-1, -2, -0.5), Interval(0.1, -1, 1)
    assert [verdict(i) for i in (up, down, across)] == ["better", "worse", "undecided"]
    assert [verdict(i, -1) for i in (up, down, across)] == ["worse", "better", "undecided"]
    assert verdict(paired_difference([[1.0]], [[0.0]])) == "undecided"  # one seed says nothing


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: iqm([1.0, 2.0]), r"give one task as scores\[:, None\]"),
        (lambda: mean([[1.0, np.nan]]), "leave runs that failed away"),
        (lambda: stratified_bootstrap(iqm, np.zeros((2, 3, 4))), r"shape \(runs, tasks\)"),
        (lambda: stratified_bootstrap(iqm, TWO_TASKS, confidence=95), "between 0 and 1"),
        (lambda: probability_of_improvement(np.zeros((2, 1)), np.zeros((2, 2))), "same tasks"),
        (lambda: paired_difference(np.zeros((2, 1)), np.zeros((3, 1))), "one shape"),
        (lambda: mean_interval([]), "a list of numbers"),
    ],
)
def test_wrong_input_is_answered(call, message):
    with pytest.raises(ValueError, match=message):
        call()
