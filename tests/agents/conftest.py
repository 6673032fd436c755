"""Environments over the tiny world of `world.py`."""

from __future__ import annotations

import gymnasium as gym
import pytest

import textenv  # noqa: F401  # registers the ids

from .world import PROMPTS, WORDS, build_model, count_a, word_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return word_tokenizer(WORDS)


@pytest.fixture(scope="session")
def model():
    return build_model()


@pytest.fixture
def make_envs(model, tokenizer):
    def make(num_envs=8, **kwargs):
        defaults = {
            "model": model,
            "tokenizer": tokenizer,
            "prompts": PROMPTS,
            "reward": count_a,
            "max_new_tokens": 5,
            "beta": 0.1,
        }
        return gym.make_vec("textenv/Prompts-v0", num_envs=num_envs, **(defaults | kwargs))

    return make
