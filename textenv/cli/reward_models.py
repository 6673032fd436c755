"""`textenv train RewardModel`: learn a reward from rankings."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from textenv.cli.arguments import INTERRUPTED, REWARD_MODEL, UsageError, policy_of, set_threads, summary, usage_errors
from textenv.cli.runs import absolute
from textenv.prompts import choose_split, did_you_mean, load_splits

REPORT_FILE = "report.json"


@dataclass(frozen=True)
class RewardModelArguments:
    """What to learn from."""

    rankings: str
    """A .jsonl file, one ranking per line: {prompt, chosen, rejected}, or {prompt, completions} from best to worst, or
    {prompt, completions, ranks} with 1 the best and ties allowed; each with an optional margin."""
    model: str
    """What to start from: a language model by hub name or directory, or a finished run, whose policy it is."""
    out: Path = Path("runs/reward")
    """Where the reward model and report.json go."""
    demonstrations: str | None = None
    """Prompts with a `demonstration`, which shall score 0 on average (default: the ranked completions shall)."""
    validation: str = "0.1"
    """Share of the prompts to hold out, or a .jsonl file of other rankings to validate on."""
    epochs: int = 1
    """Passes over the rankings. More than one soon overfits."""
    learning_rate: float = 1e-3
    """Adam's first step size. The default suits models of up to a few million parameters; larger ones need less."""
    batch_prompts: int = 16
    """Prompts per update."""
    loss: Literal["pairs", "plackett_luce", "best_of_k"] = "pairs"
    """InstructGPT's (all pairs of a prompt), the likelihood of the whole ranking, or that of its best completion alone."""
    tie_weight: float = 0.0
    """What a tied pair counts in the loss of pairs, against 1 of a pair of different ranks."""
    seed: int = 0
    """Of the new head, the prompts held out and the order."""
    threads: int | None = None
    """CPU threads of torch (default: torch's own choice)."""


def train_reward(flags: Sequence[str]) -> None:
    """Train a reward model on rankings of completions (InstructGPT's loss: all pairs of a prompt at once)."""
    program = f"textenv train {REWARD_MODEL}"
    if flags and not flags[0].startswith("-"):
        raise UsageError(f"Expected {program} [flags]: it learns from --rankings, in no environment; got {flags[0]!r}.")
    options = tyro.cli(RewardModelArguments, args=list(flags), prog=program, description=summary(train_reward))
    for name, value in {"epochs": options.epochs, "batch-prompts": options.batch_prompts}.items():
        if value < 1:
            raise UsageError(f"Expected --{name} >= 1, got {value}.")
    if not options.learning_rate > 0:
        raise UsageError(f"Expected --learning-rate > 0, got {options.learning_rate}.")
    _existing_file(options.rankings, "--rankings")
    try:
        validation: float | str = float(options.validation)
    except ValueError:
        _existing_file(options.validation, "--validation")
        validation = options.validation
    if options.out.exists() and (options.out.is_file() or any(options.out.iterdir())):
        raise UsageError(f"{options.out} exists already: remove it, or choose another --out.")

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from rewards import train_reward_model
    from textenv.task import load_model, quiet_loading

    set_threads(options.threads)
    with usage_errors():
        demonstrations = None if options.demonstrations is None else read_demonstrations(options.demonstrations)
        model, tokenizer = load_model(policy_of(options.model))
        bar = Progress(
            TextColumn(REWARD_MODEL), BarColumn(), MofNCompleteColumn(), TextColumn("updates"), TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
        )  # fmt: skip
        shown = bar.add_task("", total=None, figures="")

        def progress(done: int, updates: int, loss: float) -> None:
            bar.update(shown, completed=done, total=updates, figures=f"loss {loss:.3f}")

        try:
            with bar:
                reward_model, report = train_reward_model(
                    options.rankings,
                    model=model,
                    tokenizer=tokenizer,
                    demonstrations=demonstrations,
                    epochs=options.epochs,
                    learning_rate=options.learning_rate,
                    batch_prompts=options.batch_prompts,
                    validation=validation,
                    loss=options.loss,
                    tie_weight=options.tie_weight,
                    seed=options.seed,
                    progress=progress,
                )
        except KeyboardInterrupt:  # half a pass over the rankings makes half a reward model
            print("\ntextenv: stopped; nothing was saved. The same command begins anew.", file=sys.stderr)
            sys.exit(INTERRUPTED)
        settings = {f.name: getattr(options, f.name) for f in dataclasses.fields(options)}
        settings |= {name: absolute(settings[name]) for name in ("rankings", "model", "demonstrations", "validation")}
        del settings["out"]

        def write(directory: Path) -> None:
            with quiet_loading():
                reward_model.save_pretrained(directory)
            about = {"settings": settings} | report.to_dict()
            (directory / REPORT_FILE).write_text(json.dumps(about, indent=1) + "\n")

        all_or_nothing(options.out, write)
    Console().print(ranking_table(report))
    zero = "the ranked completions" if demonstrations is None else f"{len(demonstrations):,} demonstrations"
    print(
        f"offset {report.offset:.3f}: {zero} score 0 on average; standard deviation of the scores {report.score_std:.3f}"
    )
    print(f"Saved in {options.out}, figures in {options.out / REPORT_FILE}. Pay it with: --reward {options.out}")


def ranking_table(report: Any) -> Any:
    """How well a reward model agrees with the rankings held out, and with those trained on."""
    from rich.table import Table

    parts = {"held out": report.validation, "trained on": report.train}
    metrics = {name: part for name, part in parts.items() if part is not None}
    rows = {
        "accuracy": lambda part: f"{part.accuracy:.3f}",
        "  95% interval": lambda part: "{:.3f} to {:.3f}".format(*part.accuracy_interval),
        "accuracy of length alone": lambda part: f"{part.length_accuracy:.3f}",
        "calibration error": lambda part: f"{part.calibration_error:.3f}",
        "loss (nats)": lambda part: f"{part.loss:.3f}",
        "pairs": lambda part: f"{part.pairs:,}",
    }
    table = Table("rankings", *metrics)
    for name, figure in rows.items():
        table.add_row(name, *map(figure, metrics.values()))
    return table


def read_demonstrations(source: str) -> list[dict[str, Any]]:
    """Prompts of the training split that have a demonstration, from a file or a directory of splits."""
    splits = load_splits(source)
    rows = [row for row in splits[choose_split(splits, None)] if row.get("demonstration") is not None]
    if not rows:
        raise UsageError(f"No row of {source} has a `demonstration`.")
    return rows


def _existing_file(name: str, flag: str) -> None:
    path = Path(name)
    if not path.is_file():
        names = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UsageError(f"No such file for {flag}: {name}.{did_you_mean(path.name, names)}")


def all_or_nothing(out: Path, write: Callable[[Path], None]) -> None:
    """Have a directory written beside its place, and put it there when it is complete."""
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    scratch.chmod(0o755)  # mkdtemp makes it private
    try:
        write(scratch)
        scratch.replace(out)  # over an empty directory, too
    except BaseException:  # Ctrl-C too
        shutil.rmtree(scratch, ignore_errors=True)
        raise
