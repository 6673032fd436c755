"""A reward model on people's real preferences, against a bag of words.

The pairs are those of Anthropic's HH-RLHF (Bai et al. 2022, https://arxiv.org/abs/2204.05862), test splits. Dialogues that begin with
the same words stay together, in training, validation or test. Everything that is chosen (regularisation, learning rate, epochs) is
chosen on the validation pairs; the test pairs are looked at once, at the end.

Run: python -m benchmarks.preferences --pairs hh_rlhf_test.jsonl.gz     # needs scikit-learn for the bag of words
"""

from __future__ import annotations

import gzip
import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rewards.base import RewardError


@dataclass(frozen=True)
class PreferenceArguments:
    """Settings of this run."""

    pairs: Path
    """JSON lines, gzipped or not, with prompt, chosen and rejected."""
    out: Path = Path("runs/preferences")
    """Where the reward model and figures.json go."""
    seed: int = 0
    """Of the reward model's weights and order."""
    learning_rate: float = 3e-3
    """Adam's, at the start."""
    epochs: int = 1
    """Passes over the training pairs."""
    vocabulary: int = 2048
    """Tokens of the byte-pair encoding, learnt from the training pairs."""
    width: int = 32
    """Of the model: one layer, Llama's."""
    prompt_tokens: int = 16
    """The end of the dialogue that the model reads."""
    answer_tokens: int = 64
    """The beginning of an answer that the model reads."""
    threads: int = 1
    """CPU threads of torch."""


Pairs = list[dict[str, Any]]


def main(options: PreferenceArguments) -> dict[str, Any]:
    """Split, fit both, and print how often each agrees with people."""
    parts = split(read(options.pairs))
    print("  ".join(f"{name}: {len(part):,} pairs" for name, part in parts.items()), flush=True)
    figures: dict[str, Any] = {
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in asdict(options).items()}
    }
    words = bag_of_words(parts)
    model = reward_model(parts, options)
    longer = [np.array([len(row["chosen"]) - len(row["rejected"]) for row in part]) for part in parts.values()]
    for name, part in (("bag of words", words), ("reward model", model), ("the longer answer", longer)):
        figures[name] = {key: report(margins) for key, margins in zip(parts, part, strict=True)}
        print(f"{name:<18}" + "".join(f"  {key} {text(value)}" for key, value in figures[name].items()), flush=True)
    first, second = (correct(part[-1]) for part in (model, words))
    figures["difference"] = interval(first - second)
    print("reward model - bag of words, paired: {:+.3f} ± {:.3f}".format(*figures["difference"]))
    for subset in sorted({row["subset"] for row in parts["test"]}) if "subset" in parts["test"][0] else []:
        rows = np.array([row["subset"] == subset for row in parts["test"]])
        both = [report(part[-1][rows]) for part in (words, model)]
        figures[subset] = dict(zip(("bag of words", "reward model"), both, strict=True))
        print(f"  {subset:<28} bag of words {text(both[0])}  reward model {text(both[1])}")
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    return figures


def read(path: Path) -> Pairs:
    """The pairs that differ."""
    open_text = gzip.open if path.suffix == ".gz" else open
    with open_text(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file if line.strip()]
    return [row for row in rows if row["chosen"] != row["rejected"]]


def split(pairs: Pairs) -> dict[str, Pairs]:
    """Train 70%, validation 10%, test 20%, by the first 100 characters of the dialogue."""
    parts: dict[str, Pairs] = {"train": [], "validation": [], "test": []}
    for row in pairs:
        place = int(hashlib.sha256(row["prompt"].strip()[:100].encode()).hexdigest(), 16) % 10
        parts["train" if place < 7 else "validation" if place < 8 else "test"].append(row)
    return parts


def bag_of_words(parts: dict[str, Pairs]) -> list[NDArray[np.float64]]:
    """Logistic regression on the difference of two answers' tf-idf of words and pairs of words: margins of each part."""
    try:
        from scipy.sparse import vstack
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise RewardError(f"the bag of words needs scikit-learn: pip install 'textenv[peers]' ({error})") from error

    started = time.process_time()
    vectors = TfidfVectorizer(ngram_range=(1, 2), min_df=3, sublinear_tf=True)
    vectors.fit([row[side] for row in parts["train"] for side in ("chosen", "rejected")])
    x = [
        vectors.transform([row["chosen"] for row in part]) - vectors.transform([row["rejected"] for row in part])
        for part in parts.values()
    ]
    both, sides = vstack([x[0], -x[0]]), np.repeat([1, 0], len(parts["train"]))
    fits = [
        LogisticRegression(C=c, fit_intercept=False, max_iter=200).fit(both, sides) for c in (0.003, 0.01, 0.03, 0.1)
    ]
    best = max(fits, key=lambda fit: correct(x[1] @ fit.coef_[0]).mean())
    print(
        f"bag of words: C = {best.C}, {both.shape[1]:,} words and pairs, {time.process_time() - started:.0f} s of CPU",
        flush=True,
    )
    return [np.asarray(part @ best.coef_[0]) for part in x]


def reward_model(parts: dict[str, Pairs], options: PreferenceArguments) -> list[NDArray[np.float64]]:
    """A small Llama from nothing, trained on the pairs: margins of each part."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from rewards import train_reward_model
    from textenv.task import quiet_loading

    torch.set_num_threads(options.threads)
    started = time.process_time()
    tokenizer = byte_pairs((row[side] for row in parts["train"] for side in ("prompt", "chosen", "rejected")), options)

    def shortened(rows: Pairs) -> Pairs:
        kept = {"prompt": slice(-options.prompt_tokens, None)}
        kept |= dict.fromkeys(("chosen", "rejected"), slice(options.answer_tokens))
        columns = {
            name: tokenizer.batch_decode([ids[part] for ids in tokenizer([row[name] for row in rows])["input_ids"]])
            for name, part in kept.items()
        }
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    short = {name: shortened(part) for name, part in parts.items()}
    torch.manual_seed(options.seed)
    start = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=options.width,
            intermediate_size=2 * options.width,
            num_hidden_layers=1,
            num_attention_heads=4,
            max_position_embeddings=options.prompt_tokens + options.answer_tokens + 64,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
            tie_word_embeddings=True,
        )
    )

    def progress(done: int, updates: int, loss: float) -> None:
        if done % 50 == 0:
            print(f"update {done}/{updates}  loss {loss:.3f}", flush=True)

    model, _ = train_reward_model(
        short["train"],
        model=start,
        tokenizer=tokenizer,
        validation=None,
        epochs=options.epochs,
        learning_rate=options.learning_rate,
        batch_prompts=32,
        seed=options.seed,
        progress=progress,
    )
    with quiet_loading():
        model.save_pretrained(options.out)
    margins = []
    for part in short.values():
        prompts = [row["prompt"] for row in part]
        better, worse = (np.array(model(prompts, [row[side] for row in part])) for side in ("chosen", "rejected"))
        margins.append(better - worse)
    size = sum(parameter.numel() for parameter in model.model.parameters())
    print(f"reward model: {size:,} parameters, {time.process_time() - started:.0f} s of CPU", flush=True)
    return margins


def byte_pairs(texts: Iterator[str], options: PreferenceArguments) -> Any:
    """A tokenizer learnt from texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=options.vocabulary,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")


def correct(margins: Any) -> NDArray[np.float64]:
    """1 where the preferred answer scores higher, 1/2 where both score the same. Shape: (pairs,)."""
    return np.asarray((np.sign(margins) + 1) / 2, dtype=np.float64)


def interval(values: NDArray[np.float64]) -> tuple[float, float]:
    """Mean and half its 95% interval, by the normal approximation."""
    return float(values.mean()), float(1.96 * values.std(ddof=1) / np.sqrt(len(values)))


def report(margins: NDArray[np.float64]) -> tuple[float, float]:
    """Accuracy of margins, and half its interval."""
    return interval(correct(margins))


def text(value: Sequence[float]) -> str:
    """0.556 ± 0.024."""
    return f"{value[0]:.3f} ± {value[1]:.3f}"


if __name__ == "__main__":
    import tyro

    main(tyro.cli(PreferenceArguments, description="A reward model on people's preferences, against a bag of words."))
