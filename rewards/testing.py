"""A checker for rewards, to call from your own tests."""

from __future__ import annotations

import copy
import inspect
import io
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from rewards.base import Combination, RewardError, RewardFunction, shorten
from rewards.evaluate import evaluate, read_examples
from rewards.signatures import Component, read_reward


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
    max_seconds: float | None = None,
) -> RewardCheck:
    """Check that a reward behaves as an environment, and TRL, rely on.

    It must fit the columns, return one finite float (or ``None``) per completion, return the same again, leave its arguments
    as they were, and print nothing; and the score of a completion must not depend on the others in the batch, on their
    order, or on how long they are (a model that pads a batch to its longest text is the usual culprit).

    Args:
        reward: The reward.
        examples: Mappings with ``prompt``, ``completion`` and whatever columns the reward reads; ``completion_ids`` or
            ``finish_reason`` if it reads those. Two at least; odd ones (empty, very long) find more.
        independent: Set to False for a reward that compares the completions of a batch on purpose.
        tolerance: Largest difference between two scores that count as equal. Not for nothing: batched matrix
            products of another shape round differently.
        max_seconds: Longest acceptable time for all examples in one call; None for any.

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
    complaints: list[str] = []
    component = _watched(read_reward(reward, read_examples(examples)), complaints)
    name = ", ".join(component.names())

    def score(indices: Sequence[int]) -> np.ndarray:
        scores, _ = evaluate(component, read_examples([examples[index] for index in indices]))
        if complaints:
            raise RewardError(complaints[0])
        return scores

    def compare(first: np.ndarray, second: np.ndarray, what: str, remedy: str) -> None:
        for example, a, b in zip(examples, first.tolist(), second.tolist(), strict=True):
            if not (abs(a - b) <= tolerance or (math.isnan(a) and math.isnan(b))):
                raise RewardError(
                    f"reward {name!r} {what} {str(example['completion'])[:100]!r} scored {b}, not {a}; expected "
                    f"equal scores. Remedy: {remedy}"
                )

    everything = list(range(len(examples)))
    printed = io.StringIO()
    with redirect_stdout(printed):
        score(everything)  # models and caches are loaded by the first call, which is not timed
        started = time.perf_counter()
        scores = score(everything)
        seconds_per_batch = time.perf_counter() - started
        compare(scores, score(everything), "is not deterministic: on another call, the completion", "seed it")
        started = time.perf_counter()
        singles = np.concatenate([score([index]) for index in everything])
        seconds_per_completion = (time.perf_counter() - started) / len(examples)
        if independent:
            remedy = "let each score depend on its own completion alone, or pass independent=False"
            compare(
                scores, singles, "depends on the batch: alone, the completion", f"{remedy}. A model: mind its padding"
            )
            compare(scores, score(everything[::-1])[::-1], "depends on the order: in reverse, the completion", remedy)
    if text := printed.getvalue():
        raise RewardError(
            f"reward {name!r} prints {shorten(text.strip())!r}; expected silence: it is called thousands of times. Remedy: hand "
            "what you want to see to log_metric(name, value) or log_extra(column, values), which are offered as parameters"
        )
    if max_seconds is not None and seconds_per_batch > max_seconds:
        raise RewardError(
            f"reward {name!r} took {seconds_per_batch:.3g} s for {len(examples)} completions; expected at most "
            f"{max_seconds:.3g} s. Remedy: work on the whole batch at once, or see rewards.Cached"
        )
    return RewardCheck(component.names(), tuple(scores.tolist()), seconds_per_batch, seconds_per_completion)


def _watched(component: Component, complaints: list[str]) -> Component:
    """The same reward; what a function in it changes of its arguments is added to the complaints."""
    function = component.function
    if isinstance(function, Combination):
        return replace(component, parts=tuple(_watched(part, complaints) for part in component.parts))

    def watched(**keywords: Any) -> Any:
        before = {name: copy.deepcopy(value) for name, value in keywords.items() if isinstance(value, list)}

        def compare() -> None:
            complaints.extend(
                f"reward {component.name!r} changes its argument `{name}`; expected it unchanged, since TRL hands the same "
                "lists to the next reward. Remedy: work on a copy"
                for name, value in before.items()
                if not _equal(keywords[name], value)
            )

        async def wait(returned: Any) -> Any:
            settled = await returned
            compare()
            return settled

        returned = function(**keywords)
        if inspect.isawaitable(returned):
            return wait(returned)
        compare()
        return returned

    return replace(component, function=watched)


def _equal(a: Any, b: Any) -> bool:
    """Whether two nested lists are equal; arrays and tensors in them are compared by value."""
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))
    return bool(np.all(a == b))
