"""Collecting episodes: the plain Gym loop, in the deferred lane where possible."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from agents.policy import Policy
from textenv.env import TextVectorEnv
from textenv.ledger import Episodes


class Predictor(Protocol):
    """Anything with stable-baselines3's `predict`."""

    def predict(
        self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[Any, Any]:
        """Actions for observations."""
        ...


class StopTraining(Exception):  # not an error: a callback has asked for it
    """A callback returned False."""


def collect(
    env: gym.vector.VectorEnv[Any, Any, Any],
    policy: Policy,
    episodes: int,
    rng: np.random.Generator,
    on_step: Callable[[int], None] = lambda tokens: None,
) -> Episodes:
    """Run until `episodes` episodes have been started and finished.

    Args:
        env: A textenv vector environment. Bare, it is used through the deferred lane (reward model and reference score all
            episodes at the end, in one batch each); under wrappers, which may change rewards, through the step lane.
        policy: Acts.
        episodes: B.
        rng: For sampling.
        on_step: Called after each `env.step` with the number of tokens it took; may raise `StopTraining`.

    Returns:
        B episodes, in order of start.
    """
    if env is not env.unwrapped:
        return _collect_stepwise(env, policy, episodes, rng, on_step)
    lanes: TextVectorEnv = env.unwrapped  # type: ignore[assignment]
    with lanes.deferred(episodes=episodes) as ledger:
        observations, _ = env.reset()
        while not ledger.done:
            busy = ledger.index >= 0
            actions, _ = policy.act(observations, rng, busy=busy)
            observations, *_ = env.step(actions)
            on_step(int(busy.sum()))
    return ledger.episodes


def run_prompts(
    agent: Predictor, env: TextVectorEnv, prompt_ids: NDArray[np.int64], deterministic: bool = False
) -> Episodes:
    """One episode from each of these prompts, by any agent with `predict`.

    Args:
        agent: Ours, stable-baselines3's, or any other.
        env: Its lanes are used in turn. Whose KL the episodes report is whose policy is attached.
        prompt_ids: Rows of the environment's prompts. Shape: (B,).
        deterministic: Passed to `predict`.

    Returns:
        The episodes, in the order of `prompt_ids`.
    """
    parts = []
    for begin in range(0, len(prompt_ids), env.num_envs):
        batch = prompt_ids[begin : begin + env.num_envs]
        observations, _ = env.reset(options={"prompt_id": np.resize(batch, env.num_envs)})
        with env.deferred(episodes=len(batch)) as ledger:
            while not ledger.done:
                actions, _ = agent.predict(observations, deterministic=deterministic)
                observations, *_ = env.step(actions)
        parts.append(ledger.episodes)
    return Episodes.concatenate(parts)


def _collect_stepwise(
    env: gym.vector.VectorEnv[Any, Any, Any],
    policy: Policy,
    episodes: int,
    rng: np.random.Generator,
    on_step: Callable[[int], None],
) -> Episodes:
    """The same through rewards as `env.step` pays them. Episodes that start after the B-th are run for nothing.

    They keep the sample fair: to take the first B that *finish* would over-represent short responses. Where a wrapper cuts
    an episode, `finish_reason` is "truncated", and task reward and KL are nan unless the wrapper gives them.
    """
    lanes: TextVectorEnv = env.unwrapped  # type: ignore[assignment]
    n, width, budget = env.num_envs, lanes.max_tokens, lanes.task.max_new_tokens
    ints = {
        k: np.full(episodes, -1, np.int64)
        for k in ("lane", "prompt_id", "group_id", "prompt_length", "response_length")
    }
    tokens = np.full((episodes, width), lanes.vocab_size, np.int64)
    floats = {k: np.zeros((episodes, budget)) for k in ("log_probs", "rewards")}
    scalars = {k: np.full(episodes, np.nan) for k in ("kl", "task_reward")}
    reasons = np.full(episodes, None, object)
    components: dict[str, NDArray[np.float64]] = {}
    index = np.full(n, -1)
    started = finished = 0

    def start(mask: NDArray[np.bool_], observations: NDArray[np.int64], info: dict[str, Any]) -> None:
        nonlocal started
        for lane in np.flatnonzero(mask):
            index[lane] = started if started < episodes else -1
            if index[lane] >= 0:
                i = index[lane]
                ints["lane"][i] = lane
                ints["prompt_id"][i], ints["group_id"][i] = (
                    _at(info, lane, name, -1) for name in ("prompt_id", "group_id")
                )
                ints["prompt_length"][i] = (observations[lane] != lanes.vocab_size).sum()
                started += 1

    observations, info = env.reset()
    start(np.ones(n, bool), observations, info)
    ended = np.zeros(n, bool)  # at the last step; in NEXT_STEP mode the coming step resets these lanes
    same_step = env.metadata["autoreset_mode"] is gym.vector.AutoresetMode.SAME_STEP
    while finished < episodes:
        actions, log_probs = policy.act(observations, rng)
        before = observations
        observations, rewards, terminations, truncations, info = env.step(actions)
        acted = np.ones(n, bool) if same_step else ~ended
        if not same_step:
            start(ended, observations, info)
        live = np.flatnonzero((index >= 0) & acted)
        i, place = index[live], (before[live] != lanes.vocab_size).sum(axis=1) - ints["prompt_length"][index[live]]
        floats["log_probs"][i, place], floats["rewards"][i, place] = log_probs[live], rewards[live]
        ended = terminations | truncations
        final = info.get("final_info", {}) if same_step else info
        for lane in np.flatnonzero(ended & (index >= 0)):
            i = index[lane]
            tokens[i] = info["final_obs"][lane] if same_step else observations[lane]
            ints["response_length"][i] = (tokens[i] != lanes.vocab_size).sum() - ints["prompt_length"][i]
            reasons[i] = _at(final, lane, "finish_reason", "terminated") if terminations[lane] else "truncated"
            for name, column in scalars.items():
                column[i] = _at(final, lane, name, np.nan)
            for key in final:
                if key.startswith("reward/"):
                    column = components.setdefault(key.removeprefix("reward/"), np.full(episodes, np.nan))
                    column[i] = _at(final, lane, key, np.nan)
            index[lane] = -1
            finished += 1
        if same_step:
            start(ended, observations, info)
        on_step(int(acted.sum()))
    mask = np.arange(budget) < ints["response_length"][:, None]
    return Episodes(
        order=np.arange(episodes),
        tokens=tokens,
        finish_reason=reasons,
        log_probs=floats["log_probs"],
        ref_log_probs=np.where(mask, np.nan, 0.0),
        kl=scalars["kl"],
        rewards=floats["rewards"],
        task_reward=scalars["task_reward"],
        components=components,
        **ints,
    )


def _at(info: dict[str, Any], lane: int | np.integer[Any], name: str, default: Any) -> Any:
    """An entry of a vector info, where the lane has one."""
    return info[name][lane] if name in info and info[f"_{name}"][lane] else default
