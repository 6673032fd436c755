"""A policy and its reference in one pass, against each of them by itself."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

import textenv.attention
from textenv import LanguageModel
from textenv.pair import Pair, pairable

from ..tiny import VOCAB, tiny_model

ARCHITECTURES = {"llama": {"head_dim": 16, "intermediate_size": 32}, "gpt2": {"n_embd": 32, "n_inner": 48}}
LENGTH = 12


@pytest.fixture(params=ARCHITECTURES)
def reference(request: Any) -> LanguageModel:
    return LanguageModel(tiny_model(request.param, **ARCHITECTURES[request.param]), LENGTH)


@pytest.fixture
def policy(reference: LanguageModel) -> LanguageModel:
    """A clone with weights that have moved."""
    clone = reference.clone()
    move(clone)
    return clone


def move(lm: LanguageModel, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in lm.model.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator)


def observe(*lengths: int, seed: int = 0) -> np.ndarray:
    rows = np.full((len(lengths), LENGTH), VOCAB)
    for row, n in zip(rows, lengths, strict=True):
        row[:n] = np.random.default_rng(seed).integers(VOCAB, size=LENGTH)[:n]
    return rows


def plain(lm: LanguageModel, observations: np.ndarray) -> torch.Tensor:
    """Next-token logits of the model as `transformers` computes them."""
    rows = [torch.from_numpy(row[row != VOCAB])[None] for row in observations]
    with torch.no_grad():
        return torch.cat([lm.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -1] for ids in rows])


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Every pass that is made through a store: whether it was one of two models."""
    made: list[bool] = []
    step = textenv.attention.Slots.step

    def counted(self: Any, *args: Any) -> torch.Tensor:
        made.append(isinstance(self.decoder, Pair))
        return step(self, *args)

    monkeypatch.setattr(textenv.attention.Slots, "step", counted)
    return made


STAGES = [observe(5, 2, 8), observe(6, 3, 9), observe(7, 1, 12), observe(7, 4, 12), observe(1, 5, 12, seed=1)]


def test_one_pass_says_what_both_models_say(
    policy: Any, reference: Any, passes: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(textenv.attention.Slots, "BLOCK", 4)  # so that the store grows on the way
    for observations in STAGES:
        reference.awaited = observations
        for lm in (policy, reference):
            torch.testing.assert_close(lm.next_logits(observations), plain(lm, observations), atol=1e-4, rtol=1e-4)
    assert passes == [True] * len(STAGES)
    hidden = policy.next_hidden(observations), reference.next_hidden(observations)
    for lm, states in zip((policy, reference), hidden, strict=True):
        torch.testing.assert_close(lm.head(states), plain(lm, observations), atol=1e-4, rtol=1e-4)
    assert len(passes) == len(STAGES)


def test_what_nobody_awaits_is_the_policys_alone(policy: Any, reference: Any, passes: list[bool]) -> None:
    policy.next_logits(STAGES[0])
    reference.awaited = STAGES[0]
    policy.next_logits(STAGES[1])
    assert passes == [False, False]
    policy.next_logits(STAGES[0])  # of both
    policy.next_logits(STAGES[2])  # goes on from the first two, in the policy's own cache
    torch.testing.assert_close(reference.next_logits(STAGES[0]), plain(reference, STAGES[0]), atol=1e-4, rtol=1e-4)
    assert passes == [False, False, True, False]


@pytest.mark.parametrize("whose", ["policy", "reference"])
def test_both_follow_their_weights(policy: Any, reference: Any, whose: str) -> None:
    for k, observations in enumerate(STAGES):
        reference.awaited = observations
        for lm in (policy, reference):
            torch.testing.assert_close(lm.next_logits(observations), plain(lm, observations), atol=1e-4, rtol=1e-4)
        move(policy if whose == "policy" else reference, seed=k)
    for lm in (policy, reference):
        torch.testing.assert_close(lm.next_logits(observations), plain(lm, observations), atol=1e-4, rtol=1e-4)


def test_a_pass_that_fails_is_made_again(policy: Any, reference: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    reference.awaited = STAGES[0]
    policy.next_logits(STAGES[0])
    reference.awaited = STAGES[1]
    with monkeypatch.context() as broken:
        broken.setattr(Pair, "_normed", None)
        with pytest.raises(TypeError):
            policy.next_logits(STAGES[1])
    for lm in (reference, policy, reference):
        torch.testing.assert_close(lm.next_logits(STAGES[1]), plain(lm, STAGES[1]), atol=1e-4, rtol=1e-4)


def test_the_shared_cache_is_freed_with_the_policys(policy: Any, reference: Any) -> None:
    reference.awaited = STAGES[0]
    policy.next_logits(STAGES[0])
    store = weakref.ref(policy._joint.keys)
    gc.disable()
    try:
        policy.invalidate()
        assert store() is None
    finally:
        gc.enable()


def test_each_checks_itself(reference: Any) -> None:
    reference.check = True
    policy = reference.clone()
    reference.awaited = STAGES[0]
    policy.next_logits(STAGES[0])
    policy._joint.logits[0] += 1
    policy._joint.logits[1] += 1
    for lm in (policy, reference):
        with pytest.raises(RuntimeError, match="disagrees"):
            lm.next_logits(STAGES[0])


def test_models_of_different_shapes_go_by_themselves(policy: Any, reference: Any, passes: list[bool]) -> None:
    policy.model.resize_token_embeddings(VOCAB + 4)
    reference.awaited = STAGES[0]
    logits = policy.next_logits(STAGES[0])[:, :VOCAB]
    torch.testing.assert_close(logits, plain(policy, STAGES[0])[:, :VOCAB], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(reference.next_logits(STAGES[0]), plain(reference, STAGES[0]), atol=1e-4, rtol=1e-4)
    assert passes == [False, False]


@pytest.mark.parametrize(
    ("changes", "dtype", "pays"),
    [
        ({}, torch.float32, True),
        ({"intermediate_size": 1600}, torch.float32, False),
        ({"intermediate_size": 24}, torch.float32, False),
        ({}, torch.bfloat16, False),
    ],
    ids=["small", "large", "odd widths", "half precision"],
)
def test_what_would_not_be_faster_or_equal_is_not_paired(
    changes: dict[str, Any], dtype: torch.dtype, pays: bool
) -> None:
    model = tiny_model("llama", **{**ARCHITECTURES["llama"], "hidden_size": 64, **changes}).to(dtype)
    assert pairable(model.base_model, copy.deepcopy(model.base_model)) == pays


def test_models_that_differ_in_what_is_no_weight_are_not_paired(reference: LanguageModel) -> None:
    other = reference.clone()
    assert pairable(reference.model.base_model, other.model.base_model)
    other.model.config.update({"rms_norm_eps": 0.1, "layer_norm_epsilon": 0.1})
    assert not pairable(reference.model.base_model, other.model.base_model)


def test_two_clones_do_not_take_the_pass_from_each_other(policy: Any, reference: Any, passes: list[bool]) -> None:
    other = reference.clone()
    for observations in STAGES:
        reference.awaited = observations
        for lm in (policy, other, reference):
            torch.testing.assert_close(lm.next_logits(observations), plain(lm, observations), atol=1e-4, rtol=1e-4)
    assert passes == [True, False] * len(STAGES)


def test_a_reference_that_is_asked_first_is_not_asked_twice(policy: Any, reference: Any, passes: list[bool]) -> None:
    for observations in STAGES:
        reference.awaited = observations
        for lm in (reference, policy):
            torch.testing.assert_close(lm.next_logits(observations), plain(lm, observations), atol=1e-4, rtol=1e-4)
    assert passes == [False, False] * len(STAGES)


def test_the_reference_goes_on_without_its_policy(reference: Any, passes: list[bool]) -> None:
    policy = reference.clone()
    reference.awaited = STAGES[0]
    policy.next_logits(STAGES[0])
    del policy
    gc.collect()
    torch.testing.assert_close(reference.next_logits(STAGES[0]), plain(reference, STAGES[0]), atol=1e-4, rtol=1e-4)
    assert passes == [True, False]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda lm: pickle.loads(pickle.dumps(lm))], ids=["copy", "pickle"])
def test_copies_leave_the_caches_behind(policy: Any, reference: Any, copied: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("textenv.packed.PACK_FROM", 1)
    reference.awaited = STAGES[0]
    policy.next_logits(STAGES[0])
    policy.next_logits(STAGES[1])  # by a cache of its own, with packed layers
    for lm in (policy, reference):
        twin = copied(lm)
        move(twin)
        for original in (twin, lm):
            expected = plain(original, STAGES[0])
            torch.testing.assert_close(original.next_logits(STAGES[0]), expected, atol=1e-4, rtol=1e-4)


def test_the_step_lane_makes_one_pass_and_the_deferred_lane_is_the_policys(passes: list[bool]) -> None:
    envs = gym.make_vec("textenv/Tree-v0", num_envs=8, beta=0.1)
    policy = envs.unwrapped.reference.clone()
    envs.unwrapped.attach_policy(policy)
    observations, _ = envs.reset(seed=0)
    rng = np.random.default_rng(0)
    passes.clear()
    for _ in range(20):
        policy.log_probs_all(observations)
        observations, *_ = envs.step(rng.integers(envs.unwrapped.vocab_size, size=8))
    assert passes == [True] * 20
    with envs.unwrapped.deferred(episodes=8) as ledger:
        observations, _ = envs.reset()
        while not ledger.done:
            policy.log_probs_all(observations)
            observations, *_ = envs.step(rng.integers(envs.unwrapped.vocab_size, size=8))
    assert len(passes) > 20
    assert not any(passes[20:])


@pytest.mark.parametrize("autoreset_mode", ["SAME_STEP", "NEXT_STEP"])
@pytest.mark.parametrize("lanes", [1, 7, 64])
def test_the_kl_of_the_reference_with_itself_is_exactly_zero(
    lanes: int, autoreset_mode: str, passes: list[bool]
) -> None:
    envs = gym.make_vec("textenv/Tree-v0", num_envs=lanes, beta=0.1, autoreset_mode=autoreset_mode)
    envs.unwrapped.attach_policy(envs.unwrapped.reference.clone())
    envs.reset(seed=0)
    rng, kl = np.random.default_rng(0), []
    passes.clear()
    for _ in range(40):
        *_, info = envs.step(rng.integers(envs.unwrapped.vocab_size, size=lanes))
        final = info.get("final_info", info)
        kl.extend(final["kl"][final["_kl"]] if "kl" in final else [])
    assert all(passes)
    assert len(passes) > 20  # an episode that begins as the last one did needs none
    assert len(kl) > lanes
    assert not np.any(kl)


def test_equal_models_with_grouped_heads_say_the_same_to_the_last_bit(passes: list[bool]) -> None:
    reference = LanguageModel(tiny_model("llama", **ARCHITECTURES["llama"]), LENGTH)
    policy = reference.clone()
    passes.clear()  # what the probe at construction made
    for observations in STAGES:
        reference.awaited = observations
        assert torch.equal(policy.next_logits(observations), reference.next_logits(observations))
    assert passes == [True] * len(STAGES)
