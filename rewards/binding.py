"""What an environment holds: a reward bound to the columns of its prompts, which turns a :class:`Batch` into :class:`Scores`."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rewards.base import Completion, RewardError, RewardFunction, TrainerState, show
from rewards.evaluate import evaluate
from rewards.signatures import BY_NAME_ONLY, Component, read_reward

_KEYWORDS = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric", *BY_NAME_ONLY)

# TRL withholds these columns: the plural keywords carry their content.
_WITHHELD = frozenset({"prompt", "completion", "completion_ids"})


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
                f"{show(batch.completions, int(index))}; expected at least one float. None means "
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
