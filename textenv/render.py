"""Text for terminals: an episode's tokens, coloured by what each was paid."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

RESET = "\x1b[0m"
DIM = "\x1b[2m"


def colour(reward: float, scale: float) -> str:
    """ANSI background for a reward: green above 0, red below, none at 0; full strength at `scale`."""
    strength = min(1.0, abs(reward) / scale) if scale > 0 else 0.0
    if strength < 0.05:
        return ""
    level = int(40 + 140 * strength)
    return f"\x1b[48;2;0;{level};60m\x1b[97m" if reward > 0 else f"\x1b[48;2;{level};0;40m\x1b[97m"


def token_texts(tokenizer: Any, tokens: NDArray[np.int64]) -> list[str]:
    """Each token as text, such that they join to the decoded whole (sub-word tokens carry their own spaces)."""
    texts: list[str] = []
    done = ""
    for i in range(len(tokens)):
        whole = tokenizer.decode(tokens[: i + 1], skip_special_tokens=False)
        # A token that ends half-way through a character changes what stands before it: show nothing until it is whole.
        texts.append(whole[len(done) :] if whole.startswith(done) else "")
        done = whole if whole.startswith(done) else done
    return texts


def outcome_text(task_reward: float, components: dict[str, float], kl: float | None) -> str:
    """What an episode was worth: `[reward 0.8: match 1, brief -2; KL 0.31 nats]`. Components that do not apply are left out."""
    named = ", ".join(f"{name} {value:.3g}" for name, value in components.items() if not np.isnan(value))
    penalty = "" if kl is None else f"; KL {kl:.3g} nats"
    return f"[reward {task_reward:.3g}{': ' if named else ''}{named}{penalty}]"


def render_episode(
    tokenizer: Any,
    tokens: NDArray[np.int64],
    prompt_length: int,
    rewards: NDArray[np.float64],
    since: int = 0,
    outcome: str = "",
) -> str:
    """An episode as coloured text.

    Args:
        tokenizer: Decodes.
        tokens: Prompt and response. Shape: (n,).
        prompt_length: Tokens of the prompt, shown dim.
        rewards: Of each response token. Shape: (T,), T >= n - prompt_length.
        since: Show tokens from here on only.
        outcome: Shown dim at the end; see `outcome_text`.
    """
    texts = token_texts(tokenizer, tokens)
    response = rewards[: max(0, len(tokens) - prompt_length)]
    scale = float(np.abs(response).max(initial=0.0))
    parts = [DIM + "".join(texts[since:prompt_length]) + RESET] if since < prompt_length else []
    for text, reward in list(zip(texts[prompt_length:], response, strict=True))[max(0, since - prompt_length) :]:
        paint = colour(float(reward), scale)
        parts.append(f"{paint}{text}{RESET}" if paint else text)
    if outcome:
        parts.append(f"{DIM}  {outcome}{RESET}")
    return "".join(parts)
