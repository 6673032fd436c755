"""`textenv/Prompts-v0`: your own model, prompts and reward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium as gym

from textenv.prompts import PromptSource
from textenv.task import Task, build_task, entry_points


def prompts_task(
    model: Any,
    prompts: PromptSource,
    reward: Any = None,
    split: str | None = None,
    max_new_tokens: int = 32,
    max_prompt_tokens: int | None = None,
    tokenizer: Any = None,
    stop_tokens: Sequence[int] | None = None,
    device: str | None = None,
) -> Task:
    """Generation from your own prompts.

    Args:
        model: A hub name, a directory or a loaded causal LM: the reference, and what agents start from.
        prompts: A list of texts or of message lists; rows with a `prompt` and any further columns (they reach the reward);
            a .jsonl, .json, .csv or .txt file; a mapping or directory of splits; or a Hugging Face data set.
        reward: A function with TRL's signature, a `rewards.WeightedSum`, or a `rewards.RewardModel`. None pays 0.
        split: Which split, where there are several.
        max_new_tokens: The response budget.
        max_prompt_tokens: Longer prompts are an error. Default: the longest prompt of any split.
        tokenizer: For a loaded model.
        stop_tokens: Ids that end an episode. Default: the tokenizer's and the generation config's.
        device: Where a model given by name is loaded to. Default: the GPU where there is one.
    """
    if reward is None:
        gym.logger.warn(
            "No reward= was given: every episode's task reward is 0, which is of use for imitation and generation only."
        )
    return build_task(
        model,
        prompts,
        reward,
        tokenizer=tokenizer,
        split=split,
        max_new_tokens=max_new_tokens,
        max_prompt_tokens=max_prompt_tokens,
        stop_tokens=stop_tokens,
        device=device,
    )


make, make_vec = entry_points(prompts_task)
