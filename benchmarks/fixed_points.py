"""Where agents come to rest whose objective is not J = E[r] - beta KL, by enumeration.

On the exact tasks the resting points can be listed like everything else, so it can be told apart whether an agent falls short of
the optimum or tends to something else. All are for a policy that is a table (no two states share a parameter).

Run: python -m benchmarks.fixed_points
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from textenv.exact import CompletionTree, best_of_n, logsumexp

FLOATS = NDArray[np.float64]


def grpo(tree: CompletionTree, log_ref: FLOATS, rewards: FLOATS, beta: float, iterations: int = 200) -> FLOATS:
    """GRPO's fixed point with large groups: advantages scaled by the deviation, mean over tokens, k3 in the loss.

    With A = (r - mean r) / std r and w = 1 / length of a completion, a step on the logits of state s moves pi(a|s) by

        pi(a|s) (m(s, a) - beta n(s, a) (1 - ref(a|s) / pi(a|s)) - C(s)),   m = E[w A | s, a],  n = E[w | s, a],

    C(s) the mean of the rest under pi. It vanishes where `pi(a|s) = ref(a|s) beta n / (C + beta n - m)`, C such that these sum to
    1. (Where all completions have one length: `ref(a|s) / (1 - (A(s, a) - A(s)) / beta)`, A(s, a) = E[A | s, a].)

    Args:
        tree: The completions.
        log_ref: The reference, token by token. Shape: (S, V).
        rewards: Shape: (Y,).
        beta: Of the KL, advantage per nat.
        iterations: Of the damped iteration that finds it.

    Returns:
        Log-probabilities of completions. Shape: (Y,).
    """
    weight = 1 / (tree.leaves < tree.vocab_size).sum(axis=1)
    allowed = tree.allowed
    log_pi = log_ref
    for _ in range(iterations):
        p = np.exp(tree.sum_along(log_pi))
        mean = p @ rewards
        advantages = (rewards - mean) / np.sqrt(p @ (rewards - mean) ** 2)
        below = np.maximum(sum_below(tree, p), 1e-300)
        m, n = (sum_below(tree, p * weight * x) / below for x in (advantages, np.ones_like(p)))
        pull = np.where(allowed, beta * n, 0.0)
        least = np.where(allowed, m - pull, -np.inf).max(axis=1, keepdims=True)
        low, high = (
            least,
            least + pull.max(axis=1, keepdims=True) * 2 + 1e-9,
        )  # C: the sum falls from infinity to below 1
        for _ in range(45):
            middle = (low + high) / 2
            total = (np.exp(log_ref) * pull / np.where(allowed, middle + pull - m, np.inf)).sum(axis=1, keepdims=True)
            low, high = np.where(total > 1, middle, low), np.where(total > 1, high, middle)
        with np.errstate(divide="ignore"):
            target = log_ref + np.log(pull / np.where(allowed, high + pull - m, 1.0))
        log_pi = np.where(allowed, 0.8 * log_pi + 0.2 * target, -np.inf)
        log_pi = log_pi - logsumexp(log_pi)[:, None]
    return tree.sum_along(log_pi)


def ilql(
    tree: CompletionTree, log_ref: FLOATS, rewards: FLOATS, beta: float, expectile: float = 0.7, cql_coef: float = 0.1
) -> FLOATS:
    """ILQL's fixed point, its data being the reference's and its advantages weighing 1 / beta.

    From the longest prefixes backward, with Q' the reward or the V of the next state: 2 ref(a|s) (Q - Q') + cql_coef (softmax(Q) -
    ref) = 0 for each action (the squared error and the conservative term), and V is the expectile of Q over ref. It acts by
    `ref exp((Q - V) / beta)`, normalised.

    Returns:
        Log-probabilities of completions. Shape: (Y,).
    """
    value, log_pi = np.zeros(len(log_ref)), np.empty_like(log_ref)
    for level in reversed(tree.levels):
        ref, child, leaf = np.exp(log_ref[level]), tree.child[level], tree.leaf[level]
        target = np.where(child >= 0, value[child], np.where(leaf >= 0, rewards[leaf], 0.0))
        q = target.copy()
        for _ in range(2_000 if cql_coef else 0):
            softmax = np.exp(q - logsumexp(q)[:, None])
            q -= 0.5 * (ref * (q - target) + cql_coef / 2 * (softmax - ref)) / (ref + cql_coef / 2 * softmax)
        v = (ref * q).sum(axis=1, keepdims=True)
        for _ in range(200):
            w = ref * np.where(q > v, expectile, 1 - expectile)
            v = (w * q).sum(axis=1, keepdims=True) / w.sum(axis=1, keepdims=True)
        value[level] = v[:, 0]
        log_pi[level] = log_ref[level] + (q - v) / beta
    return tree.sum_along(log_pi - logsumexp(log_pi)[:, None])


def nucleus_of(tree: CompletionTree, log_pi: FLOATS, top_p: float) -> NDArray[np.bool_]:
    """Which completions consist of tokens of the nucleus of their state. Shapes: (S, V) -> (Y,)."""
    order = np.argsort(-log_pi, axis=1)
    p = np.exp(np.take_along_axis(log_pi, order, axis=1))
    inside = np.empty(log_pi.shape, bool)
    np.put_along_axis(inside, order, p.cumsum(axis=1) - p < top_p, axis=1)
    return np.isfinite(tree.sum_along(np.where(inside, 0.0, -np.inf)))


def sum_below(tree: CompletionTree, values: FLOATS) -> FLOATS:
    """Sum over the completions that go through each state and token. Shape: (Y,) -> (S, V)."""
    steps = tree.paths >= 0
    cells, weights = tree.paths[steps], np.broadcast_to(values[:, None], tree.paths.shape)[steps]
    sums: FLOATS = np.asarray(np.bincount(cells, weights, minlength=tree.child.size), np.float64)
    return sums.reshape(tree.child.shape)


def scores(structure: str, seed_of_task: int) -> dict[str, float]:
    """The exact score of each resting point, by the name of its preset."""
    import gymnasium as gym

    import textenv  # noqa: F401  # registers the ids
    from benchmarks.suites import PRESETS
    from textenv.tasks.tree import reference_table

    lanes: Any = gym.make_vec("textenv/Tree-v0", num_envs=1, structure=structure, seed_of_task=seed_of_task).unwrapped
    solution, leaves, beta = lanes.solve(), lanes.leaves, lanes.kl.beta
    tree, log_ref = solution.policy.tree, reference_table(lanes.task, solution.policy.tree, lanes.behaviour)
    best = leaves.rewards.argmax()
    alone = np.where(np.arange(len(leaves.rewards)) == best, 0.0, -np.inf)
    inside = nucleus_of(tree, solution.policy.table, PRESETS["NLPO"].config.get("mask_top_p", 0.9))
    kept = np.where(inside, tree.sum_along(solution.policy.table), -np.inf)
    settings = {name: value for name, value in PRESETS["ILQL"].config.items() if name in ("expectile", "cql_coef")}
    points = {
        "GRPO": grpo(tree, log_ref, leaves.rewards, beta),
        "GRPO-dapo, GRPO-gspo": alone,
        "NLPO": kept - logsumexp(kept),
        "ILQL": ilql(tree, log_ref, leaves.rewards, beta, **settings),
        "BestOfN": best_of_n(leaves.log_ref, leaves.rewards, PRESETS["BestOfN"].config["n"]),
    }
    return {name: lanes.evaluate(point).score for name, point in points.items()}


def main(first_task_seed: int = 1000, tasks: int = 10) -> None:
    """Print the table: medians over tasks."""
    from benchmarks.suites import STRUCTURES

    table = {s: [scores(s, first_task_seed + i) for i in range(tasks)] for s in STRUCTURES}
    print(f"| agent | {' | '.join(table)} |\n|{'---|' * (1 + len(table))}")
    for name in table[STRUCTURES[0]][0]:
        print(
            f"| {name} | "
            + " | ".join(f"{np.median([row[name] for row in rows]):.3f}" for rows in table.values())
            + " |"
        )


if __name__ == "__main__":
    import tyro

    tyro.cli(main)
