"""`TopKActions`: ranks among the reference's own tokens, and a KL that is that of what is sampled."""

from __future__ import annotations

import warnings
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.error import InvalidAction
from gymnasium.utils.env_checker import check_env
from stable_baselines3.common.env_checker import check_env as sb3_check_env

import textenv  # noqa: F401  # registers the ids
from textenv.testing import check_text_env
from textenv.wrappers import TopKActions, VectorTimeLimit

V, T, K = 4, 3, 2
TREE = "textenv/Tree-v0"
SIZE = {"vocab_size": V, "horizon": T}


class Ranked:
    """A policy over ranks, the same everywhere."""

    def __init__(self, *probabilities: float) -> None:
        self.log_p = np.log(probabilities)

    def log_probs(self, observations: np.ndarray, actions: np.ndarray) -> np.ndarray:
        return self.log_p[actions]


class Proportional:
    """The k tokens in the reference's own proportions, found apart from the wrapper."""

    def __init__(self, tree: Any, k: int) -> None:
        self.tree, self.k = tree, k

    def log_probs(self, observations: np.ndarray, actions: np.ndarray) -> np.ndarray:
        best = -np.sort(-self.tree.reference.log_probs_all(observations), axis=1)[:, : self.k]
        best -= np.log(np.exp(best).sum(axis=1, keepdims=True))
        return best[np.arange(len(actions)), actions]


def plain_reference(tree: Any, tokens: tuple[int, ...]) -> np.ndarray:
    """The reference's distribution after some response tokens, by a plain forward pass. Shape: (V,)."""
    import torch

    prompt = tree.task.prompts.token_ids[0].tolist()
    with torch.no_grad():
        logits = tree.task.model(torch.tensor([[*prompt, *tokens]])).logits[0, -1]
    return logits.double().softmax(-1).numpy()


@pytest.mark.parametrize("kwargs", [{}, {"action_mask": np.array([True, False, False, True])}], ids=["plain", "mask"])
def test_the_contract_holds_in_both_environments(kwargs: dict[str, Any]) -> None:
    def make() -> gym.Env:
        return TopKActions(gym.make(TREE, **SIZE, **kwargs), 3)

    check_text_env(make, lambda **kw: TopKActions(gym.make_vec(TREE, **SIZE, **kwargs, **kw), 3), steps=25)
    if "action_mask" in kwargs:
        return  # these checkers sample masked actions
    with warnings.catch_warnings():
        for true_of_every_id in ("we recommend using a symmetric", "different from the unwrapped", "The KL penalty"):
            warnings.filterwarnings("ignore", message=f".*{true_of_every_id}")
        check_env(make(), skip_render_check=True)
        sb3_check_env(make())


def test_ranks_are_tokens_by_falling_probability_under_the_reference() -> None:
    env = TopKActions(gym.make(TREE, beta=0.0, **SIZE), K)
    assert env.action_space == gym.spaces.Discrete(K)
    env.reset(seed=0)
    said: tuple[int, ...] = ()
    for rank in (1, 0):
        order = np.argsort(-plain_reference(env.unwrapped, said))
        assert env.action_tokens().tolist() == order[:K].tolist()
        observation, _, terminated, _, _ = env.step(rank)
        said = (*said, int(order[rank]))
        assert observation[1 : 1 + len(said)].tolist() == list(said)
        if terminated:
            break


def test_the_exact_score_of_a_policy_over_ranks_is_that_of_the_tokens_it_stands_for() -> None:
    envs = TopKActions(gym.make_vec(TREE, num_envs=2, **SIZE), K)
    tree, q = envs.unwrapped, (0.75, 0.25)
    expected = np.full(len(tree.leaves.tokens), -np.inf)
    for i, leaf in enumerate(tree.leaves.tokens):  # by hand: each token's rank, from a plain forward pass
        log_p, said = 0.0, ()
        for token in leaf[leaf < V].tolist():
            rank = int(np.argsort(-plain_reference(tree, said)).tolist().index(token))
            log_p += np.log(q[rank]) if rank < K else -np.inf
            said = (*said, token)
        expected[i] = log_p
    ours, theirs = tree.evaluate(envs.in_tokens(Ranked(*q))), tree.evaluate(expected)
    assert ours.objective == pytest.approx(theirs.objective, abs=1e-9)
    assert ours.kl == pytest.approx(theirs.kl, abs=1e-6)


@pytest.mark.parametrize("k", [1, K, V])
def test_the_kl_of_the_references_own_proportions_is_the_mass_that_is_cut_off(k: int) -> None:
    envs = TopKActions(gym.make_vec(TREE, num_envs=1, **SIZE), k)
    tree = envs.unwrapped
    first = np.sort(plain_reference(tree, ()))[::-1][:k].sum()
    evaluation = tree.evaluate(envs.in_tokens(Proportional(tree, k)))
    if k == V:
        assert evaluation.kl == pytest.approx(0, abs=1e-6)
        assert evaluation.score == pytest.approx(0, abs=1e-6)
    else:
        assert evaluation.kl >= -np.log(first) - 1e-6 > 0.01  # the first token's share of it, for each completion


def test_what_an_episode_pays_is_its_task_reward_minus_beta_times_the_kl_of_what_was_sampled() -> None:
    envs = TopKActions(gym.make_vec(TREE, num_envs=3, beta=0.3, **SIZE), K)
    tree, q, rng = envs.unwrapped, np.array([0.6, 0.4]), np.random.default_rng(0)
    envs.attach_policy(Ranked(*q))
    observations, _ = envs.reset(seed=0)
    paid, kl, ended = np.zeros(3), np.zeros(3), 0
    while ended < 12:
        ranks = rng.choice(K, size=3, p=q)
        for lane, row in enumerate(observations):
            reference = np.sort(plain_reference(tree, tuple(row[row < V][1:].tolist())))[::-1]
            kl[lane] += np.log(q[ranks[lane]]) - np.log(reference[ranks[lane]])
        observations, rewards, terminations, _, info = envs.step(ranks)
        paid += rewards
        for lane in np.flatnonzero(terminations):
            final = info["final_info"]
            assert final["kl"][lane] == pytest.approx(kl[lane], abs=1e-4)
            assert paid[lane] == pytest.approx(final["task_reward"][lane] - 0.3 * final["kl"][lane], abs=1e-6)
            paid[lane], kl[lane], ended = 0, 0, ended + 1


def test_masked_ranks_are_said_and_refused() -> None:
    envs = TopKActions(
        gym.make_vec(TREE, num_envs=2, beta=0.0, action_mask=np.array([True, False, False, True]), **SIZE), 3
    )
    envs.reset(seed=0)
    assert envs.action_masks().tolist() == [[True, True, False]] * 2
    assert sorted(envs.action_tokens()[0, :2].tolist()) == [0, 3]
    with pytest.raises(
        InvalidAction, match=r"Lane 1: only 2 tokens are allowed here, so rank 2 is masked: see action_masks\(\)"
    ):
        envs.step(np.array([0, 2]))


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        (np.array([0, K]), r"Lane 1: expected a rank between 0 and 1, got 2\."),
        (np.array([0.0, 1.0]), r"Expected actions to be 2 ranks .* got float64 of shape \(2,\)"),
        (np.array([0]), r"Expected actions to be 2 ranks .* of shape \(1,\)"),
    ],
)
def test_a_wrong_action_is_answered_before_anything_changes(actions: np.ndarray, message: str) -> None:
    envs = TopKActions(gym.make_vec(TREE, num_envs=2, beta=0.0, **SIZE), K)
    before, _ = envs.reset(seed=0)
    with pytest.raises(InvalidAction, match=message):
        envs.step(actions)
    np.testing.assert_array_equal(envs.unwrapped.get_state()["arrays"]["_tokens"], before)


@pytest.mark.parametrize("k", [0, V + 1, True, 1.5])
def test_a_wrong_k_is_refused(k: Any) -> None:
    with pytest.raises(ValueError, match="Expected k between 1 and the vocabulary size 4"):
        TopKActions(gym.make(TREE, **SIZE), k)


def test_an_environment_of_another_library_is_refused() -> None:
    with pytest.raises(ValueError, match="Expected a textenv environment"):
        TopKActions(gym.make("CartPole-v1"), K)


# ---------------------------------------------------------------------- the time limit


def test_time_limit_cuts_and_leaves_what_ends_alone() -> None:
    env = gym.make_vec("textenv/Tree-v0", num_envs=4, vocab_size=3, horizon=5, beta=0.0)
    limited = VectorTimeLimit(env, 2)
    observations, _ = limited.reset(seed=0)
    m = int((observations[0] != 3).sum())
    actions = [np.array([0, 1, 2, 1]), np.array([1, 0, 1, 2]), np.array([1, 1, 0, 1])]
    observations, _, terminated, truncated, info = limited.step(actions[0])
    assert (terminated.tolist(), truncated.tolist()) == ([True, False, False, False], [False] * 4)
    observations, rewards, terminated, truncated, info = limited.step(actions[1])
    assert (terminated.tolist(), truncated.tolist()) == ([False, True, False, False], [False, False, True, True])
    assert info["_final_obs"].tolist() == [False, True, True, True]
    assert info["final_obs"][2][: m + 3].tolist()[m:] == [2, 1, 3]
    assert (observations != 3).sum(axis=1).tolist() == [m + 1, m, m, m]
    assert info["_prompt_id"].tolist() == [False, True, True, True]
    assert rewards[2] == rewards[3] == 0
    _, _, terminated, truncated, _ = limited.step(actions[2])
    assert (terminated.tolist(), truncated.tolist()) == ([False, False, True, False], [True, False, False, False])


def test_time_limit_refuses_what_it_cannot_do() -> None:
    env = gym.make_vec("textenv/Tree-v0", num_envs=2, autoreset_mode="NEXT_STEP")
    with pytest.raises(ValueError, match="SAME_STEP"):
        VectorTimeLimit(env, 2)
    with pytest.raises(ValueError, match="limit >= 1"):
        VectorTimeLimit(gym.make_vec("textenv/Tree-v0", num_envs=2), 0)
