"""REINFORCE: the policy gradient as it stands, with a choice of baselines.

Williams (1992), https://doi.org/10.1007/BF00992696; the greedy baseline is ReMax, Li et al. (2023), https://arxiv.org/abs/2310.10505.

    maximise  E[ r(x, y) - beta log(pi(y|x) / pi_ref(y|x)) ]
    by the gradient  sum_t (G_t - b) grad log pi(y_t | x, y_<t),  G_t the rewards from token t on

The baseline b (`baseline`) is one of

    none            0
    batch_mean      the mean return of the batch, the episode's own included: the gradient shrinks by (B - 1) / B, its direction stays
    moving_average  an average of earlier batches
    greedy          what the most probable completion of the same prompt is worth: one more, greedy episode per prompt (ReMax)

The KL is paid by the environment in the reward, token by token, or differentiated in the loss, or left out (`kl_placement`).
Differences from the papers: 1) Adam 2) rewards from the token on instead of the whole return: the same gradient in
expectation, with less variance 3) one gradient step per rollout, so there is no ratio and nothing to clip 4) the greedy episodes
count as environment tokens, reward calls and reference calls.

Run: textenv train REINFORCE textenv/Arithmetic-v0 --seed 0
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch

from agents.advantages import AGGREGATIONS, aggregate, importance_weights, kl_terms, masked_mean, returns_to_go, whiten
from agents.base import AgentConfig, LanguageModelAgent, Learning, MaybeCallback
from agents.config import check_choice, check_kl_settings
from agents.rollout import collect, run_prompts
from textenv.env import TextVectorEnv
from textenv.ledger import Episodes

BASELINES = ("none", "batch_mean", "moving_average", "greedy")


@dataclass(frozen=True, kw_only=True)
class REINFORCEConfig(AgentConfig):
    """Settings of REINFORCE."""

    episodes_per_update: int = 32
    """B: episodes per rollout, and per gradient step."""
    baseline: str = "batch_mean"
    """What is subtracted from returns: `none`, `batch_mean`, `moving_average` or `greedy` (ReMax)."""
    baseline_decay: float = 0.9
    """Weight of the past in the moving average, per update."""
    whiten_advantages: bool = False
    """Scale advantages to mean 0 and variance 1 over the tokens of the rollout (REINFORCE++'s global normalisation)."""
    ent_coef: float = 0.0
    """Weight of an entropy bonus. Not a KL penalty: that one is in the reward."""
    loss_aggregation: str = "fixed"
    """What the loss is a mean over: `token`, `sequence` or `fixed` (the unbiased one). See `agents.advantages.aggregate`."""
    kl_placement: str = "reward"
    """Where the KL lives, with the environment's `beta`: `reward` (the exact gradient), `loss`, or `none`."""
    kl_estimator: str = "k2"
    """In the loss, of tokens: `k2` or `ratio_k3` follow KL(pi || ref) of the visited states, `k3` the forward KL(ref || pi).
    See `agents.advantages.kl_terms`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.episodes_per_update < 1:
            raise ValueError(f"Expected episodes_per_update >= 1, got {self.episodes_per_update!r}.")
        check_choice("baseline", self.baseline, BASELINES)
        if self.baseline == "batch_mean" and self.episodes_per_update == 1:
            raise ValueError(
                "baseline='batch_mean' needs episodes_per_update >= 2: the mean of one return is that return, and nothing is left to "
                "learn from. Take more episodes, or baseline='moving_average'."
            )
        if not 0 <= self.baseline_decay < 1:
            raise ValueError(f"Expected baseline_decay of at least 0 and below 1, got {self.baseline_decay!r}.")
        check_choice("loss_aggregation", self.loss_aggregation, AGGREGATIONS)
        check_kl_settings(self.kl_placement, self.kl_estimator)


class REINFORCE(LanguageModelAgent):
    """The plain policy gradient.

    Args:
        env: A textenv vector environment.
        kwargs: See `LanguageModelAgent`; further keywords are fields of `REINFORCEConfig`.

    Raises:
        ValueError: The greedy baseline under a wrapper: what it pays a greedy episode cannot be asked.

    Example:
        >>> agent = REINFORCE(gym.make_vec("textenv/Arithmetic-v0", num_envs=32), seed=0, baseline="greedy")
        >>> agent.learn(total_timesteps=50_000)
    """

    Config = REINFORCEConfig
    config: REINFORCEConfig

    def __init__(self, env: Any, **kwargs: Any) -> None:
        super().__init__(env, **kwargs)
        if self.config.baseline == "greedy" and self.env is not self.lanes:
            raise ValueError(
                f"baseline='greedy' needs a bare environment, got it wrapped in {type(self.env).__name__}: greedy episodes run beside the "
                "training ones, where no wrapper sees them. Take another baseline, or put what the wrapper does into the reward function."
            )
        self.average = MovingAverage(self.config.baseline_decay)
        self.adam = self.optimizer()

    def attach_to_env(self) -> None:
        """The environment pays the KL if the config says so."""
        self.kl_placement = self.config.kl_placement
        super().attach_to_env()

    def learn(self, total_timesteps: int, callback: MaybeCallback = None, progress_bar: bool = False) -> Self:
        """Train until `total_timesteps` more tokens have been sampled (the last rollout is finished)."""
        with self.start_learning(total_timesteps, callback, progress_bar) as session:
            while session.more():
                episodes = collect(self.env, self.policy, self.config.episodes_per_update, self.rng, session.on_step)
                greedy_returns = self.greedy_returns(episodes, session)
                session.rollout_done(episodes)
                self.update(episodes, greedy_returns)
                session.iteration_done()
        return self

    def update(self, episodes: Episodes, greedy_returns: torch.Tensor | None = None) -> None:
        """One step along the policy gradient of a rollout."""
        cfg, device = self.config, self.policy.lm.device
        mask = torch.from_numpy(episodes.mask).to(device)
        old_log_probs = torch.from_numpy(episodes.log_probs).to(device, torch.float32)
        to_go = returns_to_go(torch.from_numpy(episodes.rewards), torch.from_numpy(episodes.mask))
        baseline = self.baseline(to_go[:, 0], greedy_returns)
        advantages = ((to_go - baseline[:, None]).to(device, torch.float32)) * mask
        if cfg.whiten_advantages:
            advantages = whiten(advantages, mask)

        log_probs, entropy, _ = self.policy.evaluate(
            episodes, np.arange(len(episodes)), entropy_gradient=cfg.ent_coef != 0
        )
        part = slice(0, log_probs.shape[1])  # as wide as the longest response
        m, old, adv = mask[:, part], old_log_probs[:, part], advantages[:, part]
        weights = 1.0 if cfg.rollout_dtype is None else importance_weights(log_probs, old, m)
        policy_loss = aggregate(-weights * adv * log_probs, m, cfg.loss_aggregation, mask.shape[1])
        loss = policy_loss - cfg.ent_coef * aggregate(weights * entropy, m, cfg.loss_aggregation, mask.shape[1])
        if self.kl_placement == "loss":
            ratio = torch.exp(log_probs - log_probs.detach())  # 1, with a gradient
            kl_losses = kl_terms(log_probs - self.reference_log_probs(episodes)[:, part], ratio, cfg.kl_estimator)
            kl_loss = aggregate(weights * kl_losses, m, cfg.loss_aggregation, mask.shape[1])
            loss = loss + self.lanes.kl.beta * kl_loss
            self.logger.record("train/kl_loss", kl_loss.item())
        loss.backward()
        self.logger.record("train/grad_norm", self.apply_gradients(self.adam))
        self.accounts["gradient_tokens"] += int(episodes.response_length.sum())
        self.logger.record("train/first_ratio_error", ((log_probs - old).exp() - 1).abs().max().item())
        self.logger.record("train/policy_loss", policy_loss.item())
        self.logger.record("train/entropy", masked_mean(entropy, m).item())
        self.logger.record("train/baseline", baseline.mean().item())
        self.logger.record("train/learning_rate", self.adam.param_groups[0]["lr"])

    def baseline(self, returns: torch.Tensor, greedy_returns: torch.Tensor | None) -> torch.Tensor:
        """What is subtracted from each episode's rewards-to-go. Shape: (B,)."""
        if self.config.baseline == "batch_mean":
            return torch.full_like(returns, returns.mean().item())
        if self.config.baseline == "moving_average":
            before = torch.full_like(returns, self.average.mean)
            self.average.add(returns.mean().item())  # of use to the next batch: this one's own would bias the gradient
            return before
        if self.config.baseline == "greedy":
            if greedy_returns is None:
                raise ValueError("baseline='greedy' needs greedy_returns, as greedy_returns(episodes) gives them.")
            return greedy_returns
        return torch.zeros_like(returns)

    def greedy_returns(self, episodes: Episodes, session: Learning | None = None) -> torch.Tensor | None:
        """What the most probable completion of each episode's prompt is worth, with the KL as the episodes have it. Shape: (B,).

        It runs in an environment of its own, so that neither the lanes nor a KL controller notice.
        """
        if self.config.baseline != "greedy":
            return None
        prompts, rows = np.unique(episodes.prompt_id, return_inverse=True)
        lanes = self.lanes
        env = TextVectorEnv(
            min(len(prompts), lanes.num_envs), lanes.task, beta=lanes.kl.beta, temperature=lanes.behaviour.temperature,
            action_mask=lanes.behaviour.action_mask,
        )  # fmt: skip
        env.attach_policy(self.policy, pay=self.kl_placement == "reward")
        greedy = run_prompts(self, env, prompts, deterministic=True)
        self.accounts["reward_calls"] += len(greedy)
        self.accounts["reference_calls"] += len(greedy)
        self.accounts["reference_tokens"] += int(greedy.response_length.sum())
        if session is not None:
            session.on_step(int(greedy.response_length.sum()))
        return torch.from_numpy(greedy.rewards.sum(axis=1)[rows])

    def trained_modules(self) -> dict[str, torch.nn.Module]:
        """The moving average is saved too: a resumed run subtracts what the undisturbed one does."""
        return {"average": self.average}

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Adam of the policy."""
        return {"adam": self.adam}


class MovingAverage(torch.nn.Module):
    """An exponentially weighted mean, unbiased from its first value on as Adam's moments are; 0 before."""

    total: torch.Tensor
    weight: torch.Tensor

    def __init__(self, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("total", torch.zeros((), dtype=torch.float64))
        self.register_buffer("weight", torch.zeros((), dtype=torch.float64))

    def add(self, value: float) -> None:
        """Take note of a value."""
        self.total.mul_(self.decay).add_((1 - self.decay) * value)
        self.weight.mul_(self.decay).add_(1 - self.decay)

    @property
    def mean(self) -> float:
        """Of the values so far."""
        return float(self.total / self.weight) if self.weight > 0 else 0.0
