"""The `textenv` program.

It sits on top of everything: the only file of this package that looks up to `agents` and `benchmarks`, and it imports
them inside its commands, so that `--help` and typing errors answer at once.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import math
import re
import shutil
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from textenv.prompts import choose_split, did_you_mean, load_splits

RUN_FILE, CHECKPOINT, POLICY, REPORT_FILE = "run.json", "checkpoint", "policy", "report.json"
NOT_REMEMBERED = ("out", "resume")
PATHS = ("model", "prompts", "reward")
REWARD_MODEL = "RewardModel"
INTERRUPTED = 130  # the exit status of a program that Ctrl-C has stopped


class UsageError(Exception):
    """Something the user can mend; shown without a traceback."""


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
        for item in self.env_arg:
            name, equals, value = item.partition("=")
            if not equals:
                raise UsageError(f"Expected --env-arg name=value, got {item!r}.")
            try:
                keywords[name] = json.loads(value)
            except json.JSONDecodeError:
                keywords[name] = value
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


def train(arguments: Sequence[str]) -> None:
    """Train an agent in an environment: `textenv train PPO textenv/Arithmetic-v0`; or a reward model on rankings."""
    if arguments and arguments[0] == REWARD_MODEL:
        train_reward(arguments[1:])
        return
    names, flags = _positional(arguments, 2, "textenv train AGENT ENV [flags]", TrainArguments)
    agent_class = load_agent(names[0])
    config_class: type[Any] = getattr(agent_class, "Config", None) or NoConfig
    parts = [("train", TrainArguments), ("config", config_class)]
    command_class = dataclasses.make_dataclass(
        "Command",
        [(name, Annotated[part, tyro.conf.arg(name="")], field(default_factory=part)) for name, part in parts],
    )
    program = f"textenv train {names[0]} {names[1]}"
    with usage_errors():
        command: Any = tyro.cli(command_class, args=flags, prog=program, description=_summary(agent_class))
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
    _set_threads(options.threads, envs.unwrapped.task.model)
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
    options = tyro.cli(RewardModelArguments, args=list(flags), prog=program, description=_summary(train_reward))
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

    _set_threads(options.threads)
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
        settings |= {name: _absolute(settings[name]) for name in ("rankings", "model", "demonstrations", "validation")}
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

    names, flags = _positional(arguments, 1, "textenv eval DIR [flags]", EvalArguments)
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
    names, flags = _positional(arguments, 1, "textenv generate DIR [flags]", GenerateArguments)
    options = tyro.cli(GenerateArguments, args=flags, prog="textenv generate DIR", description=generate.__doc__)
    agent, _ = load_run(Path(names[0]), options, num_envs=1)
    agent.set_random_seed(options.seed)
    prompts = options.text or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    with usage_errors():
        completions = agent.generate(prompts, options.deterministic)
    for prompt, completion in zip(prompts, completions, strict=True):
        print(f"{prompt}{completion}")


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

    from benchmarks.report import leaderboard, print_tables, write_report

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

    from benchmarks.report import compare_results, print_comparison

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


def policy_of(model: str) -> str:
    """The model's directory, if a run of ours (or a checkpoint of one) was named in its place."""
    where = Path(model).expanduser()
    for policy in (where / CHECKPOINT / POLICY, where / POLICY):
        if (policy / "config.json").is_file() and not (where / "config.json").is_file():
            return str(policy)
    return model


def read_demonstrations(source: str) -> list[dict[str, Any]]:
    """Prompts of the training split that have a demonstration, from a file or a directory of splits."""
    splits = load_splits(source)
    rows = [row for row in splits[choose_split(splits, None)] if row.get("demonstration") is not None]
    if not rows:
        raise UsageError(f"No row of {source} has a `demonstration`.")
    return rows


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


@contextmanager
def usage_errors() -> Iterator[None]:
    """What the user can mend is shown without a traceback."""
    import gymnasium as gym

    try:
        yield
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


def run_directory(path: Path) -> Path:
    """The run that a checkpoint belongs to, or the path itself."""
    return path.parent if path.name == CHECKPOINT and (path.parent / RUN_FILE).is_file() else path


def with_absolute_paths(options: Any) -> Any:
    """Files and directories by their full paths: a run is evaluated and resumed from elsewhere too."""
    return dataclasses.replace(options, **{name: _absolute(getattr(options, name)) for name in PATHS})


def _absolute(path: str | None) -> str | None:
    """The full path of what exists (with `:name` behind it, for a function in a file); else as it is, a hub name perhaps."""
    file, colon, name = ("" if path is None else path).rpartition(":")
    if path is not None and Path(path).expanduser().exists():
        return str(Path(path).expanduser().resolve())
    if file.endswith(".py") and Path(file).is_file():
        return f"{Path(file).resolve()}{colon}{name}"
    return path


def read_run(path: Path) -> dict[str, Any]:
    """What a run directory remembers of its command line; nothing where it is none."""
    file = path / RUN_FILE
    if not file.is_file():
        return {}
    try:
        run = dict(json.loads(file.read_text()))
        return run | {name: _absolute(run[name]) for name in PATHS if name in run}
    except ValueError as error:
        raise UsageError(f"{file} is damaged ({error}): remove it to use {path / CHECKPOINT} by itself.") from error


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


def remembered(path: Path, options: Any) -> Any:
    """The arguments, with what was not given (what stands at its default) taken from the run in `path`."""
    run, blank = read_run(path), type(options)()
    kind = TrainArguments if isinstance(options, TrainArguments) else EnvArguments
    names = [f.name for f in dataclasses.fields(kind) if f.name not in NOT_REMEMBERED]
    fill = {name: run[name] for name in names if name in run and getattr(options, name) == getattr(blank, name)}
    return dataclasses.replace(options, **fill)


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


def interval(values: Any) -> str:
    """Mean and its 95% interval (normal approximation), for a table."""
    import numpy as np

    if np.isnan(values).all():
        return "-"
    half = 1.96 * np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else float("nan")
    return f"{np.mean(values):.3f} ± {half:.3f}"


@dataclass(frozen=True)
class NoConfig:
    """No settings: stands in for the config of an agent that has none."""


def _positional(arguments: Sequence[str], count: int, usage: str, flags: Any) -> tuple[list[str], list[str]]:
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


def _no_flags(arguments: Sequence[str], command: str) -> None:
    if arguments and arguments[0] in ("-h", "--help"):
        print(f"usage: textenv {command}\n\n{COMMANDS[command].__doc__}")
        sys.exit(0)
    if arguments:
        raise UsageError(f"textenv {command} takes no arguments, got {' '.join(arguments)}.")


ONE_THREAD_BELOW = 5_000_000
"""Parameters of a model whose products are too small to share: waking a second thread costs more than it brings."""


def _set_threads(threads: int | None, model: Any = None) -> None:
    """As many as asked for; else one for a small model, and torch's own choice for others.

    By a rule and not by a stopwatch: sums are split by thread, so that a measured choice would make two runs of a seed differ.
    """
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    elif model is not None and sum(p.numel() for p in model.parameters()) < ONE_THREAD_BELOW:
        torch.set_num_threads(1)


def _summary(thing: Any) -> str:
    return (thing.__doc__ or "").strip().splitlines()[0] if thing.__doc__ else ""


def first_line_of(module: str) -> str:
    """The first line of a module's docstring, without importing the module."""
    import ast

    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    doc = ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or ""
    return doc.splitlines()[0].split(": ", 1)[-1] if doc else ""


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*header)
    for row in rows:
        table.add_row(*row)
    Console().print(table)
