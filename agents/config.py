"""Settings: what every agent has, how they are given, and those that make no sense."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal

from agents.advantages import KL_ESTIMATORS
from textenv.prompts import did_you_mean

if TYPE_CHECKING:
    from agents.base import LanguageModelAgent


@dataclass(frozen=True, kw_only=True)
class AgentConfig:
    """Settings that every agent has."""

    learning_rate: float | None = None
    """Adam's step size. Default: 0.05 / hidden size (4e-4 at width 128, 6.5e-5 at 768): Adam's steps should shrink with
    width (Yang et al., 2022, https://arxiv.org/abs/2203.03466)."""
    decay_timesteps: int | None = None
    """The learning rate falls linearly from its full size to 0 over so many tokens, counted from the agent's first; None keeps
    it. Set it to the length of the whole run: on small exact tasks a constant rate costs 0.01 to 0.05 of the score."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    top_k: int | None = None
    """Sample from the k most probable tokens (scored and trained under the same truncation)."""
    top_p: float | None = None
    """Sample from the smallest set of tokens of this probability (scored and trained under the same truncation)."""
    tokens_per_pass: int | None = None
    """An update over more tokens (prompts and padding counted) than this runs in several passes. RLOO and GRPO add up the passes' gradients
    (None: at most 32M logits and, on a CPU, 2,048 tokens). Others compute each pass a second time for its gradient (activation
    checkpointing: a third more work); None holds the minibatch whole."""
    rollout_dtype: Literal["bfloat16"] | None = None
    """Draw tokens from a copy of the policy in bfloat16, where the processor computes faster in it; what is trained stays in
    float32, and agents whose gradient is that of the policy weigh what was drawn (docs/performance.md). None draws from the policy itself."""

    def __post_init__(self) -> None:
        if self.rollout_dtype not in (None, "bfloat16"):
            raise ValueError(f"Expected rollout_dtype to be 'bfloat16' or None, got {self.rollout_dtype!r}.")
        if self.rollout_dtype is not None and (self.top_k is not None or self.top_p is not None):
            raise ValueError(
                f"rollout_dtype={self.rollout_dtype!r} goes with neither top_k nor top_p: tokens that rounding brings into the set have no "
                "probability under the policy that is trained. Take one or the other."
            )
        for name in ("learning_rate", "decay_timesteps", "max_grad_norm", "tokens_per_pass"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"Expected {name} > 0, got {value!r}.")


def make_config(agent: type[LanguageModelAgent], config: AgentConfig | None, overrides: dict[str, Any]) -> Any:
    """The config from a dataclass, from keywords, or from both (keywords win).

    Raises:
        ValueError: An unknown field; the message names the nearest one.
    """
    known = [field.name for field in fields(agent.Config)]
    for name in overrides:
        if name not in known:
            hint = did_you_mean(name, [*known, "seed", "log_dir", "verbose", "peft_config", "config"])
            raise ValueError(f"{agent.__name__} has no setting {name!r}; it has {known}.{hint}")
    if config is None:
        return agent.Config(**overrides)
    if not isinstance(config, agent.Config):
        raise ValueError(f"Expected config to be a {agent.Config.__name__}, got {type(config).__name__}.")
    return replace(config, **overrides)


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """A setting that is one of a few words.

    Raises:
        ValueError: It is another one; the message names the nearest.
    """
    if value not in choices:
        raise ValueError(
            f"Expected {name} to be one of {list(choices)}, got {value!r}.{did_you_mean(str(value), choices)}"
        )


def check_kl_settings(placement: str, estimator: str) -> None:
    """Where a KL lives, and by which estimator it is differentiated in a loss.

    Raises:
        ValueError: No such place, or an estimator that does not belong in a loss.
    """
    check_choice("kl_placement", placement, ("reward", "loss", "none"))
    if estimator == "k1":
        raise ValueError(
            "kl_estimator='k1' cannot be differentiated in a loss: its expected gradient is 0, so it is nothing but noise. Expected "
            f"one of {list(KL_ESTIMATORS)}; or kl_placement='reward', where k1 is paid and its reward-to-go gives the exact gradient."
        )
    check_choice("kl_estimator", estimator, KL_ESTIMATORS)
