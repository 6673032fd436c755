"""Collecting: two lanes with one result, fair samples, no leak over an episode's end, and a KL that is counted once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gymnasium.vector import VectorWrapper

from agents import PPO
from agents.rollout import collect, run_prompts

from .world import PassThrough, Truncate, build_model, count_a, plain_logits

MODES = ["SAME_STEP", "NEXT_STEP"]


def rollout(envs, episodes=13, **config):
    """Episodes of a policy that has moved away from the reference."""
    agent = PPO(envs, seed=3, **config)
    move(agent)
    return agent, collect(agent.env, agent.policy, episodes, agent.rng)


def move(agent):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in agent.policy.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    agent.policy.invalidate()


# ---------------------------------------------------------------------- step lane = deferred lane


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("env_kwargs", [{}, {"group_size": 2}, {"temperature": 0.7, "num_envs": 3}, {"num_envs": 16}])
def test_step_lane_equals_deferred_lane(make_envs, mode, env_kwargs):
    kwargs = {"num_envs": 4, "autoreset_mode": mode} | env_kwargs
    _, deferred = rollout(make_envs(**kwargs))
    _, stepped = rollout(PassThrough(make_envs(**kwargs)))
    for name in (
        "lane",
        "order",
        "prompt_id",
        "group_id",
        "tokens",
        "prompt_length",
        "response_length",
        "finish_reason",
    ):
        np.testing.assert_array_equal(getattr(stepped, name), getattr(deferred, name), err_msg=name)
    for name in ("log_probs", "rewards"):
        np.testing.assert_allclose(getattr(stepped, name), getattr(deferred, name), atol=1e-4, err_msg=name)
    for name in ("kl", "task_reward"):
        np.testing.assert_allclose(getattr(stepped, name), getattr(deferred, name), atol=1e-3, err_msg=name)
    np.testing.assert_array_equal(stepped.mask, deferred.mask)
    assert len(set(deferred.response_length)) > 1
    assert set(deferred.finish_reason) == {"stop", "length"}
    assert np.abs(deferred.kl).max() > 0.01


def test_reward_components_reach_both_lanes(make_envs):
    from rewards import WeightedSum

    reward = WeightedSum({"a": (count_a, 1.0), "short": (lambda completions, **_: [-len(c) for c in completions], 0.1)})
    _, deferred = rollout(make_envs(reward=reward))
    _, stepped = rollout(PassThrough(make_envs(reward=reward)))
    assert set(deferred.components) == set(stepped.components) == {"a", "short"}
    for name, values in deferred.components.items():
        np.testing.assert_allclose(stepped.components[name], values, atol=1e-6)


def test_rewards_of_a_wrapper_are_what_the_step_lane_learns_from(make_envs):
    class Double(VectorWrapper):
        def step(self, actions):
            observations, rewards, *rest = self.env.step(actions)
            return (observations, 2 * rewards, *rest)

    _, plain = rollout(make_envs())
    _, doubled = rollout(Double(make_envs()))
    np.testing.assert_allclose(doubled.rewards, 2 * plain.rewards, atol=1e-4)
    np.testing.assert_allclose(doubled.task_reward, plain.task_reward)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wrapper", [None, PassThrough])
def test_tokens_are_counted_as_they_are_taken(make_envs, mode, wrapper):
    """`on_step` hears of the tokens that lanes really took: none for a lane that is being reset or lies idle."""
    envs = make_envs(num_envs=3, autoreset_mode=mode)
    agent = PPO(wrapper(envs) if wrapper else envs, seed=0)
    heard = []
    before = envs._steps  # counted by the environment itself
    episodes = collect(agent.env, agent.policy, 7, agent.rng, heard.append)
    assert sum(heard) == envs._steps - before
    assert sum(heard) >= episodes.response_length.sum()
    if wrapper is None:
        assert sum(heard) == episodes.response_length.sum()


# ---------------------------------------------------------------------- fair samples


def short_or_long(observations):
    """Prompt `a` must be answered by the stop token at once; any other prompt never may be."""
    allowed = np.ones((len(observations), 10), bool)
    stop = observations[:, 0] == 1
    allowed[stop, 1:] = False
    allowed[~stop, 0] = False
    return allowed


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wrapper", [None, PassThrough])
def test_collect_is_unbiased_in_length(make_envs, mode, wrapper):
    """Half of the prompts give one token, half give six: so must the episodes, and the first B to *finish* would not."""
    envs = make_envs(
        prompts=["a", "b"], max_new_tokens=6, action_mask=short_or_long, beta=0.0, autoreset_mode=mode, num_envs=16
    )
    agent = PPO(wrapper(envs) if wrapper else envs, seed=0)
    starts, finishes = [], []
    for _ in range(12):
        episodes = collect(agent.env, agent.policy, 32, agent.rng)
        np.testing.assert_array_equal(episodes.order, np.arange(32))
        assert set(episodes.lane[:16]) == set(range(16))  # in order of start
        starts.extend(episodes.response_length)
        finishes.extend(first_finished(episodes, 16, 32))
    spread = 4 * 2.5 / np.sqrt(len(starts))  # four standard errors around the mean of 1 and 6
    assert abs(np.mean(starts) - 3.5) < spread
    assert abs(np.mean(finishes) - 3.5) > spread


def first_finished(episodes, lanes, count):
    """The lengths of the `count / 2` episodes that end first, replayed from starts and lengths."""
    clock, ends = np.zeros(lanes), []
    for lane, length in zip(episodes.lane, episodes.response_length, strict=True):
        clock[lane] += length
        ends.append((clock[lane], length))
    return [length for _, length in sorted(ends, key=lambda e: e[0])[: count // 2]]


# ---------------------------------------------------------------------- truncation by a wrapper


@pytest.mark.parametrize("mode", MODES)
def test_truncated_episodes_are_cut_and_never_leak(make_envs, mode):
    envs = make_envs(num_envs=4, autoreset_mode=mode, max_new_tokens=6, prompts=["a", "b c", "d e f"])
    agent, episodes = rollout(Truncate(envs, limit=3), episodes=20)
    cut = episodes.finish_reason == "truncated"
    assert 3 < cut.sum() < 20
    assert (episodes.response_length[cut] == 3).all()
    assert (episodes.response_length <= 3).all()
    assert set(episodes.finish_reason) == {"truncated", "stop"}
    for episode in episodes:
        # the tokens are one prompt of the data set and one response: nothing of a neighbour
        prompt = envs.task.prompts.token_ids[episode.prompt_id]
        np.testing.assert_array_equal(episode.tokens[: episode.prompt_length], prompt)
        response = episode.tokens[episode.prompt_length :]
        assert (response[:-1] != 0).all()
        # rewards: the KL of each of *these* tokens, and the task reward only where the episode ended
        logits = [
            plain_logits(m, episode.tokens, len(prompt)).log_softmax(-1) for m in (agent.policy.model, envs.task.model)
        ]
        pi, ref = (x.detach().numpy()[np.arange(len(response)), response] for x in logits)
        expected = -0.1 * (pi - ref)
        np.testing.assert_allclose(episode.log_probs, pi, atol=1e-4)
        if episode.finish_reason == "truncated":
            assert np.isnan(episode.task_reward)
        else:
            expected[-1] += episode.task_reward
        np.testing.assert_allclose(episode.rewards, expected, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("critic", ["head", "separate"])
def test_truncated_episodes_bootstrap_and_others_do_not(make_envs, mode, critic):
    envs = make_envs(num_envs=4, autoreset_mode=mode, max_new_tokens=6)
    agent, episodes = rollout(Truncate(envs, limit=3), episodes=12, critic=critic)
    with torch.no_grad():
        agent.critic.head.weight.normal_(generator=torch.Generator().manual_seed(0))
        agent.critic.head.bias.fill_(0.7)
    _, bootstrap = agent.values(episodes)
    trunk = agent.critic.trunk or agent.policy.model.base_model
    for i, episode in enumerate(episodes):
        if episode.finish_reason == "truncated":
            states = trunk(torch.from_numpy(episode.tokens)[None]).last_hidden_state
            assert bootstrap[i].item() == pytest.approx(agent.critic.head(states[0, -1]).item(), abs=1e-4)
            assert bootstrap[i] != 0
        else:
            assert bootstrap[i] == 0


@pytest.mark.parametrize("mode", MODES)
def test_learning_under_truncation_logs_finite_figures(make_envs, mode):
    envs = Truncate(make_envs(autoreset_mode=mode, max_new_tokens=6), limit=2)
    agent = PPO(envs, seed=0, episodes_per_update=16, minibatch_episodes=8).learn(60)
    assert all(np.isfinite(value) for row in agent.history for value in row.values())
    assert all(row["train/first_ratio_error"] < 1e-4 for row in agent.history)


def test_all_episodes_truncated(make_envs):
    """Nobody reaches an end: there is no task reward to report, and the agent goes on."""
    envs = Truncate(make_envs(stop_tokens=[], max_new_tokens=6), limit=2)
    agent = PPO(envs, seed=0, episodes_per_update=8).learn(20)
    assert "rollout/task_reward" not in agent.history[0]
    assert agent.history[0]["rollout/response_length"] == 2


# ---------------------------------------------------------------------- the KL is counted once


@pytest.mark.parametrize("wrapper", [None, PassThrough])
def test_kl_is_paid_once_by_placement(make_envs, monkeypatch, wrapper):
    """`reward`: the environment pays it. `loss` and `none`: it does not, though it reports the same KL."""
    totals = {}
    for placement in ("reward", "loss", "none"):
        monkeypatch.setattr(PPO, "kl_placement", placement)
        envs = make_envs(beta=0.3)
        _, episodes = rollout(wrapper(envs) if wrapper else envs)
        totals[placement] = episodes.rewards.sum(axis=1) - episodes.task_reward
        np.testing.assert_allclose(totals[placement], -0.3 * episodes.kl * (placement == "reward"), atol=1e-4)
        assert np.abs(episodes.kl).max() > 0.01
    assert np.abs(totals["reward"]).max() > 0.003


def test_no_loss_term_repeats_the_kl(make_envs):
    """With a task reward of 0 and `pay=False` PPO sees no reward at all, and its policy gradient is zero."""
    agent, episodes = rollout(make_envs(beta=0.3, reward=lambda completions, **_: [0.0] * len(completions)))
    norms = {}
    for pay in (True, False):
        agent.lanes.attach_policy(agent.policy, pay=pay)
        episodes = collect(agent.env, agent.policy, 13, agent.rng)
        assert (episodes.rewards != 0).any() == pay
        twin = PPO(agent.lanes, seed=0, whiten_advantages=False, epochs=1, minibatch_episodes=13)
        twin.policy.model.load_state_dict(agent.policy.model.state_dict())
        twin.update(episodes)
        norms[pay] = twin.logger.name_to_value["train/grad_norm"]
    assert norms[False] == 0
    assert norms[True] > 1e-3


def test_the_learning_agents_policy_is_the_one_that_is_measured(make_envs):
    """Two agents on one environment: whoever learns has its own KL paid."""
    envs = make_envs()
    first, second = (PPO(envs, seed=seed, episodes_per_update=8) for seed in (0, 1))
    move(second)
    assert envs.kl.policy is second.policy
    first.learn(1)
    assert envs.kl.policy is first.policy
    assert first.history[-1]["rollout/kl"] == pytest.approx(0, abs=1e-5)
    assert first.history[-1]["train/first_ratio_error"] < 1e-4


# ---------------------------------------------------------------------- given prompts


def test_run_prompts_keeps_the_order_of_the_prompts(make_envs):
    envs = make_envs(num_envs=3, beta=0.0)
    agent = PPO(make_envs(), seed=0)
    ids = np.array([3, 0, 0, 2, 1, 3, 1])
    episodes = run_prompts(agent, envs, ids, deterministic=True)
    np.testing.assert_array_equal(episodes.prompt_id, ids)
    texts = envs.completions(episodes)
    assert texts[0] == texts[5]
    assert texts[1] == texts[2]
    assert np.isnan(episodes.kl).all()  # no policy is attached there


def test_lanes_that_do_not_restart_are_refused(make_envs):
    with pytest.raises(ValueError, match="SAME_STEP"):
        PPO(make_envs(autoreset_mode="DISABLED"))


def test_other_architectures_take_the_same_path(make_envs):
    _, deferred = rollout(make_envs(model=build_model("gpt2")))
    _, stepped = rollout(PassThrough(make_envs(model=build_model("gpt2"))))
    np.testing.assert_array_equal(stepped.tokens, deferred.tokens)
    np.testing.assert_allclose(stepped.rewards, deferred.rewards, atol=1e-4)
