"""What `textenv bench speed` says: rows that compare two sides, curves, the tables made from them, and the machine."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.speed_measure import Run, Side
from benchmarks.speed_work import PROMPT_TOKENS, SHAPES, Size, rollout_budget, rollout_episodes


@dataclass(frozen=True)
class Aim:
    """What a ratio should be."""

    value: float
    at_most: bool = False

    def met(self, ratio: float) -> bool:
        """Whether it is."""
        return ratio <= self.value if self.at_most else ratio >= self.value

    def __str__(self) -> str:
        return f"{'<=' if self.at_most else '>='} {self.value:g}"


AIMS: dict[str, Aim] = {
    "rollout-15M-64-self/deferred": Aim(5),
    "rollout-1M-64-self/deferred": Aim(3),
    "rollout-15M-64-fixed/deferred": Aim(3),
    "rollout-1M-64-fixed/deferred": Aim(1.7),
    "lanes-15M-self": Aim(0.5),
    "lanes-15M-fixed": Aim(0.5),
    "lanes-1M-self": Aim(0.5),
    "lanes-1M-fixed": Aim(0.5),
    "RLOO-15M-fixed": Aim(2.5),
    "GRPO-15M-fixed": Aim(2.5),
    "RLOO-1M-fixed": Aim(1.7),
    "GRPO-1M-fixed": Aim(1.7),
    "RLOO-15M-self": Aim(3.5),
    "GRPO-15M-self": Aim(3.5),
    "RLOO-1M-self": Aim(2.5),
    "GRPO-1M-self": Aim(2.5),
    # At 15M/32k more than half of our update is the head, and a row's last logits cost the peer as much: trunk and head
    # counted, its update is some 22 times ours, whoever computes it. So the aim is for the model that is mostly trunk.
    "update-1M/prefix rows": Aim(30),
    "floor-15M": Aim(1.25, at_most=True),
    "floor-1M": Aim(1.25, at_most=True),
    "memory-15M/as timed": Aim(0.6, at_most=True),
}
"""Row -> its aim. Rows without one are for information."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One comparison."""

    name: str
    """As in `AIMS`."""
    ours: str
    """Name of our side among `sides`."""
    peer: str
    """Name of the other side."""
    ratio: float
    """Median over rounds, above 1 where ours is faster; rows with an aim of `at most` have cost over cost instead."""
    low: float
    """Of the rounds."""
    high: float
    """Of the rounds."""
    cpu_ratio: float | None
    """The same by processor time, which other processes on the machine disturb less."""
    aim: Aim | None
    sides: dict[str, dict[str, Any]]
    """Per side: `threads`, `rate` (median, tokens per second), `tokens`, `seconds`, `cpu_seconds` (of each run)."""
    unit: str = "tokens/s"
    notes: str = ""


def compare(
    name: str,
    sides: Sequence[Side],
    runs: Mapping[str, Sequence[Run]],
    ours: str,
    peer: str,
    *,
    cost: bool = False,
    notes: str = "",
) -> Row:
    """A row from the rounds of two sides; `cost` turns the ratio round: our time per token over theirs."""
    a, b = (runs[peer], runs[ours]) if cost else (runs[ours], runs[peer])
    ratios = [x.rate / y.rate for x, y in zip(a, b, strict=True)]
    cpu = [(x.tokens / x.cpu_seconds) / (y.tokens / y.cpu_seconds) for x, y in zip(a, b, strict=True)]
    return Row(
        name=name,
        ours=ours,
        peer=peer,
        ratio=float(np.median(ratios)),
        low=min(ratios),
        high=max(ratios),
        cpu_ratio=float(np.median(cpu)),
        aim=AIMS.get(name),
        sides={side.name: figures(side.threads, runs[side.name]) for side in sides if side.name in (ours, peer)},
        notes=notes,
    )


def figures(threads: int, runs: Sequence[Run]) -> dict[str, Any]:
    """What the JSON says of a side."""
    columns = {name: [getattr(run, name) for run in runs] for name in ("tokens", "seconds", "cpu_seconds")}
    return {"threads": threads, "rate": float(np.median([run.rate for run in runs]))} | columns


@dataclass(frozen=True)
class Curve:
    """A figure as something grows."""

    name: str
    x: tuple[int, ...]
    y: tuple[float, ...]
    """Medians."""
    exponent: float | None = None
    """Of the cost of all that x multiplies: 1 is linear."""
    notes: str = ""


def summary(item: Row | Curve) -> str:
    """One line."""
    if isinstance(item, Curve):
        return f"{item.name}: " + ", ".join(f"{x:,}: {y:,.0f}" for x, y in zip(item.x, item.y, strict=True))
    rates = ", ".join(f"{name} {side['rate']:,.0f}" for name, side in item.sides.items())
    aim = "" if item.aim is None else f"  aim {item.aim} {'met' if item.aim.met(item.ratio) else 'missed'}"
    label = item.name.partition("/")[2] or "ratio"
    return f"{label} {item.ratio:.2f} ({item.low:.1f}-{item.high:.1f})  {rates} {item.unit}{aim}"


@dataclass(frozen=True)
class Table:
    """A table with what was measured under it."""

    title: str
    columns: tuple[str, ...]
    cells: list[tuple[str, ...]]
    caption: str

    def rich(self) -> Any:
        """For the terminal."""
        from rich.console import Group
        from rich.markup import escape
        from rich.table import Table as RichTable

        table = RichTable(box=None, padding=(0, 1, 0, 0))
        for i, column in enumerate(self.columns):
            table.add_column(column, justify="right" if i else "left", no_wrap=True)
        for row in self.cells:
            table.add_row(*map(escape, row))
        return Group("", f"[bold]{escape(self.title)}[/bold]", table, f"[dim]{escape(self.caption)}[/dim]")

    def markdown(self) -> str:
        """For a document."""
        lines = [f"## {self.title}", "", f"| {' | '.join(self.columns)} |", f"|{'---|' * len(self.columns)}"]
        lines += [f"| {' | '.join(row)} |" for row in self.cells]
        return "\n".join([*lines, "", self.caption, ""])


def markdown(tables: Sequence[Table], report: Mapping[str, Any]) -> str:
    """All tables, with the command and the machine."""
    where = report["machine"]
    versions = ", ".join(f"{name} {value}" for name, value in where["versions"].items())
    head = f"`{report['command']}`\n\n{where['processor']}, {where['cores']} cores, load before {where['load_before']}; {versions}.\n"
    skipped = "".join(f"\nSkipped: {name} ({reason}).\n" for name, reason in report["skipped"].items())
    return "\n".join([head, *(table.markdown() for table in tables)]) + skipped


def make_tables(report: Mapping[str, Any], size: Size, beta: float, group_size: int) -> Iterator[Table]:
    """The tables of a report: one per section that has rows."""
    models = "; ".join(str(SHAPES[name]) for name in (*size.shapes, size.large) if name is not None)
    tokens = f"{PROMPT_TOKENS[0]} to {PROMPT_TOKENS[1]} prompt tokens"
    waves = ", ".join(
        f"{rollout_episodes(n, True)} episodes in {n} lanes with a cap of {rollout_budget(size, n)}" for n in size.lanes
    )
    n = size.lanes[len(size.lanes) // 2]
    large = f"; {size.large}: half as many" if size.large else ""
    episodes, budget = size.iteration
    count = report["machine"]["cores"]
    trl = f"{'two CPU cores' if count == 2 else f'CPU cores: {count}'}, Transformers generation, no vLLM"
    captions = {
        "rollout": (
            "Writing: the Gym loop against generate",
            f"{models}; random weights, {report['dtype']} on both sides. {tokens}, constant reward, beta 0. Every response at the cap (fixed: "
            f"one wave), or stopping by itself at a mean of a third of it (self), to the end of the last one, settlement included: {waves}{large}. "
            "Tokens after a stop do not count.",
        ),
        "lanes": (
            "Step lane against deferred lane",
            f"Reward and KL (beta {beta}) paid at each step, or settled at the end, in {n} lanes: {rollout_episodes(n, True)} episodes that stop by "
            f"themselves (self), or one wave at the cap (fixed).",
        ),
        "iteration": (
            f"One iteration, rollout to optimiser step, against TRL ({trl})",
            f"{episodes} episodes in groups of {group_size}, {tokens}, {budget} response tokens (fixed) or a third of them in the mean "
            f"(self), one optimiser step, beta {beta} with a reference model, float32 on both sides.",
        ),
        "memory": (
            f"Peak memory of an RLOO iteration above what is loaded ({trl})",
            "The iteration above with fixed lengths, two of them, each side in a process of its own.",
        ),
        "update": (
            "One PPO update against one row per (prefix, token)",
            f"{' and '.join(map(str, size.update))} episodes of {budget} tokens, one epoch, two optimiser steps, the same losses; of a row's logits only the last.",
        ),
        "floor": (
            "A whole PPO iteration against its matrix work",
            f"{episodes} episodes of {budget} tokens; decoding, reference, reward model, and two epochs forward and backward by plain "
            "model() calls: no sampling, critic, optimiser or environment. Cost over cost: below 1 where our passes are cheaper than those.",
        ),
    }
    for section, (title, caption) in captions.items():
        rows = [row for row in report["rows"] if row["section"] == section]
        if rows:
            columns = ("what", "ours", "peer", "ratio", "rounds", "threads", "aim")
            notes = "".join(f" {note}." for note in dict.fromkeys(row["notes"] for row in rows) if note)
            yield Table(f"{title}, {rows[0]['unit']}", columns, [*map(cells, rows)], caption + notes)
    alone = [curve for curve in report["curves"] if curve["section"] == "env"]
    if alone:
        columns = ("lanes", *(curve["name"] for curve in alone))
        numbers = [(f"{x:,}", *(f"{curve['y'][i]:,.0f}" for curve in alone)) for i, x in enumerate(alone[0]["x"])]
        yield Table(
            "The environment alone, tokens per second", columns, numbers,
            f"No model: a policy that always says the same, beta 0, constant reward; {size.budget} tokens per episode.",
        )  # fmt: skip
    for curve in (curve for curve in report["curves"] if curve["section"] == "growth"):
        yield Table(
            f"Cost of a token as {curve['name']} grow{'s' if curve['name'] in ('length', 'vocabulary') else ''}",
            (curve["name"], "microseconds per token"),
            [(f"{x:,}", f"{y:,.1f}") for x, y in zip(curve["x"], curve["y"], strict=True)],
            f"Deferred lane, one thread. Steepest part: total cost grows as x^{curve['exponent']:.2f}"
            + (f", worse than linear: {curve['notes']}." if curve["notes"] else "."),
        )


def cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """A row of the report as text."""
    ours, peer = row["sides"][row["ours"]], row["sides"][row["peer"]]
    aim = Aim(**row["aim"]) if row["aim"] else None
    repeats = len(ours.get("seconds", [0]))  # memory is measured once
    return (
        row["name"],
        f"{ours['rate']:,.0f}",
        f"{peer['rate']:,.0f}",
        f"{row['ratio']:.2f}",
        f"{repeats}: {row['low']:.1f}-{row['high']:.1f}" if repeats > 1 else "1",
        f"{ours['threads']}, {peer['threads']}",
        "" if aim is None else f"{aim} {'met' if aim.met(row['ratio']) else 'missed'}",
    )


def cores() -> int:
    """Of the processor that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine() -> dict[str, Any]:
    """What the figures were measured on and with."""
    packages = ("textenv", "torch", "transformers", "gymnasium", "numpy", "stable-baselines3", "trl")
    versions = {"python": platform.python_version()}
    for name in packages:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    processor = platform.processor()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), processor)
    return {
        "processor": processor,
        "cores": cores(),
        "platform": platform.platform(),
        "load_before": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "date": time.strftime("%Y-%m-%d"),
        "versions": versions,
    }
