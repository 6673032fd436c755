"""sb3-contrib's TRPO, unmodified, trains a language model.

Its natural gradient differentiates through the network twice, parameter by parameter: a few large steps, each slow.

Run: python examples/sb3_contrib_trpo.py
"""

import gymnasium as gym
from sb3_contrib import TRPO

import textenv  # noqa: F401  # registers the ids
from agents.sb3 import LMPolicy, as_vec_env


def main() -> None:
    envs = gym.make_vec("textenv/Tree-v0", num_envs=64)
    model = TRPO(
        LMPolicy, as_vec_env(envs), gamma=1.0, n_steps=8, batch_size=512, target_kl=0.1, cg_max_steps=3, seed=0
    )
    model.learn(1_000)
    score = envs.unwrapped.evaluate(model.policy).score  # exact: 0 is the reference, 1 the best policy there is
    print(f"TRPO: score 0 -> {score:.2f}")
    assert score > 0.1


if __name__ == "__main__":
    main()
