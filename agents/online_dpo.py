"""Online direct preference optimisation: two completions of a prompt, the reward says which is better, DPO's loss.

Guo et al. (2024), https://arxiv.org/abs/2402.04792; Rafailov et al. (2023), https://arxiv.org/abs/2305.18290 (eq. 7).

    minimise  -E[ log sigmoid(beta (D(y_w) - D(y_l))) ],    D(y) = log pi(y|x) - log pi_ref(y|x),    y_w, y_l ~ pi(.|x)

The KL lives in the loss: beta scales the log-ratios (`kl_placement = "loss"`), and the environment pays none.

What it tends to depends on the labels. `labels="argmax"` (the papers': the better one wins, surely) has no fixed point
but a policy that draws completions of one reward only: whatever pi, a wider margin lowers the loss, so beta sets how
quickly the push fades (as exp(-margin)) and not where it ends. The score passes near V* and falls behind it: stop early.
`labels="bradley_terry"` lets y_1 win with probability sigmoid(r_1 - r_2), in expectation: the loss of every pair is
least where beta (D(y_1) - D(y_2)) = r_1 - r_2, that is where pi = pi_ref exp(r / beta) / Z. That is the optimum of the
KL-penalised reward, for the same beta, and nothing moves there.

Differences from the papers: 1) the environment's reward judges, not a language model 2) pairs of equal reward make no
pair under `argmax` (TRL takes the first of them) 3) the reference's temperature and action mask are those of the policy
4) several minibatches to a rollout, so all but the first are slightly off-policy.

Run: textenv train OnlineDPO textenv/Tree-v0 --env-arg group_size=2 --seed 0
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import logsigmoid

from agents.base import AgentConfig, LanguageModelAgent, MaybeCallback, check_groups
from agents.config import check_choice
from agents.rollout import collect
from textenv.ledger import Episodes

LABELS = ("argmax", "bradley_terry")


@dataclass(frozen=True, kw_only=True)
class OnlineDPOConfig(AgentConfig):
    """Settings of online DPO."""

    episodes_per_update: int = 128
    """B: episodes per rollout, so up to B / 2 pairs."""
    minibatch_pairs: int = 16
    """Pairs per gradient step."""
    epochs: int = 1
    """Passes over each rollout."""
    beta: float | None = None
    """DPO's beta, reward per nat. None takes the environment's KL coefficient, as the next episode would start with it."""
    labels: str = "argmax"
    """Who wins a pair: `argmax` (the one of higher reward), or `bradley_terry` (each with probability sigmoid(r - r'),
    in expectation: its fixed point is the optimum)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("episodes_per_update", "minibatch_pairs", "epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"Expected {name} >= 1, got {getattr(self, name)!r}.")
        if self.beta is not None and not self.beta > 0:
            raise ValueError(f"Expected beta > 0 or None, got {self.beta!r}: at 0 DPO's loss is constant.")
        check_choice("labels", self.labels, LABELS)


class OnlineDPO(LanguageModelAgent):
    """Direct preference optimisation on the policy's own completions.

    Args:
        env: A textenv vector environment with `group_size` of at least 2; neighbours in a group make a pair.
        kwargs: See `LanguageModelAgent`; further keywords are fields of `OnlineDPOConfig`.

    Example:
        >>> agent = OnlineDPO(gym.make_vec("textenv/Arithmetic-v0", num_envs=64, group_size=2), seed=0)
        >>> agent.learn(total_timesteps=50_000)
    """

    Config = OnlineDPOConfig
    config: OnlineDPOConfig
    kl_placement = "loss"
    needs_groups = True

    def __init__(self, env: Any, **kwargs: Any) -> None:
        super().__init__(env, **kwargs)
        self.waves = check_groups(self, self.config.episodes_per_update)
        if not self.beta > 0:
            raise ValueError(
                f"The environment's KL coefficient is {self.beta}, and DPO's loss is constant at beta 0: expected beta > 0. Pass "
                "OnlineDPO(env, beta=...), or make the environment with beta=0.1, say."
            )
        self.adam = self.optimizer()

    @property
    def beta(self) -> float:
        """DPO's beta, reward per nat."""
        return self.lanes.kl.beta if self.config.beta is None else self.config.beta

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
        """Learn from the pairs of one rollout."""
        cfg, device = self.config, self.policy.lm.device
        # What was paid, not `task_reward`: wrappers may change it. Whoever was cut off has not been judged.
        worth = np.where(episodes.finish_reason == "truncated", np.nan, episodes.rewards.sum(axis=1))
        pairs = make_pairs(worth, episodes.group_id, ties=cfg.labels == "bradley_terry")
        self.logger.record("train/pairs", 2 * len(pairs) / len(episodes))
        if not len(pairs):
            return
        gaps = worth[pairs[:, 0]] - worth[pairs[:, 1]]
        labels = torch.from_numpy(np.ones_like(gaps) if cfg.labels == "argmax" else 1 / (1 + np.exp(-gaps)))
        log_ref = self.reference_log_probs(episodes).sum(dim=1)
        beta = self.beta
        figures: dict[str, list[float]] = defaultdict(list)
        for part in self.minibatches(len(pairs)):
            rows = pairs[part].T.ravel()  # the better ones, then the worse ones
            log_probs, _, _ = self.policy.evaluate(episodes, rows)
            better, worse = (log_probs.sum(dim=1) - log_ref[rows]).chunk(2)
            loss = dpo_loss(better, worse, beta, labels[part].to(device, better.dtype))
            loss.backward()
            figures["grad_norm"].append(self.apply_gradients(self.adam))
            self.accounts["gradient_tokens"] += int(episodes.response_length[rows].sum())
            margin = beta * (better - worse).detach()
            figures["loss"].append(loss.item())
            figures["margin"].append(margin.mean().item())
            figures["accuracy"].append((margin > 0).float().mean().item())
        for name, values in figures.items():
            self.logger.record(f"train/{name}", float(np.mean(values)))
        self.logger.record("train/learning_rate", self.adam.param_groups[0]["lr"])
        self.logger.record("train/reward_gap", float(gaps.mean()))

    def minibatches(self, size: int) -> list[NDArray[np.int64]]:
        """Pairs of each gradient step: a fresh permutation per epoch."""
        count = -(-size // self.config.minibatch_pairs)
        return [part for _ in range(self.config.epochs) for part in np.array_split(self.rng.permutation(size), count)]

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Adam of the policy."""
        return {"adam": self.adam}


def make_pairs(worth: NDArray[np.float64], group_id: NDArray[np.int64], ties: bool = False) -> NDArray[np.int64]:
    """Neighbours of one group, the better one first. A row is in one pair at most, so pairs are independent.

    Args:
        worth: nan where unknown: such rows make no pair. Shape: (B,).
        group_id: Shape: (B,).
        ties: Whether equals make a pair.

    Returns:
        Rows of (better, worse). Shape: (P, 2).
    """
    pairs = []
    for group in np.unique(group_id):
        rows = np.flatnonzero((group_id == group) & ~np.isnan(worth))
        for one, other in zip(rows[0::2], rows[1::2], strict=False):  # of an odd number the last has no partner
            if worth[one] != worth[other] or ties:
                pairs.append((one, other) if worth[one] >= worth[other] else (other, one))
    return np.asarray(pairs, np.int64).reshape(-1, 2)


def dpo_loss(
    better: torch.Tensor, worse: torch.Tensor, beta: float, labels: torch.Tensor | float = 1.0
) -> torch.Tensor:
    """DPO's loss, with soft labels: mean over pairs.

    A completion that the policy can no longer draw (a token has left its top-k or top-p set) has an infinite log-ratio and
    no gradient; its pair counts as nothing.

    Args:
        better: log pi(y_w|x) - log pi_ref(y_w|x), nats. Shape: (P,).
        worse: The same of y_l. Shape: (P,).
        beta: Reward per nat.
        labels: Probability that y_w is the better one. Shape: (P,) or ().

    Returns:
        Shape: ().
    """
    known = torch.isfinite(better) & torch.isfinite(worse)
    margin = beta * torch.where(known, better - worse, 0.0)
    loss = -labels * logsigmoid(margin) - (1 - labels) * logsigmoid(-margin)
    return torch.where(known, loss, 0.0).mean()
