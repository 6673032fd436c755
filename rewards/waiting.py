"""Waiting for rewards: async ones all at the same time, and the one that does not return is named."""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from rewards.base import Completion, show

PATIENCE = 60.0
"""Seconds after which a reward that has not returned is named in a warning (and again after twice as many, and so on)."""

_logger = logging.getLogger("rewards")


def settle(outcomes: list[Any]) -> list[Any]:
    """Replace the awaitables among results by what they resolve to, or by the exceptions they raise."""
    waiting = [index for index, outcome in enumerate(outcomes) if inspect.isawaitable(outcome)]
    if not waiting:
        return outcomes

    async def gather() -> list[Any]:
        return await asyncio.gather(*(outcomes[index] for index in waiting), return_exceptions=True)

    future = asyncio.run_coroutine_threadsafe(gather(), _event_loop(os.getpid()))
    try:
        results = future.result()
    except BaseException:  # Ctrl-C while waiting: do not leave requests running behind the user's back
        future.cancel()
        raise
    settled = list(outcomes)
    for index, result in zip(waiting, results, strict=True):
        settled[index] = result
    return settled


@functools.cache
def _event_loop(process: int) -> asyncio.AbstractEventLoop:
    """The event loop of async rewards, in a thread of its own, one per process.

    One loop for the whole run, since HTTP clients that a reward keeps are tied to the loop of their first
    call; in a thread, since a notebook already runs a loop; per process, since threads do not survive a fork.
    """
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="rewards-event-loop", daemon=True).start()
    return loop


@dataclass
class _Wait:
    """A call that has not returned."""

    name: str
    completions: Sequence[Completion]
    since: float = field(default_factory=time.monotonic)
    patience: float = field(default_factory=lambda: PATIENCE)


_waits: dict[int, _Wait] = {}  # by thread


@contextmanager
def watched(name: str, completions: Sequence[Completion]) -> Iterator[None]:
    """Have a reward that does not return named, instead of a run that stands still without a word."""
    _watcher(os.getpid())
    thread = threading.get_ident()
    outer = _waits.get(thread)  # a combination that is called inside a reward
    _waits[thread] = _Wait(name, completions)
    try:
        yield
    finally:
        if outer is None:
            del _waits[thread]
        else:
            _waits[thread] = outer


@functools.cache
def _watcher(process: int) -> threading.Thread:
    """One thread per process, since starting one per call would cost more than most rewards do."""
    thread = threading.Thread(target=_watch, name="rewards-watcher", daemon=True)
    thread.start()
    return thread


def _watch() -> None:
    while True:
        time.sleep(min(1.0, PATIENCE / 4))
        for wait in list(_waits.values()):
            waited = time.monotonic() - wait.since
            if waited > wait.patience:
                wait.patience *= 2
                _logger.warning(
                    "reward %r has not returned after %.0f s, on a batch of %d that starts with %s. Ctrl-C stops the run; "
                    "rewards.TimeLimit(reward, seconds) would do so by itself",
                    wait.name,
                    waited,
                    len(wait.completions),
                    show(wait.completions, 0),
                )
