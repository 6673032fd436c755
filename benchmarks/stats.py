"""Statistics of benchmark results: pure functions on plain arrays.

`scores` are the results of one agent: `scores[r, m]` is run r (a seed) on task m. Leading axes are kept, so that a
bootstrap is one call. What is estimated and how follows Agarwal et al. (2021), https://arxiv.org/abs/2108.13264.

Notation: R runs, M tasks, K thresholds. Intervals are about seeds alone: the tasks are taken as given.

Example:
    >>> scores = np.array([[0.9, 0.8], [0.7, 0.9], [0.8, 0.7]])     # three seeds on two tasks
    >>> stratified_bootstrap(iqm, scores)
    Interval(estimate=0.8, low=0.725, high=0.875)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

FLOATS = NDArray[np.float64]
CHUNK = 4_000_000
"""Numbers that a bootstrap holds at once."""


class Interval(NamedTuple):
    """An estimate between its limits; arrays where the estimate is one."""

    estimate: Any
    low: Any
    high: Any


# ---------------------------------------------------------------------- what is estimated


def iqm(scores: ArrayLike) -> Any:
    """Interquartile mean: without the lowest and the highest quarter of all runs. Shape: (..., R, M) -> (...)."""
    return stats.trim_mean(_runs_together(scores), 0.25, axis=-1)


def median(scores: ArrayLike) -> Any:
    """Median over tasks of the mean over runs. Shape: (..., R, M) -> (...)."""
    return np.median(_checked(scores).mean(axis=-2), axis=-1)


def mean(scores: ArrayLike) -> Any:
    """Mean over runs and tasks. Shape: (..., R, M) -> (...)."""
    return _checked(scores).mean(axis=(-2, -1))


def optimality_gap(scores: ArrayLike, gamma: float = 1.0) -> Any:
    """How much is missing to gamma on average; what lies above it counts as gamma. Shape: (..., R, M) -> (...)."""
    return gamma - np.minimum(_checked(scores), gamma).mean(axis=(-2, -1))


def performance_profile(scores: ArrayLike, thresholds: ArrayLike) -> Any:
    """Share of runs above each threshold. Shapes: (..., R, M), (K,) -> (..., K)."""
    runs = np.sort(_runs_together(scores), axis=-1)
    above = runs[..., None, :] > np.asarray(thresholds, np.float64)[:, None]
    return above.mean(axis=-1)


def probability_of_improvement(x: ArrayLike, y: ArrayLike) -> Any:
    """How often a run of x beats one of y on the same task, ties counting half; mean over tasks.

    Per task this is Mann-Whitney's U / (R R'). Shapes: (..., R, M), (..., R', M) -> (...).
    """
    a, b = _checked(x)[..., :, None, :], _checked(y)[..., None, :, :]
    if a.shape[-1] != b.shape[-1]:
        raise ValueError(f"Expected scores on the same tasks, got {a.shape[-1]} and {b.shape[-1]} columns.")
    return ((a > b) + 0.5 * (a == b)).mean(axis=(-3, -2, -1))


# ---------------------------------------------------------------------- intervals


def stratified_bootstrap(
    statistic: Callable[..., Any],
    *scores: ArrayLike,
    confidence: float = 0.95,
    repetitions: int = 10_000,
    seed: int | Sequence[int] = 0,
    task_bootstrap: bool = False,
) -> Interval:
    """Percentile interval: runs are drawn anew with replacement, for each task by itself.

    With fewer than ten runs it is too narrow; `coverage` says by how much.

    Args:
        statistic: Of one array per element of `scores`, with any leading axes: (..., R, M) -> (...) or (..., K).
        scores: Of one or more agents. Each shape: (R_i, M).
        confidence: In (0, 1).
        repetitions: Draws.
        seed: The same seed gives the same interval.
        task_bootstrap: Draw tasks anew, too: what is said is about tasks like these then.

    Raises:
        ValueError: Scores of another shape, or not finite.
    """
    arrays = [_checked(values) for values in scores]
    if not arrays or any(values.ndim != 2 for values in arrays):
        raise ValueError(
            f"Expected scores of shape (runs, tasks), got {[np.shape(values) for values in scores]}: give one task as scores[:, None]."
        )
    if not 0 < confidence < 1:
        raise ValueError(f"Expected confidence between 0 and 1, got {confidence}.")
    rng = np.random.default_rng(seed)
    chunk = max(1, CHUNK // sum(values.size for values in arrays))
    draws = []
    for begin in range(0, repetitions, chunk):
        count = min(chunk, repetitions - begin)
        tasks = np.arange(arrays[0].shape[1])
        if task_bootstrap:
            tasks = rng.integers(len(tasks), size=(count, 1, len(tasks)))
        resampled = []
        for values in arrays:
            runs = rng.integers(len(values), size=(count, *values.shape))
            resampled.append(values[runs, tasks])
        draws.append(statistic(*resampled))
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(draws), [tail, 1 - tail], axis=0)
    return Interval(statistic(*arrays), low, high)


def mean_interval(values: ArrayLike, confidence: float = 0.95) -> Interval:
    """Mean of independent values with Student's interval; without limits (nan) for a single value. Shape: (n,) -> ()."""
    array = np.asarray(values, np.float64)
    if array.ndim != 1 or not len(array):
        raise ValueError(f"Expected a list of numbers, got shape {array.shape}.")
    if not 0 < confidence < 1:
        raise ValueError(f"Expected a confidence between 0 and 1, such as 0.95, got {confidence}.")
    centre = float(array.mean())
    if len(array) < 2:
        return Interval(centre, float("nan"), float("nan"))
    half = float(stats.t.ppf((1 + confidence) / 2, len(array) - 1) * stats.sem(array))
    return Interval(centre, centre - half, centre + half)


def paired_difference(x: ArrayLike, y: ArrayLike, confidence: float = 0.95) -> Interval:
    """The difference x - y with Student's interval, run by run: row r of both is the same seed.

    What the seed makes common to both (the task, the prompts, luck) cancels. Tasks are averaged within a seed first. Unlike
    a bootstrap this keeps its coverage with few seeds, if differences are about normal. Shapes: (R, M), (R, M) -> ().
    """
    a, b = _checked(x), _checked(y)
    if a.shape != b.shape or a.ndim != 2:
        raise ValueError(f"Expected two arrays of one shape (runs, tasks), got {a.shape} and {b.shape}.")
    return mean_interval((a - b).mean(axis=1), confidence)


def verdict(difference: Interval, direction: int = 1) -> str:
    """`"better"`, `"worse"` or `"undecided"`: whether a difference excludes 0, and on which side.

    Args:
        difference: New - old.
        direction: 1 where more is better, -1 where less is.
    """
    if difference.low > 0:
        return "better" if direction > 0 else "worse"
    if difference.high < 0:
        return "worse" if direction > 0 else "better"
    return "undecided"


@cache
def coverage(
    runs: int,
    tasks: int = 1,
    statistic: Callable[..., Any] = iqm,
    confidence: float = 0.95,
    trials: int = 1_000,
    repetitions: int = 1_000,
    seed: int = 0,
) -> float:
    """How often the bootstrap's interval really holds the truth, for normal scores: simulated.

    Args:
        runs: R.
        tasks: M.
        statistic: One whose true value is 0 for scores around 0, such as `iqm`, `mean` or `median`.
        confidence: What the interval claims.
        trials: Simulated experiments.
        repetitions: Draws of each bootstrap.
        seed: Of the simulation.
    """
    rng = np.random.default_rng(seed)
    hits = 0
    for _ in range(trials):
        interval = stratified_bootstrap(
            statistic, rng.standard_normal((runs, tasks)), confidence=confidence, repetitions=repetitions,
            seed=int(rng.integers(2**32)),
        )  # fmt: skip
        hits += interval.low <= 0 <= interval.high
    return hits / trials


def _checked(scores: ArrayLike) -> FLOATS:
    array = np.asarray(scores, np.float64)
    if array.ndim < 2 or not array.shape[-1] or not array.shape[-2]:
        raise ValueError(
            f"Expected scores of shape (runs, tasks), got {array.shape}: give one task as scores[:, None]."
        )
    if not np.isfinite(array).all():
        raise ValueError("Expected finite scores: leave runs that failed away, and say so.")
    return array


def _runs_together(scores: ArrayLike) -> FLOATS:
    array = _checked(scores)
    return array.reshape(*array.shape[:-2], -1)


__all__ = [
    "Interval",
    "coverage",
    "iqm",
    "mean",
    "mean_interval",
    "median",
    "optimality_gap",
    "paired_difference",
    "performance_profile",
    "probability_of_improvement",
    "stratified_bootstrap",
    "verdict",
]
