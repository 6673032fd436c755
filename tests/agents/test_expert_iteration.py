"""Expert iteration: what it keeps, its loss by hand, where it goes, and that it learns."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import torch

from agents.expert_iteration import ExpertIteration, ExpertIterationConfig, best_of_groups, imitation_loss
from agents.rollout import collect

from .world import PassThrough, Truncate, plain_logits, same_tensors

SMALL = {"episodes_per_update": 8, "minibatch_episodes": 2}


@pytest.fixture
def make_agent(make_envs):
    def make(seed=0, wrapper=None, load=None, **config):
        envs = make_envs(group_size=4)
        envs = wrapper(envs) if wrapper else envs
        return ExpertIteration.load(load, envs) if load else ExpertIteration(envs, seed=seed, **(SMALL | config))

    return make


# ---------------------------------------------------------------------- what is kept, and the loss


def test_kept_hand_worked():
    worth = np.array([1.0, 3.0, 2.0, 5.0, 5.0, 5.0, 4.0, np.nan, 0.0, 6.0, 6.0, 1.0, np.nan])
    group = np.array([0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4])
    # 3 is best of (1, 3, 2); (5, 5, 5) are equals; 4 of (4, nan, 0); the first of two sixes; (nan) is nothing
    assert best_of_groups(worth, group).tolist() == [1, 6, 9]
    assert best_of_groups(np.ones(4), np.zeros(4, int)).tolist() == []


def test_loss_hand_worked():
    log_probs = torch.tensor([[-1.0, -3.0], [-2.0, 0.0], [-4.0, -torch.inf]], requires_grad=True)
    mask = torch.tensor([[True, True], [True, False], [True, True]])
    loss = imitation_loss(log_probs, mask)
    loss.backward()
    assert loss.item() == pytest.approx((1 + 3 + 2 + 4) / 4)
    torch.testing.assert_close(log_probs.grad, torch.tensor([[-0.25, -0.25], [-0.25, 0.0], [-0.25, 0.0]]))


def test_the_best_of_each_group_is_imitated_and_nothing_else(make_agent, monkeypatch):
    agent = make_agent(epochs=3)
    episodes = collect(agent.env, agent.policy, 8, agent.rng)
    evaluate, used = agent.policy.evaluate, []

    def spy(episodes, rows):
        used.append(rows)
        return evaluate(episodes, rows)

    monkeypatch.setattr(agent.policy, "evaluate", spy)
    agent.update(episodes)
    expected = [
        max(np.flatnonzero(episodes.group_id == group), key=lambda i: episodes.task_reward[i])
        for group in np.unique(episodes.group_id)
    ]
    assert len(expected) == 2
    assert sorted(np.concatenate(used)) == sorted(expected * 3)
    assert agent.logger.name_to_value["train/kept_reward"] == pytest.approx(episodes.task_reward[expected].mean())


def test_the_first_loss_is_by_a_plain_forward_pass(make_agent):
    agent = make_agent(minibatch_episodes=64)
    episodes = collect(agent.env, agent.policy, 8, agent.rng)
    scores = []
    for i in best_of_groups(episodes.task_reward, episodes.group_id):
        m, n = episodes.prompt_length[i], episodes.response_length[i]
        log_p = plain_logits(agent.policy.model, episodes.tokens[i, : m + n], m).log_softmax(-1)
        scores += log_p[torch.arange(n), torch.from_numpy(episodes.tokens[i, m : m + n])].tolist()
    agent.update(episodes)
    assert agent.logger.name_to_value["train/loss"] == pytest.approx(-np.mean(scores), abs=1e-4)


# ---------------------------------------------------------------------- the agent


def test_the_kl_is_nowhere_or_in_the_ranking(make_agent):
    agent = make_agent().learn(40)
    assert (agent.kl_placement, agent.lanes.kl.pay) == ("none", False)
    assert agent.history[-1]["rollout/return"] == pytest.approx(agent.history[-1]["rollout/task_reward"])
    agent = make_agent(rank_by="return").learn(80)
    assert (agent.kl_placement, agent.lanes.kl.pay) == ("reward", True)
    last = agent.history[-1]
    assert last["rollout/return"] == pytest.approx(last["rollout/task_reward"] - 0.1 * last["rollout/kl"], abs=1e-4)
    assert ExpertIteration.kl_placement == "none"


@pytest.mark.parametrize("wrapper", [None, PassThrough, lambda env: Truncate(env, 3)])
def test_resume_is_bit_exact(make_agent, tmp_path, wrapper):
    whole = make_agent(wrapper=wrapper).learn(160)
    make_agent(wrapper=wrapper).learn(80).save(tmp_path / "half")
    resumed = make_agent(wrapper=wrapper, load=tmp_path / "half").learn(80)
    assert same_tensors(resumed.policy.model.state_dict(), whole.policy.model.state_dict())
    assert (resumed.num_timesteps, resumed.accounts) == (whole.num_timesteps, whole.accounts)
    assert whole.accounts["optimizer_steps"] > 0


def test_equal_rewards_change_nothing(make_envs):
    envs = make_envs(group_size=4, reward=lambda completions, **_: [1.0] * len(completions))
    agent = ExpertIteration(envs, seed=0, **SMALL)
    before = {name: t.clone() for name, t in agent.policy.model.state_dict().items()}
    agent.learn(60)
    assert same_tensors(before, agent.policy.model.state_dict())
    assert agent.history[-1]["train/kept"] == 0


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rank_by": "returns"}, "Did you mean"),
        ({"minibatch_episodes": 0}, "minibatch_episodes >= 1"),
        ({"epochs": 0}, "epochs >= 1"),
        ({"learning_rate": 0.0}, "learning_rate > 0"),
    ],
)
def test_wrong_settings_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        ExpertIterationConfig(**config)


def test_an_environment_without_groups_is_refused(make_envs):
    with pytest.raises(ValueError, match="group_size"):
        ExpertIteration(make_envs(), seed=0)


def tree(**kwargs):
    return gym.make_vec("textenv/Tree-v0", num_envs=32, vocab_size=3, horizon=3, group_size=4, **kwargs)


def test_expected_reward_rises_and_the_kl_with_it():
    env = tree()
    agent = ExpertIteration(env, seed=0)
    before = env.unwrapped.evaluate(agent.policy)
    agent.learn(3_000)
    after = env.unwrapped.evaluate(agent.policy)
    top = env.unwrapped.leaves.rewards.max()
    assert after.reward - before.reward > 0.5 * (top - before.reward)
    assert after.kl > env.unwrapped.evaluate(env.unwrapped.solve().policy).kl  # nothing holds it back


def test_it_nears_the_known_optimum_when_ranking_by_the_return():
    env = tree()
    agent = ExpertIteration(env, seed=0, rank_by="return")
    assert env.unwrapped.evaluate(agent.policy).score == pytest.approx(0, abs=1e-4)
    agent.learn(4_000)
    assert env.unwrapped.evaluate(agent.policy).score > 0.8
