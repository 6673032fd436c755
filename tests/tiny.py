"""Models and a tokenizer that are built in milliseconds: no test downloads anything."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

PAD, EOS, UNK = 0, 1, 2
SPECIAL = ("<pad>", "<eos>", "<unk>")
CHARACTERS = "abcdefghij +="
VOCAB = len(SPECIAL) + len(CHARACTERS)  # 16

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'][0] }}+{{ message['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}a+{% endif %}"
)

SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "pad_token_id": PAD,
    "bos_token_id": EOS,
    "eos_token_id": EOS,
}
GROUPED = {**SMALL, "num_key_value_heads": 2}

ARCHITECTURES: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "gpt2": (hf.GPT2Config, {**SMALL, "n_inner": 24}),
    "llama": (hf.LlamaConfig, GROUPED),
    "qwen2": (hf.Qwen2Config, GROUPED),
    "qwen3": (hf.Qwen3Config, {**GROUPED, "head_dim": 6}),
    "gpt_neox": (hf.GPTNeoXConfig, SMALL),
    "opt": (hf.OPTConfig, {**SMALL, "ffn_dim": 24, "word_embed_proj_dim": 16}),
    "mistral": (hf.MistralConfig, {**GROUPED, "sliding_window": None}),
}


def tiny_model(
    architecture: str = "gpt2", *, seed: int = 0, spread: float = 0.3, positions: int = 48, **overrides: Any
) -> Any:
    """A two-layer causal LM with seeded weights.

    Args:
        architecture: A key of `ARCHITECTURES`.
        seed: Of the weights.
        spread: Standard deviation added to every parameter, biases and norms too. Wide enough by default that the
            distributions are far from uniform and every part of the network matters.
        positions: The longest sequence.
        overrides: Of the config.
    """
    config_class, settings = ARCHITECTURES[architecture]
    torch.manual_seed(seed)
    model = hf.AutoModelForCausalLM.from_config(
        config_class(**{**settings, "max_position_embeddings": positions, **overrides})
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=spread)
    return model.eval()


def char_tokenizer(chat: bool = False, extra_tokens: int = 0) -> hf.PreTrainedTokenizerFast:
    """One token per character of `CHARACTERS`; `extra_tokens` make it larger than the models here."""
    words = [*SPECIAL, *CHARACTERS, *(f"<extra{i}>" for i in range(extra_tokens))]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    core.decoder = decoders.Fuse()
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
