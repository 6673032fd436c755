"""How the pairs are split, and what is reported of margins."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import preferences


def test_dialogues_that_begin_alike_stay_together(tmp_path: Path) -> None:
    opening = "\n\nHuman: " + "x" * 120
    rows = [{"prompt": f"{opening} {i}", "chosen": "a", "rejected": "b"} for i in range(20)]
    rows += [{"prompt": f"\n\nHuman: {i}?", "chosen": "a", "rejected": "b"} for i in range(1000)]
    rows += [{"prompt": "p", "chosen": "same", "rejected": "same"}]  # which says nothing
    file = tmp_path / "pairs.jsonl.gz"
    file.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    parts = preferences.split(preferences.read(file))
    assert sum(map(len, parts.values())) == 1020
    assert sorted(sum(row["prompt"].startswith(opening) for row in part) for part in parts.values()) == [0, 0, 20]
    shares = {name: sum(not row["prompt"].startswith(opening) for row in part) / 1000 for name, part in parts.items()}
    assert shares == pytest.approx({"train": 0.7, "validation": 0.1, "test": 0.2}, abs=0.05)


def test_accuracy_and_its_interval() -> None:
    margins = np.array([0.3, -1.0, 0.0, 2.0])  # right, wrong, a tie, right
    accuracy, half = preferences.report(margins)
    # deviations from 5/8: 3/8, -5/8, -1/8, 3/8; squares add up to 44/64
    assert accuracy == 0.625
    assert half == pytest.approx(1.96 * np.sqrt(44 / 64 / 3 / 4))
    assert preferences.text((accuracy, half)) == "0.625 ± 0.469"
