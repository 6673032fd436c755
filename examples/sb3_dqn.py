"""stable-baselines3's DQN, unmodified, chooses among the four tokens that the reference finds most probable.

A greedy choice has log pi = 0, so of the KL penalty only `beta log pi_ref` is left, which the environment pays by itself
(`kl="reference"`). DQN has a small network of its own, which reads tokens through `TokenEmbedding`.

Run: python examples/sb3_dqn.py
"""

import gymnasium as gym
from stable_baselines3 import DQN

import textenv  # noqa: F401  # registers the ids
from agents.sb3 import TokenEmbedding, as_policy, as_vec_env
from textenv.wrappers import TopKActions


def main() -> None:
    envs = TopKActions(gym.make_vec("textenv/Tree-v0", num_envs=16, vocab_size=12, horizon=4, kl="reference"), k=4)
    model = DQN(
        "MlpPolicy",
        as_vec_env(envs),
        gamma=1.0,
        learning_rate=2e-3,
        batch_size=128,
        buffer_size=10_000,
        learning_starts=500,
        train_freq=1,
        target_update_interval=500,
        exploration_fraction=0.7,
        policy_kwargs={"features_extractor_class": TokenEmbedding},
        seed=0,
    )

    def objective() -> float:
        return envs.unwrapped.evaluate(envs.in_tokens(as_policy(model))).objective  # exact: E[r] - beta KL

    before = objective()
    model.learn(6_000)
    print(f"DQN: E[r] - beta KL {before:.2f} -> {objective():.2f}")
    assert objective() > before + 1


if __name__ == "__main__":
    main()
