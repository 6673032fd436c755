"""Rewards for text: plain functions with TRL's signature, their combination, and learned reward models.

The learned part imports torch and transformers, which takes seconds; it is loaded when first asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from rewards.base import Combination, Completion, RewardError, RewardFunction, RewardTimeout, completion_text
from rewards.binding import Batch, BoundReward, Scores, bind
from rewards.calls import Cached, TimeLimit
from rewards.combine import Clipped, Ensemble, Gate, MissingStop, Normalized, WeightedSum
from rewards.testing import RewardCheck, check_reward
from rewards.text import Bleu, ChrF, Distinct, LengthPenalty, Matches, Rouge, contains, exact_match
from rewards.verify import FinalAnswer, PassesTests, arithmetic, valid_json

if TYPE_CHECKING:
    from rewards.learned import Classifier, RewardModel
    from rewards.rankings import (
        Ranking,
        RankingMetrics,
        RewardModelReport,
        best_of_k_loss,
        evaluate_reward_model,
        plackett_luce_loss,
        ranking_loss,
        read_rankings,
        train_reward_model,
    )

__all__ = [
    "Batch",
    "Bleu",
    "BoundReward",
    "Cached",
    "ChrF",
    "Classifier",
    "Clipped",
    "Combination",
    "Completion",
    "Distinct",
    "Ensemble",
    "FinalAnswer",
    "Gate",
    "LengthPenalty",
    "Matches",
    "MissingStop",
    "Normalized",
    "PassesTests",
    "Ranking",
    "RankingMetrics",
    "RewardCheck",
    "RewardError",
    "RewardFunction",
    "RewardModel",
    "RewardModelReport",
    "RewardTimeout",
    "Rouge",
    "Scores",
    "TimeLimit",
    "WeightedSum",
    "arithmetic",
    "best_of_k_loss",
    "bind",
    "check_reward",
    "completion_text",
    "contains",
    "evaluate_reward_model",
    "exact_match",
    "plackett_luce_loss",
    "ranking_loss",
    "read_rankings",
    "train_reward_model",
    "valid_json",
]

_LAZY = {
    "Classifier": "rewards.learned",
    "best_of_k_loss": "rewards.rankings",
    "plackett_luce_loss": "rewards.rankings",
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
    return sorted(__all__)
