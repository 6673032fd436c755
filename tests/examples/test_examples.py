"""Every client has an example that asserts that it learnt. Here they are run."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"
NEEDS = {
    "cleanrl_ppo": [],
    "sb3_a2c": [],
    "sb3_dqn": [],
    "sb3_ppo": [],
    "sb3_contrib_maskable_ppo": ["sb3_contrib"],
    "sb3_contrib_trpo": ["sb3_contrib"],
    "tianshou_dqn": ["tianshou"],
    "torchrl_ppo": ["torchrl", "tensordict"],
}
"""Example -> packages that it may lack."""


def test_every_client_is_run() -> None:
    clients = {
        path.stem for path in EXAMPLES.glob("*.py") if path.stem.startswith(("cleanrl", "sb3", "tianshou", "torchrl"))
    }
    assert clients == set(NEEDS)


@pytest.mark.parametrize("name", NEEDS)
@pytest.mark.filterwarnings("default")  # what other libraries warn of is their own affair
def test_a_client_learns(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for package in NEEDS[name]:
        pytest.importorskip(package)
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with torch.random.fork_rng(devices=[]):
        module.main()  # asserts that it learnt
    assert "->" in capsys.readouterr().out
