import asyncio
import itertools
import math
import time

import numpy as np
import pytest

from rewards import Clipped, MissingStop, RewardError, WeightedSum, check_reward, exact_match

EXAMPLES = [{"prompt": "p", "completion": text, "answer": "a"} for text in ("a", "bb", "")]


def test_a_good_reward():
    check = check_reward(WeightedSum({"match": (exact_match, 2.0)}), EXAMPLES)
    assert check.names == ("match",)
    assert check.scores == (2, 0, 0)
    assert 0 < check.seconds_per_batch < 1
    assert 0 < check.seconds_per_completion < 1


def test_conversations_and_arrays_as_columns():
    examples = [
        {
            "prompt": [{"role": "user", "content": "p"}],
            "completion": [{"role": "assistant", "content": c}],
            "target": np.arange(3),
        }
        for c in "ab"
    ]
    assert check_reward(lambda target, **_: [t.sum() for t in target], examples).scores == (3, 3)


def test_none_is_fine():
    scores = check_reward(lambda completions: [None if not c else 1.0 for c in completions], EXAMPLES).scores
    assert scores[:2] == (1, 1)
    assert math.isnan(scores[2])


def test_async():
    async def reward(completions):
        return [1.0] * len(completions)

    assert check_reward(reward, EXAMPLES).scores == (1, 1, 1)


counter = itertools.count()


def random_reward(completions):
    return [float(next(counter)) for _ in completions]


def centred(completions):
    lengths = [len(c) for c in completions]
    return [length - sum(lengths) / len(lengths) for length in lengths]


def mutating(completions):
    return [float(len(completions.pop(0))) for _ in range(len(completions))]


def by_position(completions):
    return [float(len(completions) > 1) * i for i, _ in enumerate(completions)]


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (random_reward, "is not deterministic.*seed it"),
        (centred, "depends on the batch: alone, the completion 'bb'.*independent=False|depends on the batch"),
        (by_position, "depends on the batch"),
        (mutating, "'mutating' changes its argument `completions`.*work on a copy"),
        (lambda completions: [1.0], "returned 1 values for 3"),
        (lambda completions: [float("nan")] * len(completions), "returned nan for completion 'a'"),
        (lambda completion_ids: [0.0], "requires the parameter `completion_ids`"),
    ],
)
def test_bad_rewards(reward, message):
    with pytest.raises(RewardError, match=message):
        check_reward(reward, EXAMPLES)


def test_a_reward_may_compare_on_purpose():
    assert check_reward(centred, EXAMPLES, independent=False).scores == (0, 1, -1)


@pytest.mark.parametrize("examples", [["a", "b"], {"prompt": ["a"], "completion": ["b"]}])
def test_examples_that_are_no_mappings(examples):
    with pytest.raises(RewardError, match=r"expected a list of examples such as .*, got '(a|prompt)' in it"):
        check_reward(exact_match, examples)


def test_bad_examples():
    with pytest.raises(RewardError, match="at least two"):
        check_reward(exact_match, EXAMPLES[:1])
    with pytest.raises(RewardError, match="example 1 has the entries"):
        check_reward(exact_match, [EXAMPLES[0], {"prompt": "p"}])


def test_padding_may_not_matter():
    def padded_mean(completions):  # a model that averages over the padding too
        width = max(map(len, completions)) or 1
        return [c.count("b") / width for c in completions]

    with pytest.raises(RewardError, match=r"depends on the batch.*mind its padding"):
        check_reward(padded_mean, [{"prompt": "p", "completion": c} for c in ("b", "bbb")])


def test_printing_is_told():
    def chatty(completions):
        print("look at this")
        return [1.0] * len(completions)

    with pytest.raises(RewardError, match=r"'chatty' prints 'look at this.*expected silence.*log_metric"):
        check_reward(chatty, EXAMPLES)


def test_slowness_is_told():
    def slow(completions):
        time.sleep(0.02)
        return [1.0] * len(completions)

    with pytest.raises(RewardError, match=r"'slow' took 0.0\d+ s for 3 completions; expected at most 0.01 s"):
        check_reward(slow, EXAMPLES, max_seconds=0.01)
    assert check_reward(slow, EXAMPLES, max_seconds=10).seconds_per_completion >= 0.02


def test_mutation_is_found_inside_combinations_and_of_async_rewards():
    async def remote(completions):
        await asyncio.sleep(0)
        completions.sort()
        return [1.0] * len(completions)

    with pytest.raises(RewardError, match="'deep/remote' changes its argument `completions`"):
        check_reward(WeightedSum({"deep": (WeightedSum({"remote": (Clipped(remote, high=1.0), 1.0)}), 1.0)}), EXAMPLES)


def test_finish_reasons():
    examples = [{"prompt": "p", "completion": "c", "finish_reason": reason} for reason in ("stop", "length")]
    check = check_reward(MissingStop(exact_one, replace=-1.0), examples)
    assert (check.names, check.scores) == (("exact_one", "missing_stop"), (1, -1))


def exact_one(completions):
    return [1.0] * len(completions)
