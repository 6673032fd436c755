"""Which tokens of each lane a model has read, and what it said of them: the key/value cache as observations see it.

How keys and values are stored is `textenv.attention.Slots`' business where the model is written out, and `PlainSlots`' here where it is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from textenv.attention import Slots

if TYPE_CHECKING:
    from textenv.lm import LanguageModel


class LaneCache:
    """The key/value cache of N lanes of a model, or of two: one preallocated row each, written at that lane's own position.

    No lane waits for another and nothing is padded on the left.
    """

    def __init__(self, keys: Slots | PlainSlots, lanes: int, width: int) -> None:
        self.keys = keys
        self.tokens = np.full((lanes, width), -1, np.int64)
        self.length = np.zeros(lanes, np.int64)  # tokens whose keys and values are written
        self.lane = np.arange(lanes)  # row of the key/value tensors -> its lane
        self.seen: NDArray[np.int64] | None = None  # the observations that all lanes have followed
        self.logits: list[torch.Tensor] = []  # of each model, after each lane's last token: (N, V)
        self.states: list[torch.Tensor] = []  # what they are read from: (N, d)

    def knows(self, observations: NDArray[np.int64]) -> bool:
        """Whether `logits` are up to date with them. Shape: (N, L)."""
        return self.seen is not None and np.array_equal(self.seen, observations)

    def follow(self, models: Sequence[LanguageModel], observations: NDArray[np.int64]) -> None:
        """Bring `logits` up to date with `observations`. Shape: (N, L)."""
        position = np.arange(observations.shape[1])
        padding = observations == models[0].vocab_size
        lengths = observations.shape[1] - padding.sum(axis=1)
        prefix = ((self.tokens == observations) | (position >= self.length[:, None])).all(axis=1)
        stale = ~prefix | (self.length != lengths) | (self.length == 0)
        if not stale.any():
            return
        start = np.where(prefix & (self.length < lengths), self.length, 0)
        self.length[stale], self.seen = 0, None  # if the pass below fails, these lanes start over
        lanes = self._pack(stale)
        # padding may also stand inside, in an observation that no environment gives
        ids = np.where(padding, 0, observations)[lanes]
        passed = self.keys.step(ids, start[lanes], lengths[lanes])
        new = list(passed) if len(models) > 1 else [passed]
        if len(lanes) == len(stale):
            in_order = (lanes[1:] > lanes[:-1]).all()
            order = None if in_order else torch.from_numpy(np.argsort(lanes)).to(passed.device)
            self.states = [states.clone() if order is None else states[order] for states in new]
            self.logits = [lm.head(states) for lm, states in zip(models, self.states, strict=True)]
        else:
            at = torch.from_numpy(lanes).to(passed.device)
            for k, (lm, states) in enumerate(zip(models, new, strict=True)):
                logits = lm.head(states)
                if len(self.logits) <= k:
                    self.logits.append(logits.new_zeros(len(stale), logits.shape[-1]))
                    self.states.append(states.new_zeros(len(stale), states.shape[-1]))
                self.logits[k][at], self.states[k][at] = logits, states
        self.tokens[stale], self.length[stale] = observations[stale], lengths[stale]
        self.seen = observations.copy()

    def _pack(self, stale: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Move the rows of some lanes to the front: as lanes fall idle the batch shrinks.

        Args:
            stale: Which lanes. Shape: (N,).

        Returns:
            These lanes, in the order of their rows. Shape: (B,).
        """
        n = int(stale.sum())
        behind = n + np.flatnonzero(stale[self.lane[n:]])
        if len(behind):
            free = np.flatnonzero(~stale[self.lane[:n]])
            self.keys.swap(behind.tolist(), free.tolist())
            self.lane[behind], self.lane[free] = self.lane[free], self.lane[behind]
        return self.lane[:n].copy()


class PlainSlots:
    """Keys and values for `transformers`: a 4-D additive mask and position ids of each lane carry the raggedness.

    The mask is float because a boolean one is silently wrong under eager attention.
    """

    def __init__(self, model: PreTrainedModel, lanes: int, width: int) -> None:
        self.model = model
        self.layers = [_SlotLayer(lanes, width) for _ in range(model.config.get_text_config().num_hidden_layers)]

    def step(self, tokens: NDArray[np.int64], start: NDArray[np.int64], stop: NDArray[np.int64]) -> torch.Tensor:
        """As `Slots.step`, in two passes: all but the last tokens of lanes with several, then the last ones."""
        rows = np.arange(len(tokens))
        early = np.flatnonzero(stop - start > 1)
        if len(early):
            self._forward(tokens[early], early, start[early], stop[early] - 1)
        return self._forward(tokens, rows, stop - 1, stop)[:, -1]

    def swap(self, a: list[int], b: list[int]) -> None:
        """Exchange rows pairwise."""
        for layer in self.layers:
            layer.swap(a, b)

    def _forward(
        self, tokens: NDArray[np.int64], rows: NDArray[np.int64], start: NDArray[np.int64], stop: NDArray[np.int64]
    ) -> torch.Tensor:
        """Write tokens [start, stop). Lanes with fewer write rubbish after `stop`, masked until overwritten."""
        positions = np.minimum(start[:, None] + np.arange((stop - start).max()), tokens.shape[1] - 1)
        ids = np.take_along_axis(tokens, positions, axis=1)
        ids = np.where(positions < stop[:, None], ids, 0)
        horizon = int(positions.max()) + 1
        device, dtype = self.model.device, self.model.dtype
        place = torch.from_numpy(positions).to(device)
        hidden_keys = torch.arange(horizon, device=device) > place[:, None, :, None]
        mask = torch.zeros(hidden_keys.shape, dtype=dtype, device=device).masked_fill_(
            hidden_keys, torch.finfo(dtype).min
        )
        in_order = bool((rows == np.arange(len(rows))).all())
        for layer in self.layers:
            layer.aim(torch.from_numpy(rows).to(device), place, horizon, in_order)
        states = self.model.base_model(
            input_ids=torch.from_numpy(ids).to(device),
            attention_mask=mask,
            position_ids=place,
            past_key_values=Cache(layers=list(self.layers)),
            use_cache=True,
        ).last_hidden_state
        assert isinstance(states, torch.Tensor)
        return states


class _SlotLayer(CacheLayerMixin):
    """One layer's keys and values, for `transformers.Cache`. Shape: (N, heads, L, head size)."""

    is_croppable = False

    def __init__(self, lanes: int, width: int) -> None:
        super().__init__()
        self.lanes, self.width = lanes, width

    def aim(self, rows: torch.Tensor, positions: torch.Tensor, horizon: int, in_order: bool) -> None:
        """Say where the next `update` writes: rows (B,), positions (B, Q); keys up to `horizon` are read back."""
        self.rows, self.positions, self.horizon, self.in_order = rows, positions, horizon, in_order

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        def empty(states: torch.Tensor) -> torch.Tensor:
            return states.new_zeros(self.lanes, states.shape[1], self.width, states.shape[3])

        self.keys, self.values = empty(key_states), empty(value_states)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return self._write(self.keys, key_states), self._write(self.values, value_states)

    def _write(self, store: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        store[self.rows[:, None], :, self.positions] = states.transpose(1, 2)
        written = store[:, :, : self.horizon]
        return written[: len(self.rows)] if self.in_order else written[self.rows]

    def swap(self, a: list[int], b: list[int]) -> None:
        """Exchange rows pairwise."""
        for store in (self.keys, self.values):
            store[a + b] = store[b + a]

    def get_seq_length(self) -> int:
        return 0  # positions are passed explicitly; nothing may be derived from a common length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.horizon, 0

    def get_max_length(self) -> int:
        return self.width
