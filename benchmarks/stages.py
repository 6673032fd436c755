"""A run of several stages in a directory: skipped when done, resumed when interrupted, shown as it goes.

Each stage writes its results to the run directory and its figures to ``stages.json``; a stage that is named there is not
done again. Jobs of a stage that do not need each other run side by side, a process each.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import queue
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeAlias

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks.records import write_json

Advance: TypeAlias = Callable[[float, str], None]
"""Told the share that is done, in [0, 1], and a few figures."""
Job: TypeAlias = tuple[Callable[..., None], tuple[Any, ...]]
"""A function of the run, these arguments and an `Advance`; it writes its result to the run directory."""


class RunOptions(Protocol):
    """What any run is told."""

    @property
    def seed(self) -> int:
        """Of every stage."""

    @property
    def size(self) -> str:
        """How much of everything."""

    @property
    def out(self) -> Path:
        """Run directory."""

    @property
    def cores(self) -> int:
        """Jobs run side by side if there are two or more."""


class StagedRun:
    """Stages `make_NAME`, done in order, each at most once.

    Args:
        options: Seed, size, place.

    Raises:
        ValueError: If the directory holds a run of another seed or size.
    """

    STAGES: ClassVar[Mapping[str, str]]
    """Names of the stages, in order, and what happens in each."""

    def __init__(self, options: RunOptions) -> None:
        self.options, self.out = options, options.out
        self.console = Console()
        self.done: dict[str, Any] = {}
        self._claim()

    def _claim(self) -> None:
        """Take the directory, or go on in it; refuse one that another seed or size has begun."""
        mine = {"seed": self.options.seed, "size": self.options.size}
        settings, stages = self.out / "settings.json", self.out / "stages.json"
        if settings.exists():
            found = json.loads(settings.read_text())
            if found != mine:
                raise ValueError(
                    f"{self.out} holds a run with {found}, not {mine}: choose another --out, or remove it."
                )
            self.done = json.loads(stages.read_text()) if stages.exists() else {}
        else:
            self.out.mkdir(parents=True, exist_ok=True)
            write_json(settings, mine)

    def run(self) -> dict[str, Any]:
        """Do what is not done yet; returns every stage's figures."""
        for number, (stage, description) in enumerate(self.STAGES.items(), 1):
            if stage in self.done:
                self.console.print(f"[dim]{number}/{len(self.STAGES)} {stage}: done before[/dim]")
                continue
            self.console.print(f"[bold]{number}/{len(self.STAGES)} {stage}[/bold]  {description}")
            begin = time.perf_counter()
            figures = getattr(self, f"make_{stage}")()
            self.done[stage] = {"seconds": round(time.perf_counter() - begin, 1), **figures}
            write_json(self.out / "stages.json", self.done)
            shown = "  ".join(f"{k} {v:.3g}" for k, v in self.done[stage].items() if isinstance(v, int | float))
            self.console.print(f"    {shown}", highlight=False)
        return self.done

    def side_by_side(self, jobs: Mapping[str, Job]) -> None:
        """Do jobs, which write their results to the run directory: at once where there are cores, else in turn."""
        if self.options.cores < 2:
            for name, (function, arguments) in jobs.items():
                with bar(name) as advance:
                    function(self, *arguments, advance)
            return
        context = multiprocessing.get_context("spawn")
        told = context.Queue()
        workers = [
            context.Process(target=_work, args=(type(self), self.options, told, name, *job), daemon=True)
            for name, job in jobs.items()
        ]
        with progress_bars() as progress:
            shown = {name: progress.add_task(name, total=1.0, figures="") for name in jobs}
            try:
                for worker in workers:
                    worker.start()
                while any(worker.is_alive() for worker in workers):
                    try:
                        name, share, figures = told.get(timeout=0.2)
                    except queue.Empty:
                        continue
                    progress.update(shown[name], completed=share, figures=figures)
            finally:  # Ctrl-C too
                for worker in workers:
                    worker.terminate()
                    worker.join()
            for name, worker in zip(jobs, workers, strict=True):
                if worker.exitcode:
                    raise RuntimeError(f"{name} failed (exit code {worker.exitcode}); what it said is above.")
                progress.update(shown[name], completed=1.0)


def _work(
    run: type[StagedRun],
    options: RunOptions,
    told: Any,
    name: str,
    job: Callable[..., None],
    arguments: tuple[Any, ...],
) -> None:
    """What a process of its own does: one job, on one core, telling how far it is."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends this one
    torch.set_num_threads(1)
    job(run(options), *arguments, lambda share, figures: told.put((name, share, figures)))


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A scratch directory that becomes `path` when all went well."""
    scratch = path.with_name(f".{path.name}.part")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    yield scratch
    shutil.rmtree(path, ignore_errors=True)
    os.replace(scratch, path)


def progress_bars() -> Progress:
    """Bars with time left and figures."""
    return Progress(
        TextColumn("    {task.description:13}"),
        BarColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}"),
    )


@contextmanager
def bar(what: str) -> Iterator[Advance]:
    """One such bar; yields what to tell it by."""
    with progress_bars() as progress:
        task = progress.add_task(what, total=1.0, figures="")
        yield lambda share, figures: progress.update(task, completed=share, figures=figures)
