"""Proximal policy optimisation with a KL penalty, as in InstructGPT.

Schulman et al. (2017), https://arxiv.org/abs/1707.06347; Ziegler et al. (2019), https://arxiv.org/abs/1909.08593;
Ouyang et al. (2022), https://arxiv.org/abs/2203.02155.

    maximise  E[ r(x, y) - beta log(pi(y|x) / pi_ref(y|x)) ] + ptx_coef * E_pretrain[ log pi(x) ]

The KL is paid by the environment, token by token, in the reward (`kl_placement = "reward"`). Differences from the
papers: 1) advantages are whitened over the whole rollout, not per minibatch 2) the ratio of the first minibatch is 1 up to
rounding, because log-probabilities are kept from sampling.

Run: textenv train PPO textenv/Arithmetic-v0 --seed 0
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch

from agents.advantages import gae, masked_mean, whiten
from agents.base import AgentConfig, LanguageModelAgent, MaybeCallback
from agents.policy import Critic
from agents.rollout import collect
from textenv.ledger import Episodes


@dataclass(frozen=True, kw_only=True)
class PPOConfig(AgentConfig):
    """Settings of PPO."""

    episodes_per_update: int = 128
    """B: episodes per rollout."""
    minibatch_episodes: int = 32
    """Episodes per gradient step."""
    epochs: int = 2
    """Passes over each rollout."""
    warmup_iterations: int = 10
    """Rollouts over which the learning rate rises from a tenth (InstructGPT): Adam's first steps are its wildest."""
    clip_range: float = 0.2
    """The probability ratio is clipped to 1 - c .. 1 + c."""
    clip_range_value: float | None = 0.2
    """New values are clipped to within c of the old ones; None does not clip."""
    gae_lambda: float = 0.95
    """GAE's lambda."""
    vf_coef: float = 0.1
    """Weight of the value loss."""
    ent_coef: float = 0.0
    """Weight of an entropy bonus. Not a KL penalty: that one is in the reward."""
    target_kl: float | None = 0.05
    """Skip the rest of a rollout's updates once KL(old || new) exceeds 1.5 times this, in nats per token; None never does."""
    whiten_advantages: bool = True
    """Scale advantages to mean 0 and variance 1 over the rollout."""
    critic: str = "head"
    """Where values come from: `head` (a linear head on the policy's trunk), `separate` (a copy of the trunk), or the
    directory of a reward model to start from."""
    ptx_coef: float = 0.0
    """Weight of the language-modelling loss on `ptx_data`, per token (PPO-ptx)."""
    ptx_rows: int = 8
    """Rows of `ptx_data` per minibatch."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("episodes_per_update", "minibatch_episodes", "epochs", "ptx_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"Expected {name} >= 1, got {getattr(self, name)!r}.")
        if self.warmup_iterations < 0:
            raise ValueError(f"Expected warmup_iterations >= 0, got {self.warmup_iterations!r}.")
        for name in ("clip_range", "clip_range_value", "target_kl"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"Expected {name} > 0, got {value!r}.")
        if not isinstance(self.critic, str):
            raise ValueError(
                f"Expected critic to be 'head', 'separate' or the directory of a reward model as a string, got {self.critic!r}."
            )
        if not 0 <= self.gae_lambda <= 1:
            raise ValueError(f"Expected gae_lambda between 0 and 1, got {self.gae_lambda!r}.")


class PPO(LanguageModelAgent):
    """Proximal policy optimisation of a language model, against a learned critic.

    Args:
        env: A textenv vector environment.
        ptx_data: Pretraining tokens to keep the model's language by, with `ptx_coef`. Shape: (rows, width), int64.
        kwargs: See `LanguageModelAgent`; further keywords are fields of `PPOConfig`.

    Example:
        >>> agent = PPO(gym.make_vec("textenv/Arithmetic-v0", num_envs=64), seed=0)
        >>> agent.learn(total_timesteps=50_000)
    """

    Config = PPOConfig
    config: PPOConfig

    def __init__(self, env: Any, *, ptx_data: np.ndarray | None = None, **kwargs: Any) -> None:
        super().__init__(env, **kwargs)
        if ptx_data is not None:
            _check_tokens(ptx_data, self.lanes.vocab_size)
        self.ptx_data = ptx_data
        self.critic = Critic(self.policy, self.config.critic)
        self.adam = self.optimizer(self.critic)

    def learn(self, total_timesteps: int, callback: MaybeCallback = None, progress_bar: bool = False) -> Self:
        """Train until `total_timesteps` more tokens have been sampled (the last rollout is finished)."""
        self.check_ptx()
        with self.start_learning(total_timesteps, callback, progress_bar) as session:
            while session.more():
                episodes = collect(self.env, self.policy, self.config.episodes_per_update, self.rng, session.on_step)
                session.rollout_done(episodes)
                self.update(episodes)
                session.iteration_done()
        return self

    def update(self, episodes: Episodes) -> None:
        """Improve policy and critic on one rollout."""
        cfg, device = self.config, self.policy.lm.device
        mask = torch.from_numpy(episodes.mask).to(device)
        rewards = torch.from_numpy(episodes.rewards).to(device, torch.float32)
        old_log_probs = torch.from_numpy(episodes.log_probs).to(device, torch.float32)
        old_values, bootstrap = self.values(episodes)
        advantages, returns = gae(rewards, old_values, mask, 1.0, cfg.gae_lambda, bootstrap)
        if cfg.whiten_advantages:
            advantages = whiten(advantages, mask)

        warmth = min(1.0, len(self.history) / cfg.warmup_iterations) if cfg.warmup_iterations else 1.0
        for group in self.adam.param_groups:
            group["lr"] = self.learning_rate * (0.1 + 0.9 * warmth)
        figures: dict[str, list[float]] = defaultdict(list)
        for rows in self.minibatches(len(episodes)):
            log_probs, entropy, hidden = self.policy.evaluate(episodes, rows, entropy_gradient=cfg.ent_coef != 0)
            values = self.critic(hidden, episodes, rows)
            part = slice(0, log_probs.shape[1])  # as wide as the longest response of the minibatch
            m, old, adv = mask[rows, part], old_log_probs[rows, part], advantages[rows, part]

            log_ratio = log_probs - old
            ratio = torch.exp(log_ratio)
            policy_loss = clipped_policy_loss(ratio, adv, m, cfg.clip_range)
            value_loss = clipped_value_loss(
                values, old_values[rows, part], returns[rows, part], m, cfg.clip_range_value
            )
            # http://joschu.net/blog/kl-approx.html. A token that has left the top-k or top-p set has ratio 0: its infinite term
            # would end the updates of every rollout.
            kept = m & (ratio > 0)
            approx_kl = masked_mean(torch.where(kept, ratio - 1 - log_ratio, 0.0), kept).item()
            if not figures:
                figures["first_ratio_error"].append((ratio - 1).abs().max().item())
            figures["approx_kl"].append(approx_kl)
            if cfg.target_kl is not None and approx_kl > 1.5 * cfg.target_kl:
                break
            loss = policy_loss + cfg.vf_coef * value_loss - cfg.ent_coef * masked_mean(entropy, m)
            if self.ptx_data is not None:
                ptx_loss = self.ptx_loss()
                loss = loss + cfg.ptx_coef * ptx_loss
                figures["ptx_loss"].append(ptx_loss.item())
            loss.backward()
            figures["grad_norm"].append(self.apply_gradients(self.adam))
            self.accounts["gradient_tokens"] += int(episodes.response_length[rows].sum())
            figures["policy_loss"].append(policy_loss.item())
            figures["value_loss"].append(value_loss.item())
            figures["entropy"].append(masked_mean(entropy, m).item())
            figures["clip_fraction"].append(masked_mean(((ratio - 1).abs() > cfg.clip_range).float(), m).item())
        for name, values_seen in figures.items():
            self.logger.record(f"train/{name}", float(np.mean(values_seen)))
        residual = masked_mean((returns - old_values) ** 2, mask) / masked_mean(
            (returns - masked_mean(returns, mask)) ** 2, mask
        ).clamp(min=1e-8)
        self.logger.record("train/explained_variance", 1 - residual.item())
        self.logger.record("train/learning_rate", self.adam.param_groups[0]["lr"])

    @torch.no_grad()
    def values(self, episodes: Episodes) -> tuple[torch.Tensor, torch.Tensor]:
        """The critic's view of a rollout before the update.

        Returns:
            V of the states before each token, (B, T); and V of the states after the last, (B,), which is 0 for
            episodes that ended and counts only where a wrapper has cut one.
        """
        n = episodes.response_length
        values = torch.zeros(episodes.rewards.shape, device=self.policy.lm.device)
        bootstrap = torch.zeros(len(episodes), device=self.policy.lm.device)
        for rows in np.array_split(np.arange(len(episodes)), -(-len(episodes) // self.config.minibatch_episodes)):
            values[rows, : n[rows].max()] = self.critic.values(self.policy, episodes, rows)
        cut = np.flatnonzero(episodes.finish_reason == "truncated")
        if len(cut):
            bootstrap[cut] = self.critic.final_values(self.policy, episodes, cut)
        return values, bootstrap

    def minibatches(self, size: int) -> list[np.ndarray]:
        """Rows of each gradient step: a fresh permutation per epoch."""
        count = -(-size // self.config.minibatch_episodes)
        return [rows for _ in range(self.config.epochs) for rows in np.array_split(self.rng.permutation(size), count)]

    def check_ptx(self) -> None:
        """See that the weight of the pretraining loss comes with text, and text with a weight.

        Asked by `learn` and not at construction: a checkpoint can be loaded to write with, without its pretraining text.
        """
        if (self.config.ptx_coef > 0) != (self.ptx_data is not None):
            got = f"ptx_coef={self.config.ptx_coef} and {'no ' if self.ptx_data is None else ''}ptx_data"
            name = type(self).__name__
            raise ValueError(f"ptx_coef and ptx_data belong together, got {got}: pass both to {name}(...), or neither.")

    def ptx_loss(self) -> torch.Tensor:
        """Cross-entropy on rows of pretraining text, nats per token. Shape: ()."""
        assert self.ptx_data is not None
        rows = self.ptx_data[self.rng.integers(len(self.ptx_data), size=self.config.ptx_rows)]
        ids = torch.from_numpy(rows).to(self.policy.lm.device)
        logits = self.policy.model(input_ids=ids[:, :-1], use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())

    def trained_modules(self) -> dict[str, torch.nn.Module]:
        """The critic is saved too: throwing it away makes a resumed run another run."""
        return {"critic": self.critic}

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """One Adam for policy and critic."""
        return {"adam": self.adam}


def _check_tokens(rows: np.ndarray, vocab_size: int) -> None:
    fits = rows.ndim == 2 and np.issubdtype(rows.dtype, np.integer) and rows.shape[1] > 1
    if not fits or rows.min() < 0 or rows.max() >= vocab_size:
        raise ValueError(
            f"Expected ptx_data to be token ids below {vocab_size}, integers of shape (rows, width) without padding, got {rows.dtype} of "
            f"shape {rows.shape}."
        )


def clipped_policy_loss(
    ratio: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor, clip_range: float
) -> torch.Tensor:
    """PPO's pessimistic surrogate (eq. 7), negated: mean over tokens. Shapes: (B, T) each -> ()."""
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return masked_mean(torch.maximum(-advantages * ratio, -advantages * clipped), mask)


def clipped_value_loss(
    values: torch.Tensor,
    old_values: torch.Tensor,
    returns: torch.Tensor,
    mask: torch.Tensor,
    clip_range: float | None,
) -> torch.Tensor:
    """Half the squared error, the worse of clipped and unclipped values (Ziegler's code). Shapes: (B, T) each -> ()."""
    error = (values - returns) ** 2
    if clip_range is not None:
        clipped = old_values + (values - old_values).clamp(-clip_range, clip_range)
        error = torch.maximum(error, (clipped - returns) ** 2)
    return 0.5 * masked_mean(error, mask)
