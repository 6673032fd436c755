"""The checks of `agents.testing.check_agent`, one function each, and what they are made of.

A check runs the agent on a small tree of completions, and says of each fault what was expected, what was seen, and the remedy.
They run in the order of `CHECKS`, at the end; a new one is a function of a `Suite` and a line there.
"""

from __future__ import annotations

import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

import textenv  # noqa: F401  # registers the ids
from agents.rollout import run_prompts
from textenv.exact import logsumexp
from textenv.tasks.tree import Evaluation, TreeVectorEnv
from textenv.wrappers import VectorTimeLimit

LANES = 32
SMALL = {"vocab_size": 3, "horizon": 3}
"""15 completions: small enough that every check is a matter of seconds."""
PLAYED = 2048
"""Episodes by which `predict` is compared with what the agent says of its distribution."""
SAMPLES = 16
"""Tokens drawn in each state to tell two agents apart."""
MAX_KL_DRIFT = 0.1
"""Nats per episode that a policy may move by where all completions are worth the same: noise, not learning."""


@dataclass(frozen=True)
class Failure:
    """One thing that an agent gets wrong."""

    check: str
    """The check's name, as `skip` takes it."""
    expected: str
    seen: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.check}\n    expected  {self.expected}\n    seen      {self.seen}\n    remedy    {self.remedy}"


@dataclass(frozen=True)
class ExactResult:
    """What training has done on one task, exactly."""

    structure: str
    """The task's reward structure."""
    timesteps: int
    """Tokens trained for."""
    before: Evaluation
    """The untrained agent."""
    after: Evaluation
    """The trained one."""


@dataclass
class Suite:
    """One agent under examination: how it is made, what has been found, and what the checks are made of."""

    make: Callable[..., Any]
    """The class, or a function that makes an agent."""
    config: Mapping[str, Any]
    env_kwargs: Mapping[str, Any]
    seed: int
    tolerance: float
    structures: Sequence[str]
    timesteps: int
    min_gain: float
    max_rollout: int
    name: str = ""
    """The agent's, once one has been made."""
    failures: list[Failure] = field(default_factory=list)
    results: list[ExactResult] = field(default_factory=list)
    hopeless: bool = False
    """No further check could say anything."""
    rollout: int = 0
    """Tokens of the first rollout, once `budget` has measured it."""
    check: str = ""
    """The one that is running."""

    def __post_init__(self) -> None:
        self.name = getattr(self.make, "__name__", type(self.make).__name__)

    def run(self, name: str, check: Callable[[Suite], None]) -> None:
        """One check, whatever happens in it."""
        self.check = name
        try:
            check(self)
        except EndlessError as error:
            self.hopeless, self.check = True, "budget"
            self.fail(
                "learn(total_timesteps) to end soon after so many environment tokens",
                str(error),
                "add to `num_timesteps` the tokens of every env.step, and stop when it has reached the target",
            )
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            place = next((f for f in reversed(frames) if "site-packages" not in f.filename), frames[-1])
            self.fail(
                f"no exception ({_purpose(check)})",
                f"{type(error).__name__}: {error} (at {Path(place.filename).name}:{place.lineno}, in {place.name})",
                "make the agent work here; run it by hand on the same environment to see the whole traceback",
            )

    def expect(self, condition: Any, expected: str, seen: str, remedy: str) -> bool:
        """Note a failure unless the condition holds."""
        if not condition:
            self.fail(expected, seen, remedy)
        return bool(condition)

    def fail(self, expected: str, seen: str, remedy: str) -> None:
        """Note a failure."""
        self.failures.append(Failure(self.check, expected, seen, remedy))

    # ------------------------------------------------------------------ what the checks are made of

    def env(self, **kwargs: Any) -> TreeVectorEnv:
        """A small tree that does not let itself be stepped for ever."""
        env: Any = gym.make_vec("textenv/Tree-v0", num_envs=LANES, **(SMALL | dict(self.env_kwargs) | kwargs))
        step, taken = env.step, 0

        def guarded(actions: Any) -> Any:
            nonlocal taken
            taken += LANES
            if taken > 2 * env.allowance + self.max_rollout:
                raise EndlessError(f"{taken} actions after it was asked for {env.allowance} tokens it still goes on")
            return step(actions)

        env.allowance, env.step = 0, guarded
        return env

    def agent(self, env: Any, seed: int | None = None) -> Any:
        """A new agent."""
        return self.make(env, seed=self.seed if seed is None else seed, **self.config)

    def learn(self, agent: Any, env: Any, tokens: int) -> Any:
        """Train, and let the environment know for how long."""
        env.unwrapped.allowance += tokens
        return agent.learn(total_timesteps=tokens)

    def load(self, agent: Any, path: Path, env: Any) -> Any:
        """What `agent` has saved."""
        loader = self.make if hasattr(self.make, "load") else type(agent)
        return loader.load(path, env)

    def budget(self) -> int:
        """Tokens of training for checks of the contract: about two rollouts."""
        return 2 * max(self.rollout, 100)

    def states(self, env: Any) -> NDArray[np.int64]:
        """Every observation in which a token is chosen. Shape: (S, L)."""
        prefixes, prompt = env.unwrapped.solve().policy.tree.prefixes, env.unwrapped.task.prompts.token_ids[0]
        return np.hstack([np.broadcast_to(prompt, (len(prefixes), len(prompt))), prefixes])

    def traces(self, agent: Any, env: Any, sampled: bool = True) -> dict[str, NDArray[Any]]:
        """What tells two agents apart."""
        states = self.states(env)
        found = {"its most probable tokens": np.asarray(agent.predict(states, deterministic=True)[0])}
        if sampled:
            several = np.repeat(states, SAMPLES, axis=0)
            found["the tokens that predict samples"] = np.asarray(agent.predict(several)[0])
        log_p = _stated_log_probs(agent, env.unwrapped)
        if log_p is not None:
            found["the log-probabilities of completions"] = log_p
        return found

    def difference(self, first: dict[str, NDArray[Any]], second: dict[str, NDArray[Any]]) -> str | None:
        """What differs between two agents' traces, in words."""
        for name in reversed(first):
            a, b = first[name], second[name]
            if np.issubdtype(a.dtype, np.floating):
                gap = np.abs(np.where(a == b, 0.0, a - b)).max()  # two -inf are equal
                if not gap <= self.tolerance:
                    return f"{name} differ by up to {gap:.3g} nats"
            elif (a != b).any():
                return f"{name} differ in {(a != b).mean():.0%} of the states"
        return None

    def evaluate(self, agent: Any, env: Any) -> Evaluation:
        """Exactly, or by the frequencies of completions where the agent states no probabilities."""
        lanes = env.unwrapped
        log_p = _stated_log_probs(agent, lanes)
        if log_p is None:
            with np.errstate(divide="ignore"):
                log_p = np.log(self.frequencies(agent, lanes))
        return lanes.evaluate(log_p)

    def frequencies(self, agent: Any, env: Any) -> NDArray[np.float64]:
        """How often `predict` writes each completion. Shape: (Y,)."""
        alone = {name: value for name, value in self.env_kwargs.items() if name not in ("group_size", "beta")}
        same = {"reward": env.task.reward, "beta": 0.0}  # the same prompt and reward, no KL to pay
        tree: Any = gym.make_vec("textenv/Tree-v0", num_envs=256, **(SMALL | alone | same))
        episodes = run_prompts(agent, tree.unwrapped, np.zeros(PLAYED, np.int64))
        texts = tree.unwrapped.completions(episodes)
        place = {text: i for i, text in enumerate(_names(env))}
        stopped = episodes.finish_reason == "stop"
        found = [place[text, bool(stop)] for text, stop in zip(texts, stopped, strict=True)]
        return np.bincount(found, minlength=len(place)) / PLAYED


def _check_verbs(suite: Suite) -> None:
    """It can be made, and has the verbs of stable-baselines3."""
    env = suite.env()
    try:
        agent = suite.agent(env)
    except Exception:
        suite.hopeless = True
        raise
    suite.name = type(agent).__name__
    missing = [verb for verb in ("learn", "predict", "save") if not callable(getattr(agent, verb, None))]
    if not (hasattr(suite.make, "load") or hasattr(type(agent), "load")):
        missing.append("load")
    if missing:
        suite.hopeless = True
        suite.fail("learn, predict, save and load", f"no {', '.join(missing)}", "add them, with SB3's signatures")
        return
    suite.expect(
        isinstance(getattr(agent, "num_timesteps", None), int | np.integer),
        "`num_timesteps`, an int: the tokens so far",
        f"{getattr(agent, 'num_timesteps', 'nothing')!r}",
        "keep it as an attribute; callbacks, logs and harnesses go by it",
    )
    returned = suite.learn(agent, env, 1)
    suite.expect(returned is agent, "learn() to return the agent", f"{returned!r}", "end it with `return self`")
    states = suite.states(env)
    for deterministic in (False, True):
        result = agent.predict(states, state="given", episode_start=None, deterministic=deterministic)
        if not suite.expect(
            isinstance(result, tuple) and len(result) == 2,
            "predict() to return actions and state",
            f"{type(result).__name__}",
            "return (actions, state)",
        ):
            return
        actions = np.asarray(result[0])
        suite.expect(
            actions.shape == (len(states),) and np.issubdtype(actions.dtype, np.integer),
            f"predict() to return one integer per observation, shape ({len(states)},)",
            f"{actions.dtype} of shape {actions.shape}",
            "choose one token for each row",
        )
        suite.expect(
            bool(((actions >= 0) & (actions < env.vocab_size)).all()),
            f"token ids from 0 to {env.vocab_size - 1}",
            f"{np.min(actions)} to {np.max(actions)}",
            "the padding id V = vocab_size is no action",
        )
    one = agent.predict(states[0], deterministic=True)[0]
    suite.expect(
        np.shape(one) == (),
        "one action for one observation (L,)",
        f"shape {np.shape(one)}",
        "add and drop the batch axis",
    )
    first, second = (agent.predict(states, deterministic=True)[0] for _ in range(2))
    suite.expect(
        bool((np.asarray(first) == np.asarray(second)).all()),
        "predict(deterministic=True) to repeat itself",
        "other tokens for the same observations",
        "take the most probable token, without drawing",
    )


def _check_budget(suite: Suite) -> None:
    """The budget is in environment tokens."""
    env = suite.env()
    agent = suite.agent(env)
    suite.learn(agent, env, 1)
    suite.rollout = one = int(agent.num_timesteps)
    total = 3 * max(one, 1)
    env = suite.env()
    agent = suite.agent(env)
    suite.learn(agent, env, total)
    seen = env.get_state()["steps"]
    suite.expect(
        agent.num_timesteps == seen,
        f"num_timesteps to be the tokens that the environment has seen, {seen}",
        f"{agent.num_timesteps}",
        "count each token of each lane once: idle lanes and resets take none (NEXT_STEP), and so does writing outside of learn",
    )
    suite.expect(
        total <= seen <= total + 2 * one,
        f"learn({total}) to take {total} tokens or up to a rollout more (the first had {one})",
        f"{seen}",
        "test the budget before each rollout, and finish the rollout that reaches it",
    )


def _check_kl(suite: Suite) -> None:
    """The KL is counted once."""
    env = suite.env()
    agent = suite.agent(env)
    placement = getattr(agent, "kl_placement", None)
    if placement is None:
        return
    suite.learn(agent, env, 1)
    suite.expect(
        env.kl.policy is not None and env.kl.pay == (placement == "reward"),
        f"an attached policy, with pay={placement == 'reward'}, for kl_placement={placement!r}",
        "no policy attached" if env.kl.policy is None else f"pay={env.kl.pay}",
        "env.unwrapped.attach_policy(policy, pay=self.kl_placement == 'reward')",
    )


def _check_seeds(suite: Suite) -> None:
    """A run is a function of its seed."""

    def trained(seed: int) -> dict[str, NDArray[Any]]:
        env = suite.env()
        agent = suite.agent(env, seed)
        suite.learn(agent, env, suite.budget())
        return suite.traces(agent, env)

    first, again, other = trained(suite.seed), trained(suite.seed), trained(suite.seed + 1)
    if difference := suite.difference(first, again):
        suite.fail(
            f"two runs with seed {suite.seed} to end alike",
            difference,
            "draw everything (weights of new heads, samples, minibatches) from generators made from `seed`, and seed the environment "
            "with it: env.reset(seed=seed)",
        )
    suite.expect(
        suite.difference(first, other) is not None,
        f"seeds {suite.seed} and {suite.seed + 1} to give different runs",
        "the same policy and the same samples",
        "use the seed that is passed, not a constant",
    )


def _check_resume(suite: Suite) -> None:
    """Saving and loading lose nothing."""
    n = suite.budget()
    env = suite.env()
    agent = suite.agent(env)
    suite.learn(agent, env, n)
    with tempfile.TemporaryDirectory() as folder:
        agent.save(Path(folder) / "agent")
        other_env = suite.env()
        loaded = suite.load(agent, Path(folder) / "agent", other_env)
    difference = suite.difference(suite.traces(agent, env, False), suite.traces(loaded, other_env, False))
    suite.expect(
        difference is None and loaded.num_timesteps == agent.num_timesteps,
        "load() to give back the agent that was saved",
        difference or f"num_timesteps {loaded.num_timesteps} instead of {agent.num_timesteps}",
        "save all weights that predict depends on, heads included, and the counts",
    )
    suite.learn(agent, env, n)
    suite.learn(loaded, other_env, n)
    difference = suite.difference(suite.traces(agent, env, False), suite.traces(loaded, other_env, False))
    suite.expect(
        difference is None and loaded.num_timesteps == agent.num_timesteps,
        f"{n} tokens, save, load and {n} tokens to be the same as without saving and loading",
        difference or f"num_timesteps {loaded.num_timesteps} instead of {agent.num_timesteps}",
        "save the optimiser's state, the generators, the environment's get_state(), and whatever else updates depend on (baselines, data, "
        "the learning rate's schedule)",
    )


def _check_predict(suite: Suite) -> None:
    """What acts is what is scored."""
    env = suite.env()
    agent = suite.agent(env)
    suite.learn(agent, env, suite.budget())
    log_p = _stated_log_probs(agent, env)
    if log_p is None:
        return
    p, seen = np.exp(log_p), suite.frequencies(agent, env) * PLAYED
    likely = PLAYED * p >= 5
    # Pearson's chi-square; the unlikely completions are one cell. Normal at 5 sigma or beyond: once in a million runs.
    cells = [(seen[likely], PLAYED * p[likely]), (seen[~likely].sum()[None], PLAYED * p[~likely].sum()[None])]
    chi = sum(float(((a - b) ** 2 / np.maximum(b, 1.0)).sum()) for a, b in cells)
    degrees = int(likely.sum())
    worst = np.abs(seen / PLAYED - p).argmax()
    suite.expect(
        chi <= degrees + 6 * np.sqrt(2 * degrees) + 12,
        "predict() to draw completions as often as the policy's log_probs say",
        f"{env.leaves.texts[worst]!r} in {seen[worst] / PLAYED:.1%} of {PLAYED} episodes, stated probability {p[worst]:.1%}",
        "sample and score one distribution: the same temperature, truncation and masks, dropout off",
    )


def _check_one_token(suite: Suite) -> None:
    """Episodes of one token."""
    env = suite.env(horizon=1)
    agent = suite.agent(env)
    suite.learn(agent, env, suite.budget())
    _expect_finite(suite, agent, env)


def _check_equal_rewards(suite: Suite) -> None:
    """All completions are worth the same."""
    env = suite.env(reward=_constant)
    agent = suite.agent(env)
    before = suite.evaluate(agent, env).kl
    suite.learn(agent, env, 4 * suite.budget())
    if _expect_finite(suite, agent, env):
        after = suite.evaluate(agent, env).kl
        suite.expect(
            after <= before + MAX_KL_DRIFT,
            f"a policy that stays where it is, up to {MAX_KL_DRIFT} nats, where there is nothing to prefer",
            f"KL to the reference {before:.3f} before and {after:.3f} nats after",
            "subtract a baseline; leave out groups of equals; and do not divide by a standard deviation of 0",
        )


def _check_cut(suite: Suite) -> None:
    """A wrapper truncates episodes."""
    env = VectorTimeLimit(suite.env(), SMALL["horizon"] - 1)
    agent = suite.agent(env)
    suite.learn(agent, env, suite.budget())
    _expect_finite(suite, agent, env)
    suite.expect(
        agent.num_timesteps >= suite.budget(),
        f"learn({suite.budget()}) to use its budget under a wrapper too",
        f"num_timesteps {agent.num_timesteps}",
        "wrapped environments are stepped without a ledger: count their tokens as well",
    )


def _check_learning(suite: Suite) -> None:
    """It learns, by exact figures."""
    for structure in suite.structures:
        env = suite.env(structure=structure)
        agent = suite.agent(env)
        before = suite.evaluate(agent, env)
        suite.learn(agent, env, suite.timesteps)
        if not _expect_finite(suite, agent, env):
            continue
        after = suite.evaluate(agent, env)
        suite.results.append(ExactResult(structure, int(agent.num_timesteps), before, after))
        suite.expect(
            after.score <= 1 + 1e-6,
            "a score of at most 1: no policy is better than the optimum",
            f"{after.score:.6f} on {structure!r}",
            "log_probs must sum to 1 over all tokens, in every state",
        )
        optimizers = getattr(agent, "optimizers", None)
        if callable(optimizers) and not optimizers():
            continue
        paid = env.kl.policy is not None and env.kl.pay
        top = float(env.leaves.rewards.max())
        gain = after.score - before.score if paid else (after.reward - before.reward) / (top - before.reward)
        figure = (
            f"score {before.score:.3f} -> {after.score:.3f}"
            if paid
            else f"reward {before.reward:.3f} -> {after.reward:.3f} of {top:.3f}"
        )
        suite.expect(
            gain >= suite.min_gain,
            f"to come at least {suite.min_gain:.0%} of the way to the {'optimum' if paid else 'best completion'} in {suite.timesteps} tokens "
            f"on {structure!r}",
            figure,
            "look at the sign of the loss, at the learning rate, and at whether the reward lands on the last token",
        )


CHECKS: dict[str, Callable[[Suite], None]] = {
    "verbs": _check_verbs,
    "budget": _check_budget,
    "kl": _check_kl,
    "seeds": _check_seeds,
    "resume": _check_resume,
    "predict": _check_predict,
    "one_token": _check_one_token,
    "equal_rewards": _check_equal_rewards,
    "cut": _check_cut,
    "learning": _check_learning,
}
"""Name -> check, in the order in which they run."""


# ---------------------------------------------------------------------- tools


class EndlessError(Exception):
    """The agent does not stop."""


def _constant(completions: Sequence[str], **columns: Any) -> list[float]:
    """A reward that prefers nothing."""
    return [1.0] * len(completions)


def _purpose(check: Callable[..., Any]) -> str:
    return (check.__doc__ or "").strip().rstrip(".").lower()


def _names(env: Any) -> list[tuple[str, bool]]:
    """Each completion's text, and whether it stopped: without its stop token one at the budget's end reads like a shorter one."""
    stops: NDArray[np.bool_] = np.isin(env.leaves.tokens, env.task.stop_tokens)
    return [(text, bool(row.any())) for text, row in zip(env.leaves.texts, stops, strict=True)]


def _stated_log_probs(agent: Any, env: Any) -> NDArray[np.float64] | None:
    """The agent's own account of its distribution, summed over tokens. Shape: (Y,); None if it gives none."""
    if hasattr(agent, "completion_log_probs"):
        return np.asarray(agent.completion_log_probs(), np.float64)
    policy: Any = getattr(agent, "policy", None)
    if not hasattr(policy, "log_probs"):
        return None
    prompt, leaves = env.task.prompts.token_ids[0], env.leaves
    total = np.zeros(len(leaves.tokens))
    for t in range(leaves.tokens.shape[1]):
        alive = np.flatnonzero(leaves.tokens[:, t] < env.vocab_size)
        rows = np.full((len(alive), env.max_tokens), env.vocab_size, np.int64)
        rows[:, : len(prompt)] = prompt
        rows[:, len(prompt) : len(prompt) + t] = leaves.tokens[alive, :t]
        total[alive] += np.asarray(policy.log_probs(rows, leaves.tokens[alive, t]), np.float64)
    return total


def _expect_finite(suite: Suite, agent: Any, env: Any) -> bool:
    """Whether the policy is a distribution, and its log has no nan."""
    log_p = _stated_log_probs(agent, env.unwrapped)
    sound = log_p is None or (not np.isnan(log_p).any() and abs(np.exp(logsumexp(log_p)) - 1) < 1e-3)
    figures = getattr(agent, "history", None) or [{}]
    bad = [name for name, value in figures[-1].items() if isinstance(value, float) and np.isnan(value)]
    suite.expect(
        not bad,
        "figures without nan in the log",
        f"nan in {', '.join(bad)}",
        "leave out what does not apply, and guard divisions",
    )
    return suite.expect(
        sound,
        "a policy whose probabilities are numbers and sum to 1",
        "nan"
        if log_p is not None and np.isnan(log_p).any()
        else f"a sum of {np.exp(logsumexp(log_p)) if log_p is not None else 0:.4f}",
        "look for 0 / 0 in advantages (a standard deviation of 0, an empty mask) and for steps that are too long; refuse gradients that "
        "are not finite",
    )
