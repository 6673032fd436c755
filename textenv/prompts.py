"""Prompts: where episodes begin, and how lanes draw them."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from rewards.base import did_you_mean as did_you_mean  # other modules take it from here
from rewards.base import shorten

Message: TypeAlias = dict[str, Any]
PromptSource: TypeAlias = Any
"""A list of prompts, a list of rows, a mapping from split to either, a .jsonl / .json / .csv / .txt file, a directory of
such files named after their splits, or a Hugging Face `Dataset` or `DatasetDict`."""

SUFFIXES = (".jsonl", ".json", ".csv", ".txt")


@dataclass(frozen=True)
class Prompts:
    """Tokenised prompts of one split.

    Attributes:
        prompts: As the user wrote them: text, or a list of messages.
        token_ids: One int64 array per prompt.
        columns: Every further column of the data set, for the reward. Each of the same length.
        demonstrations: Token ids of demonstrated responses, stop token included; None for prompts without one, and as a
            whole where the column is absent.
    """

    prompts: list[str | list[Message]]
    token_ids: list[NDArray[np.int64]]
    columns: dict[str, list[Any]] = field(default_factory=dict)
    demonstrations: list[NDArray[np.int64] | None] | None = None

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def conversational(self) -> bool:
        """Whether prompts are lists of messages."""
        return not isinstance(self.prompts[0], str)


def load_splits(source: PromptSource) -> dict[str | None, list[dict[str, Any]]]:
    """Read a source into rows, by split (the split is None where the source has just one).

    Raises:
        ValueError: The source is missing, empty, or not of a known kind.
    """
    if isinstance(source, str | Path):
        return _load_path(Path(os.path.expanduser(source)))
    if isinstance(source, Mapping):
        if not source:
            raise ValueError("Expected at least one split in the mapping of prompts, got none.")
        if "prompt" in source:
            raise ValueError(
                "Expected a mapping of prompts to hold splits, such as {'train': [...]}, got one of columns. Pass a list of rows: [{'prompt': ...}]."
            )
        return {str(name): _rows(rows, f"split {name!r}") for name, rows in source.items()}
    return {None: _rows(source, "the list of prompts")}


def choose_split(splits: Mapping[str | None, Any], split: str | None) -> str | None:
    """The key of the wanted split; a source with one unnamed split has only `split=None` or `"train"`."""
    if None in splits:
        if split in (None, "train"):
            return None
        raise ValueError(
            f"These prompts have no splits, so split={split!r} cannot be had. Pass a mapping, e.g. prompts={{'train': [...], {split!r}: [...]}}."
        )
    wanted = split or "train"
    if wanted not in splits:
        raise ValueError(
            f"Unknown split {wanted!r}; these prompts have {sorted(map(str, splits))}.{did_you_mean(wanted, splits)}"
        )
    return wanted


def tokenize(
    rows: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    vocab_size: int,
    end_token: int | None,
    max_prompt_tokens: int | None,
    where: str,
) -> Prompts:
    """Turn rows into `Prompts`.

    Args:
        rows: Each with a `prompt`, and possibly a `demonstration` and further columns.
        tokenizer: A `transformers` tokenizer; its chat template is applied to message lists.
        vocab_size: V; larger ids are an error.
        end_token: Appended to demonstrations (they end by themselves); None appends nothing.
        max_prompt_tokens: Longer prompts are an error; None allows any length.
        where: For messages: what the rows are.

    Raises:
        ValueError: A prompt is missing, empty, too long, or has ids that the model does not know.
    """
    names = dict.fromkeys(key for row in rows for key in row)
    if "prompt" not in names:
        raise ValueError(f"Expected a column 'prompt' in {where}, found {list(names)}.{did_you_mean('prompt', names)}")
    prompts = [row.get("prompt") for row in rows]
    odd = next((i for i, prompt in enumerate(prompts) if isinstance(prompt, str) != isinstance(prompts[0], str)), None)
    if odd is not None:
        raise ValueError(
            f"Expected all of {where} to be text, or all to be lists of messages; prompt 0 is {str(prompts[0])[:40]!r}, and prompt {odd} is "
            f"{str(prompts[odd])[:40]!r}."
        )
    if all(isinstance(prompt, str) and prompt for prompt in prompts):  # in one call, which is ten times faster
        ids = [np.asarray(row, dtype=np.int64) for row in tokenizer(prompts)["input_ids"]]
    else:
        ids = [encode_prompt(tokenizer, prompt, f"prompt {i} of {where}") for i, prompt in enumerate(prompts)]
    for i, row in enumerate(ids):
        if len(row) == 0:
            raise ValueError(
                f"Expected prompt {i} of {where} to have at least one token, got none from {shorten(repr(prompts[i]))}."
            )
        if max_prompt_tokens is not None and len(row) > max_prompt_tokens:
            too_long = sum(len(r) > max_prompt_tokens for r in ids)
            raise ValueError(
                f"Prompt {i} of {where} has {len(row)} tokens, more than max_prompt_tokens={max_prompt_tokens} ({too_long} prompts are too long): "
                f"{shorten(repr(prompts[i]))}. Drop or shorten them, or raise max_prompt_tokens."
            )
        if row.max() >= vocab_size:
            raise ValueError(
                f"Prompt {i} of {where} has token id {row.max()}, but the model's vocabulary has only {vocab_size}."
            )
    demonstrations = None
    if "demonstration" in names:
        texts = [row.get("demonstration") for row in rows]
        demonstrations = [
            None if text is None else encode_response(tokenizer, text, end_token, f"demonstration {i} of {where}")
            for i, text in enumerate(texts)
        ]
    columns = {name: [row.get(name) for row in rows] for name in names if name not in ("prompt", "demonstration")}
    return Prompts(prompts, ids, columns, demonstrations)  # type: ignore[arg-type]  # encode_prompt has refused None


def encode_prompt(tokenizer: Any, prompt: object, where: str = "the prompt") -> NDArray[np.int64]:
    """Token ids of a prompt: text as the tokenizer writes it, messages through its chat template. Shape: (n,), n >= 1."""
    if isinstance(prompt, str):
        if not prompt:
            raise ValueError(f"Expected {where} to hold text, got an empty string.")
        ids = tokenizer(prompt)["input_ids"]
    elif isinstance(prompt, Sequence) and prompt and all(isinstance(m, Mapping) and "role" in m for m in prompt):
        if tokenizer.chat_template is None:
            raise ValueError(
                f"{where} is a list of messages, but the tokenizer has no chat template: set tokenizer.chat_template, or pass text."
            )
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=True)[
            "input_ids"
        ]
    else:
        raise ValueError(
            f"Expected {where} to be text or a non-empty list of {{'role', 'content'}} messages, got {shorten(repr(prompt))}."
        )
    if len(ids) == 0:
        raise ValueError(f"Expected {where} to have at least one token, got none from {shorten(repr(prompt))}.")
    return np.asarray(ids, dtype=np.int64)


def encode_response(tokenizer: Any, response: object, end_token: int | None, where: str) -> NDArray[np.int64]:
    """Token ids of a demonstrated response, with `end_token` behind them. Messages give their last content."""
    if (
        not isinstance(response, str)
        and isinstance(response, Sequence)
        and response
        and isinstance(response[-1], Mapping)
    ):
        response = response[-1].get("content")
    if not isinstance(response, str):
        raise ValueError(f"Expected {where} to be text or messages, got {shorten(repr(response))}.")
    ids = list(tokenizer(response, add_special_tokens=False)["input_ids"])
    return np.asarray(ids if end_token is None else [*ids, end_token], dtype=np.int64)


@dataclass
class PromptStream:
    """The prompts of one group of lanes, drawn in order from the generator of its first lane.

    Its lanes take them at their own pace: the k-th prompt is the same for each.
    """

    taken: NDArray[np.int64]
    """How many episodes each lane has begun. Shape: (lanes of the group,)."""
    repeats: int = 1
    """A lane gives each prompt out for so many consecutive episodes."""
    base: int = 0
    """The place of `pending[0]` in the stream."""
    pending: list[int] = field(default_factory=list)

    def align(self) -> None:
        """All lanes start over together: prompts that only some have seen are dropped."""
        self.base = -(-int(self.taken.max(initial=0)) // self.repeats)
        self.taken[:] = self.base * self.repeats
        self.pending.clear()

    def take(self, lane: int, n_prompts: int, rng: np.random.Generator) -> tuple[int, int]:
        """(prompt id, place in the stream) of this lane's next episode."""
        index = int(self.taken[lane]) // self.repeats
        self.taken[lane] += 1
        while index - self.base >= len(self.pending):
            self.pending.append(int(rng.integers(n_prompts)))
        prompt_id = self.pending[index - self.base]
        behind = int(self.taken.min()) // self.repeats - self.base
        if behind > 0:
            del self.pending[:behind]
            self.base += behind
        return prompt_id, index


def _load_path(path: Path) -> dict[str | None, list[dict[str, Any]]]:
    if path.is_dir():
        files = {file.stem: file for file in sorted(path.iterdir()) if file.suffix in SUFFIXES}
        if not files:
            raise ValueError(f"Expected files named after their splits ({', '.join(SUFFIXES)}) in {path}, found none.")
        return {name: _read(file) for name, file in files.items()}
    if path.is_file():
        return {None: _read(path)}
    hint = did_you_mean(path.name, [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else [])
    if path.suffix in SUFFIXES:
        raise ValueError(f"No such file: {path} (looked in {path.parent.resolve()}).{hint}")
    try:
        from datasets import load_dataset
    except ImportError:
        raise ValueError(
            f"{str(path)!r} is neither a file nor a directory. To load it as a Hugging Face data set, install textenv[hub].{hint}"
        ) from None
    try:
        splits = load_dataset(str(path))
    except Exception as error:  # of whatever library has failed: the hub's, the network's, the file format's
        raise ValueError(
            f"{str(path)!r} is neither a file nor a directory, and no data set of that name could be loaded "
            f"({type(error).__name__}: {error}).{hint}"
        ) from error
    return {str(name): _rows(rows, f"{path}[{name}]") for name, rows in splits.items()}


def _read(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8-sig")  # spreadsheets put a byte order mark in front
    # Not splitlines(): it also breaks at characters like U+2028, which may stand inside a prompt.
    if path.suffix == ".txt":
        return _rows([line for line in text.split("\n") if line], str(path))
    if path.suffix == ".csv":
        return _rows(list(csv.DictReader(io.StringIO(text))), str(path))
    if path.suffix == ".json":
        return _rows(_parse(text, str(path)), str(path))
    if path.suffix == ".jsonl":
        return _rows(
            [_parse(line, f"{path}, line {n}") for n, line in enumerate(text.split("\n"), 1) if line.strip()],
            str(path),
        )
    raise ValueError(f"Expected prompts in a {', '.join(SUFFIXES)} file, got {path}.")


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not valid JSON: {error}.") from None


def _rows(source: Any, where: str) -> list[dict[str, Any]]:
    if isinstance(source, str) or not hasattr(source, "__iter__"):
        raise ValueError(f"Expected {where} to be a list of prompts or of rows, got {shorten(repr(source))}.")
    rows = [dict(row) if isinstance(row, Mapping) else {"prompt": row} for row in source]
    if not rows:
        raise ValueError(f"Expected at least one prompt in {where}, got none.")
    return rows
