"""From a cache, and under a time limit."""

import asyncio
import inspect
import pickle
import threading
import time

import numpy as np
import pytest

from rewards import Batch, Cached, RewardError, RewardTimeout, TimeLimit, WeightedSum, bind, check_reward, exact_match

BATCH = Batch(["p", "p", "q", "p"], ["a", "a", "a", "b"], [[1], [1], [1], [2]], {"answer": ["a", "a", "a", None]})


class Spy:
    """Keeps what it is asked about."""

    def __init__(self):
        self.asked = []

    def __call__(self, prompts, completions, answer):
        self.asked.append(list(zip(prompts, completions, answer, strict=True)))
        return [None if a is None else float(len(self.asked)) for a in answer]


def test_each_completion_is_asked_about_once():
    spy = Spy()
    bound = bind(
        WeightedSum({"spy": (Cached(spy), 1.0), "one": (lambda completions: [0.0] * len(completions), 1.0)}), ["answer"]
    )
    assert bound(BATCH).total.tolist() == [1, 1, 1, 0]
    assert spy.asked == [[("p", "a", "a"), ("q", "a", "a"), ("p", "b", None)]]
    assert bound(BATCH).total.tolist() == [1, 1, 1, 0]
    assert len(spy.asked) == 1  # None is remembered as well
    other = Batch(["q", "p"], ["a", "a"], [[1], [1]], {"answer": ["a", "b"]})  # another answer: another question
    assert bound(other).total.tolist() == [1, 2]
    assert spy.asked[1] == [("p", "a", "b")]


def test_it_counts_and_forgets_the_oldest():
    spy = Spy()
    cached = Cached(spy, size=2)
    for text in ("a", "b", "a", "c", "b", "a"):  # c drives out b, then b drives out a
        cached(prompts=["p"], completions=[text], answer=["x"])
    assert [asked[0][1] for asked in spy.asked] == ["a", "b", "c", "b", "a"]
    assert (cached.hits, cached.misses) == (1, 5)
    assert cached(prompts=["p"] * 3, completions=["x", "y", "z"], answer=["x"] * 3) == [
        6,
        6,
        6,
    ]  # more than it can keep


def test_cached_keeps_name_and_signature():
    cached = Cached(exact_match)
    assert bind(cached, ["answer"]).names == ("exact_match",)
    with pytest.raises(RewardError, match="'exact_match' requires the parameter `answer`"):
        bind(cached, [])
    assert pickle.loads(pickle.dumps(cached))(completions=["a"], answer=["a"]) == [1.0]
    examples = [{"prompt": "p", "completion": c, "answer": np.array([1])} for c in "ab"]
    assert check_reward(Cached(lambda completions, answer: [float(a[0]) for a in answer]), examples).scores == (1, 1)


def test_the_wrappers_show_their_own_parameters():
    assert list(inspect.signature(Cached).parameters) == ["reward", "size"]
    assert list(inspect.signature(TimeLimit).parameters) == ["reward", "seconds"]
    assert list(inspect.signature(TimeLimit(exact_match, 1.0)).parameters) == ["completions", "answer", "columns"]


def test_cached_async_and_arrays():
    async def slow(completions):
        await asyncio.sleep(0)
        return np.array([float(len(c)) for c in completions])

    bound = bind(Cached(slow), [])
    assert bound(BATCH).total.tolist() == bound(BATCH).total.tolist() == [1, 1, 1, 1]
    assert bound.reward.misses == 2


def test_a_wrong_reward_is_as_wrong_through_a_cache():
    with pytest.raises(RewardError, match="'<lambda>' returned 1 values for 2 completions"):
        bind(Cached(lambda completions: [1.0]), [])(Batch(["p", "q"], ["a", "b"], [[1], [1]]))
    cached = Cached(lambda completions: [1.0])
    cached(completions=["a"])
    with pytest.raises(RewardError, match="returned 1 values for the 2 completions that were not in the cache"):
        cached(completions=["a", "b", "c"])
    with pytest.raises(RewardError, match="returned nan for completion 'a'"):
        bind(Cached(lambda completions: [float("nan")] * len(completions)), [])(BATCH)


def test_what_cannot_be_cached():
    with pytest.raises(RewardError, match=r"reads `trainer_state`.*do not cache it"):
        Cached(lambda completions, trainer_state: [1.0])
    with pytest.raises(RewardError, match="Cached got a WeightedSum; expected one function"):
        Cached(WeightedSum({"a": (exact_match, 1.0)}))
    with pytest.raises(RewardError, match="size=0"):
        Cached(exact_match, size=0)


def test_a_reward_that_sleeps_for_ever_stops_the_run_when_it_has_a_limit():
    release = threading.Event()

    def judge(completions):
        release.wait()
        return [1.0] * len(completions)

    async def remote(completions):
        await asyncio.sleep(60)

    started = time.monotonic()
    for reward in (judge, remote):
        message = rf"'{reward.__name__}' did not return within its time limit of 0.05 s, on a batch of 4 .* 'a'"
        with pytest.raises(RewardTimeout, match=message):
            bind(TimeLimit(reward, seconds=0.05), [])(BATCH)
    assert time.monotonic() - started < 10
    release.set()


def test_one_that_returns_in_time_is_as_without_a_limit():
    limited = TimeLimit(exact_match, seconds=60)
    assert bind(limited, ["answer"])(Batch(["p"], ["a"], [[1]], {"answer": ["a"]})).total.tolist() == [1]
    assert bind(limited, ["answer"]).names == ("exact_match",)

    async def quick(completions):
        return [1.0] * len(completions)

    assert bind(TimeLimit(quick, seconds=60), [])(BATCH).total.tolist() == [1] * 4

    def own(completions):
        raise TimeoutError("no answer from the judge")

    with pytest.raises(RewardError, match="'own' raised TimeoutError: no answer from the judge"):
        bind(TimeLimit(own, seconds=60), [])(BATCH)
    with pytest.raises(RewardError, match="seconds=0; expected a positive number"):
        TimeLimit(exact_match, 0)
    with pytest.raises(RewardError, match="TimeLimit got a WeightedSum"):
        TimeLimit(WeightedSum({"a": (exact_match, 1.0)}), 1.0)
