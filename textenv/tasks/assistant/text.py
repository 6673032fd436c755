"""The text format of the Assistant world: lines, turns, tokens.

Text is lower-case words and punctuation marks, all separated by spaces. ``<turn>`` ends a line: on a web page it
separates lines, in a conversation it separates turns. A conversation begins with ``<bos>`` and an answer ends with
``<eos>`` (which is not ``<pad>``)::

    <bos> what color is the sky ? <turn> the sky is blue . <eos>
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, is_dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from textenv.tasks.assistant import phrases, world

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS, UNK, TURN = "<pad>", "<bos>", "<eos>", "<unk>", "<turn>"
MAX_PROMPT_TOKENS = 40
"""Every prompt, with its markers, is at most so long."""
MAX_RESPONSE_TOKENS = 32
"""Room enough for any good answer, ``<eos>`` included."""
_MARKS = frozenset('.?!,:"')


def format_prompt(prompt: str) -> str:
    """Puts the markers around what a user wrote, ready for the tokenizer."""
    return f"{BOS} {prompt} {TURN}"


def format_turns(lines: Iterable[str]) -> str:
    """Joins lines, or the turns of a conversation."""
    return f" {TURN} ".join(lines)


def few_shot_prompt(prompt: str, examples: Iterable[tuple[str, str]]) -> str:
    """Puts examples ``(prompt, answer)`` before a prompt: how to make a base model behave without training it."""
    return format_prompt(format_turns([line for example in examples for line in example] + [prompt]))


def count_words(text: str) -> int:
    """Words, not counting punctuation marks."""
    return sum(token not in _MARKS for token in text.split())


@cache
def vocabulary() -> tuple[str, ...]:
    """Every token of the world, special ones first, then in alphabetical order."""
    words = {word for module in (world, phrases) for text in _texts(_data(module)) for word in text.split()}
    return (PAD, BOS, EOS, UNK, TURN, *sorted(words))


def _data(module: object) -> list[Any]:
    return [value for name, value in vars(module).items() if name.isupper() and not name.startswith("_")]


def _texts(data: Any) -> Iterable[str]:
    """All text inside nested data, without the ``{fields}`` of templates."""
    if isinstance(data, str):
        yield re.sub(r"\{\w+\}", " ", data)
    elif isinstance(data, Mapping):
        yield from _texts([list(data.keys()), list(data.values())])
    elif isinstance(data, list | tuple):
        for item in data:
            yield from _texts(item)
    elif is_dataclass(data) and not isinstance(data, type):
        yield from _texts(list(asdict(data).values()))


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A fast tokenizer with one token per word; decoding gives back the same text.

    ``<turn>`` is an ordinary token, so that decoded answers show where the model went on to another line.
    """
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(vocabulary())}, unk_token=UNK))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_PROMPT_TOKENS + MAX_RESPONSE_TOKENS + 56,
    )


def pack(documents: Iterable[str]) -> NDArray[np.int64]:
    """Turns documents into one stream of token ids, each document between ``<bos>`` and ``<eos>``.

    Raises:
        KeyError: If a word is not in the vocabulary.
    """
    ids = {word: i for i, word in enumerate(vocabulary())}
    return np.array([ids[word] for text in documents for word in (BOS, *text.split(), EOS)], dtype=np.int64)
