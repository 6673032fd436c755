"""A2C: its settings, its critic, and that it learns. (Its expected gradient: test_gradients.py.)"""

from __future__ import annotations

import gymnasium as gym
import pytest
import torch

from agents.a2c import A2C, A2CConfig

from .test_checkpoints import assert_same
from .world import PassThrough, Truncate, build_model

SMALL = {"episodes_per_update": 8}


@pytest.mark.parametrize("wrapper", [None, PassThrough])
def test_first_ratio_is_one_and_there_is_one_step_per_rollout(make_envs, wrapper):
    envs = make_envs(model=build_model("gpt2"), temperature=0.7)  # dropout 0.1 in its config
    agent = A2C(wrapper(envs) if wrapper else envs, seed=0, top_k=5, **SMALL).learn(90)
    assert len(agent.history) >= 2
    assert max(row["train/first_ratio_error"] for row in agent.history) < 1e-4
    assert agent.accounts["optimizer_steps"] == len(agent.history)
    deferred = wrapper is None
    assert agent.accounts["gradient_tokens"] == agent.num_timesteps or not deferred
    assert agent.accounts["reward_calls"] == agent.accounts["reference_calls"] == 8 * len(agent.history)


@pytest.mark.parametrize("critic", ["head", "separate"])
def test_resume_is_bit_exact(make_envs, tmp_path, critic):
    config = {"critic": critic, "decay_timesteps": 100, **SMALL}
    whole = A2C(make_envs(), seed=0, **config).learn(120)
    A2C(make_envs(), seed=0, **config).learn(60).save(tmp_path / "half")
    resumed = A2C.load(tmp_path / "half", make_envs())
    assert 1 <= len(resumed.history) < len(whole.history)
    assert_same(resumed.learn(60), whole)


def test_values_learn_the_return(make_envs):
    envs = make_envs(beta=0.0, reward=lambda completions, **_: [3.0] * len(completions))
    agent = A2C(envs, seed=0, vf_coef=1.0, learning_rate=1e-2, episodes_per_update=16).learn(3_000)
    assert agent.history[0]["train/value_loss"] > 20 * agent.history[-1]["train/value_loss"]


def test_a_cut_episode_is_worth_what_the_critic_expects(make_envs):
    agent = A2C(Truncate(make_envs(), limit=2), seed=0, **SMALL)
    torch.nn.init.constant_(agent.critic.head.bias, 7.0)
    seen, update = [], agent.update
    agent.update = lambda episodes: (seen.append((episodes, agent.final_values(episodes))), update(episodes))
    agent.learn(1)
    episodes, bootstrap = seen[0]
    cut = torch.from_numpy(episodes.finish_reason == "truncated")
    assert 0 < cut.sum() <= 8
    assert (bootstrap[cut] == 7.0).all()
    assert (bootstrap[~cut] == 0.0).all()


def test_entropy_bonus_reaches_the_weights(make_envs):
    def entropy(coefficient):
        agent = A2C(make_envs(beta=0.0), seed=0, ent_coef=coefficient, learning_rate=2e-2, episodes_per_update=16)
        return agent.learn(400).history[-1]["train/entropy"]

    assert entropy(5.0) > entropy(0.0) + 0.1


@pytest.mark.parametrize("how", ["token", "sequence", "fixed"])
def test_ways_to_aggregate(make_envs, how):
    agent = A2C(make_envs(), seed=0, loss_aggregation=how, whiten_advantages=True, gae_lambda=0.9, **SMALL).learn(60)
    assert all(torch.isfinite(p).all() for p in agent.policy.parameters())


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [("episodes_per_update", 0, ">= 1, got 0"), ("gae_lambda", 1.5, "between 0 and 1, got 1.5"), ("critic", 3, "'head', 'separate'"),
     ("loss_aggregation", "tokens", "Did you mean `token`")],
)  # fmt: skip
def test_impossible_settings_are_refused(field, value, message):
    with pytest.raises(ValueError, match=rf"{field}.*{message}"):
        A2CConfig(**{field: value})


def test_raises_the_exact_score():
    envs = gym.make_vec("textenv/Tree-v0", num_envs=32, horizon=3, seed_of_task=5)
    agent = A2C(envs, seed=0, learning_rate=3e-3, decay_timesteps=4_000)
    assert envs.unwrapped.evaluate(agent.learn(4_000).policy).score > 0.8
