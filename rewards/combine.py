"""Rewards added up, each with a name and a weight."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rewards.base import (
    Completion,
    RewardError,
    RewardFunction,
    check_is_reward,
    read_components,
    score_components,
    weighted_total,
)


@dataclass(frozen=True)
class WeightedSum:
    """A weighted sum of rewards; a reward itself, so sums nest and work wherever one function does.

    A component that returns ``None`` for a completion is left out of that completion's sum. Under an
    environment each component reaches ``info["reward/<name>"]`` (unweighted; nested ones as ``outer/inner``).

    Args:
        rewards: Name -> (reward, weight).

    Raises:
        RewardError: No reward at all, a name that is no text, something that is no reward, or a weight
            that is no finite number.

    Example:
        >>> WeightedSum({"match": (exact_match, 1.0), "brief": (LengthPenalty(target=32), 0.1)})
    """

    rewards: Mapping[str, tuple[RewardFunction, float]]

    def __post_init__(self) -> None:
        form = 'expected WeightedSum({"name": (reward, weight), ...})'
        if not isinstance(self.rewards, Mapping):
            raise RewardError(f"WeightedSum got a {type(self.rewards).__name__}; {form}")
        if not self.rewards:
            raise RewardError(f"WeightedSum got no reward; {form}")
        checked: dict[str, tuple[RewardFunction, float]] = {}
        for name, entry in self.rewards.items():
            if not isinstance(name, str) or not name:
                raise RewardError(f"WeightedSum got the name {name!r}; expected a non-empty text. {form}")
            if not isinstance(entry, (tuple, list)) or len(entry) != 2:
                raise RewardError(f"WeightedSum got {entry!r} under {name!r}; expected a pair (reward, weight)")
            reward: Any = entry[0]
            weight: Any = entry[1]
            check_is_reward(reward, name)
            if isinstance(weight, bool) or not isinstance(weight, numbers.Real) or not math.isfinite(weight):
                raise RewardError(f"WeightedSum got the weight {weight!r} for {name!r}; expected a finite number")
            checked[name] = (reward, float(weight))
        object.__setattr__(self, "rewards", checked)  # a copy: later changes to the caller's dict have no effect

    def reward_components(self) -> Iterator[tuple[str, RewardFunction, float]]:
        """Yield (name, function, weight) of every plain function in the sum."""
        for name, (reward, weight) in self.rewards.items():
            if isinstance(reward, WeightedSum):
                for inner, function, factor in reward.reward_components():
                    yield f"{name}/{inner}", function, weight * factor
            else:
                yield name, reward, weight

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
            B sums; ``None`` where no component applies.

        Raises:
            RewardError: As :func:`rewards.bind` and the reward it makes.
        """
        arguments = {
            "completions": completions,
            "prompts": prompts,
            "completion_ids": completion_ids,
            **columns,
        }
        arguments = {name: value for name, value in arguments.items() if value is not None}
        components = read_components(self, arguments)
        total = weighted_total(components, score_components(components, arguments))
        return [None if math.isnan(value) else value for value in total.tolist()]
