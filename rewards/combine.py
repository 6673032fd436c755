"""Rewards made of other rewards: added up, clipped, scaled, gated, averaged.

Each is a reward itself, so they nest; and each keeps the names of its parts, so that all of them reach the info, the log
and the picture. Notation: B completions per call; a value is nan (outside: ``None``) where a reward does not apply.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from rewards.base import Combination, RewardError, RewardFunction, did_you_mean
from rewards.evaluate import evaluate, read_examples
from rewards.signatures import check_is_reward, read_reward


@dataclass(frozen=True)
class WeightedSum(Combination):
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
            check_is_reward(entry[0], name)
            checked[name] = (entry[0], _finite(entry[1], f"WeightedSum got the weight {entry[1]!r} for {name!r}"))
        object.__setattr__(self, "rewards", checked)  # a copy: later changes to the caller's dict have no effect

    def _flat(self) -> Iterator[tuple[str, RewardFunction, float]]:
        """(name, reward, weight) of each summand that is no sum itself."""
        for name, (reward, weight) in self.rewards.items():
            if isinstance(reward, WeightedSum):
                for inner, part, factor in reward._flat():
                    yield f"{name}/{inner}", part, weight * factor
            else:
                yield name, reward, weight

    def reward_parts(self) -> Iterator[tuple[str, RewardFunction]]:
        """The summands; those of a sum within the sum stand for it."""
        return ((name, reward) for name, reward, _ in self._flat())

    def combine(self, values: np.ndarray) -> np.ndarray:
        """Add up what applies, as TRL does. Shape: (parts, B) -> (B,)."""
        applies = ~np.isnan(values)
        total = np.array([weight for _, _, weight in self._flat()]) @ np.where(applies, values, 0.0)
        if not np.isfinite(total).all():  # nan too: infinity minus infinity
            raise RewardError(
                "the weighted sum of the rewards overflows; expected finite totals. Scale the rewards down"
            )
        return np.where(applies.any(axis=0), total, np.nan)


@dataclass(frozen=True)
class Clipped(Combination):
    """A reward within bounds: what lies outside is set to the nearer bound.

    Args:
        reward: The reward.
        low: Lower bound; None for none.
        high: Upper bound; None for none.

    Raises:
        RewardError: No bound at all, or ``low`` above ``high``.

    Example:
        >>> Clipped(RewardModel.from_pretrained("runs/reward"), low=-5.0, high=5.0)
    """

    reward: RewardFunction
    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        check_is_reward(self.reward)
        bounds = [
            _finite(bound, f"Clipped got {name}={bound!r}")
            for name, bound in (("low", self.low), ("high", self.high))
            if bound is not None
        ]
        if not bounds or bounds != sorted(bounds):
            raise RewardError(
                f"Clipped got low={self.low} and high={self.high}; expected at least one, and low <= high"
            )

    def reward_parts(self) -> Iterator[tuple[str, RewardFunction]]:
        """The reward, which keeps its names."""
        yield "", self.reward

    def combine(self, values: np.ndarray) -> np.ndarray:
        """Clip. Shape: (1, B) -> (B,)."""
        return np.clip(values[0], self.low, self.high)


@dataclass(frozen=True)
class Normalized(Combination):
    """A reward in units of how it varies over the reference model's own samples: ``(reward - mean) / std``.

    Then 0 is what the reference gets on average, and a KL coefficient means the same whatever the reward's scale.

    Args:
        reward: The reward.
        mean: What becomes 0.
        std: What becomes 1.

    Raises:
        RewardError: ``std`` is not positive.

    Example:
        >>> prompts = envs.unwrapped.task.prompts.prompts[:256]
        >>> samples = [{"prompt": p, "completion": c} for p, c in zip(prompts, agent.generate(prompts))]  # before training
        >>> reward = Normalized.fit(reward_model, samples)
    """

    reward: RewardFunction
    mean: float
    std: float

    def __post_init__(self) -> None:
        check_is_reward(self.reward)
        _finite(self.mean, f"Normalized got mean={self.mean!r}")
        if _finite(self.std, f"Normalized got std={self.std!r}") <= 0:
            raise RewardError(f"Normalized got std={self.std}; expected a positive number")

    @classmethod
    def fit(cls, reward: RewardFunction, samples: Sequence[Mapping[str, Any]]) -> Normalized:
        """Take mean and standard deviation from samples of the reference model.

        Args:
            reward: The reward.
            samples: Mappings with ``prompt``, ``completion`` and whatever columns the reward reads. Where the reward does
                not apply they do not count.

        Returns:
            The normalised reward.

        Raises:
            RewardError: Fewer than two samples that count, or all of them get the same reward.
        """
        arguments = read_examples(samples)
        scores, _ = evaluate(read_reward(reward, arguments), arguments)
        scores = scores[~np.isnan(scores)]
        if len(scores) < 2 or not scores.std() > 0:
            raise RewardError(
                f"Normalized.fit got {len(scores)} samples with {len(set(scores.tolist()))} different rewards; expected at "
                "least two that differ. Remedy: more samples, or another reward: this one tells none of them apart"
            )
        return cls(reward, float(scores.mean()), float(scores.std(ddof=1)))

    def reward_parts(self) -> Iterator[tuple[str, RewardFunction]]:
        """The reward, which keeps its names."""
        yield "", self.reward

    def combine(self, values: np.ndarray) -> np.ndarray:
        """Shift and scale. Shape: (1, B) -> (B,)."""
        return (values[0] - self.mean) / self.std


@dataclass(frozen=True)
class Gate(Combination):
    """A reward that counts only if a condition passes.

    The reward is not even called for the other completions, so it may rely on the condition (and may be slow). The
    condition reaches the info under its own name, and is not paid.

    Args:
        condition: A reward that passes where it is above 0. Where it does not apply, there is no gate.
        reward: What is paid behind the gate.
        otherwise: What is paid before it.
        name: Of the condition.

    Raises:
        RewardError: Something is no reward, or no number.

    Example:
        >>> Gate(valid_json, has_the_right_fields, otherwise=-1.0, name="json")
    """

    conditional: ClassVar[bool] = True

    condition: RewardFunction
    reward: RewardFunction
    otherwise: float = 0.0
    name: str = "gate"

    def __post_init__(self) -> None:
        check_is_reward(self.condition, self.name)
        check_is_reward(self.reward)
        _finite(self.otherwise, f"Gate got otherwise={self.otherwise!r}")

    def reward_parts(self) -> Iterator[tuple[str, RewardFunction]]:
        """The condition, and the reward, which keeps its names."""
        yield self.name, self.condition
        yield "", self.reward

    def passes(self, values: np.ndarray) -> np.ndarray:
        """Above 0, or not applicable. Shape: (B,) -> (B,)."""
        return np.isnan(values) | (values > 0)

    def combine(self, values: np.ndarray) -> np.ndarray:
        """The reward where the condition passes. Shape: (2, B) -> (B,)."""
        return np.where(self.passes(values[0]), values[1], self.otherwise)


@dataclass(frozen=True)
class MissingStop(Combination):
    """A reward that minds whether a completion has ended by itself, or was cut off by the token budget.

    What is cut off has no end to judge, and a reward model has seen none without: Ziegler et al. (2019,
    https://arxiv.org/abs/1909.08593) pay it a constant instead. The share of completions that lack their stop token reaches
    the info as ``missing_stop``. It needs an environment of textenv: TRL does not say why a completion has ended.

    Args:
        reward: The reward.
        replace: Paid instead of the reward where the stop token is missing.
        subtract: Or: taken off the reward there.

    Raises:
        RewardError: Not exactly one of the two.

    Example:
        >>> MissingStop(reward_model, replace=-1.0)
    """

    reward: RewardFunction
    replace: float | None = None
    subtract: float | None = None

    def __post_init__(self) -> None:
        check_is_reward(self.reward)
        if (self.replace is None) == (self.subtract is None):
            raise RewardError(
                f"MissingStop got replace={self.replace} and subtract={self.subtract}; expected one of them, "
                "e.g. MissingStop(reward, replace=-1.0)"
            )
        amount = self.replace if self.subtract is None else self.subtract
        _finite(amount, f"MissingStop got {amount!r}")

    def reward_parts(self) -> Iterator[tuple[str, RewardFunction]]:
        """The reward, which keeps its names, and 1 for each completion without its stop token."""
        yield "", self.reward
        yield "missing_stop", missing_stop

    def combine(self, values: np.ndarray) -> np.ndarray:
        """Subtract or replace. Shape: (2, B) -> (B,)."""
        reward, missing = values
        if self.subtract is not None:
            return reward - self.subtract * missing
        return np.where(missing > 0, float(self.replace or 0.0), reward)


@dataclass(frozen=True)
class Ensemble(Combination):
    """Several rewards for one thing, reward models with different seeds for instance, as one.

    ``"worst"`` pays the lowest of them: what pleases one model by its mistake rarely pleases all (Coste et al. 2023,
    https://arxiv.org/abs/2310.02743). They should have one scale: see :class:`Normalized`.

    Args:
        rewards: Two or more; a mapping gives them names, else they are called ``0``, ``1``, ...
        by: ``"mean"`` or ``"worst"``. One that does not apply to a completion is left out there.

    Raises:
        RewardError: Fewer than two rewards, or an unknown ``by``.

    Example:
        >>> Ensemble([RewardModel.from_pretrained(f"runs/reward-{seed}") for seed in range(3)], by="worst")
    """

    rewards: Mapping[str, RewardFunction] | Sequence[RewardFunction]
    by: str = "mean"

    def __post_init__(self) -> None:
        if self.by not in ("mean", "worst"):
            hint = did_you_mean(self.by, ("mean", "worst")) if isinstance(self.by, str) else ""
            raise RewardError(f"Ensemble got by={self.by!r}; expected 'mean' or 'worst'.{hint}")
        members = self.rewards
        if not isinstance(members, Mapping):
            if not isinstance(members, (list, tuple)):
                raise RewardError(f"Ensemble got a {type(members).__name__}; expected a list of rewards, or a mapping")
            members = {str(number): reward for number, reward in enumerate(members)}
        if len(members) < 2:
            raise RewardError(f"Ensemble got {len(members)} reward(s); expected at least two")
        for name, reward in members.items():
            check_is_reward(reward, name)
        object.__setattr__(self, "rewards", dict(members))

    def reward_parts(self) -> Iterator[tuple[str, RewardFunction]]:
        """The members."""
        assert isinstance(self.rewards, dict)
        yield from self.rewards.items()

    def combine(self, values: np.ndarray) -> np.ndarray:
        """Mean or minimum of what applies. Shape: (members, B) -> (B,)."""
        applies = ~np.isnan(values)
        if self.by == "worst":
            combined = np.where(applies, values, np.inf).min(axis=0)
        else:
            combined = np.where(applies, values, 0.0).sum(axis=0) / np.maximum(applies.sum(axis=0), 1)
        return np.where(applies.any(axis=0), combined, np.nan)


def missing_stop(finish_reasons: Sequence[str]) -> list[float]:
    """1 for each completion that was cut off by the token budget, else 0.

    Args:
        finish_reasons: B times ``"stop"`` or ``"length"``.

    Returns:
        B values.
    """
    return [float(reason != "stop") for reason in finish_reasons]


def _finite(value: Any, got: str) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise RewardError(f"{got}; expected a finite number")
    return float(value)
