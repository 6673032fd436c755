import asyncio
import copy
import functools
import logging
import pickle
import re
import threading
import time

import numpy as np
import pytest

from rewards import Batch, LengthPenalty, RewardError, WeightedSum, bind, completion_text, waiting

BATCH = Batch(
    prompts=["p", "q", "r"],
    completions=["a", "bb", "ccc"],
    completion_ids=[[1], [2, 2], [3, 3, 3]],
    columns={"answer": ["a", "b", "ccc"], "tags": [["x"], ["y"], ["z"]]},
    step=7,
)
COLUMNS = ("answer", "tags")


def length(completions):
    return [float(len(completion)) for completion in completions]


def matches(completions, answer, **columns):
    return [float(c == a) for c, a in zip(completions, answer, strict=True)]


class Scaled:
    def __init__(self, factor):
        self.factor = factor

    def __call__(self, completions, **columns):
        return [self.factor * len(completion) for completion in completions]

    def method(self, completion_ids):
        return [self.factor * len(ids) for ids in completion_ids]


async def slow_length(completions, **columns):
    await asyncio.sleep(0)
    return length(completions)


class AsyncLength:
    async def __call__(self, completions):
        await asyncio.sleep(0)
        return length(completions)


def scaled(factor, completions):
    return [factor * len(completion) for completion in completions]


@pytest.mark.parametrize(
    ("reward", "name", "total"),
    [
        (length, "length", [1, 2, 3]),
        (matches, "matches", [1, 0, 1]),
        (Scaled(2), "Scaled", [2, 4, 6]),
        (Scaled(3).method, "method", [3, 6, 9]),
        (functools.partial(scaled, 4), "scaled", [4, 8, 12]),
        (functools.partial(scaled, factor=4), "scaled", [4, 8, 12]),
        (lambda completions, **_: [0, 1, 2], "<lambda>", [0, 1, 2]),
        (lambda *args, **kwargs: [len(k) for k in kwargs["completion_ids"]], "<lambda>", [1, 2, 3]),
        (slow_length, "slow_length", [1, 2, 3]),
        (functools.partial(slow_length, unused=1), "slow_length", [1, 2, 3]),
        (AsyncLength(), "AsyncLength", [1, 2, 3]),
        (lambda completions: slow_length(completions), "<lambda>", [1, 2, 3]),
    ],
)
def test_every_signature_style(reward, name, total):
    bound = bind(reward, COLUMNS)
    assert bound.names == (name,)
    scores = bound(BATCH)
    assert scores.total.tolist() == total
    assert scores.total.dtype == np.float64
    assert scores.components[name].tolist() == total
    assert bound(BATCH).total.tolist() == total  # and again


def test_kwargs_take_everything_that_trl_offers():
    seen = {}

    def reward(**keywords):
        seen.update(keywords)
        return [0.0] * 3

    bind(reward, COLUMNS)(BATCH)
    assert set(seen) == {
        *("prompts", "completions", "completion_ids", "answer", "tags"),
        *("trainer_state", "log_extra", "log_metric"),
    }
    assert seen["trainer_state"].global_step == 7
    assert seen["prompts"] == ["p", "q", "r"]


def test_trl_withholds_the_singular_columns():
    batch = Batch(["p"], ["c"], [[1]], {"prompt": ["p"], "completion": ["c"], "completion_ids": [[9]]})
    seen = {}

    def reward(**keywords):
        seen.update(keywords)
        return [0.0]

    bind(reward, batch.columns)(batch)
    assert "prompt" not in seen
    assert seen["completion_ids"] == [[1]]


def test_an_optional_parameter_takes_its_column_or_its_default():
    def reward(completions, answer=None, missing="default"):
        assert answer == ["a", "b", "ccc"]
        assert missing == "default"
        return [0.0] * len(completions)

    bind(reward, COLUMNS)(BATCH)


def test_async_rewards_run_at_the_same_time():
    async def first(completions, **_):
        started.set()
        await asyncio.wait_for(finish.wait(), 5)
        return length(completions)

    async def second(completions, **_):
        await asyncio.wait_for(started.wait(), 5)
        finish.set()
        return length(completions)

    started, finish = asyncio.Event(), asyncio.Event()
    # first waits for second: one after the other, this would time out
    both = bind(WeightedSum({"first": (first, 1), "second": (second, 1)}), [])
    assert both(BATCH).total.tolist() == [2, 4, 6]


def test_async_rewards_keep_their_event_loop_from_call_to_call_and_work_inside_another():
    loops = []

    async def reward(completions):
        loops.append(asyncio.get_running_loop())
        return length(completions)

    bound = bind(reward, [])

    async def notebook_cell():
        return bound(BATCH)

    bound(BATCH)
    assert asyncio.run(notebook_cell()).total.tolist() == [1, 2, 3]
    assert loops[0] is loops[1]


@pytest.mark.parametrize(
    "returned",
    [
        [1, 2.5, True],
        (1, 2.5, 1.0),
        np.array([1, 2.5, 1], dtype=np.float32),
        [np.float32(1), np.array(2.5), np.int64(1)],
    ],
)
def test_every_type_of_number(returned):
    assert bind(lambda **_: returned, [])(BATCH).total.tolist() == [1, 2.5, 1]


def test_torch_tensors():
    torch = pytest.importorskip("torch")
    values = torch.tensor([1, 2.5, 1], requires_grad=True)
    assert bind(lambda **_: values, [])(BATCH).total.tolist() == [1, 2.5, 1]
    assert bind(lambda **_: list(values), [])(BATCH).total.tolist() == [1, 2.5, 1]


def test_none_means_not_applicable():
    reward = WeightedSum({"some": (lambda **_: [None, 2.0, None], 3.0), "all": (length, 1.0)})
    scores = bind(reward, [])(BATCH)
    assert scores.total.tolist() == [1, 3 * 2 + 2, 3]  # as TRL's nansum
    np.testing.assert_equal(scores.components["some"], [np.nan, 2, np.nan])


def test_an_empty_batch_calls_nothing():
    def reward(completions):
        raise AssertionError

    scores = bind(reward, [])(Batch([], [], []))
    assert scores.total.shape == (0,)
    assert scores.components["reward"].shape == (0,)


def test_arguments_are_copies():
    batch = Batch(
        prompts=[[{"role": "user", "content": "p"}]],
        completions=[[{"role": "assistant", "content": "c"}]],
        completion_ids=[[1]],
        columns={"tags": [["x", {"y": 1}]], "array": [np.zeros(2)]},
    )
    before = copy.deepcopy([batch.prompts, batch.completions, batch.completion_ids, batch.columns["tags"]])

    def vandal(prompts, completions, completion_ids, tags, array):
        prompts[0][0]["content"] = completions[0][0]["content"] = "gone"
        completion_ids[0].append(2)
        tags[0][1]["y"] = 2
        array[0][:] = 1
        completions.clear()
        return [1.0]

    def witness(completions, tags, **_):
        assert completions[0][0]["content"] == "c"
        assert tags == [["x", {"y": 1}]]
        return [2.0]

    both = bind(WeightedSum({"vandal": (vandal, 1), "witness": (witness, 1)}), ["tags", "array"])
    assert both(batch).total.tolist() == [3]
    assert [batch.prompts, batch.completions, batch.completion_ids, batch.columns["tags"]] == before
    assert batch.columns["array"][0].tolist() == [0, 0]


def test_logging():
    def reward(completions, log_extra, log_metric):
        log_extra("length", [len(c) for c in completions])
        log_metric("mean_length", sum(map(len, completions)) / len(completions))
        return length(completions)

    bound = bind(reward, [])
    bound(BATCH)
    bound(Batch(["p"], ["four"], [[4]]))
    assert bound.extras == {"length": [4]}  # of the latest batch
    assert bound.metrics == {"mean_length": 3.0}  # the mean of 2 and 4
    assert bound.pop_metrics() == {"mean_length": 3.0}
    assert bound.metrics == {}


def test_bound_rewards_pickle_and_copy():
    bound = bind(WeightedSum({"a": (length, 1), "b": (LengthPenalty(2), 0.5)}), COLUMNS)
    for twin in (pickle.loads(pickle.dumps(bound)), copy.deepcopy(bound)):
        assert twin.names == bound.names
        assert twin(BATCH).total.tolist() == [1, 2, 3 - 0.25]


def test_completion_text():
    assert completion_text("text") == "text"
    assert completion_text([{"role": "assistant", "content": "hello"}]) == "hello"
    assert completion_text([{"content": [{"type": "text", "text": "a"}, {"type": "image"}]}]) == "a"
    assert completion_text([{"content": None}, {"content": "b"}]) == "\nb"


# Each way of writing a wrong reward, with the message that its author should get --------------------------------


def positional(completions, /):
    return [0.0] * len(completions)


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (lambda anwser, **_: [], r"'<lambda>' requires .*`anwser`.*Did you mean `answer`\?.*add a column"),
        (lambda prompt: [], r"Did you mean `prompts`\?"),
        (lambda completion: [], r"Did you mean `completions`\?"),
        (lambda zzz: [], r"requires the parameter `zzz`, which nothing provides; expected one of `prompts`"),
        (positional, r"'positional' has the positional-only parameter `completions`.*remove the `/`"),
        ("gpt2", r"must be a callable.*RewardModel.from_pretrained\('gpt2'\)"),
        ([length, matches], r"got \[.*\(list\).*WeightedSum"),
        ({"a": (length, 1.0)}, r"\(dict\).*WeightedSum"),
        (None, r"got None \(NoneType\)"),
        (3.0, r"got 3.0 \(float\)"),
        (LengthPenalty, r"this is a class: pass an instance of it, LengthPenalty\(\.\.\.\)"),
        (functools.partial(matches, answer=["a"]), r"partial that sets `answer`.*rename"),
    ],
)
def test_refused_at_construction(reward, message):
    with pytest.raises(RewardError, match=f"(?s){message}"):
        bind(reward, COLUMNS)


def test_a_bare_classifier_is_refused_with_the_remedy():
    class Classifier:
        config = None

        def forward(self, input_ids): ...

        def __call__(self, input_ids): ...

    with pytest.raises(RewardError, match=r"RewardModel\(model, tokenizer\)"):
        bind(Classifier(), [])


def test_a_column_named_like_a_keyword_is_refused():
    with pytest.raises(RewardError, match=r"column `log_metric`.*rename the column"):
        bind(length, ["log_metric"])


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0, float("nan"), 1.0], r"returned nan for completion 'bb' \(number 2 of 3\); expected a finite float"),
        ([1.0, 1.0, float("inf")], r"returned inf for completion 'ccc' \(number 3 of 3\)"),
        ([10**400, 1.0, 1.0], r"returned inf for completion 'a'"),
        ([1.0, "2", 1.0], r"returned '2' \(str\) for completion 'bb'.*float\(\.\.\.\)"),
        ([1.0, 1j, 1.0], r"\(complex\) for completion 'bb'"),
        ([[1.0], [1.0], [1.0]], r"returned \[1.0\] for completion 'a'.*flatten"),
        (np.ones((3, 1)), r"flatten an array of shape \(B, 1\)"),
        ([np.ones(2)] * 3, r"flatten"),
        ([1.0, 1.0], r"returned 2 values for 3 completions.*3 in all.*do not skip"),
        ([], r"returned 0 values for 3 completions"),
        (1.0, r"returned 1.0 \(float\) .* expected a list .* Remedy: return \[value\]"),
        (np.float64(1), r"Remedy: return \[value\]"),
        (None, r"returned None \(NoneType\).*return a list"),
        ("abc", r"returned 'abc' \(str\).*return a list"),
        ({"a": 1.0}, r"\(dict\).*return a list"),
        ((x for x in [1.0, 1.0, 1.0]), r"\(generator\).*return a list"),
        ([None, 1.0, None], r"every reward \(brief\) returned None for completion 'a' \(number 1 of 3\)"),
    ],
)
def test_refused_returns(returned, message):
    def brief(completions):
        return returned

    with pytest.raises(RewardError, match=f"(?s){message}") as caught:
        bind(brief, [])(BATCH)
    assert "brief" in str(caught.value)


def test_a_raise_names_reward_and_completion_and_keeps_the_cause():
    def inverse(completions, log_metric):
        log_metric("calls", 1)
        return [1 / (2 - len(completion)) for completion in completions]

    bound = bind(WeightedSum({"fine": (length, 1), "inverse": (inverse, 1)}), [])
    with pytest.raises(RewardError, match=r"'inverse' raised ZeroDivisionError.*\n.*'bb' \(number 2 of 3\)") as caught:
        bound(BATCH)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert bound.metrics == {}  # a failed call leaves no trace
    with pytest.raises(RewardError, match=r"on completion 'bb'; expected"):
        bound(Batch(["q"], ["bb"], [[1]]))


def test_a_raise_of_an_async_reward():
    async def remote(completions):
        if "ccc" in completions:
            raise ConnectionError("no route")
        return length(completions)

    with pytest.raises(RewardError, match=r"'remote' raised ConnectionError: no route\n.*'ccc' \(number 3 of 3\)"):
        bind(remote, [])(BATCH)


def test_a_raise_that_no_completion_causes_alone():
    def alone(completions):
        (_,) = completions
        return [1.0]

    with pytest.raises(RewardError, match=r"(?s)ValueError.*batch of 3 completions, though on none of them alone"):
        bind(alone, [])(BATCH)


def test_conversations_and_long_completions_are_shown_shortened():
    batch = Batch(["p"], [[{"role": "assistant", "content": "x" * 1000}]], [[1]])
    with pytest.raises(RewardError, match=r"completion 'xxx.*…'") as caught:
        bind(lambda completions: [float("nan")], [])(batch)
    assert len(str(caught.value)) < 400


def test_a_batch_that_lacks_a_promised_column():
    with pytest.raises(RewardError, match="'matches' needs the column `answer`, which this batch lacks"):
        bind(matches, COLUMNS)(Batch(["p"], ["c"], [[1]]))


def test_a_ragged_batch():
    with pytest.raises(RewardError, match="`prompts` has 2 entries for 1 completions"):
        Batch(["p", "q"], ["c"], [[1]])
    with pytest.raises(RewardError, match="`answer` has 0 entries"):
        Batch(["p"], ["c"], [[1]], {"answer": []})


def test_a_reward_that_sleeps_is_named_while_one_waits(monkeypatch):
    monkeypatch.setattr(waiting, "PATIENCE", 0.02)
    named, messages = threading.Event(), []

    class Handler(logging.Handler):
        def emit(self, record):
            messages.append(record.getMessage())
            named.set()

    handler = Handler()
    logging.getLogger("rewards").addHandler(handler)

    def sleeper(completions):
        assert named.wait(20), "no warning"
        return length(completions)

    try:
        assert bind(sleeper, [])(BATCH).total.tolist() == [1, 2, 3]  # it is waited for all the same
    finally:
        logging.getLogger("rewards").removeHandler(handler)
    message = messages[0]
    assert re.match(
        r"reward 'sleeper' has not returned after \d+ s, on a batch of 3 that starts with completion 'a'", message
    )
    assert "TimeLimit(reward, seconds)" in message


def test_what_a_reward_prints_is_shown_and_changes_nothing(capsys):
    def chatty(completions):
        print("scoring", completions)
        return length(completions)

    assert bind(chatty, [])(BATCH).total.tolist() == [1, 2, 3]
    assert capsys.readouterr().out == "scoring ['a', 'bb', 'ccc']\n"


def test_finish_reasons_are_given_to_what_names_them_alone():
    batch = Batch(["p", "q"], ["a", "b"], [[1], [2]], finish_reasons=["stop", "length"])

    def names(finish_reasons, **columns):
        assert set(columns) >= {"prompts", "completions", "trainer_state"}
        return [float(reason == "stop") for reason in finish_reasons]

    def takes_everything(**columns):
        assert "finish_reasons" not in columns  # as in TRL, which has no such keyword
        return [0.0, 0.0]

    both = WeightedSum({"names": (names, 1.0), "takes_everything": (takes_everything, 1.0)})
    assert bind(both, [])(batch).total.tolist() == [1, 0]
    with pytest.raises(RewardError, match="'names' needs the column `finish_reasons`, which this batch lacks"):
        bind(names, [])(Batch(["p"], ["a"], [[1]]))


def test_time_spent_is_counted():
    def slow(completions):
        time.sleep(0.02)
        return length(completions)

    bound = bind(slow, [])
    bound(BATCH)
    bound(BATCH)
    assert 0.04 <= bound.seconds < 5
