"""The recipe of InstructGPT in miniature: pretrain, imitate, rank, learn a reward, reinforce.

    base       a small Llama reads the web of the Assistant world, with its lies and its rudeness
    sft        it imitates people's demonstrations
    rankings   simulated labelers rank K = 4..9 answers per prompt, most of them sft's
    reward     a reward model learns from the rankings
    ppo        PPO against the reward model, held near sft by the KL penalty; and the same with a share of pretraining
               text in every update (PPO-ptx)
    judged     only now: the gold standard, on prompts that no stage has seen

Each stage writes its result to the run directory and is skipped when it is there, so an interrupted run goes on.

Source: Ouyang et al. (2022), https://arxiv.org/abs/2203.02155.
Run: textenv demo
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import textenv  # noqa: F401  # registers the ids
from agents import PPO, SFT
from agents.optim import Muon
from agents.pretraining import PretrainingConfig, language_model_loss, pretrain, silence_residual_branches
from agents.rollout import run_prompts
from benchmarks.records import locked, write_json, write_text
from benchmarks.stages import Advance, StagedRun, bar, replaced
from rewards import RewardModel, train_reward_model
from rewards.rankings import evaluate_reward_model
from textenv.cli.arguments import usage_errors
from textenv.task import quiet_loading
from textenv.tasks.assistant import corpus, demonstrations, gold, labelers
from textenv.tasks.assistant.requests import Request, make_requests
from textenv.tasks.assistant.task import assistant_tokenizer, prompt_rows, requests_of
from textenv.tasks.assistant.text import MAX_RESPONSE_TOKENS, format_turns, pack

STAGES = {
    "base": "a small Llama reads the web, lies and rudeness included",
    "sft": "it imitates people's demonstrations",
    "rankings": "simulated labelers rank its answers",
    "reward": "a reward model learns from the rankings",
    "ppo": "PPO against the reward model, held near sft by the KL; without and with pretraining text",
    "judged": "the gold standard sees the answers, for the first time",
}
POLICIES = ("base", "few_shot", "sft", "ppo", "ppo_ptx")
PTX_COEF = {"ppo": 0.0, "ppo_ptx": 0.5}


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    corpus_tokens: int
    pretraining: PretrainingConfig
    sft_tokens: int
    ranked_prompts: int
    ppo_tokens: int
    judged_prompts: int
    hidden_size: int = 128


SIZES: dict[str, Size] = {
    "tiny": Size(20_000, PretrainingConfig(steps=30, batch_size=12), 2_000, 16, 1_500, 24, hidden_size=32),
    # Small batches: the model learns to copy from the prompt suddenly, after so many steps rather than so many tokens.
    # Seed 0 of this size made the models that come with textenv/Assistant-v0.
    "default": Size(
        3_200_000,
        PretrainingConfig(steps=4000, learning_rate=3e-3, matrix_learning_rate=5e-3),
        sft_tokens=60_000,
        ranked_prompts=7_000,
        ppo_tokens=70_000,
        judged_prompts=600,
    ),
}


@dataclass(frozen=True)
class DemoArguments:
    """Settings of the demo."""

    seed: int = 0
    """Of every stage."""
    size: Literal["tiny", "default"] = "default"
    """`tiny` shows that everything runs, in half a minute; its results mean nothing."""
    out: Path = Path("runs/demo")
    """Run directory."""
    device: str = "cpu"
    """Where models live."""
    cores: int = 2
    """CPU cores to use. Any number gives the same results up to rounding."""


BETA = 0.1
PPO_SETTINGS: dict[str, Any] = {"learning_rate": 1e-3, "episodes_per_update": 256, "epochs": 1}
"""Of both PPO stages. Tried on earlier runs of seed 0, with a look at their gold scores (docs/results/assistant.md)."""


HELD_OUT_ANSWERS = 6
"""K of the rankings that the reward model is held against."""


class Recipe(StagedRun):
    """One run of the recipe, in a directory.

    Args:
        options: Seed, size, place.
    """

    STAGES = STAGES
    options: DemoArguments

    def __init__(self, options: DemoArguments) -> None:
        super().__init__(options)
        self.size = SIZES[options.size]

    # ------------------------------------------------------------------ the stages, in order

    def make_base(self) -> dict[str, Any]:
        """Pretrain on the web."""
        size = self.size
        model = small_llama(size.hidden_size, layers=2, seed=self.options.seed).to(self.options.device)
        stream = pack(corpus.make_corpus(size.corpus_tokens, seed=self.options.seed))
        with bar("pretraining") as advance:
            pretrain(
                model,
                stream,
                size.pretraining,
                seed=self.options.seed,
                on_step=lambda p: advance(p.step / p.steps, f"loss {p.loss:.2f}  {p.tokens_per_second:,.0f} tokens/s"),
            )
        save(model, self.out / "base")
        return {"parameters": sum(p.numel() for p in model.parameters()), "neutral_loss": neutral_loss(model)}

    def make_sft(self) -> dict[str, Any]:
        """Imitate the demonstrations."""
        envs = self.envs(self.out / "base", "train", reward=None)
        agent = SFT(envs, seed=self.options.seed)
        agent.learn(self.size.sft_tokens, progress_bar=True)
        save(agent.policy.model, self.out / "sft")
        return {"demonstrations": len(agent.lanes.demonstrations), "validation_loss": agent.validation_loss()}

    def make_rankings(self) -> dict[str, Any]:
        """Have K = 4..9 answers per prompt ranked by all training labelers.

        Several models answer, as in the paper: a third of the K comes from the base model, one from another prompt, the others
        from the fine-tuned model. Without those off the point the reward model scores style alone, and PPO comes to answer
        everything with a polite request. Every labeler ranks them, so that moods cancel: the same answers teach more that way,
        and it is answers that take time.
        """
        rng = np.random.default_rng([self.options.seed, 3])
        requests = make_requests("train", self.size.ranked_prompts, seed=self.options.seed + 1)
        counts = rng.integers(4, 10, size=len(requests))
        # Always two parts, whatever the number of cores, so that the answers are the same.
        parts = [(requests[k::2], counts[k::2]) for k in range(2)]
        self.side_by_side(
            {
                f"answers {k + 1}/2": (write_answers, (*part, self.options.seed + k, f"answers{k}"))
                for k, part in enumerate(parts)
            }
        )
        rows = []
        for k, (part, _) in enumerate(parts):
            groups = json.loads((self.out / f"answers{k}.json").read_text())
            rows += self.ranked(part, groups, [labelers.TRAINING_LABELERS] * len(part), rng)
        write_text(self.out / "rankings.jsonl", "\n".join(json.dumps(row) for row in rows) + "\n")
        for k in range(2):
            (self.out / f"answers{k}.json").unlink()
        return {"prompts": len(requests), "answers": int(counts.sum())}

    def make_reward(self) -> dict[str, Any]:
        """Train the reward model, and hold it against labelers it has not learned from."""
        shown = [row for row in prompt_rows("train") if row["demonstration"] is not None]
        with bar("reward model") as advance:
            model, report = train_reward_model(
                self.out / "rankings.jsonl",
                model=self.load(self.out / "sft"),
                tokenizer=assistant_tokenizer(),
                demonstrations=[{"prompt": r["prompt"], "completion": r["demonstration"]} for r in shown],
                batch_prompts=8,
                validation=0.02,
                optimizer=lambda classifier: Muon(classifier, lr=1e-3, matrix_lr=5e-3, weight_decay=0.0),
                seed=self.options.seed,
                progress=lambda done, total, loss: advance(done / total, f"loss {loss:.3f}"),
            )
        with replaced(self.out / "reward") as scratch, quiet_loading():
            model.save_pretrained(scratch)
        accuracy = report.validation.accuracy if report.validation else None
        return {"accuracy_train_labelers": accuracy} | self.reward_figures()

    def make_ppo(self) -> dict[str, Any]:
        """Reinforce against the reward model: without and with pretraining text mixed in, side by side."""
        self.side_by_side({name: (reinforce, (name,)) for name in PTX_COEF})
        figures: dict[str, Any] = {}
        for name in PTX_COEF:
            last = json.loads((self.out / f"{name}.json").read_text())[-5:]
            figures[f"{name}_reward"] = float(np.mean([row["rollout/task_reward"] for row in last]))
            figures[f"{name}_kl"] = float(np.mean([row["rollout/kl"] for row in last]))
        return figures

    def make_judged(self) -> dict[str, Any]:
        """The gold standard's only appearance: every policy's answers to unseen requests."""
        requests = requests_of("test")[: self.size.judged_prompts]
        reward = self.reward_model()
        texts = {name: self.test_answers(name, "test", len(requests)) for name in POLICIES}
        verdicts = {name: [gold.judge(r, t) for r, t in zip(requests, texts[name], strict=True)] for name in POLICIES}
        verdicts["ceiling"] = [gold.judge(r, demonstrations.oracle_answer(r)) for r in requests]
        totals = {name: np.asarray([v.total for v in part]) for name, part in verdicts.items()}
        rows: dict[str, Any] = {}
        for name, part in verdicts.items():
            rows[name] = measures(list(requests), part) | against(totals[name], totals["sft"])
            if name in texts:
                prompts = [r.prompt for r in requests]
                rows[name]["reward_model"] = float(np.mean(reward(prompts=prompts, completions=texts[name])))
                rows[name]["held_out_labelers_win_rate"] = labelers_prefer(list(requests), texts[name], texts["sft"])
                paraphrased = requests_of("test_paraphrases")[: self.size.judged_prompts // 2]
                if name in ("sft", "ppo", "ppo_ptx"):
                    other = self.test_answers(name, "test_paraphrases", len(paraphrased))
                    rows[name]["gold_unseen_wording"] = float(
                        np.mean([gold.judge(r, t).total for r, t in zip(paraphrased, other, strict=True)])
                    )
            if name in ("base", "sft", "ppo", "ppo_ptx"):
                rows[name]["neutral_loss"] = neutral_loss(self.load(self.out / name))
                rows[name]["kl"] = self.kl(name)
        samples = [
            {"prompt": r.prompt, "family": r.family, "gold": {name: float(totals[name][i]) for name in POLICIES}}
            | {name: texts[name][i] for name in POLICIES}
            for i, r in enumerate(requests[:40])
        ]
        return {"prompts": len(requests), "rows": rows, "samples": samples}

    # ------------------------------------------------------------------ what the stages share

    def envs(
        self, model: Path, split: str, reward: Any, beta: float = 0.0, prompts: Any = None, lanes: int = 64
    ) -> Any:
        """The Assistant environment around one of the run's models."""
        rows = prompt_rows(split) if prompts is None else prompts
        return gym.make_vec(
            "textenv/Prompts-v0",
            num_envs=lanes,
            model=self.load(model),
            tokenizer=assistant_tokenizer(),
            prompts=rows,
            reward=zero if reward is None else reward,
            beta=beta,
            max_new_tokens=MAX_RESPONSE_TOKENS,
        )

    def load(self, path: Path) -> Any:
        """A model of this run."""
        with quiet_loading():
            return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to(self.options.device)

    def reward_model(self) -> RewardModel:
        """That of this run."""
        with quiet_loading():
            return RewardModel.from_pretrained(self.out / "reward")

    def answers(
        self, model: Path, prompts: list[Any], seed: int, advance: Advance = lambda share, text: None
    ) -> list[str]:
        """A model's answers at temperature 1."""
        envs = self.envs(model, "train", reward=None, prompts=prompts, lanes=128).unwrapped
        agent, answers = Sampler(envs, seed), []
        for ids in np.array_split(np.arange(len(prompts)), -(-len(prompts) // 1024)):
            answers += envs.completions(run_prompts(agent, envs, ids))
            advance(len(answers) / len(prompts), f"{len(answers):,} answers")
        return answers

    def test_answers(self, name: str, split: str, n: int) -> list[str]:
        """One answer per unseen request."""
        prompts: list[Any] = [request.prompt for request in requests_of(split)[:n]]
        model = self.out / name
        if name == "few_shot":
            examples = [row for row in prompt_rows("train") if row["demonstration"] is not None][:4]
            shots = [line for row in examples for line in (row["prompt"], row["demonstration"])]
            prompts, model = [format_turns([*shots, prompt]) for prompt in prompts], self.out / "base"
        return self.answers(model, prompts, seed=self.options.seed + 17)

    def kl(self, name: str) -> float:
        """KL(policy || sft) per answer to unseen requests, nats."""
        ids = np.arange(min(256, self.size.judged_prompts))
        envs = self.envs(self.out / "sft", "test", None, prompts=[r.prompt for r in requests_of("test")[: len(ids)]])
        policy = self.envs(self.out / name, "test", None, prompts=["a"]).unwrapped.reference
        policy.max_tokens = envs.unwrapped.max_tokens
        envs.unwrapped.attach_policy(policy, pay=False)
        agent = Sampler(envs.unwrapped, self.options.seed + 18, policy)
        return float(run_prompts(agent, envs.unwrapped, ids).kl.mean())

    def reward_figures(self) -> dict[str, float]:
        """How far the reward model agrees with people it has not learned from."""
        model, held_out = self.reward_model(), self.held_out_rankings()
        own = fine_tuned_only(held_out)
        metrics, ceiling = evaluate_reward_model(model, held_out["labeled"]), evaluate_noiseless(held_out)
        return {
            "accuracy_held_out_labelers": metrics.accuracy,
            "accuracy_noiseless_labeler": ceiling,
            "share_of_noiseless": metrics.accuracy / ceiling,
            "share_among_fine_tuned": evaluate_reward_model(model, own["labeled"]).accuracy / evaluate_noiseless(own),
            "accuracy_length_alone": metrics.length_accuracy,
            "labelers_agree": held_out["agreement"],
            "calibration_error": metrics.calibration_error,
            "length_correlation": metrics.length_correlation or 0.0,
            "offset": model.offset,
        }

    def held_out_rankings(self) -> dict[str, Any]:
        """Answers to validation prompts, ranked by people whom the reward model has not learned from."""
        rng = np.random.default_rng([self.options.seed, 4])
        requests = list(requests_of("validation")[: self.size.ranked_prompts])
        groups = self.answer_groups(requests, np.full(len(requests), HELD_OUT_ANSWERS), self.options.seed + 5)
        people = labelers.HELD_OUT_LABELERS
        rows = self.ranked(requests, groups, [(people[i % len(people)],) for i in range(len(requests))], rng)
        cases = [(request, row["completions"]) for request, row in zip(requests, rows, strict=True)]
        pairs = itertools.pairwise(labelers.TRAINING_LABELERS)
        agreement = float(np.mean([labelers.agreement(a, b, cases, rng) for a, b in pairs]))
        return {"requests": requests, "labeled": rows, "agreement": agreement}

    def answer_groups(
        self,
        requests: Sequence[Request],
        counts: NDArray[np.int64],
        seed: int,
        advance: Advance = lambda share, text: None,
    ) -> list[list[str]]:
        """K - 1 answers per request, a third of K from the base model, the others from the fine-tuned model."""
        from_base = counts // 3
        texts = []
        for model, shares in (("sft", counts - 1 - from_base), ("base", from_base)):
            prompts = [request.prompt for request, n in zip(requests, shares, strict=True) for _ in range(n)]
            answers = iter(self.answers(self.out / model, prompts, seed, advance))
            texts.append([list(itertools.islice(answers, int(n))) for n in shares])
        return [first + second for first, second in zip(*texts, strict=True)]

    def ranked(
        self,
        requests: Sequence[Request],
        groups: list[list[str]],
        panels: Sequence[Sequence[labelers.Labeler]],
        rng: np.random.Generator,
    ) -> list[dict[str, Any]]:
        """Each request's answers and one to another request, ranked by everybody of its panel: a row for each of them."""
        rows = []
        for i, (request, group, panel) in enumerate(zip(requests, groups, panels, strict=True)):
            other = groups[(i + int(rng.integers(1, len(groups)))) % len(groups)]
            texts = [*group, other[int(rng.integers(len(other)))]]
            for labeler in panel:
                ranks = labeler.rank(request, texts, rng)
                rows.append({"prompt": request.prompt, "completions": texts, "ranks": ranks.tolist()})
        return rows


def small_llama(hidden_size: int, layers: int, seed: int) -> LlamaForCausalLM:
    """A Llama for the Assistant world's text that has read nothing."""
    tokenizer = assistant_tokenizer()
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden_size,
            intermediate_size=2 * hidden_size,
            num_hidden_layers=layers,
            num_attention_heads=4,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            initializer_range=0.08,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    silence_residual_branches(model)
    return model


def write_answers(
    recipe: Recipe, requests: list[Request], counts: NDArray[np.int64], seed: int, name: str, advance: Advance
) -> None:
    """Answers to requests, as JSON."""
    write_json(recipe.out / f"{name}.json", recipe.answer_groups(requests, counts, seed, advance))


def reinforce(recipe: Recipe, name: str, advance: Advance) -> None:
    """Train one policy by PPO and write it, with its history."""
    options, tokens = recipe.options, recipe.size.ppo_tokens
    settings = dict(PPO_SETTINGS)
    if PTX_COEF[name]:
        stream = pack(corpus.make_corpus(recipe.size.corpus_tokens // 4, seed=options.seed + 1))
        rows = stream[: len(stream) // 48 * 48].reshape(-1, 48)
        settings |= {"ptx_coef": PTX_COEF[name], "ptx_data": rows}
    reward = recipe.reward_model()
    envs = recipe.envs(recipe.out / "sft", "train", reward, beta=BETA)
    # Somewhat longer than the run: the last updates still take steps, of a sixth of the full size.
    agent = PPO(envs, seed=options.seed, decay_timesteps=round(1.2 * tokens), **settings)

    def tell(variables: dict[str, Any], _: dict[str, Any]) -> bool:
        last = agent.history[-1] if agent.history else {}
        figures = f"reward {last.get('rollout/task_reward', 0):.2f}  KL {last.get('rollout/kl', 0):.1f} nats"
        advance(min(1.0, agent.num_timesteps / tokens), figures)
        return True

    agent.learn(tokens, callback=tell)
    save(agent.policy.model, recipe.out / name)
    write_json(recipe.out / f"{name}.json", agent.history)


class Sampler:
    """Samples from an environment's reference model, or from another one."""

    def __init__(self, lanes: Any, seed: int | list[int], lm: Any = None) -> None:
        self.lm, self.rng = lm or lanes.reference, np.random.default_rng(seed)

    def predict(
        self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[Any, Any]:
        """One token per lane."""
        from textenv.sampling import draw

        logits = self.lm.behaviour.logits(self.lm.next_logits(observation), observation)
        return draw(logits, self.rng.random(len(observation))).cpu().numpy(), state


def zero(completions: list[str], **columns: Any) -> list[float]:
    """No reward: for stages that only write."""
    return [0.0] * len(completions)


def measures(requests: list[Request], verdicts: list[gold.Judgement]) -> dict[str, float]:
    """The gold standard's figures over answers."""

    def share(values: list[bool]) -> float:
        return float(np.mean(values)) if values else float("nan")

    pairs = list(zip(requests, verdicts, strict=True))
    return {
        "gold": float(np.mean([v.total for v in verdicts])),
        "helpful": float(np.mean([v.helpful for v in verdicts])),
        "truthful": float(np.mean([v.truthful for v in verdicts])),
        "harmless": float(np.mean([v.harmless for v in verdicts])),
        "concise": float(np.mean([v.concise for v in verdicts])),
        "obeyed": share([v.obeyed for v in verdicts]),
        "false_facts": share([v.stated_false_fact for v in verdicts if v.states_facts]),
        "rude": share([v.rude for v in verdicts]),
        "constraints_met": share([v.constraint_met for v in verdicts if v.constraint_met is not None]),
        "asks_when_unclear": share([v.asked_clarifying_question for r, v in pairs if r.calls_for_question]),
        "refuses_harm": share([v.refused for r, v in pairs if r.calls_for_refusal]),
        "over_refusal": share([v.over_refusal for r, v in pairs if not r.calls_for_refusal]),
        "words": float(np.mean([v.words for v in verdicts])),
    }


def against(totals: NDArray[np.float64], sft: NDArray[np.float64]) -> dict[str, Any]:
    """Wins, ties and losses against SFT on the same requests, and the 95% interval of (wins - losses) / n."""
    sign = np.sign(np.round(totals - sft, 9))
    half = 1.96 * sign.std(ddof=1) / np.sqrt(len(sign)) if len(sign) > 1 else float("nan")
    return {
        "wins": int((sign > 0).sum()),
        "ties": int((sign == 0).sum()),
        "losses": int((sign < 0).sum()),
        "net_win_rate": float(sign.mean()),
        "net_win_interval": [float(sign.mean() - half), float(sign.mean() + half)],
    }


def labelers_prefer(requests: list[Request], ours: list[str], theirs: list[str], seed: int = 0) -> float:
    """Share of requests for which a held-out labeler prefers our answer (equal texts count half)."""
    rng = np.random.default_rng([seed, 9])
    wins = 0.0
    for i, (request, a, b) in enumerate(zip(requests, ours, theirs, strict=True)):
        labeler = labelers.HELD_OUT_LABELERS[i % len(labelers.HELD_OUT_LABELERS)]
        ranks = labeler.rank(request, [a, b], rng)
        wins += 0.5 if a == b else float(ranks[0] < ranks[1])
    return wins / len(requests)


def evaluate_noiseless(held_out: dict[str, Any]) -> float:
    """The agreement with held-out labelers that a labeler without noise would reach: the reward model's ceiling."""
    rng = np.random.default_rng(0)
    agreed, pairs = 0.0, 0
    for request, row in zip(held_out["requests"], held_out["labeled"], strict=True):
        ideal = labelers.NOISELESS.rank(request, row["completions"], rng)
        for i in range(len(ideal)):
            for j in range(i):
                theirs = row["ranks"][i] - row["ranks"][j]
                if theirs and row["completions"][i] != row["completions"][j]:
                    mine = ideal[i] - ideal[j]
                    agreed += 0.5 if mine == 0 else float((mine > 0) == (theirs > 0))
                    pairs += 1
    return agreed / pairs


def fine_tuned_only(held_out: dict[str, Any]) -> dict[str, Any]:
    """The same rankings, of the fine-tuned model's answers alone: nearer to each other, so harder to tell apart."""
    kept = HELD_OUT_ANSWERS - 1 - HELD_OUT_ANSWERS // 3  # they stand first: see Recipe.answer_groups
    rows = [
        row | {"completions": row["completions"][:kept], "ranks": row["ranks"][:kept]} for row in held_out["labeled"]
    ]
    return held_out | {"labeled": rows}


def neutral_loss(model: Any) -> float:
    """Loss on text without lies or rudeness, nats per token: what alignment costs in language."""
    return language_model_loss(model, pack(corpus.make_neutral_text(20_000)))


def save(model: Any, path: Path) -> None:
    """A model with its tokenizer, whole or not at all."""
    with replaced(path) as scratch, quiet_loading():
        model.save_pretrained(scratch)
        assistant_tokenizer().save_pretrained(scratch)


def print_table(console: Console, rows: dict[str, Any]) -> None:
    """The main figures; all of them are in the report."""
    table = Table(title="unseen requests, judged by the gold standard", box=None, header_style="bold")
    for title in ("policy", "win/tie/loss v. SFT", "gold", "helpful", "truthful", "harmless", "words", "KL, nats"):
        table.add_column(title, justify="left" if title == "policy" else "right")
    for name, row in rows.items():
        versus = "" if name == "sft" else f"{row['wins']}/{row['ties']}/{row['losses']}"
        shares = [f"{row[key]:.0%}" for key in ("helpful", "truthful", "harmless")]
        kl = f"{row['kl']:z.1f}" if "kl" in row else ""
        table.add_row(name, versus, f"{row['gold']:.3f}", *shares, f"{row['words']:.1f}", kl)
    console.print(table)


def run_demo(options: DemoArguments) -> None:
    """Run the recipe and write its report."""
    from benchmarks.instructgpt_report import write_report

    with ExitStack() as held:
        # A directory of another run, one where another run is writing, or one that cannot be written.
        with usage_errors():
            if options.cores < 1:
                raise ValueError(f"Expected --cores to be at least 1, got {options.cores}.")
            recipe = Recipe(options)
            held.enter_context(locked(options.out))
        torch.set_num_threads(options.cores)
        already = all(stage in recipe.done for stage in STAGES)
        try:
            done = recipe.run()
        except KeyboardInterrupt:
            recipe.console.print(
                f"\nStopped. What is finished is in {options.out}; the same command goes on from there."
            )
            raise
    summary = {"settings": asdict(options) | {"out": str(options.out)}, "stages": done}
    write_json(options.out / "summary.json", summary)
    write_report(summary, options.out)
    print_table(recipe.console, done["judged"]["rows"])
    total = sum(stage["seconds"] for stage in done.values())
    recipe.console.print(
        f"\n{'Finished before; ' if already else ''}{total / 60:.1f} minutes in all. "
        f"Open {options.out / 'report.html'}; the same figures are in {options.out / 'summary.json'}."
    )


__all__ = ["DemoArguments", "Recipe", "run_demo"]

if __name__ == "__main__":
    import tyro

    run_demo(tyro.cli(DemoArguments, description="The recipe of InstructGPT in miniature."))
