"""`textenv bench SUITE`: which suite, which parts of it, and where it runs."""

from __future__ import annotations

import importlib
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from benchmarks.engines import Engine, import_ray
from benchmarks.play import find_agent
from benchmarks.records import ResultsExist
from benchmarks.run import run_suite
from benchmarks.suites import SUITES, Preset, Suite, Task
from textenv.cli.arguments import UsageError, first_line_of, load_object, pairs, textenv_ids, usage_errors, whole_number
from textenv.prompts import did_you_mean

PROGRAMS: dict[str, tuple[str, str, str]] = {
    "instructgpt": ("benchmarks.instructgpt", "DemoArguments", "run_demo"),
    "arithmetic": ("benchmarks.arithmetic", "ArithmeticArguments", "run_arithmetic"),
    "speed": ("benchmarks.speed", "SpeedArguments", "run_speed"),
    "overoptimization": ("benchmarks.overoptimization", "OveroptimizationArguments", "run_overoptimization"),
}
"""Benchmarks that are no agents x tasks x seeds: name -> module, its arguments, and what runs them."""

ERRORS_SHOWN = 3
"""Different ones, after a run; the report has all of them."""

Tokens = Annotated[
    int | None,
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="INT",
        instance_from_str=lambda words: whole_number(words[0]),
        is_instance=lambda value: value is None or isinstance(value, int),
        str_from_instance=lambda value: ["as-the-suite-says" if value is None else str(value)],
    ),
]
Address = Annotated[
    str | None,
    PrimitiveConstructorSpec(
        nargs=(0, 1),
        metavar="[ADDRESS]",
        instance_from_str=lambda words: words[0] if words else "",
        is_instance=lambda value: value is None or isinstance(value, str),
        str_from_instance=lambda value: [value] if value else [],
    ),
]


@dataclass(frozen=True, kw_only=True)
class SuiteArguments:
    """What is run of a suite, where, and where its rows go."""

    agents: tuple[str, ...] = ()
    """Names in the suite; any other of ours; or yours, as `module:Class` or `file.py:Class` (default: all of the suite)."""
    tasks: tuple[str, ...] = ()
    """Names in the suite, or ids of environments (default: all of the suite)."""
    seeds: int | None = None
    """Runs per agent and task, of seeds 0, 1, ..."""
    tokens: Tokens = None
    """Length of a run, for all agents alike."""
    task_seed: int | None = None
    """On exact tasks: the task seed of run 0; the next run has the next. Tuning is on 0 to 9, results on 1000 and up."""
    env_arg: tyro.conf.UseAppendAction[list[str]] = field(default_factory=list)
    """A keyword of the environments, as `name=value` (JSON); may be repeated."""
    agent_arg: tyro.conf.UseAppendAction[list[str]] = field(default_factory=list)
    """A keyword of the agents, likewise."""
    jobs: int = 1
    """Processes, of one thread each."""
    ray: Address = None
    """Run on Ray: on the cluster at this address, or on a local one of `--jobs` cores."""
    out: Path | None = None
    """Where rows and report go (default: runs/SUITE)."""
    resume: bool = False
    """Go on: run what is missing or failed."""
    overwrite: bool = False
    """Run everything anew, over results that are there."""

    def __post_init__(self) -> None:
        for name in ("seeds", "jobs", "tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"Expected --{name} >= 1, got {value}.")
        if self.resume and self.overwrite:
            raise UsageError("Expected --resume or --overwrite, got both.")


def bench(arguments: Sequence[str]) -> None:
    """Run a suite (or another benchmark) from the command line."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: textenv bench SUITE [flags]   (textenv bench SUITE --help lists the flags)\n")
        for name, suite in SUITES.items():
            print(f"  {name:17} {suite.title}")
        for name, (module, _, _) in PROGRAMS.items():
            print(f"  {name:17} {first_line_of(module)}")
        print("\nYours: textenv bench my_suite.py:suite, or textenv bench custom --tasks ... --agents ...")
        return
    name, flags = arguments[0], list(arguments[1:])
    if name in PROGRAMS:
        module, options_class, function = PROGRAMS[name]
        program = importlib.import_module(module)
        options = tyro.cli(getattr(program, options_class), args=flags, prog=f"textenv bench {name}")
        getattr(program, function)(options)
        return
    short, suite = find_suite(name)
    run(name, short, suite, tyro.cli(SuiteArguments, args=flags, prog=f"textenv bench {name}", description=suite.title))


def find_suite(name: str) -> tuple[str, Suite]:
    """A suite by its name, or yours as `file.py:suite`; with a name for its directory."""
    if name in SUITES:
        return name, SUITES[name]
    if ":" not in name:
        if name.endswith(".py"):
            raise UsageError(f"Expected {name}:suite, with the name that the suite has in the file; got {name!r}.")
        known = [*SUITES, *PROGRAMS]
        raise UsageError(
            f"Unknown suite {name!r}; there are {', '.join(known)}, or yours as file.py:suite.{did_you_mean(name, known)}"
        )
    suite = load_object(name, "the suite")
    if not isinstance(suite, Suite):
        raise UsageError(f"Expected {name} to be a benchmarks.suites.Suite, got {type(suite).__name__}.")
    return name.rpartition(":")[2], suite


def run(name: str, short: str, suite: Suite, options: SuiteArguments) -> None:
    """Run it, print the leaderboard, and write the report."""
    from rich.console import Console

    from benchmarks.report import write_report
    from benchmarks.tables import leaderboard, print_tables

    console = Console()
    out = options.out or Path("runs") / short
    with usage_errors():
        chosen = selected(name, suite, options)
        if options.ray is not None:
            import_ray()
        engine = Engine(jobs=options.jobs, ray=options.ray)
        try:
            rows = run_suite(
                short, chosen, out, engine=engine, resume=options.resume, overwrite=options.overwrite,
                command=command(name, options), console=console,
            )  # fmt: skip
        except KeyboardInterrupt:
            console.print(
                f"\nStopped. What is finished is in {out}; the same command with --resume goes on from there."
            )
            raise
        except ResultsExist as error:
            raise UsageError(str(error)) from error
    failed = sum("error" in row for row in rows)
    if failed < len(rows):
        print_tables(leaderboard(out), console)
    files = write_report(out)
    console.print(f"report: {files[0]}   rows: {out / 'rows.jsonl'}", highlight=False)
    if failed:
        console.print(
            f"[red]{failed} of {len(rows)} runs failed[/red]; their rows have the tracebacks.", highlight=False
        )
        errors = dict.fromkeys(f"{row['agent']}: {row['error'].splitlines()[0]}" for row in rows if "error" in row)
        for line in list(errors)[:ERRORS_SHOWN]:
            console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)
        raise SystemExit(1)


def selected(name: str, suite: Suite, options: SuiteArguments) -> Suite:
    """The parts of a suite that are asked for."""
    env_settings, agent_settings = pairs(options.env_arg, "--env-arg"), pairs(options.agent_arg, "--agent-arg")
    agents = {short: preset for key in options.agents for short, preset in [find_preset(name, suite, key)]}
    tasks = {key: find_task(name, suite, key) for key in options.tasks}
    agents, tasks = agents or dict(suite.agents), tasks or dict(suite.tasks)
    if not agents or not tasks:
        raise UsageError(f"Suite {name!r} has no agents or tasks of its own: give --agents and --tasks.")
    for key, preset in agents.items():
        agents[key] = replace(
            preset,
            config=dict(preset.config) | agent_settings,
            tokens=preset.tokens if options.tokens is None else options.tokens,
        )
    for key, task in tasks.items():
        first = task.first_task_seed if options.task_seed is None else options.task_seed
        tasks[key] = replace(task, settings=dict(task.settings) | env_settings, first_task_seed=first)
    return replace(suite, agents=agents, tasks=tasks, seeds=options.seeds or suite.seeds)


def find_preset(name: str, suite: Suite, agent: str) -> tuple[str, Preset]:
    """An agent of the suite, or any other under its usual settings; with a name for its rows."""
    if agent in suite.agents:
        return agent, suite.agents[agent]
    if ":" not in agent and did_you_mean(agent, list(suite.agents)) and agent not in agent_names():
        raise UsageError(
            f"Suite {name!r} has no agent {agent!r}; it has {', '.join(suite.agents)}.{did_you_mean(agent, list(suite.agents))}"
        )
    found = find_agent(agent)
    where, colon, rest = agent.rpartition(":")
    if where.endswith(".py"):
        agent = f"{Path(where).resolve()}{colon}{rest}"
    groups = 4 if getattr(found, "needs_groups", False) else 1
    return rest, Preset(agent=agent, group_size=groups, decay=hasattr(found, "Config"))


def agent_names() -> Mapping[str, str]:
    """Our agents."""
    from agents import AGENTS

    return AGENTS


def find_task(name: str, suite: Suite, task: str) -> Task:
    """A task of the suite, or any environment."""
    if task in suite.tasks:
        return suite.tasks[task]
    if "/" in task:
        if task.startswith("textenv/") and task not in textenv_ids():
            raise UsageError(f"Unknown environment {task!r}.{did_you_mean(task, textenv_ids())}")
        return Task(env=task, first_task_seed=1000 if task.startswith("textenv/Tree-") else None)
    known = list(suite.tasks)
    raise UsageError(
        f"Suite {name!r} has no task {task!r}; it has {', '.join(known)}, or give the id of an environment.{did_you_mean(task, known)}"
    )


def command(name: str, options: SuiteArguments) -> str:
    """What makes these rows: the arguments that are not the usual ones, without those that change no row."""
    usual, parts = SuiteArguments(), ["textenv", "bench", name]
    for f in fields(SuiteArguments):
        value = getattr(options, f.name)
        if f.name in ("jobs", "ray", "out", "resume", "overwrite") or value == getattr(usual, f.name):
            continue
        flag = f"--{f.name.replace('_', '-')}"
        if isinstance(value, list):
            parts += [word for item in value for word in (flag, item)]
        else:
            parts += [flag, *map(str, value if isinstance(value, tuple) else (value,))]
    return shlex.join(parts)
