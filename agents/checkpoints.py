"""What a checkpoint consists of: a directory that is written whole or not at all, read with checks, and never unpickled.

`LanguageModelAgent.save` and `load` (`agents/base.py`) say what goes into it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Container
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

AGENT_FILE, TRAINER_FILE, POLICY_DIR, CRITIC_FILE = "agent.json", "trainer.pt", "policy", "critic.safetensors"
ADAPTER_DIR = "adapter"


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, or of something else."""


def read_about(path: str | Path) -> dict[str, Any]:
    """`agent.json` of a checkpoint.

    Raises:
        CheckpointError: There is none, or it cannot be read.
    """
    file = Path(path) / AGENT_FILE
    if not file.is_file():
        raise CheckpointError(
            f"No checkpoint at {path}: expected a directory with {AGENT_FILE}, as agent.save(path) writes it."
        )
    try:
        about = json.loads(file.read_text())
        _ = about["agent"], about["config"], about["seed"], about["history"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{file} is damaged ({type(error).__name__}: {error}): expected JSON with agent, config, seed and history. Take another checkpoint."
        ) from error
    return dict(about)


def unshared(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Without names that share the memory of an earlier one (tied weights are stored once)."""
    seen: set[int] = set()
    kept = {}
    for name, tensor in state.items():
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            kept[name] = tensor
    return kept


def put_in_place(scratch: Path, path: Path) -> None:
    """Rename a finished directory to `path`; what stood there goes only when its successor is in place."""
    old = scratch.with_name(f"{scratch.name}-old")
    if path.exists():
        os.replace(path, old)
    try:
        os.replace(scratch, path)
    except BaseException:  # Ctrl-C too
        if old.exists():
            os.replace(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def read_tensors(file: Path) -> dict[str, torch.Tensor]:
    """A safetensors file.

    Raises:
        CheckpointError: Missing or damaged.
    """
    try:
        return dict(load_file(file))
    except Exception as error:
        raise CheckpointError(
            f"{file} cannot be read ({type(error).__name__}: {error}): it is missing, truncated or damaged; expected tensors as save writes "
            "them. Take another checkpoint."
        ) from error


def check_tensors(
    stored: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], file: Path, optional: Container[str] = ()
) -> None:
    """See that a file's tensors are those that are expected, by name and shape; `optional` ones may be missing.

    Raises:
        CheckpointError: They are not.
    """

    def shape(tensors: dict[str, torch.Tensor], name: str) -> str:
        return f"of shape {tuple(tensors[name].shape)}" if name in tensors else "missing"

    for name in dict.fromkeys([*expected, *stored]):
        if shape(stored, name) != shape(expected, name) and not (name in optional and name not in stored):
            raise CheckpointError(
                f"{file} is of another model: expected {name} {shape(expected, name)}, found it {shape(stored, name)}. Make the environment "
                "with the model that the checkpoint was trained from."
            )


def as_tensors(value: Any) -> Any:
    """Arrays as tensors, which `weights_only` loading admits."""
    if isinstance(value, np.ndarray):
        return {"__array__": torch.from_numpy(value.copy())}
    if isinstance(value, dict):
        return {name: as_tensors(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_tensors(item) for item in value]
    return value


def as_arrays(value: Any) -> Any:
    """The way back."""
    if isinstance(value, dict):
        return (
            value["__array__"].numpy()
            if "__array__" in value
            else {name: as_arrays(item) for name, item in value.items()}
        )
    return [as_arrays(item) for item in value] if isinstance(value, list) else value
