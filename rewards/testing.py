"""A checker for rewards, to call from your own tests."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rewards.base import (
    RewardError,
    RewardFunction,
    TrainerState,
    read_components,
    score_components,
    settle,
    weighted_total,
)

_PLURALS = {"prompt": "prompts", "completion": "completions"}


@dataclass(frozen=True)
class RewardCheck:
    """What :func:`check_reward` found.

    Args:
        names: The components.
        scores: The total of each example; nan where the reward does not apply.
        seconds_per_batch: Time for all examples in one call.
        seconds_per_completion: Mean time for one example in a call of its own.
    """

    names: tuple[str, ...]
    scores: tuple[float, ...]
    seconds_per_batch: float
    seconds_per_completion: float


def check_reward(
    reward: RewardFunction,
    examples: Sequence[Mapping[str, Any]],
    *,
    independent: bool = True,
    tolerance: float = 1e-5,
) -> RewardCheck:
    """Check that a reward behaves as an environment, and TRL, rely on.

    It must fit the columns, return one finite float (or ``None``) per completion, return the same again, and leave
    its arguments as they were; and the score of a completion must not depend on the others in the batch or on their
    order.

    Args:
        reward: The reward.
        examples: Mappings with ``prompt``, ``completion`` and whatever columns the reward reads; ``completion_ids``
            if it reads those. Two at least; odd ones (empty, very long) find more.
        independent: Set to False for a reward that compares the completions of a batch on purpose.
        tolerance: Largest difference between two scores that count as equal. Not for nothing: batched matrix
            products of another shape round differently.

    Returns:
        Scores and timings.

    Raises:
        RewardError: The reward fails one of the checks; the message says which and on what.

    Example:
        >>> examples = [{"prompt": "6*7=", "completion": text, "answer": "42"} for text in ("42", "")]
        >>> check_reward(exact_match, examples).scores
        (1.0, 0.0)
    """
    if len(examples) < 2:
        raise RewardError(f"check_reward got {len(examples)} examples; expected at least two, to compare")
    columns = set(examples[0])
    for number, example in enumerate(examples):
        if set(example) != columns or not {"prompt", "completion"} <= columns:
            raise RewardError(
                f"example {number} has the entries {sorted(example)}; expected `prompt`, `completion` and the "
                f"same columns in each (the first has {sorted(columns)})"
            )
    check = _Check(reward, examples)
    everything = list(range(len(examples)))

    started = time.perf_counter()
    scores = check.score(everything)
    seconds_per_batch = time.perf_counter() - started
    check.compare(scores, check.score(everything), tolerance, "is not deterministic: a second call", "seed it")
    check.leaves_arguments_alone()
    started = time.perf_counter()
    singles = np.concatenate([check.score([index]) for index in everything])
    seconds_per_completion = (time.perf_counter() - started) / len(examples)
    if independent:
        remedy = "let each score depend on its own completion alone, or pass independent=False"
        check.compare(scores, singles, tolerance, "depends on the batch: alone, the completion", remedy)
        backwards = check.score(everything[::-1])[::-1]
        check.compare(scores, backwards, tolerance, "depends on the order: in reverse, the completion", remedy)
    return RewardCheck(
        names=tuple(component.name for component in check.components),
        scores=tuple(float(value) for value in scores),
        seconds_per_batch=seconds_per_batch,
        seconds_per_completion=seconds_per_completion,
    )


class _Check:
    """A reward and its examples."""

    def __init__(self, reward: RewardFunction, examples: Sequence[Mapping[str, Any]]) -> None:
        self.examples = examples
        self.components = read_components(reward, self.arguments([0]))

    def arguments(self, indices: Sequence[int]) -> dict[str, Any]:
        columns = {
            _PLURALS.get(name, name): [copy.deepcopy(self.examples[index][name]) for index in indices]
            for name in self.examples[0]
        }
        return {
            **columns,
            "trainer_state": TrainerState(),
            "log_extra": lambda column, values: None,
            "log_metric": lambda name, value: None,
        }

    def score(self, indices: Sequence[int]) -> np.ndarray:
        arguments = self.arguments(indices)
        return weighted_total(self.components, score_components(self.components, arguments))

    def compare(self, first: np.ndarray, second: np.ndarray, tolerance: float, what: str, remedy: str) -> None:
        names = ", ".join(component.name for component in self.components)
        for example, a, b in zip(self.examples, first.tolist(), second.tolist(), strict=True):
            if not (abs(a - b) <= tolerance or (math.isnan(a) and math.isnan(b))):
                raise RewardError(
                    f"reward {names!r} {what} {str(example['completion'])[:100]!r} scored {b}, not {a}; expected "
                    f"equal scores. Remedy: {remedy}"
                )

    def leaves_arguments_alone(self) -> None:
        for component in self.components:
            arguments = self.arguments(range(len(self.examples)))
            before = copy.deepcopy({name: value for name, value in arguments.items() if isinstance(value, list)})
            # score_components hands out copies; call the function itself, with what it may not change
            keywords = arguments if component.parameters is None else component.parameters
            settle([component.function(**{name: arguments[name] for name in keywords if name in arguments})])
            for name, value in before.items():
                if not _equal(arguments[name], value):
                    raise RewardError(
                        f"reward {component.name!r} changes its argument `{name}`; expected it unchanged, since TRL "
                        "hands the same lists to the next reward. Remedy: work on a copy"
                    )


def _equal(a: Any, b: Any) -> bool:
    """Whether two nested lists are equal; arrays and tensors in them are compared by value."""
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))
    return bool(np.all(a == b))
