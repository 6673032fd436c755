"""What a task is: a model to write with, prompts to begin from, a reward to end with; and how an id is made from it."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from textenv.lm import vocab_size
from textenv.prompts import Prompts, PromptSource, choose_split, did_you_mean, load_splits, tokenize

if TYPE_CHECKING:
    from textenv.env import TextEnv, TextVectorEnv

Made = TypeVar("Made")


@dataclass(frozen=True)
class Task:
    """Everything about an environment that does not depend on how many lanes it has.

    Attributes:
        model: The reference: a `transformers` causal LM. Frozen.
        tokenizer: Its tokenizer.
        prompts: The prompts of the chosen split.
        reward: Any reward function, or None for a task reward of 0.
        max_prompt_tokens: The longest prompt of any split.
        max_new_tokens: The response budget.
        stop_tokens: Ids that end an episode.
    """

    model: PreTrainedModel
    tokenizer: Any
    prompts: Prompts
    reward: Any
    max_prompt_tokens: int
    max_new_tokens: int
    stop_tokens: tuple[int, ...]

    @property
    def vocab_size(self) -> int:
        """V."""
        return vocab_size(self.model)


def build_task(
    model: Any,
    prompts: PromptSource,
    reward: Any,
    *,
    tokenizer: Any = None,
    split: str | None = None,
    max_new_tokens: int = 32,
    max_prompt_tokens: int | None = None,
    stop_tokens: Sequence[int] | None = None,
    device: str | None = None,
) -> Task:
    """Load the model and tokenise the prompts of all splits (the observation's shape is the same for each).

    Raises:
        ValueError: Something does not exist or does not fit; the message says what and how to mend it.
    """
    model, tokenizer = load_model(model, tokenizer, device)
    size = vocab_size(model)
    if len(tokenizer) > size:
        raise ValueError(
            f"The tokenizer knows {len(tokenizer)} tokens, the model only {size}. Take the model's own tokenizer, or call "
            f"model.resize_token_embeddings({len(tokenizer)}) and train the new rows."
        )
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise ValueError(f"Expected max_new_tokens to be a positive integer, got {max_new_tokens!r}.")
    stops = tuple(stop_tokens) if stop_tokens is not None else default_stop_tokens(model, tokenizer)
    if bad := [token for token in stops if not 0 <= token < size]:
        raise ValueError(f"Expected stop tokens between 0 and {size - 1}, got {bad}.")
    splits = load_splits(prompts)
    chosen = choose_split(splits, split)
    end = stops[0] if stops else None
    tokenised = {
        name: tokenize(
            rows,
            tokenizer,
            size,
            end,
            max_prompt_tokens,
            "the prompts" if name is None else f"split {name!r}",
        )
        for name, rows in splits.items()
    }
    longest = max(len(row) for part in tokenised.values() for row in part.token_ids)
    return Task(
        model=model,
        tokenizer=tokenizer,
        prompts=tokenised[chosen],
        reward=reward,
        max_prompt_tokens=longest if max_prompt_tokens is None else max_prompt_tokens,
        max_new_tokens=max_new_tokens,
        stop_tokens=stops,
    )


def load_model(model: Any, tokenizer: Any = None, device: str | None = None) -> tuple[PreTrainedModel, Any]:
    """A model and its tokenizer, from a hub name, a directory, or loaded objects.

    Weights are read in float32: updates of a language model are too small for half precision. The model becomes the
    reference: also one that you pass loaded is put into eval mode and frozen, in place. Agents train a copy of it.

    Args:
        model: A name, a directory or a loaded causal LM (which is not moved).
        tokenizer: A name, a directory or a loaded tokenizer; None takes the model's own.
        device: Where a model is loaded to; None is the GPU where there is one.
    """
    if model is None:
        raise ValueError("Expected model= to be a hub name, a directory or a loaded causal language model, got None.")
    if isinstance(model, str | Path):
        source = os.path.expanduser(model)
        tokenizer = source if tokenizer is None else tokenizer
        try:
            with quiet_loading():
                model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        except Exception as error:
            if Path(source).exists() or source.startswith((".", "/", "~")):
                raise ValueError(
                    f"Could not load a causal language model from {source!r} ({type(error).__name__}: {error}). Expected a directory that "
                    "save_pretrained has written (config.json and model.safetensors)."
                ) from error
            raise ValueError(
                f"Could not load the model {source!r} ({type(error).__name__}): no such directory, and the hub did not give it. Check the name, "
                "your connection and HF_HUB_OFFLINE, or pass a local directory."
            ) from error
        model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if not isinstance(model, PreTrainedModel) or model.get_output_embeddings() is None:
        hint = " Merge its adapters: model.merge_and_unload()." if hasattr(model, "merge_and_unload") else ""
        raise ValueError(f"Expected a transformers causal language model, got {type(model).__name__}.{hint}")
    if tokenizer is None:
        raise ValueError(
            "A loaded model does not carry its tokenizer: pass tokenizer= (a name, a directory or a loaded one)."
        )
    if isinstance(tokenizer, str | Path):
        try:
            tokenizer = AutoTokenizer.from_pretrained(os.path.expanduser(tokenizer))
        except Exception as error:
            raise ValueError(
                f"Could not load a tokenizer from {str(tokenizer)!r} ({type(error).__name__}: {error})."
            ) from error
    return model.eval().requires_grad_(False), tokenizer


@contextmanager
def quiet_loading() -> Iterator[None]:
    """No progress bar for reading weights: environments are made often, and models here are small."""
    enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            transformers_logging.enable_progress_bar()


def default_stop_tokens(model: PreTrainedModel, tokenizer: Any) -> tuple[int, ...]:
    """The end tokens that the tokenizer and the generation config name."""
    config = getattr(model, "generation_config", None)
    named = [tokenizer.eos_token_id, getattr(config, "eos_token_id", None)]
    flat = [token for item in named for token in (item if isinstance(item, list) else [item])]
    return tuple(dict.fromkeys(int(token) for token in flat if token is not None))


def entry_points(
    task: Callable[..., Task], env: type[TextEnv] | None = None, vector_env: type[TextVectorEnv] | None = None
) -> tuple[Callable[..., TextEnv], Callable[..., TextVectorEnv]]:
    """The two callables that Gymnasium's registry wants, from a function that builds a `Task`.

    Keywords that `task` names go there, the rest to the environment. An unknown one is a ValueError: Gymnasium rewraps
    a TypeError together with every keyword, the whole list of prompts among them.

    Args:
        task: Builds the task.
        env: The class of the single environment; None is `TextEnv`.
        vector_env: The class of the vector environment; None is `TextVectorEnv`.
    """

    def split_keywords(kwargs: dict[str, Any]) -> tuple[Task, dict[str, Any]]:
        from textenv.env import TextVectorEnv

        env_names = [name for name in inspect.signature(TextVectorEnv).parameters if name not in ("num_envs", "task")]
        task_names = list(inspect.signature(task).parameters)
        for name in kwargs:
            if name not in (*env_names, *task_names):
                raise ValueError(
                    f"Unknown keyword {name!r}; expected one of {sorted({*env_names, *task_names})}.{did_you_mean(name, [*env_names, *task_names])}"
                )
        env_kwargs = {name: kwargs.pop(name) for name in env_names if name in kwargs}
        required = [
            name
            for name, p in inspect.signature(task).parameters.items()
            if p.default is p.empty and name not in kwargs
        ]
        if required:
            raise ValueError(
                f"Missing keyword{'s' if len(required) > 1 else ''}: {', '.join(f'{name}=' for name in required)}."
            )
        return task(**kwargs), env_kwargs

    def make(**kwargs: Any) -> TextEnv:
        from textenv.env import TextEnv

        built, env_kwargs = split_keywords(kwargs)
        return (env or TextEnv)(built, **env_kwargs)

    def make_vec(num_envs: int = 1, **kwargs: Any) -> TextVectorEnv:
        from textenv.env import TextVectorEnv

        built, env_kwargs = split_keywords(kwargs)
        return (vector_env or TextVectorEnv)(num_envs, built, **env_kwargs)

    return _readable(make), _readable(make_vec)


def _readable(create: Callable[..., Made]) -> Callable[..., Made]:
    """Turn a TypeError into a ValueError, which Gymnasium lets pass as it is."""

    @functools.wraps(create)
    def readable(**kwargs: Any) -> Made:
        try:
            return create(**kwargs)
        except TypeError as error:
            raise ValueError(str(error)) from error

    return readable
