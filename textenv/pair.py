"""Two small models as one: what a policy and its reference say of the same lanes, in one pass.

A step of a small model is some hundred operations of a few microseconds each, and two models take hardly more of them than one if
their features stand side by side, as (2, M, d). To attention, and to the store of keys and values, they are one model with twice the
heads.

Notation: M tokens, d hidden size, H heads on K key/value heads of size h.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from textenv.decoder import Decoder, Layer, Linear, NormedLinears
from textenv.packed import LARGE

MULTIPLE = 16
"""Of which all widths are: then a processor treats both models alike to the last bit, and equal models give equal numbers."""


def pairable(a: nn.Module, b: nn.Module) -> bool:
    """Whether two trunks are faster in one pass: small ones of one configuration, in float32 on a CPU, of widths that suit.

    Small is without a layer that is packed for any number of rows.
    """
    decoder = Decoder.of(a)
    if decoder is None:
        return False
    joined = [side.linears for layer in decoder.layers for side in (layer.qkv, layer.up)]
    layers = [[part.parameters["weight"] for part in linears] for linears in joined]
    shapes = [[(p.shape, p.dtype, p.device) for p in trunk.parameters()] for trunk in (a, b)]
    return (
        decoder.weights.device.type == "cpu"
        and decoder.weights.dtype == torch.float32
        and all(size % MULTIPLE == 0 for parts in layers for weight in parts for size in weight.shape)
        and all(sum(weight.numel() for weight in parts) < LARGE for parts in layers)
        and shapes[0] == shapes[1]
        and getattr(a, "config", None) == getattr(b, "config", None)
        and Decoder.of(b) is not None
    )


def paired(a: nn.Module, b: nn.Module) -> Pair | None:
    """The passes of two trunks as one, or None where they are not `pairable`."""
    first, second = Decoder.of(a), Decoder.of(b)
    return Pair(first, second) if first is not None and second is not None and pairable(a, b) else None


class Pair(Decoder):
    """The decoders of two trunks that are `pairable`, in one pass without gradient: states are (2, M, d).

    It does not follow the weights: make it again when they change.
    """

    def __init__(self, a: Decoder, b: Decoder) -> None:
        a, b = a.joined(), b.joined()
        vars(self).update(vars(a))
        self.both = a, b
        self.heads, self.kv_heads = 2 * a.heads, 2 * a.kv_heads
        self.norm = _both_norms(a.norm, b.norm)
        self.layers = [
            Layer(
                NormedLinears(_both_norms(x.qkv.norm, y.qkv.norm), [_both(x.qkv.linears[0], y.qkv.linears[0])]),
                _both(x.attention_out, y.attention_out),
                NormedLinears(_both_norms(x.up.norm, y.up.norm), [_both(x.up.linears[0], y.up.linears[0])]),
                _both(x.down, y.down),
            )
            for x, y in zip(a.layers, b.layers, strict=True)
        ]

    def _embedded(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Shapes: (M,), (M,) -> (2, M, d)."""
        return torch.stack([one._embedded(ids, positions) for one in self.both])

    def _heads_of(self, qkv: Tensor) -> Tensor:
        """Queries of both, keys of both, values of both. Shape: (2, M, (H + 2 K) h) -> (M, 2 H + 4 K, h)."""
        heads, kv_heads = self.both[0].heads, self.both[0].kv_heads
        parts = qkv.unflatten(2, (-1, self.head_size)).split([heads, kv_heads, kv_heads], dim=2)
        return torch.cat([one for part in parts for one in part], dim=1)

    def _features_of(self, heads: Tensor) -> Tensor:
        """Shape: (M, 2 H h) -> (2, M, H h)."""
        return heads.unflatten(1, (2, -1)).transpose(0, 1)

    def _normed(self, x: Tensor, norm: Linear) -> Tensor:
        """Shape: (2, M, d) -> (2, M, d)."""
        if "bias" not in norm.parameters:
            return super()._normed(x, norm)
        unit = torch.layer_norm(x, x.shape[-1:], None, None, self.eps)
        return torch.addcmul(norm.parameters["bias"], unit, norm.parameters["weight"])


def _both(a: Linear, b: Linear) -> Linear:
    """Weights (2, inputs, outputs), biases (2, 1, outputs)."""
    weights = [part.parameters["weight"].detach() for part in (a, b)]
    weight = torch.stack(weights if a.transposed else [w.t() for w in weights])
    return Linear({"weight": weight, "bias": _stacked(a, b, "bias")})


def _both_norms(a: Linear, b: Linear) -> Linear:
    """Weights and biases (2, 1, d), where there are any."""
    return Linear({name: _stacked(a, b, name) for name in a.parameters})


def _stacked(a: Linear, b: Linear, name: str) -> Tensor | None:
    """Vectors, as a row for each model: (n,) -> (2, 1, n)."""
    if a.parameters[name] is None:
        return None
    return torch.stack([part.parameters[name].detach() for part in (a, b)])[:, None]
