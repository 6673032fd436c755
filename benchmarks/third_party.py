"""Agents of stable-baselines3 and sb3-contrib, unmodified, beside our own on the same tasks.

`tree`: exact scores on `textenv/Tree-v0`, before and after learning; seed i plays the task of seed 2000 + i.
`assistant`: what `stable_baselines3.PPO` gains on held-out requests of `textenv/Assistant-v0`, in reward model - beta KL.

A finished run is one file in `--out`, and is not run again. Settings were not tuned on these tasks.

Run: python -m benchmarks.third_party
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.records import write_json, write_text

TASK_SEED = 2000
LANES = 64
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""Student's t at 97.5%, by the number of runs."""

ROLLOUT: dict[str, Any] = {"gamma": 1.0, "n_steps": 16, "batch_size": 256}
TREE: dict[str, tuple[int, dict[str, Any]]] = {
    "sb3 PPO": (10_000, ROLLOUT | {"n_epochs": 4, "learning_rate": 2e-3}),
    "sb3 A2C": (20_000, {"gamma": 1.0, "n_steps": 8, "learning_rate": 2e-3}),
    "sb3-contrib MaskablePPO": (10_000, ROLLOUT | {"n_epochs": 4, "learning_rate": 2e-3}),
    "sb3-contrib TRPO": (
        2_000,
        {"gamma": 1.0, "n_steps": 16, "batch_size": 1024, "target_kl": 0.1, "cg_max_steps": 3},
    ),
    "sb3 DQN": (
        10_000,
        {"gamma": 1.0, "learning_rate": 2e-3, "batch_size": 128, "buffer_size": 10_000, "learning_starts": 1_000,
         "train_freq": 1, "target_update_interval": 500, "exploration_fraction": 0.5},
    ),
    "our PPO": (10_000, {"learning_rate": 2e-3, "minibatch_episodes": 64}),
    "our A2C": (20_000, {"learning_rate": 4e-3, "episodes_per_update": 128}),
}  # fmt: skip
"""Agent -> tokens, settings."""

ASSISTANT: dict[str, Any] = {"gamma": 1.0, "n_steps": 32, "batch_size": 256, "n_epochs": 1, "learning_rate": 4e-4}
ASSISTANT_TOKENS, HELD_OUT = 30_000, 256


@dataclass(frozen=True)
class ThirdPartyArguments:
    """Which runs are made, and where they go."""

    parts: tuple[str, ...] = ("tree", "assistant")
    """`tree`, `assistant`."""
    seeds: int = 5
    """Runs of each agent: seeds 0, 1, ..."""
    out: Path = Path("runs/third-party")
    """Where rows and table go."""


def tree_row(name: str, seed: int) -> dict[str, Any]:
    """One agent on one tree."""
    import gymnasium as gym

    import agents
    from agents.sb3 import LMPolicy, TokenEmbedding, as_policy, as_vec_env

    tokens, settings = TREE[name]
    library, agent = name.split()
    by_value = agent == "DQN"
    # A greedy choice has log pi = 0, so what is left of the KL penalty is beta log ref, which the environment pays by itself.
    kl: Any = {"kl": "reference"} if by_value else {}
    envs = gym.make_vec("textenv/Tree-v0", num_envs=16 if by_value else LANES, seed_of_task=TASK_SEED + seed, **kl)
    tree: Any = envs.unwrapped
    if library == "our":
        model = getattr(agents, agent)(envs, seed=seed, decay_timesteps=tokens, **settings)
        policy = model.policy
    else:
        extractor = {"policy_kwargs": {"features_extractor_class": TokenEmbedding}} if by_value else {}
        which = "MlpPolicy" if by_value else LMPolicy
        model = sb3_class(library, agent)(which, as_vec_env(envs), seed=seed, **settings, **extractor)
        policy = as_policy(model)
    before = tree.evaluate(policy).score
    model.learn(tokens)
    leaves, optimum, floor = tree.leaves, tree.solve().value, float(np.exp(tree.leaves.log_ref) @ tree.leaves.rewards)
    best = float(
        (leaves.rewards + tree.kl.beta * leaves.log_ref).max()
    )  # of the policies that say one completion always
    return {
        "before": before,
        "after": tree.evaluate(policy).score,
        "best_greedy": (best - floor) / (optimum - floor),
        "tokens": model.num_timesteps,
    }


def sb3_class(library: str, agent: str) -> Any:
    """The agent's class, from the library that has it."""
    import sb3_contrib
    import stable_baselines3

    return getattr(stable_baselines3 if library == "sb3" else sb3_contrib, agent)


def assistant_row(seed: int) -> dict[str, Any]:
    """`stable_baselines3.PPO` on requests; before and after on held-out ones."""
    import gymnasium as gym
    import torch
    from stable_baselines3 import PPO

    from agents.rollout import run_prompts
    from agents.sb3 import LMPolicy, as_vec_env

    envs = gym.make_vec("textenv/Assistant-v0", num_envs=64)
    unseen: Any = gym.make_vec("textenv/Assistant-v0", num_envs=64, split="test").unwrapped
    model = PPO(LMPolicy, as_vec_env(envs), seed=seed, **ASSISTANT)
    unseen.attach_policy(model.policy)
    ids = np.random.default_rng(seed).permutation(len(unseen.task.prompts))[:HELD_OUT]

    def measure() -> dict[str, float]:
        torch.manual_seed(seed)
        episodes = run_prompts(model, unseen, ids)
        columns = {"objective": episodes.rewards.sum(axis=1), "reward": episodes.task_reward, "kl": episodes.kl}
        return {column: float(values.mean()) for column, values in columns.items()}

    before = measure()
    model.learn(ASSISTANT_TOKENS)
    return {"before": before, "after": measure(), "tokens": model.num_timesteps, "beta": unseen.kl.beta}


def run_third_party(options: ThirdPartyArguments) -> str:
    """Run what is missing, and write the table."""
    import torch

    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[dict[str, Any]]] = {}
    for seed in range(options.seeds):  # the first seeds of all agents come first
        if "tree" in options.parts:
            for name in TREE:
                row = cell(options.out / f"{name.replace(' ', '-')}-{seed}.json", lambda n=name, s=seed: tree_row(n, s))  # type: ignore[misc]
                rows.setdefault(name, []).append(row)
        if "assistant" in options.parts:
            row = cell(options.out / f"assistant-{seed}.json", lambda s=seed: assistant_row(s))  # type: ignore[misc]
            rows.setdefault("assistant", []).append(row)
    text = markdown(rows)
    write_text(options.out / "table.md", text)
    print(text)
    return text


def cell(file: Path, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A finished run's row, from its file or made now."""
    if not file.exists():
        start = time.process_time()
        row = run()
        write_json(file, row | {"cpu_seconds": time.process_time() - start})
        print(file.stem, json.dumps(row), flush=True)
    return dict(json.loads(file.read_text()))


def plain(value: Any) -> str:
    """Three decimals, and no minus before a zero."""
    return f"{round(float(value), 3) + 0.0:.3f}"


def interval(values: Sequence[float]) -> str:
    """Mean and 95% interval over runs (Student's t)."""
    mean, n = float(np.mean(values)), len(values)
    if n not in T_95:
        return f"{mean:.3f}"
    half = T_95[n] * float(np.std(values, ddof=1)) / np.sqrt(n)
    return f"{mean:.3f} [{mean - half:.3f}, {mean + half:.3f}]"


def markdown(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """The tables."""
    lines: list[str] = []
    agents = {name: runs for name, runs in rows.items() if name != "assistant"}
    if agents:
        lines += ["| agent | tokens | score before | score after | gain | CPU s per run |", "|---|---|---|---|---|---|"]
    for name, runs in agents.items():
        before, after = [row["before"] for row in runs], [row["after"] for row in runs]
        gain = interval([b - a for a, b in zip(before, after, strict=True)])
        cost = np.mean([row["cpu_seconds"] for row in runs])
        lines.append(
            f"| {name} | {runs[0]['tokens']:,} | {plain(np.mean(before))} | {interval(after)} | {gain} | {cost:.0f} |"
        )
    if dqn := agents.get("sb3 DQN"):
        best = np.mean([row["best_greedy"] for row in dqn])
        lines += [
            "",
            f"A greedy policy says one completion always; the best of those has score {best:.3f} (mean over the tasks).",
        ]
    if runs := rows.get("assistant", []):
        lines += ["", "| held-out, per episode | before | after | gain |", "|---|---|---|---|"]
        for figure in ("objective", "reward", "kl"):
            before, after = ([row[when][figure] for row in runs] for when in ("before", "after"))
            gain = interval([b - a for a, b in zip(before, after, strict=True)])
            lines.append(f"| {figure} | {plain(np.mean(before))} | {plain(np.mean(after))} | {gain} |")
        cost = np.mean([row["cpu_seconds"] for row in runs])
        lines += ["", f"{runs[0]['tokens']:,} tokens, beta {runs[0]['beta']}, {cost:.0f} CPU s per run."]
    return "\n".join(lines) + "\n"


def main() -> None:
    """`python -m benchmarks.third_party`."""
    import tyro

    run_third_party(tyro.cli(ThirdPartyArguments, description=(__doc__ or "").splitlines()[0]))


if __name__ == "__main__":
    main()
