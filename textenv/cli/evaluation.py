"""`textenv eval` and `textenv generate`: what a trained agent is worth, and what it says."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tyro

from textenv.cli.arguments import EnvArguments, positional, usage_errors
from textenv.cli.runs import load_run, remembered, run_directory


@dataclass(frozen=True)
class EvalArguments(EnvArguments):
    """What to evaluate on."""

    env: str | None = None
    """Environment id (default: the run's)."""
    episodes: int = 256
    """Prompts to answer: the first of the split in a fixed random order."""
    seed: int = 0
    """Of sampling."""
    deterministic: bool = False
    """Take the most probable token instead of sampling."""
    samples: int = 5
    """Completions to print."""


def evaluate(arguments: Sequence[str]) -> None:
    """Task reward, KL and length of a trained agent, beside its reference: `textenv eval runs/NAME --split test`."""
    import numpy as np
    from rich.console import Console
    from rich.table import Table

    from agents.base import LanguageModelAgent
    from agents.rollout import run_prompts

    names, flags = positional(arguments, 1, "textenv eval DIR [flags]", EvalArguments)
    options = tyro.cli(EvalArguments, args=flags, prog="textenv eval DIR", description=evaluate.__doc__)
    agent, envs = load_run(Path(names[0]), options, num_envs=min(64, options.episodes))
    split = remembered(run_directory(Path(names[0])), options).split or "train"
    lanes = envs.unwrapped
    ids = np.random.default_rng(0).permutation(len(lanes.task.prompts))[: options.episodes]
    table = Table(
        "",
        "task reward",
        "KL (nats)",
        "response tokens",
        "finished",
        title=f"{names[0]}: {len(ids)} prompts, split {split!r}",
    )
    rewards, texts = {}, {}
    for name, actor in {"reference": LanguageModelAgent(envs, seed=0), "agent": agent}.items():
        lanes.attach_policy(actor.policy, pay=False)
        actor.set_random_seed(options.seed)
        episodes = run_prompts(actor, lanes, ids, options.deterministic)
        rewards[name], texts[name] = episodes.task_reward, lanes.completions(episodes)
        table.add_row(
            name,
            interval(episodes.task_reward),
            interval(episodes.kl),
            f"{episodes.response_length.mean():.1f}",
            f"{(episodes.finish_reason == 'stop').mean():.0%}",
        )
    console = Console()
    console.print(table)
    console.print(f"paired difference of the task reward: {interval(rewards['agent'] - rewards['reference'])}")
    for i, prompt_id in enumerate(ids[: options.samples]):
        prompt = lanes.task.prompts.prompts[prompt_id]
        console.print(
            f"\n[dim]{prompt}[/dim]\n  reference: {texts['reference'][i]}\n  agent:     {texts['agent'][i]}",
            highlight=False,
        )


@dataclass(frozen=True)
class GenerateArguments(EnvArguments):
    """What to complete."""

    text: tyro.conf.UseAppendAction[list[str]] = field(default_factory=list)
    """A prompt; may be repeated. Without one, prompts are read from standard input, one per line."""
    seed: int = 0
    """Of sampling."""
    deterministic: bool = False
    """Take the most probable token instead of sampling."""


def generate(arguments: Sequence[str]) -> None:
    """Complete prompts with a trained agent: `textenv generate runs/NAME --text "27+58="`."""
    names, flags = positional(arguments, 1, "textenv generate DIR [flags]", GenerateArguments)
    options = tyro.cli(GenerateArguments, args=flags, prog="textenv generate DIR", description=generate.__doc__)
    agent, _ = load_run(Path(names[0]), options, num_envs=1)
    agent.set_random_seed(options.seed)
    if not options.text and sys.stdin.isatty():
        print("Prompts, one per line; Ctrl-D ends them:", file=sys.stderr)
    prompts = options.text or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    with usage_errors():
        completions = agent.generate(prompts, options.deterministic)
    for prompt, completion in zip(prompts, completions, strict=True):
        print(f"{prompt}{completion}")


def interval(values: Any) -> str:
    """Mean and its 95% interval (normal approximation), for a table."""
    import numpy as np

    if np.isnan(values).all():
        return "-"
    half = 1.96 * np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else float("nan")
    return f"{np.mean(values):z.3f} ± {half:.3f}"
