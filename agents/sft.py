"""Supervised fine-tuning: imitate demonstrations, keep the weights that did best on held-out ones.

    minimise  -E_(x, y)~demonstrations [ log pi(y|x) ]      over response tokens

As in InstructGPT (Ouyang et al., 2022, appendix C.1): several epochs, a cosine to 10% of the learning rate, no warm-up,
selection by a score on validation prompts. That score is minus the validation loss, or yours (a reward model's, say;
the paper found that more epochs overfit the loss and still please people).

Run: textenv train SFT textenv/Prompts-v0 --model MODEL --prompts demonstrations.jsonl
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

from agents.base import AgentConfig, LanguageModelAgent, Learning, MaybeCallback
from textenv.env import TextVectorEnv


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

    A checkpoint holds the selected weights; going on from it begins a new cosine, so unlike with the other agents N steps
    and N more are not 2N.

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

    def learn(self, total_timesteps: int, callback: MaybeCallback = None, progress_bar: bool = False) -> Self:
        """Train on `total_timesteps` response tokens, and take the weights of the best epoch.

        Raises:
            ValueError: The environment has no demonstrations, or fewer than two.
        """
        self.data, self.training, self.validation = self.split()
        best, best_score = self.weights(), self.score()
        with self.start_learning(total_timesteps, callback, progress_bar) as session:
            while session.more():
                losses: list[float] = []
                try:
                    self.epoch(session, losses)
                finally:  # an epoch that a callback has cut short is judged like any other
                    if (score := self.score()) > best_score:
                        best, best_score = self.weights(), score
                self.logger.record("train/loss", float(np.mean(losses)))
                self.logger.record("train/validation_loss", self.validation_loss())
                self.logger.record("train/validation_score", score)
                session.iteration_done()
        self.policy.model.load_state_dict(best)
        self.policy.invalidate()
        return self

    def epoch(self, session: Learning, losses: list[float]) -> None:
        """One pass over the demonstrations, or what is left of the session."""
        for rows in self.minibatches():
            share = min(1.0, (self.num_timesteps - session.begin) / (session.total - session.begin))
            for group in self.adam.param_groups:
                group["lr"] = self.learning_rate * cosine(share, self.config.final_learning_rate)
            tokens = int(self.data.response_length[rows].sum())
            log_probs, _, _ = self.policy.evaluate(self.data, rows)
            loss = -log_probs.sum() / tokens
            loss.backward()
            self.apply_gradients(self.adam)
            losses.append(loss.item())
            self.accounts["gradient_tokens"] += tokens
            session.on_step(tokens)
            if self.num_timesteps >= session.total:
                return

    def split(self) -> tuple[Demonstrations, NDArray[np.int64], NDArray[np.int64]]:
        """The demonstrations, and which of them are for training and for validation."""
        data = pack(self.lanes.demonstrations, self.lanes)
        # Held out by position in a fixed permutation: the same for every seed, so that scores can be compared.
        order = np.random.default_rng(0).permutation(len(data.tokens))
        held_out = max(1, round(self.config.validation_fraction * len(order)))
        if held_out >= len(order):
            raise ValueError(
                f"Expected at least 2 demonstrations, to learn from and to select by; {len(order)} of the "
                f"{len(self.lanes.task.prompts)} prompts of this split have one."
            )
        return data, np.sort(order[held_out:]), np.sort(order[:held_out])

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


def pack(pairs: list[tuple[NDArray[np.int64], NDArray[np.int64]]], lanes: TextVectorEnv) -> Demonstrations:
    """Put (prompt, response) pairs into one array, as wide as the environment's observations.

    Raises:
        ValueError: A response is longer than the environment's budget.
    """
    budget = lanes.task.max_new_tokens
    tokens = np.full((len(pairs), lanes.max_tokens), lanes.vocab_size, np.int64)
    for row, (prompt, response) in zip(tokens, pairs, strict=True):
        if len(response) > budget:
            raise ValueError(
                f"A demonstration has {len(response)} tokens, more than max_new_tokens={budget}: no episode could repeat it. Raise "
                "max_new_tokens, or drop long demonstrations."
            )
        row[: len(prompt)], row[len(prompt) : len(prompt) + len(response)] = prompt, response
    return Demonstrations(
        tokens,
        np.asarray([len(prompt) for prompt, _ in pairs], np.int64),
        np.asarray([len(response) for _, response in pairs], np.int64),
    )
