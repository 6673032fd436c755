"""Expert iteration: draw several completions of each prompt, keep the best, imitate it.

Also known as RAFT and as rejection sampling. Dong et al. (2023), https://arxiv.org/abs/2304.06767; Touvron et al. (2023,
Llama 2, section 3.2.2), https://arxiv.org/abs/2307.09288; Anthony et al. (2017), https://arxiv.org/abs/1705.08439.

    y*(x) = argmax_k r(x, y_k),  y_1 .. y_G ~ pi(.|x)             minimise  -E_x[ log pi(y*(x)|x) ]

What it tends to: each round moves pi towards the best of G of its own samples, p(y) = F(y)^G - F^-(y)^G, so what is a
little better than the rest grows until it is all that is left. Nothing holds pi to the reference: the fixed points are
the policies that draw completions of one reward only, whatever their KL, and V* is passed on the way, if at all. Stop
early, or set `rank_by="return"`: then the environment pays the KL penalty and completions are ranked by `r - beta log(pi /
pi_ref)`, which is the same for all of them exactly where pi is the optimum. There all are ranked alike and nothing moves.

Differences from the papers: 1) groups whose completions are all worth the same, or have one member only, are left out:
to imitate one of them would only lose entropy 2) every round starts from the current policy and forgets older
samples 3) loss is per token, over a minibatch of kept completions.

Run: textenv train ExpertIteration textenv/Tree-v0 --env-arg group_size=8 --seed 0
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from agents.advantages import masked_mean
from agents.base import AgentConfig, LanguageModelAgent, MaybeCallback, check_groups
from agents.config import check_choice
from agents.rollout import collect
from textenv.ledger import Episodes

RANKINGS = ("task_reward", "return")


@dataclass(frozen=True, kw_only=True)
class ExpertIterationConfig(AgentConfig):
    """Settings of expert iteration."""

    episodes_per_update: int = 128
    """B: episodes per rollout. The G completions of a prompt are the environment's `group_size`."""
    minibatch_episodes: int = 16
    """Kept completions per gradient step."""
    epochs: int = 1
    """Passes over the kept completions of each rollout."""
    rank_by: str = "task_reward"
    """What the best is best by: `task_reward`, or `return` (the task reward less the KL penalty, paid by the environment)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("episodes_per_update", "minibatch_episodes", "epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"Expected {name} >= 1, got {getattr(self, name)!r}.")
        check_choice("rank_by", self.rank_by, RANKINGS)


class ExpertIteration(LanguageModelAgent):
    """Imitation of the best of G samples.

    Args:
        env: A textenv vector environment with `group_size` of at least 2: G.
        kwargs: See `LanguageModelAgent`; further keywords are fields of `ExpertIterationConfig`.

    Example:
        >>> agent = ExpertIteration(gym.make_vec("textenv/Arithmetic-v0", num_envs=64, group_size=8), seed=0)
        >>> agent.learn(total_timesteps=50_000)
    """

    Config = ExpertIterationConfig
    config: ExpertIterationConfig
    kl_placement = "none"
    needs_groups = True

    def __init__(self, env: Any, **kwargs: Any) -> None:
        super().__init__(env, **kwargs)
        self.waves = check_groups(self, self.config.episodes_per_update)
        self.adam = self.optimizer()

    def attach_to_env(self) -> None:
        """The environment pays the KL where it decides the ranking."""
        self.kl_placement = "reward" if self.config.rank_by == "return" else "none"
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
        """Imitate the best of each group."""
        # What was paid, not `task_reward`: wrappers may change it, and the KL penalty is in it where it counts. Whoever
        # was cut off has not been judged.
        worth = np.where(episodes.finish_reason == "truncated", np.nan, episodes.rewards.sum(axis=1))
        kept = best_of_groups(worth, episodes.group_id)
        self.logger.record("train/kept", len(kept) / len(episodes))
        if not len(kept):
            return
        self.logger.record("train/kept_reward", float(np.mean(worth[kept])))
        figures: dict[str, list[float]] = defaultdict(list)
        for rows in self.minibatches(kept):
            log_probs, _, _ = self.policy.evaluate(episodes, rows)
            mask = torch.from_numpy(episodes.mask[rows, : log_probs.shape[1]]).to(log_probs.device)
            loss = imitation_loss(log_probs, mask)
            loss.backward()
            figures["grad_norm"].append(self.apply_gradients(self.adam))
            self.accounts["gradient_tokens"] += int(episodes.response_length[rows].sum())
            figures["loss"].append(loss.item())
        for name, values in figures.items():
            self.logger.record(f"train/{name}", float(np.mean(values)))
        self.logger.record("train/learning_rate", self.adam.param_groups[0]["lr"])

    def minibatches(self, kept: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Rows of each gradient step: a fresh permutation per epoch."""
        count = -(-len(kept) // self.config.minibatch_episodes)
        return [rows for _ in range(self.config.epochs) for rows in np.array_split(self.rng.permutation(kept), count)]

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Adam of the policy."""
        return {"adam": self.adam}


def best_of_groups(worth: NDArray[np.float64], group_id: NDArray[np.int64]) -> NDArray[np.int64]:
    """The best member of each group in which there is one: groups of equals are left out, and members worth nan.

    Among several best the first is taken; members of a group are exchangeable, so it is any of them.

    Args:
        worth: nan where unknown. Shape: (B,).
        group_id: Shape: (B,).

    Returns:
        Rows, in order of groups. Shape: (K,), K the groups that are left.
    """
    best = []
    for group in np.unique(group_id):
        rows = np.flatnonzero((group_id == group) & ~np.isnan(worth))
        if len(rows) and worth[rows].max() > worth[rows].min():
            best.append(rows[worth[rows].argmax()])
    return np.asarray(best, np.int64)


def imitation_loss(log_probs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Cross-entropy, nats per token. Shapes: (B, T), (B, T) -> ().

    A token that has left the top-k or top-p set since it was drawn has log-probability `-inf` and no gradient; it is
    left out.
    """
    kept = mask & torch.isfinite(log_probs)
    return -masked_mean(torch.where(kept, log_probs, 0.0), kept)
