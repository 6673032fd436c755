"""Attention among tokens that stand back to back: within rows, and to keys and values that are kept from step to step.

Notation: M tokens, H query heads on K key/value heads of size h, B rows or lanes of at most T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from textenv.decoder import Decoder

Attend: TypeAlias = Callable[[int, Tensor], Tensor]
"""Attention of a layer: its number, and each token's queries, keys and values (M, H + 2 K, h) -> (M, H h)."""


def lowest(dtype: torch.dtype) -> float:
    """Added to the score of what may not be seen."""
    return torch.finfo(dtype).min


class Rows:
    """Causal attention within sequences whose tokens stand back to back.

    Args:
        decoder: Whose heads.
        home: See `_Grid`. Shape: (B, T).
        number: See `_Grid`. Shape: (B, T).
    """

    SHORT = 64
    """Rows of so many tokens and less are faster by plain products than by `scaled_dot_product_attention`."""
    LATER = torch.from_numpy(np.triu(np.full((SHORT, SHORT), lowest(torch.float32), np.float32), 1))
    """What a token may not see. (Made by numpy: torch would start threads on import, and what is forked after that hangs.)"""

    def __init__(self, decoder: Decoder, home: NDArray[np.bool_], number: NDArray[np.int64]) -> None:
        self.heads, self.kv_heads = decoder.heads, decoder.kv_heads
        device, length = decoder.weights.device, home.shape[1]
        self.grid = _Grid(home, number, device)
        self.mask: Tensor | None = None
        if device.type == "cpu" and length <= self.SHORT:
            self.mask = self.LATER[:length, :length]
            if self.heads > self.kv_heads:  # a row for each head that shares keys
                self.mask = self.mask.repeat_interleave(self.heads // self.kv_heads, dim=0)

    def __call__(self, layer: int, qkv: Tensor) -> Tensor:
        """See `Attend`."""
        q, k, v = self.grid.spread(qkv).split([self.heads, self.kv_heads, self.kv_heads], dim=2)
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        if self.mask is not None:
            out = _by_products(q, k.flatten(0, 1).mT, v.flatten(0, 1), self.mask)
        else:
            grouped = self.heads != self.kv_heads
            out = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, is_causal=True, enable_gqa=grouped)
            out = out.transpose(1, 2).flatten(2)
        return self.grid.gather(out)


def _by_products(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Masked attention of several queries in each row, by two products of matrices.

    Args:
        q: Shape: (B, Q, H, h).
        keys: Shape: (B K, h, T).
        values: Shape: (B K, T, h).
        mask: As in `_products`. Shape: (..., Q H/K, T).

    Returns:
        Shape: (B, Q, H h).
    """
    rows, queries, _, size = q.shape
    heads = len(keys) // rows
    asked = q.reshape(rows, queries, heads, -1).transpose(1, 2).reshape(len(keys), -1, size)
    out = _products(asked, keys, values, mask).view(rows, heads, queries, -1).transpose(1, 2)
    return out.reshape(rows, queries, -1)


def _products(asked: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """What each query reads of the keys and values of its row and head.

    Args:
        asked: Queries, for each those of all heads that share keys. Shape: (B K, Q H/K, h).
        keys: Shape: (B K, h, T).
        values: Shape: (B K, T, h).
        mask: Added to the scores. Shape: (..., Q H/K, T).

    Returns:
        Shape: (B K, Q H/K, h).
    """
    scores = torch.baddbmm(mask, asked, keys, alpha=asked.shape[2] ** -0.5)
    return torch.bmm(scores.softmax(dim=-1), values)


# ---------------------------------------------------------------------- keys and values that are kept


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
        self.store = for_attention(decoder.weights.new_zeros(0)).new_zeros(
            len(decoder.layers), 2, lanes, self.kv_heads, 0, decoder.head_size
        )
        self.cells: tuple[Tensor, ...] = ()  # by layer, with keys and values of a token side by side: (N, T, 2, K, h)
        self.stored: list[tuple[Tensor, Tensor]] = []  # by layer, keys and values for products: (N K, T, h) each
        # from each row's last token, 0 where it sees: (N, K, H/K, T)
        self.mask = self.store.new_zeros(lanes, self.kv_heads, self.heads // self.kv_heads, 0)
        self.replays = self.store.device.type == "cuda"  # whether steps of all lanes by one token are recorded
        self.steady: _Pass | None = None  # the last pass, if each of its rows grew by one token
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
            self.cells = self.store.permute(0, 2, 4, 1, 3, 5).unbind()
            self.stored = [(keys.flatten(0, 1), values.flatten(0, 1)) for keys, values in self.store]
            self.mask = F.pad(self.mask, (0, width - old.shape[4]), value=lowest(old.dtype))
            self.steady = self.graph = None

    @torch.inference_mode()
    def swap(self, a: list[int], b: list[int]) -> None:
        """Exchange rows pairwise."""
        self.store[:, :, a + b] = self.store[:, :, b + a]
        self.mask[a + b] = self.mask[b + a]

    @torch.inference_mode()
    def step(self, tokens: NDArray[np.int64], start: NDArray[np.int64], stop: NDArray[np.int64]) -> Tensor:
        """One pass that writes tokens [start, stop) of the first B rows of the store.

        Rows that begin with the same tokens up to their last one (the prompt of a group) have these computed once.

        Args:
            tokens: Shape: (B, L).
            start: Tokens whose keys and values are there. Shape: (B,).
            stop: Shape: (B,).

        Returns:
            Hidden states of the last tokens. Shape: (B, d), or (2, B, d) of a `Pair`.
        """
        self._widen(int(stop.max()))
        if self.steady is not None and self.steady.goes_on(start, stop):
            self.steady.advance()
            now = self.steady
        else:
            now = _Pass(self, tokens, start, stop)
            self.steady = now if now.steady else None
            if len(begins := np.flatnonzero(start == 0)):
                self.mask[torch.from_numpy(begins).to(self.mask.device)] = lowest(self.mask.dtype)
        rows, places = now.written
        self.mask.view(len(self.mask), -1, self.width)[rows, :, places] = 0.0  # seen from now on
        ids = torch.from_numpy(tokens[now.rows, now.columns]).to(self.store.device)
        if self.replays and self.steady is not None and len(tokens) == self.store.shape[2]:
            self.graph = self.graph or _Graph(self.decoder, now, ids)
            return self.graph(now, ids)
        return self.decoder(ids, now.places, now)[..., : len(tokens), :]


class _Pass:
    """What a step computes: the last token of each row, then the new tokens before it, where there are any.

    A last token looks at what is stored. So do the tokens before it in rows that grow by several; those of rows that begin look at
    each other.

    Args:
        slots: The store.
        tokens: Shape: (B, L).
        start: Shape: (B,).
        stop: Shape: (B,).

    Attributes:
        rows: Of the tokens. Shape: (M,).
        columns: Of the tokens. Shape: (M,).
        places: `columns`, on the device. Shape: (M,).
    """

    def __init__(
        self, slots: Slots, tokens: NDArray[np.int64], start: NDArray[np.int64], stop: NDArray[np.int64]
    ) -> None:
        self.heads, self.cells, self.stop = slots.heads, slots.cells, stop  # not `slots`, which holds this pass
        device, every = slots.store.device, np.arange(len(stop))
        self.last = _Reading(slots, slots.mask[: len(stop)])
        self.parts: list[tuple[int, Attend]] = [(len(stop), self.last)]
        self.rows, self.columns = every, stop - 1
        self.source: Tensor | None = None  # the tokens whose keys and values are written; None: each, to its own place
        written = self.rows, self.columns
        before = stop - 1 - start
        if before.any():
            begins = (start == 0) & (before > 0)
            like = every.copy()  # the row that is computed for each
            first: dict[bytes, int] = {}
            for i in np.flatnonzero(begins):
                like[i] = first.setdefault(tokens[i, : before[i]].tobytes(), int(i))
            growing = np.flatnonzero((start > 0) & (before > 0))
            fresh, copies = np.flatnonzero(begins & (like == every)), np.flatnonzero(like != every)
            if len(growing):
                reading = _Reading(slots, *_before_the_last(slots, start, np.where(start > 0, before, 0)))
                self.parts.append((int(before[growing].sum()), reading))
            if len(fresh):
                self.parts.append((int(before[fresh].sum()), Rows(slots.decoder, *_grid_of(before[fresh]))))
            computed = np.concatenate([growing, fresh])
            rows, columns = _ranges(computed, start[computed], stop[computed] - 1)
            self.rows, self.columns = np.concatenate([every, rows]), np.concatenate([stop - 1, columns])
            written = self.rows, self.columns
            if len(copies):
                begin = np.zeros_like(stop)
                begin[computed] = len(stop) + np.cumsum(before[computed]) - before[computed]
                rows, columns = _ranges(copies, start[copies], stop[copies] - 1)
                source = np.concatenate([np.arange(len(self.rows)), begin[like[rows]] + columns])
                self.source = torch.from_numpy(source).to(device)
                written = np.concatenate([self.rows, rows]), np.concatenate([self.columns, columns])
        self.places = torch.from_numpy(self.columns.copy()).to(device)  # its own memory, for `advance` writes to it
        if self.source is None:
            self.written = torch.from_numpy(written[0]).to(device), self.places  # the same tensor: `advance` moves both
        else:
            self.written = torch.from_numpy(written[0]).to(device), torch.from_numpy(written[1]).to(device)

    @property
    def steady(self) -> bool:
        """Whether each row grows by one token."""
        return len(self.parts) == 1

    def goes_on(self, start: NDArray[np.int64], stop: NDArray[np.int64]) -> bool:
        """Whether a `steady` pass has these next, one token further. Shapes: (B,), (B,)."""
        return np.array_equal(start, self.stop) and bool((stop == start + 1).all())

    def advance(self) -> None:
        """A `steady` pass becomes the next one."""
        self.stop, self.columns = self.stop + 1, self.columns + 1
        self.places += 1

    def __call__(self, layer: int, qkv: Tensor) -> Tensor:
        """See `Attend`."""
        kept = qkv[:, self.heads :]
        if self.source is not None:
            kept = kept.index_select(0, self.source)
        self.cells[layer].index_put_(self.written, kept.view(len(kept), 2, -1, kept.shape[2]))
        if self.steady:
            return self.last(layer, qkv)
        parts = zip(self.parts, qkv.split([tokens for tokens, _ in self.parts]), strict=True)
        return torch.cat([attend(layer, part) for (_, attend), part in parts])


class _Reading:
    """Attention of tokens to what is stored of their rows, up to themselves.

    Args:
        slots: The store.
        mask: Added to the scores of the queries of each row, each of them for the heads that share keys. Shape: (B, K, Q H/K, T).
        grid: The queries of each row. None: one each. Shape: (B, Q).
    """

    def __init__(self, slots: Slots, mask: Tensor, grid: _Grid | None = None) -> None:
        self.heads, self.grid, self.mask = slots.heads, grid, mask.flatten(0, 1)
        count = len(self.mask)
        # by layer: (B K, h, T), (B K, T, h)
        self.keys_values = [(keys[:count].mT, values[:count]) for keys, values in slots.stored]

    def __call__(self, layer: int, qkv: Tensor) -> Tensor:
        """See `Attend`."""
        keys, values = self.keys_values[layer]
        queries = qkv[:, : self.heads]
        if self.grid is None:  # one query in each row: its heads are in order
            return _products(queries.reshape(len(keys), -1, qkv.shape[2]), keys, values, self.mask).view(len(qkv), -1)
        return self.grid.gather(_by_products(self.grid.spread(queries), keys, values, self.mask))


def _before_the_last(slots: Slots, first: NDArray[np.int64], count: NDArray[np.int64]) -> tuple[Tensor, _Grid]:
    """Mask and grid of a `_Reading` by `count` tokens of each row, from place `first` on. Shapes: (B,), (B,) -> (B, K, Q H/K, T)."""
    grid = _Grid(*_grid_of(count), slots.store.device)
    places = first[:, None] + np.arange(grid.shape[1])
    later = torch.from_numpy(np.arange(slots.width) > places[:, :, None]).to(slots.store.device)
    mask = slots.store.new_zeros(later.shape).masked_fill_(later, lowest(slots.store.dtype))
    share = slots.heads // slots.kv_heads  # query heads that read one key/value head
    return mask[:, None, :, None].expand(-1, slots.kv_heads, -1, share, -1).flatten(2, 3), grid


class _Graph:
    """A step of all lanes by one token, recorded once: one launch instead of some twenty per layer.

    Args:
        decoder: Whose pass is recorded.
        now: A `steady` one, which is kept: what is recorded reads its tensors (and the store's mask, as it is then).
        ids: Shape: (B,). Kept too.
    """

    def __init__(self, decoder: Decoder, now: _Pass, ids: Tensor) -> None:
        self.recorded, self.ids = now, ids
        self.replay, self.states = _recorded(lambda: decoder(ids, now.places, now), ids.device)

    def __call__(self, now: _Pass, ids: Tensor) -> Tensor:
        """As the decoder's own pass. Shape: (B,) -> (B, d)."""
        self.recorded.places.copy_(now.places)
        self.ids.copy_(ids)
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


# ---------------------------------------------------------------------- tokens in rows


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


def _grid_of(lengths: NDArray[np.int64]) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
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


def beginnings(tokens: NDArray[np.int64], lengths: NDArray[np.int64]) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """The same, where rows that begin alike show the same tokens (the prompt of a group). Shapes: (B, L), (B,) -> (B, T) each.

    Each row is compared with the one before it in sorted order. (Padding is sorted with the rest; it never makes tokens alike.)
    """
    home, number = _grid_of(lengths)
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


def for_attention(x: Tensor) -> Tensor:
    """Float32 on a CPU, whatever the weights are: attention in bfloat16 was 6 to 8 times slower there."""
    return x.float() if x.device.type == "cpu" else x


def _ranges(
    rows: NDArray[np.int64], start: NDArray[np.int64], stop: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(row, place) of each token in [start, stop), row after row. Shapes: (B,) each -> (M,), (M,)."""
    count = stop - start
    if (count == 1).all():
        return rows, start
    offset = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    return np.repeat(rows, count), np.repeat(start, count) + offset
