"""A checker for environments of your own, to call from your own tests."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from numpy.typing import NDArray

from rewards import Batch, Scores
from textenv.env import TextEnv, TextVectorEnv
from textenv.task import Task

LANES = 3
STOP = 0.2
"""How often a random action is a stop token, so that episodes end in both ways."""


def check_text_env(
    env: str | Task | gym.Env[Any, Any] | Callable[[], gym.Env[Any, Any]],
    make_vec: Callable[..., VectorEnv[Any, Any, Any]] | None = None,
    *,
    steps: int = 60,
    seed: int = 0,
    tolerance: float = 1e-4,
    **kwargs: Any,
) -> None:
    """Check that an environment keeps the contract that agents rely on.

    Runs Gymnasium's `check_env`, and then plays random tokens to see that

    - observations are a prompt and its response, padded behind with V, and a step appends its action and nothing else;
    - an episode is terminated by a stop token or by the token budget, never truncated;
    - the task reward is paid once, on the transition that ends the episode, for that episode's response;
    - the same seed and actions give the same run, and `set_state` brings everything back, generators included;
    - lane i of the vector environment lives as the single environment with seed + i does, in each autoreset mode.

    Args:
        env: A registered id, a `Task`, an environment, or a function that makes one. (Given as an environment without a
            spec, it is compared with itself.)
        make_vec: Called as `make_vec(num_envs=..., autoreset_mode=...)`. None finds it out from an id, a `Task` or a spec;
            where there is none, lanes are not checked.
        steps: Steps played in each check.
        seed: Of resets and actions.
        tolerance: Largest difference between numbers that count as equal: batches of another shape round differently.
        kwargs: Passed to the constructors that an id or a `Task` has.

    Raises:
        AssertionError: The environment breaks the contract; the message says where, and what is the likely cause.

    Example:
        >>> check_text_env("textenv/Arithmetic-v0", max_new_tokens=4)
        >>> check_text_env(lambda: MyEnv(task), lambda **kw: MyVectorEnv(task=task, **kw))
    """
    make, found = _constructors(env, kwargs)
    make_vec = make_vec or found
    with warnings.catch_warnings():
        for harmless in (
            "The KL penalty",
            "No reward=",
            "symmetric and normalized space",
            "different from the unwrapped",
        ):
            warnings.filterwarnings("ignore", message=f".*{harmless}")
        singles = [make() for _ in range(LANES)]
        check_env(_Legal(singles[0]), skip_render_check=True)
        _check_spaces(singles[0])
        _check_episodes(singles[0], steps, seed)
        _check_determinism(singles[0], singles[1], steps, seed, tolerance)
        _check_state(singles[0], steps, seed, tolerance)
        if make_vec is not None and singles[0] is not singles[1]:
            for mode in AutoresetMode:
                _check_lanes(singles, make_vec(num_envs=LANES, autoreset_mode=mode), mode, steps, seed, tolerance)


def _constructors(env: Any, kwargs: dict[str, Any]) -> tuple[Callable[[], Any], Callable[..., Any] | None]:
    if isinstance(env, Task):
        return lambda: TextEnv(env, **kwargs), lambda num_envs, **more: TextVectorEnv(num_envs, env, **kwargs, **more)
    spec = gym.spec(env) if isinstance(env, str) else getattr(env, "spec", None)
    if spec is not None:
        has_lanes = spec.vector_entry_point is not None
        return lambda: gym.make(spec, **kwargs), (
            (lambda **more: gym.make_vec(spec, **{**kwargs, **more})) if has_lanes else None
        )
    if kwargs:
        raise ValueError(f"Keywords {sorted(kwargs)} are for an id or a Task; give them to your own function instead.")
    return (env if not isinstance(env, gym.Env) else lambda: env), None


# ---------------------------------------------------------------------- one environment


def _check_spaces(env: Any) -> None:
    actions, observations = env.action_space, env.observation_space
    _expect(
        isinstance(actions, gym.spaces.Discrete) and actions.start == 0,
        f"Expected the action space to be Discrete(V) from 0, got {actions}.",
    )
    translated = env.has_wrapper_attr("action_tokens")  # TopKActions: an action stands for a token
    v = _padding(env) if translated else int(actions.n)
    _expect(
        isinstance(observations, gym.spaces.Box)
        and observations.dtype == np.int64
        and len(observations.shape) == 1
        and bool((observations.low == 0).all() and (observations.high == v).all()),
        f"Expected the observation space to be Box(0, {v}, (L,), int64), got {observations}. The upper bound is V = {v}, the padding, "
        "which no action can produce.",
    )


def _check_episodes(env: Any, steps: int, seed: int) -> None:
    rng, v = np.random.default_rng(seed), _padding(env)
    task = getattr(env.unwrapped, "task", None)
    budget, stops = getattr(task, "max_new_tokens", None), getattr(task, "stop_tokens", None)
    pays_each_step = getattr(getattr(env.unwrapped, "kl", None), "kind", "policy") == "reference"
    lengths: set[int] = set()
    with _scored(env) as scored:
        observation, info = env.reset(seed=seed)
        tokens, response = _tokens(observation, v), []
        _expect("prompt_id" in info, f"Expected reset() to say the `prompt_id` in its info, got {sorted(info)}.")
        for step in range(steps):
            before = len(scored)
            action = _random_action(env, rng)
            token = int(_choices(env)[action])
            observation, reward, terminated, truncated, info = env.step(action)
            response.append(token)
            after = _tokens(observation, v)
            where = f"at step {step}, token {len(response)} of an episode"
            _expect(
                after == [*tokens, token],
                f"The observation {where} is {after}, expected {[*tokens, token]}: what stood there before, and then the action. Is "
                "a buffer reused, or a token added or lost?",
            )
            _expect(
                not truncated,
                f"The episode was truncated {where}. Agents would bootstrap a value there; a token budget belongs to the task and "
                "terminates. Truncation is left to wrappers such as TimeLimit.",
            )
            stopped = stops is not None and token in stops
            full = budget is not None and len(response) == budget
            if stops is not None and budget is not None:
                _expect(
                    terminated == (stopped or full),
                    f"terminated={terminated} {where}, expected {stopped or full}: the token is {'a' if stopped else 'no'} stop token, and "
                    f"the budget is {budget} tokens.",
                )
            _expect(
                len(scored) - before == (1 if terminated else 0) or not hasattr(_bound(env), "reward"),
                f"The reward scored {len(scored) - before} completions {where} (terminated={terminated}), expected one at the end of "
                "an episode, and none before.",
            )
            if not terminated:
                _expect(
                    reward == 0 or pays_each_step,
                    f"The reward {where} is {reward}, expected 0 before the end without a policy attached: the task reward is paid on "
                    "the transition that ends the episode.",
                )
                _expect("task_reward" not in info, f"`task_reward` is in the info {where}, before the end.")
                tokens = after
                continue
            reason = info.get("finish_reason")
            _expect(
                reason in ("stop", "length") and (stops is None or (reason == "stop") == stopped),
                f"info['finish_reason'] is {reason!r} {where}, expected 'stop' after a stop token, else 'length'.",
            )
            if reason == "length":
                lengths.add(len(response))
            paid = info.get("task_reward")
            _expect(
                paid is not None and bool(np.isfinite(paid)) and (pays_each_step or bool(np.isclose(reward, paid))),
                f"The reward {where} is {reward} and info['task_reward'] {paid}, expected them equal at the end without a policy "
                "attached. Is the reward paid one step late, or on a padding token?",
            )
            if scored[before:]:
                _expect(
                    list(scored[-1]) == response,
                    f"The reward was given the completion {scored[-1]}, expected {response}: does it reach over an episode's border?",
                )
            observation, info = env.reset()
            tokens, response = _tokens(observation, v), []
    _expect(
        len(lengths) <= 1,
        f"Episodes ended by length after {sorted(lengths)} tokens, expected one budget for all: it has to be visible in the observation.",
    )


def _check_determinism(env: Any, another: Any, steps: int, seed: int, tolerance: float) -> None:
    first, second = _play(env, steps, seed), _play(another, steps, seed)
    for step, (a, b) in enumerate(zip(first, second, strict=True)):
        if difference := _difference(a, b, tolerance):
            raise AssertionError(
                f"Two runs with seed {seed} and the same actions differ at step {step} in {difference}. All chance has to come from "
                "self.np_random after super().reset(seed=seed)."
            )


def _check_state(env: Any, steps: int, seed: int, tolerance: float) -> None:
    base = env.unwrapped
    _expect(
        hasattr(base, "get_state") and hasattr(base, "set_state"),
        f"{type(base).__name__} has no get_state() and set_state(): runs cannot be resumed exactly, nor trees searched.",
    )
    env.reset(seed=seed)
    env.step(_random_action(env, np.random.default_rng(seed), stop=0.0))
    state = base.get_state()
    first = _play(env, steps, seed, reset=False)
    base.set_state(state)
    second = _play(env, steps, seed, reset=False)
    for step, (a, b) in enumerate(zip(first, second, strict=True)):
        if difference := _difference(a, b, tolerance):
            raise AssertionError(
                f"After set_state the same actions gave something else at step {step}, in {difference}. Is every attribute that steps "
                "change in get_state, copied, and the generator's state with it?"
            )


# ---------------------------------------------------------------------- lanes


def _check_lanes(singles: list[Any], lanes: Any, mode: AutoresetMode, steps: int, seed: int, tolerance: float) -> None:
    _expect(
        lanes.metadata.get("autoreset_mode") is mode,
        f"Expected metadata['autoreset_mode'] to be {mode}, got {lanes.metadata.get('autoreset_mode')!r}: wrappers go by it.",
    )
    if getattr(lanes.unwrapped, "group_size", 1) > 1:
        return  # lanes of a group share their prompts, so they are no single environments
    reference = SyncVectorEnv([lambda one=one: one for one in singles], autoreset_mode=mode)  # type: ignore[misc]
    rng = np.random.default_rng(seed)
    ours: Any = lanes.reset(seed=seed)
    theirs: Any = reference.reset(seed=seed)
    for step in range(steps):
        if difference := _difference(ours, theirs, tolerance):
            raise AssertionError(
                f"In {mode.name} mode the vector environment and single ones with seeds {seed}, {seed + 1}, ... differ "
                f"{f'at step {step}' if step else 'after reset'} in {difference}. Has each lane a generator, a prompt, a length and a budget "
                "of its own, and does every info have its `_key` mask?"
            )
        actions = np.array([_random_action(single, rng) for single in singles])
        ours, theirs = lanes.step(actions), reference.step(actions)
        if mode is AutoresetMode.DISABLED and theirs[2].any() and not _difference(ours, theirs, tolerance):
            ours, theirs = (
                each.reset(options={"reset_mask": (theirs[2] | theirs[3]).copy()}) for each in (lanes, reference)
            )


# ---------------------------------------------------------------------- tools


class _Legal(gym.ActionWrapper[Any, Any, Any], gym.utils.RecordConstructorArgs):
    """Gymnasium's checker samples the whole action space; a masked token becomes one that is allowed."""

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        gym.utils.RecordConstructorArgs.__init__(self)
        gym.ActionWrapper.__init__(self, env)

    def action(self, action: Any) -> Any:
        allowed = _allowed(self)
        return action if allowed[action] else np.int64(allowed.argmax())


def _expect(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)


def _tokens(observation: NDArray[np.int64], v: int) -> list[int]:
    """The tokens in front of the padding."""
    n = int((observation != v).sum())
    _expect(
        n > 0 and bool((observation[n:] == v).all()),
        f"Expected a prompt and its response, padded behind with V = {v}, got {observation.tolist()}. Is it padded in front, or with the "
        "tokenizer's pad token?",
    )
    return [int(token) for token in observation[:n]]


def _padding(env: Any) -> int:
    """V, which stands behind the tokens of an observation."""
    return int(env.observation_space.high.max())


def _choices(env: Any) -> NDArray[np.int64]:
    """The token that each action stands for: itself, unless a wrapper says otherwise."""
    if env.has_wrapper_attr("action_tokens"):
        return np.asarray(env.get_wrapper_attr("action_tokens")())
    return np.arange(int(env.action_space.n))


def _allowed(env: Any) -> NDArray[np.bool_]:
    if env.has_wrapper_attr("action_masks"):
        return np.asarray(env.get_wrapper_attr("action_masks")())
    return np.ones(int(env.action_space.n), bool)


def _random_action(env: Any, rng: np.random.Generator, stop: float = STOP) -> int:
    allowed, task = np.flatnonzero(_allowed(env)), getattr(env.unwrapped, "task", None)
    is_stop = np.isin(_choices(env)[allowed], list(getattr(task, "stop_tokens", ())))
    stops, others = allowed[is_stop], allowed[~is_stop]
    if len(stops) and rng.random() < stop:
        return int(rng.choice(stops))
    return int(rng.choice(others if len(others) else stops))


def _play(env: Any, steps: int, seed: int, reset: bool = True) -> list[Any]:
    """Everything that an environment returns to random actions."""
    rng = np.random.default_rng(seed)
    seen: list[Any] = [env.reset(seed=seed)] if reset else []
    for _ in range(steps):
        seen.append(env.step(_random_action(env, rng)))
        if seen[-1][2] or seen[-1][3]:
            seen.append(env.reset())
    return seen


def _bound(env: Any) -> Any:
    """The object that holds the bound reward: the single environment's one lane."""
    return getattr(env.unwrapped, "lanes", None)


@contextmanager
def _scored(env: Any) -> Iterator[list[Any]]:
    """The completions (token ids) that the environment has had scored."""
    completions: list[Any] = []
    owner = _bound(env)
    reward = getattr(owner, "reward", None)
    if reward is None:
        yield completions
        return

    def spy(batch: Batch) -> Scores:
        completions.extend(batch.completion_ids)
        return reward(batch)

    owner.reward = spy
    try:
        yield completions
    finally:
        owner.reward = reward


def _difference(a: Any, b: Any, tolerance: float, where: str = "what is returned") -> str | None:
    """Where two nested values differ, or None."""
    if isinstance(b, dict) and isinstance(a, dict):
        if a.keys() != b.keys():
            return f"{where}: keys {sorted(a)} and {sorted(b)}"
        pairs = [(a[name], b[name], f"{where}[{name!r}]") for name in b]
    elif isinstance(b, tuple | list) and isinstance(a, tuple | list):
        names = {2: ("observations", "infos"), 5: ("observations", "rewards", "terminations", "truncations", "infos")}
        labels = names.get(len(b), range(len(b)))
        pairs = [(x, y, f"the {label}") for x, y, label in zip(a, b, labels, strict=True)]
    elif isinstance(b, np.ndarray) and b.dtype == object:
        if np.shape(a) != b.shape:
            return f"{where}: shapes {np.shape(a)} and {b.shape}"
        pairs = [(x, y, f"{where}[{i}]") for i, (x, y) in enumerate(zip(a, b, strict=True))]
    elif isinstance(b, np.ndarray | float | np.floating):
        same = np.shape(a) == np.shape(b) and np.allclose(a, b, atol=tolerance, equal_nan=True)
        return None if same else f"{where}: {a!r} and {b!r}"
    else:
        return None if a == b else f"{where}: {a!r} and {b!r}"
    return next((found for x, y, label in pairs if (found := _difference(x, y, tolerance, label))), None)
