"""The table of third parties: its intervals, its cells, and one small run of each kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import third_party
from benchmarks.third_party import ThirdPartyArguments, cell, interval, run_third_party


def test_the_interval_is_students() -> None:
    # mean 3, deviation sqrt(2.5), t(0.975, 4) = 2.776: 3 -+ 2.776 * sqrt(2.5) / sqrt(5) = 3 -+ 1.963
    assert interval([1.0, 2.0, 3.0, 4.0, 5.0]) == "3.000 [1.037, 4.963]"
    assert interval([1.0]) == "1.000"


def test_a_finished_cell_is_not_run_again(tmp_path: Path) -> None:
    first = cell(tmp_path / "a.json", lambda: {"after": 1.0})
    assert first["after"] == 1.0
    assert cell(tmp_path / "a.json", lambda: pytest.fail("it was run again")) == first


def test_a_small_run_writes_the_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small: dict[str, Any] = {
        name: settings for name, (_, settings) in third_party.TREE.items() if "PPO" in name or "DQN" in name
    }
    monkeypatch.setattr(third_party, "TREE", {name: (100, settings) for name, settings in small.items()})
    monkeypatch.setattr(third_party, "ASSISTANT_TOKENS", 1)
    monkeypatch.setattr(third_party, "ASSISTANT", third_party.ASSISTANT | {"n_steps": 2, "batch_size": 128})
    monkeypatch.setattr(third_party, "HELD_OUT", 8)
    text = run_third_party(ThirdPartyArguments(seeds=1, out=tmp_path))
    assert (tmp_path / "table.md").read_text() == text
    lines = text.splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:6]] == list(small)
    assert lines[2].split("|")[3].strip() == "0.000"  # LMPolicy starts as the reference
    (kl,) = [line for line in lines if line.startswith("| kl |")]
    assert kl.split("|")[2].strip() == "0.000"
