"""`textenv train AGENT ENV`, which can be interrupted, and resumed."""

from __future__ import annotations

import dataclasses
import json
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from textenv.cli.arguments import (
    CHECKPOINT,
    INTERRUPTED,
    REWARD_MODEL,
    TrainArguments,
    UsageError,
    load_agent,
    make_envs,
    positional,
    set_threads,
    summary,
    usage_errors,
)
from textenv.cli.reward_models import train_reward
from textenv.cli.runs import NOT_REMEMBERED, RUN_FILE, refuse_changes, remembered, with_absolute_paths


@dataclass(frozen=True)
class NoConfig:
    """No settings: stands in for the config of an agent that has none."""


def train(arguments: Sequence[str]) -> None:
    """Train an agent in an environment: `textenv train PPO textenv/Arithmetic-v0`; or a reward model on rankings."""
    if arguments and arguments[0] == REWARD_MODEL:
        train_reward(arguments[1:])
        return
    names, flags = positional(arguments, 2, "textenv train AGENT ENV [flags]", TrainArguments)
    agent_class = load_agent(names[0])
    config_class: type[Any] = getattr(agent_class, "Config", None) or NoConfig
    parts = [("train", TrainArguments), ("config", config_class)]
    command_class = dataclasses.make_dataclass(
        "Command",
        [(name, Annotated[part, tyro.conf.arg(name="")], field(default_factory=part)) for name, part in parts],
    )
    program = f"textenv train {names[0]} {names[1]}"
    with usage_errors():
        command: Any = tyro.cli(command_class, args=flags, prog=program, description=summary(agent_class))
    options, config = with_absolute_paths(command.train), command.config
    out = options.out or Path("runs") / f"{agent_class.__name__}-{names[1].split('/')[-1]}-seed{options.seed}"
    checkpoint = out / CHECKPOINT
    if options.total_timesteps < 1:
        raise UsageError(f"Expected --total-timesteps >= 1, got {options.total_timesteps}.")
    if options.resume:
        if not checkpoint.exists():
            raise UsageError(f"Nothing to resume: there is no checkpoint in {out}. Start it without --resume.")
        refuse_changes(out, names[1], options)
        if config != config_class():
            raise UsageError("The agent's settings come from the checkpoint: leave its flags away with --resume.")
        options = remembered(out, options)
    elif checkpoint.exists():  # what died before its first checkpoint is begun anew
        raise UsageError(f"{out} holds a run already. Go on with it (--resume), or choose another --out.")
    envs = make_envs(names[1], options.num_envs, options.keywords())
    set_threads(options.threads, envs.unwrapped.task.model)
    with usage_errors():
        if options.resume:
            agent = agent_class.load(checkpoint, envs, log_dir=out, verbose=int(options.verbose))
        else:
            agent = agent_class(envs, seed=options.seed, log_dir=out, verbose=int(options.verbose), config=config)
            out.mkdir(parents=True, exist_ok=True)
            given = {
                f.name: getattr(options, f.name) for f in dataclasses.fields(options) if f.name not in NOT_REMEMBERED
            }
            (out / RUN_FILE).write_text(json.dumps({"agent": names[0], "env": names[1]} | given, indent=1))
    left = options.total_timesteps - agent.timesteps_counted
    if left <= 0:
        agent.logger.close()
        print(f"{out} has its {agent.timesteps_counted:,} tokens already; ask for more with --total-timesteps.")
        return
    go_on = f"Go on with: {program} --out {out} --resume"
    with Interruption() as interruption:
        saver = interruption.callback(lambda: agent.save(checkpoint), options.checkpoint_every)
        try:
            with usage_errors():
                agent.learn(left, callback=saver, progress_bar=True)
            agent.save(checkpoint)
        except KeyboardInterrupt:
            where = f"the last checkpoint is {checkpoint}. {go_on}" if checkpoint.exists() else "nothing was saved."
            print(f"textenv: stopped at once; {where}", file=sys.stderr)
            sys.exit(INTERRUPTED)
        finally:
            agent.logger.close()
    if interruption.asked:
        print(f"Interrupted; the last finished update is in {checkpoint}.\n{go_on}")
        sys.exit(INTERRUPTED)
    sampled = any(name.startswith("rollout/") for name in agent.history[-1])  # imitation has no rollouts
    last = {name: value for name, value in agent.history[-1].items() if sampled == name.startswith("rollout/")}
    print("  ".join(f"{name.split('/')[1]} {value:.3g}" for name, value in last.items() if "time/" not in name))
    print(f"Saved in {checkpoint}; the curves are in {out / 'progress.csv'}.")


class Interruption:
    """The first Ctrl-C asks the run to stop and save; the second is obeyed at once."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> Interruption:
        self._before = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _ask(self, *_: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print("\nStopping and saving (Ctrl-C again to stop at once)...", file=sys.stderr)

    def callback(self, save: Callable[[], None], every: int) -> Any:
        """A stable-baselines3 callback that saves every so many iterations and stops when asked to."""
        from stable_baselines3.common.callbacks import BaseCallback

        interruption = self

        class Saver(BaseCallback):
            iterations = 0

            def _on_rollout_start(self) -> None:
                if self.iterations and self.iterations % every == 0:
                    save()
                self.iterations += 1

            def _on_step(self) -> bool:
                return not interruption.asked

        return Saver()
