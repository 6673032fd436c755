"""Why only k1, detached, is paid in the reward: gradients by enumeration, without a sample.

Notation: pi and ref are categorical; L = log pi - log ref; k1 = L, k2 = L^2 / 2, k3 = exp(-L) - 1 + L. A penalty
"in the reward" reaches the policy through the score function, sum_y pi(y) grad log pi(y) k(y) with k detached; "in the
loss" it is differentiated itself, sum_y pi(y) grad k(y) with pi detached.
See https://arxiv.org/abs/2506.09477 and http://joschu.net/blog/kl-approx.html for the estimators.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

V, T = 3, 3
torch_seed = torch.Generator().manual_seed(0)
REF = torch.randn(6, generator=torch_seed, dtype=torch.float64).log_softmax(-1)
THETA = torch.randn(6, generator=torch_seed, dtype=torch.float64)
ESTIMATORS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "k1": lambda ratio: ratio,
    "k2": lambda ratio: ratio**2 / 2,
    "k3": lambda ratio: (-ratio).exp() - 1 + ratio,
}


def gradient(objective: Callable[[torch.Tensor], torch.Tensor], at: torch.Tensor = THETA) -> torch.Tensor:
    theta = at.clone().requires_grad_()
    return torch.autograd.grad(objective(theta), theta)[0]


def reverse_kl(theta: torch.Tensor) -> torch.Tensor:
    log_pi = theta.log_softmax(-1)
    return (log_pi.exp() * (log_pi - REF)).sum()


def forward_kl(theta: torch.Tensor) -> torch.Tensor:
    return (REF.exp() * (REF - theta.log_softmax(-1))).sum()


def in_the_reward(k: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    def surrogate(theta: torch.Tensor) -> torch.Tensor:
        log_pi = theta.log_softmax(-1)
        return (log_pi.exp().detach() * log_pi * k(log_pi - REF).detach()).sum()

    return surrogate


def in_the_loss(k: Callable[[torch.Tensor], torch.Tensor], ratio: bool = False) -> Any:
    def surrogate(theta: torch.Tensor) -> torch.Tensor:
        log_pi = theta.log_softmax(-1)
        weight = log_pi.exp() if ratio else log_pi.exp().detach()  # pi_old * (pi / pi_old), on policy
        return (weight * k(log_pi - REF)).sum()

    return surrogate


def relative_error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return ((ours - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize(("name", "right"), [("k1", True), ("k2", False), ("k3", False)])
def test_detached_in_the_reward_only_k1_gives_the_gradient_of_the_kl(name: str, right: bool) -> None:
    error = relative_error(gradient(in_the_reward(ESTIMATORS[name])), gradient(reverse_kl))
    assert error < 1e-12 if right else error > 0.1


@pytest.mark.parametrize(("name", "right"), [("k1", False), ("k2", True), ("k3", False)])
def test_differentiated_in_the_loss_only_k2_does(name: str, right: bool) -> None:
    error = relative_error(gradient(in_the_loss(ESTIMATORS[name])), gradient(reverse_kl))
    assert error < 1e-12 if right else error > 0.1


def test_k1_in_the_loss_is_nothing_but_noise() -> None:
    assert gradient(in_the_loss(ESTIMATORS["k1"])).abs().max() < 1e-15


def test_k3_in_the_loss_follows_the_forward_kl() -> None:
    assert relative_error(gradient(in_the_loss(ESTIMATORS["k3"])), gradient(forward_kl)) < 1e-12


@pytest.mark.parametrize(("name", "right"), [("k1", True), ("k2", False), ("k3", True)])
def test_with_a_differentiable_ratio_k1_and_k3_do(name: str, right: bool) -> None:
    error = relative_error(gradient(in_the_loss(ESTIMATORS[name], ratio=True)), gradient(reverse_kl))
    assert error < 1e-12 if right else error > 0.1


# ---------------------------------------------------------------------- sequences: every completion listed

STATES = [state for t in range(T) for state in itertools.product(range(V), repeat=t)]
INDEX = {state: i for i, state in enumerate(STATES)}
SEQUENCES = list(itertools.product(range(V), repeat=T))
TABLE = torch.randn(len(STATES), V, generator=torch_seed, dtype=torch.float64)
REF_TABLE = torch.randn(len(STATES), V, generator=torch_seed, dtype=torch.float64).log_softmax(-1)
REWARD = dict(zip(SEQUENCES, torch.randn(len(SEQUENCES), generator=torch_seed, dtype=torch.float64), strict=True))
BETA = 0.7


def path(table: torch.Tensor, sequence: tuple[int, ...]) -> torch.Tensor:
    """Log-probabilities along a sequence. Shape: (T,)."""
    return torch.stack([table[INDEX[sequence[:t]], token] for t, token in enumerate(sequence)])


def objective(theta: torch.Tensor) -> torch.Tensor:
    """E[reward] - beta KL(pi || ref), by enumeration."""
    log_pi = theta.log_softmax(-1)
    total = torch.zeros((), dtype=torch.float64)
    for y in SEQUENCES:
        log_p, log_ref = path(log_pi, y).sum(), path(REF_TABLE, y).sum()
        total = total + log_p.exp() * (REWARD[y] - BETA * (log_p - log_ref))
    return total


def policy_gradient(penalty: Callable[[torch.Tensor, tuple[int, ...]], torch.Tensor]) -> torch.Tensor:
    """Expected gradient of an agent that maximises the reward-to-go of what the environment pays it."""

    def surrogate(theta: torch.Tensor) -> torch.Tensor:
        log_pi = theta.log_softmax(-1)
        total = torch.zeros((), dtype=torch.float64)
        for y in SEQUENCES:
            log_p = path(log_pi, y)
            paid = -BETA * penalty(log_pi, y).detach()
            paid[-1] += REWARD[y]
            to_go = paid.flip(0).cumsum(0).flip(0)
            total = total + log_p.sum().exp().detach() * (log_p * to_go).sum()
        return total

    return gradient(surrogate, TABLE)


def per_token(k: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    return lambda log_pi, y: k(path(log_pi, y) - path(REF_TABLE, y))


def full(log_pi: torch.Tensor, y: tuple[int, ...]) -> torch.Tensor:
    """The exact KL of each state on the way, summed over the vocabulary."""
    rows = [INDEX[y[:t]] for t in range(T)]
    return (log_pi[rows].exp() * (log_pi[rows] - REF_TABLE[rows])).sum(-1)


def test_the_reward_to_go_of_k1_is_the_exact_gradient_of_the_objective() -> None:
    assert relative_error(policy_gradient(per_token(ESTIMATORS["k1"])), gradient(objective, TABLE)) < 1e-12


@pytest.mark.parametrize(
    "penalty",
    [per_token(ESTIMATORS["k2"]), per_token(ESTIMATORS["k3"]), full],
    ids=["k2", "k3", "full"],
)
def test_no_other_estimator_can_be_paid_in_the_reward(penalty: Any) -> None:
    assert relative_error(policy_gradient(penalty), gradient(objective, TABLE)) > 0.1


def test_the_full_kl_in_the_reward_gives_the_last_step_no_gradient() -> None:
    # A state's own KL is the same whatever token is drawn there, so the score function averages it to zero.
    last = [INDEX[state] for state in STATES if len(state) == T - 1]
    without = policy_gradient(lambda log_pi, y: torch.zeros(T, dtype=torch.float64))
    assert (policy_gradient(full) - without)[last].abs().max() < 1e-15
    assert (policy_gradient(per_token(ESTIMATORS["k1"])) - without)[last].abs().max() > 1e-3
