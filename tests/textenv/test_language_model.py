"""The cache follows the observation: whatever is asked in whatever order, the answer is that of a plain forward pass."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from textenv import Behaviour, LanguageModel
from textenv.decoder import Decoder

from ..tiny import ARCHITECTURES, VOCAB, tiny_model
from .reference_env import plain_log_prob

WIDTH = 12


def observe(rows: list[list[int]], width: int = WIDTH, vocab: int = VOCAB) -> np.ndarray:
    """Lists of tokens as observations. Shape: (N, width)."""
    return np.array([row + [vocab] * (width - len(row)) for row in rows])


def plain_log_probs(model: Any, row: list[int]) -> np.ndarray:
    """log p of every next token, by one plain forward pass. Shape: (V,)."""
    with torch.no_grad():
        logits = model(torch.tensor([row]), attention_mask=torch.ones(1, len(row))).logits[0, -1]
    return torch.log_softmax(logits.double(), dim=-1).numpy()


def assert_right(lm: LanguageModel, rows: list[list[int]], what: str = "", known: dict[Any, Any] | None = None) -> None:
    """Compare with plain forward passes; those that stand in `known` are not repeated."""
    known = {} if known is None else known
    for row in rows:
        if tuple(row) not in known:
            known[tuple(row)] = plain_log_probs(lm.model, row)
    ours = lm.log_probs_all(observe(rows, lm.max_tokens, lm.vocab_size))
    np.testing.assert_allclose(ours, [known[tuple(row)] for row in rows], atol=1e-4, err_msg=what)


# ---------------------------------------------------------------------- any order of operations


def write_weights(model: Any, how: str, rng: np.random.Generator) -> None:
    """Change every weight a little, in one of the ways that optimisers and users have."""
    parameters = list(model.parameters())
    torch.manual_seed(int(rng.integers(2**31)))
    if how == "load_state_dict":
        model.load_state_dict({k: v + 0.05 * torch.randn_like(v) for k, v in model.state_dict().items()})
    elif how == ".data":
        for p in parameters:
            p.data.add_(0.05 * torch.randn_like(p))
    elif how == ".data replaced":
        for p in parameters:
            p.data = p.data + 0.05 * torch.randn_like(p)
    elif how == "polyak":  # as stable-baselines3's polyak_update writes
        for p in parameters:
            p.data.mul_(0.9)
            torch.add(p.data, torch.randn_like(p), alpha=0.05, out=p.data)
    else:
        kinds = {
            "sgd": lambda: torch.optim.SGD(parameters, lr=0.05),
            "adamw": lambda: torch.optim.AdamW(parameters, lr=0.05),
            "fused adamw": lambda: torch.optim.AdamW(parameters, lr=0.05, fused=True),
        }
        for p in parameters:
            p.grad = torch.randn_like(p)
        kinds[how]().step()
        model.zero_grad(set_to_none=True)


WRITES = ("sgd", "adamw", "fused adamw", "load_state_dict", ".data", ".data replaced", "polyak")
tokens = st.integers(0, VOCAB - 1)
some_lanes = st.lists(st.booleans(), min_size=3, max_size=3)
operations = st.lists(
    st.one_of(
        st.tuples(st.just("step"), some_lanes, st.lists(tokens, min_size=3, max_size=3)),  # the others are idle
        st.tuples(st.just("new prompt"), st.integers(0, 2), st.lists(tokens, min_size=1, max_size=WIDTH)),
        st.tuples(st.just("rewind"), st.integers(0, 2), st.integers(1, WIDTH)),
        st.tuples(st.just("grow"), st.integers(0, 2), st.lists(tokens, min_size=1, max_size=4)),
        st.tuples(st.just("change a token"), st.integers(0, 2), st.integers(0, WIDTH - 1), tokens),
        st.tuples(st.just("swap lanes")),
        st.tuples(st.just("other batch"), st.integers(1, 2)),
        st.tuples(st.just("write weights"), st.sampled_from(WRITES), st.integers(0, 99)),
        st.tuples(st.just("ask again")),
    ),
    min_size=4,
    max_size=10,
)


def follow(lm: LanguageModel, ops: list[tuple[Any, ...]]) -> None:
    """Do the operations, and compare with a plain forward pass after each."""
    rows, known = [[3, 4, 5], [6], [7, 8, 9, 10]], {}
    for op, *args in [("ask again",), *ops]:
        asked = rows
        if op == "step":
            for row, moves, token in zip(rows, *args, strict=True):
                row.extend([token] if moves and len(row) < WIDTH else [])
        elif op == "new prompt":
            rows[args[0]][:] = args[1]
        elif op == "rewind":
            rows[args[0]][args[1] :] = []
        elif op == "grow":
            rows[args[0]][:] = (rows[args[0]] + args[1])[:WIDTH]
        elif op == "change a token":
            rows[args[0]][min(args[1], len(rows[args[0]]) - 1)] = args[2]
        elif op == "swap lanes":
            rows[0], rows[2] = rows[2], rows[0]
        elif op == "other batch":
            asked = rows[: args[0]]
        elif op == "write weights":
            write_weights(lm.model, args[0], np.random.default_rng(args[1]))
            known.clear()
        assert_right(lm, asked, f"after {op} {args}", known)


@given(ops=operations)
@settings(max_examples=12, deadline=None, derandomize=True)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_cache_equals_a_plain_forward_pass_in_any_order_of_operations(architecture: str, ops: Any) -> None:
    lm = LanguageModel(tiny_model(architecture), WIDTH)
    assert lm.cached
    follow(lm, ops)


@given(ops=operations)
@settings(max_examples=8, deadline=None, derandomize=True)
def test_the_fallback_equals_a_plain_forward_pass_in_any_order_of_operations(ops: Any) -> None:
    with warnings.catch_warnings(action="ignore"):
        lm = LanguageModel(tiny_model("mistral", sliding_window=4), WIDTH)
    assert not lm.cached
    follow(lm, ops)


@pytest.mark.parametrize("how", WRITES)
def test_each_way_of_writing_weights_is_noticed(how: str) -> None:
    lm = LanguageModel(tiny_model("llama"), WIDTH)
    rows = [[3, 4, 5], [6, 7]]
    assert_right(lm, rows)
    stale = lm.log_probs_all(observe(rows))
    write_weights(lm.model, how, np.random.default_rng(0))
    assert_right(lm, rows)
    assert np.abs(lm.log_probs_all(observe(rows)) - stale).max() > 0.01  # so the test above would have seen stale ones


def test_a_single_weight_written_in_place_is_noticed() -> None:
    lm, rows = LanguageModel(tiny_model("llama"), WIDTH), [[3, 4], [5]]
    assert_right(lm, rows)
    with torch.no_grad():
        lm.model.get_output_embeddings().weight.view(-1)[1] += 5.0  # too few for a sample, but counted by torch
    assert_right(lm, rows)


def test_the_real_model_through_random_episodes(textenv_data: Any) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(textenv_data / "stories260K", dtype=torch.float32)
    lm, rng = LanguageModel(model, 40), np.random.default_rng(0)
    assert lm.cached
    rows = [rng.integers(512, size=n).tolist() for n in (3, 20, 11, 1)]
    for _ in range(25):
        assert_right(lm, rows)
        for lane, row in enumerate(rows):
            event = rng.random()
            if len(row) == 40 or event < 0.1:
                rows[lane] = rng.integers(512, size=rng.integers(1, 30)).tolist()
            elif event < 0.9:
                row.append(int(rng.integers(512)))


# ---------------------------------------------------------------------- the fallback


def test_a_window_shorter_than_the_observation_falls_back_and_says_so_once(windowed_mistral: Any) -> None:
    with pytest.warns(UserWarning, match="re-encodes the whole observation instead: correct, but slower"):
        lm = LanguageModel(windowed_mistral, WIDTH)
    again, clone = LanguageModel(windowed_mistral, WIDTH), lm.clone()  # a second warning would be an error here
    assert {lm.cached, again.cached, clone.cached} == {False}
    assert_right(lm, [list(range(3, 15)), [4, 5, 6, 7, 8, 9], [3]])


@pytest.mark.parametrize("spread", [0.3, 0.0], ids=["wide weights", "as initialised"])
def test_a_window_one_token_too_short_is_found_out(spread: float) -> None:
    with pytest.warns(UserWarning, match="re-encodes"):
        assert not LanguageModel(tiny_model("mistral", sliding_window=WIDTH - 1, spread=spread), WIDTH).cached


def test_a_window_as_long_as_the_observation_uses_the_cache() -> None:
    lm = LanguageModel(tiny_model("mistral", sliding_window=WIDTH), WIDTH)
    assert lm.cached
    assert_right(lm, [list(range(3, 15)), [4, 5, 6]])


# ---------------------------------------------------------------------- what the cache may not do


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "opt"])
def test_decoding_computes_one_token_per_moving_lane_and_none_for_idle_ones(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    model = tiny_model(architecture)
    written_out = Decoder.__call__

    def watched(self: Decoder, ids: torch.Tensor, *args: Any) -> torch.Tensor:
        seen.append(ids.numel())
        return written_out(self, ids, *args)

    lm, rows = LanguageModel(model, WIDTH), [[3, 4, 5], [6], [7, 8]]
    if architecture == "opt":  # through transformers
        model.base_model.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
        )
    monkeypatch.setattr(Decoder, "__call__", watched)
    lm.next_logits(observe(rows))
    seen.clear()
    lm.next_logits(observe(rows))
    assert seen == []
    rows[0].append(9)
    rows[2].append(9)
    lm.next_logits(observe(rows))
    assert seen == [2]


def test_numbers_do_not_depend_on_what_a_lane_did_before(model: Any) -> None:
    fresh, used = LanguageModel(model, WIDTH), LanguageModel(model, WIDTH)
    used.next_logits(observe([[3, 4, 5, 6, 7], [3, 4, 5, 6]]))
    used.next_logits(observe([[9, 9], [3, 4, 5, 6]]))
    rows = observe([[3, 4, 5, 6, 8], [3, 4, 5, 7]])
    assert torch.equal(used.next_logits(rows), fresh.next_logits(rows))


def test_returned_logits_are_the_callers(model: Any) -> None:
    lm, rows = LanguageModel(model, WIDTH), [[3, 4], [5]]
    lm.next_logits(observe(rows)).fill_(0.0)
    assert_right(lm, rows)


def test_check_finds_a_write_that_nothing_else_sees() -> None:
    lm = LanguageModel(tiny_model("llama"), WIDTH, check=True)
    rows = [[3, 4], [5]]
    assert_right(lm, rows)
    lm.model.get_output_embeddings().weight.data.view(-1)[1] += 5.0  # one weight, past the version counter
    with pytest.raises(RuntimeError, match=r"disagrees with a plain forward pass.*Call invalidate\(\)"):
        lm.next_logits(observe(rows))
    lm.invalidate()
    assert_right(lm, rows)


def test_a_clone_has_weights_and_a_cache_of_its_own(model: Any) -> None:
    lm = LanguageModel(model, WIDTH)
    clone = lm.clone()
    before = lm.log_probs_all(observe([[3, 4]]))
    write_weights(clone.model, ".data", np.random.default_rng(0))
    assert_right(clone, [[3, 4]])
    assert (lm.log_probs_all(observe([[3, 4]])) == before).all()
    assert all(p.requires_grad for p in clone.model.parameters())


def test_dropout_is_off() -> None:
    lm = LanguageModel(tiny_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5).train(), WIDTH)
    assert_right(lm, [[3, 4, 5]])
    assert not lm.model.training


def test_a_model_with_too_few_positions_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"up to 12 tokens \(prompt and response\), but the model has only 8 positions"
    ):
        LanguageModel(tiny_model("gpt2", positions=8), WIDTH)


# ---------------------------------------------------------------------- whole episodes


def test_scoring_episodes_equals_scoring_token_by_token(architecture: str) -> None:
    temperature = 0.6
    lm = LanguageModel(tiny_model(architecture), WIDTH, Behaviour(temperature=temperature))
    rows = [[3, 4, 5, 6, 7, 1], [8, 9], list(range(3, 15)), [5, 1]]
    prompt, response = np.array([3, 1, 4, 1]), np.array([3, 1, 8, 1])
    scores = lm.score(observe(rows), prompt, response)
    assert scores.shape == (4, 8)
    for row, m, n, ours in zip(rows, prompt, response, scores, strict=True):
        expected = [plain_log_prob(lm.model, row[:t], row[t], temperature) for t in range(m, m + n)]
        np.testing.assert_allclose(ours, expected + [0.0] * (8 - n), atol=1e-4)


@pytest.mark.parametrize("cached", [True, False])
def test_hidden_states_are_those_of_the_plain_model_with_the_cache_and_without(architecture: str, cached: bool) -> None:
    model = tiny_model(architecture)
    lm = LanguageModel(model, WIDTH, cached=cached)
    rows = [[3, 4, 5], [6], list(range(3, 3 + WIDTH))]
    with torch.no_grad():
        expected = [model.base_model(torch.tensor([row])).last_hidden_state[0, -1] for row in rows]
    for read in (lm.next_hidden, lm.last_hidden):
        torch.testing.assert_close(read(observe(rows)).detach(), torch.stack(expected), atol=1e-4, rtol=1e-4)


def test_the_memory_bound_on_a_pass_changes_nothing(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, rng = LanguageModel(model, WIDTH), np.random.default_rng(0)
    prompt, response = rng.integers(1, 6, size=9), rng.integers(1, 7, size=9)
    tokens = observe([rng.integers(VOCAB, size=m + n).tolist() for m, n in zip(prompt, response, strict=True)])
    whole = lm.score(tokens, prompt, response)
    monkeypatch.setattr("textenv.lm.TOKENS_PER_PASS", 20)
    np.testing.assert_allclose(lm.score(tokens, prompt, response), whole, atol=1e-4)


def test_gradients_through_teacher_forcing_are_those_of_the_plain_model() -> None:
    lm, rows = LanguageModel(tiny_model("llama"), WIDTH), [[3, 4, 5, 6], [7, 8, 1]]
    prompt, response = np.array([2, 1]), np.array([2, 2])
    part = observe(rows), prompt, response
    logits, drawn = lm.response_logits(lm.response_hidden(*part), *part)
    logits.log_softmax(-1).gather(-1, drawn[:, None]).sum().backward()
    plain = copy.deepcopy(lm.model)
    plain.zero_grad()
    for row, m in zip(rows, prompt, strict=True):
        log_p = plain(torch.tensor([row])).logits[0].log_softmax(-1)
        log_p[range(m - 1, len(row) - 1), row[m:]].sum().backward()
    for ours, theirs in zip(lm.model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-4, rtol=1e-4)
