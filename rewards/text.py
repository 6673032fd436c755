"""A few plain rewards on text, one idea each; they also show how to write one.

Notation: B completions per call; every reward returns B floats, or ``None`` where it does not apply.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rewards.base import Completion, RewardError, completion_text


def exact_match(completions: Sequence[Completion], answer: Sequence[Any], **columns: Any) -> list[float | None]:
    r"""1 if the completion is the answer, up to white space around it; else 0.

    Args:
        completions: B completions.
        answer: Column of B answers; ``None`` where there is none.
        **columns: Ignored.

    Returns:
        B values, each 0, 1 or ``None``.

    Example:
        >>> exact_match(completions=[" 42\n", "43"], answer=[42, 42])
        [1.0, 0.0]
    """
    return [
        None if expected is None else float(completion_text(completion).strip() == str(expected).strip())
        for completion, expected in zip(completions, answer, strict=True)
    ]


def contains(completions: Sequence[Completion], answer: Sequence[Any], **columns: Any) -> list[float | None]:
    """1 if the answer occurs in the completion as whole words, whatever the case; else 0.

    Whole words, since otherwise the answer 12 would be found in 312.

    Args:
        completions: B completions.
        answer: Column of B answers; ``None`` where there is none.
        **columns: Ignored.

    Returns:
        B values, each 0, 1 or ``None``.

    Raises:
        RewardError: An answer is empty: it would be found anywhere.

    Example:
        >>> contains(completions=["It is Paris.", "It is 312."], answer=["paris", "12"])
        [1.0, 0.0]
    """
    rewards: list[float | None] = []
    for completion, expected in zip(completions, answer, strict=True):
        if expected is None:
            rewards.append(None)
            continue
        words = str(expected).strip()
        if not words:
            raise RewardError("the column `answer` holds an empty text; expected some words, or None")
        pattern = rf"(?<!\w){re.escape(words)}(?!\w)"
        rewards.append(float(re.search(pattern, completion_text(completion), re.IGNORECASE) is not None))
    return rewards


@dataclass(frozen=True)
class Matches:
    r"""1 if a regular expression matches the whole completion (white space around it aside), else 0.

    Args:
        pattern: In the syntax of :mod:`re`; ``.`` matches newlines too.

    Raises:
        RewardError: The pattern is no regular expression.

    Example:
        >>> Matches(r"<think>.*</think>.*\d+")(completions=["<think>6*7</think> 42", "42"])
        [1.0, 0.0]
    """

    pattern: str

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise RewardError(f"Matches got the pattern {self.pattern!r}: {error}") from error

    def __call__(self, completions: Sequence[Completion], **columns: Any) -> list[float]:
        """Score B completions."""
        return [
            float(re.fullmatch(self.pattern, completion_text(completion).strip(), re.DOTALL) is not None)
            for completion in completions
        ]


@dataclass(frozen=True)
class LengthPenalty:
    """0 up to a target length; beyond it minus the excess, in units of the target.

    So twice the target costs 1, whatever the target, and there is no reward for being shorter still.

    Args:
        target: Longest completion without a penalty, in tokens.

    Raises:
        RewardError: The target is not positive.

    Example:
        >>> LengthPenalty(target=4)(completion_ids=[[1, 2], [1, 2, 3, 4, 5]])
        [0.0, -0.25]
    """

    target: int

    def __post_init__(self) -> None:
        if self.target <= 0:
            raise RewardError(f"LengthPenalty got target={self.target}; expected a positive number of tokens")

    def __call__(self, completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float]:
        """Score B completions by their numbers of tokens."""
        return [min(0.0, 1.0 - len(ids) / self.target) for ids in completion_ids]


@dataclass(frozen=True)
class Distinct:
    """Share of distinct n-grams among the n-grams of words in a completion, in (0, 1]: 1 is no repetition.

    "distinct-n" of Li et al. (2016), https://arxiv.org/abs/1510.03055, within one completion.

    Args:
        n: Words per n-gram. A completion of fewer than n words repeats nothing and scores 1.

    Raises:
        RewardError: ``n`` is not positive.

    Example:
        >>> Distinct(n=1)(completions=["the cat sat", "no no no no"])
        [1.0, 0.25]
    """

    n: int = 2

    def __post_init__(self) -> None:
        if self.n <= 0:
            raise RewardError(f"Distinct got n={self.n}; expected a positive number of words")

    def __call__(self, completions: Sequence[Completion], **columns: Any) -> list[float]:
        """Score B completions."""
        rewards = []
        for completion in completions:
            words = completion_text(completion).split()
            ngrams = [tuple(words[i : i + self.n]) for i in range(len(words) - self.n + 1)]
            rewards.append(len(set(ngrams)) / len(ngrams) if ngrams else 1.0)
        return rewards
