import pickle

import pytest

from rewards import Distinct, LengthPenalty, Matches, RewardError, check_reward, contains, exact_match

CHAT = [{"role": "assistant", "content": "42"}]


def test_exact_match():
    answers = ["42", 42, "42", None, "42"]
    completions = [" 42\n", "42", "042", "42", CHAT]
    assert exact_match(completions=completions, answer=answers) == [1, 1, 0, None, 1]


def test_contains_looks_for_whole_words():
    completions = ["It is 312.", "It is 12.", "PARIS!", "Parisian", "x", "C++ is a language"]
    answers = ["12", 12, "paris", "paris", None, "c++"]
    assert contains(completions=completions, answer=answers) == [0, 1, 1, 0, None, 1]
    with pytest.raises(RewardError, match="empty"):
        contains(completions=["x"], answer=[" "])


def test_matches_the_whole_completion():
    reward = Matches(r"<think>.*</think>\s*\d+")
    completions = ["<think>6\n7</think>\n42\n", "42", "<think>x</think> 42 or so"]
    assert reward(completions=completions) == [1, 0, 0]
    with pytest.raises(RewardError, match="Matches got the pattern"):
        Matches("(")


def test_length_penalty():
    ids = [[], [0] * 4, [0] * 5, [0] * 8]
    assert LengthPenalty(target=4)(completion_ids=ids) == [0, 0, -0.25, -1]
    with pytest.raises(RewardError, match="positive"):
        LengthPenalty(target=0)


def test_distinct():
    # bigrams of "a b a b": ab, ba, ab: two distinct of three
    assert Distinct()(completions=["a b a b", "a b c", "a", ""]) == [2 / 3, 1, 1, 1]
    assert Distinct(n=1)(completions=["no no no no"]) == [0.25]
    with pytest.raises(RewardError, match="positive"):
        Distinct(n=0)


@pytest.mark.parametrize(
    "reward",
    [exact_match, contains, Matches("a.*"), LengthPenalty(2), Distinct(1)],
    ids=lambda r: getattr(r, "__name__", repr(r)),
)
def test_they_pass_the_checker_and_pickle(reward):
    examples = [
        {"prompt": "p", "completion": text, "completion_ids": list(range(len(text))), "answer": "a"}
        for text in ("a", "", "a b b", "x" * 500)
    ]
    assert check_reward(pickle.loads(pickle.dumps(reward)), examples) is not None
