"""torchrl's PPO on tokens: `GymWrapper` over the vector environment, which torchrl wants with autoreset off.

Run: python examples/torchrl_ppo.py    (pip install 'textenv[clients]')
"""

import gymnasium as gym
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.collectors import Collector
from torchrl.envs import GymWrapper
from torchrl.modules import ProbabilisticActor, ValueOperator
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE

import textenv  # noqa: F401  # registers the ids

LANES, STEPS, ITERATIONS, WIDTH = 32, 32, 16, 16


def network(length: int, v: int, outputs: int) -> nn.Module:
    """Tokens in; id v is the padding."""
    return nn.Sequential(
        nn.Embedding(v + 1, WIDTH), nn.Flatten(-2), nn.Linear(length * WIDTH, 64), nn.Tanh(), nn.Linear(64, outputs)
    )


class LogProbs:
    """The actor as the environment needs it, to pay its KL."""

    def __init__(self, actor: ProbabilisticActor) -> None:
        self.actor = actor

    def log_probs(self, observations, actions):
        with torch.no_grad():
            states = TensorDict({"observation": torch.as_tensor(observations)}, [len(actions)])
            return self.actor.get_dist(states).log_prob(torch.as_tensor(actions)).numpy()


def main() -> None:
    torch.manual_seed(0)
    envs = gym.make_vec("textenv/Tree-v0", num_envs=LANES, autoreset_mode="DISABLED")
    env = GymWrapper(envs, categorical_action_encoding=True)
    env.set_seed(0)
    length, v = envs.single_observation_space.shape[0], int(envs.single_action_space.n)
    logits = TensorDictModule(network(length, v, v), in_keys=["observation"], out_keys=["logits"])
    actor = ProbabilisticActor(
        logits, in_keys=["logits"], distribution_class=torch.distributions.Categorical, return_log_prob=True
    )
    critic = ValueOperator(network(length, v, 1), in_keys=["observation"])
    envs.unwrapped.attach_policy(LogProbs(actor))
    before = envs.unwrapped.evaluate(LogProbs(actor)).score

    advantage = GAE(gamma=1.0, lmbda=0.95, value_network=critic, average_gae=True)
    loss = ClipPPOLoss(actor, critic, clip_epsilon=0.2, entropy_bonus=False, critic_coeff=0.5)
    optimizer = torch.optim.Adam(loss.parameters(), lr=3e-3)
    frames = LANES * STEPS
    collector = Collector(
        env, actor, frames_per_batch=frames, total_frames=frames * ITERATIONS, auto_register_policy_transforms=False
    )
    for batch in collector:
        for _ in range(4):
            with torch.no_grad():
                advantage(batch)
            flat = batch.reshape(-1)
            for rows in torch.randperm(frames).split(256):
                parts = loss(flat[rows])
                optimizer.zero_grad()
                (parts["loss_objective"] + parts["loss_critic"]).backward()
                nn.utils.clip_grad_norm_(loss.parameters(), 0.5)
                optimizer.step()

    score = envs.unwrapped.evaluate(LogProbs(actor)).score  # exact: 0 is the reference, 1 the best policy there is
    print(f"torchrl's PPO: score {before:.2f} -> {score:.2f}")
    assert score > max(before, 0.5)


if __name__ == "__main__":
    main()
