"""stable-baselines3's A2C, unmodified, trains a language model; then it is saved, loaded and asked.

Run: python examples/sb3_a2c.py
"""

import tempfile
from pathlib import Path

import gymnasium as gym
import numpy as np
from stable_baselines3 import A2C

import textenv  # noqa: F401  # registers the ids
from agents.sb3 import LMPolicy, as_vec_env


def main() -> None:
    envs = gym.make_vec("textenv/Tree-v0", num_envs=64)
    model = A2C(LMPolicy, as_vec_env(envs), gamma=1.0, n_steps=8, learning_rate=2e-3, seed=0)
    model.learn(20_000)
    score = envs.unwrapped.evaluate(model.policy).score  # exact: 0 is the reference, 1 the best policy there is
    print(f"A2C: score 0 -> {score:.2f}")
    assert score > 0.5

    with tempfile.TemporaryDirectory() as folder:
        model.save(Path(folder) / "a2c")
        loaded = A2C.load(Path(folder) / "a2c")
    observations, _ = envs.reset()
    assert np.array_equal(*(m.predict(observations, deterministic=True)[0] for m in (model, loaded)))


if __name__ == "__main__":
    main()
