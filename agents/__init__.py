"""Agents that learn in textenv: one file per algorithm, read top to bottom."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agents.base import Agent, AgentConfig, CheckpointError, LanguageModelAgent
    from agents.ppo import PPO, PPOConfig
    from agents.sft import SFT, SFTConfig
    from agents.uniform import RandomAgent

AGENTS = {"PPO": "agents.ppo", "RandomAgent": "agents.uniform", "SFT": "agents.sft"}
"""Every agent and its file."""

_LAZY = AGENTS | {
    "Agent": "agents.base",
    "AgentConfig": "agents.base",
    "CheckpointError": "agents.base",
    "LanguageModelAgent": "agents.base",
    "PPOConfig": "agents.ppo",
    "SFTConfig": "agents.sft",
}

__all__ = [
    "AGENTS",
    "PPO",
    "SFT",
    "Agent",
    "AgentConfig",
    "CheckpointError",
    "LanguageModelAgent",
    "PPOConfig",
    "RandomAgent",
    "SFTConfig",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'agents' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
