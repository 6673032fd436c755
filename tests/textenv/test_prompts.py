"""Where prompts come from, how they become tokens, and in which order lanes get them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from textenv.prompts import PromptStream, did_you_mean, load_splits, tokenize

from ..tiny import EOS, VOCAB

ROWS = [{"prompt": "ab", "answer": "c"}, {"prompt": "d", "answer": "e"}]


def tokenized(tokenizer: Any, rows: list[dict[str, Any]], **changes: Any) -> Any:
    settings = {"vocab_size": VOCAB, "end_token": EOS, "max_prompt_tokens": None, "where": "the prompts", **changes}
    return tokenize(rows, tokenizer, **settings)


# ---------------------------------------------------------------------- sources


def write_jsonl(path: Path) -> None:
    path.write_text("\n".join(json.dumps(row) for row in ROWS) + "\n\n")


def write_json(path: Path) -> None:
    path.write_text(json.dumps(ROWS))


def write_csv(path: Path) -> None:
    path.write_text("prompt,answer\nab,c\nd,e\n")


@pytest.mark.parametrize(("suffix", "write"), [("jsonl", write_jsonl), ("json", write_json), ("csv", write_csv)])
def test_a_file_of_each_kind_gives_the_same_rows(suffix: str, write: Any, tmp_path: Path) -> None:
    path = tmp_path / f"prompts.{suffix}"
    write(path)
    assert load_splits(path) == load_splits(str(path)) == {None: ROWS}


def test_a_text_file_has_a_prompt_on_each_line(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("ab\n\n d\n")
    assert load_splits(tmp_path / "prompts.txt") == {None: [{"prompt": "ab"}, {"prompt": " d"}]}


@pytest.mark.parametrize("separator", ["\u2028", "\u0085", "\x0b", "\x1c"])
def test_line_separators_inside_a_prompt_do_not_break_it(separator: str, tmp_path: Path) -> None:
    text = f"a{separator}b"
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": text}, ensure_ascii=False), encoding="utf-8")
    (tmp_path / "p.txt").write_text(text, encoding="utf-8")
    assert load_splits(tmp_path / "p.jsonl") == load_splits(tmp_path / "p.txt") == {None: [{"prompt": text}]}


def test_a_csv_field_may_hold_a_line_break_and_the_file_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text('prompt,answer\n"a\nb",c\n', encoding="utf-8-sig")
    assert load_splits(tmp_path / "p.csv") == {None: [{"prompt": "a\nb", "answer": "c"}]}


def test_a_directory_has_a_file_per_split(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl")
    (tmp_path / "test.txt").write_text("j\n")
    (tmp_path / "README").write_text("not a split")
    assert load_splits(tmp_path) == {"test": [{"prompt": "j"}], "train": ROWS}


def test_a_mapping_has_a_source_per_split() -> None:
    assert load_splits({"train": ROWS, "test": ["j"]}) == {"train": ROWS, "test": [{"prompt": "j"}]}


def test_anything_that_iterates_over_rows_is_a_source() -> None:
    class DataSet:  # as a Hugging Face `Dataset` does
        def __iter__(self) -> Any:
            return iter(ROWS)

    assert load_splits(DataSet()) == {None: ROWS}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "at least one prompt in the list of prompts, got none"),
        ({}, "at least one split"),
        ({"train": []}, "at least one prompt in split 'train', got none"),
        (7, "to be a list of prompts or of rows, got 7"),
        ({"train": "a"}, "split 'train' to be a list of prompts or of rows, got 'a'"),
    ],
)
def test_a_source_without_prompts_is_refused(source: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_splits(source)


def test_a_missing_file_is_named_with_the_one_that_may_be_meant(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "prompts.jsonl")
    with pytest.raises(ValueError, match=r"No such file: .*promts.jsonl.*Did you mean `prompts.jsonl`\?"):
        load_splits(tmp_path / "promts.jsonl")


def test_a_mistyped_directory_is_no_exception_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str) -> None:
        raise ConnectionError("no such data set")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    (tmp_path / "prompts").mkdir()
    message = r"neither a file nor a directory, and no data set .*ConnectionError.*Did you mean `prompts`\?"
    with pytest.raises(ValueError, match=message):
        load_splits(tmp_path / "promts")


def test_a_tilde_is_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_jsonl(tmp_path / "prompts.jsonl")
    assert load_splits("~/prompts.jsonl") == {None: ROWS}


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("ppo", "PPO"),
        ("sft", "SFT"),
        ("random", "RandomAgent"),
        ("arithmetic", "textenv/Arithmetic-v0"),
        ("tree", "textenv/Tree-v0"),  # too short to be close, but part of it
        ("xylophone", None),
        ("v0", None),  # part of too much
    ],
)
def test_what_is_meant_is_found_in_any_case_and_by_a_part(word: str, hint: str | None) -> None:
    choices = ["PPO", "GRPO", "SFT", "RandomAgent", "textenv/Arithmetic-v0", "textenv/Tree-v0"]
    assert did_you_mean(word, choices) == (f" Did you mean `{hint}`?" if hint else "")


def test_a_line_that_is_not_json_is_named_by_its_number(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n')
    with pytest.raises(ValueError, match=r"p.jsonl, line 2 is not valid JSON"):
        load_splits(tmp_path / "p.jsonl")


def test_an_empty_directory_says_what_it_should_hold(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"files named after their splits \(\.jsonl, .*found none"):
        load_splits(tmp_path)


# ---------------------------------------------------------------------- tokens


def test_prompts_become_tokens_and_columns(tokenizer: Any) -> None:
    prompts = tokenized(tokenizer, ROWS)
    assert [row.tolist() for row in prompts.token_ids] == [[3, 4], [6]]
    assert prompts.prompts == ["ab", "d"]
    assert prompts.columns == {"answer": ["c", "e"]}
    assert prompts.demonstrations is None


def test_demonstrations_end_by_themselves_and_may_be_missing(tokenizer: Any) -> None:
    prompts = tokenized(tokenizer, [{"prompt": "a", "demonstration": "bc"}, {"prompt": "d"}])
    assert [None if row is None else row.tolist() for row in prompts.demonstrations] == [[4, 5, EOS], None]
    assert prompts.columns == {}


def test_rows_may_lack_a_column_that_others_have(tokenizer: Any) -> None:
    assert tokenized(tokenizer, [{"prompt": "a", "x": 1}, {"prompt": "b"}]).columns == {"x": [1, None]}


def test_conversations_go_through_the_chat_template(chat_tokenizer: Any) -> None:
    messages = [{"role": "assistant", "content": "b"}, {"role": "assistant", "content": "c"}]
    prompts = tokenized(chat_tokenizer, [{"prompt": messages}])
    assert chat_tokenizer.decode(prompts.token_ids[0]) == "a+b a+c a+"
    assert prompts.conversational


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": ""}], "prompt 0 of the prompts to hold text, got an empty string"),
        ([{"prompt": "a"}, {"prompt": ""}], "prompt 1 of the prompts to hold text, got an empty string"),
        ([{"prompt": "a"}, {"prompt": []}], r"the prompts to be text, or all .*; prompt 0 is 'a', and prompt 1 is '\[\]'"),
        ([{"prompt": [{"content": "a"}]}], r"text or a non-empty list of \{'role', 'content'\} messages"),
        ([{"prompt": None}], "text or a non-empty list of .* got None"),
        ([{"prompt": 3}], "text or a non-empty list of .* got 3"),
        ([{"promt": "a"}], r"Expected a column 'prompt' .* found \['promt'\]\. Did you mean `promt`"),
        ([{"prompt": [{"role": "user", "content": "a"}]}], "the tokenizer has no chat template: set tokenizer.chat_templ"),
        ([{"prompt": "a", "demonstration": 3}], "demonstration 0 of the prompts to be text or messages, got 3"),
    ],
)  # fmt: skip
def test_rows_that_are_no_prompts_are_refused(rows: Any, message: str, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=message):
        tokenized(tokenizer, rows)


def test_a_prompt_without_any_token_is_refused() -> None:
    from ..tiny import char_tokenizer

    silent = char_tokenizer()
    silent.backend_tokenizer.normalizer = __import__("tokenizers").normalizers.Replace(" ", "")
    with pytest.raises(ValueError, match="prompt 1 of the prompts to have at least one token, got none from '  '"):
        tokenized(silent, [{"prompt": "a"}, {"prompt": "  "}])


def test_too_long_a_prompt_is_shown_and_the_others_are_counted(tokenizer: Any) -> None:
    rows = [{"prompt": "a"}, {"prompt": "abcd"}, {"prompt": "abcde"}]
    with pytest.raises(
        ValueError, match=r"Prompt 1 .* has 4 tokens, more than max_prompt_tokens=3 \(2 prompts are too long\): 'abcd'"
    ):
        tokenized(tokenizer, rows, max_prompt_tokens=3)


def test_ids_that_the_model_does_not_know_are_refused(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"Prompt 0 .* has token id 9, but the model's vocabulary has only 8"):
        tokenized(tokenizer, [{"prompt": "g"}], vocab_size=8)


# ---------------------------------------------------------------------- the order of prompts


def test_lanes_of_a_stream_take_the_same_prompts_at_their_own_pace() -> None:
    rng, stream = np.random.default_rng(0), PromptStream(np.zeros(3, np.int64))
    ahead = [stream.take(0, 100, rng) for _ in range(20)]
    behind = [stream.take(2, 100, rng) for _ in range(7)]
    assert behind == ahead[:7]
    assert [stream.take(1, 100, rng) for _ in range(20)] == ahead
    assert [place for _, place in ahead] == list(range(20))


def test_a_stream_forgets_what_all_of_its_lanes_have_taken() -> None:
    rng, stream = np.random.default_rng(0), PromptStream(np.zeros(2, np.int64))
    for _ in range(1000):
        stream.take(0, 100, rng)
        stream.take(1, 100, rng)
    assert len(stream.pending) <= 1


def test_every_prompt_is_as_likely_as_any_other() -> None:
    rng, stream = np.random.default_rng(0), PromptStream(np.zeros(1, np.int64))
    counts = np.bincount([stream.take(0, 5, rng)[0] for _ in range(5000)], minlength=5)
    assert ((counts - 1000) ** 2 / 1000).sum() < 18.5  # chi-square with 4 degrees of freedom, p = 0.001
