"""A report's tables: leaderboard, task by task, metric by metric, and the first against the others."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import stats
from benchmarks.metrics import direction
from benchmarks.results import Results, best_of_n, read_results
from benchmarks.stats import Interval, stratified_bootstrap

ENOUGH_SEEDS = 10
"""From here on a bootstrap's interval may be taken at its word."""


@dataclass(frozen=True)
class Figures:
    """A table: for the screen, for Markdown and for HTML."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def markdown(self, source: str = "") -> str:
        """For a document, with where it comes from."""
        lines = [self.header, ["---"] * len(self.header), *self.rows]
        table = "\n".join("| " + " | ".join(map(safe, line)) + " |" for line in lines)
        words = " ".join(filter(None, [safe(self.note), source]))
        return f"## {self.title}\n\n{table}\n" + (f"\n{words}\n" if words else "")


def safe(cell: str) -> str:
    """Text that Markdown leaves as it is, in a table too."""
    return cell.replace("|", "\\|").replace("*", "\\*").replace("\n", " ")


def leaderboard(directory: Path) -> list[Figures]:
    """The tables of a directory's results, the best agent first."""
    return tables(read_results(directory))


def tables(results: Results) -> list[Figures]:
    """Leaderboard; by task, or metric by metric; and everybody against the first."""
    order = ranking(results)
    several = [by_task(results, order)] if len(results.tasks) > 1 else []
    return [ranks(results, order), *several, by_metric(results, order), *versus_first(results, order)]


def ranking(results: Results) -> list[str]:
    """Agents by the IQM of the headline metric; those without a complete seed last."""

    def key(agent: str) -> float:
        _, scores = results.table(agent, results.headline)
        return float(stats.iqm(scores)) if len(scores) else -np.inf

    sign = direction(results.headline, results.manifest["lower_is_better"]) or 1
    return sorted(results.agents, key=lambda agent: -sign * key(agent) if np.isfinite(key(agent)) else np.inf)


def ranks(results: Results, order: Sequence[str]) -> Figures:
    """The headline metric with its interval, and what is missing to 1."""
    bounded = results.manifest.get("bounded")
    header = ["agent", "IQM", "95% interval", "median", *(["gap"] if bounded else []), "seeds", "tokens", "CPU min"]
    lines, fewest = [], ENOUGH_SEEDS
    for agent in order:
        seeds, scores = results.table(agent, results.headline)
        cells = [named(results, agent)]
        if len(seeds):
            fewest = min(fewest, len(seeds))
            interval = stratified_bootstrap(stats.iqm, scores)
            limits = span(interval) if len(seeds) > 1 else "-"
            cells += [number(interval.estimate), limits, number(stats.median(scores))]
        else:
            cells += ["-"] * 3
        if bounded:
            _, scores = results.table(agent, bounded)
            cells.append(number(stats.optimality_gap(scores)) if len(scores) else "-")
        mine = results.of(agent)
        tokens = [t for row in mine if (t := row["accounts"].get("timesteps")) is not None]
        minutes = sum(row["time"]["cpu_seconds"] for row in results.rows if row["agent"] == agent) / 60
        lines.append([*cells, str(len(seeds)), f"{np.mean(tokens):,.0f}" if tokens else "-", f"{minutes:.1f}"])
    note = f"{results.headline}: IQM is the mean without the lowest and highest quarter of all runs; median that over tasks of the mean"
    note += f"; gap what is missing to 1, in {bounded}. " if bounded else ". "
    note += coverage_note(fewest, len(results.tasks))
    return Figures(f"Leaderboard: {results.headline}", header, lines, note)


def coverage_note(seeds: int, tasks: int) -> str:
    """What intervals are about; with few seeds, how much they really cover."""
    text = "Intervals are a stratified bootstrap's, over seeds."
    if seeds == 1:
        return "Of one seed there is no interval."
    if seeds < ENOUGH_SEEDS:
        real = stats.coverage(seeds, tasks)
        text += (
            f" With {seeds} seed{'s' * (seeds > 1)} on {tasks} task{'s' * (tasks > 1)} an interval that claims 95% really covers "
            f"{real:.0%} (simulated on normal scores)."
        )
    return text


def by_task(results: Results, order: Sequence[str]) -> Figures:
    """Median and lower quartile of the headline metric, task by task."""
    lines = []
    for agent in order:
        cells = [named(results, agent)]
        for task in (*results.tasks, None):
            values = results.values(agent, results.headline, task)
            cells.append(f"{number(np.median(values))} / {number(np.quantile(values, 0.25))}" if len(values) else "-")
        lines.append(cells)
    note = "Median / lower quartile over seeds."
    if any(not results.manifest["agents"].get(agent, {}).get("follows_j", True) for agent in order):
        note += " *: tends to another policy than the optimum of E[r] - beta KL, see docs/agents."
    return Figures(f"{results.headline.capitalize()}, task by task", ["agent", *results.tasks, "all"], lines, note)


def by_metric(results: Results, order: Sequence[str]) -> Figures:
    """Further metrics: means over all runs, with Student's interval."""
    columns = [name for name in results.manifest["columns"] if any(len(results.values(agent, name)) for agent in order)]
    lines = []
    for agent in order:
        cells = [named(results, agent)]
        for name in columns:
            values = results.values(agent, name)
            interval = stats.mean_interval(values) if len(values) else None
            bound = "≤" if name == "kl" and best_of_n(results, agent) else ""
            cells.append("-" if interval is None else bound + plus_minus(interval))
        lines.append(cells)
    note = "Mean over all runs ± half of Student's 95% interval."
    if any("≤" in cell for line in lines for cell in line):
        note += " ≤: a bound, log n - (n - 1) / n."
    return Figures("Metric by metric", ["agent", *columns], lines, note)


def versus_first(results: Results, order: Sequence[str]) -> list[Figures]:
    """How sure it is that the first is better than the others."""
    first, lines = order[0], []
    sign = direction(results.headline, results.manifest["lower_is_better"]) or 1
    seeds, best = results.table(first, results.headline)
    for agent in order[1:]:
        theirs, scores = results.table(agent, results.headline)
        common = sorted(set(seeds) & set(theirs))
        if len(common) < 2:
            continue
        chance = stratified_bootstrap(stats.probability_of_improvement, sign * best, sign * scores, repetitions=2_000)
        rows = [seeds.index(seed) for seed in common], [theirs.index(seed) for seed in common]
        difference = stats.paired_difference(best[rows[0]], scores[rows[1]])
        lines.append(
            [
                results.label(agent),
                number(chance.estimate),
                span(chance),
                f"{difference.estimate:+z.3f}",
                span(difference),
            ]
        )
    if not lines:
        return []
    header = ["against", f"P({first} better)", "95% interval", "paired difference", "95% interval "]
    note = (
        f"P: how often a run of {first} beats a run of the other on the same task (Mann-Whitney; bootstrap interval). Paired difference of "
        f"{results.headline} on equal seeds, with Student's interval."
    )
    return [Figures(f"{first} against the others", header, lines, note)]


def named(results: Results, agent: str) -> str:
    """Its name, and how many of its runs failed."""
    return results.label(agent) + (f" ({results.failed(agent)} failed)" if results.failed(agent) else "")


def number(value: Any) -> str:
    """Three decimals."""
    return f"{float(value):z.3f}"


def span(interval: Interval) -> str:
    """Its limits."""
    return f"{number(interval.low)} to {number(interval.high)}" if np.isfinite(interval.low) else "-"


def plus_minus(interval: Interval) -> str:
    """Estimate and half the interval."""
    digits = 3 if abs(interval.estimate) < 100 else 1
    half = (interval.high - interval.low) / 2
    return f"{interval.estimate:z.{digits}f}" + (f" ± {half:.{digits}f}" if np.isfinite(half) else "")


def print_tables(figures: Sequence[Figures], console: Any) -> None:
    """On the screen: the leaderboard, and the tasks one by one or metric by metric."""
    from rich.markup import escape
    from rich.table import Table

    for part in figures[:2]:
        table = Table(title=escape(part.title), caption=escape(part.note), box=None, padding=(0, 1, 0, 0))
        for i, name in enumerate(part.header):
            table.add_column(escape(name), justify="right" if i else "left", no_wrap=i == 0)
        for row in part.rows:
            narrow = [
                re.sub(r"(?<!\d)0\.", ".", cell) if "/" in cell else cell for cell in row[1:]
            ]  # within 80 columns
            table.add_row(*[escape(cell.replace(" / ", "/").replace(" to ", "..")) for cell in (row[0], *narrow)])
        console.print(table)
        console.print()
