"""What is run, as data: agents with their settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Preset:
    """One agent with the settings that it has on every task."""

    agent: str
    """Its name in `agents`."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Fields of its config."""
    tokens: int = 60_000
    """Length of a run. The learning rate falls to 0 over it."""
    lanes: int = 128
    """`num_envs`; as many as episodes per update is fastest."""
    group_size: int = 1
    """Completions per prompt, for agents that compare them."""
    decay: bool = True
    """Whether the learning rate falls."""
    follows_j: bool = True
    """Whether the optimum of J is what the agent tends to. Others are scored all the same (docs/agents says why)."""

    def settings(self, tokens: int) -> dict[str, Any]:
        """The agent's config for a run of this length."""
        return dict(self.config) | ({"decay_timesteps": tokens} if self.decay else {})


ROLLOUT: dict[str, Any] = {"episodes_per_update": 128, "minibatch_episodes": 64}
PRESETS: dict[str, Preset] = {
    "PPO": Preset(
        agent="PPO",
        config=ROLLOUT | {"learning_rate": 2e-3},
        tokens=50_000,
    ),
    "A2C": Preset(agent="A2C", config={"learning_rate": 4e-3, "episodes_per_update": 128}),
    "REINFORCE": Preset(agent="REINFORCE", config={"learning_rate": 4e-3, "episodes_per_update": 128}, tokens=80_000),
    "RLOO": Preset(agent="RLOO", config=ROLLOUT | {"learning_rate": 2e-3}, group_size=16),
    "GRPO-dr_grpo": Preset(agent="GRPO", config=ROLLOUT | {"variant": "dr_grpo", "learning_rate": 2e-3}, group_size=16),
    "GRPO": Preset(
        agent="GRPO",
        config=ROLLOUT | {"variant": "grpo", "learning_rate": 1e-3},
        group_size=16,
        follows_j=False,
    ),
    "GRPO-dapo": Preset(
        agent="GRPO",
        config=ROLLOUT | {"variant": "dapo", "learning_rate": 1e-3},
        group_size=16,
        follows_j=False,
    ),
    "GRPO-gspo": Preset(
        agent="GRPO",
        config=ROLLOUT | {"variant": "gspo", "learning_rate": 1e-3},
        group_size=16,
        follows_j=False,
    ),
    "NLPO": Preset(
        agent="NLPO",
        config=ROLLOUT | {"learning_rate": 2e-3},
        tokens=50_000,
        follows_j=False,
    ),
    "OnlineDPO": Preset(
        agent="OnlineDPO",
        config={"labels": "bradley_terry", "learning_rate": 2e-3, "episodes_per_update": 128, "minibatch_pairs": 32},
        group_size=2,
    ),
    "ExpertIteration": Preset(
        agent="ExpertIteration",
        config={"rank_by": "return", "learning_rate": 1e-3, "episodes_per_update": 128, "minibatch_episodes": 32},
        group_size=4,
    ),
    "ILQL": Preset(agent="ILQL", config={"learning_rate": 1e-3}, lanes=128, follows_j=False),
    "BestOfN": Preset(agent="BestOfN", config={"n": 8}, decay=False, follows_j=False),
}
"""Name -> what is run under it."""
