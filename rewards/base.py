"""What a reward is, how it is called, and what happens when it is wrong.

A reward is any callable with the signature that TRL uses: it is called by keyword with lists of one entry per
completion (``prompts``, ``completions``, ``completion_ids``, and every further column of the prompt data
set) and returns one float per completion, or ``None`` where it does not apply::

    def brevity(completions, **columns):
        return [-len(completion.split()) / 10 for completion in completions]

:func:`bind` reads the signature once and gives a :class:`BoundReward`, which turns a :class:`Batch` into
:class:`Scores`. Whatever a reward does wrong ends in a :class:`RewardError` with the name of the reward, the
completion it failed on, what was expected and what to do about it. Nothing is ever scored 0 in silence: a
zero is a reward like any other, and an agent would learn from it.
"""

from __future__ import annotations

import asyncio
import copy
import difflib
import functools
import inspect
import math
import numbers
import os
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeAlias

import numpy as np

RewardFunction: TypeAlias = Callable[..., Any]
"""Called by keyword with lists of B entries; returns (or, if async, resolves to) B floats or ``None``s."""

Completion: TypeAlias = str | list[dict[str, Any]]
"""Text, or the messages of a conversation: ``[{"role": "assistant", "content": "..."}]``."""

# What a trainer offers beside the columns. Not data, so never copied. (`environments` is TRL's alone; it gets
# here only when a WeightedSum runs inside TRL.)
_SERVICES = frozenset({"trainer_state", "log_extra", "log_metric", "environments"})
_DATA = ("prompts", "completions", "completion_ids")
_KEYWORDS = (*_DATA, "trainer_state", "log_extra", "log_metric")
# TRL withholds these columns: the plural keywords carry their content.
_WITHHELD = frozenset({"prompt", "completion", "completion_ids"})


class RewardError(ValueError):
    """A reward is written, combined or called wrongly; the message says which, where, and what to do."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Finished episodes, one entry each; B of them.

    Args:
        prompts: B texts, or B lists of messages.
        completions: B texts, or B lists of messages such as ``[{"role": "assistant", "content": "..."}]``.
        completion_ids: B lists of token ids, as the policy produced them.
        columns: Every other column of the prompt data set, B entries each.
        step: Environment steps so far; reaches the reward as ``trainer_state.global_step``.

    Raises:
        RewardError: The lists differ in length.
    """

    prompts: Sequence[Completion]
    completions: Sequence[Completion]
    completion_ids: Sequence[Sequence[int]]
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    step: int = 0

    def __post_init__(self) -> None:
        for name, values in self._lists():
            if len(values) != len(self.completions):
                raise RewardError(
                    f"`{name}` has {len(values)} entries for {len(self.completions)} completions; "
                    "expected one per completion"
                )

    def __len__(self) -> int:
        return len(self.completions)

    def _lists(self) -> Iterator[tuple[str, Sequence[Any]]]:
        yield "prompts", self.prompts
        yield "completion_ids", self.completion_ids
        yield from self.columns.items()


@dataclass(frozen=True, eq=False)
class Scores:
    """What a reward says about a batch.

    Args:
        total: The weighted sum of the components that apply. Finite. Shape: (B,), float64.
        components: Name -> unweighted values of each component, nan where it does not apply. Shape: (B,).
    """

    total: np.ndarray
    components: dict[str, np.ndarray]


@dataclass(frozen=True)
class TrainerState:
    """The part of ``transformers.TrainerState`` that means something here.

    Args:
        global_step: Environment steps so far (in TRL: optimiser steps).
    """

    global_step: int = 0


def bind(reward: RewardFunction, columns: Iterable[str]) -> BoundReward:
    """Check a reward against the columns that it will be given, and make it ready to score batches.

    Args:
        reward: A function, a callable object, or a :class:`~rewards.WeightedSum` of them.
        columns: Names of the columns of the prompt data set.

    Returns:
        The bound reward.

    Raises:
        RewardError: ``reward`` is no reward, or requires a parameter that nothing provides.

    Example:
        >>> score = bind(lambda completions: [float(len(c)) for c in completions], columns=[])
        >>> score(Batch(prompts=["a", "b"], completions=["x", "xyz"], completion_ids=[[1], [1, 2, 3]])).total
        array([1., 3.])
    """
    names = [name for name in columns if name not in _WITHHELD]
    if clash := sorted(set(names) & set(_KEYWORDS)):
        raise RewardError(
            f"the prompts have a column `{clash[0]}`, but that keyword has a meaning of its own for rewards "
            f"({', '.join(f'`{known}`' for known in _KEYWORDS)} do); rename the column"
        )
    return BoundReward(reward, read_components(reward, [*_KEYWORDS, *names]))


class BoundReward:
    """A reward whose signature fits; made by :func:`bind`.

    Reusable; picklable and deep-copyable when the functions in it are.

    Attributes:
        names: The components, in order: the keys of the ``WeightedSum``, or the name of the one function.
        extras: What the rewards handed to ``log_extra`` for the latest batch: column -> values.
    """

    def __init__(self, reward: RewardFunction, components: tuple[Component, ...]) -> None:
        self.reward = reward
        self.components = components
        self.names: tuple[str, ...] = tuple(component.name for component in components)
        self.extras: dict[str, list[Any]] = {}
        self._metric_sums: dict[str, tuple[float, int]] = {}

    def __repr__(self) -> str:
        return f"BoundReward({self.reward!r})"

    def __call__(self, batch: Batch) -> Scores:
        """Score a batch.

        Args:
            batch: B finished episodes. The rewards get copies: nothing in it is ever changed.

        Returns:
            Total and components.

        Raises:
            RewardError: A reward raised or returned anything but one finite float (or ``None``) per
                completion, or every component returned ``None`` for some completion.
        """
        log = _Log()
        values = score_components(
            self.components,
            {
                **{name: column for name, column in batch.columns.items() if name not in _WITHHELD},
                "prompts": batch.prompts,
                "completions": batch.completions,
                "completion_ids": batch.completion_ids,
                "trainer_state": TrainerState(batch.step),
                "log_extra": log.extra,
                "log_metric": log.metric,
            },
        )
        total = weighted_total(self.components, values)
        for index in np.flatnonzero(np.isnan(total)):
            raise RewardError(
                f"every reward ({', '.join(self.names)}) returned None for "
                f"{_show(batch.completions, int(index))}; expected at least one float. None means "
                "'does not apply': add a reward that applies to this prompt, or remove the prompt"
            )
        self._keep(log)
        return Scores(total, dict(zip(self.names, values, strict=True)))

    @property
    def metrics(self) -> dict[str, float]:
        """Mean of each metric handed to ``log_metric`` since :meth:`pop_metrics` was last called."""
        return {name: total / count for name, (total, count) in self._metric_sums.items()}

    def pop_metrics(self) -> dict[str, float]:
        """Return :attr:`metrics` and start anew."""
        metrics = self.metrics
        self._metric_sums = {}
        return metrics

    def _keep(self, log: _Log) -> None:
        self.extras = dict(log.extras)
        for name, values in log.metrics.items():
            total, count = self._metric_sums.get(name, (0.0, 0))
            self._metric_sums[name] = (total + math.fsum(values), count + len(values))


class _Log:
    """Collects what rewards log during one call, so that a call which fails leaves no trace."""

    def __init__(self) -> None:
        self.extras: defaultdict[str, list[Any]] = defaultdict(list)
        self.metrics: defaultdict[str, list[float]] = defaultdict(list)

    def extra(self, column: str, values: Iterable[Any]) -> None:
        self.extras[column].extend(values)

    def metric(self, name: str, value: float) -> None:
        self.metrics[name].append(float(value))


# ----------------------------------------------------------------------------------------------------
# Reading signatures
# ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Component:
    """One plain reward function with its place in the sum.

    Args:
        name: Shown in messages and in ``info["reward/<name>"]``.
        function: The reward.
        weight: Factor in the sum.
        parameters: Keywords to call it with; ``None`` if it takes everything (``**kwargs``).
        required: Those without a default.
    """

    name: str
    function: RewardFunction
    weight: float
    parameters: tuple[str, ...] | None
    required: tuple[str, ...]


def reward_name(reward: RewardFunction) -> str:
    """Name of a reward: its ``__name__`` (seen through ``functools.partial``), else the name of its class."""
    while isinstance(reward, functools.partial):
        reward = reward.func
    return str(getattr(reward, "__name__", type(reward).__name__))


def read_components(reward: RewardFunction, available: Iterable[str]) -> tuple[Component, ...]:
    """Split a reward into plain functions and check each of them against the keywords at hand.

    Args:
        reward: A plain reward, or an object whose ``reward_components()`` yields (name, function, weight).
        available: Every keyword that a call will offer.

    Returns:
        The components, nested sums flattened: ``outer/inner``, with the product of the weights.

    Raises:
        RewardError: See :func:`bind`.
    """
    available = list(available)
    components = tuple(_read(name, function, weight, available) for name, function, weight in _leaves(reward))
    names = [component.name for component in components]
    if twice := [name for name in names if names.count(name) > 1]:
        raise RewardError(f"two rewards are both called {twice[0]!r}; rename one of them")
    return components


def check_is_reward(reward: object, name: str | None = None) -> None:
    """Refuse what is no reward, with the remedy for the usual mistakes.

    Args:
        reward: Anything.
        name: Its key in a ``WeightedSum``.

    Raises:
        RewardError: ``reward`` cannot be called as a reward.
    """
    subject = f"the reward {name!r}" if name else "a reward"
    expected = f"{subject} must be a callable such as `def reward(completions, **columns) -> list[float]`"
    if isinstance(reward, str):
        remedy = f"for a reward model, pass RewardModel.from_pretrained({reward!r})"
    elif isinstance(reward, (list, tuple, set)):
        remedy = 'to add several up, pass WeightedSum({"name": (reward, weight), ...})'
    elif isinstance(reward, Mapping):
        remedy = "pass WeightedSum({...}), with a (reward, weight) per name"
    elif inspect.isclass(reward):
        remedy = f"this is a class: pass an instance of it, {reward.__name__}(...)"
    elif callable(getattr(reward, "forward", None)) and hasattr(reward, "config"):
        remedy = "for a sequence classifier, pass RewardModel(model, tokenizer)"
    elif not callable(reward):
        remedy = "wrap it in a function"
    else:
        return
    raise RewardError(f"{expected}; got {shorten(repr(reward))} ({type(reward).__name__}). Remedy: {remedy}")


def _leaves(reward: RewardFunction) -> Iterator[tuple[str, RewardFunction, float]]:
    check_is_reward(reward)
    combined = getattr(reward, "reward_components", None)
    if combined is None:
        yield reward_name(reward), reward, 1.0
    else:
        yield from combined()


def _read(name: str, function: RewardFunction, weight: float, available: list[str]) -> Component:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some callables written in C have none to read; offer them everything
        return Component(name, function, weight, None, ())
    parameters: list[str] = []
    required: list[str] = []
    takes_everything = False
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            takes_everything = True
        elif parameter.kind is parameter.POSITIONAL_ONLY:
            if parameter.default is parameter.empty:
                raise RewardError(
                    f"reward {name!r} has the positional-only parameter `{parameter.name}`, but rewards are "
                    "called by keyword; remove the `/` from its signature"
                )
        elif parameter.kind is not parameter.VAR_POSITIONAL:
            parameters.append(parameter.name)
            if parameter.default is parameter.empty:
                required.append(parameter.name)
                if parameter.name not in available:
                    _refuse_parameter(name, parameter.name, available)
    if isinstance(function, functools.partial):
        for preset in function.keywords:
            if preset in available:  # one of the two would win in silence, so ask
                raise RewardError(
                    f"reward {name!r} is a functools.partial that sets `{preset}`, and rewards are also "
                    f"given `{preset}`; rename the parameter, or the column if it is one"
                )
    return Component(name, function, weight, None if takes_everything else tuple(parameters), tuple(required))


def _refuse_parameter(name: str, parameter: str, available: list[str]) -> NoReturn:
    raise RewardError(
        f"reward {name!r} requires the parameter `{parameter}`, which nothing provides; expected one of "
        f"{', '.join(f'`{known}`' for known in available)}.{did_you_mean(parameter, available)} "
        f"Remedy: rename the parameter, add a column `{parameter}` to the prompts, or give it a default"
    )


# ----------------------------------------------------------------------------------------------------
# Calling rewards
# ----------------------------------------------------------------------------------------------------


def score_components(components: Sequence[Component], arguments: Mapping[str, Any]) -> list[np.ndarray]:
    """Call every component, the async ones at the same time, and check what they return.

    Args:
        components: From :func:`read_components`.
        arguments: Every keyword on offer: ``completions`` and the other lists of B entries, and the services.

    Returns:
        For each component its values, nan for ``None``. Shape: (B,) each, float64.

    Raises:
        RewardError: A component raised, or returned something else than B finite floats or ``None``s.
    """
    completions = arguments["completions"]
    if not len(completions):
        return [np.empty(0) for _ in components]
    for component in components:
        if missing := [name for name in component.required if name not in arguments]:
            raise RewardError(
                f"reward {component.name!r} needs the column `{missing[0]}`, which this batch lacks; "
                "expected the columns that the reward was bound to"
            )
    outcomes = settle([_attempt(component, arguments) for component in components])
    for component, outcome in zip(components, outcomes, strict=True):
        if isinstance(outcome, BaseException):
            _blame(component, outcome, arguments)
    return [
        _to_array(component.name, outcome, completions) for component, outcome in zip(components, outcomes, strict=True)
    ]


def weighted_total(components: Sequence[Component], values: Sequence[np.ndarray]) -> np.ndarray:
    """Sum the components that apply, as TRL does.

    Args:
        components: The components.
        values: Their values, nan where one does not apply. Shape: (B,) each.

    Returns:
        The weighted sum; nan where no component applies. Shape: (B,).

    Raises:
        RewardError: A sum overflows.
    """
    stacked = np.stack(values)  # (components, B)
    applies = ~np.isnan(stacked)
    weights = np.array([component.weight for component in components])
    with np.errstate(over="ignore", invalid="ignore"):
        total = weights @ np.where(applies, stacked, 0.0)
    if not np.isfinite(total).all():
        raise RewardError("the weighted sum of the rewards overflows; expected finite totals. Scale the rewards down")
    return np.where(applies.any(axis=0), total, np.nan)


def completion_text(completion: Completion) -> str:
    """The text of a completion, whichever of the two formats it comes in.

    Args:
        completion: Text, or messages whose ``content`` is text or a list of parts such as
            ``{"type": "text", "text": "..."}``.

    Returns:
        The text; several messages are joined by newlines.
    """
    if isinstance(completion, str):
        return completion
    contents = [message.get("content") or "" for message in completion]
    return "\n".join(
        content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
        for content in contents
    )


def _attempt(component: Component, arguments: Mapping[str, Any]) -> Any:
    """Call a component with copies; return its result (awaitable, if it is async) or its exception."""
    keywords = arguments if component.parameters is None else component.parameters
    copies = {
        name: arguments[name] if name in _SERVICES else _fresh(arguments[name])
        for name in keywords
        if name in arguments
    }
    try:
        return component.function(**copies)
    except Exception as error:
        return error


def _fresh(value: Any) -> Any:
    """A copy that a reward may change as it likes."""
    if isinstance(value, (str, int, float, bytes, type(None))):
        return value
    if isinstance(value, (list, tuple)):  # a tuple becomes a list: rewards are promised lists
        return [_fresh(item) for item in value]
    if type(value) is dict:
        return {key: _fresh(item) for key, item in value.items()}
    return copy.deepcopy(value)


def settle(outcomes: list[Any]) -> list[Any]:
    """Replace the awaitables among results by what they resolve to, or by the exceptions they raise."""
    waiting = [index for index, outcome in enumerate(outcomes) if inspect.isawaitable(outcome)]
    if not waiting:
        return outcomes

    async def gather() -> list[Any]:
        return await asyncio.gather(*(outcomes[index] for index in waiting), return_exceptions=True)

    future = asyncio.run_coroutine_threadsafe(gather(), _event_loop(os.getpid()))
    try:
        results = future.result()
    except BaseException:  # Ctrl-C while waiting: do not leave requests running behind the user's back
        future.cancel()
        raise
    settled = list(outcomes)
    for index, result in zip(waiting, results, strict=True):
        settled[index] = result
    return settled


@functools.cache
def _event_loop(process: int) -> asyncio.AbstractEventLoop:
    """The event loop of async rewards, in a thread of its own, one per process.

    One loop for the whole run, since HTTP clients that a reward keeps are tied to the loop of their first
    call; in a thread, since a notebook already runs a loop; per process, since threads do not survive a fork.
    """
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="rewards-event-loop", daemon=True).start()
    return loop


def _blame(component: Component, error: BaseException, arguments: Mapping[str, Any]) -> NoReturn:
    """Raise a RewardError that says which completion made a component raise."""
    completions = arguments["completions"]
    what = f"reward {component.name!r} raised {type(error).__name__}: {error}"
    expected = "expected one float (or None) per completion"
    log = _Log()
    for index in range(len(completions)):
        single = {
            name: value if name in _SERVICES else value[index : index + 1] for name, value in arguments.items()
        } | {"log_extra": log.extra, "log_metric": log.metric}
        if len(completions) > 1:
            (outcome,) = settle([_attempt(component, single)])
            if not isinstance(outcome, BaseException):
                continue
            if type(outcome) is type(error):
                error = outcome
        raise RewardError(
            f"{what}\n  on {_show(completions, index)}; {expected}. Remedy: handle such completions in the "
            "reward (its own traceback is above)"
        ) from error
    raise RewardError(
        f"{what}\n  on a batch of {len(completions)} completions, though on none of them alone (the first is "
        f"{_show(completions, 0)}); {expected}. Remedy: call the reward with several entries to reproduce it"
    ) from error


def _to_array(name: str, returned: Any, completions: Sequence[Completion]) -> np.ndarray:
    """Check what a reward returned. Shape of the result: (B,), float64, nan for None."""
    count = len(completions)
    expected = f"expected a list with one float (or None) per completion, {count} in all"
    values = returned
    if not isinstance(values, (list, tuple)) and hasattr(values, "tolist"):
        values = values.tolist()  # numpy, torch, pandas, without importing any of them
    if not isinstance(values, (list, tuple)):
        remedy = "return [value]" if isinstance(values, numbers.Real) else "return a list"
        raise RewardError(
            f"reward {name!r} returned {shorten(repr(returned))} ({type(returned).__name__}) for a batch "
            f"that starts with {_show(completions, 0)}; {expected}. Remedy: {remedy}"
        )
    if len(values) != count:
        raise RewardError(
            f"reward {name!r} returned {len(values)} values for {count} completions, the first of them "
            f"{_show(completions, 0)}; {expected}. Remedy: do not skip or repeat completions; return None "
            "for those the reward does not apply to"
        )
    array = np.empty(count)
    for index, value in enumerate(values):
        if value is None:
            array[index] = np.nan
            continue
        if getattr(value, "shape", None) == ():  # numpy scalar, or tensor without dimensions
            value = value.item()
        problem, remedy = _to_float(value)
        if problem:
            raise RewardError(
                f"reward {name!r} returned {problem} for {_show(completions, index)}; expected a finite "
                f"float or None. Remedy: {remedy}"
            )
        array[index] = float(value)
    return array


def _to_float(value: Any) -> tuple[str, str]:
    """Say what is wrong with one returned value, and what to do; two empty texts if nothing is."""
    if isinstance(value, (list, tuple)) or getattr(value, "shape", ()) != ():
        return shorten(repr(value)), "return one number per completion; flatten an array of shape (B, 1)"
    if not isinstance(value, numbers.Real):
        return f"{shorten(repr(value))} ({type(value).__name__})", "convert it with float(...)"
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if math.isnan(number):
        return "nan", "look for 0/0 and empty completions; return None where the reward does not apply"
    if math.isinf(number):
        return f"{number}", "look for a division by zero or log(0); bound the reward"
    return "", ""


def _show(completions: Sequence[Completion], index: int) -> str:
    completion = completions[index]
    try:
        text = completion_text(completion)
    except (AttributeError, TypeError):
        text = str(completion)
    where = f" (number {index + 1} of {len(completions)})" if len(completions) > 1 else ""
    return f"completion {shorten(text)!r}{where}"


def shorten(text: str, limit: int = 100) -> str:
    """Text for an error message."""
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def did_you_mean(word: str, choices: Iterable[Any]) -> str:
    """' Did you mean `x`?' where something close exists in any case, or something that contains the word; else nothing."""
    word, names = word.casefold(), {str(choice).casefold(): str(choice) for choice in choices}
    close = difflib.get_close_matches(word, names, n=1)
    if not close and len(word) > 2:
        close = sorted((name for name in names if word in name), key=len)
    return f" Did you mean `{names[close[0]]}`?" if close else ""
