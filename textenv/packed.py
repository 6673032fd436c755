"""Linear layers, without gradient, by weights that oneDNN has laid out for this processor."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

PACK_FROM, LARGE = 40_000, 100_000
"""Weights of a layer that is packed, and of one that is packed for any number of rows."""

FEW_ROWS = 64
"""So few rows are not worth the 30 microseconds that go before a packed product begins, unless the layer is large."""

WIDE = 4
"""With so many times as many outputs as inputs, few rows are multiplied from the other side if the result may lie feature by feature:
two threads are a quarter faster."""

EVERY_COUNT, ROUND_TO = 128, 16
"""More rows than that are filled up to a multiple of this: the first product of each count costs about a millisecond."""

BFLOAT16_PACKS = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
"""Whether oneDNN computes in bfloat16 on this processor."""


@dataclass(frozen=True)
class Packed:
    """Weight and bias of a layer. It does not follow the weights: make it again when they change."""

    layout: Tensor
    """The weight as oneDNN has it: opaque, it can only be multiplied by."""
    weight: Tensor | None
    """As it was, for few rows; None where the layer is large. Shape: (outputs, inputs)."""
    bias: Tensor | None
    """Shape: (outputs,)."""
    any_layout: bool
    """Whether results may lie feature by feature: softmax, for one, is five times slower on these."""

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None, any_layout: bool = False) -> Packed | None:
        """A layer packed, or None where that does not pay or cannot be. Shapes: (outputs, inputs), (outputs,)."""
        if (
            weight.numel() < PACK_FROM
            or weight.device.type != "cpu"
            or not torch.backends.mkldnn.is_available()
            or not (weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and BFLOAT16_PACKS))
        ):
            return None
        weight = weight.detach().contiguous()
        layout = torch.ops.mkldnn._reorder_linear_weight(weight)
        return cls(layout, None if weight.numel() >= LARGE else weight, bias, any_layout)

    def __call__(self, x: Tensor) -> Tensor:
        """As `torch.nn.functional.linear`. Shape: (M, inputs) -> (M, outputs)."""
        rows = len(x)
        if self.weight is not None and rows <= FEW_ROWS:
            if not self.any_layout or len(self.weight) < WIDE * x.shape[1]:
                return F.linear(x, self.weight, self.bias)
            if self.bias is None:
                return torch.mm(self.weight, x.t()).t()
            return torch.addmm(self.bias[:, None], self.weight, x.t()).t()
        if rows > EVERY_COUNT and (missing := -rows % ROUND_TO):
            x = F.pad(x, (0, 0, 0, missing))
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.layout, self.bias, "none", [], "")
        return out[:rows]
