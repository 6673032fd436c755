"""What the tree claims to know exactly, against enumeration by other means, sampling, and worked cases."""

from __future__ import annotations

import itertools
import math
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

import textenv  # noqa: F401  # registers the ids
from agents.policy import Policy
from textenv.exact import best_of_n, completion_count, frontier, grow, soft_values, tilt, win_rate
from textenv.tasks.tree import STRUCTURES, independent, random_walks

from .reference_env import plain_log_prob

SMALL = {"vocab_size": 3, "horizon": 3}  # 15 completions


def tree(**kwargs: Any) -> Any:
    return gym.make_vec("textenv/Tree-v0", num_envs=kwargs.pop("num_envs", 4), **kwargs).unwrapped


def random_policies(leaves: int, count: int, seed: int = 0) -> np.ndarray:
    """Log-probabilities of distributions from nearly uniform to nearly certain. Shape: (count, leaves)."""
    rng = np.random.default_rng(seed)
    raw = rng.standard_normal((count, leaves)) * np.geomspace(0.1, 30, count)[:, None]
    return raw - np.log(np.exp(raw - raw.max(1, keepdims=True)).sum(1, keepdims=True)) - raw.max(1, keepdims=True)


def listed(vocab_size: int, horizon: int, stop: int = 0) -> set[tuple[int, ...]]:
    """Every completion, by filtering all strings."""
    strings = {s for n in range(1, horizon + 1) for s in itertools.product(range(vocab_size), repeat=n)}
    return {s for s in strings if stop not in s[:-1] and (s[-1] == stop or len(s) == horizon)}


class OnlyLogProbs:
    """A user's policy with the one method that is asked for."""

    def __init__(self, policy: Any) -> None:
        self.policy, self.calls = policy, 0

    def log_probs(self, observations: np.ndarray, actions: np.ndarray) -> np.ndarray:
        self.calls += 1
        return self.policy.log_probs(observations, actions)


class Close:
    """Equal to an evaluation up to rounding."""

    def __init__(self, evaluation: Any, tolerance: float = 1e-9) -> None:
        self.figures, self.tolerance = vars(evaluation), tolerance

    def __eq__(self, other: Any) -> bool:
        return vars(other) == pytest.approx(self.figures, abs=self.tolerance)

    __hash__ = None


# ---------------------------------------------------------------------- the list of completions


@pytest.mark.parametrize(("vocab_size", "horizon"), [(2, 1), (2, 4), (3, 3), (4, 4), (7, 2)])
def test_every_completion_is_listed_once(vocab_size: int, horizon: int) -> None:
    completions = grow(vocab_size, horizon, [0])
    rows = [tuple(row[row < vocab_size].tolist()) for row in completions.leaves]
    assert len(rows) == len(set(rows)) == completion_count(vocab_size, horizon)
    assert set(rows) == listed(vocab_size, horizon)


def test_there_are_about_a_thousand_by_default() -> None:
    env = tree()
    assert len(env.leaves.texts) == 1093 == sum(3**t for t in range(7))
    assert len(set(env.leaves.texts)) == 1093
    assert completion_count(4, 4) == 121


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_reference_is_the_model_under_the_environments_temperature(temperature: float) -> None:
    env = tree(**SMALL, temperature=temperature)
    prompt, model = env.task.prompts.token_ids[0].tolist(), env.task.model
    for row, log_ref in zip(env.leaves.tokens, env.leaves.log_ref, strict=True):
        tokens = row[row < 3].tolist()
        expected = sum(plain_log_prob(model, prompt + tokens[:t], token, temperature) for t, token in enumerate(tokens))
        assert log_ref == pytest.approx(expected, abs=1e-5)
    assert np.exp(env.leaves.log_ref).sum() == pytest.approx(1, abs=1e-12)


def test_the_reference_is_not_uniform() -> None:
    for seed in range(3):
        env = tree(seed_of_task=seed, num_envs=1)
        log_probs = env.reference.log_probs_all(env.reset(seed=0)[0])
        assert log_probs.max() - log_probs.min() > 0.5


def test_masked_tokens_belong_to_no_completion() -> None:
    env = tree(vocab_size=4, horizon=3, action_mask=np.array([True, True, False, True]))
    assert {tuple(row[row < 4].tolist()) for row in env.leaves.tokens} == {s for s in listed(4, 3) if 2 not in s}
    assert np.exp(env.leaves.log_ref).sum() == pytest.approx(1, abs=1e-12)
    assert env.evaluate(env.solve().policy).score == pytest.approx(1, abs=1e-9)
    assert env.evaluate(Policy(env.reference)).kl == pytest.approx(0, abs=1e-6)


def test_a_mask_may_depend_on_what_was_said() -> None:
    def no_repeats(observations: np.ndarray) -> np.ndarray:
        lengths = (observations < 4).sum(axis=1)
        last = observations[np.arange(len(observations)), lengths - 1]
        return (np.arange(4) != last[:, None]) | (lengths == 1)[:, None]

    env = tree(vocab_size=4, horizon=3, action_mask=no_repeats)
    expected = {s for s in listed(4, 3) if all(a != b for a, b in itertools.pairwise(s))}
    assert {tuple(row[row < 4].tolist()) for row in env.leaves.tokens} == expected
    assert env.evaluate(OnlyLogProbs(env.solve().policy)).score == pytest.approx(1, abs=1e-9)


# ---------------------------------------------------------------------- the optimum


def test_two_tokens_two_steps_worked_by_hand() -> None:
    # Stop or "a", twice. ref: 1/2, 1/2 at first, then 1/4, 3/4. So ref("") = 1/2, ref("a.") = 1/8, ref("aa") = 3/8.
    # beta = 1/2 and r = 1/2 log(1, 2, 4), so that exp(r / beta) = 1, 2, 4.
    #   Z = 1/2 + 2/8 + 12/8 = 9/4,  V* = 1/2 log 9/4 = log 3/2;   pi* = (1/2, 1/4, 3/2) / (9/4) = 2/9, 1/9, 6/9
    #   V*(a) = 1/2 log(2/4 + 12/4) = 1/2 log 7/2
    completions = grow(2, 2, [0])
    assert completions.leaves.tolist() == [[0, 2], [1, 0], [1, 1]]
    log_ref = np.log([[1 / 2, 1 / 2], [1 / 4, 3 / 4]])
    rewards = 0.5 * np.log([1, 2, 4])
    np.testing.assert_allclose(np.exp(completions.sum_along(log_ref)), [1 / 2, 1 / 8, 3 / 8])
    q, value = soft_values(completions, log_ref, rewards, 0.5)
    np.testing.assert_allclose(value, [math.log(1.5), 0.5 * math.log(3.5)])
    np.testing.assert_allclose(q, [[0, 0.5 * math.log(3.5)], [0.5 * math.log(2), 0.5 * math.log(4)]])
    log_best, log_z = tilt(completions.sum_along(log_ref), rewards, 0.5)
    assert log_z == pytest.approx(math.log(9 / 4))
    np.testing.assert_allclose(np.exp(log_best), [2 / 9, 1 / 9, 6 / 9])
    # E r = 1/2 (1/9 log 2 + 6/9 log 4) = 13/18 log 2;  KL = 2/9 log 4/9 + 1/9 log 8/9 + 6/9 log 16/9
    front = frontier(completions.sum_along(log_ref), rewards, [0.5])
    assert front.reward == pytest.approx([13 / 18 * math.log(2)])
    assert front.kl == pytest.approx([2 / 9 * math.log(4 / 9) + 1 / 9 * math.log(8 / 9) + 6 / 9 * math.log(16 / 9)])
    # The best of two is "" only if both are (1/4), "a." if the better is (25/64 - 1/4), else "aa".
    np.testing.assert_allclose(
        np.exp(best_of_n(completions.sum_along(log_ref), rewards, 2)), [16 / 64, 9 / 64, 39 / 64]
    )


@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_optimum_by_leaves_by_tokens_and_as_a_policy_is_the_same(structure: str) -> None:
    for seed, beta in [(0, 0.1), (1, 3.0)]:
        env = tree(structure=structure, seed_of_task=seed, beta=beta)
        solution, leaves = env.solve(), env.leaves
        pairs = list(zip(leaves.rewards.tolist(), leaves.log_ref.tolist(), strict=True))
        highest = max(r / beta + log_ref for r, log_ref in pairs)
        log_z = highest + math.log(math.fsum(math.exp(r / beta + log_ref - highest) for r, log_ref in pairs))
        assert solution.value == pytest.approx(beta * log_z, abs=1e-9)
        assert solution.log_z == pytest.approx(log_z, abs=1e-9)
        best = env.evaluate(solution.policy)
        assert best.objective == pytest.approx(solution.value, abs=1e-9)
        assert best.kl_to_optimum == pytest.approx(0, abs=1e-9)
        assert best.score == pytest.approx(1, abs=1e-9)


def test_regret_is_beta_times_the_kl_to_the_optimum() -> None:
    env = tree()
    solution = env.solve()
    for log_p in random_policies(1093, 20):
        result = env.evaluate(log_p)
        assert result.regret == pytest.approx(0.5 * result.kl_to_optimum, abs=1e-9)
        assert result.objective == pytest.approx(result.reward - 0.5 * result.kl, abs=1e-12)
        assert result.regret == pytest.approx(solution.value - result.objective, abs=1e-12)
        assert result.regret > 0


def test_the_score_is_zero_for_the_reference_and_one_for_the_optimum() -> None:
    env = tree()
    reference = env.evaluate(Policy(env.reference))
    assert reference.kl == pytest.approx(0, abs=1e-6)
    assert reference.score == pytest.approx(0, abs=1e-5)
    assert reference.objective == pytest.approx(np.exp(env.leaves.log_ref) @ env.leaves.rewards, abs=1e-6)
    assert env.evaluate(env.leaves.log_ref).score == pytest.approx(0, abs=1e-12)


def test_a_trained_policy_is_scored_as_it_samples() -> None:
    env = tree(**SMALL)
    policy = Policy(env.reference, top_k=2)
    with torch.no_grad():
        policy.model.lm_head.weight.mul_(3)
    expected = np.array(
        [
            sum(
                policy.log_probs(np.array([[1, *row[:t], *[3] * (3 - t)]]), np.array([token]))[0]
                for t, token in enumerate(row[row < 3])
            )
            for row in env.leaves.tokens
        ]
    )
    assert (expected == -np.inf).any()
    assert env.evaluate(policy) == Close(env.evaluate(expected), 1e-5)


def test_the_three_ways_to_give_a_policy_agree() -> None:
    env = tree()
    table = env.solve().policy
    asked = OnlyLogProbs(table)
    by_leaf = tilt(env.leaves.log_ref, env.leaves.rewards, env.kl.beta)[0]
    assert env.evaluate(asked) == Close(env.evaluate(table))
    assert env.evaluate(by_leaf) == Close(env.evaluate(table))
    assert env.evaluate(list(by_leaf)) == Close(env.evaluate(table))
    assert asked.calls == 4  # 364 prefixes in one batch, once for each token


def test_large_trees_are_asked_about_in_batches_of_one_size() -> None:
    env = tree(vocab_size=5, horizon=6)  # 1,365 prefixes
    shapes = []

    class Watched:
        def log_probs_all(self, observations: np.ndarray) -> np.ndarray:
            shapes.append(observations.shape)
            return env.reference.log_probs_all(observations)

        log_probs = None

    assert env.evaluate(Watched()).kl == pytest.approx(0, abs=1e-6)
    assert shapes == [(683, 7)] * 2


# ---------------------------------------------------------------------- the frontier, and best-of-n


@pytest.mark.parametrize("structure", STRUCTURES)
def test_nothing_lies_above_the_frontier(structure: str) -> None:
    env = tree(structure=structure, vocab_size=4, horizon=4)
    front = env.frontier(np.geomspace(0.02, 50, 60))
    assert (np.diff(front.kl) < 1e-12).all()  # a larger beta keeps closer to the reference
    assert (np.diff(front.reward) < 1e-12).all()
    others = [env.evaluate(log_p) for log_p in random_policies(121, 30)] + [env.best_of_n(n) for n in (2, 5, 30)]
    for other in others:
        assert other.reward <= front.bound(other.kl) + 1e-12
        for beta, value in zip(front.betas, front.value, strict=True):
            assert other.reward - beta * other.kl <= value + 1e-12
    np.testing.assert_allclose(front.bound(front.kl), front.reward, atol=1e-9)
    at_half = env.frontier([0.5])
    best = env.evaluate(env.solve().policy)
    assert (at_half.reward[0], at_half.kl[0], at_half.value[0]) == pytest.approx(
        (best.reward, best.kl, best.objective), abs=1e-9
    )


@pytest.mark.parametrize("rewards", [[0.1, 0.5, 0.2, -1.0], [1.0, 0.0, 1.0, 0.0], [2.0, 2.0, 2.0, 2.0]])
@pytest.mark.parametrize("n", [1, 2, 4])
def test_best_of_n_by_listing_all_samples(rewards: list[float], n: int) -> None:
    p = [0.4, 0.3, 0.2, 0.1]
    expected = np.zeros(4)
    for sample in itertools.product(range(4), repeat=n):
        probability = math.prod(p[y] for y in sample)
        best = [y for y in sample if rewards[y] == max(rewards[y] for y in sample)]
        for y in best:
            expected[y] += probability / len(best)
    ours = best_of_n(np.log(p), np.array(rewards), n)
    np.testing.assert_allclose(np.exp(ours), expected, atol=1e-12)
    wins = sum(
        expected[y] * p[z] * (1.0 if rewards[y] > rewards[z] else 0.5 if rewards[y] == rewards[z] else 0.0)
        for y in range(4)
        for z in range(4)
    )
    assert win_rate(ours, np.log(p), np.array(rewards)) == pytest.approx(wins)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_best_of_n_against_its_bounds_and_against_samples(structure: str) -> None:
    env = tree(structure=structure)
    leaves, rng = env.leaves, np.random.default_rng(0)
    p = np.exp(leaves.log_ref)
    for n in (1, 2, 8, 64, 1000):
        result = env.best_of_n(n)
        assert -1e-9 <= result.kl <= math.log(n) - (n - 1) / n + 1e-9  # Beirami et al. (2024), arXiv:2401.01879
        wins = win_rate(best_of_n(leaves.log_ref, leaves.rewards, n), leaves.log_ref, leaves.rewards)
        assert 0.5 - 1e-9 <= wins <= n / (n + 1) + 1e-9
        if n <= 8:
            best = leaves.rewards[rng.choice(len(p), size=(20_000, n), p=p / p.sum())].max(axis=1)
            assert result.reward == pytest.approx(best.mean(), abs=5 * best.std() / math.sqrt(len(best)) + 1e-9)
    assert env.best_of_n(1).score == pytest.approx(0, abs=1e-9)
    assert env.best_of_n(10**6).reward <= leaves.rewards.max() + 1e-9


def test_best_of_n_of_another_policy_than_the_reference() -> None:
    env = tree(**SMALL)
    policy = env.solve().policy
    assert env.best_of_n(1, policy) == Close(env.evaluate(policy))
    assert env.best_of_n(4, policy).reward > env.evaluate(policy).reward


# ---------------------------------------------------------------------- through the environment


@pytest.mark.parametrize("structure", ["random", "trap"])
def test_sampling_through_the_environment_agrees(structure: str) -> None:
    env = tree(**SMALL, structure=structure, num_envs=50)
    policy = env.solve().policy
    env.attach_policy(policy)
    observations, _ = env.reset(seed=1)
    with env.deferred(episodes=4000) as ledger:
        while not ledger.done:
            actions, _ = policy.predict(observations)
            observations, *_ = env.step(actions)
    episodes, exact = ledger.episodes, env.evaluate(policy)
    for samples, value in [
        (episodes.task_reward, exact.reward),
        (episodes.kl, exact.kl),
        (episodes.rewards.sum(axis=1), exact.objective),
    ]:
        assert samples.mean() == pytest.approx(value, abs=4 * samples.std() / math.sqrt(len(samples)) + 1e-4)
    np.testing.assert_allclose(episodes.rewards.sum(axis=1), episodes.task_reward - 0.5 * episodes.kl, atol=1e-9)
    # Here every completion's own return is V*: that is what being optimal means.
    np.testing.assert_allclose(episodes.rewards.sum(axis=1), env.solve().value, atol=1e-4)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_environment_pays_what_the_list_says(structure: str) -> None:
    env = gym.make("textenv/Tree-v0", **SMALL, structure=structure, beta=0)
    leaves = env.unwrapped.leaves
    for row, text, reward in zip(leaves.tokens, leaves.texts, leaves.rewards, strict=True):
        env.reset(seed=0)
        for token in row[row < 3]:
            *_, paid, terminated, _, info = env.step(token)
        assert terminated
        assert paid == info["task_reward"] == info[f"reward/{structure}"] == reward
        assert text == env.unwrapped.tokenizer.decode(row[row < 3], skip_special_tokens=True)


def test_the_single_environment_knows_the_same() -> None:
    env, single = tree(), gym.make("textenv/Tree-v0")
    assert single.unwrapped.evaluate(env.solve().policy) == Close(env.evaluate(env.solve().policy))
    assert single.unwrapped.solve().value == env.solve().value
    assert single.unwrapped.best_of_n(4) == env.best_of_n(4)
    assert single.unwrapped.frontier([1.0]).kl == env.frontier([1.0]).kl
    assert env.kl.beta == single.unwrapped.kl.beta == 0.5


@pytest.mark.parametrize("structure", STRUCTURES)
def test_it_is_a_gymnasium_environment(structure: str) -> None:
    env = gym.make("textenv/Tree-v0", structure=structure, kl="reference").unwrapped
    check_env(env, skip_render_check=True)


def test_evaluating_disturbs_no_episode() -> None:
    def run(evaluate: bool) -> list[Any]:
        env = tree()
        policy = Policy(env.reference)
        env.attach_policy(policy)
        rng = np.random.default_rng(0)
        observations, _ = env.reset(seed=3)
        seen = []
        for _ in range(12):
            if evaluate:
                env.evaluate(policy)
            actions, _ = policy.act(observations, rng)
            observations, rewards, *_ = env.step(actions)
            seen += [actions, rewards]
        return seen

    for ours, theirs in zip(run(True), run(False), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


# ---------------------------------------------------------------------- reward structures keep their promises

SEEDS = range(5)


def greedy_walk(env: Any) -> str:
    """Take, at each prefix, the token with the best expected reward if the reference goes on from there."""
    leaves, response = env.leaves, ()
    rows = [tuple(row[row < env.vocab_size].tolist()) for row in leaves.tokens]
    while response not in rows:
        worth = {}
        for token in range(env.vocab_size):
            below = [i for i, row in enumerate(rows) if row[: len(response) + 1] == (*response, token)]
            weights = np.exp(leaves.log_ref[below])
            worth[token] = weights @ leaves.rewards[below] / weights.sum()
        response = (*response, max(worth, key=worth.__getitem__))
    return leaves.texts[rows.index(response)]


@pytest.mark.parametrize("seed", SEEDS)
def test_greedy_choices_fall_into_the_trap(seed: int) -> None:
    env = tree(structure="trap", seed_of_task=seed)
    leaves, best = env.leaves, env.solve().policy
    p_best = np.exp(tilt(leaves.log_ref, leaves.rewards, 0.5)[0])
    treasure = leaves.texts[int(leaves.rewards.argmax())]
    assert leaves.texts[int(p_best.argmax())] == treasure
    assert 0.75 < p_best.max() < 0.95
    caught = greedy_walk(env)
    assert leaves.rewards[leaves.texts.index(caught)] == 1
    assert caught[:1] != treasure[0]
    alike = np.array([text[:1] == treasure[0] for text in leaves.texts])
    weights = np.exp(leaves.log_ref)
    assert weights[alike] @ leaves.rewards[alike] == pytest.approx(0, abs=1e-9)
    assert (leaves.rewards[~alike] == 1).all()
    assert len(treasure) >= 2
    observations, _ = env.reset(seed=0)
    assert env.tokenizer.decode(best.predict(observations[0], deterministic=True)[0]) == treasure[0]


@pytest.mark.parametrize("seed", SEEDS)
def test_the_optimum_needs_the_needle(seed: int) -> None:
    env = tree(structure="needle", seed_of_task=seed)
    leaves = env.leaves
    (needle,) = np.flatnonzero(leaves.rewards)
    assert 1 / 220 < np.exp(leaves.log_ref[needle]) < 1 / 160
    assert np.exp(tilt(leaves.log_ref, leaves.rewards, 0.5)[0])[needle] == pytest.approx(0.95, abs=1e-9)


@pytest.mark.parametrize("seed", SEEDS)
def test_conflict_pays_least_for_what_the_reference_likes_best(seed: int) -> None:
    env = tree(structure="conflict", seed_of_task=seed)
    leaves = env.leaves
    assert (np.argsort(leaves.rewards) == np.argsort(-leaves.log_ref)).all()
    assert leaves.rewards[leaves.log_ref.argmax()] == leaves.rewards.min()
    assert env.solve().value == pytest.approx(0.5 * math.log(1093), abs=1e-6)
    assert env.evaluate(np.full(1093, -math.log(1093))).score == pytest.approx(1, abs=1e-6)


def test_random_rewards_have_the_stated_spread_and_independent_ones_nothing_in_common() -> None:
    completions, rng = grow(4, 4, [0]), np.random.default_rng(0)
    log_ref = np.full(121, -math.log(121))
    # The last 108 completions have 4 tokens: first letter x second x third x the last token.
    walks, alone = (
        np.array([draw(rng, completions, log_ref)[-108:].reshape(3, 9, 4) for _ in range(500)])
        for draw in (random_walks, independent)
    )
    assert walks.std() == pytest.approx(1, abs=0.05)
    assert alone.std() == pytest.approx(1, abs=0.02)
    # Siblings share all draws but the last, of variance 0.7^6 among 1, 0.7^2, 0.7^4, 0.7^6; those of other first letters none.
    shared = 1 - 0.7**6 / (1 + 0.7**2 + 0.7**4 + 0.7**6)
    assert (walks[..., 0] * walks[..., 1]).mean() == pytest.approx(shared, abs=0.1)
    assert (walks[:, 0] * walks[:, 1]).mean() == pytest.approx(0, abs=0.1)
    assert (alone[..., 0] * alone[..., 1]).mean() == pytest.approx(0, abs=0.05)


def test_the_seed_of_the_task_is_the_task() -> None:
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    one, same, other = tree(seed_of_task=3), tree(seed_of_task=3, num_envs=1), tree(seed_of_task=4)
    assert torch.equal(before, torch.random.get_rng_state())
    np.testing.assert_array_equal(one.leaves.rewards, same.leaves.rewards)
    np.testing.assert_array_equal(one.leaves.log_ref, same.leaves.log_ref)
    assert not np.allclose(one.leaves.rewards, other.leaves.rewards)
    assert not np.allclose(one.leaves.log_ref, other.leaves.log_ref)
    assert np.allclose(one.leaves.log_ref, tree(seed_of_task=3, structure="trap").leaves.log_ref)


def test_a_reward_of_ones_own() -> None:
    def vowels(completions: list[str], **columns: Any) -> list[float]:
        return [text.count("a") - 0.1 * len(text) for text in completions]

    env = tree(**SMALL, reward=vowels, beta=0.1)
    assert env.leaves.rewards.tolist() == vowels(env.leaves.texts)
    assert env.evaluate(env.solve().policy).score == pytest.approx(1, abs=1e-9)


def test_where_the_reference_is_the_optimum_there_is_no_score() -> None:
    env = tree(**SMALL, reward=lambda completions: [1.0] * len(completions))
    result = env.evaluate(env.reference)
    assert math.isnan(result.score)
    assert result.regret == pytest.approx(0, abs=1e-6)


# ---------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"structure": "tarp"}, "Did you mean `trap`"),
        ({"structure": None}, "one of .*random"),
        ({"vocab_size": 1}, "vocab_size to be an integer of at least 2, got 1"),
        ({"vocab_size": 64}, "at most 63"),
        ({"horizon": 0}, "horizon to be an integer of at least 1, got 0"),
        ({"horizon": 2.0}, "horizon to be an integer"),
        ({"seed_of_task": -1}, "seed_of_task to be an integer of at least 0"),
        ({"vocab_size": 30, "horizon": 20}, "too many to list; expected at most 1,000,000"),
        ({"structure": "trap", "horizon": 1}, "needs horizon >= 2"),
        ({"horizn": 3}, "Did you mean `horizon`"),
        ({"prompts": ["b"]}, "Unknown keyword 'prompts'"),
    ],
)
def test_bad_settings_say_what_was_expected(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gym.make_vec("textenv/Tree-v0", num_envs=1, **kwargs)


def test_bad_policies_say_what_was_expected() -> None:
    env = tree(**SMALL)
    uniform = np.full(15, -math.log(15))

    class Scores:
        def __init__(self, values: Any) -> None:
            self.values = values

        def log_probs(self, observations: np.ndarray, actions: np.ndarray) -> Any:
            return self.values(len(actions))

    class Holder:
        policy = env.reference

    with pytest.raises(ValueError, match=r"sum to 1, got 2\. log_probs must give"):
        env.evaluate(uniform + math.log(2))
    with pytest.raises(ValueError, match="sum to 1, got nan"):
        env.evaluate(uniform * np.nan)
    with pytest.raises(ValueError, match=r"each of the 15 completions of `leaves`, got 14 values"):
        env.evaluate(uniform[1:])
    with pytest.raises(ValueError, match=r"got Holder\. Did you mean its `.policy`"):
        env.evaluate(Holder())
    with pytest.raises(
        ValueError, match=r"Scores.log_probs to return .* of shape \(7,\) without nan, got shape \(7, 1\)"
    ):
        env.evaluate(Scores(lambda n: np.zeros((n, 1))))
    with pytest.raises(ValueError, match="without nan, got nan"):
        env.evaluate(Scores(lambda n: np.full(n, np.nan)))
    with pytest.raises(ValueError, match="sum to 1, got 15"):
        env.evaluate(Scores(np.zeros))
    with pytest.raises(ValueError, match="n to be a positive integer"):
        env.best_of_n(0)
    with pytest.raises(ValueError, match="betas to be a list of positive numbers"):
        env.frontier([0.0, 1.0])
    with pytest.raises(ValueError, match="Expected beta > 0"):
        tree(**SMALL, beta=0.0).solve()
