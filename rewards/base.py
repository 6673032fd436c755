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
import itertools
import logging
import math
import numbers
import os
import threading
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, NoReturn, TypeAlias

import numpy as np

RewardFunction: TypeAlias = Callable[..., Any]
"""Called by keyword with lists of B entries; returns (or, if async, resolves to) B floats or ``None``s."""

Completion: TypeAlias = str | list[dict[str, Any]]
"""Text, or the messages of a conversation: ``[{"role": "assistant", "content": "..."}]``."""

# What a trainer offers beside the columns. Not data, so never copied. (`environments` is TRL's alone; it gets
# here only when a WeightedSum runs inside TRL.)
SERVICES = frozenset({"trainer_state", "log_extra", "log_metric", "environments"})
_DATA = ("prompts", "completions", "completion_ids")
# Ours alone, so given only to rewards that name it: what takes `**kwargs` gets exactly what TRL would give.
_BY_NAME_ONLY = frozenset({"finish_reasons"})
_KEYWORDS = (*_DATA, "trainer_state", "log_extra", "log_metric", *_BY_NAME_ONLY)
# TRL withholds these columns: the plural keywords carry their content.
_WITHHELD = frozenset({"prompt", "completion", "completion_ids"})


PATIENCE = 60.0
"""Seconds after which a reward that has not returned is named in a warning (and again after twice as many, and so on)."""

_logger = logging.getLogger("rewards")


class RewardError(ValueError):
    """A reward is written, combined or called wrongly; the message says which, where, and what to do."""


class RewardTimeout(RewardError):
    """A reward did not return within its time limit."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Finished episodes, one entry each; B of them.

    Args:
        prompts: B texts, or B lists of messages.
        completions: B texts, or B lists of messages such as ``[{"role": "assistant", "content": "..."}]``.
        completion_ids: B lists of token ids, as the policy produced them.
        columns: Every other column of the prompt data set, B entries each.
        step: Environment steps so far; reaches the reward as ``trainer_state.global_step``.
        finish_reasons: B times ``"stop"`` or ``"length"``, for rewards that name this parameter. TRL has no such thing.

    Raises:
        RewardError: The lists differ in length.
    """

    prompts: Sequence[Completion]
    completions: Sequence[Completion]
    completion_ids: Sequence[Sequence[int]]
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    step: int = 0
    finish_reasons: Sequence[str] | None = None

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
        if self.finish_reasons is not None:
            yield "finish_reasons", self.finish_reasons
        yield from self.columns.items()


@dataclass(frozen=True, eq=False)
class Scores:
    """What a reward says about a batch.

    Args:
        total: What the reward as a whole pays. Finite. Shape: (B,), float64.
        components: Name -> value of what goes by that name, before weights; nan where it does not apply. Shape: (B,).
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


class Combination(ABC):
    """A reward made of other rewards; it nests, and works wherever one function does, in TRL too.

    A subclass names its parts and says how their values make one. Parts are called together, the async ones at the same
    time. Each name reaches ``info["reward/<name>"]``, nested ones as ``outer/inner``; a part named ``""`` goes by the name of
    the whole, and a function that has no name at all by its own.
    """

    conditional: ClassVar[bool] = False
    """Whether the second part is called only for completions whose first part :meth:`passes`."""

    @abstractmethod
    def reward_parts(self) -> Iterator[tuple[str, RewardFunction]]:
        """Yield (name, reward) of each part."""

    @abstractmethod
    def combine(self, values: np.ndarray) -> np.ndarray:
        """Make one value of those of the parts.

        Args:
            values: nan where a part does not apply. Shape: (parts, B).

        Returns:
            The values of the whole, nan where it does not apply. Shape: (B,).
        """

    def passes(self, values: np.ndarray) -> np.ndarray:
        """Where the second part is called, given the values of the first. Shape: (B,) -> (B,), bool."""
        return np.ones(len(values), bool)

    def __call__(
        self,
        completions: Sequence[Completion],
        prompts: Sequence[Completion] | None = None,
        completion_ids: Sequence[Sequence[int]] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """Score completions, with the signature of every reward.

        Args:
            completions: B texts, or B lists of messages.
            prompts: B prompts.
            completion_ids: B lists of token ids.
            **columns: Further columns of B entries, and what a trainer offers (``log_metric`` and so on).

        Returns:
            B values; ``None`` where the reward does not apply.

        Raises:
            RewardError: As :func:`rewards.bind` and the reward it makes.
        """
        arguments = {"completions": completions, "prompts": prompts, "completion_ids": completion_ids, **columns}
        arguments = {name: value for name, value in arguments.items() if value is not None}
        total, _ = evaluate(read_reward(self, arguments), arguments)
        return [None if math.isnan(value) else value for value in total.tolist()]


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
    return BoundReward(reward, read_reward(reward, [*_KEYWORDS, *names]))


class BoundReward:
    """A reward whose signature fits; made by :func:`bind`.

    Reusable; picklable and deep-copyable when the functions in it are.

    Attributes:
        names: The components, in order: the keys of a ``WeightedSum``, or the name of the one function.
        extras: What the rewards handed to ``log_extra`` for the latest batch: column -> values.
        seconds: Wall-clock time spent in calls since :meth:`pop_seconds` was last called.
    """

    def __init__(self, reward: RewardFunction, component: Component) -> None:
        self.reward = reward
        self.component = component
        self.names: tuple[str, ...] = component.names()
        self.extras: dict[str, list[Any]] = {}
        self.seconds = 0.0
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
        arguments = {
            **{name: column for name, column in batch.columns.items() if name not in _WITHHELD},
            "prompts": batch.prompts,
            "completions": batch.completions,
            "completion_ids": batch.completion_ids,
            "trainer_state": TrainerState(batch.step),
            "log_extra": log.extra,
            "log_metric": log.metric,
        }
        if batch.finish_reasons is not None:
            arguments["finish_reasons"] = batch.finish_reasons
        started = time.perf_counter()
        total, components = evaluate(self.component, arguments)
        self.seconds += time.perf_counter() - started
        for index in np.flatnonzero(np.isnan(total)):
            raise RewardError(
                f"every reward ({', '.join(self.names)}) returned None for "
                f"{_show(batch.completions, int(index))}; expected at least one float. None means "
                "'does not apply': add a reward that applies to this prompt, or remove the prompt"
            )
        self._keep(log)
        return Scores(total, components)

    @property
    def metrics(self) -> dict[str, float]:
        """Mean of each metric handed to ``log_metric`` since :meth:`pop_metrics` was last called."""
        return {name: total / count for name, (total, count) in self._metric_sums.items()}

    def pop_seconds(self) -> float:
        """Return :attr:`seconds` and start anew."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds

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
    """A reward with its place among others: a function, or a combination and its parts.

    Args:
        name: Shown in messages and in ``info["reward/<name>"]``.
        reported: Whether it reaches the info: not if what it is a part of goes by the same name.
        function: The reward.
        parameters: Keywords to call it with; ``None`` if it takes everything (``**kwargs``).
        required: Those without a default.
        parts: Of a combination.
    """

    name: str
    reported: bool
    function: RewardFunction
    parameters: tuple[str, ...] | None = None
    required: tuple[str, ...] = ()
    parts: tuple[Component, ...] = ()

    def names(self) -> tuple[str, ...]:
        """What is reported, from the outside in."""
        inner = itertools.chain.from_iterable(part.names() for part in self.parts)
        return (*([self.name] if self.reported else []), *inner)

    def certain(self) -> Iterator[Component]:
        """The functions that are called for every completion: all but those behind a gate."""
        if not isinstance(self.function, Combination):
            yield self
        for part in self.parts[:1] if getattr(self.function, "conditional", False) else self.parts:
            yield from part.certain()


def reward_name(reward: RewardFunction) -> str:
    """Name of a reward: its ``__name__`` (seen through ``functools.partial``), else the name of its class."""
    while isinstance(reward, functools.partial):
        reward = reward.func
    return str(getattr(reward, "__name__", type(reward).__name__))


def read_reward(reward: RewardFunction, available: Iterable[str]) -> Component:
    """Take a reward apart, and check each function in it against the keywords at hand.

    Args:
        reward: A function, a callable object, or a :class:`Combination`.
        available: Every keyword that a call will offer.

    Returns:
        The component that is the whole.

    Raises:
        RewardError: See :func:`bind`.
    """
    component = _read(reward, "", "", list(available))
    names = component.names()
    if twice := [name for name in names if names.count(name) > 1]:
        raise RewardError(f"two rewards are both called {twice[0]!r}; rename one of them")
    return component


_PLURALS = {"prompt": "prompts", "completion": "completions", "finish_reason": "finish_reasons"}


def read_examples(examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The keywords that a reward is called with, from examples written by hand.

    Args:
        examples: Mappings with ``prompt``, ``completion`` and whatever columns the reward reads; ``completion_ids`` and
            ``finish_reason`` if it reads those.

    Returns:
        Keyword -> one entry per example (copies), and the services of a trainer, which do nothing.

    Raises:
        RewardError: An example has other entries than the first.
    """
    names = set(examples[0]) if examples else {"prompt", "completion"}
    for number, example in enumerate(examples):
        if set(example) != names or not {"prompt", "completion"} <= names:
            raise RewardError(
                f"example {number} has the entries {sorted(example)}; expected `prompt`, `completion` and the "
                f"same columns in each (the first has {sorted(names)})"
            )
    columns = {_PLURALS.get(name, name): [_fresh(example[name]) for example in examples] for name in sorted(names)}
    services = {"log_extra": lambda column, values: None, "log_metric": lambda name, value: None}
    return {**columns, "trainer_state": TrainerState(), **services}


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


def _read(reward: RewardFunction, own: str, outer: str, available: list[str]) -> Component:
    """Read a reward called ``own`` in something called ``outer``."""
    check_is_reward(reward, own or None)
    path = f"{outer}/{own}" if own and outer else own or outer
    if isinstance(reward, Combination):
        parts = tuple(_read(part, name, path, available) for name, part in reward.reward_parts())
        return Component(path, reported=bool(own), function=reward, parts=parts)
    return _read_function(path or reward_name(reward), bool(own) or not path, reward, available)


def _read_function(name: str, reported: bool, function: RewardFunction, available: list[str]) -> Component:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some callables written in C have none to read; offer them everything
        return Component(name, reported, function)
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
    named = _BY_NAME_ONLY & set(parameters)  # a reward that takes everything must name it all the same
    taken = None if takes_everything and not named else tuple([*available, *named] if takes_everything else parameters)
    return Component(name, reported, function, taken, tuple(required))


def _refuse_parameter(name: str, parameter: str, available: list[str]) -> NoReturn:
    raise RewardError(
        f"reward {name!r} requires the parameter `{parameter}`, which nothing provides; expected one of "
        f"{', '.join(f'`{known}`' for known in available)}.{did_you_mean(parameter, available)} "
        f"Remedy: rename the parameter, add a column `{parameter}` to the prompts, or give it a default"
    )


# ----------------------------------------------------------------------------------------------------
# Calling rewards
# ----------------------------------------------------------------------------------------------------


def evaluate(component: Component, arguments: Mapping[str, Any]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Score a batch.

    Args:
        component: From :func:`read_reward`.
        arguments: Every keyword on offer: ``completions`` and the other lists of B entries, and the services.

    Returns:
        What the reward pays, nan where it does not apply; and name -> values of all that is reported. Shape: (B,) each.

    Raises:
        RewardError: A function raised, or returned something else than B finite floats or ``None``s, or a combination
            of them overflows.
    """
    functions = list(component.certain())
    called = dict(zip(map(id, functions), _call(functions, arguments), strict=True))
    report: dict[str, np.ndarray] = {}
    total = _resolve(component, arguments, called, report)
    return total, {name: report[name] for name in component.names()}


def _resolve(
    component: Component, arguments: Mapping[str, Any], called: Mapping[int, np.ndarray], report: dict[str, np.ndarray]
) -> np.ndarray:
    """Values of a component whose certain functions have been called. Shape: (B,)."""
    reward = component.function
    if not isinstance(reward, Combination):
        values = called[id(component)]
    else:
        certain = component.parts[:1] if reward.conditional else component.parts
        parts = [_resolve(part, arguments, called, report) for part in certain]
        if reward.conditional:
            parts.append(_evaluate_rows(component.parts[1], arguments, reward.passes(parts[0]), report))
        with np.errstate(over="ignore", invalid="ignore"):
            values = reward.combine(np.stack(parts))
        if np.isinf(values).any():
            what = f"reward {component.name!r}" if component.name else "the reward as a whole"
            raise RewardError(f"{what} overflows; expected finite totals. Scale the rewards down")
    if component.reported:
        report[component.name] = values
    return values


def _evaluate_rows(
    component: Component, arguments: Mapping[str, Any], rows: np.ndarray, report: dict[str, np.ndarray]
) -> np.ndarray:
    """Evaluate a component for some completions only; nan for the others. Shape: (B,), (B,) bool -> (B,)."""
    chosen = np.flatnonzero(rows)
    some, named = evaluate(component, _take(arguments, chosen)) if len(chosen) else (np.empty(0), {})
    for name in component.names():
        report[name] = np.full(len(rows), np.nan)
        report[name][chosen] = named.get(name, [])
    values = np.full(len(rows), np.nan)
    values[chosen] = some
    return values


def _take(arguments: Mapping[str, Any], rows: Iterable[int]) -> dict[str, Any]:
    """The arguments of some completions."""
    rows = list(rows)
    return {name: value if name in SERVICES else [value[row] for row in rows] for name, value in arguments.items()}


def _call(functions: Sequence[Component], arguments: Mapping[str, Any]) -> list[np.ndarray]:
    """Call functions, the async ones at the same time, and check what they return. Shape: (B,) each, nan for None."""
    completions = arguments["completions"]
    if not len(completions):
        return [np.empty(0) for _ in functions]
    for function in functions:
        if missing := [name for name in function.required if name not in arguments]:
            raise RewardError(
                f"reward {function.name!r} needs the column `{missing[0]}`, which this batch lacks; "
                "expected the columns that the reward was bound to"
            )
    outcomes = [_attempt(function, arguments) for function in functions]
    waiting = [f.name for f, outcome in zip(functions, outcomes, strict=True) if inspect.isawaitable(outcome)]
    with _watched(", ".join(waiting), completions):
        outcomes = settle(outcomes)
    for function, outcome in zip(functions, outcomes, strict=True):
        if isinstance(outcome, BaseException):
            _blame(function, outcome, arguments)
    return [
        _to_array(function.name, outcome, completions) for function, outcome in zip(functions, outcomes, strict=True)
    ]


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
    everything = [name for name in arguments if name not in _BY_NAME_ONLY]
    keywords = everything if component.parameters is None else component.parameters
    copies = {
        name: arguments[name] if name in SERVICES else _fresh(arguments[name]) for name in keywords if name in arguments
    }
    with _watched(component.name, arguments["completions"]):
        try:
            return component.function(**copies)
        except Exception as error:
            return error


@dataclass
class _Wait:
    """A call that has not returned."""

    name: str
    completions: Sequence[Completion]
    since: float = field(default_factory=time.monotonic)
    patience: float = field(default_factory=lambda: PATIENCE)


_waits: dict[int, _Wait] = {}  # by thread


@contextmanager
def _watched(name: str, completions: Sequence[Completion]) -> Iterator[None]:
    """Have a reward that does not return named, instead of a run that stands still without a word."""
    _watcher(os.getpid())
    thread = threading.get_ident()
    outer = _waits.get(thread)  # a combination that is called inside a reward
    _waits[thread] = _Wait(name, completions)
    try:
        yield
    finally:
        if outer is None:
            del _waits[thread]
        else:
            _waits[thread] = outer


@functools.cache
def _watcher(process: int) -> threading.Thread:
    """One thread per process, since starting one per call would cost more than most rewards do."""
    thread = threading.Thread(target=_watch, name="rewards-watcher", daemon=True)
    thread.start()
    return thread


def _watch() -> None:
    while True:
        time.sleep(min(1.0, PATIENCE / 4))
        for wait in list(_waits.values()):
            waited = time.monotonic() - wait.since
            if waited > wait.patience:
                wait.patience *= 2
                _logger.warning(
                    "reward %r has not returned after %.0f s, on a batch of %d that starts with %s. Ctrl-C stops the run; "
                    "rewards.TimeLimit(reward, seconds) would do so by itself",
                    wait.name,
                    waited,
                    len(wait.completions),
                    _show(wait.completions, 0),
                )


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
    if isinstance(error, RewardTimeout):  # asking for each completion would take as long again
        raise RewardTimeout(
            f"reward {component.name!r} {error}, on a batch of {len(completions)} that starts with "
            f"{_show(completions, 0)}; expected it to return. Remedy: see where it waits (a request without a timeout?), or "
            "allow more time"
        ) from error
    what = f"reward {component.name!r} raised {type(error).__name__}: {error}"
    expected = "expected one float (or None) per completion"
    if isinstance(error, AttributeError | IndexError | KeyError | TypeError):  # the usual signs of the other format
        form = "plain texts" if isinstance(completions[0], str) else "lists of messages"
        expected = f"{expected} (completions are {form} here, as the prompts are)"
    log = _Log()
    for index in range(len(completions)):
        single = _take(arguments, [index]) | {"log_extra": log.extra, "log_metric": log.metric}
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
