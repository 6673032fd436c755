"""How near each agent comes to an optimum that is known exactly, and how many tokens it takes.

`textenv/Tree-v0` lists every completion, so a trained policy has an exact score: `(J - J_ref) / (V* - J_ref)`, 0 for the
reference and 1 for the best policy there is, J = E[r] - beta KL. Each agent has one preset, played on four reward structures
with five seeds each; seed i plays the task of seed 1000 + i. Presets were chosen on task seeds 0 to 9.

A finished cell (agent, structure, seed) is one file with one row of JSON, written whole or not at all. Cells that are there
are not run again (after a change of an agent take another `--out`); cells that failed, or had other settings, are. Table and
picture show the cells that are asked for, and nothing that is not in their rows.

Run: python -m benchmarks.exact
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import platform
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.records import write_text
from benchmarks.suites import PRESETS

STRUCTURES = ("random", "needle", "trap", "conflict")
BETAS = np.logspace(-3, 3, 400)
"""Of the frontier that no policy can lie above, reward per nat."""


# ---------------------------------------------------------------------- what is run


@dataclass(frozen=True)
class ExactArguments:
    """Which cells are run, and where their rows go."""

    agents: tuple[str, ...] = tuple(PRESETS)
    """Names of presets."""
    structures: tuple[str, ...] = STRUCTURES
    """Reward structures of the task."""
    seeds: int = 5
    """Runs per agent and structure: agent seeds 0, 1, ..."""
    task_seed: int = 1000
    """Task seed of agent seed 0; the next has the next. Tuning is on 0 to 9."""
    tokens: int | None = None
    """Length of a run (default: the preset's)."""
    vocab_size: int = 4
    """Tokens of the task's alphabet, the stop token included."""
    horizon: int = 6
    """Its response budget, in tokens."""
    jobs: int = 2
    """Processes, of one thread each."""
    out: Path = Path("runs/exact")
    """Where rows, table and picture go."""

    def __post_init__(self) -> None:
        from textenv.prompts import did_you_mean

        for name, values, known in (
            ("agents", self.agents, PRESETS),
            ("structures", self.structures, (*STRUCTURES, "independent")),
        ):
            for value in values:
                if value not in known:
                    hint = did_you_mean(value, list(known))
                    raise ValueError(f"Expected {name} to be some of {list(known)}, got {value!r}.{hint}")
            if not values:
                raise ValueError(f"Expected at least one of {name}.")
        for name in ("seeds", "jobs"):
            if getattr(self, name) < 1:
                raise ValueError(f"Expected {name} >= 1, got {getattr(self, name)}.")
        if self.tokens is not None and self.tokens < 1:
            raise ValueError(f"Expected tokens >= 1, got {self.tokens}.")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run: everything that its result depends on."""

    name: str
    """Of the preset."""
    agent: str
    config: dict[str, Any]
    structure: str
    seed: int
    """Of the agent."""
    task_seed: int
    vocab_size: int
    horizon: int
    lanes: int
    group_size: int
    token_budget: int

    @property
    def file(self) -> str:
        """Name of its file."""
        return f"{self.name}-{self.structure}-{self.seed}.json"


def cells(options: ExactArguments) -> list[Cell]:
    """The runs that are asked for; the first seeds of all agents come first."""
    found = []
    for seed in range(options.seeds):
        for name in dict.fromkeys(options.agents):
            preset = PRESETS[name]
            tokens = preset.tokens if options.tokens is None else options.tokens
            found += [
                Cell(
                    name=name,
                    agent=preset.agent,
                    config=preset.settings(tokens),
                    structure=structure,
                    seed=seed,
                    task_seed=options.task_seed + seed,
                    vocab_size=options.vocab_size,
                    horizon=options.horizon,
                    lanes=preset.lanes,
                    group_size=preset.group_size,
                    token_budget=tokens,
                )
                for structure in dict.fromkeys(options.structures)
            ]
    return found


# ---------------------------------------------------------------------- one run


def play(cell: Cell) -> dict[str, Any]:
    """Train, evaluate exactly, and return the row. A failure is a row too."""
    import torch

    torch.set_num_threads(1)
    row: dict[str, Any] = asdict(cell) | {"versions": versions()}
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        row |= best_of_n_row(cell) if cell.agent == "BestOfN" else training_row(cell)
    except Exception as error:
        row |= {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
    return row | {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}


def make_env(cell: Cell) -> Any:
    """The cell's task."""
    import gymnasium as gym

    import textenv  # noqa: F401  # registers the ids

    task = {name: getattr(cell, name) for name in ("vocab_size", "horizon", "structure")}
    return gym.make_vec(
        "textenv/Tree-v0", num_envs=cell.lanes, seed_of_task=cell.task_seed, group_size=cell.group_size, **task
    )


def training_row(cell: Cell) -> dict[str, Any]:
    """Learn, with exact scores at about 20 points on the way."""
    from stable_baselines3.common.callbacks import BaseCallback

    import agents

    env = make_env(cell)
    lanes = env.unwrapped
    agent = getattr(agents, cell.agent)(env, seed=cell.seed, **cell.config)
    marks = np.geomspace(min(500, cell.token_budget), cell.token_budget, 20)
    curve: list[tuple[int, float]] = []

    class Watch(BaseCallback):
        """Evaluates between updates: an evaluation draws no random numbers, so it changes nothing."""

        passed = 0

        def _on_rollout_start(self) -> None:
            due = int((marks <= agent.num_timesteps).sum())
            if due > self.passed:
                self.passed = due
                curve.append((agent.num_timesteps, lanes.evaluate(agent.policy).score))

        def _on_step(self) -> bool:
            return True

    agent.learn(cell.token_budget, callback=Watch())
    result = figures(lanes, agent.policy)
    curve.append((agent.num_timesteps, result["score"]))
    accounts = {k.removeprefix("time/"): v for k, v in agent.history[-1].items() if k.startswith("time/")}
    return result | {"tokens": agent.num_timesteps, "accounts": accounts, "curve": curve}


def best_of_n_row(cell: Cell) -> dict[str, Any]:
    """Nothing is trained: n grows up to the preset's, and a point's tokens are those that one answer costs."""
    from agents import BestOfN

    env = make_env(cell)
    lanes = env.unwrapped
    most = cell.config["n"]
    sizes = sorted({2**k for k in range(int(math.log2(most)) + 1)} | {most})
    leaves = lanes.leaves
    length = float(np.exp(leaves.log_ref) @ (leaves.tokens < cell.vocab_size).sum(axis=1))
    curve, result = [], {}
    for n in sizes:
        agent = BestOfN(env, seed=cell.seed, **cell.config | {"n": n})
        result = figures(lanes, agent.completion_log_probs())
        curve.append((n * length, result["score"]))
    return result | {"tokens": curve[-1][0], "accounts": {}, "curve": curve}


def figures(lanes: Any, policy: Any) -> dict[str, float]:
    """What a policy is worth, exactly, and what no policy of its KL can exceed."""
    result = asdict(lanes.evaluate(policy))
    bound = float(lanes.frontier(BETAS).bound(result["kl"]))
    return result | {"beta": float(lanes.kl.beta), "optimum": lanes.solve().value, "frontier_reward": bound}


def versions() -> dict[str, str]:
    """What the figures were made with."""
    packages = ("textenv", "torch", "transformers", "gymnasium", "numpy")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


# ---------------------------------------------------------------------- all runs


def run_exact(options: ExactArguments) -> list[dict[str, Any]]:
    """Run what is missing; print and write the table, write the rows and draw the picture."""
    from rich.console import Console

    console = Console()
    folder = options.out / "cells"
    folder.mkdir(parents=True, exist_ok=True)
    wanted = cells(options)
    missing = [cell for cell in wanted if read_cell(folder, cell) is None]
    console.print(f"{len(wanted)} runs, {len(wanted) - len(missing)} of them finished before.", highlight=False)
    for done, row in enumerate(played(missing, options.jobs), start=1):
        write_text(folder / Cell(**cell_of(row)).file, json.dumps(row) + "\n")
        score = f"failed: {row['error']}" if "error" in row else f"score {row['score']:.3f}"
        console.print(
            f"{done:>4}/{len(missing)}  {row['name']:<16} {row['structure']:<9} seed {row['seed']}  {score}  "
            f"{row.get('tokens', 0):,.0f} tokens, {row['cpu_seconds']:.0f} s",
            highlight=False,
            markup=False,
        )
    rows = [json.loads((folder / cell.file).read_text()) for cell in wanted]
    write_text(options.out / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    lines = summarise(rows, options)
    print_table(lines, console)
    write_text(options.out / "table.md", markdown(lines, rows, options))
    draw(rows, options, options.out / "exact.png")
    console.print(f"\ntable: {options.out / 'table.md'}   picture: {options.out / 'exact.png'}", highlight=False)
    return rows


def played(missing: Sequence[Cell], jobs: int) -> Iterator[dict[str, Any]]:
    """Rows as they are finished."""
    if jobs == 1 or len(missing) < 2:
        yield from map(play, missing)
        return
    # A fresh interpreter per process: torch's threads do not survive a fork.
    pool = ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"))
    try:
        futures = {pool.submit(play, cell): cell for cell in missing}
        for future in as_completed(futures):
            try:
                yield future.result()
            except Exception as error:  # the process has died
                lost = {"error": f"{type(error).__name__}: {error}", "seconds": 0.0, "cpu_seconds": 0.0}
                yield asdict(futures[future]) | {"versions": versions()} | lost
    finally:  # Ctrl-C too: what has not begun is not begun
        pool.shutdown(cancel_futures=True)


def cell_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a row that says what was run."""
    return {name: row[name] for name in Cell.__dataclass_fields__}


def read_cell(folder: Path, cell: Cell) -> dict[str, Any] | None:
    """A finished row of exactly this cell; None if there is none, it failed, or it was run under other settings."""
    try:
        row = json.loads((folder / cell.file).read_text())
    except (OSError, ValueError):
        return None
    same = all(row.get(name) == value for name, value in asdict(cell).items())
    return row if same and "error" not in row else None


# ---------------------------------------------------------------------- table


@dataclass(frozen=True)
class Line:
    """One agent's figures."""

    name: str
    medians: dict[str, float]
    """By structure, and over all runs as `all`; nan without a finished run."""
    quartiles: dict[str, float]
    """The lower ones, likewise."""
    minutes: float
    """CPU time of all its runs, on two cores."""
    tokens: float
    """Per run, mean."""
    failed: int
    """Runs without a score."""


def summarise(rows: Sequence[Mapping[str, Any]], options: ExactArguments) -> list[Line]:
    """The figures of the table."""
    lines = []
    for name in dict.fromkeys(options.agents):
        mine = [row for row in rows if row["name"] == name]
        scores = {
            group: [row["score"] for row in mine if "error" not in row and group in (row["structure"], "all")]
            for group in (*dict.fromkeys(options.structures), "all")
        }
        lines.append(
            Line(
                name,
                {group: quantile(values, 0.5) for group, values in scores.items()},
                {group: quantile(values, 0.25) for group, values in scores.items()},
                minutes=sum(row["cpu_seconds"] for row in mine) / 60 / 2,
                tokens=float(np.mean([row.get("tokens", 0.0) for row in mine])),
                failed=len(mine) - len(scores["all"]),
            )
        )
    return lines


def quantile(values: Sequence[float], q: float) -> float:
    """With linear interpolation; nan of nothing."""
    return float(np.quantile(values, q)) if values else math.nan


def label(line: Line) -> str:
    """The agent's name, and what is to be known about it."""
    mark = "" if PRESETS[line.name].follows_j else " *"
    return line.name + mark + (f" ({line.failed} failed)" if line.failed else "")


CAPTION = "exact score, median / lower quartile over seeds; minutes: CPU time of an agent's runs, shared by two cores"
FOOTNOTE = "* tends to another policy than the optimum of E[r] - beta KL: see docs/agents"


def print_table(lines: Sequence[Line], console: Any) -> None:
    """On the screen, within 80 columns."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=CAPTION, caption=escape(FOOTNOTE), box=None, padding=(0, 1, 0, 0))
    table.add_column("agent", no_wrap=True)
    for group in (*lines[0].medians, "minutes"):
        table.add_column(group, justify="right", no_wrap=True)
    for line in lines:
        scores = [f"{line.medians[group]:.3f}/{line.quartiles[group]:.3f}" for group in line.medians]
        table.add_row(label(line), *[text.replace("0.", ".") for text in scores], f"{line.minutes:.1f}")
    console.print(table)


def markdown(lines: Sequence[Line], rows: Sequence[Mapping[str, Any]], options: ExactArguments) -> str:
    """For a document: the table with the command that makes it, and what it was made with."""
    columns = ["agent", *lines[0].medians, "tokens", "minutes"]
    made_with = ", ".join(f"{name} {value}" for name, value in rows[0]["versions"].items())
    last = options.task_seed + options.seeds - 1
    body = []
    for line in lines:
        scores = [f"{line.medians[group]:.3f} / {line.quartiles[group]:.3f}" for group in line.medians]
        body.append("| " + " | ".join([label(line), *scores, f"{line.tokens:,.0f}", f"{line.minutes:.1f}"]) + " |")
    return "\n".join(
        [
            f"`{command(options)}`",
            "",
            f"{CAPTION[0].upper()}{CAPTION[1:]}. {options.seeds} seeds per structure, task seeds {options.task_seed} to {last}, V = "
            f"{options.vocab_size}, T = {options.horizon}. With {made_with}.",
            "",
            "| " + " | ".join(columns) + " |",
            "|" + "---|" * len(columns),
            *body,
            "",
            FOOTNOTE.replace("*", "\\*", 1) + ".",
            "",
        ]
    )


def command(options: ExactArguments) -> str:
    """What makes these figures: the arguments that are not the usual ones."""
    usual, parts = ExactArguments(), ["textenv bench exact"]
    for name in ("agents", "structures", "seeds", "task_seed", "tokens", "vocab_size", "horizon"):
        value = getattr(options, name)
        if value != getattr(usual, name):
            words = value if isinstance(value, tuple) else (value,)
            parts.append(f"--{name.replace('_', '-')} {' '.join(map(str, words))}")
    return " ".join(parts)


# ---------------------------------------------------------------------- picture

LEAST_GAP = 1e-3
"""Scores nearer to 1 than this are drawn at it."""
COLOURS = (
    "#1f6f8b", "#d1495b", "#3a7d44", "#e08e45", "#6a4c93", "#8c564b", "#c2559d", "#5b8c5a", "#117a9c", "#a3721c", "#4d4d4d",
    "#9b2226", "#7a8b99",
)  # fmt: skip


def draw(rows: Sequence[Mapping[str, Any]], options: ExactArguments, path: Path) -> None:
    """Score against tokens, a panel per structure: medians over seeds, on a scale that spreads what lies near 1."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    structures = list(dict.fromkeys(options.structures))
    names = list(dict.fromkeys(options.agents))
    colours = {name: COLOURS[list(PRESETS).index(name) % len(COLOURS)] for name in names}
    count = len(structures)
    columns = min(2, count)
    figure, axes = plt.subplots(
        -(-count // columns), columns, figsize=(6.2 * columns, 4.4 * -(-count // columns)), constrained_layout=True,
        squeeze=False,
    )  # fmt: skip
    for axis in axes.flat[count:]:
        axis.set_visible(False)
    for axis, structure in zip(axes.flat, structures, strict=False):
        ends = {}
        for name in names:
            curves = [
                np.asarray(row["curve"], np.float64)
                for row in rows
                if row["name"] == name and row["structure"] == structure and "error" not in row
            ]
            if curves:
                x, y = median_curve(curves)
                style = "-" if PRESETS[name].follows_j else (0, (4, 1.5))
                axis.plot(x, height(y), color=colours[name], lw=1.4, ls=style, solid_capstyle="round")
                ends[name] = (float(x[-1]), float(height(y)[-1]))
        axis.set_xscale("log")
        ticks = [0, 0.5, 0.9, 0.97, 0.99, 0.999]
        axis.set_yticks(height(np.asarray(ticks)), [f"{tick:g}" for tick in ticks])
        axis.set_ylim(height(np.asarray(-1.0)) - 0.02, height(np.asarray(1.0)) + 0.12)
        axis.axhline(float(height(np.asarray(0.97))), color="grey", lw=0.6, ls=":")
        axis.set_title(structure, loc="left", fontweight="bold")
        axis.set(xlabel="tokens", ylabel="exact score (1: optimum)")
        axis.spines[["top", "right"]].set_visible(False)
        label_ends(axis, ends, colours)
    figure.suptitle(
        f"Exact score against tokens, median of {options.seeds} seeds. Dashed: tends elsewhere. BestOfN: tokens per answer, n growing.",
        fontsize=10,
    )
    scratch = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    figure.savefig(scratch, dpi=150)
    plt.close(figure)
    os.replace(scratch, path)


def height(score: NDArray[np.float64]) -> NDArray[np.float64]:
    """Where a score is drawn: -log10 of what is missing to 1, which makes 0.9, 0.99 and 0.999 equally far apart."""
    return -np.log10(np.clip(1 - np.asarray(score), LEAST_GAP, 2.0))


def median_curve(curves: Sequence[NDArray[np.float64]]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Median over runs, each interpolated to the first one's tokens. Shapes: (n_i, 2) each -> (n,), (n,)."""
    x = curves[0][:, 0]
    return x, np.median([np.interp(x, curve[:, 0], curve[:, 1]) for curve in curves], axis=0)


def label_ends(axis: Any, ends: Mapping[str, tuple[float, float]], colours: Mapping[str, str]) -> None:
    """Names at the right of a panel, in the order of the curves' ends and clear of each other."""
    if not ends:
        return
    low, high = axis.get_ylim()
    right = axis.get_xlim()[1]
    arrow = {"arrowstyle": "-", "lw": 0.5, "alpha": 0.6, "relpos": (0, 0.5), "shrinkA": 0, "shrinkB": 1}
    font: dict[str, Any] = {"fontsize": 7.5, "va": "center", "annotation_clip": False}
    for name in [name for name in ends if ends[name][0] < right / 20]:  # it ends in the midst of the panel
        axis.annotate(name, ends[name], xytext=(4, 0), textcoords="offset points", color=colours[name], **font)
    order = sorted((name for name in ends if ends[name][0] >= right / 20), key=lambda name: ends[name][1])
    places = np.asarray([ends[name][1] for name in order])
    step = (high - low) / 19
    for _ in range(500):  # neighbours that overlap push each other away
        overlap = np.clip(step - np.diff(places), 0, None) / 2
        places[:-1] -= overlap
        places[1:] += overlap
    for name, place in zip(order, places, strict=True):
        axis.annotate(
            name, ends[name], xytext=(right * 1.1, place), textcoords="data", color=colours[name], **font,
            arrowprops=arrow | {"color": colours[name]},
        )  # fmt: skip


def main() -> None:
    """`python -m benchmarks.exact`."""
    import tyro

    run_exact(tyro.cli(ExactArguments, description=(__doc__ or "").splitlines()[0]))


if __name__ == "__main__":
    main()
