r"""Every function of `trl.rewards` runs unchanged through `env.step`, and pays what it returns in TRL.

The completions are written out token by token: what the environment decodes and hands over must be what TRL's trainer would.
"""

from __future__ import annotations

import string
from typing import Any

import numpy as np
import pytest

from rewards import RewardError, WeightedSum

from ..tiny import CHAT_TEMPLATE, tiny_model

pytest.importorskip("trl", reason="needs the extra `peers`")
pytest.importorskip("math_verify", reason="needs the extra `peers`")

from trl import rewards as trl_rewards

THIRD = r"The answer is \boxed{\frac{1}{3}}"
HALF = r"The answer is \boxed{\frac{1}{2}}"
TEXTS = [
    THIRD,
    HALF,
    f"<think>One of three.</think> {THIRD}",
    f"<think>One of two.</think> {HALF}",
    "no no no no no no no no",
    "",
    "a long way round " + "xy" * 20,
]
SOLUTIONS = [r"\frac{1}{3}"] * len(TEXTS)
BUDGET = 80

REWARDS = {
    "accuracy_reward": trl_rewards.accuracy_reward,
    "reasoning_accuracy_reward": trl_rewards.reasoning_accuracy_reward,
    "get_cosine_scaled_reward": trl_rewards.get_cosine_scaled_reward(max_len=60),
    "think_format_reward": trl_rewards.think_format_reward,
    "get_repetition_penalty_reward": trl_rewards.get_repetition_penalty_reward(ngram_size=2),
    "get_soft_overlong_punishment": trl_rewards.get_soft_overlong_punishment(60, 40),
}
"""Those called `get_...` make a reward, of these settings."""
OF_TOKENS_ALONE = ("get_repetition_penalty_reward", "get_soft_overlong_punishment")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from textenv.tokenizer import character_tokenizer

    tokenizer = character_tokenizer(string.printable[:95])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def played(tokenizer: Any) -> Any:
    """Play TEXTS in an environment with some reward: what it pays, what its infos say, and the token ids."""
    import gymnasium as gym

    import textenv  # noqa: F401  # registers the ids

    model = tiny_model("llama", vocab_size=len(tokenizer), positions=BUDGET + 40).requires_grad_(False)

    def play(
        reward: Any, conversational: bool, solutions: list[str] = SOLUTIONS
    ) -> tuple[list[float], Any, list[list[int]]]:
        question = [{"role": "user", "content": "What is 1/3?"}] if conversational else "What is 1/3?"
        env = gym.make_vec(
            "textenv/Prompts-v0",
            num_envs=len(TEXTS),
            model=model,
            tokenizer=tokenizer,
            prompts=[{"prompt": question, "solution": solution} for solution in solutions],
            reward=reward,
            beta=0.0,
            max_new_tokens=BUDGET,
        )
        env.reset(seed=0, options={"prompt_id": np.arange(len(TEXTS))})
        stop = tokenizer.eos_token_id
        ids = [[*tokenizer(text, add_special_tokens=False)["input_ids"], stop][:BUDGET] for text in TEXTS]
        paid, finals = [0.0] * len(TEXTS), [{}] * len(TEXTS)
        for step in range(max(map(len, ids))):
            actions = np.array([row[step] if step < len(row) else stop for row in ids])
            _, rewards, ended, _, info = env.step(actions)
            for lane in np.flatnonzero(ended):
                if step == len(ids[lane]) - 1:
                    paid[lane] = float(rewards[lane])
                    finals[lane] = {k: v[lane] for k, v in info["final_info"].items() if not k.startswith("_")}
        return paid, finals, ids

    return play


def in_trl(reward: Any, ids: list[list[int]], solutions: list[str] = SOLUTIONS) -> list[float | None]:
    """As `GRPOTrainer._calculate_rewards` calls it."""
    return reward(
        prompts=[[{"role": "user", "content": "What is 1/3?"}]] * len(TEXTS),
        completions=[[{"role": "assistant", "content": text}] for text in TEXTS],
        completion_ids=ids,
        solution=solutions,
        log_extra=lambda column, values: None,
        log_metric=lambda name, value: None,
        trainer_state=None,
    )


def test_none_of_them_is_left_out() -> None:
    assert {name for names in trl_rewards._import_structure.values() for name in names} == set(REWARDS)


@pytest.mark.parametrize("name", REWARDS)
def test_conversations(name: str, played: Any) -> None:
    reward = REWARDS[name]
    paid, finals, ids = played(reward, conversational=True)
    expected = in_trl(reward, ids)
    assert paid == pytest.approx(expected, abs=1e-12)
    assert len(set(expected)) > 1  # it tells them apart
    (component,) = {key for final in finals for key in final if key.startswith("reward/")}
    assert component == f"reward/{reward.__name__}"


@pytest.mark.parametrize("name", OF_TOKENS_ALONE)
def test_plain_text(name: str, played: Any) -> None:
    paid, _, ids = played(REWARDS[name], conversational=False)
    assert paid == pytest.approx(in_trl(REWARDS[name], ids), abs=1e-12)


def test_what_they_expect_of_conversations_is_told_where_prompts_are_plain(played: Any) -> None:
    with pytest.raises(RewardError, match=r"(?s)'think_format_reward' raised \w+Error.*plain texts here"):
        played(trl_rewards.think_format_reward, conversational=False)


def test_a_sum_of_them_with_what_does_not_apply(played: Any) -> None:
    solutions = ["not mathematics", *SOLUTIONS[1:]]
    accuracy, overlong = REWARDS["accuracy_reward"], REWARDS["get_soft_overlong_punishment"]
    paid, _, ids = played(WeightedSum({"accuracy": (accuracy, 1.0), "overlong": (overlong, 0.5)}), True, solutions)
    expected = [
        0.5 * length + (0.0 if right is None else right)
        for right, length in zip(in_trl(accuracy, ids, solutions), in_trl(overlong, ids), strict=True)
    ]
    assert paid == pytest.approx(expected, abs=1e-12)
    assert in_trl(accuracy, ids, solutions)[0] is None
