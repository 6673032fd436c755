"""Best-of-n: its exact distribution and KL, that predict draws from it, and how it plans."""

from __future__ import annotations

import itertools

import gymnasium as gym
import numpy as np
import pytest

from agents.best_of_n import BestOfN, BestOfNConfig, expected_best, take
from agents.rollout import collect, run_prompts
from textenv.exact import kl_divergence

from .world import PROMPTS, Truncate, count_a


def tree(**kwargs):
    return gym.make_vec("textenv/Tree-v0", **({"num_envs": 32, "vocab_size": 3, "horizon": 3} | kwargs))


# ---------------------------------------------------------------------- what it is worth, exactly


@pytest.mark.parametrize("structure", ["random", "needle", "trap"])
@pytest.mark.parametrize("n", [1, 2, 7, 64])
def test_exact_kl_is_below_the_bound_and_the_point_below_the_frontier(structure, n):
    env = tree(structure=structure)
    agent = BestOfN(env, n=n, seed=0)
    log_p = agent.completion_log_probs()
    leaves = env.unwrapped.leaves
    kl = kl_divergence(log_p, leaves.log_ref)
    assert np.exp(log_p).sum() == pytest.approx(1)
    assert -1e-6 <= kl <= np.log(n) - (n - 1) / n + 1e-6
    assert agent.kl_bound == pytest.approx(np.log(n) - (n - 1) / n)
    figures = env.unwrapped.evaluate(log_p)
    assert figures.reward <= env.unwrapped.frontier(np.geomspace(0.01, 10, 200)).bound(kl) + 1e-6
    assert figures.reward == pytest.approx(env.unwrapped.best_of_n(n).reward, abs=1e-4)
    if n == 1:
        np.testing.assert_allclose(log_p, leaves.log_ref, atol=1e-4)


def test_exact_distribution_is_by_enumeration_of_all_pairs():
    env = tree(structure="trap")  # many equals
    leaves = env.unwrapped.leaves
    p = np.exp(leaves.log_ref)
    expected = np.zeros(len(p))
    for i, j in itertools.product(range(len(p)), repeat=2):
        expected[i if leaves.rewards[i] >= leaves.rewards[j] else j] += p[i] * p[j]
    np.testing.assert_allclose(np.exp(BestOfN(env, n=2, seed=0).completion_log_probs()), expected, atol=1e-5)


def chi_square(seen, p):
    expected = p * seen.sum()
    likely = expected >= 5
    return ((seen - expected) ** 2 / np.maximum(expected, 1e-9))[likely].sum(), likely.sum()


@pytest.mark.parametrize("through", ["predict", "generate"])
def test_what_is_written_has_the_exact_distribution(through):
    env = tree(structure="random", beta=0.0)
    agent = BestOfN(env, n=4, seed=0)
    size = 1024
    if through == "predict":
        texts = env.unwrapped.completions(run_prompts(agent, env.unwrapped, np.zeros(size, int)))
    else:
        texts = agent.generate(["a"] * size)
    # a text of fewer letters than the budget has stopped; each text is one completion, but for those of the full length
    names = env.unwrapped.leaves.texts
    p = dict.fromkeys(names, 0.0)
    for name, probability in zip(names, np.exp(agent.completion_log_probs()), strict=True):
        p[name] += probability
    seen = np.array([texts.count(name) for name in p])
    statistic, cells = chi_square(seen, np.array(list(p.values())))
    assert cells >= 4
    assert statistic < cells + 6 * np.sqrt(2 * cells)


def test_rewards_are_better_than_the_references(make_envs):
    envs = make_envs(num_envs=16, beta=0.0)
    agent = BestOfN(envs, n=16, seed=0)
    ids = np.arange(64) % len(PROMPTS)
    best = run_prompts(agent, envs, ids).task_reward.mean()
    samples = collect(envs, agent.policy, 256, np.random.default_rng(0))
    assert best > samples.task_reward.mean() + samples.task_reward.std()


def test_expected_best_is_the_mean_over_all_subsets():
    rewards = np.array([3.0, -1.0, 2.0, 2.0, 7.0, 0.5])
    for n in (1, 2, 4, 6):
        expected = np.mean([max(subset) for subset in itertools.combinations(rewards, n)])
        assert expected_best(rewards, n) == pytest.approx(expected)
    with pytest.raises(ValueError, match="between 1 and the number of samples, 6"):
        expected_best(rewards, 7)


# ---------------------------------------------------------------------- planning


def test_a_plan_is_followed_to_its_end_and_a_new_episode_has_a_new_one(make_envs, monkeypatch):
    envs = make_envs(beta=0.0)
    agent = BestOfN(envs, n=3, seed=0)
    answer, asked = agent.answer, []

    def spy(sampler, prompt_ids, rng, begun=None):
        asked.append(len(prompt_ids))
        return answer(sampler, prompt_ids, rng, begun)

    monkeypatch.setattr(agent, "answer", spy)
    observations, _ = envs.reset(seed=0)
    ended = np.ones(8, bool)
    for _ in range(12):
        actions, _ = agent.predict(observations)
        assert asked.pop() == ended.sum() if ended.any() else not asked
        observations, _, ended, *_ = envs.step(actions)
    assert not asked


def test_lanes_in_another_order_are_planned_anew_and_still_right(make_envs):
    envs = make_envs(beta=0.0)
    agent = BestOfN(envs, n=3, seed=0)
    observations, _ = envs.reset(seed=0)
    for _ in range(6):
        order = np.random.default_rng(1).permutation(8)
        actions = np.empty(8, int)
        actions[order] = agent.predict(observations[order])[0]
        observations, *_ = envs.step(actions)


def test_from_the_middle_of_a_response_it_is_the_best_of_what_can_still_come():
    """After a first token: best of n among the completions that begin so."""
    env = tree(structure="random", beta=0.0)
    agent = BestOfN(env, n=5, seed=0)
    begun = np.full((1, env.unwrapped.max_tokens), 3)
    begun[0, :2] = [env.unwrapped.task.prompts.token_ids[0][0], 2]
    episodes = agent.answer(agent._sampler, np.zeros(600, int), np.random.default_rng(0), np.repeat(begun, 600, axis=0))
    assert (episodes.tokens[:, 1] == 2).all()
    leaves = env.unwrapped.leaves
    so = leaves.tokens[:, 0] == 2
    p, r = np.exp(leaves.log_ref[so]), leaves.rewards[so]
    at_most = np.array([p[r <= value].sum() for value in r]) / p.sum()
    below = np.array([p[r < value].sum() for value in r]) / p.sum()
    expected = at_most**5 - below**5
    seen = np.array([(episodes.task_reward == value).sum() for value in r])
    assert seen.sum() == 600
    statistic, cells = chi_square(seen, expected)
    assert statistic < cells + 6 * np.sqrt(2 * cells)


def test_deterministic_answers_depend_on_nothing_else(make_envs):
    envs = make_envs(beta=0.0)
    agent = BestOfN(envs, n=3, seed=0)
    observations, _ = envs.reset(seed=0)
    first = agent.predict(observations, deterministic=True)[0]
    agent.predict(observations)
    assert (agent.predict(observations, deterministic=True)[0] == first).all()
    assert agent.predict(observations[3], deterministic=True)[0] == first[3]


def test_seeding_repeats_what_is_drawn(make_envs):
    envs = make_envs(beta=0.0)
    agent = BestOfN(envs, n=3, seed=0)
    observations, _ = envs.reset(seed=0)

    def drawn():
        agent.set_random_seed(5)
        return [agent.predict(observations)[0].tolist() for _ in range(3)]

    first = drawn()
    assert first == drawn()
    assert len({tuple(row) for row in first}) > 1


def test_the_users_environment_is_left_where_it_stands(make_envs):
    envs = make_envs(beta=0.0)
    agent = BestOfN(envs, n=3, seed=0)
    observations, _ = envs.reset(seed=0)
    before = envs.get_state()["arrays"]["_tokens"].copy()
    agent.predict(observations)
    assert (envs.get_state()["arrays"]["_tokens"] == before).all()


# ---------------------------------------------------------------------- the agent


def test_learn_counts_logs_and_changes_nothing(make_envs):
    agent = BestOfN(make_envs(group_size=4), n=4, seed=0, episodes_per_update=32)
    agent.learn(300)
    assert agent.num_timesteps >= 300
    assert agent.accounts["optimizer_steps"] == agent.accounts["gradient_tokens"] == 0
    last = agent.history[-1]
    assert last["rollout/kl"] == pytest.approx(0, abs=1e-5)
    assert last["train/best_of_n_reward"] > last["rollout/task_reward"]
    assert last["train/kl_bound"] == pytest.approx(np.log(4) - 3 / 4)
    assert agent.optimizers() == {}


def test_the_estimate_is_unbiased_enough_to_meet_the_exact_figure():
    env = tree(structure="random")
    agent = BestOfN(env, n=8, seed=0, episodes_per_update=256).learn(8_000)
    estimate = np.mean([row["train/best_of_n_reward"] for row in agent.history])
    exact = env.unwrapped.evaluate(agent.completion_log_probs()).reward
    assert estimate == pytest.approx(exact, abs=0.05)


def test_resume_is_exact(make_envs, tmp_path):
    whole = BestOfN(make_envs(), n=2, seed=0, episodes_per_update=8).learn(160)
    BestOfN(make_envs(), n=2, seed=0, episodes_per_update=8).learn(80).save(tmp_path / "half")
    resumed = BestOfN.load(tmp_path / "half", make_envs()).learn(80)
    drop = ("time/seconds", "time/reward_seconds")
    assert [{k: v for k, v in row.items() if k not in drop} for row in resumed.history] == [
        {k: v for k, v in row.items() if k not in drop} for row in whole.history
    ]
    assert resumed.generate(["a", "b c"]) == whole.generate(["a", "b c"])


def test_episodes_that_a_wrapper_cuts_are_not_judged(make_envs):
    agent = BestOfN(Truncate(make_envs(), 1), n=1, seed=0, episodes_per_update=8).learn(30)
    assert all(np.isfinite(value) for value in agent.history[-1].values())


def test_take_renumbers(make_envs):
    envs = make_envs()
    agent = BestOfN(envs, n=2, seed=0)
    episodes = collect(envs, agent.policy, 6, agent.rng)
    part = take(episodes, np.array([4, 1]))
    assert part.order.tolist() == [0, 1]
    assert (part.tokens == episodes.tokens[[4, 1]]).all()
    assert part.task_reward.tolist() == episodes.task_reward[[4, 1]].tolist()


# ---------------------------------------------------------------------- wrong use


def test_what_cannot_be_answered_is_said(make_envs):
    agent = BestOfN(make_envs(beta=0.0), n=2, seed=0)
    stranger = np.full((1, agent.lanes.max_tokens), 10)
    stranger[0, :2] = [8, 8]
    with pytest.raises(ValueError, match="no prompt of the agent's environment"):
        agent.predict(stranger)
    with pytest.raises(ValueError, match="cannot be listed"):
        agent.completion_log_probs()
    with pytest.raises(ValueError, match="list of prompts"):
        agent.generate("a")
    with pytest.raises(ValueError, match="there is none"), pytest.warns(UserWarning, match="No reward="):
        BestOfN(make_envs(reward=None), seed=0)
    assert agent.generate([]) == []


def test_a_reward_that_reads_columns_cannot_judge_new_prompts(make_envs):
    def spells(completions, answer, **columns):
        return [float(text == wanted) for text, wanted in zip(completions, answer, strict=True)]

    prompts = [{"prompt": prompt, "answer": "a"} for prompt in PROMPTS]
    agent = BestOfN(make_envs(prompts=prompts, reward=spells, beta=0.0), n=2, seed=0)
    agent.predict(agent.env.reset(seed=0)[0])
    with pytest.raises(ValueError, match=r"judge completions of new prompts.*answer"):
        agent.generate(["a"])


@pytest.mark.parametrize("config", [{"n": 0}, {"samples_in_parallel": 0}, {"episodes_per_update": 0}])
def test_wrong_settings_are_refused(config):
    with pytest.raises(ValueError, match=f"{next(iter(config))} >= 1"):
        BestOfNConfig(**config)


def test_ties_go_to_any_of_the_equals(make_envs):
    envs = make_envs(reward=lambda completions, **_: [0.0] * len(completions), beta=0.0)
    agent = BestOfN(envs, n=8, seed=0)
    assert len(set(agent.generate(["a"] * 32))) > 8
    assert count_a(None, ["a"]) == [1.0]
