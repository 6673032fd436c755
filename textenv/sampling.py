"""The behaviour distribution: the one object that is sampled, scored and trained.

Temperature, top-k, top-p and action masks are applied here and nowhere else, so sampling and scoring cannot disagree.
A policy scored without the temperature or the truncation it sampled with drifts from its reference at once
(see https://huggingface.co/blog/the_n_implementation_details_of_rlhf_with_ppo, "policy details" 1).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

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
        mask = np.asarray(mask)
        if mask.shape not in (shape, (vocab_size,)):
            raise ValueError(
                f"Expected the action mask of {shape[0]} observations to have the shape {shape}, got {mask.shape}."
            )
        mask = np.array(np.broadcast_to(mask, shape))
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
    """The log-probability of `actions` under `logits`. Differentiable. Shapes: (M, V), (M,) -> (M,). Unit: nats."""
    value: torch.Tensor = _Scores.apply(logits, actions, False)[0]  # type: ignore[no-untyped-call]  # torch has no annotation for it
    return value


def log_prob_and_entropy(logits: torch.Tensor, actions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`log_prob`, and `entropy` without its gradient, from one softmax. Shapes: (M, V), (M,) -> (M,), (M,). Unit: nats."""
    values: tuple[torch.Tensor, torch.Tensor] = _Scores.apply(logits, actions, True)[:2]  # type: ignore[no-untyped-call]  # torch has no annotation for it
    return values


class _Scores(torch.autograd.Function):
    """Keeps the probabilities, which are all that the gradient needs: the logits can be freed, and no softmax is taken twice."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, actions: torch.Tensor, with_entropy: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        ctx.set_materialize_grads(False)
        p = logits.softmax(dim=-1)
        ctx.save_for_backward(p, actions)
        chosen = logits.gather(-1, actions[..., None]).squeeze(-1) - log_sum_exp(logits, p)
        uncertainty = _entropy(logits, p) if with_entropy else None
        if uncertainty is not None:
            ctx.mark_non_differentiable(uncertainty)
        # p, too, for second derivatives: of what is kept, autograd follows inputs and outputs alone
        return chosen, uncertainty, p

    @staticmethod
    def backward(
        ctx: Any, gradient: torch.Tensor | None, _: Any, gradient_of_p: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, None, None]:
        p, actions = ctx.saved_tensors
        out = None
        if gradient is not None:
            out = (p * -gradient[..., None]).scatter_add_(-1, actions[..., None], gradient[..., None])
        if gradient_of_p is not None:
            through_p = p * (gradient_of_p - (gradient_of_p * p).sum(dim=-1, keepdim=True))
            out = through_p if out is None else out + through_p
        return out, None, None


def log_sum_exp(logits: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
    """`logsumexp`, from the softmax that is at hand: half its cost on a CPU. Shapes: (M, V), (M, V) -> (M,)."""
    return logits.amax(dim=-1) - probabilities.amax(dim=-1).log()


def entropy(logits: torch.Tensor) -> torch.Tensor:
    """Of the distribution. Differentiable. Shape: (M, V) -> (M,). Unit: nats."""
    if torch.is_grad_enabled() and logits.requires_grad:
        log_p = logits.log_softmax(dim=-1)
        return -(log_p.exp() * log_p.clamp(min=-1e9)).sum(dim=-1)
    return _entropy(logits, logits.softmax(dim=-1))


ENTROPY_AT_ONCE = 1 << 18
"""Logits that a processor's cache holds together with their products with probabilities."""


def _entropy(logits: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """On a CPU a few rows at a time: an array of (M, V) costs more to be made than to be summed."""
    rows = max(1, ENTROPY_AT_ONCE // logits.shape[-1]) if logits.device.type == "cpu" else len(logits)
    highest = logits.amax(dim=-1, keepdim=True)  # taken off first: an offset of all logits would cost digits
    parts = zip(logits.split(rows), highest.split(rows), p.split(rows), strict=True)
    mean = torch.cat([((x - top) * q).nansum(dim=-1) for x, top, q in parts])  # -inf times 0 counts nothing
    return -p.amax(dim=-1).log() - mean


DRAW_DIRECTLY = 2_048
"""The largest vocabulary whose cumulative distribution is written out. Of a larger one, blocks are summed and one is searched."""
DRAW_BLOCK = 256
"""Tokens of a block."""
DRAW_AT_ONCE, DRAW_DIRECTLY_AT_ONCE = 1 << 19, 1 << 16
"""Probabilities that a processor's cache holds, in blocks or with their sums in float64: rows are drawn in groups of so many."""


def draw(logits: torch.Tensor, uniforms: NDArray[np.float64]) -> torch.Tensor:
    """Draw one token per row. See `draw_scored`. Shapes: (N, V), (N,) -> (N,)."""
    return draw_scored(logits, uniforms)[0]


def draw_scored(logits: torch.Tensor, uniforms: NDArray[np.float64]) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one token per row by the inverse of the cumulative distribution, and give its log-probability.

    `torch.multinomial` draws V exponentials per row, half of a decoding step at V = 32,000 on a CPU; this draws one
    uniform. The row's softmax serves drawing and scoring.

    Args:
        logits: `-inf` where forbidden. Shape: (N, V).
        uniforms: In [0, 1). Shape: (N,).

    Returns:
        Token ids and log-probabilities in nats. Shapes: (N,), (N,).
    """
    size = logits.shape[-1]
    at_once = max(1, (DRAW_DIRECTLY_AT_ONCE if size <= DRAW_DIRECTLY else DRAW_AT_ONCE) // size)
    u = torch.from_numpy(np.asarray(uniforms, np.float64)).to(logits.device)
    if len(logits) > at_once and logits.device.type == "cpu":
        parts = [_draw_rows(rows, v) for rows, v in zip(logits.split(at_once), u.split(at_once), strict=True)]
        tokens, scores = (torch.cat(column) for column in zip(*parts, strict=True))
        return tokens, scores
    return _draw_rows(logits, u)


def _draw_rows(logits: torch.Tensor, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    p, u = logits.softmax(dim=-1), u[:, None]
    size = p.shape[-1]
    if size <= DRAW_DIRECTLY:
        cdf = p.cumsum(dim=-1, dtype=torch.float64)
        tokens = _invert(cdf, u * cdf[:, -1:])
    else:
        whole = size // DRAW_BLOCK * DRAW_BLOCK
        sums = p[:, :whole].unflatten(1, (-1, DRAW_BLOCK)).sum(dim=-1)
        if whole < size:
            sums = torch.cat([sums, p[:, whole:].sum(dim=-1, keepdim=True)], dim=1)
        cdf = sums.cumsum(dim=-1, dtype=torch.float64)
        target = u * cdf[:, -1:]
        block = _invert(cdf, target)
        before = cdf.gather(1, (block - 1).clamp(min=0)).masked_fill_(block == 0, 0.0)
        place = block * DRAW_BLOCK + torch.arange(DRAW_BLOCK, device=p.device)
        inside = p.gather(1, place.clamp(max=size - 1)).masked_fill_(place >= size, 0.0)
        within = _invert(inside.cumsum(dim=-1, dtype=torch.float64), (target - before).clamp(min=0.0))
        tokens = block * DRAW_BLOCK + within
    return tokens.squeeze(1), logits.gather(1, tokens).squeeze(1) - log_sum_exp(logits, p)  # as `log_prob`, to the bit


def _invert(cdf: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Where a cumulative sum passes `target`. Shapes: (N, n), (N, 1) -> (N, 1).

    `right=True` because with `right=False` a target of exactly 0 picks a first token of probability 0; the minimum because
    rounding can leave a target at or above the last sum: the last place where the sum still rises is taken.
    """
    below = torch.nextafter(cdf[:, -1:], cdf.new_zeros(()))
    return torch.searchsorted(cdf, torch.minimum(target, below), right=True)
