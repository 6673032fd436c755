"""`textenv compare`: two directories of results, or two agents, on equal seeds and tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import stats
from benchmarks.metrics import OF_THE_TASK, direction
from benchmarks.results import Results, read_results
from benchmarks.stats import Interval
from benchmarks.tables import number, span


@dataclass(frozen=True)
class Difference:
    """One metric of one agent, before and after."""

    agent: str
    metric: str
    before: float
    after: float
    difference: Interval
    verdict: str
    seeds: int
    headline: bool


@dataclass(frozen=True)
class Comparison:
    """What has changed, and where nothing could be compared."""

    differences: Sequence[Difference]
    alone: Sequence[str]
    """Agents of one side only."""
    confidence: float
    """Of the intervals."""


def compare_results(before: str, after: str, confidence: float = 0.95) -> Comparison:
    """Paired differences on equal seeds and tasks, agent by agent and metric by metric.

    Args:
        before: A directory of results; with `:AGENT` behind it, one agent of it.
        after: Another; differences are after - before.
        confidence: Of the intervals.

    Raises:
        ValueError: Nothing in common, or results of different tasks under the same names.
    """
    (old, old_agent), (new, new_agent) = map(parse_side, (before, after))
    if (old_agent is None) != (new_agent is None):
        raise ValueError("Expected two directories, or DIR:AGENT twice.")
    couples = [(str(old_agent), str(new_agent))] if old_agent else [(a, a) for a in new.agents if a in old.agents]
    tasks = [task for task in new.tasks if task in old.tasks]
    if not couples or not tasks:
        raise ValueError(
            f"Expected agents and tasks in common; {before} has {old.agents} on {old.tasks}, {after} {new.agents} on {new.tasks}."
        )
    found = []
    for a, b in couples:
        for row in new.of(b):
            other = next((r for r in old.of(a) if (r["task"], r["seed"]) == (row["task"], row["seed"])), row)
            seeds = [r["config"]["env_settings"].get("seed_of_task") for r in (other, row)]
            if seeds[0] != seeds[1]:
                raise ValueError(
                    f"{row['task']} of seed {row['seed']} is not the same task in both: seed_of_task {seeds[0]} and {seeds[1]}."
                )
        for metric in metrics_of(new, b):
            sides = old.table(a, metric, tasks), new.table(b, metric, tasks)
            common = sorted(set(sides[0][0]) & set(sides[1][0]))
            if not common or metric in OF_THE_TASK or metric.endswith(("_low", "_high")):
                continue
            x, y = (values[[seeds.index(seed) for seed in common]] for seeds, values in sides)
            difference = stats.paired_difference(y, x, confidence)
            sign = direction(metric, new.manifest["lower_is_better"])
            found.append(
                Difference(
                    agent=b if a == b else f"{b} against {a}",
                    metric=metric,
                    before=float(x.mean()),
                    after=float(y.mean()),
                    difference=difference,
                    verdict=stats.verdict(difference, sign) if sign else "",
                    seeds=len(common),
                    headline=metric == new.headline,
                )
            )
    if not found:
        raise ValueError(f"{before} and {after} have no finished run of the same agent, task and seed in common.")
    alone = [] if old_agent else sorted(set(old.agents) ^ set(new.agents))
    return Comparison(found, alone, confidence)


def metrics_of(results: Results, agent: str) -> list[str]:
    """Metrics that an agent's rows have, the headline first."""
    names = dict.fromkeys(name for row in results.of(agent) for name in row["metrics"])
    return sorted(names, key=lambda name: name != results.headline)


def parse_side(spec: str) -> tuple[Results, str | None]:
    """`DIR` or `DIR:AGENT`."""
    from textenv.prompts import did_you_mean

    if Path(spec).is_dir() or ":" not in spec:
        return read_results(Path(spec)), None
    where, _, agent = spec.partition(":")
    results = read_results(Path(where))
    if agent not in results.agents:
        raise ValueError(
            f"{where} has no agent {agent!r}; it has {', '.join(results.agents)}.{did_you_mean(agent, results.agents)}"
        )
    return results, agent


def print_comparison(comparison: Comparison, console: Any) -> bool:
    """Print it; returns whether the headline metric of any agent is worse."""
    from rich.markup import escape
    from rich.table import Table

    colours = {"better": "green", "worse": "red"}
    names = list(dict.fromkeys(d.agent for d in comparison.differences))
    for agent in names:
        table = Table(title=escape(agent), title_justify="left", box=None, padding=(0, 2, 0, 0))
        for i, name in enumerate(
            ("metric", "before", "after", "difference", f"{comparison.confidence:.0%} interval", "seeds", "verdict")
        ):
            table.add_column(name, justify="right" if 0 < i < 6 else "left", no_wrap=True)
        for d in (d for d in comparison.differences if d.agent == agent):
            style = colours.get(d.verdict)
            told = f"[{style}]{d.verdict}[/{style}]" if style else d.verdict
            limits = span(d.difference).replace(" to ", "..")
            table.add_row(
                ("[bold]" if d.headline else "") + escape(d.metric), number(d.before), number(d.after),
                f"{d.difference.estimate:+z.3f}", limits, str(d.seeds), told,
            )  # fmt: skip
        console.print(table)
        console.print()
    if comparison.alone:
        console.print(f"On one side only: {', '.join(comparison.alone)}.", highlight=False)
    headline = [d for d in comparison.differences if d.headline]
    worse = [d.agent for d in headline if d.verdict == "worse"]
    counts = {word: sum(d.verdict == word for d in headline) for word in ("better", "worse", "undecided")}
    name = headline[0].metric if headline else "headline"
    console.print(
        f"{name} (headline): " + ", ".join(f"{n} {word}" for word, n in counts.items() if n) + ".", highlight=False
    )
    return bool(worse)
