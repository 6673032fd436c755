"""Llama and GPT-2 written out: the same numbers as `transformers`, without the cost of its generality.

What a model of a million parameters takes for a step is mostly Python: hooks, masks, output classes, a cache object per layer.
Here a pass is one loop over layers on tokens that stand back to back, whichever lane or episode they belong to, so nothing is
padded outside attention, and refilled lanes' prompts ride along with the lanes that decode. The parameters are the model's own,
and gradients reach them.

Only what is known by name *and* proven equal to the plain forward pass is written out (`Decoder.of`); everything else keeps
going through `transformers`.

Notation: M tokens, d hidden size, H heads on K key/value heads of size h.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from textenv.attention import Attend, Rows, beginnings, for_attention
from textenv.packed import Packed


class Linear(NamedTuple):
    """A linear layer or a norm, by the dictionary in which its module keeps weight and bias: what is written there is seen here."""

    parameters: dict[str, Any]
    transposed: bool = False
    """Whether the weight is (in, out), as GPT-2 has it. (Those of a `Pair` are (2, in, out).)"""
    adapted: Any = None
    """A layer of `peft` around it, to be called in its place."""
    packed: Packed | None = None
    """Weight and bias for this processor, in place of `parameters`."""


@dataclass(frozen=True)
class NormedLinears:
    """Linear layers side by side that read what a norm makes of the residual stream."""

    norm: Linear
    linears: list[Linear]
    order: Tensor | None = None
    """Of their outputs, where another is wanted than they stand in. Shape: (outputs,)."""


class Layer(NamedTuple):
    """What a layer consists of."""

    qkv: NormedLinears
    attention_out: Linear
    up: NormedLinears
    """Of a gated MLP: the gate, then what passes it."""
    down: Linear


class Decoder:
    """The trunk of a Llama or a GPT-2: from token ids to last hidden states. Made by `Decoder.of`.

    Args:
        trunk: The `transformers` model without its head.

    Raises:
        NotImplementedError: Some part is not known here.
    """

    def __init__(self, trunk: Any) -> None:
        kind, config = type(trunk).__name__, trunk.config
        if kind not in _READERS or trunk.training:
            raise NotImplementedError(kind)
        self._places: list[tuple[Any, str, nn.Module]] = []  # (modules of the parent, name, module) of all that is read
        self.rotation: Tensor | None = None  # Llama's, by position: complex, (L, 1, h / 2)
        self.positions: Linear | None = None  # GPT-2's learned ones
        self.embedding: Linear
        self.padding: int | None = trunk.get_input_embeddings().padding_idx  # a row that gets no gradient
        self.layers: list[Layer]
        self.norm: Linear
        self.eps: float
        self.activation: Callable[[Tensor], Tensor]
        self.gated: bool
        self.heads: int = config.num_attention_heads
        self.kv_heads: int = getattr(config, "num_key_value_heads", None) or self.heads
        self.head_size: int = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        _READERS[kind](self, trunk)
        # sqrt(d eps), which keeps an RMS norm from dividing by 0
        self.floor = torch.tensor((config.hidden_size * self.eps) ** 0.5).to(self.weights)
        self._home = self.weights.device, self.weights.dtype
        if not self._intact(trunk):
            raise NotImplementedError("a hook, which would not be called")

    @classmethod
    def of(cls, trunk: Any) -> Decoder | None:
        """The written-out pass of a trunk, or None where there is none that equals the plain one."""
        known = _KNOWN.get(trunk)
        if known is None or not known._intact(trunk):
            try:
                known = cls(trunk)
            except (NotImplementedError, AttributeError, KeyError):
                return None
            if trunk not in _PROVEN:
                _PROVEN[trunk] = known.equals(trunk)
            if not _PROVEN[trunk]:
                return None
            _KNOWN[trunk] = known
        return known

    def joined(self) -> Decoder:
        """A copy for passes without gradient: what `_joined` computes in each pass is there already, and adapters are merged.

        It does not follow the weights: make it again when they change.
        """
        twin = copy.copy(self)
        with torch.no_grad():
            twin.layers = [
                Layer(
                    _joined(replace(layer.qkv, linears=[_merged(part) for part in layer.qkv.linears])),
                    _turned(_merged(layer.attention_out)),
                    _joined(replace(layer.up, linears=[_merged(part) for part in layer.up.linears])),
                    _turned(_merged(layer.down)),
                )
                for layer in self.layers
            ]
        return twin

    def fused(self) -> Decoder:
        """The same, with query-key-value and gate-up packed."""
        twin = self.joined()
        twin.layers = [layer._replace(qkv=_packed(layer.qkv), up=_packed(layer.up)) for layer in twin.layers]
        return twin

    @property
    def weights(self) -> Tensor:
        """The embedding, to know device and type by. Shape: (V, d)."""
        weight: Tensor = self.embedding.parameters["weight"]
        return weight

    def part(self, parent: nn.Module, name: str) -> Linear:
        """Weight and bias of a plain module, or of one that LoRA has wrapped."""
        module: Any = parent._modules[name]
        self._places.append((parent._modules, name, module))
        adapted = module if _is_lora(module) else None
        if adapted is not None:
            module = adapted.base_layer
        plain = (nn.Linear, Conv1D, nn.Embedding, nn.LayerNorm)
        if type(module) not in plain and type(module).__name__ != "LlamaRMSNorm":
            raise NotImplementedError(f"{type(module).__name__} as {name}")
        return Linear(module._parameters, type(module) is Conv1D, adapted)

    def _intact(self, trunk: Any) -> bool:
        """Whether the trunk still consists of the modules that were read, without hooks."""
        return (
            not trunk.training
            and not trunk._forward_hooks
            and not trunk._forward_pre_hooks
            and (self.weights.device, self.weights.dtype) == self._home
            and all(
                modules.get(name) is module
                and not module._forward_hooks
                and not module._forward_pre_hooks
                and (_is_lora(module) or not hasattr(module, "base_layer"))
                for modules, name, module in self._places
            )
        )

    def __call__(self, ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Last hidden states of tokens that stand back to back. Shapes: (M,), (M,) -> (M, d)."""
        x, rotation = self._embedded(ids, positions), None
        if self.rotation is not None:  # of queries and keys; values are multiplied by 1
            heads = self.rotation[positions].expand(-1, self.heads + self.kv_heads, -1)
            rotation = torch.cat([heads, torch.ones_like(heads[:, : self.kv_heads])], dim=1)
        for i, layer in enumerate(self.layers):
            qkv = self._heads_of(self._apply(x, layer.qkv))
            if rotation is not None:
                pairs = torch.view_as_complex(qkv.float().view(*rotation.shape, 2))
                qkv = torch.view_as_real(pairs * rotation).view(qkv.shape).to(qkv.dtype)
            x = _linear_and_add(self._features_of(attend(i, qkv)).to(x.dtype), layer.attention_out, x)
            up = self._apply(x, layer.up)
            if self.gated:
                gate, up = up.chunk(2, dim=-1)
                up = self.activation(gate) * up if torch.is_grad_enabled() else self.activation(gate).mul_(up)
            else:
                up = self.activation(up)
            x = _linear_and_add(up, layer.down, x)
        return self._normed(x, self.norm)

    # These, and `_normed`, are other in a `Pair`, whose weights have three dimensions.

    def _embedded(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Shapes: (M,), (M,) -> (M, d)."""
        x = F.embedding(ids, self.weights, self.padding)
        return x if self.positions is None else x + F.embedding(positions, self.positions.parameters["weight"])

    def _heads_of(self, qkv: Tensor) -> Tensor:
        """Shape: (M, (H + 2 K) h) -> (M, H + 2 K, h)."""
        return for_attention(qkv).contiguous().view(len(qkv), -1, self.head_size)

    def _features_of(self, heads: Tensor) -> Tensor:
        """Of what attention returns. Shape: (M, H h) -> (M, H h)."""
        return heads

    def _apply(self, x: Tensor, layers: NormedLinears) -> Tensor:
        """Shape: (M, d) -> (M, outputs)."""
        if x.shape[-2] >= JOIN_FROM * x.shape[-1]:
            layers = _joined(layers)
        x = self._normed(x, layers.norm)
        if len(layers.linears) == 1:
            return _linear(x, layers.linears[0])
        out = torch.cat([_linear(x, part) for part in layers.linears], dim=-1)
        return out if layers.order is None else out.index_select(1, layers.order)

    def _normed(self, x: Tensor, norm: Linear) -> Tensor:
        weight = norm.parameters["weight"]
        if "bias" in norm.parameters:
            return torch.layer_norm(x, x.shape[-1:], weight, norm.parameters["bias"], self.eps)
        if weight is not None and x.dtype != torch.float32:
            return torch.rms_norm(x, x.shape[-1:], weight, self.eps)
        unit = x / torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), self.floor)  # rms_norm: six kernels
        return unit if weight is None else unit * (weight * x.shape[-1] ** 0.5)

    @torch.no_grad()
    def equals(self, trunk: Any) -> bool:
        """Whether the plain forward pass says the same of three random rows of different lengths."""
        lengths = np.array([16, 5, 1])
        limit = getattr(trunk.config, "max_position_embeddings", None)
        lengths = np.minimum(lengths, limit or 16)
        tokens = np.random.default_rng(0).integers(len(self.weights), size=(3, 16))
        states, number = self.of_rows(tokens, lengths)
        for row, n, at in zip(tokens, lengths, number, strict=True):
            ids = torch.from_numpy(row[None, :n]).to(states.device)
            plain = trunk(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).last_hidden_state[0]
            bound = (1e-4 if self.weights.dtype == torch.float32 else 5e-2) * max(1.0, plain.abs().max().item())
            if not (states[torch.from_numpy(at[:n])] - plain).abs().max().item() <= bound:
                return False
        return True

    def of_rows(self, tokens: NDArray[np.int64], lengths: NDArray[np.int64]) -> tuple[Tensor, NDArray[np.int64]]:
        """Last hidden states of right-padded rows. Padding costs nothing; what rows have in common at their beginning is computed once where that pays.

        Args:
            tokens: Shape: (B, L).
            lengths: Shape: (B,).

        Returns:
            States back to back, and the number of each token's state (anything in padding). Shapes: (M, d), (B, max(lengths)).
        """
        device = self.weights.device
        home, number = beginnings(tokens, lengths)
        ids = torch.from_numpy(tokens[:, : home.shape[1]][home]).to(device)
        place = torch.from_numpy(np.nonzero(home)[1]).to(device)
        return self(ids, place, Rows(self, home, number)), number


# ---------------------------------------------------------------------- linear layers


def _linear(x: Tensor, linear: Linear) -> Tensor:
    if linear.packed is not None:
        return linear.packed(x)
    if linear.adapted is not None:
        return linear.adapted(x)
    weight, bias = linear.parameters["weight"], linear.parameters["bias"]
    if weight.dim() == 3:
        return torch.bmm(x, weight) if bias is None else torch.baddbmm(bias, x, weight)
    if linear.transposed:
        return torch.addmm(bias, x, weight)
    return F.linear(x, weight, bias)


def _linear_and_add(x: Tensor, linear: Linear, to: Tensor) -> Tensor:
    if linear.adapted is not None:
        return to + linear.adapted(x)
    weight, bias = linear.parameters["weight"], linear.parameters["bias"]
    if weight.dim() == 3:
        out = torch.baddbmm(to, x, weight)
    else:
        out = torch.addmm(to, x, weight if linear.transposed else weight.t())
    return out if bias is None else out + bias


def _is_lora(module: Any) -> bool:
    """Whether this is the plain kind of LoRA (Hu et al., 2021), W + s B A, by `peft`, in use and not merged already."""
    return (
        type(module).__module__ == "peft.tuners.lora.layer"
        and type(module).__name__ == "Linear"
        and not (module.merged or module.disable_adapters or module.lora_variant or any(module.lora_bias.values()))
    )


def _merged(linear: Linear) -> Linear:
    """An adapted layer as a plain one, with a weight of its own."""
    if linear.adapted is None:
        return linear
    with torch.no_grad():
        weight = linear.parameters["weight"].clone()
        for name in linear.adapted.active_adapters:
            if name in linear.adapted.lora_A:
                weight += linear.adapted.get_delta_weight(name)
    return Linear({"weight": weight, "bias": linear.parameters["bias"]}, linear.transposed)


def _turned(linear: Linear) -> Linear:
    """The same, with its weight as (in, out): one view instead of one in every pass."""
    if linear.transposed:
        return linear
    return Linear({"weight": linear.parameters["weight"].t(), "bias": linear.parameters["bias"]}, transposed=True)


def _packed(layers: NormedLinears) -> NormedLinears:
    """One matrix packed, where that pays."""
    (linear,) = layers.linears
    weight, bias = linear.parameters["weight"], linear.parameters["bias"]
    packed = Packed.of(weight.t() if linear.transposed else weight, bias, any_layout=True)
    return layers if packed is None else replace(layers, linears=[Linear({}, packed=packed)])


JOIN_FROM = 2
"""Where a pass has so many times as many tokens as features, copying (3 d, d) weights costs less than (M, 3 d) states (d of 128 and 288)."""


def _joined(layers: NormedLinears) -> NormedLinears:
    """The same with one matrix, in order, and an RMS norm's weights in it.

    Adapters stay as they are. Norms are joined in float32 only, for half precision would be rounded twice; sqrt(d), which is
    left of the norm's mean over features, is in the matrix too.
    """
    norm, linears, order = layers.norm, layers.linears, layers.order
    scale = norm.parameters["weight"] if "bias" not in norm.parameters else None
    if scale is not None and scale.dtype != torch.float32:
        scale = None
    if any(part.adapted for part in linears) or (len(linears) == 1 and order is None and scale is None):
        return layers
    weight = torch.cat([part.parameters["weight"] for part in linears])
    bias = None if linears[0].parameters["bias"] is None else torch.cat([part.parameters["bias"] for part in linears])
    if order is not None:
        weight, bias = weight.index_select(0, order), bias if bias is None else bias.index_select(0, order)
    if scale is not None:
        weight, norm = weight * (scale * len(scale) ** 0.5), Linear({"weight": None})
    return NormedLinears(norm, [Linear({"weight": weight, "bias": bias})])


# ---------------------------------------------------------------------- reading a trunk


def _read_llama(decoder: Decoder, trunk: Any) -> None:
    config = trunk.config
    if config.rope_parameters["rope_type"] != "default":
        raise NotImplementedError("a rotation that may depend on the length")
    decoder.rotation = _rotation(trunk)
    decoder.eps, decoder.activation, decoder.gated = config.rms_norm_eps, _ACTIVATIONS[config.hidden_act], True
    decoder.embedding, decoder.norm = decoder.part(trunk, "embed_tokens"), decoder.part(trunk, "norm")
    rotated, size = decoder.heads + decoder.kv_heads, decoder.head_size
    places = torch.arange((rotated + decoder.kv_heads) * size, device=decoder.weights.device).view(-1, size)
    pairs = places[:rotated].view(rotated, 2, -1).mT.reshape(rotated, size)  # what is rotated together side by side
    order = torch.cat([pairs, places[rotated:]]).flatten()
    decoder.layers = [
        Layer(
            qkv=NormedLinears(
                decoder.part(layer, "input_layernorm"),
                [decoder.part(layer.self_attn, name) for name in ("q_proj", "k_proj", "v_proj")],
                order,
            ),
            attention_out=decoder.part(layer.self_attn, "o_proj"),
            up=NormedLinears(
                decoder.part(layer, "post_attention_layernorm"),
                [decoder.part(layer.mlp, name) for name in ("gate_proj", "up_proj")],
            ),
            down=decoder.part(layer.mlp, "down_proj"),
        )
        for layer in trunk.layers
    ]


def _rotation(trunk: Any) -> Tensor:
    """The rotation of a head by its position, as factors of pairs of features. Shape: (L, 1, h / 2), complex."""
    with torch.no_grad():
        places = torch.arange(trunk.config.max_position_embeddings, device=trunk.rotary_emb.inv_freq.device)
        cos, sin = (x[0, :, None] for x in trunk.rotary_emb(places[:0].float(), places[None]))
        return torch.complex(*(x[..., : x.shape[-1] // 2].contiguous() for x in (cos, sin)))


def _read_gpt2(decoder: Decoder, trunk: Any) -> None:
    config = trunk.config
    plain = config.scale_attn_weights and not config.scale_attn_by_inverse_layer_idx
    if not plain or config.reorder_and_upcast_attn or config.add_cross_attention:
        raise NotImplementedError("attention of another kind")
    decoder.positions = decoder.part(trunk, "wpe")
    decoder.eps, decoder.gated = config.layer_norm_epsilon, False
    decoder.activation = _ACTIVATIONS[config.activation_function]
    decoder.embedding, decoder.norm = decoder.part(trunk, "wte"), decoder.part(trunk, "ln_f")
    decoder.layers = [
        Layer(
            qkv=NormedLinears(decoder.part(layer, "ln_1"), [decoder.part(layer.attn, "c_attn")]),
            attention_out=decoder.part(layer.attn, "c_proj"),
            up=NormedLinears(decoder.part(layer, "ln_2"), [decoder.part(layer.mlp, "c_fc")]),
            down=decoder.part(layer.mlp, "c_proj"),
        )
        for layer in trunk.h
    ]


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "relu": torch.relu,
    "gelu": F.gelu,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
}
_KNOWN: WeakKeyDictionary[nn.Module, Decoder] = WeakKeyDictionary()
"""What has been read."""
_PROVEN: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
"""Trunks that have been compared with their plain forward pass, and the outcome."""
_READERS: dict[str, Callable[[Decoder, Any], None]] = {"LlamaModel": _read_llama, "GPT2Model": _read_gpt2}
