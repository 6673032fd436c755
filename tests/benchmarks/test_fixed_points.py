"""Where other objectives come to rest: the agents' own losses, summed over all completions, have no gradient there."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import torch

import textenv  # noqa: F401  # registers the ids
from agents.advantages import aggregate, kl_terms
from agents.grpo import clipped_losses
from agents.ilql import conservative_loss, expectile_loss, td_loss
from benchmarks import fixed_points
from textenv.tasks.tree import reference_table

BETA = 0.5


@pytest.fixture(scope="module")
def world():
    """A task of 15 completions: environment, tree, the reference's table, rewards."""
    lanes = gym.make_vec("textenv/Tree-v0", num_envs=1, vocab_size=3, horizon=3, seed_of_task=4).unwrapped
    tree = lanes.solve().policy.tree
    return lanes, tree, reference_table(lanes.task, tree, lanes.behaviour), lanes.leaves.rewards


def table_of(tree, log_p):
    """A policy's table from its completions: how often each token follows each state. Shape: (Y,) -> (S, V)."""
    mass = fixed_points.sum_below(tree, np.exp(log_p))
    return np.log(mass) - np.log(mass.sum(axis=1, keepdims=True))


def grpo_gradient(tree, log_ref, rewards, log_p):
    """Of the expected loss of `variant="grpo"` on policy, in the logits of a table; groups are large."""
    p = torch.from_numpy(np.exp(log_p))
    logits = torch.from_numpy(table_of(tree, log_p)).requires_grad_()
    mask = torch.from_numpy(tree.paths >= 0)
    cells = torch.from_numpy(np.maximum(tree.paths, 0))
    log_probs = torch.where(mask, logits.log_softmax(-1).flatten()[cells], 0.0)
    refs = torch.where(mask, torch.from_numpy(log_ref).flatten()[cells], 0.0)
    r = torch.from_numpy(rewards)
    advantages = (r - p @ r) / (p @ (r - p @ r) ** 2).sqrt()
    ratio = (log_probs - log_probs.detach()).exp()
    losses = clipped_losses(ratio, advantages[:, None], 0.2, 0.2) + BETA * kl_terms(log_probs - refs, ratio, "k3")
    weights = p[:, None] * len(p)  # `aggregate` takes the plain mean over completions
    return torch.autograd.grad(aggregate(losses * weights, mask, "sequence", 3), logits)[0]


def test_grpo_rests_at_its_fixed_point_and_not_at_the_optimum(world):
    lanes, tree, log_ref, rewards = world
    point = fixed_points.grpo(tree, log_ref, rewards, BETA)
    assert np.exp(point).sum() == pytest.approx(1)
    assert grpo_gradient(tree, log_ref, rewards, point).abs().max() < 1e-6
    optimum = tree.sum_along(lanes.solve().policy.table)
    assert grpo_gradient(tree, log_ref, rewards, optimum).abs().max() > 0.01


@pytest.mark.parametrize("prize", [1.0, 100.0])
def test_with_one_completion_that_pays_grpo_does_not_ask_how_much(prize):
    """One token, two completions: p (1 - sqrt((1 - p) / p) / beta) = ref, without the prize in it."""
    lanes = gym.make_vec("textenv/Tree-v0", num_envs=1, vocab_size=2, horizon=1).unwrapped
    tree = lanes.solve().policy.tree
    log_ref = np.log([[0.99, 0.01]])
    p = np.exp(fixed_points.grpo(tree, log_ref, np.array([0.0, prize]), BETA))[1]
    assert p * (1 - np.sqrt((1 - p) / p) / BETA) == pytest.approx(0.01, abs=1e-6)
    assert p == pytest.approx(1 / (1 + BETA**2), abs=0.01)


@pytest.mark.parametrize(("expectile", "cql_coef"), [(0.5, 0.0), (0.8, 0.0), (0.7, 0.1)])
def test_ilql_rests_at_its_fixed_point(world, expectile, cql_coef):
    """The agent's losses of every state and token, weighted by how often the reference comes there."""
    _, tree, log_ref, rewards = world
    log_pi = table_of(tree, fixed_points.ilql(tree, log_ref, rewards, BETA, expectile, cql_coef))
    advantages = torch.from_numpy(BETA * (log_pi - log_ref))  # Q - V, up to a number per state
    visits = fixed_points.sum_below(tree, np.exp(tree.sum_along(log_ref)))
    # V: backward, as what makes the expectile of Q right; then Q is known, and so are all losses.
    q, v = advantages.clone(), torch.zeros(len(log_ref), dtype=torch.float64)
    ref = torch.from_numpy(np.exp(log_ref))
    for s in reversed(range(len(log_ref))):
        child, leaf = tree.child[s], tree.leaf[s]
        target = torch.where(torch.from_numpy(child >= 0), v[child], torch.from_numpy(rewards)[leaf])
        q[s] += (ref[s] * (target - q[s])).sum()  # the conservative gradient sums to 0, so the means of Q and Q' agree
        value = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.SGD([value], lr=0.5)
        for _ in range(200):
            optimizer.zero_grad()
            sum(ref[s, a] * expectile_loss(value, q[s, a : a + 1], expectile) for a in range(3)).backward()
            optimizer.step()
        v[s] = value.item()
    q.requires_grad_()
    loss, known = 0.0, torch.tensor([True])
    for s, a in np.argwhere(tree.allowed):
        last = tree.leaf[s, a] >= 0
        reward = torch.tensor([rewards[tree.leaf[s, a]] if last else 0.0])
        after = torch.tensor([0.0 if last else v[tree.child[s, a]].item()], dtype=torch.float64)
        token = torch.tensor([a])
        cell = td_loss(q[s][None], token, reward, after, known, 1.0) + cql_coef * conservative_loss(q[s][None], token)
        loss = loss + visits[s, a] * cell
    assert torch.autograd.grad(loss, q)[0].abs().max() < 1e-5


def test_within_a_nucleus_the_best_policy_lacks_beta_log_of_the_optimums_mass(world):
    """max over pi on S of J = beta log sum_S ref exp(r / beta) = V* + beta log pi*(S)."""
    lanes, tree, _, _ = world
    solution = lanes.solve()
    optimum = tree.sum_along(solution.policy.table)
    inside = fixed_points.nucleus_of(tree, solution.policy.table, 0.8)
    assert 0 < inside.sum() < len(inside)
    kept = np.where(inside, optimum, -np.inf)
    mass = np.exp(kept).sum()
    best = lanes.evaluate(kept - np.log(mass)).objective
    assert best == pytest.approx(solution.value + BETA * np.log(mass))
    for seed in range(5):  # no other policy on S is better
        other = np.where(inside, np.random.default_rng(seed).normal(size=len(inside)), -np.inf)
        other = other - np.logaddexp.reduce(other)
        assert lanes.evaluate(other).objective < best


def test_the_table_names_presets():
    from benchmarks.suites import PRESETS

    names = [name for row in fixed_points.scores("random", 0) for name in row.split(", ")]
    assert set(names) <= set(PRESETS)
