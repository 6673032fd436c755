"""`textenv/Assistant-v0`: following instructions in a world where truth, harm and helpfulness can be checked.

Prompts are requests in a mini-English of a few hundred words; the model is the shipped fine-tuned one; the reward is the
shipped reward model, learned from the rankings of simulated labelers. The gold standard (`gold.judge`) is no part of
it: it belongs to the final evaluation alone. How the shipped models were made, and what they can do, is in the model card
beside them (`textenv/assets/assistant/README.md`).
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from textenv.prompts import PromptSource
from textenv.task import Task, build_task, entry_points, quiet_loading
from textenv.tasks.assistant.demonstrations import make_demonstrations
from textenv.tasks.assistant.requests import Request, make_requests
from textenv.tasks.assistant.text import BOS, MAX_PROMPT_TOKENS, MAX_RESPONSE_TOKENS, TURN, build_tokenizer

ASSETS = Path(__file__).parents[2] / "assets" / "assistant"
SIZES = {"train": 15_000, "development": 400, "validation": 400, "test": 600, "test_paraphrases": 300}
"""Requests per split. Settings are chosen on `development`; `test_paraphrases` words unseen tasks in ways that are not in any training data."""


@cache
def requests_of(split: str) -> tuple[Request, ...]:
    """The requests of a split, in the order of the environment's prompt ids."""
    if split not in SIZES:
        raise ValueError(f"Unknown split {split!r}; expected one of {list(SIZES)}.")
    return tuple(make_requests(split, SIZES[split]))  # type: ignore[arg-type]  # checked above


def prompt_rows(split: str) -> list[dict[str, Any]]:
    """The rows of a split: the prompt, its family, and, for a tenth of the training prompts, a person's answer."""
    requests = requests_of(split)
    rows: list[dict[str, Any]] = [{"prompt": request.prompt, "family": request.family} for request in requests]
    if split == "train":
        answers = {d.request.prompt: d.answer for d in make_demonstrations(list(requests), len(requests) // 10)}
        for row in rows:
            row["demonstration"] = answers.get(row["prompt"])
    return rows


def assistant_tokenizer() -> Any:
    """The world's tokenizer, which puts the markers of a conversation around a prompt by itself."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = build_tokenizer()
    markers = [(token, tokenizer.convert_tokens_to_ids(token)) for token in (BOS, TURN)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{BOS} $A {TURN}", special_tokens=markers)
    return tokenizer


def assistant_task(
    model: Any = None,
    prompts: PromptSource | None = None,
    reward: Any = None,
    split: str | None = None,
    max_new_tokens: int = MAX_RESPONSE_TOKENS,
    tokenizer: Any = None,
    device: str | None = None,
) -> Task:
    """Requests of the Assistant world.

    Args:
        model: Default: the shipped fine-tuned model.
        prompts: Instead of the world's requests.
        reward: Default: the shipped reward model.
        split: `"train"` (default), `"development"`, `"validation"`, `"test"` or `"test_paraphrases"`.
        max_new_tokens: The response budget.
        tokenizer: For a loaded model.
        device: Where a model given by name is loaded to.
    """
    if reward is None:
        import torch

        from rewards import RewardModel

        with quiet_loading():  # it is kept in half precision
            reward = RewardModel.from_pretrained(ASSETS / "reward", dtype=torch.float32)
    limit = None
    if prompts is None:
        split = split or "train"
        prompts, limit = {split: prompt_rows(split)}, MAX_PROMPT_TOKENS
    return build_task(
        ASSETS / "sft" if model is None else model,
        prompts,
        reward,
        tokenizer=tokenizer,
        split=split,
        max_new_tokens=max_new_tokens,
        max_prompt_tokens=limit,
        device=device,
    )


make, make_vec = entry_points(assistant_task)
