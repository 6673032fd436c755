"""What both sides of `textenv bench speed` are given: how much of everything, models, prompts, rewards.

The models are random but for one thing: how likely the stop token is. It is planted in plain weights (a constant feature of the
hidden state, read by the stop token's row of the head), so it survives saving and loading, and both sides draw from the same
distribution without a logits processor or any other help.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

PAD, BOS, EOS, UNK = range(4)
PROMPT_TOKENS = 8, 16
"""Shortest and longest prompt, `<s>` included."""
NEVER = -30.0
"""A logit that is never drawn."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model's architecture. Weights are random, seeded."""

    name: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    tied: bool = True
    """Whether embeddings and head share their weights."""
    architecture: str = "llama"
    """Or `gpt2`."""
    positions: int = 256
    """The longest sequence."""

    def __str__(self) -> str:
        kind = {"llama": "Llama", "gpt2": "GPT-2"}[self.architecture]
        return f"{self.name} ({kind}, {self.layers} layers, width {self.hidden_size}, V={self.vocab_size:,})"


SHAPES = {
    shape.name: shape
    for shape in (
        Shape(name="tiny", vocab_size=64, hidden_size=16, intermediate_size=24, layers=1, heads=2),
        Shape(name="1M/1k", vocab_size=1_024, hidden_size=128, intermediate_size=384, layers=4, heads=4, tied=False),
        Shape(name="15M/32k", vocab_size=32_000, hidden_size=288, intermediate_size=768, layers=6, heads=6),
        Shape(
            name="124M/50k",
            vocab_size=50_257,
            hidden_size=768,
            intermediate_size=3_072,
            layers=12,
            heads=12,
            architecture="gpt2",
        ),
    )
}


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much of everything."""

    shapes: tuple[str, ...]
    """Models of all parts, small ones first."""
    large: str | None
    """A model of the rollouts only, at the fewest lanes."""
    lanes: tuple[int, ...]
    """Of the rollouts."""
    budget: int
    """Response tokens of the rollouts at most."""
    iteration: tuple[int, int]
    """Episodes and response tokens of an RLOO, GRPO or PPO iteration."""
    update: tuple[int, ...]
    """Episodes of the PPO update against prefix rows, per model."""
    repeats: tuple[int, ...]
    """Rounds, per model, the large one last: more of those that take a second, for these scatter."""
    curve_repeats: int
    """Rounds of the environment alone and of what grows."""
    env_lanes: tuple[int, ...]
    """Of the environment alone."""
    growth: Mapping[str, tuple[int, ...]]
    """What grows, and how far."""
    base: Mapping[str, int]
    """Where it stays meanwhile."""

    def repeats_of(self, shape: Shape) -> int:
        """Rounds of a model."""
        return self.repeats[(*self.shapes, self.large).index(shape.name)]


SIZES = {
    "full": Size(
        shapes=("1M/1k", "15M/32k"),
        large="124M/50k",
        lanes=(16, 64, 256),
        budget=64,
        iteration=(64, 48),
        update=(16, 8),
        repeats=(11, 5, 3),
        curve_repeats=5,
        env_lanes=(1, 4, 16, 64, 256, 1024),
        growth={
            "lanes": (1, 4, 16, 64, 256),
            "vocabulary": (256, 1024, 4096, 16384, 65536),
            "length": (16, 32, 64, 128, 256),
            "width": (64, 128, 256, 512),
        },
        base={"lanes": 64, "vocabulary": 1024, "length": 32, "width": 128},
    ),
    "smoke": Size(
        shapes=("tiny",),
        large=None,
        lanes=(4,),
        budget=9,
        iteration=(8, 6),
        update=(4,),
        repeats=(2,),
        curve_repeats=2,
        env_lanes=(1, 4),
        growth={"lanes": (1, 2), "vocabulary": (64, 128), "length": (4, 8), "width": (16, 32)},
        base={"lanes": 2, "vocabulary": 64, "length": 4, "width": 16},
    ),
}


def rollout_episodes(lanes: int, stops: bool, waves: int = 4) -> int:
    """Responses that stop by themselves: several waves, 256 at most but at least one wave; of a fixed length: one wave."""
    return max(lanes, min(waves * lanes, 256)) if stops else lanes


def rollout_budget(size: Size, lanes: int) -> int:
    """Response tokens at most: half the usual in more than 64 lanes, which keeps the whole benchmark within half an hour."""
    return size.budget if lanes <= 64 else size.budget // 2


def model_config(shape: Shape) -> Any:
    """The `transformers` config of a shape."""
    import transformers as hf

    common = {
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": shape.positions,
        "tie_word_embeddings": shape.tied,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }
    if shape.architecture == "gpt2":
        return hf.GPT2Config(
            **common,
            n_embd=shape.hidden_size,
            n_inner=shape.intermediate_size,
            n_layer=shape.layers,
            n_head=shape.heads,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    return hf.LlamaConfig(
        **common,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
    )


def build_model(shape: Shape, mean_length: float | None, budget: int, dtype: torch.dtype = torch.float32) -> Any:
    """A causal language model in eval mode.

    Args:
        shape: Its architecture.
        mean_length: Mean tokens per response when responses stop by themselves, the stop token included; None: they never do.
        budget: The cap on a response, tokens.
        dtype: Of the weights.
    """
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(model_config(shape)).eval()
    _plant_stop(model, None if mean_length is None else stop_probability(mean_length, budget))
    return model.to(dtype)


def stop_probability(mean_length: float, budget: int) -> float:
    """The chance of stopping at each step that gives this mean length under the cap: (1 - (1 - p)^T) / p = mean."""
    return _bisect(lambda p: (1 - (1 - p) ** budget) / p, mean_length, 1e-6, 1.0)


@torch.no_grad()
def _plant_stop(model: Any, probability: float | None) -> None:
    """Make the stop token this probable at each step; None: never drawn."""
    head: torch.Tensor = model.get_output_embeddings().weight
    if model.config.model_type == "gpt2":  # the last norm has a bias: along the stop token's row it is a constant logit
        direction = head[EOS] / head[EOS].norm() ** 2

        def plant(logit: float) -> None:
            model.transformer.ln_f.bias.copy_(logit * direction)

    else:  # feature 0 holds 1 in every embedding, no layer writes to it, and only the stop token's row reads it differently
        model.get_input_embeddings().weight[:, 0] = 1.0
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = 0.0
            layer.mlp.down_proj.weight[0] = 0.0
        common = float(head[:, 0].mean())

        def plant(logit: float) -> None:
            head[EOS] = 0.0
            head[EOS, 0] = common + logit

    if probability is None:
        plant(NEVER)
        return
    rows = torch.randint(UNK + 1, model.config.vocab_size, (32, 24), generator=torch.Generator().manual_seed(0))
    at = []
    for logit in (0.0, 1.0):
        plant(logit)
        at.append(model(input_ids=rows, logits_to_keep=4).logits.double())
    start, slope = at[0], at[1] - at[0]  # logits are linear in what is planted

    def mean_probability(logit: float) -> float:
        return float((start + logit * slope).softmax(-1)[..., EOS].mean())

    plant(_bisect(mean_probability, probability, NEVER, -NEVER))


def _bisect(function: Callable[[float], float], target: float, low: float, high: float) -> float:
    """Where a monotone function meets `target`."""
    rising = function(high) > function(low)
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if (function(middle) < target) == rising else (low, middle)
    return (low + high) / 2


def build_tokenizer(vocab_size: int) -> Any:
    """One token per word: `w4`, `w5`, ...; `<s>` stands in front of every text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(UNK + 1, vocab_size))]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",  # for generate
    )


def build_prompts(vocab_size: int, count: int, tokens: tuple[int, int] = PROMPT_TOKENS) -> list[str]:
    """Random words, between `tokens[0]` and `tokens[1]` tokens a prompt."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(tokens[0], tokens[1] + 1, size=count)
    lengths[0] = tokens[1]
    return [" ".join(f"w{i}" for i in rng.integers(UNK + 1, vocab_size, size=n - 1)) for n in lengths]


def constant(completions: Sequence[Any], **columns: Any) -> list[float]:
    """A reward that costs nothing and says nothing."""
    return [0.0] * len(completions)


def variety(completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float]:
    """The share of different tokens: a cheap reward that differs between the completions of a prompt."""
    return [len(set(ids)) / len(ids) for ids in completion_ids]
