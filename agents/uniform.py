"""The floor: tokens drawn uniformly from the allowed ones. Learns nothing.

Run: textenv train RandomAgent textenv/Arithmetic-v0
"""

from __future__ import annotations

from typing import Any, Self

import torch

from agents.base import LanguageModelAgent, MaybeCallback
from agents.rollout import collect


class RandomAgent(LanguageModelAgent):
    """Uniform over the tokens that the environment allows."""

    kl_placement = "none"

    def __init__(self, env: Any, **kwargs: Any) -> None:
        super().__init__(env, **kwargs)
        if self.peft_config is not None:
            raise ValueError("Expected no peft_config: RandomAgent learns nothing, so there is nothing to adapt.")
        with torch.no_grad():  # all logits equal; the action mask still applies
            for parameter in self.policy.model.get_output_embeddings().parameters():  # some heads have a bias
                parameter.zero_()
        self.policy.invalidate()

    def learn(self, total_timesteps: int, callback: MaybeCallback = None, progress_bar: bool = False) -> Self:
        """Run for so many tokens, and log what random writing is worth."""
        with self.start_learning(total_timesteps, callback, progress_bar) as session:
            while session.more():
                session.rollout_done(collect(self.env, self.policy, self.env.num_envs, self.rng, session.on_step))
                session.iteration_done()
        return self
