"""A minute of PPO on sums: what a small model knew, what it learnt to choose, and what that cost in KL.

The model is right about one time in six, but among 64 samples the right sum is almost always there (pass@64):
reinforcement learning makes it choose what it already knows. Everything is measured on sums it has never seen.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

RUN = Path("runs/demo")


@dataclass(frozen=True)
class DemoArguments:
    """Settings of the demo."""

    seed: int = 0
    """Of training and sampling."""
    total_timesteps: int = 120_000
    """Tokens to sample in training."""
    out: Path = RUN
    """Where pictures and figures go."""


def run_demo(options: DemoArguments) -> dict[str, Any]:
    """Train, measure on unseen sums, draw, and print samples."""
    import gymnasium as gym
    import torch
    from rich.console import Console

    import textenv  # noqa: F401  # registers the ids
    from agents import PPO

    torch.set_num_threads(1)  # at this size a second thread costs more than it brings
    console = Console()
    envs = gym.make_vec("textenv/Arithmetic-v0", num_envs=128, beta=0.02)
    unseen = gym.make_vec("textenv/Arithmetic-v0", num_envs=128, split="test", beta=0.02)
    agent = PPO(
        envs,
        seed=options.seed,
        log_dir=options.out,
        learning_rate=1e-3,
        episodes_per_update=256,
        minibatch_episodes=256,
        epochs=4,
    )
    before = measure(agent, unseen, passes=64)
    console.print(f"before: {before['exact_match']:.1%} of unseen sums right; pass@64 {before['pass_at_64']:.1%}")
    agent.learn(options.total_timesteps, progress_bar=True)
    after = measure(agent, unseen)
    agent.save(options.out / "checkpoint")
    console.print(f"after:  {after['exact_match']:.1%} right, at a KL of {after['kl']:.2f} nats per sum\n")
    for prompt, old, new in zip(before["prompts"], before["samples"], after["samples"], strict=True):
        console.print(
            f"  {prompt:>6} before: {' '.join(f'{s:<4}' for s in old)}  after: {' '.join(new)}", highlight=False
        )
    figures = {
        name: {k: v for k, v in part.items() if isinstance(v, float)}
        for name, part in (("before", before), ("after", after))
    }
    (options.out / "summary.json").write_text(json.dumps(figures | {"seed": options.seed}, indent=1))
    draw(agent.history, figures, options.out / "arithmetic.png")
    console.print(f"\npicture: {options.out / 'arithmetic.png'}   figures: {options.out / 'summary.json'}")
    return figures


def measure(agent: Any, envs: Any, passes: int = 1, shown: int = 6) -> dict[str, Any]:
    """Exact match over all prompts of `envs`, by sampling; with `passes` > 1, also the share solved by any of them."""
    from agents.rollout import run_prompts

    lanes = envs.unwrapped
    lanes.attach_policy(agent.policy, pay=False)
    agent.set_random_seed(0)
    rng = np.random.default_rng(0)
    ids = rng.permutation(len(lanes.task.prompts))[: 1024 if passes == 1 else 256]
    runs = [run_prompts(agent, lanes, ids) for _ in range(max(passes, 4))]
    solved = np.stack([run.task_reward for run in runs])
    out: dict[str, Any] = {
        "exact_match": float(solved.mean()),
        "kl": float(np.mean([run.kl.mean() for run in runs])),
        "prompts": [lanes.task.prompts.prompts[i] for i in ids[:shown]],
    }
    texts = [lanes.completions(run)[:shown] for run in runs[:4]]
    out["samples"] = list(zip(*texts, strict=True))
    if passes > 1:
        out[f"pass_at_{passes}"] = float(solved.any(axis=0).mean())
    return out


def draw(history: list[dict[str, float]], figures: dict[str, dict[str, float]], path: Path) -> None:
    """Reward and KL against tokens."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    tokens = [row["time/timesteps"] for row in history]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), constrained_layout=True)
    left.plot(tokens, [row["rollout/task_reward"] for row in history], color="#1f6f8b", label="training sums")
    ends = [figures["before"]["exact_match"], figures["after"]["exact_match"]]
    left.scatter([0, tokens[-1]], ends, color="#d1495b", zorder=3, label="unseen sums")
    left.axhline(figures["before"]["pass_at_64"], color="grey", ls=":", lw=1, label="pass@64 before")
    left.set(title="sums right", xlabel="tokens", ylim=(0, 1.05))
    left.legend(frameon=False, loc="lower right")
    right.plot(tokens, [row["rollout/kl"] for row in history], color="#1f6f8b")
    right.set(title="KL to the reference (nats per sum)", xlabel="tokens")
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.ticklabel_format(axis="x", style="plain")
    figure.savefig(path, dpi=150)
    plt.close(figure)
