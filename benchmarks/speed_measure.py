"""How `textenv bench speed` measures: sides that do the same work, run in turn, each on its best number of threads."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class Run:
    """One run of one side."""

    tokens: int
    """Written, or given a gradient."""
    seconds: float
    cpu_seconds: float
    """Of all threads: tells a slow machine from a busy one."""

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds


class Stopwatch:
    """Measures one run on a given number of threads. Garbage is collected before, not meanwhile."""

    def __init__(self, threads: int) -> None:
        torch.set_num_threads(threads)
        gc.collect()
        self._begin = time.perf_counter(), time.process_time()

    def stop(self, tokens: int) -> Run:
        """The run, now that it has ended."""
        begin, cpu_begin = self._begin
        return Run(tokens, time.perf_counter() - begin, time.process_time() - cpu_begin)


@dataclass(frozen=True)
class Side:
    """Ours or a peer's.

    Attributes:
        name: For the table.
        run: The work. Returns how many tokens it has written, or given a gradient.
        probe: A short version of it, by which the number of threads is chosen.
        threads: That it runs on.
    """

    name: str
    run: Callable[[], int]
    probe: Callable[[], object]
    threads: int = 1

    def at_its_best(self, choices: Sequence[int]) -> Side:
        """On the number of threads that runs the probe fastest. It is run three times on each; the first time is warm-up."""
        return replace(self, threads=fastest(dict.fromkeys(choices, self.probe), lambda threads: threads))


def fastest(probes: dict[Any, Callable[[], object]], threads_of: Callable[[Any], int]) -> Any:
    """The key whose function takes the least time, of three runs each."""
    seconds: dict[Any, float] = {}
    for key, probe in probes.items():
        if len(probes) == 1:
            torch.set_num_threads(threads_of(key))
            probe()  # warm-up
            return key
        for _ in range(3):
            watch = Stopwatch(threads_of(key))
            probe()
            seconds[key] = min(watch.stop(0).seconds, seconds.get(key, np.inf))
    return min(seconds, key=lambda key: seconds[key])


def interleave(sides: Sequence[Side], repeats: int) -> dict[str, list[Run]]:
    """Run the sides in turn, each round in the opposite order of the last."""
    runs: dict[str, list[Run]] = {side.name: [] for side in sides}
    for k in range(repeats):
        for side in sides[:: -1 if k % 2 else 1]:
            watch = Stopwatch(side.threads)
            runs[side.name].append(watch.stop(side.run()))
    return runs


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """Bytes of this process at their highest inside the block, above those it had before (Linux only). Appended at the end."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from what is resident now
    before = _status("VmRSS")
    out: list[int] = []
    yield out
    out.append(_status("VmHWM") - before)


def _status(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}.")


def check_same_work(runs: Mapping[str, Sequence[Run]], budget: int, episodes: int, stops: bool) -> None:
    """See that no side has written less.

    Fixed lengths must agree to the token. Lengths of responses that stop by themselves are random: their means must agree within
    five standard errors (a length between 1 and T has a standard deviation below T / 2).

    Raises:
        RuntimeError: They do not.
    """
    means = {name: float(np.mean([run.tokens for run in mine])) / episodes for name, mine in runs.items()}
    error = budget / 2 * (2 / (episodes * min(map(len, runs.values())))) ** 0.5 if stops else 0.0
    if max(means.values()) - min(means.values()) > 5 * error:
        raise RuntimeError(f"The sides have not done the same work: mean tokens per response are {means}.")
