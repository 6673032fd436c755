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
from typing import Any, NamedTuple, TypeAlias
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

Attend: TypeAlias = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""Attention of a layer: its number, queries (M, H, h), keys and values (M, K, h) -> (M, H h)."""


class _Linear(NamedTuple):
    """A linear layer or a norm, by the dictionary in which its module keeps weight and bias: what is written there is seen here."""

    parameters: dict[str, Any]
    transposed: bool = False
    """Whether the weight is (in, out), as GPT-2 has it."""
    adapted: Any = None
    """A layer of `peft` around it, to be called in its place."""


@dataclass(frozen=True)
class _Layer:
    """Several linear layers in a row are read side by side: query, key, value; gate, up."""

    norm_attention: _Linear
    qkv: list[_Linear]
    attention_out: _Linear
    norm_mlp: _Linear
    up: list[_Linear]
    down: _Linear


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
        self.rotation: tuple[Tensor, Tensor] | None = (
            None  # Llama's, by position: cosine and signed sine, (L, 1, h) each
        )
        self.positions: _Linear | None = None  # GPT-2's learned ones
        self.embedding: _Linear
        self.padding: int | None = trunk.get_input_embeddings().padding_idx  # a row that gets no gradient
        self.layers: list[_Layer]
        self.norm: _Linear
        self.eps: float
        self.activation: Callable[[Tensor], Tensor]
        self.gated: bool
        _READERS[kind](self, trunk)
        self.heads: int = config.num_attention_heads
        self.kv_heads: int = getattr(config, "num_key_value_heads", None) or self.heads
        self.head_size: int = getattr(config, "head_dim", None) or config.hidden_size // self.heads
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

    def fused(self) -> Decoder:
        """A copy for passes without gradient, with fewer calls: query, key and value are one matrix, gate and up another, adapters merged.

        It does not follow the weights: make it again when they change.
        """
        twin = copy.copy(self)
        twin.layers = [
            replace(
                layer,
                qkv=_fused([_merged(part) for part in layer.qkv]),
                attention_out=_merged(layer.attention_out),
                up=_fused([_merged(part) for part in layer.up]),
                down=_merged(layer.down),
            )
            for layer in self.layers
        ]
        return twin

    @property
    def weights(self) -> Tensor:
        """The embedding, to know device and type by. Shape: (V, d)."""
        weight: Tensor = self.embedding.parameters["weight"]
        return weight

    def part(self, parent: nn.Module, name: str) -> _Linear:
        """Weight and bias of a plain module, or of one that LoRA has wrapped."""
        module: Any = parent._modules[name]
        self._places.append((parent._modules, name, module))
        adapted = module if _is_lora(module) else None
        if adapted is not None:
            module = adapted.base_layer
        plain = (nn.Linear, Conv1D, nn.Embedding, nn.LayerNorm)
        if type(module) not in plain and type(module).__name__ != "LlamaRMSNorm":
            raise NotImplementedError(f"{type(module).__name__} as {name}")
        return _Linear(module._parameters, type(module) is Conv1D, adapted)

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
        x = F.embedding(ids, self.weights, self.padding)
        rotation = None
        if self.positions is not None:
            x = x + F.embedding(positions, self.positions.parameters["weight"])
        elif self.rotation is not None:
            rotation = tuple(table[positions].to(x.dtype) for table in self.rotation)
        mixed = self.heads + self.kv_heads
        for i, layer in enumerate(self.layers):
            qkv = _side_by_side(self._normed(x, layer.norm_attention), layer.qkv)
            qkv = qkv.view(len(x), mixed + self.kv_heads, self.head_size)
            qk, v = qkv[:, :mixed], qkv[:, mixed:]
            if rotation is not None:
                qk = torch.addcmul(qk * rotation[0], qk.roll(self.head_size // 2, -1), rotation[1])
            x = _linear_and_add(attend(i, qk[:, : self.heads], qk[:, self.heads :], v), layer.attention_out, x)
            up = _side_by_side(self._normed(x, layer.norm_mlp), layer.up)
            if self.gated:
                gate, up = up.chunk(2, dim=-1)
                up = self.activation(gate) * up
            else:
                up = self.activation(up)
            x = _linear_and_add(up, layer.down, x)
        return self._normed(x, self.norm)

    def _normed(self, x: Tensor, norm: _Linear) -> Tensor:
        if "bias" not in norm.parameters:
            return torch.rms_norm(x, x.shape[-1:], norm.parameters["weight"], self.eps)
        return torch.layer_norm(x, x.shape[-1:], norm.parameters["weight"], norm.parameters["bias"], self.eps)

    @torch.no_grad()
    def equals(self, trunk: Any) -> bool:
        """Whether the plain forward pass says the same of three random rows of different lengths."""
        lengths = np.array([16, 5, 1])
        limit = getattr(trunk.config, "max_position_embeddings", None)
        lengths = np.minimum(lengths, limit or 16)
        tokens = np.random.default_rng(0).integers(len(self.weights), size=(3, 16))
        ours = self.packed(tokens, lengths)
        begin = 0
        for row, n in zip(tokens, lengths, strict=True):
            ids = torch.from_numpy(row[None, :n]).to(ours.device)
            plain = trunk(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).last_hidden_state[0]
            bound = (1e-4 if self.weights.dtype == torch.float32 else 5e-2) * max(1.0, plain.abs().max().item())
            if not (ours[begin : begin + n] - plain).abs().max().item() <= bound:
                return False
            begin += n
        return True

    def packed(self, tokens: NDArray[np.int64], lengths: NDArray[np.int64]) -> Tensor:
        """Last hidden states of right-padded rows, back to back: padding costs nothing. Shapes: (B, L), (B,) -> (M, d)."""
        device = self.weights.device
        inside = np.arange(int(lengths.max())) < lengths[:, None]
        ids = torch.from_numpy(tokens[:, : inside.shape[1]][inside]).to(device)
        place = torch.from_numpy(np.nonzero(inside)[1]).to(device)
        return self(ids, place, Rows(lengths, device))


# ---------------------------------------------------------------------- attention


class Rows:
    """Causal attention within sequences that stand back to back.

    Args:
        lengths: Of the sequences. Shape: (B,).
        device: Of the tokens.
    """

    def __init__(self, lengths: NDArray[np.int64], device: torch.device) -> None:
        self.grid = _Grid(np.arange(int(lengths.max())) < lengths[:, None], device)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `Attend`."""
        dtype, grouped = q.dtype, q.shape[1] != k.shape[1]
        q, k, v = (self.grid.spread(_for_attention(x)).transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        return self.grid.gather(out.transpose(1, 2).flatten(2)).to(dtype)


class Slots:
    """Keys and values of N lanes for all layers, each lane written at its own position.

    The store is as wide as the longest lane has been, rounded up, and attention reads all of it: one stretch of memory is read 2 to 3
    times faster than the same with gaps, and costs less than its masked end. A cache that is emptied begins narrow again.

    Args:
        decoder: Whose layers and heads.
        lanes: N.
        limit: L, in tokens.
    """

    BLOCK = 16
    """Tokens by which the store grows."""

    def __init__(self, decoder: Decoder, lanes: int, limit: int) -> None:
        self.decoder, self.limit = decoder, limit
        self.heads, self.kv_heads = decoder.heads, decoder.kv_heads
        self.store = _for_attention(decoder.weights.new_zeros(0)).new_zeros(
            len(decoder.layers), 2, lanes, self.kv_heads, 0, decoder.head_size
        )
        self.cells: tuple[Tensor, ...] = ()  # by layer, every lane's and head's rows one after the other

    @property
    def width(self) -> int:
        """Tokens that the store holds now."""
        return self.store.shape[4]

    def _widen(self, tokens: int) -> None:
        """Make room for so many tokens."""
        if tokens > self.width:
            more = min(self.limit, -(-tokens // self.BLOCK) * self.BLOCK) - self.width
            self.store = F.pad(self.store, (0, 0, 0, more))
            self.cells = self.store.view(*self.store.shape[:2], -1, self.store.shape[-1]).unbind()

    def swap(self, a: list[int], b: list[int]) -> None:
        """Exchange rows pairwise."""
        self.store[:, :, a + b] = self.store[:, :, b + a]

    def step(self, tokens: NDArray[np.int64], start: NDArray[np.int64], stop: NDArray[np.int64]) -> Tensor:
        """One pass that writes tokens [start, stop) of the first B rows of the store.

        Rows that begin with the same tokens (the prompt of a group) are computed once.

        Args:
            tokens: Shape: (B, L).
            start: Tokens whose keys and values are there. Shape: (B,).
            stop: Shape: (B,).

        Returns:
            Hidden states of the last tokens. Shape: (B, d).
        """
        self._widen(int(stop.max()))
        device = self.store.device
        like = np.arange(len(tokens))  # the row that is computed for each
        first: dict[bytes, int] = {}
        for i in np.flatnonzero(start == 0):
            like[i] = first.setdefault(tokens[i, : stop[i]].tobytes(), int(i))
        computed = like == np.arange(len(tokens))
        order = np.concatenate([np.flatnonzero(start > 0), np.flatnonzero(computed & (start == 0))])
        row, place = _ranges(order, start[order], stop[order])
        ids = torch.from_numpy(tokens[row, place]).to(device)
        states = self.decoder(ids, torch.from_numpy(place).to(device), _SlotAttention(self, start, stop, order, like))
        end = np.empty(len(tokens), np.int64)
        end[order] = np.cumsum((stop - start)[order]) - 1
        return _Selection(end[like], len(states), device)(states)


class _SlotAttention:
    """Attention of one pass over a `Slots`: growing rows read the store, fresh ones look at themselves.

    Args:
        slots: The store.
        start: Shape: (B,).
        stop: Shape: (B,).
        order: Rows whose tokens are computed, growing ones first. Shape: (C,).
        like: The computed row that each row is a copy of. Shape: (B,).
    """

    def __init__(
        self,
        slots: Slots,
        start: NDArray[np.int64],
        stop: NDArray[np.int64],
        order: NDArray[np.int64],
        like: NDArray[np.int64],
    ) -> None:
        device, new = slots.store.device, stop - start
        self.slots = slots
        growing = order[start[order] > 0]
        fresh = order[len(growing) :]
        self.boundary = int(new[growing].sum())
        self.fresh = Rows(new[fresh], device) if len(fresh) else None

        # What is written where: a row's keys and values come from the row that is computed for it.
        begin = np.empty(len(start), np.int64)
        begin[order] = np.cumsum(new[order]) - new[order]
        row, place = _ranges(np.arange(len(start)), start, stop)
        self.source = _Selection(begin[like[row]] + place - start[row], int(new[order].sum()), device)
        target = row * (slots.kv_heads * slots.width) + place
        heads = np.arange(slots.kv_heads) * slots.width
        self.target = torch.from_numpy((target[:, None] + heads).ravel()).to(device)

        if len(growing):
            span = int(growing.max()) + 1
            count, first = np.zeros(span, np.int64), np.zeros(span, np.int64)
            count[growing], first[growing] = new[growing], start[growing]
            queries = np.arange(int(count.max()))
            self.grid = _Grid(queries < count[:, None], device)
            # (span, Q, width); rows between growing ones read rubbish, which nobody uses
            mask = np.where(
                np.arange(slots.width) > (first[:, None] + queries)[:, :, None], np.finfo(np.float32).min, 0.0
            )
            rows = torch.from_numpy(mask).to(device, slots.store.dtype)[:, None, None]
            share = slots.heads // slots.kv_heads  # query heads that read one key/value head
            self.mask = rows.expand(-1, slots.kv_heads, share, -1, -1).reshape(-1, share * len(queries), slots.width)
            self.stored = slots.store[:, :, :span].flatten(2, 3).unbind()

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `Attend`."""
        keys, values = self.slots.cells[layer]
        keys.index_copy_(0, self.target, self.source(_for_attention(k)).flatten(0, 1))
        values.index_copy_(0, self.target, self.source(_for_attention(v)).flatten(0, 1))
        if self.fresh is None:
            return self._read(layer, q)
        fresh = self.fresh(layer, q[self.boundary :], k[self.boundary :], v[self.boundary :])
        return torch.cat([self._read(layer, q[: self.boundary]), fresh]) if self.boundary else fresh

    def _read(self, layer: int, q: Tensor) -> Tensor:
        """Growing rows look at what is stored. Shape: (M, H, h) -> (M, H h)."""
        keys, values = self.stored[layer]
        kv_heads, size = self.slots.kv_heads, q.shape[-1]
        grid = self.grid.spread(_for_attention(q)).unflatten(2, (kv_heads, -1))  # (span, Q, K, share, h)
        asked = grid.permute(0, 2, 3, 1, 4).reshape(len(keys), -1, size)
        scores = torch.baddbmm(self.mask, asked, keys.mT, alpha=size**-0.5)
        out = torch.bmm(scores.softmax(dim=-1), values).view(grid.shape[0], kv_heads, -1, grid.shape[1], size)
        return self.grid.gather(out.permute(0, 3, 1, 2, 4).flatten(2)).to(q.dtype)


class _Grid:
    """Tokens that stand back to back, as the cells of a grid that are inside. Shape of `inside`: (B, T)."""

    def __init__(self, inside: NDArray[np.bool_], device: torch.device) -> None:
        self.shape = inside.shape
        self.inside: Tensor | None = None
        if not inside.all():
            source = np.zeros(inside.shape, np.int64)  # outside stands the first token again: finite, and seen by none
            source[inside] = np.arange(inside.sum())
            self.source = torch.from_numpy(source.ravel()).to(device)
            self.inside = torch.from_numpy(np.flatnonzero(inside)).to(device)

    def spread(self, x: Tensor) -> Tensor:
        """Shape: (M, ...) -> (B, T, ...)."""
        return (x if self.inside is None else x.index_select(0, self.source)).unflatten(0, self.shape)

    def gather(self, x: Tensor) -> Tensor:
        """Shape: (B, T, ...) -> (M, ...)."""
        return x.flatten(0, 1) if self.inside is None else x.flatten(0, 1).index_select(0, self.inside)


def _for_attention(x: Tensor) -> Tensor:
    """Float32 on a CPU, whatever the weights are: attention in bfloat16 was 6 to 8 times slower there."""
    return x.float() if x.device.type == "cpu" else x


class _Selection:
    """Rows of a tensor; the tensor itself where those are all of its `total` rows in order. Shape of `rows`: (B,)."""

    def __init__(self, rows: NDArray[np.int64], total: int, device: torch.device) -> None:
        everything = len(rows) == total and (rows == np.arange(total)).all()
        self.rows = None if everything else torch.from_numpy(rows).to(device)

    def __call__(self, x: Tensor) -> Tensor:
        return x if self.rows is None else x.index_select(0, self.rows)


def _ranges(
    rows: NDArray[np.int64], start: NDArray[np.int64], stop: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(row, place) of each token in [start, stop), row after row. Shapes: (B,) each -> (M,), (M,)."""
    count = stop - start
    offset = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    return np.repeat(rows, count), np.repeat(start, count) + offset


# ---------------------------------------------------------------------- linear layers


def _linear(x: Tensor, linear: _Linear) -> Tensor:
    if linear.adapted is not None:
        return linear.adapted(x)
    weight, bias = linear.parameters["weight"], linear.parameters["bias"]
    if linear.transposed:
        return torch.addmm(bias, x, weight)
    return F.linear(x, weight, bias)


def _side_by_side(x: Tensor, linears: list[_Linear]) -> Tensor:
    return _linear(x, linears[0]) if len(linears) == 1 else torch.cat([_linear(x, part) for part in linears], dim=-1)


def _linear_and_add(x: Tensor, linear: _Linear, to: Tensor) -> Tensor:
    if linear.adapted is not None:
        return to + linear.adapted(x)
    weight, bias = linear.parameters["weight"], linear.parameters["bias"]
    out = torch.addmm(to, x, weight if linear.transposed else weight.t())
    return out if bias is None else out + bias


def _is_lora(module: Any) -> bool:
    """Whether this is the plain kind of LoRA (Hu et al., 2021), W + s B A, by `peft`, in use and not merged already."""
    return (
        type(module).__module__ == "peft.tuners.lora.layer"
        and type(module).__name__ == "Linear"
        and not (module.merged or module.disable_adapters or module.lora_variant or any(module.lora_bias.values()))
    )


def _merged(linear: _Linear) -> _Linear:
    """An adapted layer as a plain one, with a weight of its own."""
    if linear.adapted is None:
        return linear
    with torch.no_grad():
        weight = linear.parameters["weight"].clone()
        for name in linear.adapted.active_adapters:
            if name in linear.adapted.lora_A:
                weight += linear.adapted.get_delta_weight(name)
    return _Linear({"weight": weight, "bias": linear.parameters["bias"]}, linear.transposed)


def _fused(linears: list[_Linear]) -> list[_Linear]:
    if len(linears) == 1:
        return linears
    parts: dict[str, Any] = {"bias": None}
    for name in ("weight", "bias"):
        found = [part.parameters[name] for part in linears]
        tensors = [tensor.detach() for tensor in found if tensor is not None]
        if tensors:
            parts[name] = torch.cat(tensors)
    return [_Linear(parts)]


# ---------------------------------------------------------------------- reading a trunk


def _read_llama(decoder: Decoder, trunk: Any) -> None:
    config = trunk.config
    if config.rope_parameters["rope_type"] != "default":
        raise NotImplementedError("a rotation that may depend on the length")
    decoder.rotation = _rotation(trunk)
    decoder.eps, decoder.activation, decoder.gated = config.rms_norm_eps, _ACTIVATIONS[config.hidden_act], True
    decoder.embedding, decoder.norm = decoder.part(trunk, "embed_tokens"), decoder.part(trunk, "norm")
    decoder.layers = [
        _Layer(
            norm_attention=decoder.part(layer, "input_layernorm"),
            qkv=[decoder.part(layer.self_attn, name) for name in ("q_proj", "k_proj", "v_proj")],
            attention_out=decoder.part(layer.self_attn, "o_proj"),
            norm_mlp=decoder.part(layer, "post_attention_layernorm"),
            up=[decoder.part(layer.mlp, name) for name in ("gate_proj", "up_proj")],
            down=decoder.part(layer.mlp, "down_proj"),
        )
        for layer in trunk.layers
    ]


def _rotation(trunk: Any) -> tuple[Tensor, Tensor]:
    """`x cos + roll(x) sin` is the rotation of a head by its position. Shapes: (L, 1, h), (L, 1, h)."""
    with torch.no_grad():
        places = torch.arange(trunk.config.max_position_embeddings, device=trunk.rotary_emb.inv_freq.device)
        cos, sin = (x[0, :, None] for x in trunk.rotary_emb(places[:0].float(), places[None]))
        sign = torch.ones(sin.shape[-1]).to(sin)
        sign[: len(sign) // 2] = -1
        return cos, sin * sign


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
        _Layer(
            norm_attention=decoder.part(layer, "ln_1"),
            qkv=[decoder.part(layer.attn, "c_attn")],
            attention_out=decoder.part(layer.attn, "c_proj"),
            norm_mlp=decoder.part(layer, "ln_2"),
            up=[decoder.part(layer.mlp, "c_fc")],
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
