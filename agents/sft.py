"""Supervised fine-tuning: imitate demonstrations, keep the weights that did best on held-out ones.

    minimise  -E_(x, y)~demonstrations [ log pi(y|x) ]      over response tokens

As in InstructGPT (Ouyang et al., 2022, appendix C.1): several epochs, a cosine to 10% of the learning rate, no warm-up,
selection by a score on validation prompts. That score is minus the validation loss, or yours (a reward model's, say;
the paper found that more epochs overfit the loss and still please people).

Run: textenv train SFT textenv/Assistant-v0 --seed 0
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from agents.base import AgentConfig, LanguageModelAgent, MaybeCallback


@dataclass(frozen=True, kw_only=True)
class SFTConfig(AgentConfig):
    """Settings of supervised fine-tuning."""

    minibatch_episodes: int = 32
    """Demonstrations per gradient step."""
    validation_fraction: float = 0.1
    """Share of demonstrations that is held out to select by."""
    final_learning_rate: float = 0.1
    """Where the cosine ends, as a share of the learning rate."""


@dataclass(frozen=True)
class Demonstrations:
    """Prompts with their demonstrated responses.

    Attributes:
        tokens: Prompt, response, padding V. Shape: (D, L).
        prompt_length: Shape: (D,).
        response_length: Stop token included. Shape: (D,).
    """

    tokens: NDArray[np.int64]
    prompt_length: NDArray[np.int64]
    response_length: NDArray[np.int64]


class SFT(LanguageModelAgent):
    """Imitation of the environment's demonstrations. One timestep is one response token trained on.

    Args:
        env: Its prompts have a `demonstration` column.
        validation_score: Judges the agent instead of the validation loss; larger is better.
        kwargs: See `LanguageModelAgent`; further keywords are fields of `SFTConfig`.
    """

    Config = SFTConfig
    config: SFTConfig
    kl_placement = "none"

    def __init__(self, env: Any, *, validation_score: Callable[[SFT], float] | None = None, **kwargs: Any) -> None:
        super().__init__(env, **kwargs)
        self.validation_score = validation_score
        self.adam = self.optimizer()
        data = pack(self.lanes.demonstrations, self.lanes.max_tokens, self.lanes.vocab_size)
        # Held out by position in a fixed permutation: the same for every seed, so that scores can be compared.
        order = np.random.default_rng(0).permutation(len(data.tokens))
        held_out = max(1, round(self.config.validation_fraction * len(order)))
        if held_out >= len(order):
            raise ValueError(f"Expected at least 2 demonstrations, to learn from and to select by, got {len(order)}.")
        self.data, self.training, self.validation = data, np.sort(order[held_out:]), np.sort(order[:held_out])

    def learn(self, total_timesteps: int, callback: MaybeCallback = None, progress_bar: bool = False) -> Self:
        """Train on `total_timesteps` response tokens, and take the weights of the best epoch."""
        best, best_score = self.weights(), self.score()
        with self.start_learning(total_timesteps, callback, progress_bar) as session:
            while session.more():  # one epoch
                losses = []
                for rows in self.minibatches():
                    share = min(1.0, (self.num_timesteps - session.begin) / (session.total - session.begin))
                    for group in self.adam.param_groups:
                        group["lr"] = self.learning_rate * cosine(share, self.config.final_learning_rate)
                    log_probs, _, _ = self.policy.evaluate(self.data, rows)
                    loss = -log_probs.sum() / int(self.data.response_length[rows].sum())
                    loss.backward()
                    self.apply_gradients(self.adam)
                    losses.append(loss.item())
                    tokens = int(self.data.response_length[rows].sum())
                    self.accounts["gradient_tokens"] += tokens
                    session.on_step(tokens)
                    if self.num_timesteps >= session.total:
                        break
                score = self.score()
                if score > best_score:
                    best, best_score = self.weights(), score
                self.logger.record("train/loss", float(np.mean(losses)))
                self.logger.record("train/validation_loss", self.validation_loss())
                self.logger.record("train/validation_score", score)
                session.iteration_done()
        self.policy.model.load_state_dict(best)
        self.policy.invalidate()
        return self

    def minibatches(self) -> list[NDArray[np.int64]]:
        """One epoch, in a fresh order."""
        count = -(-len(self.training) // self.config.minibatch_episodes)
        return np.array_split(self.rng.permutation(self.training), count)

    def score(self) -> float:
        """What weights are selected by."""
        return -self.validation_loss() if self.validation_score is None else self.validation_score(self)

    def validation_loss(self) -> float:
        """On held-out demonstrations, nats per response token."""
        part = self.data.prompt_length[self.validation], self.data.response_length[self.validation]
        log_probs = self.policy.lm.score(self.data.tokens[self.validation], *part)
        return float(-log_probs.sum() / part[1].sum())

    def weights(self) -> dict[str, torch.Tensor]:
        """A copy."""
        return copy.deepcopy(self.policy.model.state_dict())

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Adam of the policy."""
        return {"adam": self.adam}


def cosine(share: float, floor: float) -> float:
    """From 1 down to `floor` as `share` goes from 0 to 1."""
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * share))


def pack(pairs: list[tuple[NDArray[np.int64], NDArray[np.int64]]], width: int, padding: int) -> Demonstrations:
    """Put (prompt, response) pairs into one array.

    Raises:
        ValueError: One does not fit into `width` tokens.
    """
    tokens = np.full((len(pairs), width), padding, np.int64)
    for row, (prompt, response) in zip(tokens, pairs, strict=True):
        if len(prompt) + len(response) > width:
            raise ValueError(
                f"A demonstration of {len(response)} tokens behind a prompt of {len(prompt)} does not fit into {width}: raise "
                "max_new_tokens, or drop long demonstrations."
            )
        row[: len(prompt)], row[len(prompt) : len(prompt) + len(response)] = prompt, response
    return Demonstrations(
        tokens,
        np.asarray([len(prompt) for prompt, _ in pairs], np.int64),
        np.asarray([len(response) for _, response in pairs], np.int64),
    )
