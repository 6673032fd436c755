"""Muon: steps of orthogonal direction for the matrices of a small language model.

Jordan et al. (2024), https://kellerjordan.github.io/posts/muon/. The momentum of each hidden weight matrix is replaced by the
nearest matrix with singular values of about one, so that rare directions move as far as common ones. A small model learns
to copy from its prompt, which comes as a sudden transition, in fewer tokens than with AdamW.

Why not `torch.optim.Muon`: it iterates in bfloat16, which processors without such instructions run thirty times slower.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class Muon(torch.optim.AdamW):
    """Muon for the hidden matrices of a `transformers` model, AdamW for embeddings, heads and vectors.

    Args:
        model: Its `nn.Linear` layers inside `base_model` are the hidden matrices.
        lr: Step size of AdamW.
        matrix_lr: Step size of Muon: the spectral norm of a step, about.
        betas: AdamW's.
        weight_decay: Of Muon's matrices and of AdamW's; vectors have none.
        momentum: Muon's.
        iterations: Newton-Schulz iterations per step.
    """

    def __init__(
        self,
        model: Any,
        lr: float,
        matrix_lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.01,
        momentum: float = 0.95,
        iterations: int = 5,
    ) -> None:
        hidden = [m.weight for m in model.base_model.modules() if isinstance(m, nn.Linear) and m.weight.requires_grad]
        known = {id(p) for p in hidden}
        others = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
        groups: list[dict[str, Any]] = [
            {"params": hidden, "lr": matrix_lr},
            {"params": [p for p in others if p.dim() >= 2]},
            {"params": [p for p in others if p.dim() < 2], "weight_decay": 0.0},
        ]
        super().__init__([g for g in groups if g["params"]], lr=lr, betas=betas, weight_decay=weight_decay)
        self.hidden = hidden
        self.momentum, self.iterations = momentum, iterations

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One step of both."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        group = self.param_groups[0]
        shapes: dict[torch.Size, list[tuple[torch.Tensor, torch.Tensor]]] = defaultdict(list)
        for weight in self.hidden:
            if weight.grad is None:
                continue
            state = self.state[weight]
            if not state:  # `step` because AdamW expects it of every state that it loads
                state.update(step=torch.tensor(0.0), momentum=torch.zeros_like(weight))
            state["step"] += 1
            average = state["momentum"]
            average.lerp_(weight.grad, 1 - self.momentum)
            shapes[weight.shape].append((weight, weight.grad.lerp(average, self.momentum)))
            weight.grad = None  # done: AdamW passes over what has no gradient
        for (rows, columns), pairs in shapes.items():
            steps = orthogonalize(torch.stack([step for _, step in pairs]), self.iterations)
            for (weight, _), step in zip(pairs, steps, strict=True):
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(step, alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5)
        super().step()
        return loss


def orthogonalize(matrices: torch.Tensor, iterations: int = 5) -> torch.Tensor:
    """Move all singular values towards 1 (to within 0.7 and 1.2) by a quintic Newton-Schulz iteration.

    Args:
        matrices: Shape: (K, m, n).
        iterations: 5 suffice for condition numbers up to some hundreds.

    Returns:
        Shape: (K, m, n).
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x
