"""What a reward is, how it is called, and what happens when it is wrong.

A reward is any callable with the signature that TRL uses: it is called by keyword with lists of one entry per
completion (``prompts``, ``completions``, ``completion_ids``, and every further column of the prompt data
set) and returns one float per completion, or ``None`` where it does not apply::

    def brevity(completions, **columns):
        return [-len(completion.split()) / 10 for completion in completions]

:func:`rewards.bind` reads the signature once (``signatures.py``) and gives a :class:`rewards.BoundReward`, which turns a
:class:`rewards.Batch` into :class:`rewards.Scores` (``binding.py``). Rewards are called, and what they return is checked, in
``evaluate.py``; ``waiting.py`` is for the async and the slow. Whatever a reward does wrong ends in a :class:`RewardError` with
the name of the reward, the completion it failed on, what was expected and what to do about it. Nothing is ever scored 0 in
silence: a zero is a reward like any other, and an agent would learn from it.
"""

from __future__ import annotations

import difflib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import numpy as np

RewardFunction: TypeAlias = Callable[..., Any]
"""Called by keyword with lists of B entries; returns (or, if async, resolves to) B floats or ``None``s."""

Completion: TypeAlias = str | list[dict[str, Any]]
"""Text, or the messages of a conversation: ``[{"role": "assistant", "content": "..."}]``."""

# What a trainer offers beside the columns. Not data, so never copied. (`environments` is TRL's alone; it gets
# here only when a WeightedSum runs inside TRL.)
SERVICES = frozenset({"trainer_state", "log_extra", "log_metric", "environments"})


class RewardError(ValueError):
    """A reward is written, combined or called wrongly; the message says which, where, and what to do."""


class RewardTimeout(RewardError):
    """A reward did not return within its time limit."""


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
        from rewards.evaluate import evaluate  # here, since both know what a Combination is
        from rewards.signatures import read_reward

        total, _ = evaluate(read_reward(self, arguments), arguments)
        return [None if math.isnan(value) else value for value in total.tolist()]


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


def show(completions: Sequence[Completion], index: int) -> str:
    """One of a batch of completions, for an error message."""
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
