"""The `textenv` program: its commands, and how one is found.

It sits on top of everything: the only part of this package that looks up to `agents` and `benchmarks`, and it imports
them inside its commands, so that `--help` and typing errors answer at once.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from textenv.cli.arguments import INTERRUPTED, UsageError, first_line_of, textenv_ids, usage_errors
from textenv.cli.evaluation import evaluate, generate
from textenv.cli.training import train
from textenv.prompts import did_you_mean


def envs(arguments: Sequence[str]) -> None:
    """List the environments."""
    _no_flags(arguments, "envs")
    _table(
        ("id", "what it is"),
        [(name, first_line_of(spec.entry_point.split(":")[0])) for name, spec in sorted(textenv_ids().items())],
    )


def agents(arguments: Sequence[str]) -> None:
    """List the agents."""
    from agents import AGENTS

    _no_flags(arguments, "agents")
    _table(("agent", "what it is", "file"), [(name, first_line_of(module), module) for name, module in AGENTS.items()])


def demo(arguments: Sequence[str]) -> None:
    """The recipe of InstructGPT in miniature, from raw text to a policy that follows instructions: some minutes, with a report at the end."""
    from benchmarks.instructgpt import DemoArguments, run_demo

    run_demo(tyro.cli(DemoArguments, args=list(arguments), prog="textenv demo", description=demo.__doc__))


def bench(arguments: Sequence[str]) -> None:
    """Benchmark suites: agents x tasks x seeds, with a report at the end: `textenv bench exact --jobs 2`."""
    from benchmarks import command

    command.bench(arguments)


@dataclass(frozen=True)
class ReportArguments:
    """Which results are shown."""

    directory: tyro.conf.Positional[Path]
    """What `textenv bench` has written."""


def report(arguments: Sequence[str]) -> None:
    """Write the report of a benchmark's directory, as HTML and Markdown: `textenv report runs/exact`."""
    from rich.console import Console

    from benchmarks.report import write_report
    from benchmarks.tables import leaderboard, print_tables

    options = tyro.cli(ReportArguments, args=list(arguments), prog="textenv report", description=report.__doc__)
    with usage_errors():
        files = write_report(options.directory)
        print_tables(leaderboard(options.directory), Console())
    print("\n".join(str(file) for file in files))


@dataclass(frozen=True)
class CompareArguments:
    """What is compared."""

    before: tyro.conf.Positional[str]
    """A directory of results, or one agent in it: `runs/exact` or `runs/exact:PPO`."""
    after: tyro.conf.Positional[str]
    """Another, or another agent: what is said is about this one."""
    confidence: float = 0.95
    """Of the intervals that decide."""


def compare(arguments: Sequence[str]) -> None:
    """Better, worse or undecided, metric by metric; status 1 if the headline metric is worse: `textenv compare runs/old runs/new`."""
    from rich.console import Console

    from benchmarks.comparison import compare_results, print_comparison

    options = tyro.cli(CompareArguments, args=list(arguments), prog="textenv compare", description=compare.__doc__)
    with usage_errors():
        comparison = compare_results(options.before, options.after, options.confidence)
    if print_comparison(comparison, Console()):
        sys.exit(1)


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "demo": demo,
    "bench": bench,
    "report": report,
    "compare": compare,
    "train": train,
    "eval": evaluate,
    "generate": generate,
    "envs": envs,
    "agents": agents,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: textenv COMMAND [...]   (textenv COMMAND --help says more)\n")
        for name, command in COMMANDS.items():
            print(f"  {name:10} {(command.__doc__ or '').splitlines()[0]}")
        return
    if arguments[0] == "--version":
        from textenv import __version__

        print(__version__)
        return
    try:
        if arguments[0] not in COMMANDS:
            raise UsageError(
                f"Unknown command {arguments[0]!r}; there are {', '.join(COMMANDS)}.{did_you_mean(arguments[0], COMMANDS)}"
            )
        with plain_warnings():
            COMMANDS[arguments[0]](arguments[1:])
    except UsageError as error:
        sys.exit(f"textenv: {error}")
    except KeyboardInterrupt:
        print("textenv: interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Warnings as one line each, without the place in the code that they come from."""
    before = warnings.formatwarning

    def one_line(message: Warning | str, *_: Any, **__: Any) -> str:
        text = re.sub(r"\x1b\[\d*m", "", str(message))  # Gymnasium's colours
        return f"textenv: warning: {text.removeprefix('WARN: ')}\n"

    warnings.formatwarning = one_line
    try:
        yield
    finally:
        warnings.formatwarning = before


def _no_flags(arguments: Sequence[str], command: str) -> None:
    if arguments and arguments[0] in ("-h", "--help"):
        print(f"usage: textenv {command}\n\n{COMMANDS[command].__doc__}")
        sys.exit(0)
    if arguments:
        raise UsageError(f"textenv {command} takes no arguments, got {' '.join(arguments)}.")


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*header)
    for row in rows:
        table.add_row(*row)
    Console().print(table)
