"""What a reward asks for: read from its signature, once, so that what nothing provides is an error at the start.

A :class:`Component` is a reward that has been read; :func:`rewards.evaluate.evaluate` calls it.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NoReturn

from rewards.base import Combination, RewardError, RewardFunction, did_you_mean, shorten

# Ours alone, so given only to rewards that name it: what takes `**kwargs` gets exactly what TRL would give.
BY_NAME_ONLY = frozenset({"finish_reasons"})


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
    named = BY_NAME_ONLY & set(parameters)  # a reward that takes everything must name it all the same
    taken = None if takes_everything and not named else tuple([*available, *named] if takes_everything else parameters)
    return Component(name, reported, function, taken, tuple(required))


def _refuse_parameter(name: str, parameter: str, available: list[str]) -> NoReturn:
    raise RewardError(
        f"reward {name!r} requires the parameter `{parameter}`, which nothing provides; expected one of "
        f"{', '.join(f'`{known}`' for known in available)}.{did_you_mean(parameter, available)} "
        f"Remedy: rename the parameter, add a column `{parameter}` to the prompts, or give it a default"
    )
