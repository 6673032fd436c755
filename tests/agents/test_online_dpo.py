"""Online DPO: its loss by hand and as TRL writes it, its pairs, its fixed point, and that it learns."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import torch

from agents.online_dpo import OnlineDPO, OnlineDPOConfig, dpo_loss, make_pairs
from agents.rollout import collect

from .world import PassThrough, Truncate, plain_logits, same_tensors

SMALL = {"episodes_per_update": 8, "minibatch_pairs": 2}


@pytest.fixture
def make_agent(make_envs):
    def make(seed=0, wrapper=None, load=None, **config):
        envs = make_envs(group_size=2)
        envs = wrapper(envs) if wrapper else envs
        return OnlineDPO.load(load, envs) if load else OnlineDPO(envs, seed=seed, **(SMALL | config))

    return make


# ---------------------------------------------------------------------- the loss


def test_loss_hand_worked():
    # margins 0.5 (1 + 1) = 1 and 0.5 (0 - 2) = -1;  -log sigmoid(1) = log(1 + 1/e) = 0.313262, -log sigmoid(-1) = 1.313262
    better, worse = torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 2.0])
    assert dpo_loss(better, worse, 0.5).item() == pytest.approx((0.313262 + 1.313262) / 2, abs=1e-6)
    soft = dpo_loss(better[:1], worse[:1], 0.5, torch.tensor([0.7]))
    assert soft.item() == pytest.approx(0.7 * 0.313262 + 0.3 * 1.313262, abs=1e-6)


def test_loss_is_that_of_trl():
    """trl/trainer/online_dpo_trainer.py: logits = pi_logratios - ref_logratios; losses = -F.logsigmoid(beta * logits)."""
    rng = np.random.default_rng(0)
    chosen, rejected, ref_chosen, ref_rejected = torch.from_numpy(rng.normal(-5, 2, (4, 7)))
    logits = (chosen - rejected) - (ref_chosen - ref_rejected)
    expected = -torch.nn.functional.logsigmoid(0.1 * logits).mean()
    torch.testing.assert_close(dpo_loss(chosen - ref_chosen, rejected - ref_rejected, 0.1), expected)


def test_at_the_optimum_nothing_moves_under_bradley_terry_labels_and_something_does_under_argmax():
    """pi = ref exp(r / beta) / Z: log-ratios are r / beta, up to log Z which cancels."""
    r, beta = torch.tensor([2.0, 0.3, -1.0], dtype=torch.float64), 0.4
    ratios = (r / beta - 3.0).requires_grad_()
    one, other = torch.tensor([0, 0, 1]), torch.tensor([1, 2, 2])
    fair = dpo_loss(ratios[one], ratios[other], beta, torch.sigmoid(r[one] - r[other]))
    sure = dpo_loss(ratios[one], ratios[other], beta)
    assert torch.autograd.grad(fair, ratios)[0].abs().max() < 1e-12
    assert torch.autograd.grad(sure, ratios)[0].abs().max() > 0.01


def test_a_completion_that_cannot_be_drawn_any_more_counts_as_nothing():
    log_probs = torch.tensor([[0.5, -torch.inf], [0.2, 0.1], [0.4, 0.0], [0.1, 0.0]], requires_grad=True)
    ratios = log_probs.sum(dim=1)
    loss = dpo_loss(ratios[:2], ratios[2:], 1.0)
    loss.backward()
    assert loss.item() == pytest.approx(-np.log(1 / (1 + np.exp(-0.2))) / 2, abs=1e-6)
    assert torch.isfinite(log_probs.grad).all()
    assert (log_probs.grad[0] == 0).all()


# ---------------------------------------------------------------------- pairs


def test_pairs_hand_worked():
    worth = np.array([1.0, 2.0, 3.0, 3.0, 5.0, np.nan, 0.0, 4.0, 7.0])
    group = np.array([0, 0, 1, 1, 2, 2, 3, 3, 3])
    assert make_pairs(worth, group).tolist() == [[1, 0], [7, 6]]  # equals, one without partner, and the odd one are out
    assert make_pairs(worth, group, ties=True).tolist() == [[1, 0], [2, 3], [7, 6]]
    assert make_pairs(np.ones(4), np.array([0, 0, 1, 1])).shape == (0, 2)


def test_partners_have_the_same_prompt(make_agent):
    agent = make_agent()
    episodes = collect(agent.env, agent.policy, 8, agent.rng)
    pairs = make_pairs(episodes.task_reward, episodes.group_id)
    assert len(pairs) > 1
    assert (episodes.prompt_id[pairs[:, 0]] == episodes.prompt_id[pairs[:, 1]]).all()
    assert (episodes.task_reward[pairs[:, 0]] > episodes.task_reward[pairs[:, 1]]).all()


@pytest.mark.parametrize("wrapper", [None, PassThrough])
def test_first_loss_is_by_plain_forward_passes(make_agent, wrapper):
    """One minibatch of all pairs, after some training: policy and reference differ."""
    agent = make_agent(wrapper=wrapper, minibatch_pairs=64, beta=0.7).learn(60)
    episodes = collect(agent.env, agent.policy, 8, agent.rng)
    pairs = make_pairs(episodes.rewards.sum(axis=1), episodes.group_id)

    def ratio(i):
        m, n = episodes.prompt_length[i], episodes.response_length[i]
        tokens = episodes.tokens[i, : m + n]
        both = [
            plain_logits(model, tokens, m).log_softmax(-1) for model in (agent.policy.model, agent.lanes.task.model)
        ]
        scores = [log_p[torch.arange(n), torch.from_numpy(tokens[m:])].sum().item() for log_p in both]
        return scores[0] - scores[1]

    margins = np.array([0.7 * (ratio(one) - ratio(other)) for one, other in pairs])
    assert np.abs(margins).max() > 0.01
    agent.update(episodes)
    logged = agent.logger.name_to_value
    assert logged["train/loss"] == pytest.approx(np.log1p(np.exp(-margins)).mean(), abs=1e-3)
    assert logged["train/margin"] == pytest.approx(margins.mean(), abs=1e-3)


# ---------------------------------------------------------------------- the agent


def test_the_kl_is_in_the_loss(make_agent):
    agent = make_agent().learn(60)
    assert agent.kl_placement == "loss"
    assert agent.lanes.kl.policy is agent.policy
    assert not agent.lanes.kl.pay
    assert agent.history[-1]["rollout/return"] == pytest.approx(agent.history[-1]["rollout/task_reward"])
    assert agent.beta == 0.1
    assert make_agent(beta=0.3).beta == 0.3


@pytest.mark.parametrize("wrapper", [None, PassThrough, lambda env: Truncate(env, 3)])
def test_resume_is_bit_exact(make_agent, tmp_path, wrapper):
    whole = make_agent(wrapper=wrapper).learn(160)
    make_agent(wrapper=wrapper).learn(80).save(tmp_path / "half")
    resumed = make_agent(wrapper=wrapper, load=tmp_path / "half").learn(80)
    assert same_tensors(resumed.policy.model.state_dict(), whole.policy.model.state_dict())
    assert (resumed.num_timesteps, resumed.accounts) == (whole.num_timesteps, whole.accounts)
    assert whole.accounts["optimizer_steps"] > 0


def test_equal_rewards_change_nothing(make_envs):
    envs = make_envs(group_size=2, reward=lambda completions, **_: [1.0] * len(completions))
    agent = OnlineDPO(envs, seed=0, **SMALL)
    before = {name: t.clone() for name, t in agent.policy.model.state_dict().items()}
    agent.learn(60)
    assert same_tensors(before, agent.policy.model.state_dict())
    assert agent.history[-1]["train/pairs"] == 0


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"beta": 0.0}, "beta > 0"),
        ({"labels": "bradley"}, "Did you mean"),
        ({"minibatch_pairs": 0}, "minibatch_pairs >= 1"),
        ({"epochs": 0}, "epochs >= 1"),
    ],
)
def test_wrong_settings_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        OnlineDPOConfig(**config)


def test_wrong_environments_are_refused(make_envs):
    with pytest.raises(ValueError, match="group_size"):
        OnlineDPO(make_envs(), seed=0)
    with pytest.raises(ValueError, match="constant at beta 0"):
        OnlineDPO(make_envs(group_size=2, beta=0.0), seed=0, **SMALL)
    assert OnlineDPO(make_envs(group_size=2, beta=0.0), seed=0, beta=0.1, **SMALL).beta == 0.1


def test_it_nears_the_known_optimum_with_bradley_terry_labels():
    env = gym.make_vec("textenv/Tree-v0", num_envs=32, vocab_size=3, horizon=3, group_size=2)
    agent = OnlineDPO(env, seed=0, labels="bradley_terry")
    assert env.unwrapped.evaluate(agent.policy).score == pytest.approx(0, abs=1e-4)
    agent.learn(3_000)
    assert env.unwrapped.evaluate(agent.policy).score > 0.9
