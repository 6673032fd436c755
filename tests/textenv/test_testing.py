"""`check_text_env` passes what keeps the contract, and says what is wrong with what does not."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from textenv import Task, TextEnv, TextVectorEnv
from textenv.task import build_task
from textenv.testing import check_text_env

from ..tiny import EOS, VOCAB
from .letters import BUDGET, ROWS, letters_reward


@pytest.fixture
def task(model: Any, tokenizer: Any) -> Task:
    return build_task(model, ROWS, letters_reward, tokenizer=tokenizer, max_new_tokens=BUDGET)


# ---------------------------------------------------------------------- it passes


def test_it_passes_an_id(task_kwargs: Any) -> None:
    check_text_env("textenv/Prompts-v0", **task_kwargs)


def test_it_passes_a_task(task: Task) -> None:
    check_text_env(task)


def test_it_passes_an_environment_with_a_spec_and_one_without(make: Any, task: Task) -> None:
    check_text_env(make())
    check_text_env(TextEnv(task))


def test_it_passes_functions_that_make_environments(task: Task) -> None:
    check_text_env(lambda: TextEnv(task), lambda num_envs, **kwargs: TextVectorEnv(num_envs, task, **kwargs))


@pytest.mark.parametrize(
    "settings", [{"kl": "reference", "beta": 0.1}, {"action_mask": np.arange(VOCAB) < 6}, {"group_size": 3}]
)
def test_it_passes_other_settings(settings: dict[str, Any], task: Task) -> None:
    check_text_env(task, steps=25, **settings)


@pytest.mark.parametrize("name", sorted(n for n in gym.registry if n.startswith("textenv/") and "Prompts" not in n))
def test_it_passes_every_other_id(name: str) -> None:
    check_text_env(name, steps=20)


def test_it_leaves_the_environment_usable(make: Any) -> None:
    env = make()
    reward = env.unwrapped.lanes.reward
    check_text_env(env)
    assert env.unwrapped.lanes.reward is reward


# ---------------------------------------------------------------------- it finds


class PadsWithAToken(TextEnv):
    def reset(self, **kwargs: Any) -> Any:
        observation, info = super().reset(**kwargs)
        return np.where(observation == self.vocab_size, 0, observation), info


class PadsInFront(TextEnv):
    def reset(self, **kwargs: Any) -> Any:
        observation, info = super().reset(**kwargs)
        return np.roll(observation, (observation == self.vocab_size).sum()), info


class BoundsWithoutThePadding(TextEnv):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.observation_space = gym.spaces.Box(0, self.vocab_size + 1, (self.max_tokens,), np.int64)


class Truncates(TextEnv):
    def step(self, action: Any) -> Any:
        observation, reward, terminated, _, info = super().step(action)
        cut = info.get("finish_reason") == "length"
        return observation, reward, terminated and not cut, cut, info


class IgnoresTheStopToken(TextEnv):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lanes.task = self.lanes.task.__class__(**{**vars(self.task), "stop_tokens": ()})


class PaysEveryStep(TextEnv):
    def step(self, action: Any) -> Any:
        observation, reward, terminated, truncated, info = super().step(action)
        return observation, reward + 0.5, terminated, truncated, info


class PaysOneStepLate(TextEnv):
    late = 0.0

    def step(self, action: Any) -> Any:
        observation, reward, terminated, truncated, info = super().step(action)
        self.late, reward = reward, self.late
        return observation, float(reward), terminated, truncated, info


class ScoresTwice(TextEnv):
    def step(self, action: Any) -> Any:
        outcome = super().step(action)
        if outcome[2]:
            lanes = self.lanes
            lanes._score(lanes._tokens, lanes._prompt_length, lanes._length - lanes._prompt_length, lanes._prompt_id)
        return outcome


class LosesAToken(TextEnv):
    def step(self, action: Any) -> Any:
        observation, *rest = super().step(action)
        observation[(observation != self.vocab_size).sum() - 1] = 5
        return observation, *rest


class SaysNoReason(TextEnv):
    def step(self, action: Any) -> Any:
        *rest, info = super().step(action)
        info.pop("finish_reason", None)
        return *rest, info


class DrawsFromElsewhere(TextEnv):
    rng = np.random.default_rng()

    def reset(self, **kwargs: Any) -> Any:
        if kwargs.get("seed") is None:  # the first episode of a seed is right, as far as check_env looks
            kwargs["options"] = {"prompt_id": int(self.rng.integers(len(ROWS)))}
        return super().reset(**kwargs)


class ForgetsTheGenerator(TextEnv):
    def set_state(self, state: Any) -> None:
        super().set_state({**state, "generators": self.get_state()["generators"]})


class ForgetsTheTokens(TextEnv):
    def set_state(self, state: Any) -> None:
        super().set_state({**state, "arrays": {**state["arrays"], "_tokens": self.get_state()["arrays"]["_tokens"]}})


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (PadsWithAToken, "padded behind with V|what stood there before"),
        (PadsInFront, "padded behind with V = 16.*padded in front"),
        (BoundsWithoutThePadding, r"observation space to be Box\(0, 16, \(L,\), int64\)"),
        (Truncates, "truncated.*a token budget belongs to the task"),
        (IgnoresTheStopToken, "terminated=False .* expected True: the token is a stop token"),
        (PaysEveryStep, "expected 0 before the end without a policy"),
        (PaysOneStepLate, "one step late"),
        (ScoresTwice, "scored 2 completions .* expected one at the end"),
        (LosesAToken, "what stood there before, and then the action"),
        (SaysNoReason, r"info\['finish_reason'\] is None"),
        (DrawsFromElsewhere, "Two runs with seed 0 .*All chance has to come from self.np_random"),
        (ForgetsTheGenerator, "After set_state .*the generator's state with it"),
        (ForgetsTheTokens, "After set_state"),
    ],
)
def test_it_finds_what_is_broken_and_says_why(broken: type[TextEnv], message: str, task: Task) -> None:
    with pytest.raises(AssertionError, match=message):
        check_text_env(lambda: broken(task))


class OneGeneratorForAllLanes(TextVectorEnv):
    def _rng(self, lane: int) -> np.random.Generator:
        return super()._rng(0)


class ForgetsFinalInfo(TextVectorEnv):
    def step(self, actions: Any) -> Any:
        *rest, info = super().step(actions)
        info.pop("final_info", None)
        return *rest, info


class EndsAllTogether(TextVectorEnv):
    def step(self, actions: Any) -> Any:
        return super().step(np.where((actions == EOS).any(), EOS, actions))


class SaysAnotherMode(TextVectorEnv):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.metadata = {**self.metadata, "autoreset_mode": "sometimes"}


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (OneGeneratorForAllLanes, "(?s)differ .* in .*Has each lane a generator"),
        (ForgetsFinalInfo, "SAME_STEP mode .* in the infos: keys"),
        (EndsAllTogether, "differ at step"),
        (SaysAnotherMode, r"metadata\['autoreset_mode'\] to be AutoresetMode"),
    ],
)
def test_it_finds_lanes_that_are_no_single_environments(broken: type[TextVectorEnv], message: str, task: Task) -> None:
    with pytest.raises(AssertionError, match=message):
        check_text_env(lambda: TextEnv(task), lambda num_envs, **kwargs: broken(num_envs, task, **kwargs))


def test_keywords_without_a_constructor_to_take_them_are_refused(task: Task) -> None:
    with pytest.raises(ValueError, match=r"Keywords \['beta'\] are for an id or a Task"):
        check_text_env(lambda: TextEnv(task), beta=0.1)
