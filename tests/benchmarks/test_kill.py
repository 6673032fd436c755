"""A run that is killed and resumed ends with the rows of an undisturbed one. The full test: python -m tests.benchmarks.killing."""

import os

import pytest

from benchmarks.engines import Engine
from benchmarks.play import without_time
from benchmarks.run import run_suite
from tests.benchmarks.killing import kill_and_resume, long_suite
from tests.benchmarks.suite_for_tests import suite

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills processes as POSIX does")


def test_killed_thrice(tmp_path):
    chosen = long_suite(seeds=1)
    undisturbed = run_suite("own", chosen, tmp_path / "undisturbed")
    tally = kill_and_resume(chosen, tmp_path / "killed", kills=3, seed=0, engine=Engine(), within=0.5)
    assert tally.training + tally.writing > 0
    rows = run_suite("own", chosen, tmp_path / "killed", resume=True)
    assert list(map(without_time, rows)) == list(map(without_time, undisturbed))
    assert not [row["error"] for row in rows if "error" in row]


@pytest.mark.slow  # two processes that import torch
def test_rows_of_a_local_ray_are_those_of_a_serial_run(tmp_path):
    pytest.importorskip("ray")
    through_ray = run_suite("own", suite, tmp_path / "ray", engine=Engine(jobs=2, ray=""))
    assert list(map(without_time, through_ray)) == list(map(without_time, run_suite("own", suite, tmp_path / "serial")))
