"""Advantages and reductions as pure functions of tensors.

Notation: B episodes, T response tokens at most. `mask` is True at response tokens; entries outside it are 0.
"""

from __future__ import annotations

import torch


def gae(
    rewards: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    gamma: float = 1.0,
    lam: float = 0.95,
    bootstrap: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimation (Schulman et al., 2016, https://arxiv.org/abs/1506.02438, eq. 16).

    `delta_t = r_t + gamma V(s_{t+1}) - V(s_t)` and `A_t = sum_k (gamma lam)^k delta_{t+k}`, each row an episode of its own.

    Args:
        rewards: Paid for the t-th token. Shape: (B, T).
        values: V of the state *before* the t-th token. Shape: (B, T).
        mask: Shape: (B, T).
        gamma: Discount. 1 for language: the closed form of the optimum needs it.
        lam: 1 gives the return minus V; 0 the one-step error.
        bootstrap: V of the state after the last token where a wrapper has cut the episode. 0 where it ended. Shape: (B,).

    Returns:
        Advantages and value targets (advantages + values), 0 outside the mask. Shapes: (B, T), (B, T).
    """
    mask = mask.to(values.dtype)
    next_value = torch.zeros_like(values[:, 0]) if bootstrap is None else bootstrap
    next_advantage = torch.zeros_like(values[:, 0])
    advantages = torch.zeros_like(values)
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantages[:, t] = mask[:, t] * (delta + gamma * lam * next_advantage)
        # Past the end of a row nothing has happened yet: what comes after its last token stays as it was.
        next_value = torch.where(mask[:, t] > 0, values[:, t], next_value)
        next_advantage = torch.where(mask[:, t] > 0, advantages[:, t], next_advantage)
    return advantages, (advantages + values) * mask


def masked_mean(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over True entries. Shapes: (B, T), (B, T) -> ()."""
    return (x * mask).sum() / mask.sum().clamp(min=1)


def whiten(x: torch.Tensor, mask: torch.Tensor, shift_mean: bool = True) -> torch.Tensor:
    """Scale to unit (population) variance over the mask, and to mean 0 unless `shift_mean` is False. Shape: (B, T).

    As in https://github.com/openai/lm-human-preferences (`whiten`): `(x - mean) * rsqrt(var + 1e-8)`.
    """
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    scaled = (x - mean) * torch.rsqrt(variance + 1e-8)
    return (scaled if shift_mean else scaled + mean) * mask
