"""The rows of a directory, as reports ask for them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.records import MANIFEST, read_rows

FLOATS = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Results:
    """The rows of a directory."""

    directory: Path
    manifest: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]

    @cached_property
    def agents(self) -> list[str]:
        """Those that have rows, in the suite's order."""
        present = {row["agent"] for row in self.rows}
        known = [agent for agent in self.manifest["agents"] if agent in present]
        return known + sorted(present - set(known))

    @cached_property
    def tasks(self) -> list[str]:
        """Likewise."""
        present = {row["task"] for row in self.rows}
        known = [task for task in self.manifest["tasks"] if task in present]
        return known + sorted(present - set(known))

    @property
    def headline(self) -> str:
        """What agents are ranked by."""
        return str(self.manifest["headline"])

    @cached_property
    def good(self) -> list[Mapping[str, Any]]:
        """Rows of runs that did not fail."""
        return [row for row in self.rows if "error" not in row]

    def of(self, agent: str, task: str | None = None) -> list[Mapping[str, Any]]:
        """An agent's rows of runs that did not fail."""
        return [row for row in self.good if row["agent"] == agent and task in (None, row["task"])]

    def values(self, agent: str, metric: str, task: str | None = None) -> FLOATS:
        """A metric over an agent's runs, where it is known. Shape: (n,)."""
        found = [row["metrics"].get(metric) for row in self.of(agent, task)]
        return np.asarray([value for value in found if value is not None], np.float64)

    def table(self, agent: str, metric: str, tasks: Sequence[str] | None = None) -> tuple[list[int], FLOATS]:
        """Seeds with a figure on every task, and the figures. Shape: (R, M)."""
        tasks = self.tasks if tasks is None else tasks
        known = {(row["seed"], row["task"]): row["metrics"].get(metric) for row in self.of(agent)}
        seeds = sorted({seed for seed, _ in known})
        complete = [seed for seed in seeds if all(known.get((seed, task)) is not None for task in tasks)]
        return complete, np.asarray([[known[seed, task] for task in tasks] for seed in complete], np.float64)

    def label(self, agent: str) -> str:
        """Its name, with a star if it tends to something else than the optimum of J."""
        return agent + ("" if self.manifest["agents"].get(agent, {}).get("follows_j", True) else " *")

    def failed(self, agent: str) -> int:
        """Runs without figures."""
        return sum(row["agent"] == agent and "error" in row for row in self.rows)

    @cached_property
    def made_by(self) -> str:
        """The command and the commit behind every figure."""
        commands = (
            " and ".join(f"`{command}`" for command in self.manifest.get("commands", [])) or "rows in this directory"
        )
        commits = list(dict.fromkeys((row.get("commit") or "unknown")[:12] + "+changes" * str(row.get("commit")).endswith("+changes")
                       for row in self.rows))  # fmt: skip
        return f"{commands}, commit {', '.join(commits)}"


def read_results(directory: Path) -> Results:
    """The rows of a directory.

    Raises:
        ValueError: There are none.
    """
    manifest, rows = directory / MANIFEST, read_rows(directory)
    if not manifest.is_file() or not rows:
        raise ValueError(f"No results in {directory}: expected what `textenv bench SUITE --out {directory}` writes.")
    return Results(directory, json.loads(manifest.read_text()), rows)


def best_of_n(results: Results, agent: str) -> bool:
    """Whether the KL in an agent's rows is a bound."""
    rows = results.of(agent)
    return bool(rows) and rows[0]["config"]["agent_class"] == "BestOfN" and not rows[0]["frontier"]
