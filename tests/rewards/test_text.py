import pickle

import pytest

from rewards import (
    Bleu,
    ChrF,
    Distinct,
    LengthPenalty,
    Matches,
    RewardError,
    Rouge,
    check_reward,
    contains,
    exact_match,
)

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


# ------------------------------------------------------------------------------ metrics, worked out by hand


def test_rouge():
    pytest.importorskip("rouge_score")
    # "the cat sat" against "the cat slept well": 2 common words: precision 2/3, recall 2/4, F = 2 * P * R / (P + R) = 4/7
    arguments = {"completions": ["the cat sat", "x", "y"], "reference": ["the cat slept well", None, []]}
    assert Rouge("rouge1")(**arguments) == [pytest.approx(4 / 7), None, None]
    assert Rouge("rougeL")(**arguments)[0] == pytest.approx(4 / 7)
    assert Rouge("rouge2")(**arguments)[0] == pytest.approx(0.4)  # one pair of words: 1/2 and 1/3
    assert Rouge("rouge1")(completions=["dogs run"], reference=["dog running"]) == [0]
    assert Rouge("rouge1", stem=True)(completions=["dogs run"], reference=["dog running"]) == [1]
    several = {"completions": [[{"role": "assistant", "content": "the cat"}]], "reference": [["a dog", "the cat"]]}
    assert Rouge()(**several) == [1]  # the best of several references
    with pytest.raises(RewardError, match=r"kind='rougel'; expected one of rouge1.*Did you mean `rougeL`"):
        Rouge("rougel")
    with pytest.raises(RewardError, match=r"`reference` holds 3; expected a text, a list of texts, or None"):
        Rouge()(completions=["a"], reference=[3])


def test_bleu_and_chrf():
    pytest.importorskip("sacrebleu")
    same = {"completions": ["the cat sat on the mat"], "reference": ["the cat sat on the mat"]}
    assert [metric(**same) for metric in (Bleu(), ChrF(), ChrF(word_order=2))] == [[pytest.approx(1)]] * 3
    # precisions 3/4, 2/3, 1/2 and, for no four words in common of one, 1/2 of 1/1 (smoothed); no brevity penalty
    near = {"completions": ["the cat sat down"], "reference": ["the cat sat up"]}
    assert Bleu()(**near) == [pytest.approx((3 / 4 * 2 / 3 * 1 / 2 * 1 / 2) ** 0.25)]
    assert Bleu()(completions=["", "x", "y"], reference=["a b", None, ["p", "y"]]) == [0, None, pytest.approx(1)]
    # "ab" against "abc": n-grams of 1 and 2 letters exist on both sides: precision 1 and 1, recall 2/3 and 1/2. Their means,
    # P = 1 and R = 7/12, in F with recall twice as important: 5 P R / (4 P + R)
    assert ChrF()(completions=["ab"], reference=["abc"]) == [pytest.approx(5 * 7 / 12 / (4 + 7 / 12), abs=1e-3)]


def test_a_library_that_is_not_installed_is_named_with_the_remedy(monkeypatch):
    def missing(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr("importlib.import_module", missing)
    for make in (Rouge, Bleu, ChrF):
        with pytest.raises(
            RewardError, match=rf"{make.__name__} needs the library '\w+': pip install 'textenv\[text\]'"
        ):
            make()
