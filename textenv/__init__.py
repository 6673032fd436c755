"""textenv: language-model generation as a real Gymnasium environment.

Importing it registers the ids with Gymnasium and imports no torch; heavy modules load when an environment is made.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from gymnasium.envs.registration import register

if TYPE_CHECKING:
    from textenv.env import TextEnv, TextVectorEnv
    from textenv.kl import AdaptiveKL, FixedKL, KLPenalty
    from textenv.ledger import Episode, Episodes, Ledger
    from textenv.lm import LanguageModel
    from textenv.sampling import Behaviour
    from textenv.task import Task

__version__ = "0.1.0"

_LAZY = {
    "AdaptiveKL": "textenv.kl",
    "Behaviour": "textenv.sampling",
    "Episode": "textenv.ledger",
    "Episodes": "textenv.ledger",
    "FixedKL": "textenv.kl",
    "KLPenalty": "textenv.kl",
    "LanguageModel": "textenv.lm",
    "Ledger": "textenv.ledger",
    "Task": "textenv.task",
    "TextEnv": "textenv.env",
    "TextVectorEnv": "textenv.env",
}

__all__ = [  # noqa: RUF022  # by what they are
    # environments
    "TextEnv",
    "TextVectorEnv",
    "Task",
    # the language model and its distribution
    "LanguageModel",
    "Behaviour",
    # the KL penalty
    "KLPenalty",
    "FixedKL",
    "AdaptiveKL",
    # deferred settlement
    "Ledger",
    "Episodes",
    "Episode",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'textenv' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


for _id, _module in {
    "textenv/Arithmetic-v0": "arithmetic",
    "textenv/Assistant-v0": "assistant.task",
    "textenv/Prompts-v0": "prompts",
    "textenv/Tree-v0": "tree",
}.items():
    register(
        _id,
        entry_point=f"textenv.tasks.{_module}:make",
        vector_entry_point=f"textenv.tasks.{_module}:make_vec",
    )
