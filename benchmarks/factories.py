"""Agents that need more than keywords of plain data: called as `factory(env, seed=..., **config)`."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agents import PPO


def ppo_ptx(env: Any, *, seed: int, ptx_coef: float = 0.5, corpus_tokens: int = 200_000, **config: Any) -> PPO:
    """PPO with a share of the Assistant world's raw text in every update, as InstructGPT's PPO-ptx."""
    return PPO(env, seed=seed, ptx_coef=ptx_coef, ptx_data=web_text(corpus_tokens), **config)


@cache
def web_text(tokens: int) -> NDArray[np.int64]:
    """Rows of 48 tokens of what the base model has read. Shape: (n, 48)."""
    from textenv.tasks.assistant.corpus import make_corpus
    from textenv.tasks.assistant.text import pack

    stream = pack(make_corpus(tokens, seed=1))
    return stream[: len(stream) // 48 * 48].reshape(-1, 48)


def sb3(env: Any, *, seed: int, algorithm: str, library: str = "stable_baselines3", **config: Any) -> Any:
    """An algorithm of stable-baselines3 or sb3-contrib, unmodified, with our language model as its policy.

    `DQN` takes no such policy: it reads tokens through an embedding and learns from nothing.
    """
    from importlib import import_module

    from agents.sb3 import LMPolicy, TokenEmbedding, as_vec_env

    model = getattr(import_module(library), algorithm)
    if algorithm == "DQN":
        extractor = {"features_extractor_class": TokenEmbedding}
        return model("MlpPolicy", as_vec_env(env), seed=seed, device="cpu", policy_kwargs=extractor, **config)
    return model(LMPolicy, as_vec_env(env), seed=seed, device="cpu", **config)
