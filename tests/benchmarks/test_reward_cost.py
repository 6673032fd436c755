"""The cost table measures what it says."""

from __future__ import annotations

import time

import pytest

from benchmarks import reward_cost


def test_cpu_time_per_completion(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reward_cost, "SHORTEST", 0.01)

    def busy(completions: list[str]) -> list[float]:
        for _ in completions:
            until = time.process_time() + 0.002
            while time.process_time() < until:
                pass
        time.sleep(0.001)  # which is not counted
        return [0.0] * len(completions)

    cost = reward_cost.measure("busy", busy, [{"prompt": "p", "completion": "c"}] * 10)
    assert cost.name == "busy"
    assert 0.002 <= cost.batched < 0.01
    assert 0.002 <= cost.alone < 0.01
