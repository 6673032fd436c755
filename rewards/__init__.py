"""Rewards for text: plain functions with TRL's signature, their combination, and learned reward models.

The learned part imports torch and transformers, which takes seconds; it is loaded when first asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from rewards.base import Batch, BoundReward, Completion, RewardError, RewardFunction, Scores, bind, completion_text
from rewards.combine import WeightedSum
from rewards.testing import RewardCheck, check_reward
from rewards.text import Distinct, LengthPenalty, Matches, contains, exact_match

if TYPE_CHECKING:
    from rewards.learned import RewardModel
    from rewards.rankings import (
        Ranking,
        RankingMetrics,
        RewardModelReport,
        evaluate_reward_model,
        ranking_loss,
        read_rankings,
        train_reward_model,
    )

__all__ = [
    "Batch",
    "BoundReward",
    "Completion",
    "Distinct",
    "LengthPenalty",
    "Matches",
    "Ranking",
    "RankingMetrics",
    "RewardCheck",
    "RewardError",
    "RewardFunction",
    "RewardModel",
    "RewardModelReport",
    "Scores",
    "WeightedSum",
    "bind",
    "check_reward",
    "completion_text",
    "contains",
    "evaluate_reward_model",
    "exact_match",
    "ranking_loss",
    "read_rankings",
    "train_reward_model",
]

_LAZY = {
    "RewardModel": "rewards.learned",
    "Ranking": "rewards.rankings",
    "RankingMetrics": "rewards.rankings",
    "RewardModelReport": "rewards.rankings",
    "evaluate_reward_model": "rewards.rankings",
    "ranking_loss": "rewards.rankings",
    "read_rankings": "rewards.rankings",
    "train_reward_model": "rewards.rankings",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'rewards' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
