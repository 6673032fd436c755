"""Where cells run: in this process, in several, or on a Ray cluster. Rows are the same everywhere."""

from __future__ import annotations

import multiprocessing
import os
import platform
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Any

from benchmarks.cells import IDENTITY, Cell
from benchmarks.play import play, versions

RETRIES = 2
"""Of a Ray task whose machine or process has died."""

Started = Callable[[Cell], None]
"""Told when a cell begins."""


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
