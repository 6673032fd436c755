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

Attend: TypeAlias = Callable[[int, Tensor], Tensor]
"""Attention of a layer: its number, and each token's queries, keys and values (M, H + 2 K, h) -> (M, H h)."""


class _Linear(NamedTuple):
    """A linear layer or a norm, by the dictionary in which its module keeps weight and bias: what is written there is seen here."""

    parameters: dict[str, Any]
    transposed: bool = False
    """Whether the weight is (in, out), as GPT-2 has it."""
    adapted: Any = None
    """A layer of `peft` around it, to be called in its place."""


@dataclass(frozen=True)
class _NormedLinears:
    """Linear layers side by side that read what a norm makes of the residual stream."""

    norm: _Linear
    linears: list[_Linear]
    order: Tensor | None = None
    """Of their outputs, where another is wanted than they stand in. Shape: (outputs,)."""


class _Layer(NamedTuple):
    qkv: _NormedLinears
    attention_out: _Linear
    up: _NormedLinears
    """Of a gated MLP: the gate, then what passes it."""
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
        self.rotation: Tensor | None = None  # Llama's, by position: complex, (L, 1, h / 2)
        self.positions: _Linear | None = None  # GPT-2's learned ones
        self.embedding: _Linear
        self.padding: int | None = trunk.get_input_embeddings().padding_idx  # a row that gets no gradient
        self.layers: list[_Layer]
        self.norm: _Linear
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

    def fused(self) -> Decoder:
        """A copy for passes without gradient: what `_joined` computes in each pass is there already, and adapters are merged.

        It does not follow the weights: make it again when they change.
        """
        twin = copy.copy(self)
        with torch.no_grad():
            twin.layers = [
                _Layer(
                    _joined(replace(layer.qkv, linears=[_merged(part) for part in layer.qkv.linears])),
                    _merged(layer.attention_out),
                    _joined(replace(layer.up, linears=[_by_output(_merged(part)) for part in layer.up.linears])),
                    _merged(layer.down),
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
        elif self.rotation is not None:  # of queries and keys; values are multiplied by 1
            heads = self.rotation[positions].expand(-1, self.heads + self.kv_heads, -1)
            rotation = torch.cat([heads, torch.ones_like(heads[:, : self.kv_heads])], dim=1)
        for i, layer in enumerate(self.layers):
            qkv = _for_attention(self._apply(x, layer.qkv)).contiguous().view(len(x), -1, self.head_size)
            if rotation is not None:
                pairs = torch.view_as_complex(qkv.float().view(*rotation.shape, 2))
                qkv = torch.view_as_real(pairs * rotation).view(qkv.shape).to(qkv.dtype)
            x = _linear_and_add(attend(i, qkv).to(x.dtype), layer.attention_out, x)
            up = self._apply(x, layer.up)
            if self.gated:
                gate, up = up.chunk(2, dim=-1)
                up = self.activation(gate) * up
            else:
                up = self.activation(up)
            x = _linear_and_add(up, layer.down, x)
        return self._normed(x, self.norm)

    def _apply(self, x: Tensor, layers: _NormedLinears) -> Tensor:
        """Shape: (M, d) -> (M, outputs)."""
        if len(x) >= JOIN_FROM * x.shape[1]:
            layers = _joined(layers)
        x = self._normed(x, layers.norm)
        if len(layers.linears) == 1:
            return _linear(x, layers.linears[0])
        out = torch.cat([_linear(x, part) for part in layers.linears], dim=-1)
        return out if layers.order is None else out.index_select(1, layers.order)

    def _normed(self, x: Tensor, norm: _Linear) -> Tensor:
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
        states, number = self.packed(tokens, lengths)
        for row, n, at in zip(tokens, lengths, number, strict=True):
            ids = torch.from_numpy(row[None, :n]).to(states.device)
            plain = trunk(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).last_hidden_state[0]
            bound = (1e-4 if self.weights.dtype == torch.float32 else 5e-2) * max(1.0, plain.abs().max().item())
            if not (states[torch.from_numpy(at[:n])] - plain).abs().max().item() <= bound:
                return False
        return True

    def packed(self, tokens: NDArray[np.int64], lengths: NDArray[np.int64]) -> tuple[Tensor, NDArray[np.int64]]:
        """Last hidden states of right-padded rows. Padding costs nothing; what rows have in common at their beginning is computed once where that pays.

        Args:
            tokens: Shape: (B, L).
            lengths: Shape: (B,).

        Returns:
            States back to back, and the number of each token's state (anything in padding). Shapes: (M, d), (B, max(lengths)).
        """
        device = self.weights.device
        home, number = _beginnings(tokens, lengths)
        ids = torch.from_numpy(tokens[:, : home.shape[1]][home]).to(device)
        place = torch.from_numpy(np.nonzero(home)[1]).to(device)
        return self(ids, place, Rows(self, home, number)), number


# ---------------------------------------------------------------------- attention


class Rows:
    """Causal attention within sequences whose tokens stand back to back.

    Args:
        decoder: Whose heads.
        home: See `_Grid`. Shape: (B, T).
        number: See `_Grid`. Shape: (B, T).
    """

    SHORT = 64
    """Rows of so many tokens and less are faster by plain products than by `scaled_dot_product_attention`."""

    def __init__(self, decoder: Decoder, home: NDArray[np.bool_], number: NDArray[np.int64]) -> None:
        self.heads, self.kv_heads = decoder.heads, decoder.kv_heads
        device, length = decoder.weights.device, home.shape[1]
        self.grid = _Grid(home, number, device)
        self.mask: Tensor | None = None
        if device.type == "cpu" and length <= self.SHORT:
            later = torch.full((length, length), torch.finfo(torch.float32).min).triu(1)
            self.mask = later.repeat_interleave(self.heads // self.kv_heads, dim=0)

    def __call__(self, layer: int, qkv: Tensor) -> Tensor:
        """See `Attend`."""
        q, k, v = self.grid.spread(qkv).split([self.heads, self.kv_heads, self.kv_heads], dim=2)
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        if self.mask is not None:
            out = _products(q, k.flatten(0, 1), v.flatten(0, 1), self.mask)
        else:
            grouped = self.heads != self.kv_heads
            out = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, is_causal=True, enable_gqa=grouped)
            out = out.transpose(1, 2).flatten(2)
        return self.grid.gather(out)


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
    """Tokens by which the store grows; four times as many where steps are recorded."""

    def __init__(self, decoder: Decoder, lanes: int, limit: int) -> None:
        self.decoder, self.limit = decoder, limit
        self.heads, self.kv_heads = decoder.heads, decoder.kv_heads
        self.store = _for_attention(decoder.weights.new_zeros(0)).new_zeros(
            len(decoder.layers), 2, lanes, self.kv_heads, 0, decoder.head_size
        )
        self.cells: tuple[Tensor, ...] = ()  # by layer: keys, then values; rows of lanes and heads one after the other
        self.replays = self.store.device.type == "cuda"  # whether steps of all lanes by one token are recorded
        self.graph: _Graph | None = None  # of this width

    @property
    def width(self) -> int:
        """Tokens that the store holds now."""
        return self.store.shape[4]

    def _widen(self, tokens: int) -> None:
        """Make room for so many tokens."""
        if tokens > self.width:
            block = self.BLOCK * (4 if self.replays else 1)  # a recorded step is of one width
            old, width = self.store, min(self.limit, -(-tokens // block) * block)
            self.store = old.new_empty(*old.shape[:4], width, old.shape[5])
            self.store[..., : old.shape[4], :] = old
            self.store[..., old.shape[4] :, :] = 0.0  # finite, for what is masked is still multiplied by 0
            self.cells = self.store.view(len(self.store), -1, self.store.shape[-1]).unbind()
            self.graph = None

    @torch.inference_mode()
    def swap(self, a: list[int], b: list[int]) -> None:
        """Exchange rows pairwise."""
        self.store[:, :, a + b] = self.store[:, :, b + a]

    @torch.inference_mode()
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
        ids, places = (torch.from_numpy(x).to(device) for x in (tokens[row, place], place))
        attention = _SlotAttention(self, start, stop, order, like)
        if self.replays and attention.steady and len(tokens) == self.store.shape[2]:
            self.graph = self.graph or _Graph(self.decoder, attention, ids, places)
            return self.graph(attention, ids, places)
        states = self.decoder(ids, places, attention)
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
        self.fresh = Rows(slots.decoder, *_cells(new[fresh])) if len(fresh) else None

        # What is written where: a row's keys and values come from the row that is computed for it.
        begin = np.empty(len(start), np.int64)
        begin[order] = np.cumsum(new[order]) - new[order]
        row, place = _ranges(np.arange(len(start)), start, stop)
        self.source = _Selection(begin[like[row]] + place - start[row], int(new[order].sum()), device)
        target = row * (slots.kv_heads * slots.width) + place
        head = np.arange(slots.kv_heads)
        heads = np.concatenate([head, slots.store.shape[2] * slots.kv_heads + head]) * slots.width  # of keys, of values
        self.target = torch.from_numpy((target[:, None] + heads).ravel()).to(device)

        if len(growing):
            span = int(growing.max()) + 1
            count, first = np.zeros(span, np.int64), np.zeros(span, np.int64)
            count[growing], first[growing] = new[growing], start[growing]
            self.grid = _Grid(*_cells(count), device)
            queries = np.arange(self.grid.shape[1])
            # (span, Q, width); rows between growing ones read rubbish, which nobody uses
            later = np.arange(slots.width) > (first[:, None] + queries)[:, :, None]
            mask = np.where(later, np.finfo(np.float32).min, np.float32(0.0))
            rows = torch.from_numpy(mask).to(device, slots.store.dtype)[:, None, :, None]
            share = slots.heads // slots.kv_heads  # query heads that read one key/value head
            self.mask = rows.expand(-1, slots.kv_heads, -1, share, -1).reshape(-1, len(queries) * share, slots.width)
            self.stored = slots.store[:, :, :span].flatten(2, 3).unbind()

    @property
    def steady(self) -> bool:
        """Whether each row grows by one token."""
        return self.fresh is None and self.source.rows is None and self.grid.home is None and self.grid.shape[1] == 1

    def __call__(self, layer: int, qkv: Tensor) -> Tensor:
        """See `Attend`."""
        written = self.source(qkv[:, self.slots.heads :])
        self.slots.cells[layer].index_copy_(0, self.target, written.flatten(0, 1))
        if self.fresh is None:
            return self._read(layer, qkv)
        fresh = self.fresh(layer, qkv[self.boundary :])
        return torch.cat([self._read(layer, qkv[: self.boundary]), fresh]) if self.boundary else fresh

    def _read(self, layer: int, qkv: Tensor) -> Tensor:
        """Growing rows look at what is stored. Shape: (M, H + 2 K, h) -> (M, H h)."""
        keys, values = self.stored[layer]
        queries = self.grid.spread(qkv[:, : self.slots.heads])
        return self.grid.gather(_products(queries, keys, values, self.mask))


class _Graph:
    """A step of all lanes by one token, recorded once: one launch instead of some twenty per layer.

    Args:
        decoder: Whose pass is recorded.
        attention: `steady`; its tensors become the recorded pass's own.
        ids: Shape: (B,).
        places: Shape: (B,).
    """

    def __init__(self, decoder: Decoder, attention: _SlotAttention, ids: Tensor, places: Tensor) -> None:
        attention.mask = attention.mask.contiguous()  # heads that share keys may share its memory
        self.own = attention.target, attention.mask, ids, places
        self.replay, self.states = _recorded(lambda: decoder(ids, places, attention), ids.device)

    def __call__(self, attention: _SlotAttention, ids: Tensor, places: Tensor) -> Tensor:
        """As the decoder's own pass. Shapes: (B,), (B,) -> (B, d)."""
        for own, new in zip(self.own, (attention.target, attention.mask, ids, places), strict=True):
            own.copy_(new)
        self.replay()
        return self.states.clone()


def _recorded(run: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], None], Tensor]:
    """A CUDA graph of `run`: what repeats it, and where its result stands then.

    `run` is called beforehand on another stream, as https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs asks for.
    """
    with torch.cuda.device(device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):  # its own default belongs to the device of the first graph
            states = run()
    return graph.replay, states


def _products(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Attention by two products of matrices.

    Args:
        q: Shape: (B, Q, H, h).
        keys: Shape: (B K, T, h).
        values: Shape: (B K, T, h).
        mask: Added to the scores; one row for each query and each of the heads that share keys. Shape: (..., Q H/K, T).

    Returns:
        Shape: (B, Q, H h).
    """
    rows, queries, _, size = q.shape
    heads = len(keys) // rows
    asked = q.reshape(rows, queries, heads, -1).transpose(1, 2).reshape(len(keys), -1, size)
    scores = torch.baddbmm(mask, asked, keys.mT, alpha=size**-0.5)
    out = torch.bmm(scores.softmax(dim=-1), values).view(rows, heads, queries, -1).transpose(1, 2)
    return out.reshape(rows, queries, -1)


class _Grid:
    """Tokens that stand back to back, as the cells of a grid.

    Args:
        home: Cells from which tokens are read back, in order. Shape: (B, T).
        number: The token that each cell shows. Shape: (B, T).
        device: Of the tokens.
    """

    def __init__(self, home: NDArray[np.bool_], number: NDArray[np.int64], device: torch.device) -> None:
        self.shape = home.shape
        self.home: Tensor | None = None  # None: every cell is the home of its token
        if not home.all():
            self.number = torch.from_numpy(number.ravel()).to(device)
            self.home = torch.from_numpy(np.flatnonzero(home)).to(device)

    def spread(self, x: Tensor) -> Tensor:
        """Shape: (M, ...) -> (B, T, ...)."""
        cells = x if self.home is None else x.index_select(0, self.number)
        return cells.view(*self.shape, *x.shape[1:])

    def gather(self, x: Tensor) -> Tensor:
        """Shape: (B, T, ...) -> (M, ...)."""
        return x.flatten(0, 1) if self.home is None else x.flatten(0, 1).index_select(0, self.home)


def _cells(lengths: NDArray[np.int64]) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """The grid of sequences: `home` and `number` of `_Grid`. Padding shows the first token: finite, and seen by none. Shape: (B,) -> (B, T) each."""
    longest = int(lengths.max())
    if (lengths == longest).all():
        return np.ones((len(lengths), longest), bool), np.arange(len(lengths) * longest).reshape(-1, longest)
    home = np.arange(longest) < lengths[:, None]
    number = np.zeros(home.shape, np.int64)
    number[home] = np.arange(home.sum())
    return home, number


WORTH_SHARING = 0.05
"""Share of tokens from which on it pays to look up those that rows have in common."""


def _beginnings(tokens: NDArray[np.int64], lengths: NDArray[np.int64]) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """The same, where rows that begin alike show the same tokens (the prompt of a group). Shapes: (B, L), (B,) -> (B, T) each.

    Each row is compared with the one before it in sorted order. (Padding is sorted with the rest; it never makes tokens alike.)
    """
    home, number = _cells(lengths)
    rows = tokens[:, : home.shape[1]]
    order = sorted(range(len(rows)), key=[row.tobytes() for row in rows].__getitem__)  # neighbours begin alike
    rows, inside = rows[order], home[order]
    alike = np.zeros(inside.shape, bool)  # as in the row before, up to here
    alike[1:] = np.logical_and.accumulate((rows[1:] == rows[:-1]) & inside[1:] & inside[:-1], axis=1)
    if alike.sum() < WORTH_SHARING * inside.sum():
        return home, number
    home[order] &= ~alike
    number[:] = 0
    number[home] = np.arange(home.sum())
    first = np.maximum.accumulate(np.where(alike, 0, np.arange(len(order))[:, None]), axis=0)
    number[order] = np.take_along_axis(number[order], first, axis=0)
    return home, number


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
    if (count == 1).all():
        return rows, start
    offset = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    return np.repeat(rows, count), np.repeat(start, count) + offset


# ---------------------------------------------------------------------- linear layers


FEW_ROWS, WIDE = 256, 4
"""So few rows that go to so many times as many outputs are multiplied from the other side, where two threads are a quarter faster."""


def _linear(x: Tensor, linear: _Linear) -> Tensor:
    if linear.adapted is not None:
        return linear.adapted(x)
    weight, bias = linear.parameters["weight"], linear.parameters["bias"]
    few = len(x) <= FEW_ROWS and x.device.type == "cpu" and not torch.is_grad_enabled()
    if few and not linear.transposed and len(weight) >= WIDE * x.shape[1]:
        return (torch.mm(weight, x.t()) if bias is None else torch.addmm(bias[:, None], weight, x.t())).t()
    if linear.transposed:
        return torch.addmm(bias, x, weight)
    return F.linear(x, weight, bias)


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


def _by_output(linear: _Linear) -> _Linear:
    """With one row of the weight for each output, in a copy where it has been one for each input."""
    if not linear.transposed:
        return linear
    parameters = linear.parameters
    return _Linear({"weight": parameters["weight"].t().contiguous(), "bias": parameters["bias"]})


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


JOIN_FROM = 2
"""Where a pass has so many times as many tokens as features, copying (3 d, d) weights costs less than (M, 3 d) states (d of 128 and 288)."""


def _joined(layers: _NormedLinears) -> _NormedLinears:
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
        weight, norm = weight * (scale * len(scale) ** 0.5), _Linear({"weight": None})
    return _NormedLinears(norm, [_Linear({"weight": weight, "bias": bias})])


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
        _Layer(
            qkv=_NormedLinears(
                decoder.part(layer, "input_layernorm"),
                [decoder.part(layer.self_attn, name) for name in ("q_proj", "k_proj", "v_proj")],
                order,
            ),
            attention_out=decoder.part(layer.self_attn, "o_proj"),
            up=_NormedLinears(
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
        _Layer(
            qkv=_NormedLinears(decoder.part(layer, "ln_1"), [decoder.part(layer.attn, "c_attn")]),
            attention_out=decoder.part(layer.attn, "c_proj"),
            up=_NormedLinears(decoder.part(layer, "ln_2"), [decoder.part(layer.mlp, "c_fc")]),
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
