import pickle

import numpy as np
import pytest

from rewards import (
    Batch,
    Clipped,
    Ensemble,
    Gate,
    LengthPenalty,
    MissingStop,
    Normalized,
    RewardError,
    WeightedSum,
    bind,
    exact_match,
)

BATCH = Batch(["p", "q"], ["a", "b"], [[1], [2, 3]], {"answer": ["a", "a"]})


def constant(completions):
    return [1.0] * len(completions)


def first_only(completions):
    return [2.0] + [None] * (len(completions) - 1)


def test_worked_by_hand():
    reward = WeightedSum({"match": (exact_match, 1.0), "brief": (LengthPenalty(target=1), 0.1)})
    scores = bind(reward, ["answer"])(BATCH)
    # 'a': 1 * 1 + 0.1 * 0;  'b': 1 * 0 + 0.1 * (1 - 2 / 1)
    assert scores.total.tolist() == [1.0, -0.1]
    assert scores.components["match"].tolist() == [1, 0]
    assert scores.components["brief"].tolist() == [0, -1]


def test_sums_nest_and_their_names_too():
    inner = WeightedSum({"one": (constant, 2), "first": (first_only, 0.5)})
    bound = bind(WeightedSum({"inner": (inner, 10), "one": (constant, -1)}), [])
    assert bound.names == ("inner/one", "inner/first", "one")
    assert bound(BATCH).total.tolist() == [10 * (2 + 0.5 * 2) - 1, 10 * 2 - 1]
    np.testing.assert_equal(bound(BATCH).components["inner/first"], [2, np.nan])


def test_called_as_trl_calls_it():
    metrics = []

    def logged(completions, answer, trainer_state, log_metric, environments, **columns):
        log_metric("count", len(completions))
        assert trainer_state == "state"
        assert environments is the_environments
        return [1.0, None]

    the_environments = [object(), object()]
    reward = WeightedSum({"logged": (logged, 2.0)})
    values = reward(
        prompts=["p", "q"],
        completions=["a", "b"],
        completion_ids=[[1], [2]],
        answer=["a", "b"],
        trainer_state="state",
        log_extra=None,
        log_metric=lambda name, value: metrics.append((name, value)),
        environments=the_environments,
    )
    assert values == [2.0, None]
    assert metrics == [("count", 2)]


def test_called_by_hand_with_what_it_needs():
    reward = WeightedSum({"match": (exact_match, 2.0)})
    assert reward(completions=["a", "b"], answer=["a", "a"]) == [2.0, 0.0]
    with pytest.raises(RewardError, match="requires the parameter `answer`"):
        reward(completions=["a", "b"])


def test_is_a_value():
    rewards = {"match": (exact_match, 1)}
    reward = WeightedSum(rewards)
    rewards.clear()
    assert reward == WeightedSum({"match": (exact_match, 1.0)})
    assert pickle.loads(pickle.dumps(reward)) == reward
    with pytest.raises(AttributeError):
        reward.rewards = {}


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        ({}, "got no reward"),
        ([constant], r"got a list; expected WeightedSum\(\{"),
        ({"a": constant}, r"under 'a'; expected a pair \(reward, weight\)"),
        ({"a": (constant,)}, r"expected a pair"),
        ({"a": (constant, float("nan"))}, "weight nan for 'a'; expected a finite number"),
        ({"a": (constant, float("inf"))}, "weight inf for 'a'"),
        ({"a": (constant, "1")}, "weight '1' for 'a'"),
        ({"a": (constant, True)}, "weight True for 'a'"),
        ({"a": (1.0, constant)}, "reward 'a' must be a callable"),
        ({3: (constant, 1.0)}, "name 3; expected a non-empty text"),
        ({"": (constant, 1.0)}, "name ''"),
    ],
)
def test_refused(rewards, message):
    with pytest.raises(RewardError, match=message):
        WeightedSum(rewards)


def test_names_that_collide_through_nesting_are_refused():
    inner = WeightedSum({"b": (constant, 1.0)})
    with pytest.raises(RewardError, match="both called 'a/b'"):
        bind(WeightedSum({"a": (inner, 1.0), "a/b": (constant, 1.0)}), [])


def test_overflow_is_an_error():
    with pytest.raises(RewardError, match="overflows"):
        bind(WeightedSum({"a": (lambda **_: [1e308, 1.0], 10.0)}), [])(BATCH)


# ------------------------------------------------------------------------------- clipped, normalised, gated, averaged

FOUR = Batch(
    ["p"] * 4, ["a", "bb", "", "dddd"], [[1], [2, 2], [], [4] * 4], finish_reasons=["stop", "length", "stop", "length"]
)


def length(completions):
    return [float(len(c)) for c in completions]


def only_short(completions):
    return [None if len(c) > 2 else 10.0 for c in completions]


def test_clipped():
    assert bind(Clipped(length, low=1, high=3), [])(FOUR).total.tolist() == [1, 2, 1, 3]
    assert bind(Clipped(length, high=1.5), [])(FOUR).total.tolist() == [1, 1.5, 0, 1.5]
    assert Clipped(only_short, high=5.0)(completions=["a", "dddd"]) == [5.0, None]


def test_normalized():
    assert bind(Normalized(length, mean=2.0, std=0.5), [])(FOUR).total.tolist() == [-2, 0, -4, 4]
    samples = [{"prompt": "p", "completion": "x" * n} for n in (1, 2, 3)]  # mean 2, standard deviation 1 (n - 1)
    assert Normalized.fit(length, samples) == Normalized(length, 2.0, 1.0)
    partly = [{"prompt": "p", "completion": c} for c in ("a", "dddd")]
    with pytest.raises(RewardError, match="got 1 samples with 1 different rewards; expected at least two that differ"):
        Normalized.fit(only_short, partly)
    with pytest.raises(RewardError, match="tells none of them apart"):
        Normalized.fit(constant, samples)
    with pytest.raises(RewardError, match="requires the parameter `answer`"):
        Normalized.fit(exact_match, samples)


def test_a_gate_calls_what_is_behind_it_for_what_passes_only():
    seen = []

    def careful(completions, completion_ids, answer):
        seen.append((completions, completion_ids, answer))
        return [1 / len(c) for c in completions]

    bound = bind(Gate(length, careful, otherwise=-1.0, name="some_text"), ["answer"])
    batch = Batch(FOUR.prompts, FOUR.completions, FOUR.completion_ids, {"answer": list("wxyz")})
    scores = bound(batch)
    assert scores.total.tolist() == [1, 0.5, -1, 0.25]
    assert seen == [(["a", "bb", "dddd"], [[1], [2, 2], [4] * 4], ["w", "x", "z"])]
    assert bound.names == ("some_text", "careful")
    assert scores.components["some_text"].tolist() == [1, 2, 0, 4]
    np.testing.assert_equal(scores.components["careful"], [1, 0.5, np.nan, 0.25])
    nothing = bound(Batch(["p"], [""], [[]], {"answer": ["w"]}))
    assert nothing.total.tolist() == [-1]
    assert len(seen) == 1


def test_where_the_condition_does_not_apply_there_is_no_gate():
    assert Gate(only_short, length)(completions=["dddd", "a"]) == [4.0, 1.0]
    assert Gate(length, only_short)(completions=["dddd", "a", ""]) == [None, 10.0, 0.0]


def test_missing_stop():
    assert bind(MissingStop(length, subtract=0.5), [])(FOUR).total.tolist() == [1, 1.5, 0, 3.5]
    scores = bind(MissingStop(length, replace=-1), [])(FOUR)
    assert scores.total.tolist() == [1, -1, 0, -1]
    assert scores.components["missing_stop"].tolist() == [0, 1, 0, 1]
    assert scores.components["length"].tolist() == [1, 2, 0, 4]  # of all, before any is replaced
    with pytest.raises(RewardError, match="requires the parameter `finish_reasons`"):
        MissingStop(length, replace=-1)(completions=["a"])  # in TRL


def test_ensemble():
    double = Clipped(lambda completions: [2.0 * len(c) for c in completions], high=5.0)
    mean = bind(Ensemble({"one": length, "two": double, "some": only_short}), [])(FOUR)
    assert mean.total.tolist() == [13 / 3, 16 / 3, 10 / 3, 4.5]  # (1 + 2 + 10) / 3, (2 + 4 + 10) / 3, ..., (4 + 5) / 2
    assert list(mean.components) == ["one", "two", "some"]
    worst = bind(Ensemble([length, double, only_short], by="worst"), [])(FOUR)
    assert worst.total.tolist() == [1, 2, 0, 4]
    assert list(worst.components) == ["0", "1", "2"]
    assert Ensemble([only_short, only_short])(completions=["dddd"]) == [None]


def test_names_survive_any_nesting():
    inner = WeightedSum({"size": (length, 1.0), "fixed": (constant, 0.5)})
    reward = WeightedSum(
        {
            "task": (Gate(only_short, Clipped(inner, high=2.0), name="short"), 2.0),
            "brief": (Clipped(LengthPenalty(target=1), low=-2.0), 1.0),
            "sum": (inner, 1.0),
        }
    )
    bound = bind(MissingStop(Normalized(reward, 0.0, 2.0), subtract=1.0), [])
    names = ("task", "task/short", "task/size", "task/fixed", "brief", "sum/size", "sum/fixed", "missing_stop")
    assert bound.names == names
    scores = bound(FOUR)
    assert tuple(scores.components) == names
    # 'bb': task = min(2 + 0.5, 2) = 2; brief = max(1 - 2/1, -2) = -1; sum = 2.5; (2 * 2 - 1 + 2.5) / 2 - 1
    assert scores.total[1] == 1.75
    assert [scores.components[name][1] for name in names] == [2, 10, 2, 1, -1, 2, 1, 1]
    assert pickle.loads(pickle.dumps(bound))(FOUR).total.tolist() == scores.total.tolist()
    assert bind(WeightedSum({"all": (reward, 1.0)}), []).names == tuple(f"all/{name}" for name in names[:-1])


def test_a_function_without_a_name_goes_by_its_own():
    assert bind(Clipped(length, high=1.0), []).names == ("length",)
    assert bind(Clipped(length, high=1.0), [])(FOUR).components["length"].tolist() == [1, 2, 0, 4]
    with pytest.raises(RewardError, match="both called 'gate'"):
        bind(Gate(length, Gate(length, constant)), [])


def test_async_parts_run_at_the_same_time_in_any_combination():
    import asyncio

    started, finish = asyncio.Event(), asyncio.Event()

    async def first(completions):
        started.set()
        await asyncio.wait_for(finish.wait(), 5)
        return length(completions)

    async def second(completions):
        await asyncio.wait_for(started.wait(), 5)
        finish.set()
        return length(completions)

    reward = WeightedSum({"one": (Clipped(first, high=3.0), 1.0), "two": (MissingStop(second, subtract=0.0), 1.0)})
    assert bind(reward, [])(FOUR).total.tolist() == [2, 4, 0, 7]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Clipped(length), "low=None and high=None; expected at least one"),
        (lambda: Clipped(length, low=2, high=1), "low <= high"),
        (lambda: Clipped(length, low=float("nan")), "low=nan; expected a finite number"),
        (lambda: Clipped("length", low=0), "must be a callable"),
        (lambda: Normalized(length, 0.0, 0.0), "std=0.0; expected a positive number"),
        (lambda: Gate(length, constant, otherwise=None), "otherwise=None; expected a finite number"),
        (lambda: Gate(3, constant), "the reward 'gate' must be a callable"),
        (lambda: MissingStop(length), "replace=None and subtract=None; expected one of them"),
        (lambda: MissingStop(length, replace=1, subtract=1), "expected one of them"),
        (lambda: Ensemble([length]), r"got 1 reward\(s\); expected at least two"),
        (
            lambda: Ensemble([length, constant], by="wurst"),
            "by='wurst'; expected 'mean' or 'worst'. Did you mean `worst`",
        ),
        (lambda: Ensemble(length), "got a function; expected a list of rewards"),
    ],
)
def test_combinations_refused(make, message):
    with pytest.raises(RewardError, match=message):
        make()
