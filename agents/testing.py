"""A checker for agents, ours and yours, to call from your own tests.

It runs an agent on tasks whose optimum is known (`textenv/Tree-v0`), so that "it learns" is a measured number, and on the cases
that break agents: a one-token episode, rewards that are all equal, episodes that a wrapper cuts off. The checks themselves are in
`agents/checks.py`.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agents.checks import CHECKS, ExactResult, Failure, Suite
from textenv.prompts import did_you_mean

__all__ = ["CHECKS", "AgentCheck", "AgentCheckError", "ExactResult", "Failure", "check_agent"]

GROUP = 4
"""`group_size` for agents that need groups."""


class AgentCheckError(AssertionError):
    """An agent breaks the contract. `failures` has every fault that was found."""

    def __init__(self, agent: str, failures: Sequence[Failure], checks: int) -> None:
        self.failures = tuple(failures)
        names = list(dict.fromkeys(failure.check for failure in failures))
        listed = "\n".join(str(failure) for failure in failures)
        super().__init__(f"{agent} fails {len(names)} of {checks} checks: {', '.join(names)}.\n{listed}")


@dataclass(frozen=True)
class AgentCheck:
    """What `check_agent` found: the agent keeps the contract, and this is how well it did."""

    agent: str
    """Its name."""
    passed: tuple[str, ...]
    """The checks."""
    results: tuple[ExactResult, ...]
    """One for each task."""
    seconds: float
    """Wall-clock time of all checks."""

    def __str__(self) -> str:
        lines = [
            f"{self.agent}: {len(self.passed)} checks passed in {self.seconds:.0f} s: {', '.join(self.passed)}",
            "task         tokens   score (1: optimum)    regret           reward           KL, nats",
        ]
        for result in self.results:
            a, b = result.before, result.after
            start = round(a.score, 3) + 0.0  # not -0.000
            lines.append(
                f"{result.structure:<12} {result.timesteps:>6}   {start:>7.3f} -> {b.score:<7.3f}   {a.regret:>6.3f} -> {b.regret:<6.3f} "
                f" {a.reward:>5.2f} -> {b.reward:<5.2f}   {a.kl:>5.2f} -> {b.kl:<5.2f}"
            )
        return "\n".join(lines)


def check_agent(
    agent_class: Callable[..., Any],
    *,
    structures: Sequence[str] = ("random", "trap"),
    timesteps: int = 6_000,
    min_gain: float = 0.1,
    max_rollout: int = 20_000,
    seed: int = 0,
    tolerance: float = 1e-6,
    skip: Collection[str] = (),
    env_kwargs: Mapping[str, Any] | None = None,
    **config: Any,
) -> AgentCheck:
    """Check that an agent keeps the contract of agents, and measure what it learns where the optimum is known.

    An agent is anything with stable-baselines3's verbs: `agent_class(env, seed=..., **config)`, `learn(total_timesteps)`,
    `predict(observation, state, episode_start, deterministic)`, `save(path)`, and `load(path, env)` on the class. With a
    `policy` that has `log_probs`, or with `completion_log_probs()`, its distribution is summed over all completions;
    without, it is estimated from 2,048 episodes of `predict`. The checks, by the names that `skip` takes:

    - `verbs`: the verbs are there; `learn` returns the agent, `predict` valid tokens for (N, L) and (L,), and `state`;
    - `budget`: `num_timesteps` counts every token the environment saw, reaches the budget, and ends within a rollout of it;
    - `kl`: the environment pays the KL penalty if and only if `kl_placement` is `"reward"`;
    - `seeds`: the same seed gives the same run, another seed another one;
    - `resume`: `load` gives back what was saved, and it goes on learning as the agent that was saved does;
    - `predict`: what `predict` draws has the probabilities that the policy states;
    - `one_token`: episodes of one token;
    - `equal_rewards`: where all completions are worth the same (groups too), the policy stays where it is, up to 0.1 nats;
    - `cut`: episodes that a wrapper truncates;
    - `learning`: with the KL paid in the reward the exact score rises by `min_gain` of the way to the optimum; without,
      expected reward by that share of the way to the best completion. An agent without optimisers need not rise.

    Args:
        agent_class: The class, or a function that makes an agent.
        structures: Of `textenv/Tree-v0`, for `learning`.
        timesteps: Tokens of training on each, for `learning`.
        min_gain: Share of the way to the top.
        max_rollout: Tokens by which `learn` may overrun its budget before it is taken to run for ever, and stopped.
        seed: Of agents.
        tolerance: Largest difference of log-probabilities (nats) that counts as equal; 0 demands the same bits.
        skip: Names of checks to leave out.
        env_kwargs: Further keywords of the environments. An agent that says `needs_groups` gets `group_size=4` without asking.
        config: Passed to the agent.

    Returns:
        Scores before and after; print it.

    Raises:
        AgentCheckError: With every fault: what was expected, what was seen, and the remedy.

    Example:
        >>> print(check_agent(PPO, minibatch_episodes=64))
        >>> check_agent(lambda env, seed: MyAgent(env, seed), skip=["resume"])
    """
    unknown = [name for name in skip if name not in CHECKS]
    if unknown:
        hint = did_you_mean(unknown[0], list(CHECKS))
        raise ValueError(f"No check is called {unknown[0]!r}; expected some of {list(CHECKS)}.{hint}")
    started = time.perf_counter()
    groups = {"group_size": GROUP} if getattr(agent_class, "needs_groups", False) else {}
    suite = Suite(
        make=agent_class, config=config, env_kwargs=groups | dict(env_kwargs or {}), seed=seed, tolerance=tolerance,
        structures=structures, timesteps=timesteps, min_gain=min_gain, max_rollout=max_rollout,
    )  # fmt: skip
    wanted = {name: check for name, check in CHECKS.items() if name not in skip}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*The KL penalty")  # an agent may be judged without its policy
        for name, check in wanted.items():
            suite.run(name, check)
            if suite.hopeless:
                break
    if suite.failures:
        raise AgentCheckError(suite.name, suite.failures, len(wanted))
    return AgentCheck(suite.name, tuple(wanted), tuple(suite.results), time.perf_counter() - started)
