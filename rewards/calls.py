"""How a reward is called: from a cache, or under a time limit.

Both wrap one function, whose name and signature they take on.
"""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import math
import pickle
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from rewards.base import SERVICES, Combination, RewardError, RewardFunction, RewardTimeout
from rewards.signatures import check_is_reward, reward_name


class _SignatureOfReward:
    """``__signature__``: an instance has that of its reward. The class has none, so that ``help`` shows its own parameters."""

    def __get__(self, instance: Any, owner: type) -> inspect.Signature | None:
        if instance is None:
            raise AttributeError("__signature__")
        try:
            return inspect.signature(instance.reward)
        except (TypeError, ValueError):
            return None


class Cached:
    """A deterministic reward that is asked once about each completion, and remembers the answer.

    What counts as the same completion is decided by everything the reward is given: prompt, completion, token ids where it
    takes them, and columns. A reward that takes ``**columns`` is given all of it.

    Args:
        reward: A function; its score must depend on its arguments alone, and for each completion on its own entries
            alone (see ``check_reward``).
        size: Completions to remember; the ones not asked about for longest are forgotten first.

    Attributes:
        hits: Completions answered from memory.
        misses: Completions that the reward was asked about.

    Raises:
        RewardError: A combination of rewards (cache the parts that are slow), or one that reads ``trainer_state``.

    Example:
        >>> WeightedSum({"quality": (Cached(ask_the_judge), 1.0), "brief": (LengthPenalty(target=32), 0.1)})
    """

    def __init__(self, reward: RewardFunction, size: int = 100_000) -> None:
        _check_function(reward, "Cached")
        if size < 1:
            raise RewardError(f"Cached got size={size}; expected at least 1")
        self.reward, self.size = reward, size
        self.hits = self.misses = 0
        self.__name__ = reward_name(reward)
        self._known: OrderedDict[bytes, Any] = OrderedDict()
        if "trainer_state" in getattr(self.__signature__, "parameters", ()):
            raise RewardError(
                f"reward {self.__name__!r} reads `trainer_state`, so its score changes as training goes on; expected one that "
                "can be cached. Remedy: do not cache it"
            )

    __signature__ = _SignatureOfReward()

    def __repr__(self) -> str:
        return f"Cached({self.reward!r}, size={self.size})"

    def __call__(self, **arguments: Any) -> Any:
        """Score B completions, of which the reward sees the new ones."""
        data = {name: values for name, values in arguments.items() if name not in SERVICES}
        services = {name: value for name, value in arguments.items() if name in SERVICES}
        count = len(next(iter(data.values())))
        keys = [_digest([(name, values[row]) for name, values in sorted(data.items())]) for row in range(count)]
        rows: dict[bytes, int] = {}  # of completions that are new; twice the same counts once
        for row, key in enumerate(keys):
            if key in self._known:
                self._known.move_to_end(key)
            else:
                rows.setdefault(key, row)
        known = {key: self._known[key] for key in keys if key not in rows}

        def learn(returned: Any) -> Any:
            values = returned.tolist() if hasattr(returned, "tolist") else returned
            if not isinstance(values, Sequence) or len(values) != len(rows):
                return returned if len(rows) == count else _refuse_count(self.__name__, values, len(rows))
            known.update(zip(rows, values, strict=True))
            for key in rows:
                self._known[key] = known[key]
            while len(self._known) > self.size:
                self._known.popitem(last=False)
            self.hits, self.misses = self.hits + count - len(rows), self.misses + len(rows)
            return [known[key] for key in keys]

        async def wait(returned: Any) -> Any:
            return learn(await returned)

        if not rows:
            return learn([])
        new = {name: [values[row] for row in rows.values()] for name, values in data.items()}
        returned = self.reward(**new, **services)
        return wait(returned) if inspect.isawaitable(returned) else learn(returned)


@dataclass(frozen=True)
class TimeLimit:
    """A reward that must return within a time, or the run stops and says which reward it was.

    Without it a run waits, and a warning names the reward after a minute. The function runs in a thread of its own. Python
    cannot end a thread: one that exceeds its time is left to itself, and goes with the program.

    Args:
        reward: A function.
        seconds: Wall-clock time for one call, on a whole batch.

    Raises:
        RewardError: A combination of rewards (limit the parts that wait), or no positive time.

    Example:
        >>> TimeLimit(ask_the_judge, seconds=30.0)
    """

    reward: RewardFunction
    seconds: float

    def __post_init__(self) -> None:
        _check_function(self.reward, "TimeLimit")
        if not 0 < self.seconds < math.inf:
            raise RewardError(f"TimeLimit got seconds={self.seconds}; expected a positive number")

    @property
    def __name__(self) -> str:
        return reward_name(self.reward)

    __signature__ = _SignatureOfReward()

    def __call__(self, **arguments: Any) -> Any:
        """Score B completions."""
        returned = self._in_time(lambda: self.reward(**arguments))
        return self._wait(returned) if inspect.isawaitable(returned) else returned

    def _in_time(self, call: Callable[[], Any]) -> Any:
        future: Future[Any] = Future()

        def run() -> None:
            try:
                future.set_result(call())
            except BaseException as error:  # to be raised in the caller's thread
                future.set_exception(error)

        threading.Thread(target=run, name=f"reward-{self.__name__}", daemon=True).start()
        try:
            return future.result(self.seconds)
        except TimeoutError:
            if future.done():
                raise  # the reward's own
            raise self._too_late() from None

    async def _wait(self, returned: Any) -> Any:
        async def wait() -> Any:
            return await returned

        task = asyncio.ensure_future(wait())
        done, _ = await asyncio.wait({task}, timeout=self.seconds)
        if not done:
            task.cancel()
            raise self._too_late()
        return task.result()

    def _too_late(self) -> RewardTimeout:
        return RewardTimeout(f"did not return within its time limit of {self.seconds:g} s")


def _check_function(reward: Any, wrapper: str) -> None:
    check_is_reward(reward)
    if isinstance(reward, Combination):
        raise RewardError(
            f"{wrapper} got a {type(reward).__name__}; expected one function. Remedy: wrap the rewards in it that are slow, "
            f'e.g. WeightedSum({{"name": ({wrapper}(reward, ...), 1.0), ...}})'
        )


def _digest(row: Any) -> bytes:
    return hashlib.blake2b(pickle.dumps(row), digest_size=16).digest()


def _refuse_count(name: str, values: Any, count: int) -> Any:
    got = f"{len(values)} values" if isinstance(values, Sequence) else f"a {type(values).__name__}"
    raise RewardError(
        f"{name!r} returned {got} for the {count} completions that were not in the cache; expected one for each"
    )
