"""The behaviour distribution: the one object that is sampled, scored and trained.

Temperature, top-k, top-p and action masks are applied here and nowhere else, so sampling and scoring cannot disagree.
A policy scored without the temperature or the truncation it sampled with drifts from its reference at once
(see https://huggingface.co/blog/the_n_implementation_details_of_rlhf_with_ppo, "policy details" 1).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

ActionMask: TypeAlias = "NDArray[np.bool_] | Callable[[NDArray[np.int64]], NDArray[np.bool_]]"
"""Allowed tokens: a fixed (V,) bool array, or a function of observations (N, L) that returns (N, V) bool."""

FORBIDDEN = float("-inf")


@dataclass(frozen=True)
class Behaviour:
    """How raw logits become the distribution that actions are drawn from.

    The environment owns `temperature` and `action_mask` and applies them to policy and reference alike, so the KL
    starts at 0; `top_k` and `top_p` belong to a policy.
    """

    temperature: float = 1.0
    """Divides the logits, in sampling and in scoring."""
    top_k: int | None = None
    """Keep the k most probable tokens (ties with the k-th are kept too)."""
    top_p: float | None = None
    """Keep the smallest set of most probable tokens whose probability reaches p (Holtzman et al., 2020)."""
    action_mask: ActionMask | None = None
    """True where a token is allowed."""

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(
                f"Expected temperature > 0, got {self.temperature}. For the most probable token use predict(..., deterministic=True)."
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"Expected top_k >= 1 or None, got {self.top_k}.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"Expected 0 < top_p <= 1 or None, got {self.top_p}.")

    def allowed(self, observations: NDArray[np.int64], vocab_size: int) -> NDArray[np.bool_]:
        """The action mask at these observations. Shape: (N, L) -> (N, V), True = allowed."""
        shape = (len(observations), vocab_size)
        if self.action_mask is None:
            return np.ones(shape, bool)
        mask = self.action_mask(observations) if callable(self.action_mask) else self.action_mask
        mask = np.array(np.broadcast_to(np.asarray(mask), shape))
        if mask.dtype != np.bool_:
            raise ValueError(f"Expected the action mask to be bool (True = allowed), got dtype {mask.dtype}.")
        if not mask.any(axis=1).all():
            raise ValueError(
                "The action mask forbids every token at some observation: an episode must be able to go on."
            )
        return mask

    def logits(self, raw: torch.Tensor, observations: NDArray[np.int64] | None = None) -> torch.Tensor:
        """The logits of the distribution, `-inf` where a token cannot be drawn. Differentiable.

        Args:
            raw: The model's logits. Shape: (M, V).
            observations: The states they belong to, needed with an action mask only. Shape: (M, L).
        """
        logits = raw if self.temperature == 1.0 else raw / self.temperature
        if self.action_mask is not None:
            if observations is None:
                raise ValueError("An action mask is set: pass the observations that the logits belong to.")
            allowed = torch.from_numpy(self.allowed(observations, raw.shape[-1]))
            logits = logits.masked_fill(~allowed.to(raw.device), FORBIDDEN)
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            kth = logits.detach().topk(self.top_k, dim=-1).values[..., -1:]
            logits = logits.masked_fill(logits < kth, FORBIDDEN)
        if self.top_p is not None and self.top_p < 1:
            ordered, index = logits.detach().sort(dim=-1, descending=True)
            probability = ordered.softmax(dim=-1)
            # A token stays while the mass *before* it is below p, so the most probable token always stays.
            drop = probability.cumsum(dim=-1) - probability >= self.top_p
            logits = logits.masked_fill(torch.zeros_like(drop).scatter(-1, index, drop), FORBIDDEN)
        return logits


def log_prob(logits: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
    """The log-probability of `actions` under `logits`, without a second (M, V) array. Shapes: (M, V), (M,) -> (M,). Unit: nats."""
    return logits.gather(-1, actions[..., None]).squeeze(-1) - logits.logsumexp(dim=-1)


def draw(logits: torch.Tensor, uniforms: NDArray[np.float64]) -> torch.Tensor:
    """Draw one token per row by the inverse of the cumulative distribution.

    `torch.multinomial` draws V exponentials per row, half of a decoding step at V = 32,000 on a CPU; this draws one
    uniform. `right=True` because with `right=False` a uniform of exactly 0 picks a first token of probability 0; the
    clamp because rounding can leave a uniform of 1 - eps at or above the last cumulative sum.

    Args:
        logits: `-inf` where forbidden. Shape: (N, V).
        uniforms: In [0, 1). Shape: (N,).

    Returns:
        Token ids. Shape: (N,).
    """
    cdf = logits.softmax(dim=-1).cumsum(dim=-1)
    threshold = torch.as_tensor(uniforms, dtype=cdf.dtype, device=cdf.device)[:, None] * cdf[:, -1:]
    index = torch.searchsorted(cdf, threshold, right=True).squeeze(-1)
    # The last index at which the cdf still rises is the last token of positive probability.
    last = torch.searchsorted(cdf, cdf[:, -1:].contiguous(), right=False).squeeze(-1)
    return torch.minimum(index, last)
