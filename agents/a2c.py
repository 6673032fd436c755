"""Advantage actor-critic, synchronous: one gradient step per rollout, against a learned critic.

Mnih et al. (2016), https://arxiv.org/abs/1602.01783.

    maximise  E[ r(x, y) - beta log(pi(y|x) / pi_ref(y|x)) ]
    by the gradient  sum_t A_t grad log pi(y_t | x, y_<t),  A_t = GAE of the rewards and of the critic's values

The KL is paid by the environment, token by token, in the reward (`kl_placement = "reward"`). Differences from the paper: 1)
synchronous, in whole episodes instead of five steps 2) Adam instead of RMSprop 3) nothing is discounted 4) `gae_lambda` = 1 by
default, so that an imperfect critic adds variance and no bias 5) no entropy bonus by default: the KL already keeps the policy
from collapsing.

Run: textenv train A2C textenv/Arithmetic-v0 --seed 0
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch

from agents.advantages import AGGREGATIONS, aggregate, gae, importance_weights, masked_mean, whiten
from agents.base import AgentConfig, LanguageModelAgent, MaybeCallback
from agents.config import check_choice
from agents.policy import Critic
from agents.rollout import collect
from textenv.ledger import Episodes


@dataclass(frozen=True, kw_only=True)
class A2CConfig(AgentConfig):
    """Settings of A2C."""

    episodes_per_update: int = 32
    """B: episodes per rollout, and per gradient step."""
    gae_lambda: float = 1.0
    """GAE's lambda. 1: the return minus the value, unbiased whatever the critic is worth."""
    vf_coef: float = 0.1
    """Weight of the value loss."""
    ent_coef: float = 0.0
    """Weight of an entropy bonus. Not a KL penalty: that one is in the reward."""
    whiten_advantages: bool = False
    """Scale advantages to mean 0 and variance 1 over the tokens of the rollout."""
    loss_aggregation: str = "fixed"
    """What the loss is a mean over: `token`, `sequence` or `fixed` (the unbiased one). See `agents.advantages.aggregate`."""
    critic: str = "head"
    """Where values come from: `head` (a linear head on the policy's trunk), `separate` (a copy of the trunk), or the
    directory of a reward model to start from."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.episodes_per_update < 1:
            raise ValueError(f"Expected episodes_per_update >= 1, got {self.episodes_per_update!r}.")
        if not 0 <= self.gae_lambda <= 1:
            raise ValueError(f"Expected gae_lambda between 0 and 1, got {self.gae_lambda!r}.")
        check_choice("loss_aggregation", self.loss_aggregation, AGGREGATIONS)
        if not isinstance(self.critic, str):
            raise ValueError(
                f"Expected critic to be 'head', 'separate' or the directory of a reward model as a string, got {self.critic!r}."
            )


class A2C(LanguageModelAgent):
    """Advantage actor-critic of a language model.

    Args:
        env: A textenv vector environment.
        kwargs: See `LanguageModelAgent`; further keywords are fields of `A2CConfig`.

    Example:
        >>> agent = A2C(gym.make_vec("textenv/Arithmetic-v0", num_envs=32), seed=0)
        >>> agent.learn(total_timesteps=50_000)
    """

    Config = A2CConfig
    config: A2CConfig

    def __init__(self, env: Any, **kwargs: Any) -> None:
        super().__init__(env, **kwargs)
        self.critic = Critic(self.policy, self.config.critic)
        self.adam = self.optimizer(self.critic)

    def learn(self, total_timesteps: int, callback: MaybeCallback = None, progress_bar: bool = False) -> Self:
        """Train until `total_timesteps` more tokens have been sampled (the last rollout is finished)."""
        with self.start_learning(total_timesteps, callback, progress_bar) as session:
            while session.more():
                episodes = collect(self.env, self.policy, self.config.episodes_per_update, self.rng, session.on_step)
                session.rollout_done(episodes)
                self.update(episodes)
                session.iteration_done()
        return self

    def update(self, episodes: Episodes) -> None:
        """One step of policy and critic along the gradient of a rollout."""
        cfg, device = self.config, self.policy.lm.device
        rows = np.arange(len(episodes))
        mask = torch.from_numpy(episodes.mask).to(device)
        rewards = torch.from_numpy(episodes.rewards).to(device, torch.float32)
        old_log_probs = torch.from_numpy(episodes.log_probs).to(device, torch.float32)

        log_probs, entropy, hidden = self.policy.evaluate(episodes, rows, entropy_gradient=cfg.ent_coef != 0)
        values = self.critic(hidden, episodes, rows)
        part = slice(0, log_probs.shape[1])  # as wide as the longest response
        m, old = mask[:, part], old_log_probs[:, part]
        advantages, targets = gae(
            rewards[:, part], values.detach(), m, 1.0, cfg.gae_lambda, self.final_values(episodes)
        )
        if cfg.whiten_advantages:
            advantages = whiten(advantages, m)
        weights = 1.0 if cfg.rollout_dtype is None else importance_weights(log_probs, old, m)

        policy_loss = aggregate(-weights * advantages * log_probs, m, cfg.loss_aggregation, mask.shape[1])
        value_loss = aggregate(weights * 0.5 * (values - targets) ** 2, m, cfg.loss_aggregation, mask.shape[1])
        bonus = aggregate(weights * entropy, m, cfg.loss_aggregation, mask.shape[1])
        loss = policy_loss + cfg.vf_coef * value_loss - cfg.ent_coef * bonus
        loss.backward()
        self.logger.record("train/grad_norm", self.apply_gradients(self.adam))
        self.accounts["gradient_tokens"] += int(episodes.response_length.sum())
        self.logger.record("train/first_ratio_error", ((log_probs - old).exp() - 1).abs().max().item())
        self.logger.record("train/policy_loss", policy_loss.item())
        self.logger.record("train/value_loss", value_loss.item())
        self.logger.record("train/entropy", masked_mean(entropy, m).item())
        residual = masked_mean((targets - values) ** 2, m) / masked_mean(
            (targets - masked_mean(targets, m)) ** 2, m
        ).clamp(min=1e-8)
        self.logger.record("train/explained_variance", 1 - residual.item())
        self.logger.record("train/learning_rate", self.adam.param_groups[0]["lr"])

    @torch.no_grad()
    def final_values(self, episodes: Episodes) -> torch.Tensor:
        """V of the states after the last token: 0 for episodes that ended, and counts only where a wrapper has cut one. Shape: (B,)."""
        bootstrap = torch.zeros(len(episodes), device=self.policy.lm.device)
        cut = np.flatnonzero(episodes.finish_reason == "truncated")
        if len(cut):
            bootstrap[cut] = self.critic.final_values(self.policy, episodes, cut)
        return bootstrap

    def trained_modules(self) -> dict[str, torch.nn.Module]:
        """The critic is saved too: throwing it away makes a resumed run another run."""
        return {"critic": self.critic}

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """One Adam for policy and critic."""
        return {"adam": self.adam}
