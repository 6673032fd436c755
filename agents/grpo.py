"""Group relative policy optimisation and its relatives: advantages within the group, ratios and losses of tokens.

Shao et al. (2024), https://arxiv.org/abs/2402.03300. Variants: Dr. GRPO, Liu et al. (2025), https://arxiv.org/abs/2503.20783;
DAPO, Yu et al. (2025), https://arxiv.org/abs/2503.14476; GSPO, Zheng et al. (2025), https://arxiv.org/abs/2507.18071.

    maximise  mean over tokens of  min(rho_t A_i, clip(rho_t, 1 - c_low, 1 + c_high) A_i) - beta KL,  rho = pi / pi_old
    A_i = (R_i - mean R) / std R  within the G completions of a prompt

                clip            ratio of    A / std   mean over                KL               other
    grpo        0.2             tokens      yes       tokens, completions      loss, k3
    dr_grpo     0.2             tokens      no        completions, sum / T     reward
    dapo        0.2 .. 0.28     tokens      yes       tokens of the batch      none             dynamic sampling, overlong penalty
    gspo        3e-4 .. 4e-4    completion  yes       tokens, completions      none

What they climb, on policy: `dr_grpo` the objective E[r] - beta KL, times (G - 1) / (G T): it is RLOO up to that factor. The others have
other fixed points. Dividing by the standard deviation weighs prompts by how sure their outcome is, and leaves nothing of the scale of
rewards (with G = 2 nothing but their order: it climbs the probability of beating oneself). A mean over a completion's tokens favours
short good and long bad completions. k3 in the loss pulls along the forward KL of the visited states: `grpo` rests where about

    pi(a|s) = pi_ref(a|s) / (1 - (A(s, a) - A(s)) / beta),  A(s, a) = E[A_i | s, a],  A(s) = E[A_i | s]

(`benchmarks/fixed_points.py` has it exactly; the optimum has exp((Q* - V*) / beta) in its place). Without a KL nothing holds `dapo`
and `gspo` at any distance from the reference. Differences from the papers: 1) `dr_grpo` has the KL in the reward, where the paper has
none (`beta` = 0 gives the paper's) 2) dynamic sampling gives up after `sampling_rounds` rollouts, and asks whether all that is paid is
equal, overlong penalty included, where DAPO asks whether all answers are right or all wrong 3) with the KL in the reward, R includes it.

Run: textenv train GRPO textenv/Arithmetic-v0 --seed 0 --env-arg group_size=8
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch

from agents.advantages import AGGREGATIONS, aggregate, group_advantages, kl_terms, masked_mean
from agents.base import AgentConfig, LanguageModelAgent, MaybeCallback, check_groups
from agents.config import check_choice, check_kl_settings
from agents.rollout import collect
from textenv.ledger import Episodes

VARIANTS: dict[str, dict[str, Any]] = {
    "grpo": {
        "clip_low": 0.2, "clip_high": 0.2, "ratio_of": "token", "scale_by_std": True, "loss_aggregation": "sequence",
        "kl_placement": "loss", "dynamic_sampling": False, "overlong_penalty": 0.0,
    },
    "dr_grpo": {
        "clip_low": 0.2, "clip_high": 0.2, "ratio_of": "token", "scale_by_std": False, "loss_aggregation": "fixed",
        "kl_placement": "reward", "dynamic_sampling": False, "overlong_penalty": 0.0,
    },
    "dapo": {
        "clip_low": 0.2, "clip_high": 0.28, "ratio_of": "token", "scale_by_std": True, "loss_aggregation": "token",
        "kl_placement": "none", "dynamic_sampling": True, "overlong_penalty": 1.0,
    },
    "gspo": {
        "clip_low": 3e-4, "clip_high": 4e-4, "ratio_of": "sequence", "scale_by_std": True, "loss_aggregation": "sequence",
        "kl_placement": "none", "dynamic_sampling": False, "overlong_penalty": 0.0,
    },
}  # fmt: skip
"""What each variant sets, unless the config says otherwise."""


@dataclass(frozen=True, kw_only=True)
class GRPOConfig(AgentConfig):
    """Settings of GRPO. G, the completions per prompt, is the environment's `group_size`. None: as the variant has it."""

    variant: str = "grpo"
    """`grpo`, `dr_grpo`, `dapo` or `gspo`: what the settings that are None become."""
    episodes_per_update: int = 64
    """B: episodes per rollout, B / G prompts with G completions each. Fastest with as many lanes."""
    minibatch_episodes: int = 32
    """Episodes per gradient step."""
    epochs: int = 1
    """Passes over each rollout."""
    clip_low: float | None = None
    """The probability ratio is clipped from below to 1 - c_low."""
    clip_high: float | None = None
    """The probability ratio is clipped from above to 1 + c_high (DAPO's clip-higher leaves unlikely tokens more room to grow)."""
    ratio_of: str | None = None
    """`token`, or `sequence`: the geometric mean of its tokens' ratios, one for the whole completion (GSPO)."""
    scale_by_std: bool | None = None
    """Divide advantages by the standard deviation of their group."""
    loss_aggregation: str | None = None
    """What the loss is a mean over: `token`, `sequence` or `fixed`. See `agents.advantages.aggregate`."""
    dynamic_sampling: bool | None = None
    """Leave out groups whose completions all pay the same, and sample others in their place (DAPO)."""
    sampling_rounds: int = 3
    """Rollouts per update at most, with dynamic sampling."""
    overlong_penalty: float | None = None
    """What a completion that uses up the token budget loses, in units of reward; over the last `overlong_share` of the budget it
    rises to that linearly (DAPO, eq. 13)."""
    overlong_share: float = 0.2
    """The last part of the token budget, in which the penalty rises."""
    kl_placement: str | None = None
    """Where the KL lives, with the environment's `beta`: `reward`, `loss`, or `none`."""
    kl_estimator: str = "k3"
    """In the loss, of tokens: `k2` or `ratio_k3` follow KL(pi || ref) of the visited states, `k3` the forward KL(ref || pi).
    See `agents.advantages.kl_terms`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("variant", self.variant, list(VARIANTS))
        for name in ("episodes_per_update", "minibatch_episodes", "epochs", "sampling_rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"Expected {name} >= 1, got {getattr(self, name)!r}.")
        for name in ("clip_low", "clip_high", "overlong_share"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"Expected {name} > 0, got {value!r}.")
        if self.overlong_share > 1:
            raise ValueError(
                f"Expected overlong_share, a share of the budget, to be at most 1, got {self.overlong_share!r}."
            )
        if self.overlong_penalty is not None and self.overlong_penalty < 0:
            raise ValueError(f"Expected overlong_penalty >= 0, got {self.overlong_penalty!r}.")
        check_choice("ratio_of", self.ratio_of or "token", ("token", "sequence"))
        check_choice("loss_aggregation", self.loss_aggregation or "token", AGGREGATIONS)
        check_kl_settings(self.kl_placement or "loss", self.kl_estimator)

        if self.rollout_dtype is not None and (self.ratio_of or VARIANTS[self.variant]["ratio_of"]) == "sequence":
            raise ValueError(
                f"rollout_dtype={self.rollout_dtype!r} does not go with ratio_of='sequence' (GSPO): its clip range is as narrow as the "
                "rounding is wide. Take another variant, or leave rollout_dtype out."
            )

    def resolved(self) -> GRPOConfig:
        """With the variant's values where nothing else was said."""
        unset = {name: value for name, value in VARIANTS[self.variant].items() if getattr(self, name) is None}
        return replace(self, **unset)


class GRPO(LanguageModelAgent):
    """Group relative policy optimisation.

    Args:
        env: A textenv vector environment with `group_size` >= 2.
        kwargs: See `LanguageModelAgent`; further keywords are fields of `GRPOConfig`.

    Raises:
        ValueError: The environment has no groups, or they do not fit.

    Example:
        >>> agent = GRPO(gym.make_vec("textenv/Arithmetic-v0", num_envs=64, group_size=8), seed=0, variant="dr_grpo")
        >>> agent.learn(total_timesteps=50_000)
    """

    Config = GRPOConfig
    config: GRPOConfig
    needs_groups = True

    def __init__(self, env: Any, **kwargs: Any) -> None:
        super().__init__(env, **kwargs)
        self.group_size = self.lanes.group_size
        self.waves = check_groups(self, self.config.episodes_per_update)
        self.adam = self.optimizer()

    def attach_to_env(self) -> None:
        """The environment pays the KL if the config says so."""
        self.kl_placement = self.config.resolved().kl_placement or self.kl_placement
        super().attach_to_env()

    def learn(self, total_timesteps: int, callback: MaybeCallback = None, progress_bar: bool = False) -> Self:
        """Train until `total_timesteps` more tokens have been sampled (the last rollout is finished)."""
        rounds = self.config.sampling_rounds if self.config.resolved().dynamic_sampling else 1
        with self.start_learning(total_timesteps, callback, progress_bar) as session:
            while session.more():
                waves: list[Episodes] = []
                while len(waves) < rounds * len(self.waves) and not self.enough(waves):
                    waves += [collect(self.env, self.policy, size, self.rng, session.on_step) for size in self.waves]
                episodes = Episodes.concatenate(waves)
                session.rollout_done(episodes)
                self.update(episodes)
                session.iteration_done()
        return self

    def update(self, episodes: Episodes) -> None:
        """Improve the policy on one rollout, in which the completions of a prompt stand next to each other."""
        cfg, device = self.config.resolved(), self.policy.lm.device
        assert cfg.clip_low is not None  # resolved() has filled it; so with the next two
        assert cfg.clip_high is not None
        assert cfg.loss_aggregation is not None
        mask = torch.from_numpy(episodes.mask).to(device)
        old_log_probs = torch.from_numpy(episodes.log_probs).to(device, torch.float32)
        returns = self.returns(episodes)
        advantages = group_advantages(returns, bool(cfg.scale_by_std)).flatten().to(device, torch.float32)
        ref_log_probs = self.reference_log_probs(episodes) if self.kl_placement == "loss" else None
        informative = returns.amax(dim=1) > returns.amin(dim=1)
        kept_rows = np.arange(len(episodes))
        if cfg.dynamic_sampling:
            kept_rows = kept_rows[informative.numpy().repeat(self.group_size)][: cfg.episodes_per_update]

        figures: dict[str, list[tuple[float, int]]] = defaultdict(list)  # means, and of how many
        figures["informative_groups"].append((informative.double().mean().item(), 1))
        first_ratio_error = 0.0
        for rows in self.minibatches(kept_rows):
            all_tokens = int(episodes.response_length[rows].sum())
            self.adam.zero_grad(set_to_none=True)  # of a minibatch that was interrupted
            for part in self.policy.passes(episodes, rows):
                log_probs, entropy, _ = self.policy.evaluate(episodes, part)
                width = slice(0, log_probs.shape[1])  # as wide as the longest response of the pass
                m, old, adv = mask[part, width], old_log_probs[part, width], advantages[part, None]
                tokens = int(episodes.response_length[part].sum())
                weight, total = (tokens, all_tokens) if cfg.loss_aggregation == "token" else (len(part), len(rows))

                log_ratio = log_probs - old
                if cfg.ratio_of == "sequence":
                    ratio = torch.exp(log_ratio.sum(dim=1) / m.sum(dim=1))[:, None].expand_as(log_ratio)
                else:
                    ratio = torch.exp(log_ratio)
                losses = clipped_losses(ratio, adv, cfg.clip_low, cfg.clip_high)
                policy_loss = aggregate(losses, m, cfg.loss_aggregation, mask.shape[1])
                loss = policy_loss
                if ref_log_probs is not None:
                    log_ref_ratio = log_probs - ref_log_probs[part, width]
                    kl_losses = kl_terms(log_ref_ratio, torch.exp(log_ratio), cfg.kl_estimator)
                    kl_loss = aggregate(kl_losses, m, cfg.loss_aggregation, mask.shape[1])
                    loss = loss + self.lanes.kl.beta * kl_loss
                    figures["kl_loss"].append((kl_loss.item(), weight))
                (loss * (weight / total)).backward()  # the mean over the minibatch, part by part
                if "grad_norm" not in figures:
                    first_ratio_error = max(first_ratio_error, (log_ratio.exp() - 1).abs().max().item())
                kept = m & (log_ratio > -torch.inf)  # a token that has left the top-k or top-p set has ratio 0
                approx_kl = masked_mean(torch.where(kept, log_ratio.exp() - 1 - log_ratio, 0.0), kept)
                clipped = (ratio < 1 - cfg.clip_low) | (ratio > 1 + cfg.clip_high)
                figures["approx_kl"].append((approx_kl.item(), max(1, int(kept.sum()))))
                figures["policy_loss"].append((policy_loss.item(), weight))
                figures["entropy"].append((masked_mean(entropy, m).item(), tokens))
                figures["clip_fraction"].append((masked_mean(clipped.double(), m).item(), tokens))
                self.accounts["gradient_tokens"] += tokens
            figures["grad_norm"].append((self.apply_gradients(self.adam), 1))
        for name, seen in figures.items():
            values, weights = np.transpose(seen)
            self.logger.record(f"train/{name}", float(np.average(values, weights=weights)))
        if "grad_norm" in figures:
            self.logger.record("train/first_ratio_error", first_ratio_error)
        self.logger.record("train/learning_rate", self.adam.param_groups[0]["lr"])

    def returns(self, episodes: Episodes) -> torch.Tensor:
        """What each completion is worth, the overlong penalty included. Shape: (P, G), float64."""
        cfg = self.config.resolved()
        returns = episodes.rewards.sum(axis=1)
        if cfg.overlong_penalty:
            budget = self.lanes.task.max_new_tokens
            returns = returns - cfg.overlong_penalty * overlong(episodes.response_length, budget, cfg.overlong_share)
        return torch.from_numpy(returns).reshape(-1, self.group_size)

    def enough(self, waves: list[Episodes]) -> bool:
        """Whether dynamic sampling has found as many informative groups as an update uses."""
        found = [int((r.amax(dim=1) > r.amin(dim=1)).sum()) for r in map(self.returns, waves)]
        return sum(found) * self.group_size >= self.config.episodes_per_update

    def minibatches(self, kept_rows: np.ndarray) -> list[np.ndarray]:
        """Rows of each gradient step: a fresh permutation per epoch."""
        count = -(-len(kept_rows) // self.config.minibatch_episodes)
        epochs = range(self.config.epochs if count else 0)
        return [rows for _ in epochs for rows in np.array_split(self.rng.permutation(kept_rows), count)]

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Adam of the policy."""
        return {"adam": self.adam}


def clipped_losses(ratio: torch.Tensor, advantages: torch.Tensor, clip_low: float, clip_high: float) -> torch.Tensor:
    """PPO's pessimistic surrogate of each token, negated. Shapes: (B, T), (B, 1) -> (B, T)."""
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip_low, 1 + clip_high))


def overlong(response_length: np.ndarray, budget: int, share: float) -> np.ndarray:
    """DAPO's soft penalty of long completions (eq. 13): 0, rising linearly to 1 over the last `share` of the budget. Shape: (B,)."""
    buffer = share * budget
    return np.clip((response_length - (budget - buffer)) / buffer, 0.0, 1.0)
