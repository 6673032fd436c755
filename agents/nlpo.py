"""Natural language policy optimisation: PPO among the tokens that a slower copy of the policy finds likely.

Ramamurthy et al. (2023), https://arxiv.org/abs/2210.01241 (RL4LMs), algorithm 1.

    maximise  E[ r(x, y) - beta log(pi_psi(y|x) / pi_ref(y|x)) ],  pi_psi(a|s) ~ pi(a|s) for a in the nucleus of pi_mask(.|s), else 0

pi_mask is a copy of pi that follows every few rollouts; its nucleus is the smallest set of tokens whose probability reaches
`mask_top_p`. Sampling, scoring and training are under that one mask, so the first ratio is 1, and the KL is that of what is
sampled: it starts at -log(mass of the nucleus), above 0, because the reference is not masked. A completion outside the
nucleus can never be found: the best policy of E[r] - beta KL is out of reach, however long one trains.

Differences from the paper: 1) the mask is the nucleus of the distribution that is sampled, temperature included 2) a drawn token
stays allowed while its rollout is trained on, even where rounding puts it on the other side of the nucleus' border 3) advantages
and clipping are those of `agents/ppo.py`, whose update this is. A checkpoint's `policy/` is the model without the mask.

Run: textenv train NLPO textenv/Arithmetic-v0 --seed 0
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from agents.base import MaybeCallback
from agents.policy import Policy
from agents.ppo import PPO, PPOConfig
from agents.rollout import collect
from textenv.lm import LanguageModel
from textenv.sampling import FORBIDDEN, Behaviour


@dataclass(frozen=True, kw_only=True)
class NLPOConfig(PPOConfig):
    """Settings of NLPO: those of PPO, and of the mask."""

    mask_top_p: float = 0.9
    """Probability of the nucleus of the mask policy (RL4LMs' `top_mask`)."""
    mask_min_tokens: int = 1
    """Tokens that the nucleus has at least. RL4LMs keeps 100 of GPT-2's 50,257; with a small vocabulary that would mask nothing."""
    mask_update_iterations: int = 5
    """Rollouts after which the mask policy becomes a copy of the policy again (RL4LMs' `target_update_iterations`)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.mask_top_p <= 1:
            raise ValueError(f"Expected 0 < mask_top_p <= 1, got {self.mask_top_p!r}.")
        for name in ("mask_min_tokens", "mask_update_iterations"):
            if getattr(self, name) < 1:
                raise ValueError(f"Expected {name} >= 1, got {getattr(self, name)!r}.")
        if self.top_k is not None or self.top_p is not None:
            raise ValueError(
                f"Expected top_k=None and top_p=None, got {self.top_k!r} and {self.top_p!r}: NLPO's mask is its truncation, and two of them "
                "may have no token in common. Set mask_top_p."
            )


class NLPO(PPO):
    """PPO under the mask of a slower copy of the policy.

    Args:
        env: A textenv vector environment.
        kwargs: See `PPO`; further keywords are fields of `NLPOConfig`.

    Example:
        >>> agent = NLPO(gym.make_vec("textenv/Arithmetic-v0", num_envs=64), seed=0, mask_top_p=0.95)
        >>> agent.learn(total_timesteps=50_000)
    """

    Config = NLPOConfig
    config: NLPOConfig
    policy: MaskedPolicy

    def make_policy(self) -> MaskedPolicy:
        """A policy with its mask."""
        return MaskedPolicy(self.lanes.reference, self.config.mask_top_p, self.config.mask_min_tokens, self.peft_config)

    def learn(self, total_timesteps: int, callback: MaybeCallback = None, progress_bar: bool = False) -> Self:
        """Train until `total_timesteps` more tokens have been sampled (the last rollout is finished)."""
        self.check_ptx()
        with self.start_learning(total_timesteps, callback, progress_bar) as session:
            while session.more():
                if len(self.history) % self.config.mask_update_iterations == 0:
                    self.policy.update_mask()
                episodes = collect(self.env, self.policy, self.config.episodes_per_update, self.rng, session.on_step)
                session.rollout_done(episodes)
                self.update(episodes)
                session.iteration_done()
        return self

    def trained_modules(self) -> dict[str, torch.nn.Module]:
        """Critic and mask policy: without the latter a resumed run would sample under another mask."""
        return {"critic": self.critic, "mask": self.policy.mask_lm.model}


class MaskedPolicy(Policy):
    """A policy restricted to the nucleus of a frozen copy of itself.

    Args:
        reference: What policy and mask policy start as.
        top_p: Probability of the nucleus.
        min_tokens: Tokens that it has at least.
        peft_config: See `Policy`.
    """

    def __init__(
        self, reference: LanguageModel, top_p: float = 0.9, min_tokens: int = 1, peft_config: Any = None
    ) -> None:
        super().__init__(reference, peft_config=peft_config)
        # The nucleus is cut here and not by `Behaviour`: it has a least size, and a training pass keeps drawn tokens.
        self.top_p, self.min_tokens = top_p, min_tokens
        self.mask_lm = self.lm.clone(trainable=False)

    def update_mask(self) -> None:
        """Let the mask policy be a copy of the policy as it is now."""
        self.mask_lm.model.load_state_dict(self.model.state_dict())
        self.invalidate()

    def invalidate(self) -> None:
        """Forget cached computations of policy and mask policy."""
        super().invalidate()
        self.mask_lm.invalidate()

    @torch.no_grad()
    def next_logits(self, observations: NDArray[np.int64]) -> torch.Tensor:
        """Logits under the mask. Shape: (N, L) -> (N, V)."""
        logits = super().next_logits(observations)
        mask_logits = self.mask_lm.behaviour.logits(self.mask_lm.next_logits(observations), observations)
        return logits.masked_fill(~nucleus(mask_logits, self.top_p, self.min_tokens), FORBIDDEN)

    def response_logits(
        self,
        hidden: torch.Tensor,
        tokens: NDArray[np.int64],
        prompt_length: NDArray[np.int64],
        response_length: NDArray[np.int64],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same for whole responses; the mask policy reads them in one pass of its own. Shapes: (M, V), (M,)."""
        part = tokens, prompt_length, response_length
        logits, drawn = super().response_logits(hidden, *part)
        with torch.no_grad():
            mask_logits, _ = self.mask_lm.response_logits(self.mask_lm.response_hidden(*part), *part)
            allowed = nucleus(mask_logits, self.top_p, self.min_tokens).scatter(-1, drawn[:, None], True)
        return logits.masked_fill(~allowed, FORBIDDEN), drawn


def nucleus(logits: torch.Tensor, top_p: float, min_tokens: int) -> torch.Tensor:
    """The most probable tokens, until their probability reaches `top_p` and there are `min_tokens` of them (if so many are allowed).

    Args:
        logits: `-inf` where a token is not allowed. Shape: (N, V).
        top_p: Above 0, at most 1.
        min_tokens: At least 1.

    Returns:
        True inside. Shape: (N, V).
    """
    inside = Behaviour(top_p=top_p).logits(logits) > FORBIDDEN
    if min_tokens > 1:
        inside |= Behaviour(top_k=min_tokens).logits(logits) > FORBIDDEN
    return inside
