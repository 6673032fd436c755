"""The KL penalty, paid inside `env.step`, and the controllers of its coefficient.

At each transition the environment adds `-beta * (log pi(a|s) - log pi_ref(a|s))`: the k1 estimator, detached, in the
reward. Its reward-to-go gives the exact gradient of `E[r] - beta KL(pi || pi_ref)`. The other estimators are for
logging and for differentiated loss terms: paid in a reward, k3 and the exact per-state KL give the wrong gradient
(on an enumerated task the per-state KL was off by 68%, as bad as no penalty at all).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray


@runtime_checkable
class PolicyLike(Protocol):
    """What the penalty needs of a policy."""

    def log_probs(self, observations: NDArray[np.int64], actions: NDArray[np.int64]) -> NDArray[np.floating[Any]]:
        """Log-probabilities, in nats, of the distribution that is actually sampled. Shapes: (N, L), (N,) -> (N,)."""
        ...


@dataclass
class FixedKL:
    """A constant coefficient."""

    beta: float
    """Reward per nat."""

    def __post_init__(self) -> None:
        _check_beta(self.beta)

    def observe(self, kl: NDArray[np.float64]) -> None:
        """Take note of ended episodes' KL (nats per episode): a constant ignores it."""


@dataclass
class AdaptiveKL:
    """Proportional control of beta towards a target KL (Ziegler et al., 2019, https://arxiv.org/abs/1909.08593, 2.2).

    After every `episodes_per_update` episodes with mean KL k: `beta *= 1 + clip(k / target - 1, -0.2, 0.2) * episodes_per_update / horizon`.
    """

    beta: float = 0.1
    """The first coefficient, reward per nat."""
    target: float = 6.0
    """Wanted KL, in nats per *episode* (not per token)."""
    horizon: int = 10_000
    """Episodes in which a constant error of 20% changes beta by about 20%."""
    episodes_per_update: int = 128
    """Episodes averaged before beta moves: single KLs are noisy, and clipping noise would bias it."""
    pending: list[float] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        _check_beta(self.beta)
        if self.target <= 0 or self.horizon <= 0 or self.episodes_per_update <= 0:
            raise ValueError(f"Expected target, horizon and episodes_per_update > 0, got {self}.")

    def observe(self, kl: NDArray[np.float64]) -> None:
        """Take note of ended episodes' KL. Shape: (B,), nats per episode."""
        self.pending.extend(float(value) for value in kl)
        while len(self.pending) >= self.episodes_per_update:
            batch, self.pending = (
                self.pending[: self.episodes_per_update],
                self.pending[self.episodes_per_update :],
            )
            self.beta *= kl_factor(float(np.mean(batch)), self.target, len(batch), self.horizon)


Controller = FixedKL | AdaptiveKL


def kl_factor(kl: float, target: float, episodes: int, horizon: int) -> float:
    """What beta is multiplied by after `episodes` episodes of mean KL `kl` (nats per episode)."""
    return 1 + float(np.clip(kl / target - 1, -0.2, 0.2)) * episodes / horizon


class KLPenalty:
    """The environment's KL component: whose KL is measured, and what is paid for it.

    Args:
        beta: The coefficient (reward per nat) or a controller of it.
        kind: `"policy"` pays `-beta (log pi - log pi_ref)` of the attached policy. `"reference"` pays
            `beta log pi_ref(a|s)`, for agents that add `-beta log pi(a|s)` to the reward themselves; that part is Markov
            and needs no policy. An entropy bonus in the loss is *not* the missing part: it carries the entropy gradient of
            the current state only (17.5% relative gradient error on an enumerated 3 x 3 task), and agents that
            normalise advantages do not scale it with them.
    """

    def __init__(self, beta: float | Controller, kind: str = "policy") -> None:
        if kind in ("k3", "full", "k2"):
            raise ValueError(
                f"kl={kind!r} cannot be paid in the reward: only k1's reward-to-go gives the gradient of the KL (k3 is off, and detached "
                "'full' gives the current step none). Expected kl='policy' (k1) or kl='reference'; use other estimators in a loss, or for logging."
            )
        if kind not in ("policy", "reference"):
            raise ValueError(f"Expected kl='policy' or kl='reference', got {kind!r}.")
        self.controller: Controller = beta if isinstance(beta, FixedKL | AdaptiveKL) else FixedKL(_number(beta))
        self.kind = kind
        self.policy: PolicyLike | None = None
        self.pay = True

    @property
    def beta(self) -> float:
        """The coefficient that the next episode starts with."""
        return self.controller.beta

    def attach(self, policy: PolicyLike, pay: bool = True) -> None:
        """Measure this policy's KL from now on, and pay it unless `pay` is False (the agent has it in its loss, or not at all)."""
        if not isinstance(policy, PolicyLike):
            raise ValueError(
                f"Expected a policy with log_probs(observations: (N, L), actions: (N,)) -> (N,), got {type(policy).__name__}."
            )
        self.policy, self.pay = policy, pay

    def paid(
        self,
        beta: NDArray[np.float64],
        log_ratio: NDArray[np.float64] | None,
        ref_log_prob: NDArray[np.float64] | None,
    ) -> NDArray[np.float64] | float:
        """The reward added to transitions. Shapes: (M,), (M,), (M,) -> (M,); 0.0 where nothing is paid."""
        if self.policy is not None and not self.pay:
            return 0.0
        if self.kind == "reference":
            assert ref_log_prob is not None
            return beta * ref_log_prob
        if log_ratio is None:
            return 0.0
        return -beta * log_ratio

    def log_probs(
        self, observations: NDArray[np.int64], actions: NDArray[np.int64], lanes: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        """The attached policy's log-probabilities of what `lanes` do, checked. Shapes: (N, L), (N,), (M,) -> (M,), nats.

        All lanes are asked about, idle ones too: whole batches keep a policy's cache in step.
        """
        assert self.policy is not None
        values = np.asarray(self.policy.log_probs(observations, actions), dtype=np.float64)
        if values.shape != actions.shape:
            raise ValueError(
                f"Expected {type(self.policy).__name__}.log_probs to return one log-probability per lane, shape {actions.shape}, got {values.shape}."
            )
        values = values[lanes]
        if not np.isfinite(values).all():
            lane = lanes[~np.isfinite(values)][0]
            raise ValueError(
                f"Expected finite log-probabilities from {type(self.policy).__name__}.log_probs, got {values[lanes == lane][0]} for token "
                f"{actions[lane]} of lane {lane}. The KL is that of the policy that acts: attach the one that draws the actions, with its "
                "temperature, top-k and top-p."
            )
        return values


def _number(beta: object) -> float:
    if isinstance(beta, bool) or not isinstance(beta, int | float | np.number):
        raise ValueError(f"Expected beta to be a number, FixedKL or AdaptiveKL, got {beta!r}.")
    return float(beta)


def _check_beta(beta: float) -> None:
    if not (np.isfinite(beta) and beta >= 0):
        raise ValueError(f"Expected a finite beta >= 0 (reward per nat), got {beta}.")
