"""RLOO: its loss by hand, its groups, and that it learns. (Its expected gradient: test_gradients.py.)"""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import torch

from agents.rloo import RLOO, RLOOConfig, clipped_sequence_loss

from .test_checkpoints import assert_same
from .world import PassThrough, Truncate, build_model, same_tensors

SMALL = {"episodes_per_update": 8, "minibatch_episodes": 4}


@pytest.fixture
def envs(make_envs):
    return make_envs(group_size=4)


def test_loss_hand_worked():
    # max(-1.5, -1.2), max(0.5, 0.8), max(-2.2, -2.2)
    ratio, advantages = torch.tensor([1.5, 0.5, 1.1]), torch.tensor([1.0, -1.0, 2.0])
    assert clipped_sequence_loss(ratio, advantages, 0.2).item() == pytest.approx((-1.2 + 0.8 - 2.2) / 3)
    assert clipped_sequence_loss(ratio, advantages, None).item() == pytest.approx((-1.5 + 0.5 - 2.2) / 3)


@pytest.mark.parametrize("wrapper", [None, PassThrough])
@pytest.mark.parametrize("mode", ["SAME_STEP", "NEXT_STEP"])
@pytest.mark.parametrize(("lanes", "size"), [(4, 4), (8, 2), (8, 4)])
def test_groups_are_complete_and_stand_together(make_envs, lanes, size, mode, wrapper):
    """Lanes that finish early would run ahead of their group: every rollout is of whole groups all the same."""
    envs = make_envs(num_envs=lanes, group_size=size, autoreset_mode=mode)
    agent = RLOO(wrapper(envs) if wrapper else envs, seed=0, episodes_per_update=16, minibatch_episodes=16)
    seen = []
    agent.update = seen.append
    agent.learn(150)
    assert len(seen) > 1
    for episodes in seen:
        groups = episodes.group_id.reshape(-1, size)
        assert len(episodes) == 16
        assert (groups == groups[:, :1]).all()
        assert len(np.unique(groups[:, 0])) == 16 // size
        prompts = episodes.prompt_id.reshape(-1, size)
        assert (prompts == prompts[:, :1]).all()
        assert len(np.unique(episodes.response_length)) > 1


@pytest.mark.parametrize("placement", ["reward", "loss", "none"])
def test_first_ratio_is_one(make_envs, placement):
    envs = make_envs(model=build_model("gpt2"), group_size=4, temperature=0.7)  # dropout 0.1 in its config
    agent = RLOO(envs, seed=0, kl_placement=placement, top_k=5, **SMALL).learn(90)
    assert len(agent.history) >= 2
    assert max(row["train/first_ratio_error"] for row in agent.history) < 1e-4
    assert agent.history[0]["train/clip_fraction"] <= 0.5


@pytest.mark.parametrize("placement", ["reward", "loss", "none"])
def test_the_kl_is_counted_once(make_envs, placement):
    agent = RLOO(make_envs(group_size=4), seed=0, kl_placement=placement, learning_rate=0.02, **SMALL).learn(200)
    row = agent.history[-1]
    paid = row["rollout/return"] - row["rollout/task_reward"]
    assert abs(row["rollout/kl"]) > 1e-3
    assert paid == pytest.approx(-0.1 * row["rollout/kl"] if placement == "reward" else 0.0, abs=1e-6)
    assert ("train/kl_loss" in row) == (placement == "loss")


@pytest.mark.parametrize(("wrapper", "passes"), [(None, 1), (PassThrough, 2)])
def test_reference_tokens_are_counted_where_they_are_scored(make_envs, wrapper, passes):
    """Under a wrapper the environment's own scores are not handed on, and a KL in the loss asks the reference again."""
    envs = make_envs(group_size=4)
    agent = RLOO(wrapper(envs) if wrapper else envs, seed=0, kl_placement="loss", **SMALL)
    lengths, update = [], agent.update

    def note(episodes):
        lengths.append(int(episodes.response_length.sum()))
        expected = envs.reference.score(episodes.tokens, episodes.prompt_length, episodes.response_length)
        ours = agent.reference_log_probs(episodes).numpy()[:, : expected.shape[1]]
        np.testing.assert_allclose(ours, expected, atol=1e-5)
        agent.accounts.update(before)
        update(episodes)

    before = {}
    agent.update = note
    rollout = agent.log_rollout
    agent.log_rollout = lambda episodes: (rollout(episodes), before.update(agent.accounts))
    agent.learn(1)
    assert agent.accounts["reference_tokens"] == passes * lengths[0]
    assert agent.accounts["reference_calls"] == passes * 8
    assert agent.accounts["reward_calls"] == 8
    assert agent.accounts["gradient_tokens"] == lengths[0]
    assert agent.accounts["optimizer_steps"] == 2


def test_all_equal_groups_move_nothing(make_envs):
    envs = make_envs(group_size=4, beta=0.0, reward=lambda completions, **_: [0.1] * len(completions))
    agent = RLOO(envs, seed=0, **SMALL)
    before = {name: t.clone() for name, t in agent.policy.model.state_dict().items()}
    agent.learn(50)
    assert agent.accounts["optimizer_steps"] > 1
    assert same_tensors(agent.policy.model.state_dict(), before)
    assert agent.history[0]["train/informative_groups"] == 0
    assert agent.history[0]["train/grad_norm"] == 0


@pytest.mark.parametrize("config", [{}, {"kl_placement": "loss", "epochs": 2, "decay_timesteps": 100}])
def test_resume_is_bit_exact(make_envs, tmp_path, config):
    whole = RLOO(make_envs(group_size=4), seed=0, **SMALL, **config).learn(120)
    RLOO(make_envs(group_size=4), seed=0, **SMALL, **config).learn(60).save(tmp_path / "half")
    resumed = RLOO.load(tmp_path / "half", make_envs(group_size=4))
    assert 1 <= len(resumed.history) < len(whole.history)
    assert_same(resumed.learn(60), whole)


def test_episodes_that_a_wrapper_cuts(make_envs):
    agent = RLOO(Truncate(make_envs(group_size=4), limit=2), seed=0, kl_placement="loss", **SMALL).learn(60)
    assert all(torch.isfinite(p).all() for p in agent.policy.parameters())


def test_the_learning_rate_falls_with_the_tokens(envs):
    agent = RLOO(envs, seed=0, learning_rate=1e-3, decay_timesteps=100, **SMALL).learn(150)
    rates, tokens = ([row[name] for row in agent.history] for name in ("train/learning_rate", "time/timesteps"))
    expected = [1e-3 * max(0.0, 1 - n / 100) for n in [0, *tokens[:-1]]]
    np.testing.assert_allclose(rates, expected, rtol=1e-9)
    assert rates[-1] == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"group_size": 1}, "group_size >= 2, got 1.*group_size=4"), ({"num_envs": 2, "group_size": 4}, "num_envs .* multiples of group_size=4, got 2 and 8"),
     ({"num_envs": 3, "group_size": 3}, "multiples of group_size=3, got 3 and 8")],
)  # fmt: skip
def test_groups_that_do_not_fit_are_refused(make_envs, settings, message):
    with pytest.raises(ValueError, match=message):
        RLOO(make_envs(**settings), **SMALL)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [("episodes_per_update", 0, ">= 1, got 0"), ("minibatch_episodes", 0, ">= 1"), ("epochs", 0, ">= 1"), ("clip_range", 0.0, "> 0, got 0.0"),
     ("decay_timesteps", 0, "> 0"), ("kl_placement", "los", "Did you mean `loss`"), ("kl_estimator", "k1", "nothing but noise.*kl_placement='reward'"),
     ("kl_estimator", "k4", "k2")],
)  # fmt: skip
def test_impossible_settings_are_refused(field, value, message):
    with pytest.raises(ValueError, match=rf"(?s){field}.*{message}"):
        RLOOConfig(**{field: value})


def test_raises_the_exact_score(tmp_path):
    envs = gym.make_vec("textenv/Tree-v0", num_envs=32, group_size=4, horizon=3, seed_of_task=5)
    agent = RLOO(envs, seed=0, episodes_per_update=32, learning_rate=3e-3, decay_timesteps=4_000)
    assert abs(envs.unwrapped.evaluate(agent.policy).score) < 1e-4
    assert envs.unwrapped.evaluate(agent.learn(4_000).policy).score > 0.8
