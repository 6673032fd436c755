"""Tianshou's DQN on tokens, through plain Gymnasium.

Run: python examples/tianshou_dqn.py    (pip install 'textenv[clients]')
"""

import gymnasium as gym
import numpy as np
import torch
from tianshou.algorithm import DQN
from tianshou.algorithm.modelfree.dqn import DiscreteQLearningPolicy
from tianshou.algorithm.optim import AdamOptimizerFactory
from tianshou.data import Collector, VectorReplayBuffer
from tianshou.env import DummyVectorEnv
from tianshou.trainer import OffPolicyTrainerParams
from torch import nn

import textenv  # noqa: F401  # registers the ids


class WithoutInfo(gym.Wrapper):
    """Tianshou keeps infos in its buffer, and takes a text that is there at some steps only (`finish_reason`) for lost data."""

    def step(self, action):
        observation, reward, terminated, truncated, _ = self.env.step(action)
        return observation, reward, terminated, truncated, {}


def make() -> gym.Env:
    # What a greedy agent pays for its KL is beta log pi_ref, which needs no policy.
    return WithoutInfo(gym.make("textenv/Tree-v0", kl="reference"))


class QNetwork(nn.Module):
    """Tokens in, a value for each token out."""

    def __init__(self, length: int, v: int, width: int = 16) -> None:
        super().__init__()
        self.layers = nn.Sequential(  # id v is the padding
            nn.Embedding(v + 1, width), nn.Flatten(), nn.Linear(length * width, 64), nn.ReLU(), nn.Linear(64, v)
        )

    def forward(self, obs, state=None, info=None):
        return self.layers(torch.as_tensor(np.asarray(obs), dtype=torch.long)), state


class Greedy:
    """The trained network's choices, for the exact score."""

    def __init__(self, network: QNetwork) -> None:
        self.network = network

    def log_probs_all(self, observations: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            q = self.network(observations)[0].numpy()
        return np.where(np.arange(q.shape[1]) == q.argmax(axis=1)[:, None], 0.0, -np.inf)

    def log_probs(self, observations: np.ndarray, actions: np.ndarray) -> np.ndarray:
        return self.log_probs_all(observations)[np.arange(len(actions)), actions]


def main() -> None:
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002  # Tianshou explores by it
    env, lanes = make(), DummyVectorEnv([make] * 8)
    lanes.seed(0)
    network = QNetwork(env.observation_space.shape[0], int(env.action_space.n))
    policy = DiscreteQLearningPolicy(model=network, action_space=env.action_space, eps_training=0.3)
    algorithm = DQN(policy=policy, optim=AdamOptimizerFactory(lr=2e-3), gamma=1.0, target_update_freq=200)
    buffer = VectorReplayBuffer(10_000, buffer_num=len(lanes))
    collector = Collector(algorithm, lanes, buffer, exploration_noise=True)
    before = env.unwrapped.evaluate(Greedy(network)).objective
    algorithm.run_training(
        OffPolicyTrainerParams(
            training_collector=collector,
            max_epochs=1,
            epoch_num_steps=2_400,
            collection_step_num_env_steps=80,
            update_step_num_gradient_steps_per_sample=0.15,
            batch_size=128,
            verbose=False,
            show_progress=False,
        )
    )
    after = env.unwrapped.evaluate(Greedy(network)).objective  # exact: E[r] - beta KL
    print(f"Tianshou's DQN: E[r] - beta KL {before:.2f} -> {after:.2f}")
    assert after > before + 1


if __name__ == "__main__":
    main()
