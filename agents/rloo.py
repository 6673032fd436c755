"""REINFORCE leave-one-out: the other completions of a prompt are the baseline, and no critic is needed.

Kool et al. (2019), https://openreview.net/forum?id=r1lgTGL5DE; Ahmadian et al. (2024), https://arxiv.org/abs/2402.14740.

    maximise  E[ R(x, y) ],  R(x, y) = r(x, y) - beta log(pi(y|x) / pi_ref(y|x))
    by the gradient  1/G sum_i (R_i - mean_{j != i} R_j) grad log pi(y_i|x)

The whole completion is one action: its tokens share one advantage and one probability ratio. The KL is paid by the environment
in the reward, or differentiated in the loss, or left out (`kl_placement`). Differences from the paper: 1) Adam without weight
decay 2) with several epochs or minibatches the ratio of the *completion* is clipped as in PPO (TRL does so too; the first
gradient step has ratio 1 and is the paper's) 3) a completion's gradient is a sum over its tokens, never a mean: the unbiased choice.

Run: textenv train RLOO textenv/Arithmetic-v0 --seed 0 --env-arg group_size=4
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch

from agents.advantages import kl_terms, leave_one_out, masked_mean, normalize
from agents.base import AgentConfig, LanguageModelAgent, MaybeCallback, check_groups
from agents.config import check_kl_settings
from agents.rollout import collect
from textenv.ledger import Episodes


@dataclass(frozen=True, kw_only=True)
class RLOOConfig(AgentConfig):
    """Settings of RLOO. G, the completions per prompt, is the environment's `group_size`."""

    episodes_per_update: int = 64
    """B: episodes per rollout, B / G prompts with G completions each. Fastest with as many lanes."""
    minibatch_episodes: int = 32
    """Episodes per gradient step."""
    epochs: int = 1
    """Passes over each rollout."""
    clip_range: float | None = 0.2
    """A completion's probability ratio is clipped to 1 - c .. 1 + c; None does not clip."""
    normalize_advantages: bool = False
    """Scale advantages to mean 0 and variance 1 over the rollout (REINFORCE++ calls this global normalisation)."""
    kl_placement: str = "reward"
    """Where the KL lives, with the environment's `beta`: `reward` (the exact gradient), `loss`, or `none`."""
    kl_estimator: str = "k2"
    """In the loss, of whole completions: `k2` or `ratio_k3` follow KL(pi || ref), `k3` the forward KL(ref || pi).
    See `agents.advantages.kl_terms`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("episodes_per_update", "minibatch_episodes", "epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"Expected {name} >= 1, got {getattr(self, name)!r}.")
        if self.clip_range is not None and not self.clip_range > 0:
            raise ValueError(f"Expected clip_range > 0, got {self.clip_range!r}.")
        check_kl_settings(self.kl_placement, self.kl_estimator)


class RLOO(LanguageModelAgent):
    """REINFORCE leave-one-out.

    Args:
        env: A textenv vector environment with `group_size` >= 2.
        kwargs: See `LanguageModelAgent`; further keywords are fields of `RLOOConfig`.

    Raises:
        ValueError: The environment has no groups, or they do not fit.

    Example:
        >>> agent = RLOO(gym.make_vec("textenv/Arithmetic-v0", num_envs=64, group_size=4), seed=0)
        >>> agent.learn(total_timesteps=50_000)
    """

    Config = RLOOConfig
    config: RLOOConfig
    needs_groups = True

    def __init__(self, env: Any, **kwargs: Any) -> None:
        super().__init__(env, **kwargs)
        self.group_size = self.lanes.group_size
        self.waves = check_groups(self, self.config.episodes_per_update)
        self.adam = self.optimizer()

    def attach_to_env(self) -> None:
        """The environment pays the KL if the config says so."""
        self.kl_placement = self.config.kl_placement
        super().attach_to_env()

    def learn(self, total_timesteps: int, callback: MaybeCallback = None, progress_bar: bool = False) -> Self:
        """Train until `total_timesteps` more tokens have been sampled (the last rollout is finished)."""
        with self.start_learning(total_timesteps, callback, progress_bar) as session:
            while session.more():
                waves = [collect(self.env, self.policy, size, self.rng, session.on_step) for size in self.waves]
                episodes = Episodes.concatenate(waves)
                session.rollout_done(episodes)
                self.update(episodes)
                session.iteration_done()
        return self

    def update(self, episodes: Episodes) -> None:
        """Improve the policy on one rollout, in which the completions of a prompt stand next to each other."""
        cfg, device = self.config, self.policy.lm.device
        mask = torch.from_numpy(episodes.mask).to(device)
        old_log_probs = torch.from_numpy(episodes.log_probs).to(device, torch.float32)
        returns = torch.from_numpy(episodes.rewards.sum(axis=1)).reshape(-1, self.group_size)
        advantages = leave_one_out(returns).flatten().to(device, torch.float32)
        if cfg.normalize_advantages:
            advantages = normalize(advantages)
        ref_log_probs = self.reference_log_probs(episodes) if self.kl_placement == "loss" else None

        figures: dict[str, list[tuple[float, int]]] = defaultdict(list)  # means, and of how many
        figures["informative_groups"].append(((returns.amax(dim=1) > returns.amin(dim=1)).double().mean().item(), 1))
        first_ratio_error = 0.0
        for rows in self.minibatches(len(episodes)):
            self.adam.zero_grad(set_to_none=True)  # of a minibatch that was interrupted
            for part in self.policy.passes(episodes, rows):
                log_probs, entropy, _ = self.policy.evaluate(episodes, part)
                width = slice(0, log_probs.shape[1])  # as wide as the longest response of the pass
                m, old, adv = mask[part, width], old_log_probs[part, width], advantages[part]
                count, tokens = len(part), int(episodes.response_length[part].sum())

                log_ratio = log_probs - old
                ratio = torch.exp(log_ratio.sum(dim=1))
                policy_loss = clipped_sequence_loss(ratio, adv, cfg.clip_range)
                loss = policy_loss
                if ref_log_probs is not None:
                    log_ref_ratio = (log_probs - ref_log_probs[part, width]).sum(dim=1)
                    kl_loss = kl_terms(log_ref_ratio, ratio, cfg.kl_estimator).mean()
                    loss = loss + self.lanes.kl.beta * kl_loss
                    figures["kl_loss"].append((kl_loss.item(), count))
                (loss * (count / len(rows))).backward()  # the mean over the minibatch, part by part
                if "grad_norm" not in figures:
                    first_ratio_error = max(first_ratio_error, (log_ratio.exp() - 1).abs().max().item())
                kept = m & (log_ratio > -torch.inf)  # a token that has left the top-k or top-p set has ratio 0
                approx_kl = masked_mean(torch.where(kept, log_ratio.exp() - 1 - log_ratio, 0.0), kept)
                figures["approx_kl"].append((approx_kl.item(), max(1, int(kept.sum()))))
                figures["policy_loss"].append((policy_loss.item(), count))
                figures["entropy"].append((masked_mean(entropy, m).item(), tokens))
                if cfg.clip_range is not None:
                    clipped = (ratio - 1).abs() > cfg.clip_range
                    figures["clip_fraction"].append((clipped.double().mean().item(), count))
                self.accounts["gradient_tokens"] += tokens
            figures["grad_norm"].append((self.apply_gradients(self.adam), 1))
        for name, seen in figures.items():
            values, weights = np.transpose(seen)
            self.logger.record(f"train/{name}", float(np.average(values, weights=weights)))
        self.logger.record("train/first_ratio_error", first_ratio_error)
        self.logger.record("train/learning_rate", self.adam.param_groups[0]["lr"])

    def minibatches(self, size: int) -> list[np.ndarray]:
        """Rows of each gradient step: a fresh permutation per epoch."""
        count = -(-size // self.config.minibatch_episodes)
        return [rows for _ in range(self.config.epochs) for rows in np.array_split(self.rng.permutation(size), count)]

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Adam of the policy."""
        return {"adam": self.adam}


def clipped_sequence_loss(ratio: torch.Tensor, advantages: torch.Tensor, clip_range: float | None) -> torch.Tensor:
    """PPO's pessimistic surrogate with completions as actions, negated: mean over completions. Shapes: (B,), (B,) -> ()."""
    loss = -advantages * ratio
    if clip_range is not None:
        loss = torch.maximum(loss, -advantages * ratio.clamp(1 - clip_range, 1 + clip_range))
    return loss.mean()
