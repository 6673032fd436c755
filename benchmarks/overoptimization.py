"""What becomes of the gold standard while a proxy of it is optimised.

    pool        many answers of the fine-tuned model to each of some validation requests
    rankings    four of its answers to each of many training requests, ranked by the gold standard
    proxies     reward models of three sizes learn from four numbers of rankings; some from rankings of which a quarter is
                the wrong way round; and some more, which differ in nothing but their seed, for two ensembles
    best-of-n   by every proxy and ensemble, for every n up to the pool's size: expectations, not simulations
    ppo         without a KL penalty, against two of the proxies, three seeds each

Gold and proxy are then drawn against d = sqrt(KL to the fine-tuned model), and the forms of Gao et al. (2022),
https://arxiv.org/abs/2210.10760, are fitted to the gain in gold:

    best-of-n   R(d) = d (a - b d)          reinforcement learning   R(d) = d (a - b log d)

One proxy is named beforehand (`Plan.named`: the middle size, the third of the four numbers of rankings). For it the fall of the
gold score from its peak to the end of optimisation is reported with an interval, whatever its sign.

Differences from the paper: 1) gold is a program, and an answer's score lies in [0, 1]  2) labels are rankings of four, ties
left out, by InstructGPT's loss  3) proxies start from nothing, so they must learn language from rankings alone
4) proxies are read in gold points: what they promise is their score times the slope of gold on proxy, within prompts of
the pool (the paper rescales on held-out labels)  5) one pass over the rankings, so fewer of them are fewer updates, too.

A finished proxy, ensemble or run of PPO is one row of JSON, written whole or not at all; the same command goes on where an
interrupted one stopped.

Notation: P prompts, N answers to each in the pool, Y different ones among them, E points of a curve, S seeds.

Run: textenv bench overoptimization
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from stable_baselines3.common.callbacks import BaseCallback

import textenv  # noqa: F401  # registers the ids
from agents import PPO
from agents.optim import Muon
from agents.rollout import run_prompts
from benchmarks.instructgpt import Sampler, small_llama, zero
from benchmarks.records import locked, write_json, write_text
from benchmarks.stages import replaced
from rewards import RewardModel, train_reward_model
from textenv.cli.arguments import usage_errors
from textenv.exact import best_of_n
from textenv.task import quiet_loading
from textenv.tasks.assistant.gold import assess, judge
from textenv.tasks.assistant.requests import Request, make_requests
from textenv.tasks.assistant.task import ASSETS, assistant_tokenizer, requests_of

FLOATS = NDArray[np.float64]
INTS = NDArray[np.int64]


# ---------------------------------------------------------------------- what is run


@dataclass(frozen=True, kw_only=True)
class Proxy:
    """A reward model: everything that it depends on."""

    size: str
    """Key of `SIZES`."""
    rankings: int
    """How many it learns from: the first so many."""
    noise: float = 0.0
    """Share of them that is turned the wrong way round."""
    seed: int = 0
    """Of its weights, of the order of the rankings, and of the noise."""

    @property
    def name(self) -> str:
        """Of its row."""
        noisy = f"-noise{self.noise:g}" if self.noise else ""
        return f"{self.size}-{self.rankings}{noisy}" + (f"-seed{self.seed}" if self.seed else "")


SIZES = {
    "small": {"hidden_size": 32, "layers": 1},
    "middle": {"hidden_size": 64, "layers": 2},
    "large": {"hidden_size": 128, "layers": 2},
}
"""Of the proxies. The large one has the shape of the policy."""
NOISE = 0.25
ENSEMBLES: dict[str, Callable[[FLOATS], FLOATS]] = {
    "mean": lambda scores: scores.mean(axis=0),
    "worst": lambda scores: scores.min(axis=0),
}
"""How the scores of members become one; each member's average sample scores 0. Shape: (members, Y) -> (Y,)."""
PPO_SETTINGS: dict[str, Any] = {"learning_rate": 1e-3, "episodes_per_update": 256, "epochs": 1}


@dataclass(frozen=True)
class Plan:
    """How much of everything."""

    prompts: int
    """P: validation requests, for best-of-n and for PPO."""
    samples: int
    """N: answers to each in the pool."""
    rankings: tuple[int, int, int, int]
    held_out: int
    """Further rankings, without noise, by which the proxies' accuracy is measured."""
    members: int
    """Of the ensembles."""
    seeds: int
    """Of PPO."""
    tokens: int
    """Length of a run of PPO."""
    evaluations: int
    """On the way, evenly spaced in tokens; and one at the start."""
    answers: int
    """To each prompt, at an evaluation."""

    @property
    def named(self) -> Proxy:
        """The proxy for which the fall is reported."""
        return Proxy(size="middle", rankings=self.rankings[2])

    @property
    def reinforced(self) -> tuple[Proxy, Proxy]:
        """Those that PPO optimises: the one named, and the one with most of everything."""
        return self.named, Proxy(size="large", rankings=self.rankings[-1])

    @property
    def ensemble(self) -> list[Proxy]:
        """Members: the one named, and others of its kind."""
        return [replace(self.named, seed=seed) for seed in range(self.members)]

    @property
    def proxies(self) -> list[Proxy]:
        """All of them."""
        grid = [Proxy(size=size, rankings=k) for k in self.rankings for size in SIZES]
        noisy = [Proxy(size=self.named.size, rankings=k, noise=NOISE) for k in self.rankings]
        return list(dict.fromkeys([*grid, *noisy, *self.ensemble]))


PLANS = {
    "tiny": Plan(12, 32, (8, 16, 32, 64), 16, members=2, seeds=2, tokens=600, evaluations=2, answers=1),
    "default": Plan(
        160, 512, (125, 500, 2000, 8000), 500, members=5, seeds=3, tokens=60_000, evaluations=15, answers=2
    ),
}


@dataclass(frozen=True)
class OveroptimizationArguments:
    """Settings of the experiment."""

    seed: int = 0
    """Of the samples and rankings; proxies and runs of PPO have seeds of their own."""
    size: Literal["tiny", "default"] = "default"
    """`tiny` shows that everything runs; its results mean nothing."""
    out: Path = Path("runs/overoptimization")
    """Where rows, tables and picture go."""


# ---------------------------------------------------------------------- estimators


def best_of_n_weights(scores: FLOATS, counts: INTS, n: int) -> FLOATS:
    """How probable it is that each answer is the best of n, drawn without replacement from the N of the pool.

    A weighted sum of any figure of the answers is then an unbiased estimate of its expectation under best-of-n, with all the
    subsets of the pool counted: sum over the sorted samples of C(i - 1, n - 1) / C(N, n) (Nakano et al., 2021,
    https://arxiv.org/abs/2112.09332), here for answers that were drawn several times. Equal scores share by their counts.

    Args:
        scores: By which the best is taken. Shape: (Y,).
        counts: How often each answer was drawn. Shape: (Y,).
        n: At most N, the sum of the counts.

    Returns:
        They sum to 1. Shape: (Y,).
    """
    total = int(counts.sum())
    if not 1 <= n <= total:
        raise ValueError(f"Expected n from 1 to {total}, the number of samples, got {n}.")
    _, group = np.unique(scores, return_inverse=True)
    size = np.bincount(group, counts)  # samples of each score, the lowest first
    at_most = np.cumsum(size).astype(np.int64)
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, total + 1)))])
    log_subsets = log_factorial[at_most] - log_factorial[np.maximum(at_most - n, 0)]
    all_below = np.where(at_most >= n, np.exp(log_subsets - log_subsets[-1]), 0.0)  # C(at_most, n) / C(N, n)
    return np.diff(all_below, prepend=0.0)[group] * counts / size[group]


def kl_bound(n: int) -> float:
    """What KL(best of n || policy) is at most, in nats (Beirami et al., 2024, https://arxiv.org/abs/2401.01879)."""
    return float(np.log(n) - (n - 1) / n)


def kl_of_best_of_n(scores: FLOATS, counts: INTS, n: int) -> float:
    """The KL itself if the pool were the policy, nats: smaller where answers repeat. For n near N it is too small."""
    log_p = np.log(counts / counts.sum())
    log_best = best_of_n(log_p, scores, n)
    return float(np.exp(log_best) @ np.maximum(log_best - log_p, -1e9))


class Form(NamedTuple):
    """R(d) = d (a - b g(d))."""

    a: float
    b: float

    def __call__(self, d: FLOATS, g: Callable[[FLOATS], FLOATS]) -> FLOATS:
        """The gain at these distances. Shape: (E,) -> (E,)."""
        return d * (self.a - self.b * g(d))


def best_of_n_form(d: FLOATS) -> FLOATS:
    """For best-of-n: g(d) = d."""
    return d


def rl_form(d: FLOATS) -> FLOATS:
    """For reinforcement learning: g(d) = log d; d g(d) is 0 at 0."""
    return np.log(np.where(d > 0, d, 1.0))


def fit(d: FLOATS, gain: FLOATS, g: Callable[[FLOATS], FLOATS]) -> Form:
    """Least squares. Shapes: (E,), (E,)."""
    (a, b), *_ = np.linalg.lstsq(np.stack([d, -d * g(d)], axis=1), gain)
    return Form(float(a), float(b))


def fit_quality(d: FLOATS, gain: FLOATS, g: Callable[[FLOATS], FLOATS]) -> dict[str, float]:
    """A fit to all points; and how well one to the lower half of the KL foretells the upper half.

    R^2 out of sample is against the mean of the points foretold: it is below 0 where that mean, which nobody could know, does
    better.

    Args:
        d: Square roots of KL. Shape: (E,).
        gain: In gold. Shape: (E,).
        g: Of the form.
    """
    everything = fit(d, gain, g)
    low = d <= d.max() / np.sqrt(2)
    known = fit(d[low], gain[low], g)
    error = gain[~low] - known(d[~low], g)
    return {
        "a": everything.a,
        "b": everything.b,
        "r2": r_squared(gain, everything(d, g)),
        "a_low": known.a,
        "b_low": known.b,
        "d_low": float(d.max() / np.sqrt(2)),
        "r2_out_of_sample": r_squared(gain[~low], known(d[~low], g)),
        "error_out_of_sample": float(np.sqrt((error**2).mean())) if len(error) else float("nan"),
    }


def r_squared(y: FLOATS, predicted: FLOATS) -> float:
    """Share of the variance that is explained; nan where there is none."""
    spread = ((y - y.mean()) ** 2).sum() if len(y) else 0.0
    return float(1 - ((y - predicted) ** 2).sum() / spread) if spread > 0 else float("nan")


def fall(gold: FLOATS, repetitions: int = 10_000) -> dict[str, Any]:
    """How far gold falls from its peak to its end, with a 95% interval over prompts and seeds.

    The highest point of a noisy curve is partly luck. So the peak is looked for on one half of the prompts, and the fall from there
    measured on the other half, and the other way round: without a fall the estimate is 0 on average.

    Args:
        gold: Shape: (S, E, P).
        repetitions: Of the bootstrap, which draws seeds and prompts anew. Three seeds are few: it is too narrow for them.
    """
    seeds, _, prompts = gold.shape
    drop = np.empty((seeds, prompts))
    peaks = []
    for half in (slice(0, None, 2), slice(1, None, 2)):
        other = slice(1, None, 2) if half.start == 0 else slice(0, None, 2)
        peaks.append(int(gold[:, :, other].mean(axis=(0, 2)).argmax()))
        drop[:, half] = gold[:, peaks[-1], half] - gold[:, -1, half]
    rng = np.random.default_rng(0)
    times = [rng.multinomial(size, np.full(size, 1 / size), size=repetitions) / size for size in drop.shape]
    draws = np.einsum("rs,sp,rp->r", times[0], drop, times[1], optimize=True)
    low, high = np.quantile(draws, [0.025, 0.975])
    return {
        "fall": float(drop.mean()),
        "low": float(low),
        "high": float(high),
        "by_seed": [float(value) for value in drop.mean(axis=1)],
        "peaks": peaks,
    }


def ranks(gold: Sequence[float]) -> list[int]:
    """1 the best; equal scores have equal ranks, and make no pair."""
    values = np.round(gold, 9)
    return [int(1 + (values > value).sum()) for value in values]


def with_noise(rows: Sequence[Mapping[str, Any]], share: float, seed: int) -> list[dict[str, Any]]:
    """Rankings, each turned the wrong way round with this probability: so that share of all pairs is labelled wrongly."""
    turned = np.random.default_rng([seed, 7]).random(len(rows)) < share
    return [
        dict(row) | {"ranks": [max(row["ranks"]) + 1 - rank for rank in row["ranks"]] if turn else row["ranks"]}
        for row, turn in zip(rows, turned, strict=True)
    ]


# ---------------------------------------------------------------------- the experiment


class Experiment:
    """One run, in a directory.

    Args:
        options: Seed, size, place.

    Raises:
        ValueError: The directory holds a run with other settings, or of another fine-tuned model or other requests.
    """

    def __init__(self, options: OveroptimizationArguments) -> None:
        self.options, self.plan, self.out = options, PLANS[options.size], options.out
        world = hashlib.sha256((ASSETS / "sft" / "model.safetensors").read_bytes())
        world.update("".join(request.prompt for request in self.requests).encode())
        mine = {"seed": options.seed, "size": options.size, "world": world.hexdigest()[:12], "plan": asdict(self.plan)}
        mine = json.loads(json.dumps(mine | {"sizes": SIZES, "ppo": PPO_SETTINGS}))
        settings = self.out / "settings.json"
        if not settings.exists():
            (self.out / "rows").mkdir(parents=True, exist_ok=True)
            write_json(settings, mine)
        elif (found := json.loads(settings.read_text())) != mine:
            theirs = {key: found.get(key) for key in mine if found.get(key) != mine[key]}
            ours = {key: mine[key] for key in theirs}
            raise ValueError(f"{self.out} holds a run with {theirs}, not {ours}: choose another --out, or remove it.")

    def run(self, tell: Callable[[str], None]) -> dict[str, dict[str, Any]]:
        """Do what is not done yet; returns all rows by name."""
        plan = self.plan
        work: dict[str, Callable[[], dict[str, Any]]] = {}
        for proxy in plan.reinforced:  # first, what takes longest and matters most
            work[proxy.name] = partial(self.train, proxy)
            work |= {f"ppo-{proxy.name}-{seed}": partial(self.reinforce, proxy, seed) for seed in range(plan.seeds)}
        work |= {proxy.name: partial(self.train, proxy) for proxy in plan.proxies}
        work |= {f"ensemble-{how}": partial(self.combine, how) for how in ENSEMBLES}
        rows = {}
        for number, (name, make) in enumerate(work.items(), 1):
            path = self.out / "rows" / f"{name}.json"
            if not path.exists():
                begin = time.process_time()
                row = make()
                write_json(path, row | {"cpu_seconds": round(time.process_time() - begin, 1)})
            rows[name] = json.loads(path.read_text())
            tell(f"{number}/{len(work)}  {name:28} {summary(rows[name])}")
        return rows

    # ------------------------------------------------------------------ what is sampled once

    @cached_property
    def requests(self) -> Sequence[Request]:
        """The validation requests."""
        return requests_of("validation")[: self.plan.prompts]

    @cached_property
    def pool(self) -> list[dict[str, Any]]:
        """Different answers to each of them, how often each was drawn, and its gold score."""

        def make() -> list[dict[str, Any]]:
            texts = self.sample(self.requests, self.plan.samples, seed=0)
            rows = []
            for i, request in enumerate(self.requests):
                drawn = Counter(texts[i * self.plan.samples : (i + 1) * self.plan.samples])
                scores = [judge(request, text).total for text in drawn]
                rows.append({"texts": list(drawn), "counts": list(drawn.values()), "gold": scores})
            return rows

        return list(self.once("pool", make))

    @cached_property
    def rankings(self) -> list[dict[str, Any]]:
        """Four answers to each of many training requests, ranked by the gold standard."""

        def make() -> list[dict[str, Any]]:
            requests = make_requests(
                "train", self.plan.rankings[-1] + self.plan.held_out, seed=1000 + self.options.seed
            )
            texts = self.sample(requests, 4, seed=1)
            rows = []
            for i, request in enumerate(requests):
                four = texts[4 * i : 4 * i + 4]
                scores = [assess(request, text).total for text in four]  # here the gold standard is the labeler
                rows.append({"prompt": request.prompt, "completions": four, "ranks": ranks(scores)})
            return rows

        return list(self.once("rankings", make))

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """What is in a file, which is made if it is not there."""
        path = self.out / f"{name}.json"
        if not path.exists():
            write_json(path, make())
        return json.loads(path.read_text())

    def sample(self, requests: Sequence[Request], times: int, seed: int) -> list[str]:
        """The fine-tuned model's answers at temperature 1, so many to each request, one request after the other."""
        ids = np.repeat(np.arange(len(requests)), times)
        envs = self.envs(requests, zero, lanes=min(512, len(ids)))
        agent = Sampler(envs, [self.options.seed, seed])
        parts = np.array_split(ids, -(-len(ids) // 2048))
        return [text for part in parts for text in envs.completions(run_prompts(agent, envs, part))]

    def envs(self, requests: Sequence[Request] | None, reward: Any, lanes: int) -> Any:
        """The Assistant world's environment with these requests (default: its training prompts), without a KL penalty."""
        prompts = None if requests is None else [{"prompt": request.prompt} for request in requests]
        return gym.make_vec("textenv/Assistant-v0", num_envs=lanes, reward=reward, beta=0.0, prompts=prompts).unwrapped

    # ------------------------------------------------------------------ proxies and best-of-n

    def train(self, proxy: Proxy) -> dict[str, Any]:
        """Train a proxy, keep it and its scores of the pool, and say what best-of-n by it comes to."""
        clean, held_out = self.rankings[: proxy.rankings], self.rankings[self.plan.rankings[-1] :]
        model, report = train_reward_model(
            with_noise(clean, proxy.noise, proxy.seed),
            model=small_llama(**SIZES[proxy.size], seed=proxy.seed),
            tokenizer=assistant_tokenizer(),
            batch_prompts=8,
            validation=held_out,
            optimizer=lambda classifier: Muon(classifier, lr=1e-3, matrix_lr=5e-3, weight_decay=0.0),
            seed=proxy.seed,
        )
        scores = np.asarray(model.score(self.sequences(model)))
        with replaced(self.out / "proxies" / proxy.name) as scratch, quiet_loading():
            model.save_pretrained(scratch)
            np.save(scratch / "scores.npy", scores)
        assert report.validation is not None
        return {
            "proxy": asdict(proxy),
            "parameters": sum(p.numel() for p in model.model.parameters()),
            "accuracy": report.validation.accuracy,
            "accuracy_interval": report.validation.accuracy_interval,
            "pairs": report.train.pairs,
        } | self.best_of_n(scores)

    def sequences(self, model: Any) -> list[list[int]]:
        """The pool's answers as tokens, prompt after prompt. All proxies read alike, so the first one encodes for all."""
        if not hasattr(self, "_sequences"):
            pairs = [(r.prompt, text) for r, row in zip(self.requests, self.pool, strict=True) for text in row["texts"]]
            prompts, texts = zip(*pairs, strict=True)
            self._sequences = model.encode(prompts, texts)
        return self._sequences

    def combine(self, how: str) -> dict[str, Any]:
        """Best-of-n by an ensemble."""
        members = [np.load(self.out / "proxies" / proxy.name / "scores.npy") for proxy in self.plan.ensemble]
        # Of each member the average sample scores 0, by its offset: scores are on one scale as they are.
        return {"members": len(members)} | self.best_of_n(ENSEMBLES[how](np.stack(members)))

    def best_of_n(self, scores: FLOATS) -> dict[str, Any]:
        """The curve over n, its fit and its fall. `scores`: of the pool's answers, prompt after prompt."""
        parts = np.split(scores, np.cumsum([len(row["texts"]) for row in self.pool])[:-1])
        answers = [
            (score, np.asarray(row["counts"]), np.asarray(row["gold"]))
            for score, row in zip(parts, self.pool, strict=True)
        ]
        ns = doublings(self.plan.samples)
        gold, proxy, kl = np.zeros((3, len(ns), len(answers)))
        for p, (score, counts, worth) in enumerate(answers):
            for e, n in enumerate(ns):
                weights = best_of_n_weights(score, counts, n)
                gold[e, p], proxy[e, p] = weights @ worth, weights @ score
                kl[e, p] = kl_of_best_of_n(score, counts, n)
        slope = within_slope(answers)
        promised = gold[0].mean() + slope * (proxy.mean(axis=1) - proxy[0].mean())
        columns = {
            "n": ns,
            "kl_bound": [kl_bound(n) for n in ns],
            "kl_pool": kl.mean(axis=1),
            "gold": gold.mean(axis=1),
            "gold_error": standard_error(gold),
            "promised": promised,
        }
        d = np.sqrt(columns["kl_bound"])
        return {
            "slope": slope,
            "proxy_before": float(proxy[0].mean()),
            "favourites": [
                {"text": row["texts"][best], "gold": row["gold"][best]}
                for (score, *_), row in zip(answers[:12], self.pool, strict=False)
                for best in [int(score.argmax())]
            ],
            "curve": [
                dict(zip(columns, (float(v) for v in values), strict=True))
                for values in zip(*columns.values(), strict=True)
            ],
            "fall": fall(gold[None]),
            "fit": fit_quality(d, gold.mean(axis=1) - gold[0].mean(), best_of_n_form),
        }

    # ------------------------------------------------------------------ reinforcement

    def reinforce(self, proxy: Proxy, seed: int) -> dict[str, Any]:
        """Train by PPO on the proxy alone; gold and proxy on the validation prompts along the way."""
        plan = self.plan
        with quiet_loading():
            reward = RewardModel.from_pretrained(self.out / "proxies" / proxy.name)
        agent = PPO(self.envs(None, reward, lanes=128), seed=seed, **PPO_SETTINGS)
        watched = self.envs(self.requests, reward, lanes=128)
        watched.attach_policy(agent.policy, pay=False)
        ids = np.repeat(np.arange(plan.prompts), plan.answers)
        curve: list[dict[str, Any]] = []

        def evaluate() -> None:
            agent.set_random_seed(len(curve))  # of `predict`, which training does not use
            episodes = run_prompts(agent, watched, ids)
            texts = watched.completions(episodes)
            asked = [request for request in self.requests for _ in range(plan.answers)]
            totals = np.asarray([judge(request, text).total for request, text in zip(asked, texts, strict=True)])
            # The mean of log pi - log pi_ref over samples of pi is an unbiased estimate of the KL.
            kl = episodes.kl.reshape(plan.prompts, -1).mean(axis=1)
            curve.append(
                {
                    "tokens": agent.num_timesteps,
                    "kl": float(kl.mean()),
                    "kl_error": float(standard_error(kl[None])[0]),
                    "proxy": float(episodes.task_reward.mean()),
                    "words": float(np.mean([len(text.split()) for text in texts])),
                    "gold_by_prompt": totals.reshape(plan.prompts, -1).mean(axis=1).round(6).tolist(),
                    "samples": texts[:: plan.answers][:8],
                }
            )

        class Watch(BaseCallback):
            """Evaluates between updates."""

            def _on_rollout_start(self) -> None:
                if agent.num_timesteps >= len(curve) * plan.tokens / plan.evaluations:
                    evaluate()

            def _on_step(self) -> bool:
                return True

        agent.learn(plan.tokens, callback=Watch())
        evaluate()
        return {"proxy": asdict(proxy), "seed": seed, "curve": curve}


def doublings(most: int) -> list[int]:
    """1, then two per octave, up to `most`."""
    return sorted({round(2 ** (k / 2)) for k in range(int(2 * np.log2(most)) + 1)} | {most})


def within_slope(answers: Sequence[tuple[FLOATS, INTS, FLOATS]]) -> float:
    """Slope of gold on proxy within prompts, over all samples. Each (scores, counts, gold), shape (Y,)."""
    both = spread = 0.0
    for score, counts, gold in answers:
        centred = score - np.average(score, weights=counts)
        both += float(counts @ (centred * gold))
        spread += float(counts @ centred**2)
    return both / spread if spread > 0 else 0.0


def standard_error(values: FLOATS) -> FLOATS:
    """Of the mean over prompts. Shape: (E, P) -> (E,)."""
    return np.asarray(values.std(axis=1, ddof=1) / np.sqrt(values.shape[1]))


def summary(row: Mapping[str, Any]) -> str:
    """A row in a few words."""
    curve = row["curve"]
    gold = [p["gold"] if "gold" in p else float(np.mean(p["gold_by_prompt"])) for p in curve]
    accuracy = f"accuracy {row['accuracy']:.3f}  " if "accuracy" in row else ""
    far = f"KL {curve[-1]['kl']:.1f}" if "kl" in curve[-1] else f"n {curve[-1]['n']:.0f}"
    seconds = f"{row['cpu_seconds']:.0f} s of CPU time"
    return f"{accuracy}gold {gold[0]:.3f}, at best {max(gold):.3f}, at {far} {gold[-1]:.3f}  ({seconds})"


def run_overoptimization(options: OveroptimizationArguments) -> dict[str, dict[str, Any]]:
    """Gold against proxy: reward models of three sizes and four data sizes, with noise and as ensembles, optimised by best-of-n and PPO."""
    from benchmarks.overoptimization_report import draw, interval, reinforced, tables

    torch.set_num_threads(1)
    console = Console()
    with ExitStack() as held:
        # A directory of another run, one where another run is writing, or one that cannot be written.
        with usage_errors():
            experiment = Experiment(options)
            held.enter_context(locked(options.out))
        try:
            rows = experiment.run(lambda text: console.print(text, highlight=False))
        except KeyboardInterrupt:
            console.print(f"\nStopped. What is finished is in {options.out}; the same command goes on from there.")
            raise
    plan = experiment.plan
    write_text(options.out / "tables.md", tables(rows, plan))
    draw(rows, plan, options.out / "overoptimization.png")
    found = {"best-of-n": rows[plan.named.name]["fall"], "PPO": reinforced(rows, plan.named)["fall"]}
    for name, drop in found.items():
        console.print(f"{name}: gold falls from its peak by {interval(drop)} under {plan.named.name}, the proxy named.")
    console.print(f"picture: {options.out / 'overoptimization.png'}   tables: {options.out / 'tables.md'}")
    return rows


def main() -> None:
    """`python -m benchmarks.overoptimization`."""
    import tyro

    run_overoptimization(tyro.cli(OveroptimizationArguments, description=(__doc__ or "").splitlines()[0]))


if __name__ == "__main__":
    main()
