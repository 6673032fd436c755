"""`LanguageModel`: a causal LM read as a function of observations, with a key/value cache that follows them.

Whoever speaks plain Gymnasium gets key/value-cache speed: `next_logits(observations)` compares each lane's tokens with
what its cache holds (N x L integers) and computes only what is new. No session, no cache handle.

    the same tokens          the last logits, free
    some tokens longer       those tokens
    anything else            the whole observation, from its first token

The last rule keeps numbers independent of what a lane did before: a new prompt never reuses the keys of an old one.
Passes go through `textenv.decoder` where it knows the architecture, and through `transformers` where not. A small policy that is
asked what its reference will be asked next (`awaited`) answers for both in one pass, `textenv.pair`; alone it says the same, to rounding.
"""

from __future__ import annotations

import copy
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from textenv.attention import Slots
from textenv.cache import LaneCache, PlainSlots
from textenv.decoder import Decoder
from textenv.packed import Packed
from textenv.pair import pairable, paired
from textenv.sampling import Behaviour, log_prob

_PROBED: WeakKeyDictionary[PreTrainedModel, dict[int, bool]] = WeakKeyDictionary()
"""Whether the cache serves a model at a length: found out once."""

LOGITS_PER_CHUNK = 1 << 23
"""Logits that are computed at a time where they are used up at once."""

TOKENS_PER_PASS = 2_048
"""Tokens of one teacher-forced pass on a CPU, padding included: bounds memory, and keeps rows of like length together.

Elsewhere a short pass is mostly launches, so there are eight times as many (not measured)."""

LOGITS_PER_PASS = 1 << 25
"""Logits of one pass whose gradient is taken before the next one begins: 128 MiB."""


def tokens_per_pass(device: torch.device, vocab_size: int = 1) -> int:
    """Tokens of one teacher-forced pass on this device.

    Args:
        device: Of the weights.
        vocab_size: V, where the logits of all tokens are held for their gradient: large vocabularies take fewer tokens.
    """
    tokens = TOKENS_PER_PASS * (1 if device.type == "cpu" else 8)
    return max(1, min(tokens, LOGITS_PER_PASS // vocab_size))


class LanguageModel:
    """A `transformers` causal LM that answers for N lanes at once.

    Args:
        model: The network, on any device. It is put in eval mode: dropout would make sampling and scoring disagree.
        max_tokens: L, the longest observation. Needs that many positions.
        behaviour: The distribution made from the logits (temperature, top-k, top-p, action mask).
        check: Recompute one lane at each call and raise when the cache disagrees. Slow; for finding faults.
        cached: Whether the cache works for this architecture; None finds out by a probe at construction.

    Raises:
        ValueError: The model has fewer positions than `max_tokens`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        max_tokens: int,
        behaviour: Behaviour | None = None,
        *,
        check: bool = False,
        cached: bool | None = None,
    ) -> None:
        self.model = model.eval()
        self.max_tokens = max_tokens
        self.behaviour = behaviour or Behaviour()
        self.check = check
        self.vocab_size = vocab_size(model)
        config = model.config.get_text_config()  # read once: to look these up takes as long as a kernel
        self._logit_scale = getattr(config, "logit_scale", None)  # of Cohere
        self._logits_scaling = getattr(config, "logits_scaling", None)  # of Granite
        self._softcap = getattr(config, "final_logit_softcapping", None)  # of Gemma 2
        positions = max_positions(model)
        if positions is not None and max_tokens > positions:
            raise ValueError(
                f"An observation holds up to {max_tokens} tokens (prompt and response), but the model has only {positions} "
                "positions. Use shorter prompts or a smaller max_new_tokens."
            )
        self._caches: OrderedDict[tuple[int, int], LaneCache] = OrderedDict()
        self.awaited: NDArray[np.int64] | None = None
        """What this model will be asked next, kept up to date by its environment; None where that is not known. Shape: (N, L)."""
        self._original: weakref.ref[LanguageModel] | None = None  # of a clone that may do so
        self._joint: LaneCache | None = None  # the cache of this model and its original
        self._shared: weakref.ref[LaneCache] | None = None  # the same, as the original knows it
        self._alone = False  # whether the two do not fit together (any more)
        self._packed_head: Packed | None = None
        self._weights = _WeightWatch(model)
        self._calls = 0
        self.generation = 0
        """How often everything cached has been forgotten: who keeps something of their own by the weights compares it."""
        self.cached = self._probed(max_tokens) if cached is None else cached

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.device

    def clone(
        self, behaviour: Behaviour | None = None, *, trainable: bool = True, dtype: torch.dtype | None = None
    ) -> LanguageModel:
        """A copy with weights of its own, and an empty cache.

        Args:
            behaviour: None is that of the original.
            trainable: Whether the copy's weights are trained.
            dtype: Of the copy's weights. None is the original's, and float32 for half precision that is trained: an update is
                smaller than bfloat16's rounding.
        """
        model = copy.deepcopy(self.model).requires_grad_(trainable)
        for p in model.parameters():  # not `model.to`, which would round a rotation's frequencies as well
            if p.is_floating_point():
                p.data = p.data.to(dtype or (torch.promote_types(p.dtype, torch.float32) if trainable else p.dtype))
        clone = LanguageModel(model, self.max_tokens, behaviour or self.behaviour, check=self.check, cached=self.cached)
        if self.cached and pairable(self.model.base_model, model.base_model):
            clone._original = weakref.ref(self)
        return clone

    def invalidate(self) -> None:
        """Forget everything cached. Called at each update; call it after writing weights in an unusual way."""
        self.generation += 1
        self._caches.clear()
        self._packed_head = None
        self._joint, self._shared, self._alone = None, None, False

    def __getstate__(self) -> dict[str, Any]:
        """Without what is cached: a copy makes its own."""
        forgotten = dict.fromkeys(("_packed_head", "_original", "_joint", "_shared"))
        return vars(self) | forgotten | {"_caches": OrderedDict(), "_weights": _WeightWatch(self.model)}

    def refresh(self) -> bool:
        """Forget everything cached if the weights have changed since the last call; whether they had."""
        changed = self._weights.changed()
        if changed:
            self.invalidate()
        return changed

    # ------------------------------------------------------------------ one step of N lanes

    @torch.no_grad()
    def next_logits(self, observations: NDArray[np.int64]) -> torch.Tensor:
        """The model's raw logits for the token that comes next. Shape: (N, L) -> (N, V), float32."""
        return self.shared_logits(observations).clone()

    @torch.no_grad()
    def shared_logits(self, observations: NDArray[np.int64]) -> torch.Tensor:
        """As `next_logits`, without a copy: the cache's own numbers, to be read before the next call and never written."""
        observations = np.asarray(observations)
        self.refresh()
        if not self._cache_serves(observations.shape[1]):
            return self._encode(observations)
        return self._followed(observations)[0]

    @torch.no_grad()
    def next_hidden(self, observations: NDArray[np.int64]) -> torch.Tensor:
        """The last hidden states that `next_logits` reads; right after it, free. Shape: (N, L) -> (N, d)."""
        observations = np.asarray(observations)
        self.refresh()
        if not self._cache_serves(observations.shape[1]):
            return self.last_hidden(observations)
        return self._followed(observations)[1].clone()

    @torch.no_grad()
    def log_probs_all(self, observations: NDArray[np.int64]) -> NDArray[np.float64]:
        """Log-probabilities of every next token under `behaviour`. Shape: (N, L) -> (N, V), nats."""
        logits = self.behaviour.logits(self.shared_logits(observations), observations)
        return logits.double().log_softmax(dim=-1).cpu().numpy()

    @torch.no_grad()
    def log_probs(self, observations: NDArray[np.int64], actions: NDArray[np.int64]) -> NDArray[np.float64]:
        """Log-probabilities of `actions` under `behaviour`. Shapes: (N, L), (N,) -> (N,), nats."""
        logits = self.behaviour.logits(self.shared_logits(observations), observations)
        chosen = torch.as_tensor(actions, device=logits.device)
        return log_prob(logits, chosen).double().cpu().numpy()

    # ------------------------------------------------------------------ states one by one, without a cache

    def last_hidden(self, observations: NDArray[np.int64]) -> torch.Tensor:
        """Last hidden states at each observation's last token, in passes over rows of like length. Differentiable.

        For those who update on single states, as stable-baselines3 does: whole responses are cheaper (`response_hidden`).

        Returns:
            Shape: (N, L) -> (N, d).
        """
        lengths = (observations != self.vocab_size).sum(axis=1)
        batches = list(length_buckets(lengths, tokens_per_pass(self.device)))
        trunk = self.model.base_model
        states = [trunk_states(trunk, observations[i], lengths[i], np.arange(len(i)), lengths[i] - 1) for i in batches]
        back = torch.from_numpy(np.argsort(np.concatenate(batches))).to(self.device)
        return torch.cat(states)[back]

    # ------------------------------------------------------------------ whole episodes, teacher-forced

    def response_hidden(
        self, tokens: NDArray[np.int64], prompt_length: NDArray[np.int64], response_length: NDArray[np.int64]
    ) -> torch.Tensor:
        """Last hidden states at which response tokens are predicted, episodes back to back. Differentiable.

        Only these positions go on to a head: a logit row of a prompt token or of padding is never computed.

        Args:
            tokens: Prompt, response, then padding (any value). Shape: (B, L).
            prompt_length: Shape: (B,).
            response_length: Shape: (B,).

        Returns:
            Shape: (M, d) with M = response_length.sum().
        """
        return response_states(self.model.base_model, tokens, prompt_length, response_length)

    def response_logits(
        self,
        hidden: torch.Tensor,
        tokens: NDArray[np.int64],
        prompt_length: NDArray[np.int64],
        response_length: NDArray[np.int64],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`behaviour`'s logits at `hidden`, and the tokens that were drawn there. Shapes: (M, V), (M,). Differentiable."""
        rows, columns = response_index(prompt_length, response_length)
        states = None
        if self.behaviour.action_mask is not None:
            states = tokens[rows].copy()
            states[np.arange(tokens.shape[1]) > columns[:, None]] = self.vocab_size
        logits = self.behaviour.logits(self.head(hidden), states)
        return logits, torch.from_numpy(tokens[rows, columns + 1]).to(self.device)

    @torch.no_grad()
    def score(
        self, tokens: NDArray[np.int64], prompt_length: NDArray[np.int64], response_length: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        """Log-probability of each response token, in passes over rows of like length.

        Returns:
            Zero after a response's end. Shape: (B, T) with T = max(response_length), nats.
        """
        self.refresh()
        self._pack_head()
        out = np.zeros((len(tokens), int(response_length.max(initial=0))))
        for batch in length_buckets(prompt_length + response_length, tokens_per_pass(self.device)):
            part = tokens[batch], prompt_length[batch], response_length[batch]
            hidden = self.response_hidden(*part)
            for rows, states in in_chunks(hidden, part[2], self.vocab_size):
                chunk = part[0][rows], part[1][rows], part[2][rows]
                logits, drawn = self.response_logits(states, *chunk)
                row, step = response_index(np.ones_like(chunk[2]), chunk[2])
                out[batch[rows][row], step] = log_prob(logits, drawn).double().cpu().numpy()
        return out

    # ------------------------------------------------------------------ the network

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Raw logits from last hidden states, float32. A subclass may add to them. Shape: (M, d) -> (M, V)."""
        logits: torch.Tensor
        if self._packed_head is None or torch.is_grad_enabled():
            logits = self.model.get_output_embeddings()(hidden)
        else:
            logits = self._packed_head(hidden)
        if self._logit_scale is not None:
            logits = logits * self._logit_scale
        if self._logits_scaling is not None:
            logits = logits / self._logits_scaling
        if self._softcap is not None:
            logits = torch.tanh(logits / self._softcap) * self._softcap
        return logits.float()

    def _pack_head(self) -> None:
        """Lay the head's weight out for this processor, once per set of weights: twice as fast at large vocabularies."""
        head = self.model.get_output_embeddings()
        if self._packed_head is None and type(head) is torch.nn.Linear:
            self._packed_head = Packed.of(head.weight, head.bias)

    def _encode(self, observations: NDArray[np.int64]) -> torch.Tensor:
        """Next-token logits with no cache: a full pass over each observation. Shape: (N, L) -> (N, V)."""
        return self.head(self.last_hidden(observations))

    # ------------------------------------------------------------------ the cache's guards

    def _cache_serves(self, width: int) -> bool:
        """Whether the cache is right for observations of this width; wider ones than `max_tokens` are probed anew."""
        return self.cached and (width <= self.max_tokens or self._probed(width))

    def _probed(self, length: int) -> bool:
        verdicts = _PROBED.setdefault(self.model, {})
        if length not in verdicts:
            plain = LanguageModel(self.model, self.max_tokens, cached=True)  # a subclass may have another head
            verdicts[length] = plain._probe(length)
        return verdicts[length]

    def _followed(self, observations: NDArray[np.int64]) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits and hidden states by the cache. Shape: (N, L) -> (N, V), (N, d)."""
        shared = _alive(self._shared)
        if shared is not None and shared.knows(observations):
            cache, side = shared, 1
        elif (joint := self._joint_cache(observations)) is not None:
            cache, side = joint, 0
        else:
            cache, side = self._cache_for(*observations.shape), 0
            cache.follow([self], observations)
        if self.check:
            self._check_one_lane(observations, cache.logits[side])
        return cache.logits[side], cache.states[side]

    def _joint_cache(self, observations: NDArray[np.int64]) -> LaneCache | None:
        """The cache of this model and its original, up to date, where the original awaits the same and has no answer yet."""
        original = _alive(self._original)
        if original is None:
            self._joint = None
            return None
        if original.awaited is None or self._alone or not np.array_equal(original.awaited, observations):
            return None
        shared, own = _alive(original._shared), original._caches.get(observations.shape)
        if (shared is not None and shared is not self._joint) or (own is not None and own.knows(observations)):
            return None  # another clone has answered, or the original itself
        if shared is None or shared.tokens.shape != observations.shape:
            original.refresh()
            pair = paired(self.model.base_model, original.model.base_model)
            if pair is None:
                self._joint, self._alone = None, True
                return None
            self._joint = LaneCache(Slots(pair, *observations.shape), *observations.shape)
            original._shared = weakref.ref(self._joint)
            self._pack_head()
            original._pack_head()
        assert self._joint is not None
        self._joint.follow([self, original], observations)
        return self._joint

    def _cache_for(self, lanes: int, width: int) -> LaneCache:
        """The cache of this batch size; a batch of another size is another set of lanes. The four last used are kept."""
        key = (lanes, width)
        if key not in self._caches:
            while len(self._caches) > 3:
                self._caches.popitem(last=False)
            decoder = Decoder.of(self.model.base_model)
            keys = PlainSlots(self.model, lanes, width) if decoder is None else Slots(decoder.fused(), lanes, width)
            self._caches[key] = LaneCache(keys, lanes, width)
            self._pack_head()
        self._caches.move_to_end(key)
        return self._caches[key]

    def _check_one_lane(self, observations: NDArray[np.int64], logits: torch.Tensor) -> None:
        lane = self._calls % len(observations)
        self._calls += 1
        packed, self._packed_head = self._packed_head, None  # a plain pass, whatever is cached
        error = (self._encode(observations[lane : lane + 1])[0] - logits[lane]).abs().max().item()
        self._packed_head = packed
        if error > self._tolerance(logits):
            raise RuntimeError(
                f"The key/value cache of lane {lane} disagrees with a plain forward pass by {error:.2g} in the logits. Were weights "
                "written in a way that cannot be seen? Call invalidate() after writing them."
            )

    def _tolerance(self, logits: torch.Tensor) -> float:
        relative = 1e-4 if self.model.dtype == torch.float32 else 5e-2
        return relative * max(1.0, logits.abs().max().item())

    @torch.no_grad()
    def _probe(self, length: int) -> bool:
        """Compare ragged prefill, decoding and a restart with the model's own forward pass.

        Sliding windows, ALiBi computed from a 2-D mask, recurrent layers and models that ignore `position_ids` all show
        here, whatever their names; they are then re-encoded at each step, which is slower and right.
        """
        tokens = np.random.default_rng(0).integers(self.vocab_size, size=(3, length))

        def observe(*lengths: int) -> NDArray[np.int64]:
            rows = np.full((3, length), self.vocab_size)
            for lane, n in enumerate(lengths):
                rows[lane, :n] = tokens[lane, :n]
            return rows

        half = max(1, length // 2)
        stages = [
            observe(half, 1, max(1, length - 2)),  # ragged prefill
            observe(min(half + 1, length), min(2, length), max(1, length - 1)),  # decode one token (recorded on a GPU)
            observe(min(half + 2, length), min(3, length), length),  # and one more (repeated)
            observe(length, 1, length),  # grow by several, restart, stay
        ]
        try:
            for observations in stages:
                ids = torch.from_numpy(np.where(observations == self.vocab_size, 0, observations)).to(self.device)
                last = torch.from_numpy((observations != self.vocab_size).sum(axis=1) - 1).to(self.device)
                all_of_them = torch.ones_like(ids)  # unsaid, a pad id at the end earns the user a warning
                plain = self.model(input_ids=ids, attention_mask=all_of_them, use_cache=False)
                expected = plain.logits[torch.arange(3), last].float()
                tolerance = self._tolerance(expected)
                if (self._encode(observations) - expected).abs().max().item() > tolerance:
                    raise NotImplementedError(
                        f"{type(self.model).__name__} changes its logits after the output embeddings in a way that is not known here."
                    )
                logits, _ = self._followed(observations)
                if (logits - expected).abs().max().item() > tolerance:
                    raise _CacheMismatchError
        except NotImplementedError:
            raise
        except Exception as error:
            reason = (
                "its cached logits differ"
                if isinstance(error, _CacheMismatchError)
                else f"{type(error).__name__}: {error}"
            )
            warnings.warn(
                f"The key/value cache cannot serve {type(self.model).__name__} here ({reason}). Every step re-encodes the whole "
                "observation instead: correct, but slower.",
                stacklevel=3,
            )
            return False
        finally:
            self.invalidate()
        return True


class _CacheMismatchError(Exception):
    """The probe's cached logits differ from the plain forward pass."""


_T = TypeVar("_T")


def _alive(reference: weakref.ref[_T] | None) -> _T | None:
    """What is referred to, if it is still there."""
    return None if reference is None else reference()


class _WeightWatch:
    """Notices that weights have changed.

    Version counters miss fused optimisers and writes through `.data`, so a few values of each parameter are compared
    as well; on a GPU that would cost a synchronisation per step and is left out (agents call `invalidate()` themselves).
    """

    SAMPLES = 4

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self._watched: list[tuple[dict[str, Any], str, torch.nn.Parameter]] = []
        self._places: list[int] = []
        self._samples: list[NDArray[Any]] = []
        self._seen: object = None

    def changed(self) -> bool:
        """Whether anything differs from the last call."""
        if not self._watched or self._places != self._where():
            self._watch()
        seen = [p._version for _, _, p in self._watched], np.concatenate(self._samples).tobytes()
        changed, self._seen = seen != self._seen, seen
        return changed

    def _where(self) -> list[int]:
        """Addresses of the parameters; 0 for one whose module has another by now."""
        return [p.data_ptr() if owner.get(name) is p else 0 for owner, name, p in self._watched]

    def _watch(self) -> None:
        """Look up the parameters anew."""
        modules = self.model.modules()
        self._watched = [
            (m._parameters, name, p) for m in modules for name, p in m._parameters.items() if p is not None
        ]
        self._places = self._where()
        self._samples = [np.empty(0, np.uint8), *(self._sampled(p) for _, _, p in self._watched)]
        self._seen = None

    def _sampled(self, p: torch.nn.Parameter) -> NDArray[Any]:
        """A view of a few evenly spaced values, the first among them."""
        if p.device.type != "cpu" or not p.is_contiguous() or not p.numel():
            return np.empty(0, np.uint8)
        words = (
            p.detach()
            .view(-1)
            .view(torch.uint8 if p.element_size() == 1 else getattr(torch, f"int{8 * p.element_size()}"))
        )
        return words.numpy()[:: max(1, (p.numel() - 1) // (self.SAMPLES - 1))]


def trunk_states(
    trunk: torch.nn.Module,
    tokens: NDArray[np.int64],
    lengths: NDArray[np.int64],
    rows: NDArray[np.int64],
    columns: NDArray[np.int64],
) -> torch.Tensor:
    """Last hidden states at some tokens of right-padded rows, in one pass without a cache. Differentiable.

    Args:
        trunk: A `transformers` model without its head.
        tokens: What stands after a row's length does not matter. Shape: (B, L).
        lengths: Shape: (B,).
        rows: Of the wanted states. Shape: (M,).
        columns: Of the wanted states. Shape: (M,).

    Returns:
        Shape: (M, d).
    """
    device = next(trunk.parameters()).device
    if (decoder := Decoder.of(trunk)) is not None:
        states, number = decoder.of_rows(tokens, lengths)
        return states.index_select(0, torch.from_numpy(number[rows, columns]).to(device))
    width = int(lengths.max())
    padded = np.arange(width) >= lengths[:, None]
    ids = torch.from_numpy(np.where(padded, 0, tokens[:, :width])).to(device)
    # Under a causal mask right padding cannot reach what stands before it, so full rows need no mask at all,
    # which leaves attention its fast path; it is passed for models that count positions by it.
    mask = torch.from_numpy(~padded).to(device, torch.long) if padded.any() else None
    states = trunk(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    assert isinstance(states, torch.Tensor)
    return states[torch.from_numpy(rows).to(device), torch.from_numpy(columns).to(device)]


def response_states(
    trunk: torch.nn.Module,
    tokens: NDArray[np.int64],
    prompt_length: NDArray[np.int64],
    response_length: NDArray[np.int64],
) -> torch.Tensor:
    """Last hidden states at which response tokens are predicted, episodes back to back. Differentiable.

    Args:
        trunk: A `transformers` model without its head.
        tokens: Prompt, response, then padding (any value). Shape: (B, L).
        prompt_length: Shape: (B,).
        response_length: Shape: (B,).

    Returns:
        Shape: (M, d) with M = response_length.sum().
    """
    read = prompt_length + response_length - 1  # nothing is predicted from a response's last token
    return trunk_states(trunk, tokens, read, *response_index(prompt_length, response_length))


def in_chunks(
    hidden: torch.Tensor, response_length: NDArray[np.int64], vocab_size: int
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Episodes in runs whose logits are small enough for a processor's cache, with their hidden states.

    Args:
        hidden: Episodes back to back. Shape: (M, d).
        response_length: Shape: (B,).
        vocab_size: V.
    """
    end = np.cumsum(response_length)
    for chunk in runs(response_length, LOGITS_PER_CHUNK // vocab_size):
        yield chunk, hidden[int(end[chunk.start] - response_length[chunk.start]) : int(end[chunk.stop - 1])]


def runs(lengths: NDArray[np.int64], tokens: int) -> Iterator[slice]:
    """Neighbouring rows in runs of at most `tokens` tokens (or of one row). Shape of lengths: (B,)."""
    end = np.cumsum(lengths)
    begin = 0
    while begin < len(end):
        first = end[begin] - lengths[begin]
        stop = max(begin + 1, int(np.searchsorted(end, first + tokens, side="right")))
        yield slice(begin, stop)
        begin = stop


def vocab_size(model: PreTrainedModel) -> int:
    """V: the number of logits the model returns (a tokenizer may know fewer tokens)."""
    return int(model.get_output_embeddings().weight.shape[0])


def max_positions(model: PreTrainedModel) -> int | None:
    """The longest sequence the model was built for; None where its config names no limit."""
    value = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return int(value) if value else None


def response_index(
    prompt_length: NDArray[np.int64], response_length: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(episode, position) at which each response token is predicted: the position before it. Shapes: (M,), (M,)."""
    rows = np.repeat(np.arange(len(response_length)), response_length)
    offset = np.arange(len(rows)) - np.repeat(np.cumsum(response_length) - response_length, response_length)
    return rows, prompt_length[rows] - 1 + offset


def length_buckets(lengths: NDArray[np.int64], tokens: int) -> Iterator[NDArray[np.int64]]:
    """Indices of rows of similar length, at most `tokens` a batch with padding counted, the longest first."""
    order = np.argsort(-lengths, kind="stable")
    begin = 0
    while begin < len(order):
        count = max(1, tokens // max(1, int(lengths[order[begin]])))
        yield order[begin : begin + count]
        begin += count
