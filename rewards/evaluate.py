"""Calling rewards: each with copies of what it asks for, and what it returns is checked, or the run stops.

Notation: B completions per call; a value is nan (outside: ``None``) where a reward does not apply.
"""

from __future__ import annotations

import copy
import inspect
import math
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np

from rewards.base import (
    SERVICES,
    Combination,
    Completion,
    RewardError,
    RewardTimeout,
    TrainerState,
    shorten,
    show,
)
from rewards.signatures import BY_NAME_ONLY, Component
from rewards.waiting import settle, watched

SILENT: dict[str, Callable[..., None]] = {
    "log_extra": lambda column, values: None,
    "log_metric": lambda name, value: None,
}
"""A trainer's services, where nothing is to be logged."""


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
    with watched(", ".join(waiting), completions):
        outcomes = settle(outcomes)
    for function, outcome in zip(functions, outcomes, strict=True):
        if isinstance(outcome, BaseException):
            _blame(function, outcome, arguments)
    return [
        _to_array(function.name, outcome, completions) for function, outcome in zip(functions, outcomes, strict=True)
    ]


def _attempt(component: Component, arguments: Mapping[str, Any]) -> Any:
    """Call a component with copies; return its result (awaitable, if it is async) or its exception."""
    everything = [name for name in arguments if name not in BY_NAME_ONLY]
    keywords = everything if component.parameters is None else component.parameters
    copies = {
        name: arguments[name] if name in SERVICES else _fresh(arguments[name]) for name in keywords if name in arguments
    }
    with watched(component.name, arguments["completions"]):
        try:
            return component.function(**copies)
        except Exception as error:
            return error


_PLAIN = (str, int, float, bytes, type(None))
"""Types of values that nobody can change."""


def _fresh(value: Any) -> Any:
    """A copy that a reward may change as it likes."""
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, (list, tuple)):  # a tuple becomes a list: rewards are promised lists
        plain = set(map(type, value)).issubset(_PLAIN)  # token ids, say: many
        return list(value) if plain else [_fresh(item) for item in value]
    if type(value) is dict:
        return {key: _fresh(item) for key, item in value.items()}
    return copy.deepcopy(value)


def _blame(component: Component, error: BaseException, arguments: Mapping[str, Any]) -> NoReturn:
    """Raise a RewardError that says which completion made a component raise."""
    completions = arguments["completions"]
    if isinstance(error, RewardTimeout):  # asking for each completion would take as long again
        raise RewardTimeout(
            f"reward {component.name!r} {error}, on a batch of {len(completions)} that starts with "
            f"{show(completions, 0)}; expected it to return. Remedy: see where it waits (a request without a timeout?), or "
            "allow more time"
        ) from error
    what = f"reward {component.name!r} raised {type(error).__name__}: {error}"
    expected = "expected one float (or None) per completion"
    if isinstance(error, AttributeError | IndexError | KeyError | TypeError):  # the usual signs of the other format
        form = "plain texts" if isinstance(completions[0], str) else "lists of messages"
        expected = f"{expected} (completions are {form} here, as the prompts are)"
    for index in range(len(completions)):
        single = _take(arguments, [index]) | SILENT
        if len(completions) > 1:
            (outcome,) = settle([_attempt(component, single)])
            if not isinstance(outcome, BaseException):
                continue
            if type(outcome) is type(error):
                error = outcome
        raise RewardError(
            f"{what}\n  on {show(completions, index)}; {expected}. Remedy: handle such completions in the "
            "reward (its own traceback is above)"
        ) from error
    raise RewardError(
        f"{what}\n  on a batch of {len(completions)} completions, though on none of them alone (the first is "
        f"{show(completions, 0)}); {expected}. Remedy: call the reward with several entries to reproduce it"
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
            f"that starts with {show(completions, 0)}; {expected}. Remedy: {remedy}"
        )
    if len(values) != count:
        raise RewardError(
            f"reward {name!r} returned {len(values)} values for {count} completions, the first of them "
            f"{show(completions, 0)}; {expected}. Remedy: do not skip or repeat completions; return None "
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
                f"reward {name!r} returned {problem} for {show(completions, index)}; expected a finite "
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
    for example in examples:
        if not isinstance(example, Mapping):
            raise RewardError(
                f'expected a list of examples such as {{"prompt": ..., "completion": ...}}, got {shorten(repr(example))} in it'
            )
    names = set(examples[0]) if examples else {"prompt", "completion"}
    for number, example in enumerate(examples):
        if set(example) != names or not {"prompt", "completion"} <= names:
            raise RewardError(
                f"example {number} has the entries {sorted(example)}; expected `prompt`, `completion` and the "
                f"same columns in each (the first has {sorted(names)})"
            )
    columns = {_PLURALS.get(name, name): [_fresh(example[name]) for example in examples] for name in sorted(names)}
    return {**columns, "trainer_state": TrainerState(), **SILENT}
