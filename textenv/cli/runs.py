"""Run directories: what a run remembers of its command line, for `--resume`, `eval` and `generate`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from textenv.cli.arguments import (
    CHECKPOINT,
    EnvArguments,
    TrainArguments,
    UsageError,
    load_agent,
    make_envs,
    usage_errors,
)

RUN_FILE = "run.json"

NOT_REMEMBERED = ("out", "resume")

PATHS = ("model", "prompts", "reward")


def read_run(path: Path) -> dict[str, Any]:
    """What a run directory remembers of its command line; nothing where it is none."""
    file = path / RUN_FILE
    if not file.is_file():
        return {}
    try:
        run = dict(json.loads(file.read_text()))
        return run | {name: absolute(run[name]) for name in PATHS if name in run}
    except ValueError as error:
        raise UsageError(f"{file} is damaged ({error}): remove it to use {path / CHECKPOINT} by itself.") from error


def run_directory(path: Path) -> Path:
    """The run that a checkpoint belongs to, or the path itself."""
    return path.parent if path.name == CHECKPOINT and (path.parent / RUN_FILE).is_file() else path


def load_run(path: Path, options: Any, num_envs: int) -> tuple[Any, Any]:
    """The agent of a run directory (or of a bare checkpoint) and an environment for it."""
    from agents.checkpoints import read_about

    path = run_directory(path)
    run = read_run(path)
    checkpoint = path / CHECKPOINT if run else path
    with usage_errors():
        about = read_about(checkpoint)
        env_id = getattr(options, "env", None) or run.get("env") or about.get("env")
        if env_id is None:
            raise UsageError(f"{checkpoint} does not say which environment it is of: pass --env.")
        envs = make_envs(env_id, num_envs, remembered(path, options).keywords())
        return load_agent(run.get("agent") or about["agent"]).load(checkpoint, envs), envs


def remembered(path: Path, options: Any) -> Any:
    """The arguments, with what was not given (what stands at its default) taken from the run in `path`."""
    run, blank = read_run(path), type(options)()
    kind = TrainArguments if isinstance(options, TrainArguments) else EnvArguments
    names = [f.name for f in dataclasses.fields(kind) if f.name not in NOT_REMEMBERED]
    fill = {name: run[name] for name in names if name in run and getattr(options, name) == getattr(blank, name)}
    return dataclasses.replace(options, **fill)


def refuse_changes(path: Path, env_id: str, options: TrainArguments) -> None:
    """A resumed run keeps its environment and its objective; only how long it goes on, and how it is shown, may change."""
    run, blank = read_run(path), TrainArguments()
    if run.get("env", env_id) != env_id:
        raise UsageError(f"{path} is a run of {run['env']}, not of {env_id}: choose another --out.")
    free = (*NOT_REMEMBERED, "total_timesteps", "checkpoint_every", "verbose", "threads")
    for f in dataclasses.fields(options):
        value = getattr(options, f.name)
        if f.name not in free and value not in (getattr(blank, f.name), run.get(f.name, value)):
            flag = f"--{f.name.replace('_', '-')}"
            raise UsageError(
                f"{path} was begun with {f.name}={run[f.name]}, not {value}: leave {flag} away, or begin another run."
            )


def with_absolute_paths(options: Any) -> Any:
    """Files and directories by their full paths: a run is evaluated and resumed from elsewhere too."""
    return dataclasses.replace(options, **{name: absolute(getattr(options, name)) for name in PATHS})


def absolute(path: str | None) -> str | None:
    """The full path of what exists (with `:name` behind it, for a function in a file); else as it is, a hub name perhaps."""
    file, colon, name = ("" if path is None else path).rpartition(":")
    if path is not None and Path(path).expanduser().exists():
        return str(Path(path).expanduser().resolve())
    if file.endswith(".py") and Path(file).is_file():
        return f"{Path(file).resolve()}{colon}{name}"
    return path
