"""What is seen while a suite runs: a live table on a terminal, lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from benchmarks.cells import Cell
from benchmarks.engines import Engine
from benchmarks.suites import Suite


class Silent:
    """Shows nothing."""

    def started(self, cell: Cell) -> None:
        """A cell begins."""

    def finished(self, cell: Cell, row: Mapping[str, Any]) -> None:
        """A cell has its row."""


class Lines(Silent):
    """A line per finished cell: for files, and for CI."""

    def __init__(self, console: Any, suite: Suite, todo: Sequence[Cell]) -> None:
        self.console, self.headline, self.total, self.done = console, suite.headline, len(todo), 0

    def finished(self, cell: Cell, row: Mapping[str, Any]) -> None:
        """Print it."""
        self.done += 1
        self.console.print(
            f"{self.done:>4}/{self.total}  {cell.agent:<16} {cell.task:<12} seed {cell.seed}  {outcome(row, self.headline)}  "
            f"{row['time']['seconds']:.1f} s",
            highlight=False, markup=False, soft_wrap=True,
        )  # fmt: skip


class Table(Silent):
    """A live table: per agent what is done, what failed and how it goes, and the time left."""

    def __init__(
        self, suite: Suite, wanted: Sequence[Cell], todo: Sequence[Cell], there: Mapping[str, Any], parallel: int
    ) -> None:
        self.suite, self.wanted, self.parallel = suite, wanted, parallel
        self.rows: dict[str, Mapping[str, Any]] = {
            cell.file: there[cell.file] for cell in wanted if cell.file in there and "error" not in there[cell.file]
        }
        self.waiting = {cell.file: cell for cell in todo}
        self.running: dict[str, tuple[Cell, float]] = {}

    def started(self, cell: Cell) -> None:
        """Note it."""
        self.running[cell.file] = cell, time.perf_counter()

    def finished(self, cell: Cell, row: Mapping[str, Any]) -> None:
        """Note it."""
        self.rows[cell.file] = row
        self.waiting.pop(cell.file, None)
        self.running.pop(cell.file, None)

    def seconds_left(self) -> float | None:
        """By what agents took per token so far, those not seen yet like the others; None before the first row."""
        took: dict[str, list[float]] = {}
        known = {cell.file: cell for cell in self.wanted}
        for file, row in self.rows.items():
            if row["time"]["seconds"] > 0:
                took.setdefault(row["agent"], []).append(row["time"]["seconds"] / max(1, known[file].tokens))
        if not took:
            return None
        rates = {agent: float(np.mean(rate)) for agent, rate in took.items()}
        usual = float(np.mean(list(rates.values())))
        left = {file: rates.get(cell.agent, usual) * cell.tokens for file, cell in self.waiting.items()}
        for file, (_, began) in self.running.items():
            left[file] = max(0.0, left[file] - (time.perf_counter() - began))
        return max([sum(left.values()) / self.parallel, *(left[file] for file in self.running)], default=0.0)

    def __rich__(self) -> Any:
        """As rich draws it."""
        from rich.markup import escape
        from rich.table import Table as RichTable

        done, left = len(self.rows), self.seconds_left()
        failed = sum("error" in row for row in self.rows.values())
        caption = f"{done}/{len(self.wanted)} runs" + (f", {failed} failed" if failed else "")
        caption += "" if left is None else f", {clock(left)} left"
        table = RichTable(title=escape(self.suite.title), caption=caption, box=None, padding=(0, 2, 0, 0))
        for title in ("agent", "done", "failed", f"median {self.suite.headline}", "now running"):
            table.add_column(title, justify="left" if title in ("agent", "now running") else "right")
        for agent in self.suite.agents:
            mine = [row for row in self.rows.values() if row["agent"] == agent]
            total = sum(cell.agent == agent for cell in self.wanted)
            values = [v for row in mine if (v := row.get("metrics", {}).get(self.suite.headline)) is not None]
            bad = sum("error" in row for row in mine)
            now = ", ".join(f"{cell.task} {cell.seed}" for cell, _ in self.running.values() if cell.agent == agent)
            middle = f"{np.median(values):.3f}" if values else ""
            table.add_row(
                escape(agent), f"{len(mine)}/{total}", f"[red]{bad}[/red]" if bad else "", middle, escape(now)
            )
        return table


@contextmanager
def progress(
    console: Any,
    suite: Suite,
    wanted: Sequence[Cell],
    todo: Sequence[Cell],
    there: Mapping[str, Any],
    engine: Engine,
) -> Iterator[Silent]:
    """What shows how far a run is: a live table on a terminal, lines elsewhere."""
    if console is None:
        yield Silent()
        return
    console.print(
        f"{len(wanted)} run{'s' * (len(wanted) != 1)}, {len(wanted) - len(todo)} of them finished before.",
        highlight=False,
    )
    table = Table(suite, wanted, todo, there, max(1, engine.jobs))
    if not console.is_terminal or not todo:
        yield Lines(console, suite, todo)
        return
    from rich.live import Live

    with Live(table, console=console, refresh_per_second=2):
        yield table


def outcome(row: Mapping[str, Any], headline: str) -> str:
    """A row in a few words."""
    if "error" in row:
        return f"failed: {row['error'].splitlines()[0]}"
    value = row["metrics"].get(headline)
    return f"{headline} {value:.3f}" if value is not None else "done"


def clock(seconds: float) -> str:
    """`1:02:03`."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
