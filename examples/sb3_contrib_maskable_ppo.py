"""sb3-contrib's MaskablePPO, unmodified, trains a language model that may not stop before its third token.

Run: python examples/sb3_contrib_maskable_ppo.py
"""

import gymnasium as gym
import numpy as np
from sb3_contrib import MaskablePPO

import textenv  # noqa: F401  # registers the ids
from agents.sb3 import LMPolicy, as_vec_env

V, STOP = 4, 0


def at_least_two_letters(observations: np.ndarray) -> np.ndarray:
    """Allowed tokens. Shape: (N, L) -> (N, V)."""
    letters = (observations != V).sum(axis=1) - 1  # behind the one token of the prompt
    return (np.arange(V) != STOP) | (letters[:, None] >= 2)


def main() -> None:
    envs = gym.make_vec("textenv/Tree-v0", num_envs=64, vocab_size=V, action_mask=at_least_two_letters)
    settings = {"gamma": 1.0, "n_steps": 16, "batch_size": 256, "n_epochs": 4, "learning_rate": 2e-3}
    model = MaskablePPO(LMPolicy, as_vec_env(envs), seed=0, **settings)
    model.learn(10_000)
    score = envs.unwrapped.evaluate(model.policy).score  # exact, over the completions that are allowed
    print(f"MaskablePPO: score 0 -> {score:.2f}")
    assert score > 0.5


if __name__ == "__main__":
    main()
