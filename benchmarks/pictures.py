"""A report's pictures: reward against KL, learning curves, the performance profile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import trim_mean

from benchmarks import stats
from benchmarks.results import FLOATS, Results, best_of_n
from benchmarks.stats import Interval, stratified_bootstrap

FAR = 6.0
"""Agents whose KL is so many times the median of all are named, not drawn."""
REACH = 3.0
"""The same where the frontier is known, which is drawn so far: in KLs of the optimum."""
COLOURS = (
    "#1f6f8b", "#d1495b", "#3a7d44", "#e08e45", "#6a4c93", "#8c564b", "#c2559d", "#5b8c5a", "#2ec4b6", "#a3721c", "#4d4d4d",
    "#9b2226", "#7a8b99",
)  # fmt: skip


@dataclass(frozen=True)
class Picture:
    """A figure with its caption."""

    name: str
    title: str
    caption: str
    png: bytes


def draw_frontier(results: Results) -> list[Picture]:
    """Reward against KL: the headline."""
    known = any(row["frontier"] for row in results.good)
    panels = [(task, metric) for task in results.tasks for metric in results.manifest["frontier"]
              if any(len(results.values(agent, metric, task)) for agent in results.agents)]  # fmt: skip
    if not panels:
        return []
    plt = pyplot()
    figure, axes = grid(plt, len(panels))
    far: dict[str, float] = {}
    for axis, (task, metric) in zip(axes, panels, strict=True):
        exact = any(row["frontier"] for row in results.good if row["task"] == task)
        points: dict[str, tuple[Interval, Interval]] = {}
        for agent in results.agents:
            x, y = frontier_points(results, agent, task, metric, exact)
            if len(x):
                points[agent] = (
                    (quartiles(x), quartiles(y)) if exact else (stats.mean_interval(x), stats.mean_interval(y))
                )
        middle = np.median([x.estimate for x, _ in points.values() if x.estimate > 1e-6] or [np.inf])
        reach = REACH if exact else FAR * max(middle, 1e-9)
        here = {agent: point for agent, point in points.items() if point[0].estimate <= reach}
        far |= {f"{agent} on {task}": point[0].estimate for agent, point in points.items() if agent not in here}
        if exact:
            line = shared_frontier(results, task)
            axis.plot(*line, color="#222222", lw=1.1, zorder=1, label="no policy lies above")
            axis.fill_between(line[0], line[1], 10, color="#222222", alpha=0.05, lw=0)
        for sweep in dict.fromkeys(agent.split(" beta=")[0] for agent in here):
            chain = [agent for agent in here if agent.split(" beta=")[0] == sweep]
            if len(chain) > 1:
                chain.sort(key=lambda agent: here[agent][0].estimate)
                axis.plot(*zip(*[(here[a][0].estimate, here[a][1].estimate) for a in chain], strict=True),
                          color=colour_of(results, chain[0]), lw=1, alpha=0.7)  # fmt: skip
        for agent, point in here.items():
            kl_bar, bar = map(error_bar, point)
            axis.errorbar(
                point[0].estimate, point[1].estimate, xerr=kl_bar, yerr=bar, fmt="o", ms=5, lw=0.9,
                color=colour_of(results, agent), label=agent.split(" beta=")[0],
            )  # fmt: skip
            if " beta=" in agent:
                where = point[0].estimate, point[1].estimate
                axis.annotate(agent.split(" beta=")[1], where, xytext=(4, 4), textcoords="offset points", fontsize=7)
        axis.set_title(
            f"{task}: {metric}" if len(results.tasks) > 1 or len(panels) > 1 else task, loc="left", fontweight="bold"
        )
        if exact:
            axis.set(xlabel="KL / KL of the optimum", ylabel="reward gained / reward the optimum gains")
            top = max([1.0, *(y.estimate for _, y in here.values())])
            bottom = min([0.0, *(y.estimate for _, y in here.values())])
            right = max([1.0, *(x.estimate for x, _ in here.values())])
            axis.set(xlim=(-0.04 * right, 1.12 * right), ylim=(bottom - 0.07, 1.15 * top))
        else:
            axis.set(xlabel="KL to the reference, nats per answer", ylabel=metric)
        axis.spines[["top", "right"]].set_visible(False)
    shared_legend(figure, axes)
    caption = (
        "Reward against what it costs in KL; up and left is better. "
        + ("Medians and quartiles over seeds, each task scaled so that its reference lies at (0, 0) and its optimum at (1, 1); "
           "the line is the median over tasks of the exact frontier (every run lies below its own task's). " if known else "Means with Student's 95% intervals over seeds. ")
        + "".join(f"{agent} lies outside, at KL {value:.3g}. " for agent, value in far.items())
        + ("The KL of BestOfN is a bound. " if any(best_of_n(results, agent) for agent in results.agents) else "")
        + f"Made by {results.made_by}."
    )  # fmt: skip
    return [Picture("frontier", "Reward against KL", caption, png(figure))]


def frontier_points(results: Results, agent: str, task: str, metric: str, exact: bool) -> tuple[FLOATS, FLOATS]:
    """KL and reward of each run, scaled by the optimum where it is known. Shapes: (n,), (n,)."""
    found = []
    for row in results.of(agent, task):
        m = row["metrics"]
        if m.get("kl") is None or m.get(metric) is None:
            continue
        if exact:  # all agents of a seed by one optimum, whatever their beta
            of = next(r["metrics"] for r in results.good if (r["task"], r["seed"]) == (task, row["seed"]))
            room = of["optimum_reward"] - of["reward_reference"]
            found.append((m["kl"] / of["optimum_kl"], (m["reward"] - of["reward_reference"]) / room))
        else:
            found.append((m["kl"], m[metric]))
    columns = np.asarray(found, np.float64).reshape(-1, 2).T
    return columns[0], columns[1]


def error_bar(interval: Interval) -> list[list[float]] | None:
    """What matplotlib takes; None without limits."""
    if not np.isfinite(interval.low):
        return None
    return [[max(0.0, interval.estimate - interval.low)], [max(0.0, interval.high - interval.estimate)]]


def shared_frontier(results: Results, task: str) -> tuple[FLOATS, FLOATS]:
    """Median over a task's seeds of the exact front, scaled as the points are. Shapes: (K,), (K,)."""
    x = np.linspace(0, REACH, 121)
    curves = []
    for seed in sorted({row["seed"] for row in results.good if row["task"] == task and row["frontier"]}):
        row = next(r for r in results.good if r["task"] == task and r["seed"] == seed and r["frontier"])
        m, front = row["metrics"], row["frontier"]
        room = m["optimum_reward"] - m["reward_reference"]
        kl = np.asarray([0.0, *front["kl"]]) / m["optimum_kl"]
        reward = (np.asarray([m["reward_reference"], *front["reward"]]) - m["reward_reference"]) / room
        curves.append(np.interp(x, kl, reward))
    return x, np.median(curves, axis=0)


def quartiles(values: FLOATS) -> Interval:
    """Median between the quartiles."""
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    return Interval(middle, low, high)


def draw_curves(results: Results) -> list[Picture]:
    """How agents learn: against tokens and against seconds."""
    found = [name for row in results.good for name in row["curve"]]
    metrics = ["score"] if "score" in found else [name for name in ("reward", "kl") if name in found]
    pictures = []
    for x, title in (("tokens", "tokens"), ("seconds", "wall-clock")):
        panels = [(task, metric) for task in results.tasks for metric in metrics
                  if any(x in row["curve"] and metric in row["curve"] for row in results.good if row["task"] == task)]  # fmt: skip
        if not panels:
            continue
        plt = pyplot()
        figure, axes = grid(plt, len(panels))
        for axis, (task, metric) in zip(axes, panels, strict=True):
            ends = {}
            log = metric == "score"
            for agent in results.agents:
                curves = [
                    row["curve"] for row in results.of(agent, task) if x in row["curve"] and metric in row["curve"]
                ]
                if not curves:
                    continue
                where, band = curve_band(curves, x, metric, log)
                style: Any = "-" if results.manifest["agents"].get(agent, {}).get("follows_j", True) else (0, (4, 1.5))
                colour = colour_of(results, agent)
                low, middle, high = (height(v) if log else v for v in (band.low, band.estimate, band.high))
                axis.plot(where, middle, color=colour, lw=1.4, ls=style)
                axis.fill_between(where, low, high, color=colour, alpha=0.1, lw=0)
                ends[agent] = (float(where[-1]), float(middle[-1]))
            if log:
                axis.set_xscale("log")
                ticks = [0, 0.5, 0.9, 0.97, 0.99, 0.999]
                axis.set_yticks(height(np.asarray(ticks)), [f"{tick:g}" for tick in ticks])
                axis.set_ylim(height(np.asarray(-1.0)) - 0.02, height(np.asarray(1.0)) + 0.12)
            axis.set_title(f"{task}: {metric}" if len(metrics) > 1 else task, loc="left", fontweight="bold")
            axis.set(xlabel=f"{x}", ylabel="exact score (1: optimum)" if log else metric)
            axis.spines[["top", "right"]].set_visible(False)
            label_ends(axis, ends, {agent: colour_of(results, agent) for agent in ends}, log)
        caption = (
            f"Against {title}: interquartile mean over seeds, with its pointwise 95% interval. "
            + ("Evaluations are not counted. Agents without training have no curve" if x == "seconds" else "Agents without training have no curve")
            + (", but for BestOfN: tokens per answer, n growing" if "score" in metrics and x == "tokens" else "")
            + ". " + ("Dashed: tends to something else than the optimum. " if "score" in metrics else "")
            + f"Made by {results.made_by}."
        )  # fmt: skip
        pictures.append(Picture(f"curves-{x}", f"Learning, against {title}", caption, png(figure)))
    return pictures


def curve_band(curves: Sequence[Mapping[str, Any]], x: str, metric: str, log: bool) -> tuple[FLOATS, Interval]:
    """IQM over runs with its interval, at 40 places that all runs reach. Shapes: (K,), 3 x (K,)."""
    runs = []
    for curve in curves:
        pairs = [(a, b) for a, b in zip(curve[x], curve[metric], strict=True) if a is not None and b is not None]
        runs.append(np.asarray(pairs, np.float64).reshape(-1, 2))
    runs = [run for run in runs if len(run)]
    first, last = max(run[0, 0] for run in runs), min(run[-1, 0] for run in runs)
    last = max(first, last)
    where = np.geomspace(first, last, 40) if log and first > 0 else np.linspace(first, last, 40)
    values = np.stack([np.interp(where, run[:, 0], run[:, 1]) for run in runs])

    def over_runs(scores: FLOATS) -> FLOATS:
        return np.asarray(trim_mean(scores, 0.25, axis=-2))

    return where, stratified_bootstrap(over_runs, values, repetitions=1_000)


def draw_profile(results: Results) -> list[Picture]:
    """Share of runs above each score."""
    bounded = results.manifest.get("bounded")
    if not bounded or not any(len(results.table(agent, bounded)[0]) for agent in results.agents):
        return []
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(7.4, 4.4), constrained_layout=True)
    everything = np.concatenate([results.table(agent, bounded)[1].ravel() for agent in results.agents])
    log = bounded == "score"
    left = float(np.clip(everything.min(), -0.2, 1)) if log else float(everything.min())
    right = 1.0 if log else float(everything.max())
    margin = 0.03 * max(right - left, 1e-3)
    thresholds = (
        1 - np.geomspace(1 - left + 1e-9, 1e-3, 160) if log else np.linspace(left - margin, right + margin, 160)
    )
    ends = {}
    for agent in results.agents:
        _, scores = results.table(agent, bounded)
        if not len(scores):
            continue
        band = stratified_bootstrap(lambda s: stats.performance_profile(s, thresholds), scores, repetitions=1_000)
        x = height(thresholds) if log else thresholds
        axis.plot(x, band.estimate, color=colour_of(results, agent), lw=1.5, label=agent)
        axis.fill_between(x, band.low, band.high, color=colour_of(results, agent), alpha=0.08, lw=0)
        ends[agent] = 0
    if log:
        ticks = [0, 0.5, 0.9, 0.97, 0.99, 0.999]
        axis.set_xticks(height(np.asarray(ticks)), [f"{tick:g}" for tick in ticks])
    axis.set(xlabel=f"{bounded}, threshold", ylabel="share of runs above it", ylim=(-0.02, 1.04))
    axis.spines[["top", "right"]].set_visible(False)
    shared_legend(figure, [axis])
    caption = f"Performance profile: the share of runs (seeds x tasks) whose {bounded} is above each threshold, with its pointwise 95% interval. Made by {results.made_by}."
    return [Picture("profile", "Performance profile", caption, png(figure))]


LEAST_GAP = 1e-3
"""Scores nearer to 1 than this are drawn at it."""


def height(score: Any) -> FLOATS:
    """Where a score is drawn: -log10 of what is missing to 1, which makes 0.9, 0.99 and 0.999 equally far apart."""
    return -np.log10(np.clip(1 - np.asarray(score, np.float64), LEAST_GAP, 2.0))


def label_ends(axis: Any, ends: Mapping[str, tuple[float, float]], colours: Mapping[str, str], log: bool) -> None:
    """Names at the right of a panel, in the order of the curves' ends and clear of each other."""
    if not ends:
        return
    low, high = axis.get_ylim()
    left, right = axis.get_xlim()
    arrow = {"arrowstyle": "-", "lw": 0.5, "alpha": 0.6, "relpos": (0, 0.5), "shrinkA": 0, "shrinkB": 1}
    font: dict[str, Any] = {"fontsize": 7.5, "va": "center", "annotation_clip": False}
    early = right / 20 if log else left + (right - left) / 10
    for name in [name for name in ends if ends[name][0] < early]:  # it ends in the midst of the panel
        axis.annotate(name, ends[name], xytext=(4, 0), textcoords="offset points", color=colours[name], **font)
    order = sorted((name for name in ends if ends[name][0] >= early), key=lambda name: ends[name][1])
    places = np.asarray([ends[name][1] for name in order])
    step = (high - low) / 19
    for _ in range(500):  # neighbours that overlap push each other away
        overlap = np.clip(step - np.diff(places), 0, None) / 2
        places[:-1] -= overlap
        places[1:] += overlap
    for name, place in zip(order, places, strict=True):
        at = right * 1.1 if log else right + 0.03 * (right - left)
        axis.annotate(
            name, ends[name], xytext=(at, place), textcoords="data", color=colours[name], **font,
            arrowprops=arrow | {"color": colours[name]},
        )  # fmt: skip


def colour_of(results: Results, agent: str) -> str:
    """The agent's colour, the same in all pictures; a sweep's agents share one."""
    families = list(dict.fromkeys(name.split(" beta=")[0] for name in results.agents))
    return COLOURS[families.index(agent.split(" beta=")[0]) % len(COLOURS)]


def grid(plt: Any, count: int) -> tuple[Any, list[Any]]:
    """A figure with so many panels, two in a row."""
    columns = min(2, count)
    lines = -(-count // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(6.2 * columns, 4.4 * lines), constrained_layout=True, squeeze=False
    )
    for axis in axes.flat[count:]:
        axis.set_visible(False)
    return figure, list(axes.flat[:count])


def shared_legend(figure: Any, axes: Sequence[Any]) -> None:
    """One legend for all panels, below them."""
    entries: dict[str, Any] = {}
    for axis in axes:
        handles, labels = axis.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    figure.legend(
        list(entries.values()),
        list(entries),
        loc="outside lower center",
        ncols=min(5 if len(axes) > 1 else 4, len(entries)),
        frameon=False,
        fontsize=8,
    )


def pyplot() -> Any:
    """Matplotlib without a screen."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def png(figure: Any) -> bytes:
    """A figure as a PNG."""
    import io

    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=150)
    pyplot().close(figure)
    return data.getvalue()
