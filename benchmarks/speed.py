"""How fast the Gym loop writes, against `model.generate`, on the same work in one run.

Both sides write the same number of episodes from the same prompts with the same model, in float32, at temperature 1.
Ours counts everything up to the settled ledger; only tokens of finished episodes count, on both sides. Repetitions are
interleaved, and what is printed is the median of their ratios: single times mean little on a shared machine.

Run: python -m benchmarks.speed
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

import textenv  # noqa: F401  # registers the ids
from textenv.sampling import draw
from textenv.tokenizer import character_tokenizer


@dataclass(frozen=True)
class Work:
    """What is written.

    Attributes:
        name: For the table.
        hidden_size: Width of the Llama.
        layers: Depth.
        vocab_size: V.
        lanes: Episodes written at a time.
        episodes: In all.
        budget: Tokens per response at most.
        self_stopping: Responses end by themselves, after a third of the budget on average; else all at the budget.
    """

    name: str
    hidden_size: int
    layers: int
    vocab_size: int
    lanes: int = 64
    episodes: int = 256
    budget: int = 64
    self_stopping: bool = True


SMOKE = (
    Work("0.5M parameters, V=512, responses stop by themselves", 96, 3, 512, episodes=128, budget=48),
    Work("0.5M parameters, V=512, every response at the cap", 96, 3, 512, episodes=64, budget=48, self_stopping=False),
)


def measure(work: Work, repetitions: int = 5) -> dict[str, Any]:
    """Median tokens per second of both sides, and of their ratio."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=work.vocab_size,
            hidden_size=work.hidden_size,
            intermediate_size=3 * work.hidden_size,
            num_hidden_layers=work.layers,
            num_attention_heads=4,
            max_position_embeddings=256,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    ).eval()
    model.generation_config.eos_token_id = None  # else generate falls back on it where none is asked for
    if work.self_stopping:
        stop_with_probability(model, 3 / work.budget)
    tokenizer = character_tokenizer("abcdefghijklmnopqrstuvwxyz ")
    rng = np.random.default_rng(0)
    prompts = ["".join(rng.choice(list("abcdefgh "), size=12)) + "x" for _ in range(work.episodes)]
    envs = gym.make_vec(
        "textenv/Prompts-v0",
        num_envs=work.lanes,
        model=model,
        tokenizer=tokenizer,
        prompts=prompts,
        reward=lambda completions, **columns: [0.0] * len(completions),
        beta=0.0,
        max_new_tokens=work.budget,
        stop_tokens=[2] if work.self_stopping else [],
    )
    sides: dict[str, Callable[[], int]] = {
        "textenv": lambda: ours(envs, work, rng),
        "generate": lambda: theirs(model, tokenizer, prompts, work),
    }
    for side in sides.values():
        side()  # warm up
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repetitions):
        for name, side in sides.items():
            begin = time.perf_counter()
            tokens = side()
            speeds[name].append(tokens / (time.perf_counter() - begin))
    ratios = [a / b for a, b in zip(speeds["textenv"], speeds["generate"], strict=True)]
    return (
        {"work": work.name} | {n: float(np.median(v)) for n, v in speeds.items()} | {"ratio": float(np.median(ratios))}
    )


def ours(envs: Any, work: Work, rng: np.random.Generator) -> int:
    """The Gym loop, deferred lane."""
    lanes = envs.unwrapped
    lm = lanes.reference
    with lanes.deferred(episodes=work.episodes) as ledger:
        observations, _ = envs.reset()
        while not ledger.done:
            observations, *_ = envs.step(draw(lm.next_logits(observations), rng.random(work.lanes)).numpy())
    return int(ledger.episodes.response_length.sum())


def theirs(model: Any, tokenizer: Any, prompts: list[str], work: Work) -> int:
    """`model.generate`, batch after batch, left-padded, as its users write it."""
    tokenizer.padding_side = "left"
    settings = GenerationConfig(
        do_sample=True,
        top_k=0,
        max_new_tokens=work.budget,
        pad_token_id=0,
        eos_token_id=2 if work.self_stopping else None,
    )
    total = 0
    for begin in range(0, len(prompts), work.lanes):
        batch = tokenizer(prompts[begin : begin + work.lanes], return_tensors="pt", padding=True)
        out = model.generate(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], generation_config=settings
        )
        written = out[:, batch["input_ids"].shape[1] :]
        ended = written == (2 if work.self_stopping else -1)
        lengths = torch.where(ended.any(1), ended.int().argmax(1) + 1, written.shape[1])
        total += int(lengths.sum())
    return total


def stop_with_probability(model: Any, probability: float) -> None:
    """Make the stop token about that probable at each step, by a bias of the head."""
    with torch.no_grad():
        head = model.get_output_embeddings()
        bias = torch.nn.Parameter(torch.zeros(head.out_features), requires_grad=False)
        bias[2] = np.log(probability * head.out_features)
        head.bias = bias


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for work in SMOKE:
        row = measure(work)
        print(
            f"{row['work']}: {row['textenv']:,.0f} tokens/s, generate {row['generate']:,.0f}, ratio {row['ratio']:.2f}"
        )


if __name__ == "__main__":
    main()
