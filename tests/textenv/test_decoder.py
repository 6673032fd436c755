"""The written-out pass says what `transformers` says, follows the weights, and refuses what it does not know."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from textenv import LanguageModel
from textenv.attention import Rows, Slots
from textenv.decoder import Decoder
from textenv.lm import trunk_states

from ..tiny import VOCAB, tiny_model

KNOWN: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT-2": ("gpt2", {}),
    "GPT-2, relu": ("gpt2", {"activation_function": "relu"}),
    "Llama, grouped heads": ("llama", {}),
    "Llama, one key head": ("llama", {"num_key_value_heads": 1, "head_dim": 6}),
    "Llama, every head its keys": ("llama", {"num_key_value_heads": 4}),
    "Llama, tied, with biases": ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "Llama, one layer, other angles": (
        "llama",
        {"num_hidden_layers": 1, "rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
    ),
}
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "another family": ("opt", {}),
    "scaled rotation": ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0}}),
    "attention scaled by layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "another activation": ("gpt2", {"activation_function": "swish"}),
}


@pytest.fixture(params=KNOWN.values(), ids=KNOWN)
def known(request: pytest.FixtureRequest) -> Any:
    architecture, overrides = request.param
    return tiny_model(architecture, **overrides)


def plain_states(model: Any, row: np.ndarray) -> torch.Tensor:
    """Last hidden states of one row by the plain model. Shape: (n, d)."""
    ids = torch.from_numpy(row[None])
    return model.base_model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).last_hidden_state[0]


def some_rows(rows: int = 4, width: int = 12) -> np.ndarray:
    return np.random.default_rng(0).integers(VOCAB, size=(rows, width))


BEGINNINGS = {  # row -> (the row whose beginning it has, tokens of it)
    "all rows differ": {},
    "rows of a group share their prompt": {1: (0, 4), 3: (0, 4)},
    "beginnings of beginnings": {1: (0, 5), 2: (0, 1), 3: (1, 7)},
    "prefixes of one row": {0: (1, 5), 2: (1, 1), 3: (1, 7)},
}


@pytest.mark.parametrize("join", [0, 99], ids=["joined", "side by side"])
@pytest.mark.parametrize("short", [0, 64], ids=["sdpa", "products"])
@pytest.mark.parametrize("beginnings", BEGINNINGS.values(), ids=BEGINNINGS)
def test_whole_rows_and_their_gradients_are_those_of_the_plain_model(
    known: Any, beginnings: dict[int, tuple[int, int]], short: int, join: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("textenv.decoder.JOIN_FROM", join)
    monkeypatch.setattr(Rows, "SHORT", short)
    decoder = Decoder.of(known.base_model)
    assert decoder is not None
    tokens, lengths = some_rows(), np.array([5, 12, 1, 7])
    for row, (other, n) in beginnings.items():
        tokens[row, :n] = tokens[other, :n]
    states, number = decoder.of_rows(tokens, lengths)
    alike = {tuple(row[: t + 1]) for row, n in zip(tokens, lengths, strict=True) for t in range(n)}
    assert len(states) == len(alike)  # each beginning is computed once
    ours = torch.cat([states[torch.from_numpy(at[:n])] for at, n in zip(number, lengths, strict=True)])
    twin = copy.deepcopy(known)
    theirs = torch.cat([plain_states(twin, row[:n]) for row, n in zip(tokens, lengths, strict=True)])
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    weight = torch.randn_like(ours)
    (ours * weight).sum().backward()
    (theirs * weight).sum().backward()
    for (name, p), q in zip(known.base_model.named_parameters(), twin.base_model.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-3, rtol=1e-3, msg=name)


@pytest.mark.parametrize(
    ("pack_from", "few_rows"), [(1, 1), (1, 64), (1_000_000, 64)], ids=["packed", "packed, few rows", "plain"]
)
@torch.no_grad()
def test_lanes_that_begin_grow_and_share_a_prompt_in_one_pass(
    known: Any, pack_from: int, few_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("textenv.packed.PACK_FROM", pack_from)
    monkeypatch.setattr("textenv.packed.FEW_ROWS", few_rows)
    monkeypatch.setattr("textenv.packed.WIDE", 1)
    monkeypatch.setattr(Slots, "BLOCK", 4)  # so that the store grows on the way: 8 wide, then 12
    decoder = Decoder.of(known.base_model)
    assert decoder is not None
    slots, tokens = Slots(decoder.fused(), 4, 12), some_rows()
    tokens[2, :3] = tokens[0, :3]
    stop = np.zeros(4, np.int64)
    # begin (two with one prompt); grow by one; grow by several, while lane 1 begins again; shrinking batch
    for start, new_stop in (
        ([0, 0, 0, 0], [3, 1, 3, 5]),
        ([3, 1, 3, 5], [4, 2, 4, 6]),
        ([4, 0, 4, 6], [7, 4, 5, 12]),
        ([7, 4], [8, 5]),
    ):
        stop = np.array(new_stop)
        states = slots.step(tokens[: len(stop)], np.array(start), stop)
        for row, n, state in zip(tokens, stop, states, strict=False):
            torch.testing.assert_close(state, plain_states(known, row[:n])[-1], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_recorded_step_is_repeated_with_the_tokens_that_come_next(
    known: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a GPU does with CUDA graphs, with a recording that any machine can repeat."""
    widths = []

    def recorded(run: Callable[[], torch.Tensor], device: torch.device) -> tuple[Callable[[], object], torch.Tensor]:
        states = run().clone()
        widths.append(slots.width)
        return lambda: states.copy_(run()), states

    monkeypatch.setattr("textenv.attention._recorded", recorded)
    monkeypatch.setattr(Slots, "BLOCK", 1)  # 4 where steps are recorded
    decoder = Decoder.of(known.base_model)
    assert decoder is not None
    slots, tokens = Slots(decoder.fused(), 4, 12), some_rows()
    slots.replays = True
    for start, stop in (
        ([0, 0, 0, 0], [3, 1, 3, 5]),
        ([3, 1, 3, 5], [4, 2, 4, 6]),  # recorded
        ([4, 2, 4, 6], [5, 3, 5, 7]),  # repeated
        ([5, 0, 5, 7], [6, 2, 6, 8]),  # one begins again: as ever
        ([6, 2, 6], [7, 3, 7]),  # fewer lanes: as ever
        ([7, 3, 7, 8], [8, 4, 8, 9]),  # wider: recorded again
        ([8, 4, 8, 9], [9, 5, 9, 10]),
    ):
        states = slots.step(tokens[: len(stop)], np.array(start), np.array(stop))
        for row, n, state in zip(tokens, stop, states, strict=False):
            torch.testing.assert_close(state, plain_states(known, row[:n])[-1], atol=1e-4, rtol=1e-4)
    assert widths == [8, 12]


@torch.no_grad()
def test_what_a_recorded_step_reads_is_kept_for_it(known: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA graph holds addresses, not tensors."""
    monkeypatch.setattr("textenv.attention._recorded", lambda run, device: (lambda: None, run()))
    decoder = Decoder.of(known.base_model)
    assert decoder is not None
    slots, tokens = Slots(decoder.fused(), 4, 12), some_rows()
    slots.replays = True
    for start, stop in (([0, 0, 0, 0], [3, 1, 3, 5]), ([3, 1, 3, 5], [4, 2, 4, 6])):
        slots.step(tokens, np.array(start), np.array(stop))
    assert slots.steady is not None
    read = [weakref.ref(x) for x in (*slots.steady.written, slots.steady.places, slots.steady.last.mask)]
    slots.step(tokens, np.array([4, 0, 4, 6]), np.array([5, 1, 5, 7]))  # no steady one: what is recorded stays
    assert slots.graph is not None
    assert all(x() is not None for x in read)


def test_keys_and_values_are_freed_at_once_when_weights_change() -> None:
    """Nothing waits for the collector of cycles: memory would hold several stores."""
    lm, row = LanguageModel(tiny_model("llama"), 12), np.array([[3, 4, 5, *[VOCAB] * 9]])
    gc.disable()
    try:
        lm.next_logits(row)
        row[0, 3] = 6
        lm.next_logits(row)  # a step that the next one could go on from
        [cache] = lm._caches.values()
        store = weakref.ref(cache.keys)
        del cache
        lm.invalidate()
        assert store() is None
    finally:
        gc.enable()


@torch.no_grad()
def test_a_prompt_shared_by_a_group_is_computed_once_with_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = tiny_model("llama"), []
    written_out = Decoder.__call__

    def watched(self: Decoder, ids: torch.Tensor, *args: Any) -> torch.Tensor:
        seen.append(len(ids))
        return written_out(self, ids, *args)

    alone, together = LanguageModel(model, 12), LanguageModel(model, 12)
    row = np.array([[3, 4, 5, *[VOCAB] * 9]])
    once = alone.next_logits(row)
    monkeypatch.setattr(Decoder, "__call__", watched)
    shared = together.next_logits(row.repeat(4, axis=0))
    assert seen == [2 + 4]  # the last token of each, and the two before it for all
    torch.testing.assert_close(shared, once.expand(4, -1), atol=1e-5, rtol=1e-5)
    grown = row.repeat(4, axis=0)
    grown[:, 3] = [6, 7, 8, 9]  # from here on each goes its way
    expected = torch.stack([model.lm_head(plain_states(model, observation[:4])[-1]) for observation in grown])
    torch.testing.assert_close(together.next_logits(grown), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("architecture", "overrides"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_known_goes_through_transformers(architecture: str, overrides: dict[str, Any]) -> None:
    model = tiny_model(architecture, **overrides)
    assert Decoder.of(model.base_model) is None
    tokens, lengths = some_rows(), np.array([5, 12, 1, 7])
    ours = trunk_states(model.base_model, tokens, lengths, np.arange(4), lengths - 1)
    theirs = torch.stack([plain_states(model, row[:n])[-1] for row, n in zip(tokens, lengths, strict=True)])
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_a_pass_that_is_not_that_of_the_name_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    plain = type(model.base_model).forward
    monkeypatch.setattr(type(model.base_model), "forward", lambda self, **kwargs: shifted(plain(self, **kwargs)))
    assert Decoder.of(model.base_model) is None


def shifted(output: Any) -> Any:
    output.last_hidden_state = output.last_hidden_state + 0.1
    return output


def test_a_layer_that_is_replaced_later_and_a_hook_end_the_written_out_pass() -> None:
    class Adapter(nn.Linear):  # as an adapter library puts in the place of a layer
        pass

    trunk = tiny_model("llama").base_model
    assert Decoder.of(trunk) is not None
    handle = trunk.layers[1].mlp.down_proj.register_forward_hook(lambda *_: None)
    assert Decoder.of(trunk) is None
    handle.remove()
    assert Decoder.of(trunk) is not None
    old = trunk.layers[0].self_attn.q_proj
    trunk.layers[0].self_attn.q_proj = Adapter(old.in_features, old.out_features, bias=False)
    assert Decoder.of(trunk) is None


def test_a_packed_head_is_packed_again_after_an_optimiser_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("textenv.packed.PACK_FROM", 1)
    monkeypatch.setattr("textenv.packed.FEW_ROWS", 1)
    model = tiny_model("llama")
    lm, rows = LanguageModel(model, 12), np.array([[3, 4, 5, *[VOCAB] * 9], [6, *[VOCAB] * 11]])
    adam = torch.optim.Adam(model.parameters(), lr=0.1, fused=True)
    before = lm.next_logits(rows)
    assert lm._packed_head is not None
    for _ in range(2):
        model(torch.tensor([[3, 4, 5]])).logits.logsumexp(-1).sum().backward()
        adam.step()
        adam.zero_grad()
        with torch.no_grad():
            expected = torch.stack([model.lm_head(plain_states(model, row)[-1]) for row in (rows[0, :3], rows[1, :1])])
        after = lm.next_logits(rows)
        torch.testing.assert_close(after, expected, atol=1e-4, rtol=1e-4)
        assert (after - before).abs().max() > 0.1
        scores = lm.score(rows[:1], np.array([1]), np.array([2]))  # whole episodes read the same head
        log_p = model(torch.tensor([[3, 4, 5]])).logits[0].log_softmax(-1)
        np.testing.assert_allclose(scores[0], [log_p[0, 4].item(), log_p[1, 5].item()], atol=1e-4)


def test_a_packed_head_is_packed_again_where_the_cache_does_not_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("textenv.packed.PACK_FROM", 1)
    monkeypatch.setattr("textenv.packed.FEW_ROWS", 1)
    model = tiny_model("llama")
    lm, rows = LanguageModel(model, 12, cached=False), np.array([[3, 4, 5, *[VOCAB] * 9], [6, *[VOCAB] * 11]])
    lm.score(rows[:1], np.array([1]), np.array([2]))
    assert lm._packed_head is not None
    with torch.no_grad():
        model.lm_head.weight += 0.1
        expected = torch.stack([model.lm_head(plain_states(model, row)[-1]) for row in (rows[0, :3], rows[1, :1])])
    torch.testing.assert_close(lm.next_logits(rows), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-3), (torch.bfloat16, 0.3)])
@torch.no_grad()
def test_on_a_gpu_lanes_say_what_the_plain_model_says(dtype: torch.dtype, bound: float) -> None:
    model = tiny_model("llama").to("cuda", dtype)
    lm, tokens = LanguageModel(model, 12), some_rows(3)
    assert lm.cached
    # steps by one token are recorded and repeated; before the last of them a lane grows by several and one begins again
    for lengths in ([3, 1, 5], [4, 2, 6], [5, 3, 7], [6, 4, 8], [7, 8, 1], [8, 9, 2]):
        observations = np.full((3, 12), VOCAB)
        for lane, n in enumerate(lengths):
            observations[lane, :n] = tokens[lane, :n]
        rows = [torch.from_numpy(row[:n])[None].cuda() for row, n in zip(tokens, lengths, strict=True)]
        expected = torch.cat([model(ids, attention_mask=torch.ones_like(ids)).logits[:, -1].float() for ids in rows])
        torch.testing.assert_close(lm.next_logits(observations), expected, atol=bound, rtol=bound)


@torch.no_grad()
def test_in_bfloat16_lanes_stay_near_the_float32_model() -> None:
    exact = tiny_model("llama", spread=0.1)
    half = LanguageModel(copy.deepcopy(exact).to(torch.bfloat16), 12)
    assert Decoder.of(half.model.base_model) is not None
    rows = np.array([[3, 4, 5, *[VOCAB] * 9], [6, 7, *[VOCAB] * 10]])
    for grown in range(2):  # a prompt, then one token more
        if grown:
            rows[0, 3], rows[1, 2] = 8, 9
        near = LanguageModel(exact, 12).next_logits(rows)
        assert 0 < (half.next_logits(rows) - near).abs().max() < 0.1
