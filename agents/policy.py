"""The trainable parts: a policy that samples and scores, and a critic that values."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.checkpoint import checkpoint

from agents.adapters import adapted
from textenv.lm import (
    LanguageModel,
    in_chunks,
    length_buckets,
    response_index,
    response_states,
    tokens_per_pass,
    trunk_states,
)
from textenv.prompts import did_you_mean
from textenv.sampling import draw_scored, entropy, log_prob, log_prob_and_entropy


class Responses(Protocol):
    """Prompts with their responses: `textenv.Episodes`, or demonstrations."""

    @property
    def tokens(self) -> NDArray[np.int64]:
        """Prompt, response, padding. Shape: (B, L)."""
        ...

    @property
    def prompt_length(self) -> NDArray[np.int64]:
        """Shape: (B,)."""
        ...

    @property
    def response_length(self) -> NDArray[np.int64]:
        """Shape: (B,)."""
        ...


class Policy:
    """A language model that acts: one distribution for sampling, scoring and training.

    Args:
        reference: The environment's reference model; the policy starts as a copy of it, under its temperature and action mask.
        top_k: Truncate to the k most probable tokens.
        top_p: Truncate to the nucleus of probability p.
        peft_config: Train adapters on the reference's own weights, which stay as they are, instead of a copy of all.

    Attributes:
        lm: The model that is trained.
        adapter: The same as `peft` has it; None without adapters.
    """

    def __init__(
        self,
        reference: LanguageModel,
        top_k: int | None = None,
        top_p: float | None = None,
        peft_config: Any = None,
    ) -> None:
        behaviour = replace(reference.behaviour, top_k=top_k, top_p=top_p)
        self.adapter = None if peft_config is None else adapted(reference.model, peft_config)
        if self.adapter is None:
            self.lm = reference.clone(behaviour)
        else:
            model, settings = self.adapter.get_base_model(), {"check": reference.check, "cached": reference.cached}
            self.lm = LanguageModel(model, reference.max_tokens, behaviour, **settings)
        self.tokens_per_pass: int | None = None  # these two: see `AgentConfig`
        self.rollout_dtype: torch.dtype | None = None
        self._rounded: LanguageModel | None = None
        self._rounded_at = 0  # `lm.generation` then
        self._sampled: tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]] | None = None

    @property
    def model(self) -> Any:
        """The `transformers` model."""
        return self.lm.model

    def parameters(self) -> Iterator[nn.Parameter]:
        """What is trained."""
        return (p for p in self.lm.model.parameters() if p.requires_grad)

    def invalidate(self) -> None:
        """Forget cached computations: the weights have changed."""
        self.lm.invalidate()
        self._sampled = None

    @property
    def sampler(self) -> LanguageModel:
        """What tokens are drawn from: `lm`, or its copy in `rollout_dtype`, as new as its weights."""
        if self.rollout_dtype is None:
            return self.lm
        self.lm.refresh()
        if self._rounded is None:
            self._rounded = self.lm.clone(trainable=False, dtype=self.rollout_dtype)
        elif self._rounded_at != self.lm.generation:
            with torch.no_grad():
                for rounded, p in zip(self._rounded.model.parameters(), self.model.parameters(), strict=True):
                    rounded.copy_(p)
            self._rounded.invalidate()
        self._rounded_at = self.lm.generation
        return self._rounded

    @torch.no_grad()
    def act(
        self,
        observations: NDArray[np.int64],
        rng: np.random.Generator,
        deterministic: bool = False,
        busy: NDArray[np.bool_] | None = None,
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Choose tokens. Their log-probabilities are kept, so that `log_probs` right after costs nothing.

        Args:
            observations: Shape: (N, L).
            rng: Draws one uniform per lane.
            deterministic: Take the most probable token instead.
            busy: Lanes whose action counts; the others get token 0, unscored (nan), for nothing. None is all. Shape: (N,).

        Returns:
            Token ids and their log-probabilities in nats. Shapes: (N,), (N,).
        """
        logits = self.next_logits(observations)
        lanes = np.arange(len(observations)) if busy is None else np.flatnonzero(busy)
        if len(lanes) < len(observations):
            logits = logits[torch.from_numpy(lanes).to(logits.device)]
        if deterministic:
            tokens = logits.argmax(dim=-1)
            scores = log_prob(logits, tokens)
        else:  # a uniform for each lane, busy or not: what one draws depends on no other
            tokens, scores = draw_scored(logits, rng.random(len(observations))[lanes])
        actions, chosen = np.zeros(len(observations), np.int64), np.full(len(observations), np.nan)
        actions[lanes], chosen[lanes] = tokens.cpu().numpy(), scores.double().cpu().numpy()
        self.remember(observations, actions, chosen)
        return actions, chosen

    def remember(
        self, observations: NDArray[np.int64], actions: NDArray[np.int64], log_probs: NDArray[np.float64]
    ) -> None:
        """Keep what has just been drawn, for `log_probs` to answer with. Shapes: (N, L), (N,), (N,)."""
        self._sampled = (np.array(observations), actions.copy(), log_probs.copy())

    def drew(self, observations: NDArray[np.int64], actions: NDArray[np.int64]) -> bool:
        """Whether this is what was drawn last. Shapes: (N, L), (N,)."""
        if self._sampled is None:
            return False
        seen, taken, _ = self._sampled
        return np.array_equal(seen, observations) and np.array_equal(taken, actions)

    def log_probs(self, observations: NDArray[np.int64], actions: NDArray[np.int64]) -> NDArray[np.float64]:
        """Log-probabilities of `actions`, in nats. Shapes: (N, L), (N,) -> (N,)."""
        if self.lm.refresh():
            self.invalidate()
        if self._sampled is not None and self.drew(observations, actions):
            return self._sampled[2].copy()
        logits = self.next_logits(observations)
        return log_prob(logits, torch.as_tensor(actions, device=logits.device)).double().cpu().numpy()

    def log_probs_all(self, observations: NDArray[np.int64]) -> NDArray[np.float64]:
        """Log-probabilities of every token, in nats. Shape: (N, L) -> (N, V)."""
        return self.next_logits(observations).double().log_softmax(dim=-1).cpu().numpy()

    # Sampling, scoring and training all come through these two: a policy with another distribution overrides both.

    @torch.no_grad()
    def next_logits(self, observations: NDArray[np.int64]) -> torch.Tensor:
        """Logits of the distribution that is sampled, `-inf` where a token cannot be drawn. To be read only. Shape: (N, L) -> (N, V)."""
        lm = self.sampler
        return lm.behaviour.logits(lm.shared_logits(observations), observations)

    def response_logits(
        self,
        hidden: torch.Tensor,
        tokens: NDArray[np.int64],
        prompt_length: NDArray[np.int64],
        response_length: NDArray[np.int64],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same at the states `hidden` of whole responses, and the tokens drawn there. Shapes: (M, V), (M,). Differentiable."""
        return self.lm.response_logits(hidden, tokens, prompt_length, response_length)

    def passes(self, episodes: Responses, rows: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
        """The rows of a minibatch, in passes over rows of like length. Shape: (B,) -> several (C,).

        A loss that is a sum over rows can be differentiated pass by pass: gradients add up, and memory holds one pass.
        """
        rows = np.sort(rows)  # of one length, completions of a prompt stay together
        lengths = episodes.prompt_length[rows] + episodes.response_length[rows]
        tokens = self.tokens_per_pass or tokens_per_pass(self.lm.device, self.lm.vocab_size)
        for i in length_buckets(lengths, tokens):
            yield rows[i]

    def evaluate(
        self, episodes: Responses, rows: NDArray[np.int64], entropy_gradient: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Score responses in teacher-forced passes over rows of like length, never one row per (prefix, token). Differentiable.

        With `tokens_per_pass`, each of several passes is forgotten and computed again in the backward pass.

        Args:
            episodes: Of which `rows` are used.
            rows: Indices. Shape: (B,).
            entropy_gradient: Whether the entropies are differentiable too: that keeps a second (M, V) array.

        Returns:
            Log-probabilities (B, T), entropies (B, T), both in nats and 0 after a response's end; and the hidden states they
            came from, back to back (M, d). T is the longest response among `rows`.
        """
        m, n = episodes.prompt_length[rows], episodes.response_length[rows]
        passes = list(length_buckets(m + n, self.tokens_per_pass or tokens_per_pass(self.lm.device)))
        twice = self.tokens_per_pass is not None and len(passes) > 1 and torch.is_grad_enabled()
        parts = []
        for i in passes:
            part = episodes.tokens[rows[i]], m[i], n[i], entropy_gradient
            if twice:
                parts.append(checkpoint(self._evaluate, *part, use_reentrant=False, preserve_rng_state=False))
            else:
                parts.append(self._evaluate(*part))
        back = in_order(np.concatenate(passes), n).to(self.lm.device)
        log_probs, entropies, hidden = (torch.cat(column).index_select(0, back) for column in zip(*parts, strict=True))
        return unpack(log_probs, n), unpack(entropies, n), hidden

    def _evaluate(
        self,
        tokens: NDArray[np.int64],
        prompt_length: NDArray[np.int64],
        response_length: NDArray[np.int64],
        entropy_gradient: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One pass; everything back to back. Shapes: (M,), (M,), (M, d)."""
        part = tokens, prompt_length, response_length
        hidden = self.lm.response_hidden(*part)
        log_probs, entropies = [], []
        for chunk, states in in_chunks(hidden, part[2], self.lm.vocab_size):
            logits, drawn = self.response_logits(states, *(column[chunk] for column in part))
            scores = (
                (log_prob(logits, drawn), entropy(logits)) if entropy_gradient else log_prob_and_entropy(logits, drawn)
            )
            log_probs.append(scores[0])
            entropies.append(scores[1])
        return torch.cat(log_probs), torch.cat(entropies), hidden


class Critic(nn.Module):
    """V(s): a linear head on a trunk.

    Args:
        policy: Whose trunk it shares (`kind="head"`) or starts from (`"separate"`).
        kind: `"head"` reads the policy's own hidden states; `"separate"` owns a copy of the trunk; anything else names a
            reward model (a directory, or a loaded `rewards.RewardModel`) whose trunk and head it starts from, as in InstructGPT.
    """

    def __init__(self, policy: Policy, kind: Any = "head") -> None:
        super().__init__()
        self.trunk: nn.Module | None = None
        if kind in ("head", "separate"):
            width = policy.model.get_output_embeddings().weight.shape[1]
            self.head = nn.Linear(width, 1)
            nn.init.zeros_(self.head.weight)  # V = 0 at the start: the first advantages are plain returns
            nn.init.zeros_(self.head.bias)
            if kind == "separate":
                self.trunk = policy.lm.clone().model.base_model
        else:
            self.trunk, self.head = _from_reward_model(kind, policy.lm.vocab_size)
        self.to(policy.lm.device)

    def forward(self, hidden: torch.Tensor, episodes: Responses, rows: NDArray[np.int64]) -> torch.Tensor:
        """V of the states before each response token, 0 after a response's end. Differentiable.

        Args:
            hidden: The policy's states at these positions (used by a shared trunk). Shape: (M, d).
            episodes: Of which `rows` are valued.
            rows: Indices. Shape: (B,).

        Returns:
            Shape: (B, T), T the longest response among `rows`.
        """
        m, n = episodes.prompt_length[rows], episodes.response_length[rows]
        if self.trunk is not None:
            hidden = response_states(self.trunk, episodes.tokens[rows], m, n)
        return unpack(self.head(hidden.float()).squeeze(-1), n)

    @torch.no_grad()
    def values(self, policy: Policy, episodes: Responses, rows: NDArray[np.int64]) -> torch.Tensor:
        """As `forward`, without gradient and without the policy's states at hand. Shape: (B, T)."""
        part = episodes.tokens[rows], episodes.prompt_length[rows], episodes.response_length[rows]
        hidden = policy.lm.response_hidden(*part) if self.trunk is None else torch.empty(0)
        return self(hidden, episodes, rows)

    @torch.no_grad()
    def final_values(self, policy: Policy, episodes: Responses, rows: NDArray[np.int64]) -> torch.Tensor:
        """V of the states after the last token, for episodes that a wrapper has cut. Shape: (B,)."""
        lengths = episodes.prompt_length[rows] + episodes.response_length[rows]
        trunk = self.trunk if self.trunk is not None else policy.model.base_model
        states = trunk_states(trunk, episodes.tokens[rows], lengths, np.arange(len(rows)), lengths - 1)
        return self.head(states.float()).squeeze(-1)


def unpack(flat: torch.Tensor, lengths: NDArray[np.int64]) -> torch.Tensor:
    """Rows that stood back to back, padded with 0. Shape: (M,) -> (B, T)."""
    rows, columns = response_index(np.ones_like(lengths), lengths)
    out = flat.new_zeros(len(lengths), int(lengths.max()))
    index = torch.from_numpy(rows).to(flat.device), torch.from_numpy(columns).to(flat.device)
    return out.index_put(index, flat)


def in_order(order: NDArray[np.int64], lengths: NDArray[np.int64]) -> torch.Tensor:
    """Where the tokens of rows 0, 1, ... stand, if the rows stand back to back in this order. Shapes: (B,), (B,) -> (M,)."""
    begin = np.empty_like(lengths)
    begin[order] = np.cumsum(lengths[order]) - lengths[order]
    rows, steps = response_index(np.ones_like(lengths), lengths)
    return torch.from_numpy(begin[rows] + steps)


def _from_reward_model(source: Any, vocab_size: int) -> tuple[nn.Module, nn.Linear]:
    import copy

    from rewards import RewardModel

    if isinstance(source, str | Path) and not Path(source).is_dir():
        raise ValueError(
            f"Expected critic to be 'head', 'separate' or the directory of a reward model, got {str(source)!r}, which is no directory."
            f"{did_you_mean(str(source), ['head', 'separate'])}"
        )
    reward_model = source if isinstance(source, RewardModel) else RewardModel.from_pretrained(source)
    classifier = copy.deepcopy(reward_model.model).requires_grad_(True).eval()
    known = classifier.get_input_embeddings().weight.shape[0]
    if known < vocab_size:
        raise ValueError(
            f"The critic's reward model knows {known} tokens, the policy {vocab_size}: a critic reads the policy's own token ids. Take a "
            "reward model with the policy's tokenizer."
        )
    head = nn.Linear(classifier.score.in_features, 1)
    with torch.no_grad():
        head.weight.copy_(classifier.score.weight)
        head.bias.fill_(-reward_model.offset)
    return classifier.base_model, head
