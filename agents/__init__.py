"""Agents that learn in textenv: one file per algorithm, read top to bottom."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agents.a2c import A2C, A2CConfig
    from agents.base import Agent, LanguageModelAgent
    from agents.best_of_n import BestOfN, BestOfNConfig
    from agents.checkpoints import CheckpointError
    from agents.config import AgentConfig
    from agents.expert_iteration import ExpertIteration, ExpertIterationConfig
    from agents.grpo import GRPO, GRPOConfig
    from agents.ilql import ILQL, ILQLConfig
    from agents.nlpo import NLPO, NLPOConfig
    from agents.online_dpo import OnlineDPO, OnlineDPOConfig
    from agents.ppo import PPO, PPOConfig
    from agents.reinforce import REINFORCE, REINFORCEConfig
    from agents.rloo import RLOO, RLOOConfig
    from agents.sft import SFT, SFTConfig
    from agents.uniform import RandomAgent

AGENTS = {
    "A2C": "agents.a2c",
    "BestOfN": "agents.best_of_n",
    "ExpertIteration": "agents.expert_iteration",
    "GRPO": "agents.grpo",
    "ILQL": "agents.ilql",
    "NLPO": "agents.nlpo",
    "OnlineDPO": "agents.online_dpo",
    "PPO": "agents.ppo",
    "REINFORCE": "agents.reinforce",
    "RLOO": "agents.rloo",
    "RandomAgent": "agents.uniform",
    "SFT": "agents.sft",
}
"""Every agent and its file."""

_LAZY = AGENTS | {
    "Agent": "agents.base",
    "AgentConfig": "agents.config",
    "CheckpointError": "agents.checkpoints",
    "LanguageModelAgent": "agents.base",
    "A2CConfig": "agents.a2c",
    "BestOfNConfig": "agents.best_of_n",
    "ExpertIterationConfig": "agents.expert_iteration",
    "GRPOConfig": "agents.grpo",
    "ILQLConfig": "agents.ilql",
    "NLPOConfig": "agents.nlpo",
    "OnlineDPOConfig": "agents.online_dpo",
    "PPOConfig": "agents.ppo",
    "REINFORCEConfig": "agents.reinforce",
    "RLOOConfig": "agents.rloo",
    "SFTConfig": "agents.sft",
}

__all__ = [
    "A2C",
    "AGENTS",
    "GRPO",
    "ILQL",
    "NLPO",
    "PPO",
    "REINFORCE",
    "RLOO",
    "SFT",
    "A2CConfig",
    "Agent",
    "AgentConfig",
    "BestOfN",
    "BestOfNConfig",
    "CheckpointError",
    "ExpertIteration",
    "ExpertIterationConfig",
    "GRPOConfig",
    "ILQLConfig",
    "LanguageModelAgent",
    "NLPOConfig",
    "OnlineDPO",
    "OnlineDPOConfig",
    "PPOConfig",
    "REINFORCEConfig",
    "RLOOConfig",
    "RandomAgent",
    "SFTConfig",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'agents' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
