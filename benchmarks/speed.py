"""How fast the Gym loop writes and the agents learn, against the libraries that people use for it.

Both sides do the same work in one run, in turn, each on the number of threads (one or two) that suits it best; what is printed
is the median of the rounds' ratios, because single times mean little on a shared machine. The work is stated under each table.
Each part has a process of its own, so that no figure depends on what ran before; threads and micro-batches are chosen once per model.
No side may do less than the other: the numbers of tokens written and given a gradient are compared, and a difference is an error.

Run: textenv bench speed      # at most half an hour on two quiet cores; --only NAME runs a part, --size smoke the smallest of all
"""

from __future__ import annotations

import copy
import gc
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import gymnasium as gym
import numpy as np
import torch

from agents import GRPO, PPO, RLOO
from agents.advantages import gae, whiten
from agents.policy import Policy
from agents.rollout import collect
from benchmarks import speed_peers as peers
from benchmarks.records import write_json, write_text
from benchmarks.speed_measure import Run, Side, check_same_work, fastest, interleave, peak_memory
from benchmarks.speed_report import AIMS, Curve, Row, compare, cores, machine, make_tables, markdown, summary
from benchmarks.speed_work import (
    EOS,
    PROMPT_TOKENS,
    SHAPES,
    SIZES,
    Shape,
    Size,
    build_model,
    build_prompts,
    build_tokenizer,
    constant,
    rollout_budget,
    rollout_episodes,
    variety,
)
from rewards import RewardModel
from textenv.cli.arguments import UsageError, usage_errors
from textenv.ledger import Episodes
from textenv.prompts import did_you_mean
from textenv.task import quiet_loading

GROUP_SIZE = 4
BETA = 0.05
LEARNING_RATE = 1e-6
"""So small that the models stay as they are, and with them the lengths of what they write."""
PROBE_BUDGET = 8
"""Response tokens of the short runs by which threads and micro-batches are chosen."""
SEED = 0

GROWTH_LIMIT = 1.1
"""A cost that grows faster than x to this power is called worse than linear."""
GROWTH_REASONS = {
    "lanes": "nothing in a step is quadratic in lanes: look for caches that no longer fit the processor's own",
    "vocabulary": "head and sampler read V numbers per token, and so does nothing else: look for logits that outgrow the caches",
    "length": "each token attends to all before it, so an episode costs a T + b T^2; weights make up a, keys and values b",
    "width": "layers have width^2 weights, so cost is compared with the number of parameters",
}


# ---------------------------------------------------------------------- the parts


class Skipped(Exception):  # not an error
    """A part cannot be run here; the message says why."""


@dataclass
class Bench:
    """One run of the benchmark: its size, and what its parts share."""

    size: Size
    folder: Path
    """For models that a peer reads from disk."""
    dtype: torch.dtype = torch.float32
    threads: tuple[int, ...] = field(default_factory=lambda: (1, 2) if cores() > 1 else (1,))
    """What a side may choose from."""
    chosen: dict[tuple[str, ...], Any] = field(default_factory=dict)
    """Threads and micro-batches that have been chosen."""

    def settle(self, sides: Sequence[Side], *key: str) -> list[Side]:
        """Each side on its best number of threads, measured once per key."""
        out = []
        for side in sides:
            where = (side.name, *key)
            if where not in self.chosen:
                self.chosen[where] = side.at_its_best(self.threads).threads
            else:
                side.probe()  # warm-up
            out.append(replace(side, threads=self.chosen[where]))
        return out

    def policy(self, envs: Any) -> Policy:
        """One that draws in the precision of the run; what it would train is float32."""
        policy = Policy(envs.unwrapped.reference)
        policy.rollout_dtype = None if self.dtype == torch.float32 else self.dtype
        return policy

    def saved(self, shape: Shape, stops: bool) -> tuple[str, Any, Any]:
        """The model of an iteration, written to disk: its directory, itself, its tokenizer."""
        budget = self.size.iteration[1]
        model = build_model(shape, budget / 3 if stops else None, budget)
        tokenizer = build_tokenizer(shape.vocab_size)
        where = self.folder / f"{short(shape)}-{'self' if stops else 'fixed'}"
        with quiet_loading():
            model.save_pretrained(where)
        tokenizer.save_pretrained(where)
        return str(where), model, tokenizer


def short(shape: Shape) -> str:
    """`15M` of `15M/32k`."""
    return shape.name.split("/")[0]


def make_envs(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    lanes: int,
    budget: int,
    reward: Any = constant,
    beta: float = 0.0,
    group_size: int = 1,
) -> Any:
    """Ours: a vector environment on this model."""
    return gym.make_vec(
        "textenv/Prompts-v0",
        num_envs=lanes,
        model=model,
        tokenizer=tokenizer,
        prompts=list(prompts),
        reward=reward,
        beta=beta,
        max_new_tokens=budget,
        stop_tokens=[EOS],
        group_size=group_size,
    )


def rollout(envs: Any, policy: Policy, episodes: int, rng: np.random.Generator) -> int:
    """The agents' own loop: deferred where the environment is bare, step by step where it is wrapped. Returns tokens."""
    policy.invalidate()
    return int(collect(envs, policy, episodes, rng).response_length.sum())


def rollouts(bench: Bench, shape: Shape, lanes: int, stops: bool, name: str) -> list[Row]:
    """The Gym loop in both lanes against `generate`."""
    large = shape.name == bench.size.large
    budget, episodes = rollout_budget(bench.size, lanes), rollout_episodes(lanes, stops, waves=2 if large else 4)
    model = build_model(shape, budget / 3 if stops else None, budget, bench.dtype)
    tokenizer, prompts = build_tokenizer(shape.vocab_size), build_prompts(shape.vocab_size, episodes)
    envs = make_envs(model, tokenizer, prompts, lanes=lanes, budget=budget)
    brief = make_envs(model, tokenizer, prompts, lanes=lanes, budget=min(PROBE_BUDGET, budget))
    policy, rng = bench.policy(envs), np.random.default_rng(SEED)

    def ours(wrap: Callable[[Any], Any]) -> tuple[Callable[[], int], Callable[[], int]]:
        return lambda: rollout(wrap(envs), policy, episodes, rng), lambda: rollout(wrap(brief), policy, lanes, rng)

    torch.manual_seed(SEED)
    sides = [
        Side("deferred", *ours(lambda env: env)),
        Side("step", *ours(gym.vector.VectorWrapper)),
        Side(
            "generate",
            lambda: peers.generate(model, tokenizer, prompts, lanes, budget),
            lambda: peers.generate(model, tokenizer, prompts[:lanes], lanes, min(PROBE_BUDGET, budget)),
        ),
    ]
    sides = bench.settle(sides, "rollout", shape.name, str(lanes))
    runs = interleave(sides, bench.size.repeats_of(shape))
    check_same_work(runs, budget, episodes, stops)
    return [compare(f"{name}/{lane}", sides, runs, lane, "generate") for lane in ("deferred", "step")]


def lanes(bench: Bench, shape: Shape, stops: bool, name: str) -> list[Row]:
    """Reward and KL paid at each step, against both settled at the end."""
    n, budget = bench.size.lanes[len(bench.size.lanes) // 2], bench.size.budget
    episodes = rollout_episodes(n, stops)
    model = build_model(shape, budget / 3 if stops else None, budget, bench.dtype)
    tokenizer = build_tokenizer(shape.vocab_size)
    prompts = build_prompts(shape.vocab_size, episodes)
    envs = make_envs(model, tokenizer, prompts, lanes=n, budget=budget, beta=BETA)
    brief = make_envs(model, tokenizer, prompts, lanes=n, budget=min(PROBE_BUDGET, budget), beta=BETA)
    policy, rng = bench.policy(envs), np.random.default_rng(SEED)
    for env in (envs, brief):
        env.unwrapped.attach_policy(policy)

    def side(name: str, wrap: Callable[[Any], Any]) -> Side:
        return Side(
            name, lambda: rollout(wrap(envs), policy, episodes, rng), lambda: rollout(wrap(brief), policy, n, rng)
        )

    sides = [side("step", gym.vector.VectorWrapper), side("deferred", lambda env: env)]
    sides = bench.settle(sides, "lanes", shape.name)
    runs = interleave(sides, bench.size.repeats_of(shape))
    check_same_work(runs, budget, episodes, stops)
    return [compare(name, sides, runs, "step", "deferred")]


def iterate(agent: Any) -> int:
    """One iteration of one of our agents. Returns the tokens it has written."""
    before = agent.num_timesteps
    # `learn` counts from where its last call should have ended, and that call has gone on to the end of its rollout.
    agent.learn(before - agent.timesteps_counted + 1)
    return int(agent.num_timesteps - before)


def our_agent(algorithm: str, model: Any, tokenizer: Any, prompts: Sequence[str], episodes: int, budget: int) -> Any:
    """RLOO or GRPO with one optimiser step per iteration, as `TRLSettings` has it."""
    envs = make_envs(
        model, tokenizer, prompts, lanes=episodes, budget=budget, reward=variety, beta=BETA, group_size=GROUP_SIZE
    )
    agent = {"RLOO": RLOO, "GRPO": GRPO}[algorithm]
    return agent(
        envs, seed=SEED, episodes_per_update=episodes, minibatch_episodes=episodes, learning_rate=LEARNING_RATE
    )


def trl_settings(bench: Bench, algorithm: str, folder: str, micro_batch: int, **changes: Any) -> peers.TRLSettings:
    """The other side's settings of the same iteration."""
    episodes, budget = bench.size.iteration
    settings = peers.TRLSettings(
        algorithm=algorithm,
        model=folder,
        episodes=episodes,
        group_size=GROUP_SIZE,
        budget=budget,
        beta=BETA,
        learning_rate=LEARNING_RATE,
        micro_batch=micro_batch,
    )
    return replace(settings, **changes)


def trl_choice(bench: Bench, shape: Shape, folder: str, tokenizer: Any, prompts: Sequence[str]) -> tuple[int, int]:
    """(threads, micro-batch) on which TRL is fastest, by RLOO iterations with short responses; once per model."""
    key = ("TRL", shape.name)
    if key not in bench.chosen:
        episodes = bench.size.iteration[0]
        seconds: dict[tuple[int, int], float] = {}
        for micro_batch in dict.fromkeys((max(GROUP_SIZE, episodes // 4), episodes)):
            settings = trl_settings(bench, "RLOO", folder, micro_batch, budget=PROBE_BUDGET)
            threads = [bench.threads[-1], *bench.threads]
            measured = peers.TRL(settings, tokenizer, prompts).run(len(threads), threads)[1:]  # the first is warm-up
            seconds |= {(n, micro_batch): run.seconds for n, run in zip(bench.threads, measured, strict=True)}
        bench.chosen[key] = min(seconds, key=lambda choice: seconds[choice])
    return bench.chosen[key]


def iterations(bench: Bench, shape: Shape, algorithm: str, stops: bool, name: str) -> list[Row]:
    """One whole iteration, rollout to optimiser step, against TRL's trainer."""
    episodes, budget = bench.size.iteration
    folder, model, tokenizer = bench.saved(shape, stops)
    prompts = build_prompts(shape.vocab_size, 4 * episodes)
    agent = our_agent(algorithm, model, tokenizer, prompts, episodes, budget)
    brief = our_agent(algorithm, model, tokenizer, prompts, episodes, min(PROBE_BUDGET, budget))
    [ours] = bench.settle([Side("textenv", lambda: iterate(agent), lambda: iterate(brief))], "iteration", shape.name)
    threads, micro_batch = trl_choice(bench, shape, folder, tokenizer, prompts)
    trl = peers.TRL(trl_settings(bench, algorithm, folder, micro_batch), tokenizer, prompts)
    runs: dict[str, list[Run]] = {"textenv": []}
    given = agent.accounts["gradient_tokens"]
    runs["TRL"] = trl.run(
        1 + bench.size.repeats_of(shape),
        threads,
        between=lambda: runs["textenv"].extend(interleave([ours], 1)["textenv"]),
    )
    written = sum(run.tokens for run in runs["textenv"])
    if (given := agent.accounts["gradient_tokens"] - given) != written:
        raise RuntimeError(f"{algorithm} gave {given} tokens a gradient, and had written {written}.")
    runs = {side: mine[1:] for side, mine in runs.items()}  # the first is warm-up
    check_same_work(runs, budget, episodes, stops)
    theirs = Side("TRL", lambda: 0, lambda: 0, threads)
    return [compare(name, [ours, theirs], runs, "textenv", "TRL", notes=f"{name}: TRL's micro-batch is {micro_batch}")]


def memory(bench: Bench, shape: Shape, name: str) -> list[Row]:
    """Peak memory of an RLOO iteration, each side in a process of its own."""
    if not Path("/proc/self/clear_refs").exists():
        raise Skipped("peak memory is read from /proc, which is there on Linux only")
    episodes, budget = bench.size.iteration
    folder, _, tokenizer = bench.saved(shape, stops=False)
    prompts = build_prompts(shape.vocab_size, 4 * episodes)
    threads, micro_batch = trl_choice(bench, shape, folder, tokenizer, prompts)
    plain = trl_settings(bench, "RLOO", folder, micro_batch)
    defaults = replace(plain, micro_batch=min(8, episodes), checkpointing=True)
    jobs: dict[str, Callable[[], int]] = {
        "textenv": partial(our_peak, shape, episodes, budget, threads),
        "TRL": partial(trl_peak, shape, plain, threads),
        "TRL, its defaults": partial(trl_peak, shape, defaults, threads),
    }
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
        peaks = {side: pool.submit(job).result() for side, job in jobs.items()}
    return [
        Row(
            name=f"{name}/{what}",
            ours="textenv",
            peer=peer,
            ratio=(ratio := peaks["textenv"] / peaks[peer]),
            low=ratio,
            high=ratio,
            cpu_ratio=None,
            aim=AIMS.get(f"{name}/{what}"),
            sides={
                side: {"threads": threads, "rate": peaks[side] / 2**20, "bytes": peaks[side]}
                for side in ("textenv", peer)
            },
            unit="MiB",
            notes=f"{what}: {note}",
        )
        for what, peer, note in (
            (
                "as timed",
                "TRL",
                f"TRL with micro-batches of {micro_batch} and no gradient checkpointing, as it is fastest",
            ),
            (
                "defaults",
                "TRL, its defaults",
                f"TRL with micro-batches of {defaults.micro_batch} and gradient checkpointing, its own defaults",
            ),
        )
    ]


def our_peak(shape: Shape, episodes: int, budget: int, threads: int) -> int:
    """Bytes that two RLOO iterations take at their highest above what is loaded. Runs in a process of its own."""
    torch.set_num_threads(threads)
    model, tokenizer = build_model(shape, None, budget), build_tokenizer(shape.vocab_size)
    agent = our_agent("RLOO", model, tokenizer, build_prompts(shape.vocab_size, 4 * episodes), episodes, budget)
    with peak_memory() as peak:
        for _ in range(2):
            iterate(agent)
    return peak[0]


def trl_peak(shape: Shape, settings: peers.TRLSettings, threads: int) -> int:
    """The same of TRL."""
    tokenizer, prompts = build_tokenizer(shape.vocab_size), build_prompts(shape.vocab_size, 4 * settings.episodes)
    trl = peers.TRL(settings, tokenizer, prompts)
    with peak_memory() as peak:
        trl.run(2, threads)
    return peak[0]


def prefix_rows(agent: PPO, data: Episodes) -> peers.Rows:
    """A rollout with a row for each token, with the advantages and returns that our agent has."""
    values, _ = agent.values(data)
    mask = torch.from_numpy(data.mask)
    advantages, returns = gae(torch.from_numpy(data.rewards).float(), values, mask, 1.0, agent.config.gae_lambda)
    advantages = whiten(advantages, mask)
    places = [(i, t) for i, n in enumerate(data.response_length) for t in range(n)]
    where = tuple(torch.tensor(column) for column in zip(*places, strict=True))
    return peers.Rows(
        prefixes=[data.tokens[i, : data.prompt_length[i] + t] for i, t in places],
        actions=torch.tensor([int(data.tokens[i, data.prompt_length[i] + t]) for i, t in places]),
        old_log_probs=torch.from_numpy(data.log_probs).float()[where],
        advantages=advantages[where],
        old_values=values[where],
        returns=returns[where],
    )


def updates(bench: Bench, shape: Shape, episodes: int, name: str) -> list[Row]:
    """One PPO update: whole responses in one pass, against one row per (prefix, token)."""
    budget = bench.size.iteration[1]
    model, tokenizer = build_model(shape, None, budget), build_tokenizer(shape.vocab_size)
    texts = build_prompts(shape.vocab_size, episodes)

    def envs() -> Any:
        return make_envs(model, tokenizer, texts, lanes=episodes, budget=budget, reward=variety, beta=BETA)

    agent = PPO(
        envs(), seed=SEED, episodes_per_update=episodes, minibatch_episodes=episodes // 2, epochs=1, target_kl=None, learning_rate=LEARNING_RATE
    )  # fmt: skip
    data = collect(agent.env, agent.policy, episodes, agent.rng)
    known = agent.values(data)

    def ours() -> int:
        before = agent.accounts["gradient_tokens"]
        with patch.object(agent, "values", return_value=known):  # both sides are given the rollout's values
            agent.update(data)
        return agent.accounts["gradient_tokens"] - before

    rows = prefix_rows(agent, data)
    policy, head = copy.deepcopy(agent.policy.model), copy.deepcopy(agent.critic.head)
    adam = torch.optim.Adam([*policy.parameters(), *head.parameters()], lr=LEARNING_RATE)
    rng = np.random.default_rng(SEED)

    def row_by_row(micro_batch: int, minibatches: int = 2, share: float = 1.0) -> int:
        order = rng.permutation(len(rows))[: int(share * len(rows))]
        return peers.prefix_row_update(policy, head, adam, rows, np.array_split(order, minibatches), micro_batch)

    choices: dict[tuple[int, int], Callable[[], object]] = {
        (n, size): partial(row_by_row, size, minibatches=1, share=1 / 6) for n in bench.threads for size in (32, 128)
    }
    threads, micro_batch = fastest(choices, threads_of=lambda choice: choice[0])
    sides = bench.settle([Side("textenv", ours, ours)], "update", shape.name)
    sides.append(Side("prefix rows", lambda: row_by_row(micro_batch), lambda: 0, threads))
    if shape.name == bench.size.shapes[0]:  # as slow as the prefix rows: the small model is enough
        sb3 = peers.sb3_update(envs(), budget, minibatches=2, learning_rate=LEARNING_RATE)
        sides.append(Side("stable-baselines3", sb3, sb3, threads))  # the same work as the prefix rows
    runs = interleave(sides, bench.size.repeats_of(shape))
    check_same_work(runs, budget, episodes, stops=False)
    notes = f"{name}: the micro-batch of the rows is {micro_batch}"
    return [
        compare(
            f"{name}/{side.name}", sides, runs, "textenv", side.name, notes=notes if side.name == "prefix rows" else ""
        )
        for side in sides[1:]
    ]


def floors(bench: Bench, shape: Shape, name: str) -> list[Row]:
    """A whole PPO iteration against its matrix work alone."""
    episodes, budget = bench.size.iteration
    length = sum(PROMPT_TOKENS) // 2
    model, tokenizer = build_model(shape, None, budget), build_tokenizer(shape.vocab_size)
    texts = build_prompts(shape.vocab_size, 4 * episodes, (length, length))
    reward_model = RewardModel.from_language_model(model, tokenizer)

    def make_agent(budget: int) -> PPO:
        envs = make_envs(model, tokenizer, texts, lanes=episodes, budget=budget, reward=reward_model, beta=BETA)
        return PPO(
            envs, seed=SEED, episodes_per_update=episodes, minibatch_episodes=episodes // 2, epochs=2, target_kl=None, learning_rate=LEARNING_RATE
        )  # fmt: skip

    agent, brief = make_agent(budget), make_agent(min(PROBE_BUDGET, budget))
    policy = copy.deepcopy(agent.policy.model)
    prompts = torch.from_numpy(np.stack([tokenizer(text)["input_ids"] for text in texts[:episodes]]))

    def bare(budget: int) -> int:
        return peers.bare_iteration(policy, model, reward_model.model, prompts, budget, episodes // 2, epochs=2)

    sides = bench.settle(
        [
            Side("textenv", lambda: iterate(agent), lambda: iterate(brief)),
            Side("matrix work", lambda: bare(budget), lambda: bare(min(PROBE_BUDGET, budget))),
        ],
        name,
    )
    given = agent.accounts["gradient_tokens"]
    runs = interleave(sides, bench.size.repeats_of(shape))
    check_same_work(runs, budget, episodes, stops=False)
    if agent.accounts["gradient_tokens"] - given != 2 * sum(run.tokens for run in runs["textenv"]):
        raise RuntimeError("PPO has not given every token a gradient in both epochs.")
    return [compare(name, sides, runs, "textenv", "matrix work", cost=True)]


def stub_env(bench: Bench) -> list[Curve]:
    """The environment alone: steps per second with a policy that always says the same."""
    shape, budget = SHAPES["tiny"], bench.size.budget
    model, tokenizer = build_model(shape, None, budget), build_tokenizer(shape.vocab_size)
    prompts = build_prompts(shape.vocab_size, 64)
    rates: dict[str, list[float]] = {"step lane": [], "deferred lane": []}
    for n in bench.size.env_lanes:
        envs = make_envs(model, tokenizer, prompts, lanes=n, budget=budget)
        actions = np.full(n, EOS + 2)

        def step_lane(envs: Any = envs, actions: Any = actions) -> int:
            envs.reset()
            for _ in range(2 * budget):
                envs.step(actions)
            return 2 * budget * len(actions)

        def deferred_lane(envs: Any = envs, actions: Any = actions) -> int:
            with envs.unwrapped.deferred(episodes=2 * len(actions)) as ledger:
                envs.reset()
                while not ledger.done:
                    envs.step(actions)
            return int(ledger.episodes.response_length.sum())

        sides = [Side("step lane", step_lane, step_lane), Side("deferred lane", deferred_lane, deferred_lane)]
        for side in sides:
            side.probe()
        for name, runs in interleave(sides, bench.size.curve_repeats).items():
            rates[name].append(float(np.median([run.rate for run in runs])))
    return [Curve(name, bench.size.env_lanes, tuple(values)) for name, values in rates.items()]


def growth(bench: Bench) -> list[Curve]:
    """What a token costs in the deferred lane, on one thread, as one thing grows and the others stay."""
    return [
        growth_curve(axis, values, *zip(*(token_cost(bench, axis, value) for value in values), strict=True))
        for axis, values in bench.size.growth.items()
    ]


def token_cost(bench: Bench, axis: str, value: int) -> tuple[int, float]:
    """The size of what grows (parameters for a width), and microseconds per token."""
    at = dict(bench.size.base) | {axis: value}
    shape = Shape(
        name="grown",
        vocab_size=at["vocabulary"],
        hidden_size=at["width"],
        intermediate_size=3 * at["width"],
        layers=2,
        heads=max(1, at["width"] // 32),
        positions=at["length"] + PROMPT_TOKENS[1],
    )
    model, tokenizer = build_model(shape, None, at["length"]), build_tokenizer(shape.vocab_size)
    prompts = build_prompts(shape.vocab_size, 64)
    envs = make_envs(model, tokenizer, prompts, lanes=at["lanes"], budget=at["length"])
    policy, rng = Policy(envs.unwrapped.reference), np.random.default_rng(SEED)
    side = Side("textenv", lambda: rollout(envs, policy, at["lanes"], rng), lambda: 0)
    side.run()  # warm-up
    runs = interleave([side], bench.size.curve_repeats)["textenv"]
    size = sum(p.numel() for p in model.parameters()) if axis == "width" else value
    return size, 1e6 / float(np.median([run.rate for run in runs]))


def growth_curve(axis: str, values: Sequence[int], sizes: Sequence[int], costs: Sequence[float]) -> Curve:
    """The curve, with the steepest growth of the whole cost between two of its points."""
    # A rollout has as many tokens as lanes times length: its cost grows with them even where that of a token does not.
    whole = np.array(costs) * (np.array(values) if axis in ("lanes", "length") else 1)
    steepest = float((np.diff(np.log(whole)) / np.diff(np.log(sizes))).max())
    return Curve(
        name={"width": "parameters"}.get(axis, axis),
        x=tuple(sizes),
        y=tuple(costs),
        exponent=steepest,
        notes=GROWTH_REASONS[axis] if steepest > GROWTH_LIMIT else "",
    )


@dataclass(frozen=True)
class Part:
    """Something that `--only` can name.

    Attributes:
        name: Which.
        section: Of the tables.
        run: Measures it.
    """

    name: str
    section: str
    run: Callable[[Bench], list[Row] | list[Curve]]

    @property
    def needs_trl(self) -> bool:
        """Whether TRL is the other side."""
        return self.section in ("iteration", "memory")


def parts(size: Size) -> list[Part]:
    """Everything, in the order in which it is run."""
    out = []
    shapes = [SHAPES[name] for name in size.shapes]

    def part(name: str, section: str, run: Callable[..., list[Row]], *arguments: Any) -> None:
        out.append(Part(name, section, lambda bench: run(bench, *arguments, name)))

    for shape in shapes:
        for n in size.lanes:
            for stops in (True, False):
                part(f"rollout-{short(shape)}-{n}-{'self' if stops else 'fixed'}", "rollout", rollouts, shape, n, stops)
    if size.large is not None:
        shape, n = SHAPES[size.large], size.lanes[0]
        for stops in (True, False):
            part(f"rollout-{short(shape)}-{n}-{'self' if stops else 'fixed'}", "rollout", rollouts, shape, n, stops)
    for shape in shapes:
        for stops in (True, False):
            part(f"lanes-{short(shape)}-{'self' if stops else 'fixed'}", "lanes", lanes, shape, stops)
    for shape in shapes:
        for algorithm in ("RLOO", "GRPO"):
            for stops in (False, True):
                name = f"{algorithm}-{short(shape)}-{'self' if stops else 'fixed'}"
                part(name, "iteration", iterations, shape, algorithm, stops)
    part(f"memory-{short(shapes[-1])}", "memory", memory, shapes[-1])
    for shape, episodes in zip(shapes, size.update, strict=True):
        part(f"update-{short(shape)}", "update", updates, shape, episodes)
    for shape in shapes:
        part(f"floor-{short(shape)}", "floor", floors, shape)
    out.append(Part("env", "env", stub_env))
    out.append(Part("growth", "growth", growth))
    return out


# ---------------------------------------------------------------------- running it


def run_part(name: str, bench: Bench) -> tuple[list[Row] | list[Curve], dict[tuple[str, ...], Any]]:
    """A part by its name (it cannot be sent itself), and what has been chosen by then. Runs in a process of its own."""
    gc.freeze()  # what is imported is no garbage: collections before each run are quick
    [part] = [part for part in parts(bench.size) if part.name == name]
    return part.run(bench), bench.chosen


def clean_processes() -> multiprocessing.context.BaseContext:
    """What starts processes in which nothing has run before."""
    # Elsewhere a library may have started threads by then, which a fork does not survive.
    linux = sys.platform == "linux"
    context = multiprocessing.get_context("forkserver" if linux else "spawn")
    if linux:
        context.set_forkserver_preload([__name__])  # imported once for all
    return context


@dataclass(frozen=True)
class SpeedArguments:
    """What is run, and where the figures go."""

    only: tuple[str, ...] = ()
    """Parts by name or by the beginning of it, such as `rollout-15M` or `RLOO` (default: all)."""
    size: Literal["full", "smoke"] = "full"
    """`smoke` has the same parts with tiny models, in seconds: it shows that they work, not how fast."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights in the rollouts, on both sides. All else is float32."""
    repeats: int | None = None
    """Rounds (default: 11 of the smallest model, 3 of the largest, else 5; with `smoke` 2)."""
    out: Path = Path("runs/speed")
    """Where speed.json and table.md go."""

    def __post_init__(self) -> None:
        names = [part.name for part in parts(SIZES[self.size])]
        for wanted in self.only:
            if not wanted or not any(name.startswith(wanted) for name in names):
                hint = did_you_mean(wanted, [*names, *dict.fromkeys(name.partition("-")[0] for name in names)])
                raise UsageError(f"Expected --only to be some of {', '.join(names)}, got {wanted!r}.{hint}")
        if self.repeats is not None and self.repeats < 1:
            raise UsageError(f"Expected --repeats >= 1, got {self.repeats}.")

    @property
    def command(self) -> str:
        """What was typed, in its shortest form."""
        words = ["textenv bench speed"]
        for name, flag in (("only", "--only"), ("size", "--size"), ("dtype", "--dtype"), ("repeats", "--repeats")):
            if (value := getattr(self, name)) != getattr(SpeedArguments, name):
                words += [flag, *(value if isinstance(value, tuple) else [str(value)])]
        return " ".join(words)


def run_speed(options: SpeedArguments) -> dict[str, Any]:
    """How fast the Gym loop writes and the agents learn, against `generate`, TRL and one row per token; at most half an hour on two quiet cores."""
    from rich.console import Console

    console = Console()
    size = SIZES[options.size]
    if options.repeats is not None:
        size = replace(size, repeats=(options.repeats,) * len(size.repeats), curve_repeats=options.repeats)
    wanted = [part for part in parts(size) if not options.only or part.name.startswith(options.only)]
    report: dict[str, Any] = {"command": options.command, "dtype": options.dtype, "machine": machine()}
    report |= {"rows": [], "curves": [], "skipped": {}}
    if busy := busy_machine():
        console.print(f"[yellow]{busy}[/yellow]")
    with usage_errors():
        options.out.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    pool = ProcessPoolExecutor(1, mp_context=clean_processes(), max_tasks_per_child=1)
    with tempfile.TemporaryDirectory(prefix="textenv-speed-") as folder, pool:
        bench = Bench(size, Path(folder), getattr(torch, options.dtype))
        for part in wanted:
            console.print(f"{clock(begin)}  {part.name}", highlight=False)
            try:
                if part.needs_trl and find_spec("trl") is None:
                    raise Skipped("TRL is not installed: pip install 'textenv[peers]'")
                found, bench.chosen = pool.submit(run_part, part.name, bench).result()
            except Skipped as reason:
                report["skipped"][part.name] = str(reason)
                console.print(f"       skipped: {reason}", highlight=False)
                continue
            for item in found:
                row = {"part": part.name, "section": part.section, **asdict(item)}
                report["rows" if isinstance(item, Row) else "curves"].append(row)
                console.print(f"       {summary(item)}", highlight=False, soft_wrap=True)
            report["seconds"] = time.perf_counter() - begin
            write_json(options.out / "speed.json", report)
    tables = list(make_tables(report, size, BETA, GROUP_SIZE))
    for table in tables:
        console.print(table.rich())
    write_text(options.out / "table.md", markdown(tables, report))
    console.print(
        f"{clock(begin)}  figures: {options.out / 'speed.json'}   tables: {options.out / 'table.md'}", highlight=False
    )
    return report


def clock(begin: float) -> str:
    """Minutes and seconds since then."""
    minutes, seconds = divmod(int(time.perf_counter() - begin), 60)
    return f"{minutes:>2}:{seconds:02}"


def busy_machine() -> str:
    """A warning where other programs are running."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load < 0.5:
        return ""
    return f"The machine is busy (load {load:.1f}): ratios of single rounds will scatter, and times mean nothing."


def main() -> None:
    """Run it."""
    import tyro

    run_speed(tyro.cli(SpeedArguments, prog="textenv bench speed", description=run_speed.__doc__))


if __name__ == "__main__":
    main()
