"""Kill a run with SIGKILL at random moments, in training and in writing, resume it, and compare with an undisturbed one.

Run: python -m tests.benchmarks.killing --kills 20
"""

from __future__ import annotations

import argparse
import os
import signal
import time
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from benchmarks.cells import cells
from benchmarks.engines import Engine
from benchmarks.play import without_time
from benchmarks.run import run_suite
from benchmarks.suites import Suite
from tests.benchmarks.suite_for_tests import mine, suite

WRITING_SECONDS = 0.8
"""Between a row's scratch file and its name, so that kills hit it there, too."""


@dataclass
class Tally:
    """What kills have hit."""

    training: int = 0
    writing: int = 0
    finished_before: int = 0


def long_suite(seeds: int) -> Suite:
    """Real training, drawn out a little."""
    return replace(suite, agents={"Slow": mine("Slow"), "BestOfN": suite.agents["BestOfN"]}, seeds=seeds, tokens=300)


def run_in_child(chosen: Suite, out: Path, engine: Engine) -> int:
    """Go on with the run in a process of its own; returns its id when it has begun with its cells."""
    ready, told = os.pipe()
    child = os.fork()
    if child:
        os.close(told)
        os.read(ready, 1)
        os.close(ready)
        return child
    status = 1
    try:
        rename = os.replace

        def slowly(source: os.PathLike[str], target: os.PathLike[str]) -> None:
            time.sleep(WRITING_SECONDS)
            rename(source, target)

        os.replace = slowly  # type: ignore[assignment]
        os.write(told, b".")
        run_suite("own", chosen, out, engine=engine, resume=True)
        status = 0
    finally:
        os._exit(status)


def kill_and_resume(chosen: Suite, out: Path, kills: int, seed: int, engine: Engine, within: float) -> Tally:
    """Kill the run so many times, each within so many seconds of its start, then let it finish."""
    rng, tally = np.random.default_rng(seed), Tally()
    for _ in range(kills):
        child = run_in_child(chosen, out, engine)
        time.sleep(rng.uniform(0, within))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            tally.finished_before += 1
        elif list((out / "rows").glob(".*")):
            tally.writing += 1
        else:
            tally.training += 1
    run_suite("own", chosen, out, resume=True, engine=engine)
    return tally


def main() -> None:
    """Print what was hit, and whether the rows are the same."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=8, help="of the suite: how long the run is")
    parser.add_argument("--within", type=float, default=3.0, help="seconds after a start in which it is killed")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    chosen = long_suite(options.seeds)
    with TemporaryDirectory() as folder:
        began = time.perf_counter()
        undisturbed = run_suite("own", chosen, Path(folder) / "undisturbed")
        print(f"undisturbed: {len(undisturbed)} rows in {time.perf_counter() - began:.0f} s", flush=True)
        out = Path(folder) / "killed"
        engine = Engine(jobs=options.jobs)
        tally = kill_and_resume(chosen, out, options.kills, options.seed, engine, options.within)
        rows = run_suite("own", chosen, out, resume=True)  # runs nothing
    failed = sum("error" in row for row in rows)
    same = list(map(without_time, rows)) == list(map(without_time, undisturbed))
    print(f"{tally}; {len(cells('own', chosen))} rows, {failed} failed; the same as undisturbed: {same}")
    raise SystemExit(not same)


if __name__ == "__main__":
    main()
