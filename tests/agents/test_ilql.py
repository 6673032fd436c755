"""ILQL: its losses by hand, the one distribution that acts and is scored, its fixed points, and its data."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import torch

from agents.ilql import ILQL, ILQLConfig, awac_loss, conservative_loss, expectile_loss, td_loss
from agents.rollout import collect

from .world import PassThrough, Truncate, plain_logits, same_tensors

SMALL = {"episodes_per_update": 8, "minibatch_episodes": 6, "gradient_steps": 3}


@pytest.fixture
def make_agent(make_envs):
    def make(seed=0, wrapper=None, load=None, env=None, **config):
        envs = make_envs(**(env or {}))
        envs = wrapper(envs) if wrapper else envs
        return ILQL.load(load, envs) if load else ILQL(envs, seed=seed, **(SMALL | config))

    return make


# ---------------------------------------------------------------------- losses, by hand


def test_td_loss_hand_worked():
    q = torch.tensor([[1.0, 5.0], [2.0, 7.0], [9.0, 9.0]])
    actions, rewards = torch.tensor([0, 1, 0]), torch.tensor([0.0, 3.0, 1.0])
    next_values, known = torch.tensor([2.0, 0.0, 0.0]), torch.tensor([True, True, False])
    # (1 - 0 - 0.5 * 2)^2 = 0, (7 - 3)^2 = 16, and one whose outcome is unknown
    assert td_loss(q, actions, rewards, next_values, known, 0.5).item() == pytest.approx(8.0)
    assert td_loss(q, actions, rewards, next_values, known, 1.0).item() == pytest.approx((1 + 16) / 2)
    assert td_loss(q, actions, rewards, next_values, torch.zeros(3, dtype=torch.bool), 1.0).item() == 0.0


def test_expectile_loss_hand_worked():
    # u = 2 and -1: 0.7 * 4 and 0.3 * 1
    values, targets = torch.tensor([1.0, 1.0]), torch.tensor([3.0, 0.0])
    assert expectile_loss(values, targets, 0.7).item() == pytest.approx((2.8 + 0.3) / 2)
    assert expectile_loss(values, targets, 0.5).item() == pytest.approx((2.0 + 0.5) / 2)


@pytest.mark.parametrize(("expectile", "expected"), [(0.5, 1.0), (0.9, 2.4)])
def test_the_expectile_of_a_coin(expectile, expected):
    # of 0 and 3 with weights 2 : 1.  2 (1 - tau) v = tau (3 - v)  ->  v = 3 tau / (2 - tau): 1, 2.4545...
    targets, value = torch.tensor([0.0, 0.0, 3.0]), torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([value], lr=0.5)
    for _ in range(300):
        optimizer.zero_grad()
        expectile_loss(value.expand(3), targets, expectile).backward()
        optimizer.step()
    assert value.item() == pytest.approx(3 * expectile / (2 - expectile), abs=1e-3)
    assert value.item() == pytest.approx(expected, abs=0.06)


def test_conservative_and_imitation_losses_hand_worked():
    # softmax(0, log 3) = (1/4, 3/4)
    q = torch.tensor([[0.0, np.log(3.0)]] * 2, dtype=torch.float64)
    assert conservative_loss(q, torch.tensor([0, 1])).item() == pytest.approx((np.log(4) + np.log(4 / 3)) / 2)
    log_probs = torch.tensor([-1.0, -2.0, -torch.inf], requires_grad=True)
    advantages = torch.tensor([np.log(2.0), 0.0, 0.0])
    assert awac_loss(log_probs, advantages, 0.0).item() == pytest.approx(1.5)
    loss = awac_loss(log_probs, advantages, 1.0)
    loss.backward()
    assert loss.item() == pytest.approx((2 * 1 + 2) / 2)
    torch.testing.assert_close(log_probs.grad, torch.tensor([-1.0, -0.5, 0.0]))


def test_losses_of_a_step_are_by_plain_forward_passes(make_agent):
    """TD targets go from a token to the next one of the same episode, and to the reward at its end."""
    agent = make_agent(gamma=0.9, expectile=0.8, gradient_steps=1).learn(60)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in agent.heads.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    batch = agent.minibatch()
    agent.minibatch = lambda: batch
    sums = {"q_loss": [], "value_loss": [], "cql_loss": [], "awac_loss": []}
    for i, tokens in enumerate(batch.tokens):
        m, n = batch.prompt_length[i], batch.response_length[i]
        ids = torch.from_numpy(tokens[: m + n])
        with torch.no_grad():
            hidden = agent.policy.model.base_model(input_ids=ids[None]).last_hidden_state[0, m - 1 : -1]
            v = agent.heads.v(hidden)[:, 0]
            qs, slow = ([head(hidden) for head in heads] for heads in (agent.heads.q, agent.heads.slow_q))
        for t in range(n):
            action = tokens[m + t]
            target = batch.rewards[i, t] + (0.9 * v[t + 1].item() if t + 1 < n else 0.0)
            sums["q_loss"].append(sum((q[t, action].item() - target) ** 2 for q in qs))
            u = min(q[t, action].item() for q in slow) - v[t].item()
            sums["value_loss"].append((0.8 if u > 0 else 0.2) * u**2)
            sums["cql_loss"].append(sum(-q[t].log_softmax(-1)[action].item() for q in qs))
        log_p = plain_logits(agent.policy.model, tokens[: m + n], m).log_softmax(-1)
        sums["awac_loss"] += (-log_p[torch.arange(n), ids[m:]]).tolist()
    agent.update()
    for name, values in sums.items():
        assert agent.logger.name_to_value[f"train/{name}"] == pytest.approx(np.mean(values), rel=1e-3), name


# ---------------------------------------------------------------------- one distribution


def shaken(agent):
    """Heads that prefer something."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in agent.heads.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    agent.policy.invalidate()
    return agent


@pytest.mark.parametrize("env", [{}, {"temperature": 0.6, "action_mask": np.arange(10) != 3}], ids=["plain", "all"])
def test_what_acts_is_scored_and_evaluated(make_agent, env):
    agent = shaken(make_agent(env=env, advantage_weight=2.0))
    envs = agent.env
    episodes = collect(envs, agent.policy, 12, agent.rng)
    scored, _, _ = agent.policy.evaluate(episodes, np.arange(12))
    for i, episode in enumerate(episodes):
        m, n = episode.prompt_length, episode.response_length
        ids = torch.from_numpy(episode.tokens)[None]
        with torch.no_grad():
            hidden = agent.policy.model.base_model(input_ids=ids).last_hidden_state[0, m - 1 : -1]
            logits = agent.policy.model.get_output_embeddings()(hidden) / env.get("temperature", 1.0)
            q = torch.minimum(*(head(hidden) for head in agent.heads.slow_q))
            table = logits.log_softmax(-1) + 2.0 * (q - agent.heads.v(hidden))
            if env:
                table[:, 3] = -torch.inf
            table = table.log_softmax(-1)
        expected = table[torch.arange(n), ids[0, m:]].numpy()
        np.testing.assert_allclose(episode.log_probs, expected, atol=1e-4)
        np.testing.assert_allclose(scored[i, :n].detach().numpy(), expected, atol=1e-4)
        observation = np.full((1, envs.unwrapped.max_tokens), 10)
        observation[0, :m] = episode.tokens[:m]
        np.testing.assert_allclose(agent.policy.log_probs_all(observation)[0], table[0].numpy(), atol=1e-4)
    assert np.abs(episodes.kl).max() > 0.1
    assert np.isfinite(episodes.kl).all()


def test_it_starts_as_the_reference(make_agent):
    agent = make_agent()
    episodes = collect(agent.env, agent.policy, 8, agent.rng)
    np.testing.assert_allclose(episodes.kl, 0, atol=1e-5)


def test_new_prompts_longer_than_the_environments_can_be_answered(make_agent):
    """The cache is probed at their length, against the plain model."""
    agent = shaken(make_agent())
    assert len(agent.generate(["a b c d e f g h a b c", "c"])) == 2
    assert agent.policy.lm.cached


# ---------------------------------------------------------------------- data


def test_the_data_are_the_references_whatever_has_been_learnt(make_agent):
    agent = shaken(make_agent(env={"beta": 0.5}))
    agent.learn(40)
    assert agent.history[-1]["rollout/kl"] == pytest.approx(0, abs=1e-5)
    assert agent.history[-1]["rollout/return"] == pytest.approx(agent.history[-1]["rollout/task_reward"])
    assert agent.lanes.kl.policy is agent.policy
    assert not agent.lanes.kl.pay
    assert sum(len(part.tokens) for part in agent.data) == 8 * len(agent.history)
    assert agent.history[-1]["train/data_episodes"] == 8 * len(agent.history)


def test_minibatches_are_drawn_from_all_data(make_agent):
    agent = make_agent(minibatch_episodes=400).learn(60)
    whole = {tuple(row) for part in agent.data for row in part.tokens}
    drawn = agent.minibatch()
    assert {tuple(row) for row in drawn.tokens} == whole
    rewards = {tuple(row): part.rewards[i].sum() for part in agent.data for i, row in enumerate(part.tokens)}
    assert [rewards[tuple(row)] for row in drawn.tokens] == drawn.rewards.sum(axis=1).tolist()


def test_what_a_cut_episode_led_to_is_not_made_up(make_agent):
    agent = make_agent(wrapper=lambda env: Truncate(env, 2)).learn(40)
    cut = np.concatenate([part.cut for part in agent.data])
    assert cut.any()
    assert all(np.isfinite(value) for value in agent.history[-1].values())


@pytest.mark.parametrize("wrapper", [None, PassThrough, lambda env: Truncate(env, 3)])
def test_resume_is_bit_exact(make_agent, tmp_path, wrapper):
    whole = make_agent(wrapper=wrapper).learn(160)
    make_agent(wrapper=wrapper).learn(80).save(tmp_path / "half")
    resumed = make_agent(wrapper=wrapper, load=tmp_path / "half")
    assert 0 < len(resumed.data) < len(whole.data)
    resumed.learn(80)
    assert same_tensors(resumed.policy.model.state_dict(), whole.policy.model.state_dict())
    assert same_tensors(resumed.heads.state_dict(), whole.heads.state_dict())
    assert (resumed.num_timesteps, resumed.accounts) == (whole.num_timesteps, whole.accounts)
    assert all((a.tokens == b.tokens).all() for a, b in zip(resumed.data, whole.data, strict=True))


# ---------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"expectile": 1.0}, "expectile between 0 and 1"),
        ({"gamma": 1.1}, "gamma between"),
        ({"polyak": 0.0}, "polyak"),
        ({"cql_coef": -0.1}, "cql_coef >= 0"),
        ({"gradient_steps": 0}, "gradient_steps >= 1"),
        ({"advantage_weight": -1.0}, "advantage_weight >= 0"),
    ],
)
def test_wrong_settings_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        ILQLConfig(**config)


def test_without_a_beta_the_weight_of_advantages_has_to_be_said(make_envs):
    with pytest.raises(ValueError, match="advantage_weight="):
        ILQL(make_envs(beta=0.0), seed=0)
    assert ILQL(make_envs(beta=0.0), seed=0, advantage_weight=3.0).policy.lm.weight == 3.0
    assert ILQL(make_envs(beta=0.25), seed=0).policy.lm.weight == 4.0


# ---------------------------------------------------------------------- against the known optimum


def test_on_one_token_episodes_it_nears_the_optimum_without_the_conservative_term():
    env = gym.make_vec("textenv/Tree-v0", num_envs=64, vocab_size=5, horizon=1)
    agent = ILQL(env, seed=0, cql_coef=0.0)
    assert env.unwrapped.evaluate(agent.policy).score == pytest.approx(0, abs=1e-4)
    agent.learn(128 * 12)
    assert env.unwrapped.evaluate(agent.policy).score > 0.97


def test_it_improves_on_the_reference_where_values_are_passed_on():
    env = gym.make_vec("textenv/Tree-v0", num_envs=64, vocab_size=3, horizon=3)
    agent = ILQL(env, seed=0).learn(4_000)
    assert env.unwrapped.evaluate(agent.policy).score > 0.6
