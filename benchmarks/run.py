"""The runner of all suites: agents x tasks x seeds, in one process, in several, or on a Ray cluster.

A run of one (task, agent, seed) is a cell; a finished cell is one file with one row of JSON, written whole or not at all.
So a run that is killed loses the cells that were running and nothing else, and `--resume` runs what is missing. A failure
is a row too, with its traceback. Rows do not depend on where cells run and in which order: only the entries `time` and `host` and
the seconds of the curve do (`without_time`).

Run: textenv bench SUITE
"""

from __future__ import annotations

import fcntl
import json
import math
import multiprocessing
import os
import platform
import random
import re
import signal
import subprocess
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.records import write_json, write_text
from benchmarks.suites import Suite

EVALUATION_LANES = 128
"""At most; no more than answers are asked for."""
EVALUATION_SEED = 10_000
"""Of a cell's answers: this plus the cell's seed, the same for all agents."""
POINTS = 20
"""Of a curve on an exact task, evenly spaced on a logarithmic scale of tokens."""
SHOWN = 8
"""Prompts whose answers a row keeps."""
RETRIES = 2
"""Of a Ray task whose machine or process has died."""
ROWS, MANIFEST = "rows", "suite.json"

Started = Callable[["Cell"], None]


# ---------------------------------------------------------------------- what is run


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


# ---------------------------------------------------------------------- one run


def play(cell: Cell, commit: str | None = None) -> dict[str, Any]:
    """Train, evaluate, and return the row. A failure is a row too."""
    import torch

    import agents.base  # noqa: F401  # importing is no part of the run's time

    torch.set_num_threads(1)
    seed = cell.seed + 1  # for agents that draw from global generators; ours do not
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  # that is the global one
    torch.manual_seed(seed)
    row: dict[str, Any] = {name: getattr(cell, name) for name in IDENTITY}
    row |= {"config": cell.config, "versions": versions(), "commit": commit}
    began, wall, cpu = time.time(), time.perf_counter(), time.process_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they would tear the table
            row |= measured(cell)
    except Exception as error:
        row |= {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
    row["time"] = {"began": began, "seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
    row["host"] = {"name": platform.node(), "machine": platform.machine(), "cores": os.cpu_count()}
    return finite(row)


def measured(cell: Cell) -> dict[str, Any]:
    """What a row says of a run that went well."""
    from benchmarks import metrics
    from textenv.cli.arguments import load_object

    unseen = make_env(cell, min(EVALUATION_LANES, cell.prompts * cell.samples), **cell.evaluation)
    agent_class = find_agent(cell.agent_class)
    env = unseen
    if cell.trains:
        groups = {"group_size": cell.group_size} if cell.group_size != 1 else {}
        env = make_env(cell, cell.lanes, **groups)
    agent = agent_class(env, seed=cell.seed, **cell.agent_settings)
    if cell.trains:
        curve = learn(agent, env.unwrapped, cell.tokens)
    else:
        curve = grown(agent_class, env, cell) if hasattr(agent, "completion_log_probs") else {}
    count = len(unseen.unwrapped.task.prompts)
    ids = np.random.default_rng(0).permutation(count)[: cell.prompts]
    answers = metrics.Answers(
        agent=agent,
        env_id=cell.env,
        lanes=unseen.unwrapped,
        split=cell.evaluation.get("split", cell.env_settings.get("split")),
        prompt_ids=np.repeat(ids, cell.samples),
        samples=cell.samples,
        seed=EVALUATION_SEED + cell.seed,
    )
    figures: dict[str, float] = {}
    for name in cell.metrics:
        group = metrics.METRICS[name] if name in metrics.METRICS else load_object(name, "the metric")
        figures |= group(answers)
    return {
        "metrics": {name: float(value) for name, value in figures.items()},
        "accounts": accounts(agent) if cell.trains else {},
        "curve": curve,
        "frontier": frontier(unseen.unwrapped),
        "samples": samples(answers) if "episodes" in vars(answers) else [],
    }


def make_env(cell: Cell, lanes: int, **changes: Any) -> Any:
    """The cell's task."""
    import gymnasium as gym

    import textenv  # noqa: F401  # registers the ids
    from textenv.cli.arguments import load_reward

    settings = cell.env_settings | changes
    if isinstance(settings.get("reward"), str):
        settings["reward"] = load_reward(settings["reward"])
    return gym.make_vec(cell.env, num_envs=lanes, **settings)


def find_agent(name: str) -> Any:
    """A class (or a function that makes an agent) by name, as `module:Class` or as `file.py:Class`."""
    from textenv.cli.arguments import load_agent, load_object

    return load_object(name, "the agent") if ":" in name else load_agent(name)


def learn(agent: Any, lanes: Any, tokens: int) -> dict[str, list[float]]:
    """Train; returns the curve, column by column. Where the optimum is known it has the exact score at about 20 points."""
    from stable_baselines3.common.callbacks import BaseCallback

    from benchmarks.metrics import policy_of

    marks = np.geomspace(max(1, min(500, tokens // 8)), tokens, POINTS)
    points: list[dict[str, float]] = []
    began = time.perf_counter()
    evaluating = 0.0

    def look() -> None:
        nonlocal evaluating
        now = time.perf_counter()
        if hasattr(lanes, "solve"):
            value = lanes.evaluate(policy_of(agent))
            point = {"score": value.score, "reward": value.reward, "kl": value.kl}
            points.append({"tokens": agent.num_timesteps, "seconds": now - began - evaluating} | point)
        evaluating += time.perf_counter() - now

    class Watch(BaseCallback):
        """Evaluates between updates: an evaluation draws no random numbers, so it changes nothing."""

        passed = 0

        def _on_rollout_start(self) -> None:
            due = int((marks <= agent.num_timesteps).sum())
            if due > self.passed:
                self.passed = due
                look()

        def _on_step(self) -> bool:
            return True

    agent.learn(tokens, callback=Watch())
    look()
    if not points:  # then what the agent has logged
        names = {
            "tokens": "time/timesteps",
            "seconds": "time/seconds",
            "reward": "rollout/task_reward",
            "kl": "rollout/kl",
        }
        points = [
            {name: row.get(key, math.nan) for name, key in names.items()} for row in getattr(agent, "history", [])
        ]
    return {name: [point[name] for point in points] for name in points[0]} if points else {}


def grown(agent_class: Any, env: Any, cell: Cell) -> dict[str, list[float]]:
    """Best-of-n where it is known exactly, for n up to the cell's. A point's tokens are those that one answer costs."""
    lanes = env.unwrapped
    if not hasattr(lanes, "solve"):
        return {}
    most = cell.agent_settings.get("n", 1)
    leaves = lanes.leaves
    length = float(np.exp(leaves.log_ref) @ (leaves.tokens < lanes.vocab_size).sum(axis=1))
    curve: dict[str, list[float]] = {name: [] for name in ("tokens", "score", "reward", "kl")}
    for n in sorted({2**k for k in range(int(math.log2(most)) + 1)} | {most}):
        agent = agent_class(env, seed=cell.seed, **cell.agent_settings | {"n": n})
        value = lanes.evaluate(agent.completion_log_probs())
        for name, number in zip(curve, (n * length, value.score, value.reward, value.kl), strict=True):
            curve[name].append(number)
    return curve


def accounts(agent: Any) -> dict[str, float]:
    """What the run has cost: tokens, gradient tokens, calls of reward and reference (docs/agents)."""
    last = agent.history[-1] if getattr(agent, "history", None) else {}
    counted = {name.removeprefix("time/"): value for name, value in last.items() if name.startswith("time/")}
    return {"timesteps": float(agent.num_timesteps)} | {k: v for k, v in counted.items() if not k.endswith("seconds")}


def frontier(lanes: Any) -> dict[str, list[float]]:
    """The exact front of KL and reward, as far as it is drawn; nothing where it is not known."""
    from benchmarks.metrics import DRAWN_BETAS

    if not hasattr(lanes, "solve"):
        return {}
    front = lanes.frontier(DRAWN_BETAS)
    order = np.argsort(front.kl)
    return {"kl": front.kl[order].tolist(), "reward": front.reward[order].tolist()}


def samples(answers: Any) -> list[dict[str, Any]]:
    """The answers to the first prompts, with their rewards."""
    prompts = answers.lanes.task.prompts.prompts
    return [
        {"prompt": prompts[answers.prompt_ids[i]], "answer": answers.texts[i], "reward": float(answers.episodes.task_reward[i])}
        for i in range(0, min(len(answers.texts), SHOWN * answers.samples), answers.samples)
    ]  # fmt: skip


def versions() -> dict[str, str]:
    """What the figures were made with."""
    packages = ("textenv", "torch", "transformers", "gymnasium", "stable-baselines3", "numpy")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def current_commit() -> str | None:
    """Of the checkout that runs, with `+changes` if files differ from it; None where it is no checkout."""
    root = Path(__file__).parents[1]
    git = ["git", "-C", str(root)]
    if not (root / ".git").exists():
        return None
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        status = [*git, "status", "--porcelain", "--untracked-files=no"]
        changed = subprocess.run(status, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+changes" if changed else "")


def finite(value: Any) -> Any:
    """None for numbers that JSON does not know."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: finite(item) for name, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list | tuple) else value


def without_time(row: Mapping[str, Any]) -> dict[str, Any]:
    """What two runs of one cell have in common: all but times and hosts."""
    kept = {name: value for name, value in row.items() if name not in ("time", "host")}
    if "curve" in kept:
        kept["curve"] = {name: values for name, values in kept["curve"].items() if name != "seconds"}
    return kept


# ---------------------------------------------------------------------- where runs run


def in_turn(todo: Sequence[Cell], commit: str | None, started: Started) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """In this process, one after the other."""
    for cell in todo:
        started(cell)
        yield cell, play(cell, commit)


def in_processes(
    todo: Sequence[Cell], commit: str | None, started: Started, jobs: int
) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """In processes of one thread each. One that dies takes its cell along, as a failure, and is replaced."""
    waiting = list(todo)[::-1]
    workers: dict[Any, tuple[Any, Cell]] = {}  # by our end of its pipe

    def give(pipe: Any, process: Any) -> None:
        cell = waiting.pop()
        workers[pipe] = process, cell
        started(cell)
        with suppress(ConnectionError):  # it has just died: seen below
            pipe.send((cell, commit))

    try:
        while waiting or workers:
            while waiting and len(workers) < jobs:
                give(*start_worker())
            ready = wait(list(workers))
            for pipe in [pipe for pipe in workers if pipe in ready]:
                process, cell = workers.pop(pipe)
                try:
                    row = pipe.recv()
                except (EOFError, ConnectionError):
                    process.join()
                    row = lost(cell, commit, f"its process died (exit code {process.exitcode})")
                    pipe.close()
                else:
                    if waiting:
                        give(pipe, process)
                    else:
                        pipe.close()  # which ends it
                yield cell, row
    finally:  # Ctrl-C too: what runs is lost
        for process, _ in workers.values():
            process.terminate()


def start_worker() -> tuple[Any, Any]:
    """Our end of a pipe, and the process at its other end. A fresh interpreter: torch's threads do not survive a fork."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    return ours, process


def serve(pipe: Any) -> None:
    """What a worker does: cells in, rows out, until the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends this one
    parent = multiprocessing.parent_process()

    def follow_parent() -> None:
        if parent is not None:
            parent.join()
        os._exit(1)  # at once, in the midst of a cell: nobody waits for its row

    threading.Thread(target=follow_parent, daemon=True).start()
    while True:
        try:
            cell, commit = pipe.recv()
        except EOFError:
            return
        pipe.send(play(cell, commit))


def on_ray(
    todo: Sequence[Cell], commit: str | None, started: Started, address: str | None, jobs: int
) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """As tasks of a Ray cluster of one core each; without an address, of a local one with `jobs` cores.

    Other machines need textenv installed, and files that a suite names at the same paths.
    """
    ray = import_ray()
    local: dict[str, Any] = {} if address else {"num_cpus": jobs, "include_dashboard": False}
    if not address:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(address=address, log_to_driver=False, logging_level="ERROR", **local)
    try:
        task = ray.remote(num_cpus=1, max_retries=RETRIES)(play)
        running = {task.remote(cell, commit): cell for cell in todo}
        while running:
            (done,), _ = ray.wait(list(running))
            cell = running.pop(done)
            try:
                row = ray.get(done)
            except ray.exceptions.RayError as error:
                row = lost(cell, commit, f"Ray lost it {RETRIES + 1} times ({type(error).__name__})")
            yield cell, row
    finally:
        ray.shutdown()


def import_ray() -> Any:
    """Ray, which is an extra.

    Raises:
        ValueError: It is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise ValueError(
            "--ray needs Ray: pip install 'textenv[ray]'. --jobs N uses the cores of this machine."
        ) from error
    return ray


def lost(cell: Cell, commit: str | None, what: str) -> dict[str, Any]:
    """The row of a cell that could not write one."""
    row = {name: getattr(cell, name) for name in IDENTITY}
    times = {"began": time.time(), "seconds": 0.0, "cpu_seconds": 0.0}
    told = {"error": f"Lost: {what}", "traceback": "", "time": times, "host": {"name": platform.node()}}
    return row | {"config": cell.config, "versions": versions(), "commit": commit} | told


# ---------------------------------------------------------------------- all runs


@dataclass(frozen=True, kw_only=True)
class Engine:
    """Where cells run: in this process (`jobs` of 1), in several, or on Ray."""

    jobs: int = 1
    ray: str | None = None
    """An address; empty for a local cluster of `jobs` cores; None for no Ray."""

    def run(self, todo: Sequence[Cell], commit: str | None, started: Started) -> Iterator[tuple[Cell, dict[str, Any]]]:
        """Cells with their rows, as they are finished."""
        if self.ray is not None:
            return on_ray(todo, commit, started, self.ray or None, self.jobs)
        return in_processes(todo, commit, started, self.jobs) if self.jobs > 1 else in_turn(todo, commit, started)


class ResultsExist(ValueError):
    """A directory holds results that the run would touch."""


def run_suite(
    name: str,
    suite: Suite,
    out: Path,
    *,
    engine: Engine | None = None,
    resume: bool = False,
    overwrite: bool = False,
    command: str = "",
    console: Any = None,
) -> list[dict[str, Any]]:
    """Run what is missing, and return the rows of all the suite's cells.

    Args:
        name: Of the suite, for its rows.
        suite: What is run.
        out: Where rows go: `out/rows/*.json`, and all of them in `out/rows.jsonl`.
        engine: Where cells run.
        resume: Keep what is there, and run what is missing or failed.
        overwrite: Run every cell anew; old rows of these cells go first.
        command: What to write in reports as having made this.
        console: A rich console; None prints nothing.

    Raises:
        ResultsExist: There are results, and neither `resume` nor `overwrite`; or they were made under other settings.
    """
    engine = engine or Engine()
    wanted = cells(name, suite)
    folder = out / ROWS
    folder.mkdir(parents=True, exist_ok=True)
    with locked(out):
        for scratch in (*folder.glob(".*"), *out.glob(".*.[0-9]*")):  # of a process that was killed while it wrote
            scratch.unlink()
        there = {cell.file: row for cell in wanted if (row := read_row(folder / cell.file)) is not None}
        claim(name, suite, out, command, there, wanted, resume=resume, overwrite=overwrite)
        if overwrite:
            for file in there:
                (folder / file).unlink()
            there = {}
        todo = [cell for cell in wanted if cell.file not in there or "error" in there[cell.file]]
        commit = current_commit()
        with progress(console, suite, wanted, todo, there, engine) as view:
            for cell, row in engine.run(todo, commit, view.started):
                write_text(folder / cell.file, json.dumps(row) + "\n")
                view.finished(cell, row)
        rows = [json.loads((folder / cell.file).read_text()) for cell in wanted]
        write_text(out / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in read_rows(out)))
    return rows


def claim(
    name: str,
    suite: Suite,
    out: Path,
    command: str,
    there: Mapping[str, dict[str, Any]],
    wanted: Sequence[Cell],
    *,
    resume: bool,
    overwrite: bool,
) -> None:
    """See that this run may write here, and write down what it is."""
    manifest = out / MANIFEST
    before = json.loads(manifest.read_text()) if manifest.exists() else {}
    if before and before["suite"] != name:
        raise ResultsExist(f"{out} holds results of suite {before['suite']!r}, not {name!r}: choose another --out.")
    if there and not (resume or overwrite):
        raise ResultsExist(
            f"{out} holds {len(there)} of these {len(wanted)} results already: go on with --resume, begin anew with --overwrite, or "
            "choose another --out."
        )
    for cell in wanted:
        if not overwrite and cell.file in there and there[cell.file]["config"] != cell.config:
            old = there[cell.file]["config"]
            changed = [key for key in cell.config if old.get(key) != cell.config[key]]
            raise ResultsExist(
                f"{out / ROWS / cell.file} was made with other settings ({', '.join(changed)}): choose another --out, or --overwrite."
            )
    commands = list(dict.fromkeys([*before.get("commands", []), *([command] if command else [])]))
    kept = ("title", "headline", "bounded", "frontier", "columns", "lower_is_better")
    agents = before.get("agents", {}) | {key: {"follows_j": preset.follows_j} for key, preset in suite.agents.items()}
    about = {key: getattr(suite, key) for key in kept}
    about["tasks"] = list(dict.fromkeys([*before.get("tasks", []), *suite.tasks]))
    write_json(manifest, {"suite": name} | about | {"agents": agents, "commands": commands})


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """One run at a time in a directory; the system lets go of it when the process ends, however that is."""
    with (out / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ResultsExist(f"Another run is writing to {out}: wait for it, or choose another --out.") from None
        yield


def read_row(path: Path) -> dict[str, Any] | None:
    """A row; None where there is none, or none that can be read."""
    try:
        row = json.loads(path.read_text())
        return row if {*IDENTITY, "config"} <= set(row) else None
    except (OSError, ValueError, TypeError):
        return None


def read_rows(out: Path) -> list[dict[str, Any]]:
    """All rows of a directory, seed by seed."""
    files = (path for path in sorted((out / ROWS).glob("*.json")))
    rows = [row for path in files if (row := read_row(path)) is not None]
    return sorted(rows, key=lambda row: (row["seed"], row["agent"], row["task"]))


# ---------------------------------------------------------------------- what is seen meanwhile


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
    console.print(f"{len(wanted)} runs, {len(wanted) - len(todo)} of them finished before.", highlight=False)
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
