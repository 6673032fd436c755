"""Advantages, reductions and KL terms as pure functions of tensors.

Notation: B episodes, T response tokens at most, P prompts with G completions each. `mask` is True at response tokens;
entries outside it are 0.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

AGGREGATIONS = ("token", "sequence", "fixed")
"""Ways to reduce a loss of shape (B, T) to one number: see `aggregate`."""
KL_ESTIMATORS = ("k2", "k3", "ratio_k3")
"""Estimators of the KL that can be differentiated in a loss: see `kl_terms`."""

# ---------------------------------------------------------------------- advantages of tokens


def gae(
    rewards: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    gamma: float = 1.0,
    lam: float = 0.95,
    bootstrap: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimation (Schulman et al., 2016, https://arxiv.org/abs/1506.02438, eq. 16).

    `delta_t = r_t + gamma V(s_{t+1}) - V(s_t)` and `A_t = sum_k (gamma lam)^k delta_{t+k}`, each row an episode of its own.

    Args:
        rewards: Paid for the t-th token. Shape: (B, T).
        values: V of the state *before* the t-th token. Shape: (B, T).
        mask: True from a row's first token to its last, without holes. Bool, shape: (B, T).
        gamma: Discount. 1 for language: the closed form of the optimum needs it.
        lam: 1 gives the return minus V; 0 the one-step error.
        bootstrap: V of the state after the last token where a wrapper has cut the episode. 0 where it ended. Shape: (B,).

    Returns:
        Advantages and value targets (advantages + values), 0 outside the mask. Shapes: (B, T), (B, T).
    """
    last = mask & ~F.pad(mask[:, 1:], (0, 1))
    following = torch.where(last, 0.0 if bootstrap is None else bootstrap[:, None], F.pad(values[:, 1:], (0, 1)))
    advantages = (rewards + gamma * following - values) * mask
    weight, reach = gamma * lam, 1  # of delta_{t+reach}, beyond those that are in the sum
    while reach < mask.shape[1]:
        advantages = advantages + weight * F.pad(advantages[:, reach:], (0, reach))
        weight, reach = weight**2, 2 * reach
    return advantages, (advantages + values) * mask


def returns_to_go(rewards: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """What is still paid from each token on, undiscounted: `G_t = r_t + r_{t+1} + ...`. Shapes: (B, T), (B, T) -> (B, T)."""
    return (rewards * mask).flip(-1).cumsum(-1).flip(-1) * mask


IMPORTANCE_CAP = 2.0
"""No completion counts for more than so many: one weight must not make a gradient."""


def importance_weights(log_probs: torch.Tensor, drawn: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """How much more probable completions are under the policy than under what they were drawn from, truncated.

    Of whole completions: E_mu[w(y) f(y)] = E_pi[f(y)] with w = pi(y) / mu(y); the ratio of a prefix would not do, as an advantage
    depends on what follows. (Truncated importance sampling against rounded rollouts: Yao et al., 2025,
    https://fengyao.notion.site/off-policy-rl.)

    Args:
        log_probs: Of tokens under the policy pi. Shape: (B, T), nats.
        drawn: Of the same tokens under the distribution mu that they were drawn from. Shape: (B, T), nats.
        mask: Shape: (B, T).

    Returns:
        Constants, at most `IMPORTANCE_CAP`. Shape: (B, 1).
    """
    log_ratio = ((log_probs.detach() - drawn) * mask).sum(dim=1, keepdim=True)
    return log_ratio.exp().clamp(max=IMPORTANCE_CAP)


# ---------------------------------------------------------------------- advantages of completions within their group


def leave_one_out(returns: torch.Tensor) -> torch.Tensor:
    """Each return minus the mean of the *others* of its group (Kool et al., 2019; RLOO, https://arxiv.org/abs/2402.14740).

    `A_i = R_i - mean_{j != i} R_j = G / (G - 1) (R_i - mean R)`. The baseline does not depend on the completion that it is
    subtracted from, so the gradient stays unbiased.

    Args:
        returns: A row is a group. Shape: (P, G), G >= 2.

    Returns:
        Exactly 0 where all of a group are equal. Shape: (P, G).
    """
    size = returns.shape[1]
    return group_advantages(returns) * (size / (size - 1))


def group_advantages(returns: torch.Tensor, scale_by_std: bool = False, eps: float = 1e-4) -> torch.Tensor:
    """Each return minus the mean of its whole group, itself included (GRPO, https://arxiv.org/abs/2402.03300).

    Args:
        returns: A row is a group. Shape: (P, G), G >= 2.
        scale_by_std: Divide by the group's standard deviation (with G - 1 in its denominator, as TRL has it) + eps. It changes
            the objective: easy and hard prompts weigh alike, and of the returns hardly more than their order counts.
        eps: Keeps groups that are equal up to rounding from being blown up.

    Returns:
        Exactly 0 where all of a group are equal. Shape: (P, G).
    """
    shifted = returns - returns[:, :1]  # the mean of equal numbers is not always that number: 0.1 + 0.1 + 0.1
    centred = shifted - shifted.mean(dim=1, keepdim=True)
    return centred / (shifted.std(dim=1, keepdim=True) + eps) if scale_by_std else centred


# ---------------------------------------------------------------------- normalisation


def whiten(x: torch.Tensor, mask: torch.Tensor, shift_mean: bool = True) -> torch.Tensor:
    """Scale to unit (population) variance over the mask, and to mean 0 unless `shift_mean` is False. Shape: (B, T).

    As in https://github.com/openai/lm-human-preferences (`whiten`): `(x - mean) * rsqrt(var + 1e-8)`. Values that are equal
    up to rounding count as equal: noise is not scaled up to advantages of 1.
    """
    mean = masked_mean(x, mask)
    centred = x - mean
    variance = masked_mean(centred**2, mask)
    rounding = 32 * torch.finfo(x.dtype).eps * (x * mask).abs().max()
    scaled = torch.where(variance.sqrt() > rounding, centred * torch.rsqrt(variance + 1e-8), torch.zeros_like(x))
    return (scaled if shift_mean else scaled + mean) * mask


def normalize(x: torch.Tensor) -> torch.Tensor:
    """One number per completion, normalised over the whole batch: mean 0, (population) variance 1. Shape: (B,).

    REINFORCE++ (https://arxiv.org/abs/2501.03262) does so over all completions of an iteration, whichever their prompts.
    """
    return whiten(x, torch.ones_like(x, dtype=torch.bool))


# ---------------------------------------------------------------------- reductions


def masked_mean(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over True entries. Shapes: (B, T), (B, T) -> ()."""
    return (x * mask).sum() / mask.sum().clamp(min=1)


def aggregate(loss: torch.Tensor, mask: torch.Tensor, how: str, max_length: int) -> torch.Tensor:
    """Reduce losses of tokens to one number. How is an algorithmic choice: it says what weighs how much.

    Args:
        loss: Of each token. Shape: (B, T).
        mask: Shape: (B, T).
        how: `"token"`: mean over all tokens of the batch (DAPO). Tokens weigh alike, long completions more; a batch's length divides
            its sum, so the expected gradient is that of the sum up to a factor only as batches grow.
            `"sequence"`: mean over completions of the mean over their tokens (GRPO). Completions weigh alike: the longer one
            is, the less each of its tokens counts, so a long mistake costs less than a short one.
            `"fixed"`: sum over tokens, divided by `B max_length` (Dr. GRPO, https://arxiv.org/abs/2503.20783). A constant, so the
            expected gradient is that of the sum: the unbiased choice.
        max_length: The response budget in tokens, whatever T is. Used by `"fixed"`.

    Returns:
        Shape: ().
    """
    if how == "token":
        return masked_mean(loss, mask)
    if how == "sequence":
        return ((loss * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)).mean()
    if how == "fixed":
        return (loss * mask).sum() / (len(loss) * max_length)
    raise ValueError(f"Expected how to be one of {list(AGGREGATIONS)}, got {how!r}.")


# ---------------------------------------------------------------------- a KL to differentiate


def kl_terms(log_ratio: torch.Tensor, ratio: torch.Tensor, estimator: str) -> torch.Tensor:
    """Terms of a KL penalty in the *loss*.

    What they follow, in expectation over y ~ pi_old (at pi = pi_old):

        k2         L^2 / 2                   the gradient of KL(pi || ref)
        k3         exp(-L) - 1 + L           that of the *forward* KL(ref || pi): GRPO's choice, and another penalty
        ratio_k3   ratio (exp(-L) - 1 + L)   the gradient of KL(pi || ref), off policy too

    (k1 = L has an expected gradient of 0: in the loss it is nothing but noise.) That is so for what L is the log-ratio *of*: with
    whole completions the KL of completions, exactly; with tokens the KL of the next token at each visited state, which
    leaves out how a token changes the states to come. Only k1 in the reward, or terms of whole completions, follow the gradient
    of the whole KL. See https://arxiv.org/abs/2506.09477 and http://joschu.net/blog/kl-approx.html.

    Args:
        log_ratio: L = log pi - log ref, of tokens or of whole completions, nats. Where it is `-inf` (a token that has left the
            top-k or top-p set) it counts as 0. Shape: any.
        ratio: pi / pi_old, of the same. Shape: as `log_ratio`.
        estimator: One of `KL_ESTIMATORS`.

    Returns:
        Shape: as `log_ratio`.
    """
    log_ratio = torch.where(log_ratio.isinf(), 0.0, log_ratio)
    if estimator == "k2":
        return log_ratio**2 / 2
    k3 = torch.expm1(-log_ratio) + log_ratio
    if estimator == "k3":
        return k3
    if estimator == "ratio_k3":
        return ratio * k3
    raise ValueError(f"Expected estimator to be one of {list(KL_ESTIMATORS)}, got {estimator!r}.")
