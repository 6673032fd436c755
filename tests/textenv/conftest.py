"""A small task of letters, and the environments made from it."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import pytest

import textenv  # noqa: F401  # registers the ids

from .letters import BUDGET, ROWS, letters_reward


@pytest.fixture
def task_kwargs(model: Any, tokenizer: Any) -> dict[str, Any]:
    """Keywords of `textenv/Prompts-v0` for the task of letters, KL off."""
    return {
        "model": model,
        "tokenizer": tokenizer,
        "prompts": ROWS,
        "reward": letters_reward,
        "max_new_tokens": BUDGET,
        "beta": 0.0,
    }


@pytest.fixture
def make(task_kwargs: dict[str, Any]) -> Any:
    """make(**changes) -> the single environment."""
    return lambda **changes: gym.make("textenv/Prompts-v0", **{**task_kwargs, **changes})


@pytest.fixture
def make_vec(task_kwargs: dict[str, Any]) -> Any:
    """make_vec(num_envs, **changes) -> the vector environment."""
    return lambda num_envs=4, **changes: gym.make_vec(
        "textenv/Prompts-v0", num_envs=num_envs, **{**task_kwargs, **changes}
    )
