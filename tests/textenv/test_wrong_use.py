"""What is used wrongly is answered with one clear error: what was expected, what came, and what to do."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.error import InvalidAction, ResetNeeded
from gymnasium.vector import AutoresetMode

from ..tiny import EOS, VOCAB, char_tokenizer, tiny_model
from .letters import ROWS

A = 3


def both(make: Any, make_vec: Any, message: str, **wrong: Any) -> None:
    """Both constructors refuse the keywords: a ValueError with this message, not buried in a dump of all keywords."""
    for construct in (make, make_vec):
        with pytest.raises(ValueError, match=message) as caught:
            construct(**wrong)
        assert len(str(caught.value)) < 700
        assert "with kwargs" not in str(caught.value)


# ---------------------------------------------------------------------- construction


def test_an_unknown_id_is_answered_with_the_nearest_one() -> None:
    with pytest.raises(gym.error.Error, match="Did you mean: `Prompts`"):
        gym.make("textenv/Promts-v0")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_new_token": 4}, r"Unknown keyword 'max_new_token'; expected one of .*Did you mean `max_new_tokens`\?"),
        ({"betta": 0.1}, r"Unknown keyword 'betta'.*Did you mean `beta`\?"),
        ({"prompts": []}, "at least one prompt in the list of prompts, got none"),
        ({"prompts": [""]}, "prompt 0 of the prompts to hold text, got an empty string"),
        ({"prompts": "missing.jsonl"}, r"No such file: missing\.jsonl \(looked in "),
        ({"max_prompt_tokens": 2}, r"Prompt 0 .* has 3 tokens, more than max_prompt_tokens=2 \(3 prompts are too long\)"),
        ({"max_new_tokens": 44}, r"up to 49 tokens \(prompt and response\).*only 48 positions.*smaller max_new_tokens"),
        ({"max_prompt_tokens": 44}, r"up to 49 tokens .*only 48 positions"),
        ({"max_new_tokens": 0}, "max_new_tokens to be a positive integer, got 0"),
        ({"max_new_tokens": 2.5}, "max_new_tokens to be a positive integer, got 2.5"),
        ({"max_new_tokens": True}, "max_new_tokens to be a positive integer, got True"),
        ({"stop_tokens": [1, 16]}, r"stop tokens between 0 and 15, got \[16\]"),
        ({"split": "test"}, "These prompts have no splits, so split='test' cannot be had"),
        ({"prompts": {"train": ["a"], "test": ["b"]}, "split": "tets"}, r"Unknown split 'tets'; .*Did you mean `test`\?"),
        ({"prompts": {"prompt": ["a", "b"]}}, r"hold splits, .*, got one of columns. Pass a list of rows"),
        ({"tokenizer": None}, "does not carry its tokenizer: pass tokenizer="),
        ({"tokenizer": "/nowhere"}, "Could not load a tokenizer from '/nowhere'"),
        ({"model": None}, "model= to be a hub name, a directory or a loaded causal language model, got None"),
        ({"model": 3}, "a transformers causal language model, got int"),
        ({"model": "/nowhere"}, "Could not load a causal language model from '/nowhere'.*save_pretrained"),
        ({"model": "no-such/model"}, "Could not load the model 'no-such/model'.*pass a local directory"),
        ({"beta": -1.0}, "finite beta >= 0"),
        ({"beta": "high"}, "beta to be a number, FixedKL or AdaptiveKL, got 'high'"),
        ({"kl": "k3"}, "only k1's reward-to-go gives the gradient"),
        ({"kl": "none"}, "Expected kl='policy' or kl='reference', got 'none'"),
        ({"temperature": 0.0}, "temperature > 0, got 0.0"),
        ({"temperature": "hot"}, "str"),
        ({"autoreset_mode": "sometimes"}, r"autoreset_mode to be one of \['NEXT_STEP', 'SAME_STEP', 'DISABLED'\]"),
        ({"group_size": 0}, "group_size=0 does not fit"),
        ({"action_mask": np.ones(3, bool)}, r"a bool array of shape \(16,\) that allows something, got bool \(3,\)"),
        ({"action_mask": np.ones(16)}, r"a bool array of shape \(16,\) .* got float64"),
        ({"action_mask": np.zeros(16, bool)}, "that allows something"),
    ],
)  # fmt: skip
def test_a_wrong_keyword_is_one_readable_value_error(
    wrong: dict[str, Any], message: str, make: Any, make_vec: Any
) -> None:
    both(make, make_vec, message, **wrong)


def test_what_is_missing_is_named() -> None:
    with pytest.raises(ValueError, match="Missing keywords: model=, prompts="):
        gym.make("textenv/Prompts-v0")
    with pytest.raises(ValueError, match="Missing keyword: prompts="):
        gym.make_vec("textenv/Prompts-v0", num_envs=2, model="x")


def test_a_tokenizer_larger_than_the_model_is_refused_with_two_remedies(make: Any, make_vec: Any) -> None:
    both(
        make,
        make_vec,
        r"The tokenizer knows 19 tokens, the model only 16.*model's own tokenizer, or call model.resize_token_embeddings\(19\)",
        tokenizer=char_tokenizer(extra_tokens=3),
    )


def test_a_model_larger_than_the_tokenizer_is_fine(make: Any) -> None:
    env = make(model=tiny_model("gpt2", vocab_size=VOCAB + 4))
    observation, _ = env.reset(seed=0)
    assert observation[-1] == VOCAB + 4  # the padding is the model's size, not the tokenizer's
    env.step(VOCAB + 2)


def test_a_model_without_a_language_model_head_is_refused(make: Any, model: Any) -> None:
    with pytest.raises(ValueError, match="a transformers causal language model, got GPT2Model"):
        make(model=model.base_model)


def test_a_directory_that_holds_no_model_is_refused(make: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"Could not load a causal language model from .*config.json and model"):
        make(model=str(tmp_path))


def test_a_line_that_is_not_json_is_named(make: Any, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n{'prompt': 'a'}\n")
    with pytest.raises(ValueError, match=r"p.jsonl, line 2 is not valid JSON"):
        make(prompts=path)


@pytest.mark.parametrize(
    ("num_envs", "group_size", "fits"), [(4, 3, False), (3, 4, False), (6, 4, False), (4, 2, True), (2, 6, True)]
)
def test_groups_must_fill_up(num_envs: int, group_size: int, fits: bool, make_vec: Any) -> None:
    if fits:
        make_vec(num_envs, group_size=group_size)
    else:
        with pytest.raises(ValueError, match=f"group_size={group_size} does not fit num_envs={num_envs}"):
            make_vec(num_envs, group_size=group_size)


def test_there_is_at_least_one_lane(make_vec: Any) -> None:
    with pytest.raises(ValueError, match="num_envs >= 1, got 0"):
        make_vec(0)


def test_an_unknown_render_mode_is_refused(make_vec: Any) -> None:
    with pytest.raises(
        ValueError, match=r"render_mode to be one of \['ansi', 'human'\] or None, got 'rgb_array'.*id: pass"
    ):
        make_vec(1, render_mode="rgb_array")


def test_demonstrations_that_are_not_there_are_missed_by_name(make: Any) -> None:
    with pytest.raises(ValueError, match=r"no `demonstration` column, only \['target'\]"):
        _ = make().unwrapped.demonstrations


# ---------------------------------------------------------------------- actions


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        ([A, VOCAB], "Lane 1: expected a token id between 0 and 15, got 16"),
        ([-1, A], "Lane 0: expected a token id between 0 and 15, got -1"),
        ([A], r"to be 2 token ids \(integers of shape \(2,\)\), got int64 of shape \(1,\)"),
        ([[A, A]], r"got int64 of shape \(1, 2\)"),
        ([1.0, 2.0], r"got float64 of shape \(2,\)"),
        ([True, False], r"got bool of shape \(2,\)"),
        ("ab", r"got <U2 of shape \(\)"),
        (None, r"got object of shape \(\)"),
    ],
)
def test_actions_that_are_no_token_ids_are_refused_and_change_nothing(
    actions: Any, message: str, make_vec: Any
) -> None:
    env = make_vec(2)
    before, _ = env.reset(seed=0)
    with pytest.raises(InvalidAction, match=message):
        env.step(np.array(actions) if isinstance(actions, list) else actions)
    after, *_ = env.step(np.array([A, A]))
    assert (after != VOCAB).sum() == (before != VOCAB).sum() + 2


@pytest.mark.parametrize("action", [VOCAB, -1, 1.5, "a", None, np.array([A]), True])
def test_the_single_environment_refuses_them_too(action: Any, make: Any) -> None:
    env = make().unwrapped
    env.reset(seed=0)
    with pytest.raises(InvalidAction, match="xpected"):
        env.step(action)


def test_a_masked_action_is_refused_with_the_way_to_a_good_one(make_vec: Any) -> None:
    env = make_vec(2, action_mask=np.arange(VOCAB) < 5)
    env.reset(seed=0)
    with pytest.raises(
        InvalidAction, match=r"Lane 1: token 5 is masked here. Sample with env.unwrapped.action_masks\(\)"
    ):
        env.step(np.array([4, 5]))


# ---------------------------------------------------------------------- order of calls


def test_a_step_before_the_first_reset_is_refused(make: Any, make_vec: Any) -> None:
    with pytest.raises(ResetNeeded):
        make().step(A)  # by Gymnasium's own wrapper
    for env in (make().unwrapped, make_vec(2)):
        with pytest.raises(ResetNeeded, match=r"Lane 0 has not been reset: call reset\(\) before step\(\)"):
            env.step(A if isinstance(env, gym.Env) else np.array([A, A]))


def test_a_step_after_the_end_says_how_to_go_on(make: Any, make_vec: Any) -> None:
    single = make()
    single.reset(seed=0)
    single.step(EOS)
    with pytest.raises(ResetNeeded, match=r"The episode of lane 0 has ended: call reset\(\) before step"):
        single.step(A)
    env = make_vec(2, autoreset_mode="DISABLED")
    env.reset(seed=0)
    *_, terminations, _, _ = env.step(np.array([A, EOS]))
    with pytest.raises(ResetNeeded, match=r"lane 1 has ended: call reset\(options=\{'reset_mask': terminations\}\)"):
        env.step(np.array([A, A]))
    env.reset(options={"reset_mask": terminations})  # and that is what works
    env.step(np.array([A, A]))


def test_lanes_that_a_mask_left_out_of_the_first_reset_cannot_step(make_vec: Any) -> None:
    env = make_vec(2, autoreset_mode=AutoresetMode.DISABLED)
    env.reset(seed=0, options={"reset_mask": np.array([True, False])})
    with pytest.raises(ResetNeeded, match="Lane 1 has not been reset"):
        env.step(np.array([A, A]))


# ---------------------------------------------------------------------- reset


@pytest.mark.parametrize(
    "mask",
    [np.array([False, False]), np.array([True]), np.array([1, 0]), [True, False], np.array([[True, False]]), "all"],
)
def test_a_bad_reset_mask_is_refused_and_changes_nothing(mask: Any, make_vec: Any) -> None:
    env = make_vec(2)
    before, _ = env.reset(seed=0)
    message = r"options['reset_mask'] to be a bool array of shape (2,) with at least one True"
    with pytest.raises(ValueError, match=re.escape(message)):
        env.reset(seed=1, options={"reset_mask": mask})
    assert (env.unwrapped.get_state()["arrays"]["_tokens"] == before).all()


@pytest.mark.parametrize("chosen", [-1, 5, 1.5, "first", np.array([0, 9]), np.array([0, 1, 2])])
def test_a_prompt_id_that_does_not_exist_is_refused(chosen: Any, make_vec: Any) -> None:
    with pytest.raises(ValueError, match=r"options\['prompt_id'\] to be one id, or 2 of them, between 0 and 4"):
        make_vec(2).reset(options={"prompt_id": chosen})


def test_a_chosen_prompt_and_groups_exclude_each_other(make_vec: Any) -> None:
    with pytest.raises(ValueError, match=r"options\['prompt_id'\] and group_size > 1 exclude each other"):
        make_vec(2, group_size=2).reset(options={"prompt_id": 0})


@pytest.mark.parametrize("seed", [[1], [1, 2, 3]])
def test_a_list_of_seeds_has_one_for_each_lane(seed: Any, make_vec: Any) -> None:
    with pytest.raises(ValueError, match=rf"one for each of the 2 lanes, got \[{seed[0]}"):
        make_vec(2).reset(seed=seed)


@pytest.mark.parametrize("seed", [-2, 1.5, "one", [0, -1], [0, "one"]])
def test_a_seed_is_a_non_negative_integer(seed: Any, make_vec: Any) -> None:
    env = make_vec(2)
    env.reset(seed=0)
    before = [rng.bit_generator.state for rng in env.unwrapped.np_random]
    with pytest.raises(ValueError, match="seed"):
        env.reset(seed=seed)
    assert [rng.bit_generator.state for rng in env.unwrapped.np_random] == before
