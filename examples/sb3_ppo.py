"""stable-baselines3's PPO, unmodified, trains a language model.

Run: python examples/sb3_ppo.py
"""

import gymnasium as gym
from stable_baselines3 import PPO

import textenv  # noqa: F401  # registers the ids
from agents.sb3 import LMPolicy, as_vec_env


def main() -> None:
    envs = gym.make_vec("textenv/Tree-v0", num_envs=64)
    model = PPO(
        LMPolicy, as_vec_env(envs), gamma=1.0, n_steps=16, batch_size=256, n_epochs=4, learning_rate=2e-3, seed=0
    )
    model.learn(10_000)
    score = envs.unwrapped.evaluate(model.policy).score  # exact: 0 is the reference, 1 the best policy there is
    print(f"PPO: score 0 -> {score:.2f}")
    assert score > 0.5


if __name__ == "__main__":
    main()
