"""One run: train, evaluate, and what its row says."""

from __future__ import annotations

import math
import os
import platform
import random
import subprocess
import time
import traceback
import warnings
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cells import IDENTITY, Cell

EVALUATION_LANES = 128
"""At most; no more than answers are asked for."""
EVALUATION_SEED = 10_000
"""Of a cell's answers: this plus the cell's seed, the same for all agents."""
POINTS = 20
"""Of a curve on an exact task, evenly spaced on a logarithmic scale of tokens."""
SHOWN = 8
"""Prompts whose answers a row keeps."""


def play(cell: Cell, commit: str | None = None) -> dict[str, Any]:
    """Train, evaluate, and return the row. A failure is a row too."""
    import torch

    import agents.base  # noqa: F401  # importing is no part of the run's time

    torch.set_num_threads(1)
    seed = cell.seed + 1  # for agents that draw from global generators; ours do not
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  # that is the global one
    torch.manual_seed(seed)
    row: dict[str, Any] = {name: getattr(cell, name) for name in IDENTITY}
    row |= {"config": cell.config, "versions": versions(), "commit": commit}
    began, wall, cpu = time.time(), time.perf_counter(), time.process_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they would tear the table
            row |= measured(cell)
    except Exception as error:
        row |= {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
    row["time"] = {"began": began, "seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
    row["host"] = {"name": platform.node(), "machine": platform.machine(), "cores": os.cpu_count()}
    return finite(row)


def measured(cell: Cell) -> dict[str, Any]:
    """What a row says of a run that went well."""
    from benchmarks import metrics
    from textenv.cli.arguments import load_object

    unseen = make_env(cell, min(EVALUATION_LANES, cell.prompts * cell.samples), **cell.evaluation)
    agent_class = find_agent(cell.agent_class)
    env = unseen
    if cell.trains:
        groups = {"group_size": cell.group_size} if cell.group_size != 1 else {}
        env = make_env(cell, cell.lanes, **groups)
    agent = agent_class(env, seed=cell.seed, **cell.agent_settings)
    if cell.trains:
        curve = learn(agent, env.unwrapped, cell.tokens)
    else:
        curve = grown(agent_class, env, cell) if hasattr(agent, "completion_log_probs") else {}

    def elsewhere(split: str) -> metrics.Answers:
        other = make_env(cell, unseen.num_envs, **cell.evaluation | {"split": split})
        # One that does not train holds the environment that it answers in.
        return ask(agent if cell.trains else agent_class(other, seed=cell.seed, **cell.agent_settings), other, split)

    def ask(agent: Any, env: Any, split: str | None) -> metrics.Answers:
        ids = np.random.default_rng(0).permutation(len(env.unwrapped.task.prompts))[: cell.prompts]
        return metrics.Answers(
            agent=agent,
            env_id=cell.env,
            lanes=env.unwrapped,
            split=split,
            prompt_ids=np.repeat(ids, cell.samples),
            samples=cell.samples,
            seed=EVALUATION_SEED + cell.seed,
            elsewhere=elsewhere,
        )

    answers = ask(agent, unseen, cell.evaluation.get("split", cell.env_settings.get("split")))
    figures: dict[str, float] = {}
    for name in cell.metrics:
        group = metrics.METRICS[name] if name in metrics.METRICS else load_object(name, "the metric")
        figures |= group(answers)
    return {
        "metrics": {name: float(value) for name, value in figures.items()},
        "accounts": accounts(agent) if cell.trains else {},
        "curve": curve,
        "frontier": frontier(unseen.unwrapped) if "optimum" in figures else {},
        "samples": samples(answers) if "episodes" in vars(answers) else [],
    }


def make_env(cell: Cell, lanes: int, **changes: Any) -> Any:
    """The cell's task."""
    import gymnasium as gym

    import textenv  # noqa: F401  # registers the ids
    from textenv.cli.arguments import load_reward

    settings = cell.env_settings | changes
    if isinstance(settings.get("reward"), str):
        settings["reward"] = load_reward(settings["reward"])
    return gym.make_vec(cell.env, num_envs=lanes, **settings)


def find_agent(name: str) -> Any:
    """A class (or a function that makes an agent) by name, as `module:Class` or as `file.py:Class`."""
    from textenv.cli.arguments import load_agent, load_object

    return load_object(name, "the agent") if ":" in name else load_agent(name)


def learn(agent: Any, lanes: Any, tokens: int) -> dict[str, list[float]]:
    """Train; returns the curve, column by column. Where the optimum is known it has the exact score at about 20 points."""
    from stable_baselines3.common.callbacks import BaseCallback

    from benchmarks.metrics import policy_of

    marks = np.geomspace(max(1, min(500, tokens // 8)), tokens, POINTS)
    points: list[dict[str, float]] = []
    began = time.perf_counter()
    evaluating = 0.0

    def look() -> None:
        nonlocal evaluating
        now = time.perf_counter()
        if hasattr(lanes, "solve"):
            value = lanes.evaluate(policy_of(agent))
            point = {"score": value.score, "reward": value.reward, "kl": value.kl}
            points.append({"tokens": agent.num_timesteps, "seconds": now - began - evaluating} | point)
        evaluating += time.perf_counter() - now

    class Watch(BaseCallback):
        """Evaluates between updates: an evaluation draws no random numbers, so it changes nothing."""

        passed = 0

        def _on_rollout_start(self) -> None:
            due = int((marks <= agent.num_timesteps).sum())
            if due > self.passed:
                self.passed = due
                look()

        def _on_step(self) -> bool:
            return True

    agent.learn(tokens, callback=Watch())
    look()
    if not points:  # then what the agent has logged
        names = {
            "tokens": "time/timesteps",
            "seconds": "time/seconds",
            "reward": "rollout/task_reward",
            "kl": "rollout/kl",
        }
        points = [
            {name: row.get(key, math.nan) for name, key in names.items()} for row in getattr(agent, "history", [])
        ]
    return {name: [point[name] for point in points] for name in points[0]} if points else {}


def grown(agent_class: Any, env: Any, cell: Cell) -> dict[str, list[float]]:
    """Best-of-n where it is known exactly, for n up to the cell's. A point's tokens are those that one answer costs."""
    lanes = env.unwrapped
    if not hasattr(lanes, "solve"):
        return {}
    most = cell.agent_settings.get("n", 1)
    leaves = lanes.leaves
    length = float(np.exp(leaves.log_ref) @ (leaves.tokens < lanes.vocab_size).sum(axis=1))
    curve: dict[str, list[float]] = {name: [] for name in ("tokens", "score", "reward", "kl")}
    for n in sorted({2**k for k in range(int(math.log2(most)) + 1)} | {most}):
        agent = agent_class(env, seed=cell.seed, **cell.agent_settings | {"n": n})
        value = lanes.evaluate(agent.completion_log_probs())
        for name, number in zip(curve, (n * length, value.score, value.reward, value.kl), strict=True):
            curve[name].append(number)
    return curve


def accounts(agent: Any) -> dict[str, float]:
    """What the run has cost: tokens, gradient tokens, calls of reward and reference (docs/agents)."""
    last = agent.history[-1] if getattr(agent, "history", None) else {}
    counted = {name.removeprefix("time/"): value for name, value in last.items() if name.startswith("time/")}
    return {"timesteps": float(agent.num_timesteps)} | {k: v for k, v in counted.items() if not k.endswith("seconds")}


def frontier(lanes: Any) -> dict[str, list[float]]:
    """The exact front of KL and reward, as far as it is drawn; nothing where it is not known."""
    from benchmarks.metrics import DRAWN_BETAS

    if not hasattr(lanes, "solve"):
        return {}
    front = lanes.frontier(DRAWN_BETAS)
    order = np.argsort(front.kl)
    return {"kl": front.kl[order].tolist(), "reward": front.reward[order].tolist()}


def samples(answers: Any) -> list[dict[str, Any]]:
    """The answers to the first prompts, with their rewards."""
    prompts = answers.lanes.task.prompts.prompts
    return [
        {"prompt": prompts[answers.prompt_ids[i]], "answer": answers.texts[i], "reward": float(answers.episodes.task_reward[i])}
        for i in range(0, min(len(answers.texts), SHOWN * answers.samples), answers.samples)
    ]  # fmt: skip


def versions() -> dict[str, str]:
    """What the figures were made with."""
    packages = ("textenv", "torch", "transformers", "gymnasium", "stable-baselines3", "numpy")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def current_commit() -> str | None:
    """Of the checkout that runs, with `+changes` if files differ from it; None where it is no checkout."""
    root = Path(__file__).parents[1]
    git = ["git", "-C", str(root)]
    if not (root / ".git").exists():
        return None
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        status = [*git, "status", "--porcelain", "--untracked-files=no"]
        changed = subprocess.run(status, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+changes" if changed else "")


def finite(value: Any) -> Any:
    """None for numbers that JSON does not know."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: finite(item) for name, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list | tuple) else value


def without_time(row: Mapping[str, Any]) -> dict[str, Any]:
    """What two runs of one cell have in common: all but times and hosts."""
    kept = {name: value for name, value in row.items() if name not in ("time", "host")}
    if "curve" in kept:
        kept["curve"] = {name: values for name, values in kept["curve"].items() if name != "seconds"}
    return kept
