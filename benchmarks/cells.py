"""What a suite runs: cells, one for each agent, task and seed, as plain data."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.suites import Suite


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run: everything that its row depends on, as plain data."""

    suite: str
    task: str
    agent: str
    seed: int
    agent_class: str
    agent_settings: dict[str, Any]
    env: str
    env_settings: dict[str, Any]
    evaluation: dict[str, Any]
    prompts: int
    samples: int
    lanes: int
    group_size: int
    tokens: int
    trains: bool
    metrics: list[str]

    @property
    def file(self) -> str:
        """Name of its row's file."""
        return re.sub(r"[^\w.=-]+", "_", f"{self.agent}--{self.task}--{self.seed}") + ".json"

    @property
    def config(self) -> dict[str, Any]:
        """Its settings, as they stand in its row."""
        return {name: value for name, value in asdict(self).items() if name not in IDENTITY}


IDENTITY = ("suite", "task", "agent", "seed")


def cells(name: str, suite: Suite) -> list[Cell]:
    """The runs of a suite; the first seeds of all agents come first.

    Raises:
        ValueError: Nothing to run, or two cells whose names are one file name.
    """
    if not suite.tasks or not suite.agents or suite.seeds < 1:
        raise ValueError(f"Expected at least one task, one agent and one seed in suite {name!r}.")
    found = [
        cell_of(name, suite, task, agent, seed)
        for seed in range(suite.seeds)
        for agent in suite.agents
        for task in suite.tasks
    ]
    if len({cell.file for cell in found}) < len(found):
        raise ValueError(f"Suite {name!r} has names of agents or tasks that differ only in special characters.")
    return found


def cell_of(name: str, suite: Suite, task_name: str, agent_name: str, seed: int) -> Cell:
    """One of them."""
    task, preset = suite.tasks[task_name], suite.agents[agent_name]
    tokens = suite.tokens if preset.tokens is None else preset.tokens
    settings = dict(task.settings) | dict(preset.env)
    if task.first_task_seed is not None:
        settings["seed_of_task"] = task.first_task_seed + seed
    cell = Cell(
        suite=name,
        task=task_name,
        agent=agent_name,
        seed=seed,
        agent_class=preset.agent,
        agent_settings=preset.keywords(tokens),
        env=task.env,
        env_settings=settings,
        evaluation=dict(task.evaluation),
        prompts=task.prompts,
        samples=task.samples,
        lanes=preset.lanes,
        group_size=preset.group_size,
        tokens=tokens,
        trains=preset.trains,
        metrics=list(suite.metrics),
    )
    return Cell(**json.loads(json.dumps(asdict(cell))))  # as its row will hold it: lists for tuples
