"""`textenv/Arithmetic-v0`: two-digit sums with a verifiable reward.

The shipped model (430k parameters) has read sums written by careful and sloppy people, so it has an idea of how to add, and is
right less than one time in five (18.1% measured): what reinforcement learning has to do is mostly to choose. Splits are by
unordered pair: no test sum, nor its mirror image, is in the training text or among the training prompts.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rewards import exact_match
from textenv.prompts import PromptSource
from textenv.task import Task, build_task, entry_points

CHARACTERS = "0123456789+="
LARGEST = 99
"""The largest operand."""
ASSET = Path(__file__).parent.parent / "assets" / "arithmetic"

CAREFUL = 0.15
"""Share of right sums in the training text; in the others the units, the tens or both are off by one."""
SLIPS = (-11, -10, -9, -1, 1, 9, 10, 11)


def sums(split: str, max_operand: int = LARGEST) -> NDArray[np.int64]:
    """The ordered pairs of a split, four fifths of the unordered ones to `train`. Shape: (n, 2).

    A pair belongs to the same split whatever `max_operand` is: smaller tasks are parts of the largest.
    """
    if split not in ("train", "test"):
        raise ValueError(f"Expected split 'train' or 'test', got {split!r}.")
    low, high = np.triu_indices(LARGEST + 1)
    order = np.random.default_rng(0).permutation(len(low))
    cut = len(order) // 5
    chosen = np.sort(order[:cut] if split == "test" else order[cut:])
    pairs = np.stack([low[chosen], high[chosen]], axis=1)
    pairs = pairs[pairs[:, 1] <= max_operand]
    mirrored = pairs[pairs[:, 0] != pairs[:, 1]][:, ::-1]
    return np.concatenate([pairs, mirrored])


def pretraining_text(lines: int, seed: int = 0) -> Iterator[str]:
    """Lines such as `27+58=84`, by careful and sloppy people, about pairs of the training split."""
    rng = np.random.default_rng(seed)
    pairs = sums("train")
    for a, b in pairs[rng.integers(len(pairs), size=lines)]:
        slip = 0 if rng.random() < CAREFUL else SLIPS[rng.integers(len(SLIPS))]
        yield f"{a}+{b}={max(0, a + b + slip)}"


def arithmetic_task(
    model: Any = ASSET,
    prompts: PromptSource | None = None,
    reward: Any = exact_match,
    split: str | None = None,
    max_new_tokens: int = 4,
    max_operand: int = 99,
    tokenizer: Any = None,
    device: str | None = None,
) -> Task:
    """Sums of two numbers.

    Args:
        model: The shipped one, or any causal LM.
        prompts: Instead of sums of numbers up to `max_operand`; with an `answer` column for the default reward.
        reward: 1 for the right sum, 0 otherwise (`rewards.exact_match`).
        split: `"train"` (default) or `"test"`.
        max_new_tokens: Three digits and the stop token.
        max_operand: 9 to 99.
        tokenizer: For a loaded model.
        device: Where a model given by name is loaded to.
    """
    if not 9 <= max_operand <= LARGEST:
        raise ValueError(f"Expected max_operand between 9 and {LARGEST}, got {max_operand}.")
    if prompts is None:
        prompts = {
            name: [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a, b in sums(name, max_operand).tolist()]
            for name in ("train", "test")
        }
    return build_task(
        model, prompts, reward, tokenizer=tokenizer, split=split, max_new_tokens=max_new_tokens, device=device
    )


make, make_vec = entry_points(arithmetic_task)
