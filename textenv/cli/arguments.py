"""What is typed, as objects: flags as dataclasses, names as agents, rewards and environments; and what is typed wrongly."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import importlib.util
import inspect
import json
import math
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from rewards.base import RewardError
from textenv.prompts import did_you_mean

CHECKPOINT, POLICY = "checkpoint", "policy"
"""In a run directory: the checkpoint; in a checkpoint: the model."""
REWARD_MODEL = "RewardModel"
"""What `textenv train` trains in no environment."""
INTERRUPTED = 130
"""The exit status of a program that Ctrl-C has stopped."""


class UsageError(Exception):
    """Something the user can mend; shown without a traceback."""


@contextmanager
def usage_errors() -> Iterator[None]:
    """What the user can mend is shown without a traceback."""
    import gymnasium as gym

    try:
        yield
    except RewardError as error:
        if error.__cause__ is not None:  # what the user's reward raised: it leads to the line in the user's file
            traceback.print_exception(error.__cause__)
        raise UsageError(_as_flags(str(error))) from error
    except (ValueError, OSError, FloatingPointError, gym.error.Error) as error:
        raise UsageError(_as_flags(str(error))) from error


def _as_flags(message: str) -> str:
    """Remedies in terms of keywords, as the flags that give them."""
    if not message.startswith("Missing keyword"):
        return message.replace("pass validation=None", "pass --validation 0")
    known = [f.name for f in dataclasses.fields(EnvArguments)]
    names = re.findall(r"(\w+)=", message)
    flags = [f"--{name.replace('_', '-')}" if name in known else f"--env-arg {name}=VALUE" for name in names]
    return f"Missing: {', '.join(flags)}."


def pairs(items: Sequence[str], flag: str) -> dict[str, Any]:
    """`name=value` as keywords, values in JSON or as they stand."""
    keywords: dict[str, Any] = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not equals:
            raise UsageError(f"Expected {flag} name=value, got {item!r}.")
        try:
            keywords[name] = json.loads(value)
        except json.JSONDecodeError:
            keywords[name] = value
    return keywords


def whole_number(text: str) -> int:
    """`1000`, `1_000` or `1e3`."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not number.is_integer():
        raise ValueError(f"expected a whole number such as 1000 or 1e3, got {text!r}")
    return int(text) if re.fullmatch(r"[-+]?[\d_]+", text) else int(number)


Count: TypeAlias = Annotated[
    int,
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="INT",
        instance_from_str=lambda words: whole_number(words[0]),
        is_instance=lambda value: isinstance(value, int),
        str_from_instance=lambda value: [str(value)],
    ),
]


@dataclass(frozen=True)
class EnvArguments:
    """Where and what to generate."""

    model: str | None = None
    """Hub name or directory of the reference model, or a finished run, whose policy it is (default: the environment's own)."""
    prompts: str | None = None
    """A .jsonl, .json, .csv or .txt file, or a directory with one per split."""
    reward: str | None = None
    """Your reward function, `file.py:function` or `module:function`; or the directory of a reward model."""
    split: str | None = None
    """Of the prompts."""
    beta: float | None = None
    """KL coefficient, reward per nat."""
    max_new_tokens: int | None = None
    """Response budget, tokens."""
    temperature: float | None = None
    """Sampling temperature."""
    env_arg: tyro.conf.UseAppendAction[list[str]] = field(default_factory=list)
    """Any further keyword of the environment, as `name=value` (JSON); may be repeated."""

    def keywords(self) -> dict[str, Any]:
        """Keyword arguments for `gymnasium.make_vec`."""
        given = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(EnvArguments)
            if f.name not in ("env_arg", "reward")
        }
        keywords = {name: value for name, value in given.items() if value is not None}
        if self.model is not None:
            keywords["model"] = policy_of(self.model)
        keywords |= pairs(self.env_arg, "--env-arg")
        if self.reward is not None:
            keywords["reward"] = load_reward(self.reward, keywords.get("device"))
        return keywords


@dataclass(frozen=True)
class TrainArguments(EnvArguments):
    """How long and where to."""

    total_timesteps: Count = 100_000
    """Tokens to sample (SFT: to imitate)."""
    num_envs: int = 64
    """Lanes."""
    seed: int = 0
    """Of everything."""
    out: Path | None = None
    """Run directory (default: runs/AGENT-ENV-seedN)."""
    resume: bool = False
    """Go on from the checkpoint in the run directory."""
    checkpoint_every: int = 10
    """Iterations between checkpoints."""
    verbose: bool = False
    """Print every logged figure."""
    threads: int | None = None
    """CPU threads of torch (default: 1 for models below 5M parameters, else torch's own choice)."""


def positional(arguments: Sequence[str], count: int, usage: str, flags: Any) -> tuple[list[str], list[str]]:
    """The leading positional arguments, and the flags behind them."""
    arguments = list(arguments)
    names = arguments[:count]
    if len(names) < count or any(name.startswith("-") for name in names):
        if any(flag in arguments for flag in ("-h", "--help")):
            if "AGENT" in usage:
                print("Each agent has settings of its own besides: textenv train AGENT ENV --help")
                print(f"A reward model learns from rankings: textenv train {REWARD_MODEL} --help\n")
            tyro.cli(flags, args=["--help"], prog=usage.removesuffix(" [flags]"))
        raise UsageError(f"Expected {usage}")
    return names, arguments[count:]


def load_agent(name: str) -> type[Any]:
    """An agent class of ours by name, or anybody's as `file.py:Class` or `module:Class`."""
    from agents import AGENTS

    if ":" in name:
        agent_class: type[Any] = load_object(name, "the agent")
        missing = [verb for verb in ("learn", "predict", "save", "load") if not hasattr(agent_class, verb)]
        if missing:
            raise UsageError(
                f"{name} is no agent: it has no {', '.join(missing)}. Expected a class with learn, predict, save and load."
            )
        parameters = inspect.signature(agent_class).parameters
        if "log_dir" not in parameters and all(p.kind is not p.VAR_KEYWORD for p in parameters.values()):
            raise UsageError(
                f"{name} takes no log_dir, as the agents of this command do. Agents of other libraries are trained from Python: see docs/clients.md."
            )
        return agent_class
    if name not in AGENTS:
        known = [*AGENTS, REWARD_MODEL]
        raise UsageError(
            f"Unknown agent {name!r}; there are {', '.join(known)}, or yours as file.py:Class.{did_you_mean(name, known)}"
        )
    return getattr(importlib.import_module(AGENTS[name]), name)


def load_reward(spec: str, device: str | None = None) -> Any:
    """A reward from the command line: a function by name, or a reward model by its directory."""
    if not Path(spec).expanduser().is_dir():
        if ":" not in spec:
            raise UsageError(
                f"Expected --reward as file.py:name, module:name or the directory of a reward model, got {spec!r}: no such directory."
            )
        return load_object(spec, "--reward")
    import torch

    from rewards import RewardModel
    from textenv.task import quiet_loading

    with usage_errors(), quiet_loading():
        reward = RewardModel.from_pretrained(Path(spec).expanduser())
    reward.model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return reward


def load_object(spec: str, what: str) -> Any:
    """The object behind `file.py:name` or `module:name`."""
    where, colon, name = spec.rpartition(":")
    if not colon or not name:
        raise UsageError(f"Expected {what} as file.py:name or module:name, got {spec!r}.")
    try:
        if where.endswith(".py"):
            if not Path(where).is_file():
                raise UsageError(f"No such file: {where}.")
            module_spec = importlib.util.spec_from_file_location(Path(where).stem, where)
            assert module_spec is not None
            assert module_spec.loader is not None
            module = importlib.util.module_from_spec(module_spec)
            sys.modules[module_spec.name] = module  # dataclasses and pickle look it up there
            sys.path.insert(0, str(Path(where).resolve().parent))  # its neighbours can be imported
            module_spec.loader.exec_module(module)
        else:
            sys.path.insert(0, "")
            module = importlib.import_module(where)
    except ImportError as error:
        raise UsageError(f"Cannot import {where!r} for {what}: {error}.") from error
    if not hasattr(module, name):
        raise UsageError(f"{where} has no {name!r}.{did_you_mean(name, dir(module))}")
    return getattr(module, name)


def policy_of(model: str) -> str:
    """The model's directory, if a run of ours (or a checkpoint of one) was named in its place."""
    where = Path(model).expanduser()
    for policy in (where / CHECKPOINT / POLICY, where / POLICY):
        if (policy / "config.json").is_file() and not (where / "config.json").is_file():
            return str(policy)
    return model


def textenv_ids() -> dict[str, Any]:
    """Our ids in Gymnasium's registry."""
    import gymnasium as gym

    import textenv  # noqa: F401  # registers them

    return {name: spec for name, spec in gym.registry.items() if name.startswith("textenv/")}


def make_envs(env_id: str, num_envs: int, keywords: dict[str, Any]) -> Any:
    """A vector environment; what the user got wrong is a `UsageError`."""
    import gymnasium as gym

    known = textenv_ids()
    if env_id not in known:
        raise UsageError(
            f"Unknown environment {env_id!r}; there are {', '.join(sorted(known))}.{did_you_mean(env_id, known)}"
        )
    with usage_errors():
        return gym.make_vec(env_id, num_envs=num_envs, **keywords)


ONE_THREAD_BELOW = 5_000_000
"""Parameters of a model whose products are too small to share: waking a second thread costs more than it brings."""


def set_threads(threads: int | None, model: Any = None) -> None:
    """As many as asked for; else one for a small model, and torch's own choice for others.

    By a rule and not by a stopwatch: sums are split by thread, so that a measured choice would make two runs of a seed differ.
    """
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    elif model is not None and sum(p.numel() for p in model.parameters()) < ONE_THREAD_BELOW:
        torch.set_num_threads(1)


def summary(thing: Any) -> str:
    """The first line of its docstring."""
    return (thing.__doc__ or "").strip().splitlines()[0] if thing.__doc__ else ""


def first_line_of(module: str) -> str:
    """The first line of a module's docstring, without importing the module."""
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    doc = ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or ""
    return doc.splitlines()[0].split(": ", 1)[-1] if doc else ""
