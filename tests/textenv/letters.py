"""A task of letters: say the target letter, and be brief. With helpers to act in it."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..tiny import EOS, VOCAB
from .reference_env import plain_log_prob

BUDGET = 5
ROWS = [
    {"prompt": "ab=", "target": "a"},
    {"prompt": "c", "target": "c"},
    {"prompt": "dd +e", "target": "d"},
    {"prompt": "hi", "target": "j"},
    {"prompt": "f+g=", "target": "g"},
]
WIDTH = 5 + BUDGET  # L


def letters_reward(completions: list[str], target: list[str], **columns: Any) -> list[float]:
    """How often the target letter was said, minus a little for each character."""
    return [text.count(t) - 0.125 * len(text) for text, t in zip(completions, target, strict=True)]


def random_actions(rng: np.random.Generator, lanes: int, stop: float = 0.2) -> np.ndarray:
    """Any token, the stop token with probability `stop` and a bit. Shape: (lanes,)."""
    return np.where(rng.random(lanes) < stop, EOS, rng.integers(VOCAB, size=lanes))


class PlainPolicy:
    """log pi by a plain forward pass for each lane: no cache, no batch."""

    def __init__(self, model: Any, temperature: float = 1.0) -> None:
        self.model, self.temperature = model, temperature

    def log_probs(self, observations: np.ndarray, actions: np.ndarray) -> np.ndarray:
        return np.array(
            [
                plain_log_prob(self.model, row[row != VOCAB].tolist(), int(action), self.temperature)
                for row, action in zip(observations, actions, strict=True)
            ]
        )
