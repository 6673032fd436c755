"""Every registered id is a Gymnasium environment like any other, to Gymnasium and to stable-baselines3."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.utils.env_match import check_environments_match
from stable_baselines3.common.env_checker import check_env as sb3_check_env

import textenv  # noqa: F401  # registers the ids

from ..tiny import EOS, VOCAB
from .letters import BUDGET, ROWS, WIDTH, letters_reward

A = 3
IDS = sorted(name for name in gym.registry if name.startswith("textenv/"))


@pytest.fixture(params=IDS)
def kwargs_of(request: pytest.FixtureRequest, model_dir: Any) -> tuple[str, dict[str, Any]]:
    """Each registered id with the keywords it cannot do without; a new id joins by being registered."""
    needed = {
        "textenv/Prompts-v0": {
            "model": str(model_dir),
            "prompts": ROWS,
            "reward": letters_reward,
            "max_new_tokens": BUDGET,
        }
    }
    return request.param, {"beta": 0.0, **needed.get(request.param, {})}


def make_it(kwargs_of: tuple[str, dict[str, Any]], **changes: Any) -> gym.Env:
    name, kwargs = kwargs_of
    return gym.make(name, **{**kwargs, **changes})


def test_gymnasiums_checker_accepts_every_id(kwargs_of: Any) -> None:
    env = make_it(kwargs_of)
    with warnings.catch_warnings():
        # True of every environment with an upper bound of V and of no harm: the checker prefers [-1, 1].
        warnings.filterwarnings("ignore", message=".*we recommend using a symmetric and normalized space")
        check_env(env.unwrapped)  # which makes it anew in each render mode


def test_stable_baselines3s_checker_accepts_every_id(kwargs_of: Any) -> None:
    sb3_check_env(make_it(kwargs_of))


def test_two_environments_of_one_id_match(kwargs_of: Any) -> None:
    check_environments_match(
        make_it(kwargs_of, render_mode="ansi"), make_it(kwargs_of, render_mode="ansi"), num_steps=30, seed=7
    )


def test_the_vector_environment_of_every_id_has_the_batched_spaces(kwargs_of: Any) -> None:
    single = make_it(kwargs_of)
    name, kwargs = kwargs_of
    env = gym.make_vec(name, num_envs=3, **kwargs)
    assert env.single_observation_space == single.observation_space
    assert env.single_action_space == single.action_space
    observations, _ = env.reset(seed=0)
    assert observations in env.observation_space
    env.action_space.seed(0)
    for _ in range(5):
        actions = np.array([np.flatnonzero(row)[0] for row in env.unwrapped.action_masks()])
        observations, rewards, *_ = env.step(actions)
        assert observations in env.observation_space
        assert rewards.dtype == np.float64
    env.close()


# ---------------------------------------------------------------------- the spaces


def test_observations_are_prompt_and_response_padded_with_the_vocabulary_size(make: Any) -> None:
    env = make()
    assert env.observation_space == gym.spaces.Box(0, VOCAB, (WIDTH,), np.int64)
    assert env.action_space == gym.spaces.Discrete(VOCAB)
    observation, _ = env.reset(seed=0)
    assert VOCAB not in range(env.action_space.n)
    assert (observation == VOCAB).sum() >= BUDGET


def test_the_observation_has_the_same_shape_in_every_split(make: Any) -> None:
    prompts = {"train": ["abcdefgh"], "test": ["a"]}
    environments = [make(prompts=prompts, reward=no_reward, split=split) for split in prompts]
    assert {env.observation_space.shape for env in environments} == {(8 + BUDGET,)}
    assert environments[1].reset()[0].tolist()[:2] == [A, VOCAB]


def no_reward(completions: list[str], **columns: Any) -> list[float]:
    return [0.0] * len(completions)


def test_types_are_what_checkers_insist_on(make: Any) -> None:
    env = make().unwrapped
    env.reset(seed=0)
    for action in (np.int64(A), A, np.array(A), np.int32(A)):
        observation, reward, terminated, truncated, info = env.step(action)
        assert (type(reward), type(terminated), truncated, type(info)) == (float, bool, False, dict)
        assert observation.dtype == np.int64
    *_, info = env.step(EOS)
    assert {name: type(value) for name, value in info.items()} == {
        "finish_reason": str,
        "task_reward": float,
        "prompt_id": int,
        "reward/letters_reward": float,
    }


def test_nothing_vocabulary_sized_is_in_the_info_of_a_step(make_vec: Any) -> None:
    env = make_vec(2)
    env.reset(seed=0)
    assert env.step(np.array([A, A]))[4] == {}


# ---------------------------------------------------------------------- on top and around


def test_a_time_limit_truncates_and_the_task_is_not_paid(make: Any) -> None:
    env = make(max_episode_steps=2)
    env.reset(seed=0)
    assert env.step(A)[2:4] == (False, False)
    _, reward, terminated, truncated, info = env.step(A)
    assert (reward, terminated, truncated) == (0.0, False, True)
    assert "task_reward" not in info
    env.reset()
    assert env.step(EOS)[2:4] == (True, False)


def test_the_vector_environment_refuses_a_time_limit(make_vec: Any) -> None:
    with pytest.raises(ValueError, match="max_episode_steps is not supported by the vector environment"):
        make_vec(2, max_episode_steps=2)


def test_gymnasium_can_also_vectorise_the_single_environment(task_kwargs: Any) -> None:
    env = gym.make_vec("textenv/Prompts-v0", num_envs=2, vectorization_mode="sync", **task_kwargs)
    env.reset(seed=0)
    assert env.step(np.array([A, EOS]))[2].tolist() == [False, True]


def test_the_environment_can_be_remade_from_its_spec(make: Any, make_vec: Any) -> None:
    again = gym.make(make().spec)
    assert again.reset(seed=3)[0].tolist() == make().reset(seed=3)[0].tolist()
    envs = make_vec(2)
    assert gym.make_vec(envs.spec).reset(seed=3)[0].tolist() == envs.reset(seed=3)[0].tolist()


def test_a_copied_environment_lives_on_by_itself(make_vec: Any) -> None:
    env = make_vec(2)
    env.reset(seed=0)
    twin = copy.deepcopy(env)
    env.step(np.array([A, EOS]))
    assert twin.step(np.array([A, EOS]))[0].tolist() == env.unwrapped.get_state()["arrays"]["_tokens"].tolist()


def test_closing_twice_is_harmless(make: Any, make_vec: Any) -> None:
    for env in (make(), make_vec(2)):
        env.close()
        env.close()


def test_a_masked_environment_is_found_by_sb3_contrib(make: Any) -> None:
    from sb3_contrib.common.maskable.utils import get_action_masks, is_masking_supported
    from stable_baselines3.common.vec_env import DummyVecEnv

    allowed = np.arange(VOCAB) < 5
    env = DummyVecEnv([lambda: make(action_mask=allowed)] * 2)
    env.reset()
    assert is_masking_supported(env)
    assert (get_action_masks(env) == allowed).all()


def test_an_unmodified_stable_baselines3_agent_learns_in_it(make: Any) -> None:
    from stable_baselines3 import PPO

    env = make(prompts=["a"], reward=lambda completions, **columns: [float("b" in text) for text in completions])
    agent = PPO("MlpPolicy", env, n_steps=128, batch_size=128, gamma=1.0, learning_rate=1e-2, seed=0, device="cpu")

    def mean_reward() -> float:
        total = 0.0
        for seed in range(40):
            observation, _ = env.reset(seed=seed)
            ended = False
            while not ended:
                action, _ = agent.predict(observation)
                observation, reward, ended, _, _ = env.step(action)
                total += float(reward)
        return total / 40

    before = mean_reward()
    agent.learn(1000)
    assert mean_reward() > before + 0.3


# ---------------------------------------------------------------------- pictures


def test_ansi_shows_prompt_and_response_coloured_by_what_each_token_was_paid(make: Any) -> None:
    env = make(render_mode="ansi")
    env.reset(options={"prompt_id": 0})
    env.step(A)
    assert "ab=" in env.render()
    assert "\x1b[48;2" not in env.render()  # nothing has been paid yet
    env.step(A)
    env.step(EOS)  # "aa": 2 - 2/8
    text = env.render()
    assert "aa" in text
    assert "\x1b[48;2;0;180;60m" in text  # green, at full strength: the only payment
    assert "<eos>" in text


def test_human_prints_tokens_as_they_come(make: Any, capsys: pytest.CaptureFixture[str]) -> None:
    env = make(render_mode="human")
    env.reset(options={"prompt_id": 0})
    assert "ab=" in capsys.readouterr().out
    env.step(4)
    assert capsys.readouterr().out == "b"
    env.step(EOS)
    assert capsys.readouterr().out.endswith("\n")


def test_lanes_are_rendered_one_by_one(make_vec: Any) -> None:
    env = make_vec(2, render_mode="ansi")
    env.reset(options={"prompt_id": np.array([0, 3])})
    frames = env.render()
    assert ("ab=" in frames[0], "hi" in frames[1], len(frames)) == (True, True, 2)


def test_rendering_without_a_mode_warns(make_vec: Any) -> None:
    env = make_vec(1)
    env.reset(seed=0)
    with pytest.warns(UserWarning, match="render_mode='ansi' or 'human'"):
        assert env.render() is None
