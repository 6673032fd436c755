import pickle

import numpy as np
import pytest

from rewards import Batch, LengthPenalty, RewardError, WeightedSum, bind, exact_match

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
