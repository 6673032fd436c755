"""Deferred settlement: the same Gym loop, scored at its end in one batch.

    with envs.unwrapped.deferred(episodes=256) as ledger:
        observations, info = envs.reset()
        while not ledger.done:
            observations, *_ = envs.step(policy.act(observations))
    ledger.episodes

Exactly B episodes are *started*, and all of them are finished: waiting for the first B to finish instead would
over-represent short responses. When the last has started, lanes are no longer refilled and the active batch shrinks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from textenv.env import TextVectorEnv

FLOATS = NDArray[np.float64]
INTS = NDArray[np.int64]


@dataclass(frozen=True)
class Episode:
    """One finished episode; its arrays are as long as the episode."""

    lane: int
    """The lane it ran in."""
    order: int
    """Its place in the order of starts, 0 to B - 1."""
    prompt_id: int
    """Row of the prompt data set."""
    group_id: int
    """Episodes of one group share it (-1 where `group_size` is 1)."""
    tokens: INTS
    """Prompt and response."""
    prompt_length: int
    """Tokens."""
    response_length: int
    """Tokens, the stop token included."""
    finish_reason: str
    """`"stop"` or `"length"`."""
    log_probs: FLOATS
    """Of each response token under the attached policy (nan without one), nats."""
    ref_log_probs: FLOATS
    """Of each response token under the reference (nan where it was not needed), nats."""
    kl: float
    """Sum of `log_probs - ref_log_probs`, nats (nan without a policy)."""
    rewards: FLOATS
    """Paid at each transition: the KL penalty, and the task reward on the last."""
    task_reward: float
    """What the reward function returned."""


@dataclass(frozen=True)
class Episodes:
    """B episodes as columns, in order of start. Index or iterate it for single `Episode`s.

    Shapes: (B,) for scalars; (B, L) `tokens`, padded with V; (B, T) for `log_probs`, `ref_log_probs` and `rewards`,
    padded with 0, T = the response budget. Units as in `Episode`.
    """

    lane: INTS
    order: INTS
    prompt_id: INTS
    group_id: INTS
    tokens: INTS
    prompt_length: INTS
    response_length: INTS
    finish_reason: NDArray[np.object_]
    log_probs: FLOATS
    ref_log_probs: FLOATS
    kl: FLOATS
    rewards: FLOATS
    task_reward: FLOATS
    components: dict[str, FLOATS]
    """Reward components by name; nan where one was not applicable. Each (B,)."""

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, i: int) -> Episode:
        n, m = int(self.response_length[i]), int(self.prompt_length[i])
        return Episode(
            lane=int(self.lane[i]),
            order=int(self.order[i]),
            prompt_id=int(self.prompt_id[i]),
            group_id=int(self.group_id[i]),
            tokens=self.tokens[i, : m + n].copy(),
            prompt_length=m,
            response_length=n,
            finish_reason=str(self.finish_reason[i]),
            log_probs=self.log_probs[i, :n].copy(),
            ref_log_probs=self.ref_log_probs[i, :n].copy(),
            kl=float(self.kl[i]),
            rewards=self.rewards[i, :n].copy(),
            task_reward=float(self.task_reward[i]),
        )

    def __iter__(self) -> Iterator[Episode]:
        return (self[i] for i in range(len(self)))

    @staticmethod
    def concatenate(parts: Sequence[Episodes]) -> Episodes:
        """Several batches from one environment as one, numbered anew."""
        columns: dict[str, Any] = {
            field.name: np.concatenate([getattr(part, field.name) for part in parts])
            for field in fields(Episodes)
            if field.name not in ("order", "components")
        }
        names = dict.fromkeys(name for part in parts for name in part.components)
        components = {
            name: np.concatenate([part.components.get(name, np.full(len(part), np.nan)) for part in parts])
            for name in names
        }
        return Episodes(order=np.arange(sum(map(len, parts))), components=components, **columns)

    @property
    def mask(self) -> NDArray[np.bool_]:
        """True at response tokens. Shape: (B, T)."""
        return np.arange(self.rewards.shape[1]) < self.response_length[:, None]


class Ledger:
    """What happens inside a `deferred` block, until it is settled."""

    def __init__(self, env: TextVectorEnv, episodes: int) -> None:
        if isinstance(episodes, bool) or not isinstance(episodes, int | np.integer) or episodes < 1:
            raise ValueError(f"Expected deferred(episodes=...) to be a positive integer, got {episodes!r}.")
        self._env, self.size = env, int(episodes)
        self._episodes: Episodes | None = None
        self.clear()

    def clear(self) -> None:
        """Forget everything: a reset inside the block starts all over."""
        size, width, budget = self.size, self._env.max_tokens, self._env.task.max_new_tokens
        self.started = self.finished = 0
        self.index = np.full(self._env.num_envs, -1)  # lane -> the episode it is busy with
        self._ints = {
            name: np.full(size, -1, np.int64)
            for name in ("lane", "prompt_id", "group_id", "prompt_length", "response_length")
        }
        self._tokens = np.full((size, width), self._env.vocab_size, np.int64)
        self._reasons = np.full(size, None, object)
        self._log_probs = np.zeros((size, budget))
        self._beta = np.zeros(size)

    @property
    def done(self) -> bool:
        """Whether all episodes have finished."""
        return self.finished == self.size

    @property
    def full(self) -> bool:
        """Whether all episodes have started."""
        return self.started == self.size

    @property
    def episodes(self) -> Episodes:
        """The settled episodes, after the block.

        Raises:
            RuntimeError: Inside the block, or after a block that an exception ended.
        """
        if self._episodes is None:
            raise RuntimeError(
                "The episodes are settled when the `with ... deferred(...)` block ends; they are not known before."
            )
        return self._episodes

    def start(self, lanes: INTS, prompt_id: INTS, group_id: INTS, prompt_length: INTS, beta: FLOATS) -> None:
        """These lanes have each begun an episode. Shapes: (M,) each."""
        i = self.index[lanes] = np.arange(self.started, self.started + len(lanes))
        self._ints["lane"][i], self._ints["prompt_id"][i], self._ints["group_id"][i] = lanes, prompt_id, group_id
        self._ints["prompt_length"][i], self._beta[i] = prompt_length, beta
        self.started += len(lanes)

    def record(self, lanes: INTS, step: INTS, log_probs: FLOATS) -> None:
        """Log-probabilities of the tokens that `lanes` have just emitted as their `step`-th. Shapes: (M,) each."""
        self._log_probs[self.index[lanes], step] = log_probs

    def finish(self, lanes: INTS, tokens: INTS, response_length: INTS, reasons: NDArray[np.object_]) -> None:
        """These lanes' episodes have ended. Shapes: (M,), (M, L), (M,), (M,)."""
        i = self.index[lanes]
        self._tokens[i], self._ints["response_length"][i], self._reasons[i] = tokens, response_length, reasons
        self.index[lanes] = -1
        self.finished += len(lanes)

    def __enter__(self) -> Ledger:
        self._env._open(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        self._env._close(self)
        if kind is not None:
            return  # a broken rollout is not scored
        if not self.done:
            raise RuntimeError(
                f"The deferred block was left with {self.finished} of {self.size} episodes finished: step until ledger.done."
            )
        self._settle()

    def _settle(self) -> None:
        """Score all episodes: the reference and the reward see them in one batch each."""
        env, n, m = self._env, self._ints["response_length"], self._ints["prompt_length"]
        mask = np.arange(self._log_probs.shape[1]) < n[:, None]
        has_policy = env.kl.policy is not None
        ref = np.full(mask.shape, np.nan)
        if env.needs_reference:
            ref[:, : n.max()] = env.reference.score(self._tokens, m, n)
        ref[~mask] = 0.0
        log_probs = np.where(mask, self._log_probs if has_policy else np.nan, 0.0)
        log_ratio = log_probs - ref
        penalty = np.zeros(mask.shape)
        rows, columns = np.nonzero(mask)
        penalty[rows, columns] = env.kl.paid(
            self._beta[rows], log_ratio[rows, columns] if has_policy else None, ref[rows, columns]
        )
        scores = env._score(self._tokens, m, n, self._ints["prompt_id"])
        rewards = penalty
        rewards[np.arange(self.size), n - 1] += scores.total
        self._episodes = Episodes(
            order=np.arange(self.size),
            tokens=self._tokens,
            finish_reason=self._reasons,
            log_probs=log_probs,
            ref_log_probs=ref,
            kl=log_ratio.sum(axis=1),
            rewards=rewards,
            task_reward=scores.total,
            components=scores.components,
            **self._ints,
        )
        if has_policy:
            env.kl.controller.observe(self._episodes.kl)
