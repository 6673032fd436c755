"""Tokenizers over a closed vocabulary, for the worlds that are shipped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

PAD, BOS, EOS, UNK = "<pad>", "<s>", "</s>", "<unk>"


def character_tokenizer(characters: str) -> Any:
    """One token per character, with `<s>` in front; spaces are not added in decoding."""
    return _tokenizer([PAD, BOS, EOS, UNK, *characters], by_character=True)


def _tokenizer(vocabulary: Sequence[str], by_character: bool) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    ids = {token: i for i, token in enumerate(vocabulary)}
    core = Tokenizer(models.WordLevel(ids, unk_token=UNK))
    core.pre_tokenizer = (
        pre_tokenizers.Split(Regex("."), "isolated") if by_character else pre_tokenizers.WhitespaceSplit()
    )
    if by_character:
        core.decoder = decoders.Fuse()
    core.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, ids[BOS])])
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token=PAD, bos_token=BOS, eos_token=EOS, unk_token=UNK)
