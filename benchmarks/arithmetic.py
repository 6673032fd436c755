"""Minutes of RLOO or PPO on sums: what a small model knew, what it learnt to choose, and what that cost in KL.

The model is right less than one time in five, but among 64 samples the right sum is almost always there (pass@64):
reinforcement learning makes it choose what it already knows. Everything is measured on sums it has never seen.

Run: python -m benchmarks.arithmetic --agent RLOO
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

SETTINGS: dict[str, dict[str, Any]] = {
    "PPO": {"learning_rate": 1e-3, "episodes_per_update": 256, "minibatch_episodes": 256, "epochs": 4},
    "RLOO": {"learning_rate": 5e-4, "episodes_per_update": 256, "minibatch_episodes": 64, "epochs": 1},
}
GROUP = {"PPO": 1, "RLOO": 8}


@dataclass(frozen=True)
class ArithmeticArguments:
    """Settings of this run."""

    agent: Literal["PPO", "RLOO"] = "RLOO"
    """What learns."""
    seed: int = 0
    """Of training and sampling."""
    total_timesteps: int = 1_000_000
    """Tokens to sample in training; the learning rate falls to 0 over them."""
    out: Path | None = None
    """Where pictures and figures go; by default runs/arithmetic-AGENT."""
    threads: int = 1
    """CPU threads of torch: at this size a second one may cost more than it brings."""


def run_arithmetic(options: ArithmeticArguments) -> dict[str, Any]:
    """Train, measure on unseen sums, draw, and print samples."""
    import gymnasium as gym
    import torch
    from rich.console import Console

    import agents
    import textenv  # noqa: F401  # registers the ids

    torch.set_num_threads(options.threads)
    console = Console()
    out = options.out or Path(f"runs/arithmetic-{options.agent}")
    envs = gym.make_vec("textenv/Arithmetic-v0", num_envs=128, group_size=GROUP[options.agent], beta=0.02)
    unseen = gym.make_vec("textenv/Arithmetic-v0", num_envs=128, split="test", beta=0.02)
    settings = SETTINGS[options.agent] | {"decay_timesteps": options.total_timesteps}
    agent = getattr(agents, options.agent)(envs, seed=options.seed, log_dir=out, **settings)
    before = sample(agent, unseen, passes=64)
    console.print(f"before: {before.solved.mean():.1%} of unseen sums right; pass@64 {before.pass_at:.1%}")
    agent.learn(options.total_timesteps, progress_bar=True)
    after = sample(agent, unseen, passes=16)
    agent.save(out / "checkpoint")
    gain = after.solved.mean(axis=0) - before.solved.mean(axis=0)
    half = float(1.96 * gain.std(ddof=1) / np.sqrt(len(gain)))
    console.print(
        f"after:  {after.solved.mean():.1%} right at a KL of {after.kl:.2f} nats per sum; gain {gain.mean():.1%} ± {half:.1%}\n"
    )
    for prompt, old, new in zip(before.prompts, before.texts, after.texts, strict=True):
        console.print(
            f"  {prompt:>6} before: {' '.join(f'{s:<4}' for s in old)}  after: {' '.join(new)}", highlight=False
        )
    figures = {
        "agent": options.agent,
        "seed": options.seed,
        "unseen_sums": len(gain),
        "exact_match_before": float(before.solved.mean()),
        "exact_match_after": float(after.solved.mean()),
        "gain": float(gain.mean()),
        "gain_half_interval": half,
        "pass_at_64_before": before.pass_at,
        "kl_after": after.kl,
    }
    (out / "summary.json").write_text(json.dumps(figures, indent=1) + "\n")
    draw(agent.history, figures, out / "arithmetic.png")
    console.print(f"\npicture: {out / 'arithmetic.png'}   figures: {out / 'summary.json'}")
    return figures


@dataclass(frozen=True)
class Samples:
    """Answers to 256 unseen sums, several times each."""

    solved: NDArray[np.float64]
    """1 where the answer is right. Shape: (passes, sums)."""
    kl: float
    """To the reference, nats per sum."""
    prompts: list[str]
    """The first six sums."""
    texts: list[tuple[str, ...]]
    """Four answers to each of them."""

    @property
    def pass_at(self) -> float:
        """Share of sums that any pass solved."""
        return float(self.solved.any(axis=0).mean())


def sample(agent: Any, envs: Any, passes: int) -> Samples:
    """Answer the same 256 unseen sums `passes` times, at temperature 1."""
    from agents.rollout import run_prompts

    lanes = envs.unwrapped
    lanes.attach_policy(agent.policy, pay=False)
    agent.set_random_seed(0)
    ids = np.random.default_rng(0).permutation(len(lanes.task.prompts))[:256]
    runs = [run_prompts(agent, lanes, ids) for _ in range(passes)]
    return Samples(
        solved=np.stack([run.task_reward for run in runs]),
        kl=float(np.mean([run.kl.mean() for run in runs])),
        prompts=[lanes.task.prompts.prompts[i] for i in ids[:6]],
        texts=list(zip(*(lanes.completions(run)[:6] for run in runs[:4]), strict=True)),
    )


def draw(history: list[dict[str, float]], figures: dict[str, Any], path: Path) -> None:
    """Reward and KL against tokens."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    tokens = [row["time/timesteps"] for row in history]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), constrained_layout=True)
    left.plot(tokens, [row["rollout/task_reward"] for row in history], color="#1f6f8b", label="training sums")
    ends = [figures["exact_match_before"], figures["exact_match_after"]]
    left.scatter([0, tokens[-1]], ends, color="#d1495b", zorder=3, label="unseen sums")
    left.axhline(figures["pass_at_64_before"], color="grey", ls=":", lw=1, label="pass@64 before")
    left.set(title="sums right", xlabel="tokens", ylim=(0, 1.05))
    left.legend(frameon=False, loc="lower right")
    right.plot(tokens, [row["rollout/kl"] for row in history], color="#1f6f8b")
    right.set(title="KL to the reference (nats per sum)", xlabel="tokens")
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.ticklabel_format(axis="x", style="plain")
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    import tyro

    run_arithmetic(
        tyro.cli(
            ArithmeticArguments,
            description="Reinforcement learning makes a small model choose the sums it already knows.",
        )
    )
