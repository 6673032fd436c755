"""Exact figures by enumeration: what a policy is worth, what the best one would be, and what lies between.

    J(pi) = E_pi[r] - beta KL(pi || ref)         pi*(y) = ref(y) exp(r(y) / beta) / Z         V* = max J = beta log Z

and the regret of any policy is `V* - J(pi) = beta KL(pi || pi*)`. The same optimum, token by token (the tree is
deterministic and nothing is discounted):

    Q*(s, a) = r where the completion ends, else V*(s.a)
    V*(s) = beta log sum_a ref(a|s) exp(Q*(s, a) / beta)         pi*(a|s) = ref(a|s) exp((Q*(s, a) - V*(s)) / beta)

Notation: V tokens, T the response budget, S prefixes (states in which a token is chosen), Y completions (leaves).
Everything is numpy in float64; log-probabilities in nats, `-inf` where a token cannot be drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

FLOATS = NDArray[np.float64]
INTS = NDArray[np.int64]


# ---------------------------------------------------------------------- the tree of completions


@dataclass(frozen=True, eq=False)
class CompletionTree:
    """Every completion of one prompt, shorter ones first. Made by `grow`."""

    vocab_size: int
    """V."""
    prefixes: INTS
    """Responses that are not finished, padded with V; the empty one first. Shape: (S, T)."""
    leaves: INTS
    """Finished responses, stop token included, padded with V. Shape: (Y, T)."""
    child: INTS
    """The prefix that a token leads to; -1 where it ends the response, or is not allowed. Shape: (S, V)."""
    leaf: INTS
    """The completion that a token finishes; -1 where the response goes on, or the token is not allowed. Shape: (S, V)."""
    paths: INTS
    """Each completion's cells in a flattened (S, V) table, padded with -1. Shape: (Y, T)."""
    levels: tuple[slice, ...]
    """Where the prefixes of 0, 1, ... tokens stand."""

    @property
    def allowed(self) -> NDArray[np.bool_]:
        """Tokens that may follow each prefix. Shape: (S, V)."""
        return (self.child >= 0) | (self.leaf >= 0)

    def at(self, responses: INTS) -> INTS:
        """The prefix that each (unfinished) response is. Shape: (N, T), padded with V -> (N,); -1 for finished ones."""
        node = np.zeros(len(responses), np.int64)
        for token in responses.T:
            step = self.child[node, np.minimum(token, self.vocab_size - 1)]
            node = np.where((token < self.vocab_size) & (node >= 0), step, node)
        return node

    def sum_along(self, table: FLOATS) -> FLOATS:
        """Sum over each completion's tokens: of log-probabilities, its log-probability. Shape: (S, V) -> (Y,)."""
        cells: FLOATS = np.append(table.ravel(), 0.0)[self.paths]  # -1 is the 0 that was appended
        return np.asarray(cells.sum(axis=1))


def completion_count(vocab_size: int, horizon: int) -> int:
    """How many completions there are with one stop token: `sum_{t=0..T} (V - 1)^t`."""
    return sum((vocab_size - 1) ** t for t in range(horizon + 1))


def grow(
    vocab_size: int,
    horizon: int,
    stop_tokens: Sequence[int],
    allowed: Callable[[INTS], NDArray[np.bool_]] | None = None,
) -> CompletionTree:
    """Enumerate every completion.

    Args:
        vocab_size: V.
        horizon: T, in tokens.
        stop_tokens: Ids that end a completion early.
        allowed: Tokens that may follow each prefix: (n, T) padded with V -> (n, V). None allows all.
    """
    rows, paths = np.full((1, horizon), vocab_size), np.full((1, horizon), -1)
    prefixes, children, leaf, leaves, leaf_paths, levels = [], [], [], [], [], []
    first, finished = 0, 0
    for t in range(horizon):
        n = len(rows)
        levels.append(slice(first, first + n))
        state, token = np.nonzero(np.ones((n, vocab_size), bool) if allowed is None else allowed(rows))
        next_rows, next_paths = rows[state], paths[state]
        next_rows[:, t], next_paths[:, t] = token, (first + state) * vocab_size + token
        ends = np.isin(token, stop_tokens) | (t == horizon - 1)
        level_child, level_leaf = np.full((2, n, vocab_size), -1)
        level_child[state[~ends], token[~ends]] = first + n + np.arange((~ends).sum())
        level_leaf[state[ends], token[ends]] = finished + np.arange(ends.sum())
        prefixes.append(rows)
        children.append(level_child)
        leaf.append(level_leaf)
        leaves.append(next_rows[ends])
        leaf_paths.append(next_paths[ends])
        first, finished = first + n, finished + int(ends.sum())
        rows, paths = next_rows[~ends], next_paths[~ends]
        if not len(rows):
            break
    return CompletionTree(
        vocab_size=vocab_size,
        prefixes=np.concatenate(prefixes),
        leaves=np.concatenate(leaves),
        child=np.concatenate(children),
        leaf=np.concatenate(leaf),
        paths=np.concatenate(leaf_paths),
        levels=tuple(levels),
    )


# ---------------------------------------------------------------------- the optimum


def logsumexp(x: FLOATS) -> Any:
    """`log sum exp` over the last axis. `-inf` counts as nothing. Shape: (..., n) -> (...)."""
    return np.logaddexp.reduce(x, axis=-1)


def soft_values(tree: CompletionTree, log_ref: FLOATS, rewards: FLOATS, beta: float) -> tuple[FLOATS, FLOATS]:
    """Q* and V* by backward recursion, the longest prefixes first.

    Args:
        tree: The completions.
        log_ref: The reference, token by token. Shape: (S, V).
        rewards: Of each completion. Shape: (Y,).
        beta: Reward per nat, > 0.

    Returns:
        Q* (`-inf` where a token is not allowed) and V*. Shapes: (S, V), (S,).
    """
    q, value = np.full(log_ref.shape, -np.inf), np.zeros(len(log_ref))
    for level in reversed(tree.levels):
        child, leaf = tree.child[level], tree.leaf[level]
        q[level] = np.where(child >= 0, value[child], np.where(leaf >= 0, rewards[leaf], -np.inf))
        value[level] = beta * logsumexp(log_ref[level] + q[level] / beta)
    return q, value


def tilt(log_ref: FLOATS, rewards: FLOATS, beta: float) -> tuple[FLOATS, float]:
    """The optimum, completion by completion: log pi* and log Z. Shapes: (Y,), (Y,) -> (Y,), ()."""
    tilted = log_ref + rewards / beta
    log_z = float(logsumexp(tilted))
    return tilted - log_z, log_z


def kl_divergence(log_p: FLOATS, log_q: FLOATS) -> float:
    """KL(p || q), nats. Outcomes of probability 0 under p count nothing. Shapes: (Y,), (Y,) -> ()."""
    drawn = log_p > -np.inf
    return float((np.exp(log_p[drawn]) * (log_p[drawn] - log_q[drawn])).sum())


def expectation(log_p: FLOATS, values: FLOATS) -> float:
    """E_p[values]. Shapes: (Y,), (Y,) -> ()."""
    return float(np.exp(log_p) @ values)


# ---------------------------------------------------------------------- what no policy can beat, and best-of-n


@dataclass(frozen=True, eq=False)
class Frontier:
    """The best policies for a range of betas: the Pareto front of (KL, expected reward). No policy lies above it."""

    betas: FLOATS
    """Reward per nat. Shape: (K,)."""
    kl: FLOATS
    """KL(pi*_beta || ref), nats. Shape: (K,)."""
    reward: FLOATS
    """E[r] under pi*_beta. Shape: (K,)."""
    value: FLOATS
    """V*(beta) = reward - beta kl. Shape: (K,)."""

    def bound(self, kl: Any) -> Any:
        """What no policy of this KL can exceed in expected reward: `min_beta V*(beta) + beta kl`.

        True whatever the betas, and tight where they lie close. Any shape -> the same shape.
        """
        return (self.value + self.betas * np.asarray(kl, np.float64)[..., None]).min(axis=-1)


def frontier(log_ref: FLOATS, rewards: FLOATS, betas: Sequence[float] | FLOATS) -> Frontier:
    """The exact front at these betas. Shapes: (Y,), (Y,), (K,)."""
    betas = np.asarray(betas, np.float64)
    if betas.ndim != 1 or not len(betas) or not (np.isfinite(betas) & (betas > 0)).all():
        raise ValueError(f"Expected betas to be a list of positive numbers (reward per nat), got {betas!r}.")
    kl, reward, value = np.empty((3, len(betas)))
    for i, beta in enumerate(betas):
        log_p, log_z = tilt(log_ref, rewards, beta)
        kl[i], reward[i], value[i] = kl_divergence(log_p, log_ref), expectation(log_p, rewards), beta * log_z
    return Frontier(betas, kl, reward, value)


def best_of_n(log_p: FLOATS, rewards: FLOATS, n: int) -> FLOATS:
    """The distribution of the best of n independent samples; among equally good ones any is taken, at random.

    With F(y) the probability that a sample is at most as good as y, and F-(y) that it is worse, the best is one of y's
    equals with probability `F(y)^n - F-(y)^n`, and among equals all keep their proportions.

    Args:
        log_p: What is sampled from. Shape: (Y,).
        rewards: Shape: (Y,).
        n: Samples.

    Returns:
        Log-probabilities. Shape: (Y,).
    """
    if isinstance(n, bool) or not isinstance(n, int | np.integer) or n < 1:
        raise ValueError(f"Expected n to be a positive integer (samples), got {n!r}.")
    group, mass = _ranks(log_p, rewards)
    at_most = np.cumsum(mass)
    with np.errstate(divide="ignore", invalid="ignore"):
        # F^n - F-^n = F^n (1 - (1 - mass / F)^n), without the cancellation.
        share = np.minimum(mass / at_most, 1.0)
        gain = n * np.log(at_most) + np.log(-np.expm1(n * np.log1p(-share))) - np.log(mass)
    log_best = log_p + np.where(mass > 0, gain, 0.0)[group]
    return np.asarray(log_best - logsumexp(log_best))


def win_rate(log_p: FLOATS, log_q: FLOATS, rewards: FLOATS) -> float:
    """How often a sample of p is better than one of q, equals counting half. Shapes: (Y,), (Y,), (Y,) -> ()."""
    _, p = _ranks(log_p, rewards)
    _, q = _ranks(log_q, rewards)
    return float(p @ (np.cumsum(q) - q / 2))


def _ranks(log_p: FLOATS, rewards: FLOATS) -> tuple[INTS, FLOATS]:
    """The rank of each completion's reward, and the probability of each rank, the worst first. Shapes: (Y,), (R,)."""
    _, group = np.unique(rewards, return_inverse=True)
    return group, np.bincount(group, np.exp(log_p)).astype(np.float64)


# ---------------------------------------------------------------------- policies and their tables


def policy_table(policy: Any, observations: INTS, allowed: NDArray[np.bool_], batch_size: int = 1024) -> FLOATS:
    """A policy's log-probabilities at every prefix, in batches of one size (a cache may be made for each size).

    Args:
        policy: Has `log_probs(observations, actions)`, and possibly `log_probs_all(observations)`, which is then used.
        observations: Shape: (S, L).
        allowed: Tokens that may follow. The policy is not asked about others. Shape: (S, V).
        batch_size: The largest batch.

    Returns:
        `-inf` where a token is not allowed. Shape: (S, V).
    """
    table = np.full(allowed.shape, -np.inf)
    size = -(-len(observations) // -(-len(observations) // batch_size))
    for begin in range(0, len(observations), size):
        rows = np.arange(begin, begin + size) % len(observations)
        table[rows] = np.where(allowed[rows], _rows_of(policy, observations[rows], allowed[rows]), -np.inf)
    return table


def _rows_of(policy: Any, observations: INTS, allowed: NDArray[np.bool_]) -> FLOATS:
    if hasattr(policy, "log_probs_all"):
        return _checked(policy, "log_probs_all", policy.log_probs_all(observations.copy()), allowed.shape)
    columns = []
    for token in range(allowed.shape[1]):  # the same observations each time: after the first, a cache knows them
        actions = np.where(allowed[:, token], token, allowed.argmax(axis=1))
        column = policy.log_probs(observations.copy(), actions)
        columns.append(_checked(policy, "log_probs", column, actions.shape))
    return np.stack(columns, axis=1)


def _checked(policy: Any, method: str, values: Any, shape: tuple[int, ...]) -> FLOATS:
    array = np.asarray(values, np.float64)
    if array.shape != shape or np.isnan(array).any():
        fault = f"shape {array.shape}" if array.shape != shape else "nan"
        raise ValueError(
            f"Expected {type(policy).__name__}.{method} to return log-probabilities of shape {shape} without nan, got {fault}."
        )
    return array


class TabularPolicy:
    """A policy given by its distribution at every prefix. It acts, scores, and can be attached to an environment.

    Args:
        tree: The completions.
        table: Log-probabilities of every token at every prefix. Shape: (S, V).
        prompt_length: Tokens of an observation that stand before the response.
        seed: Of `predict`.
    """

    def __init__(self, tree: CompletionTree, table: FLOATS, prompt_length: int, seed: int | None = None) -> None:
        self.tree, self.table, self.prompt_length = tree, table, prompt_length
        self._rng = np.random.default_rng(seed)

    def log_probs_all(self, observations: INTS) -> FLOATS:
        """Log-probabilities of every token (uniform after a response's end, where actions are ignored). Shape: (N, L) -> (N, V)."""
        state = self.tree.at(np.asarray(observations)[:, self.prompt_length :])
        return np.where(state[:, None] >= 0, self.table[state], -np.log(self.tree.vocab_size))

    def log_probs(self, observations: INTS, actions: INTS) -> FLOATS:
        """Log-probabilities of `actions`, nats. Shapes: (N, L), (N,) -> (N,)."""
        return np.asarray(self.log_probs_all(observations)[np.arange(len(actions)), actions])

    def predict(
        self, observation: INTS, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[Any, Any]:
        """Tokens for observations, with stable-baselines3's signature. Shape: (N, L) -> (N,), or (L,) -> ()."""
        log_p = self.log_probs_all(np.atleast_2d(observation))
        if not deterministic:
            log_p = log_p + self._rng.gumbel(size=log_p.shape)  # the greatest of these is a sample
        actions = log_p.argmax(axis=1)
        return (actions if np.ndim(observation) == 2 else actions[0]), state
