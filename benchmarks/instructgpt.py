"""The recipe of InstructGPT in miniature: pretrain, imitate, rank, learn a reward, reinforce.

    base       a small Llama reads the web of the Assistant world, with its lies and its rudeness
    sft        it imitates people's demonstrations
    rankings   simulated labelers rank K = 4..9 of its answers per prompt
    reward     a reward model learns from the rankings
    ppo        PPO against the reward model, held near sft by the KL penalty
    ppo_ptx    the same with a share of pretraining text in every update
    judged     only now: the gold standard, on prompts that no stage has seen

Each stage writes its result to the run directory and is skipped when it is there, so an interrupted run goes on.

Source: Ouyang et al. (2022), https://arxiv.org/abs/2203.02155.
Run: python -m benchmarks.instructgpt

In progress: every stage runs, but the reward model is still near chance (53% on held-out labelers in the runs tried, where a
labeler without noise reaches 65 to 67%), and PPO against it raised its score while the gold score fell.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import textenv  # noqa: F401  # registers the ids
from agents import PPO, SFT
from agents.pretraining import PretrainingConfig, language_model_loss, pretrain, silence_residual_branches
from agents.rollout import run_prompts
from rewards import RewardModel, train_reward_model
from rewards.rankings import evaluate_reward_model
from textenv.task import quiet_loading
from textenv.tasks.assistant import corpus, demonstrations, gold, labelers
from textenv.tasks.assistant.requests import Request
from textenv.tasks.assistant.task import assistant_tokenizer, prompt_rows, requests_of
from textenv.tasks.assistant.text import MAX_RESPONSE_TOKENS, format_turns, pack

STAGES = ("base", "sft", "rankings", "reward", "ppo", "ppo_ptx", "judged")
POLICIES = ("base", "few_shot", "sft", "ppo", "ppo_ptx")


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
    layers: int = 2


SIZES: dict[str, Size] = {
    "tiny": Size(20_000, PretrainingConfig(steps=30, batch_size=12), 2_000, 16, 1_500, 24, hidden_size=32),
    # Small batches: the model learns to copy from the prompt suddenly, after so many steps rather than so many tokens.
    "default": Size(
        1_700_000, PretrainingConfig(steps=2200, batch_size=12, block_length=64), 50_000, 500, 150_000, 600
    ),
}


@dataclass(frozen=True)
class DemoArguments:
    """Settings of the demo."""

    seed: int = 0
    """Of every stage."""
    size: Literal["tiny", "default"] = "default"
    """`tiny` shows that everything runs, in half a minute; its results mean nothing."""
    out: Path = Path("runs/instructgpt")
    """Run directory."""
    device: str = "cpu"
    """Where models live."""
    threads: int = 1
    """CPU threads of torch; models are so small that a second one hardly pays."""


class Recipe:
    """One run of the recipe, in a directory.

    Args:
        options: Seed, size, place.
        settings: Of the PPO stages; fields of `PPOConfig`.
    """

    def __init__(self, options: DemoArguments, **settings: Any) -> None:
        self.options, self.size, self.out = options, SIZES[options.size], options.out
        self.console = Console()
        self.settings = {"beta": 0.05} | settings
        self.done: dict[str, Any] = {}
        self._claim()

    def run(self) -> dict[str, Any]:
        """Do what is not done yet; returns every stage's figures."""
        for number, stage in enumerate(STAGES, 1):
            if stage in self.done:
                self.console.print(f"[dim]{number}/{len(STAGES)} {stage}: done before[/dim]")
                continue
            self.console.print(f"[bold]{number}/{len(STAGES)} {stage}[/bold]  {DESCRIPTIONS[stage]}")
            begin = time.perf_counter()
            figures = getattr(self, f"make_{stage}")()
            self.done[stage] = {"seconds": round(time.perf_counter() - begin, 1), **figures}
            write_json(self.out / "stages.json", self.done)
            shown = "  ".join(f"{k} {v:.3g}" for k, v in self.done[stage].items() if isinstance(v, int | float))
            self.console.print(f"    {shown}", highlight=False)
        return self.done

    # ------------------------------------------------------------------ the stages, in order

    def make_base(self) -> dict[str, Any]:
        """Pretrain on the web."""
        tokenizer, size = assistant_tokenizer(), self.size
        torch.manual_seed(self.options.seed)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=size.hidden_size,
                intermediate_size=3 * size.hidden_size,
                num_hidden_layers=size.layers,
                num_attention_heads=4,
                max_position_embeddings=256,
                tie_word_embeddings=True,
                initializer_range=0.08,
                pad_token_id=tokenizer.pad_token_id,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        ).to(self.options.device)
        silence_residual_branches(model)
        stream = pack(corpus.make_corpus(size.corpus_tokens, seed=self.options.seed))
        with bar("pretraining", size.pretraining.steps) as advance:
            pretrain(
                model,
                stream,
                size.pretraining,
                seed=self.options.seed,
                on_step=lambda p: advance(p.step, f"loss {p.loss:.2f}  {p.tokens_per_second:,.0f} tokens/s"),
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
        """Have answers of the fine-tuned model ranked: K = 4..9 per prompt, one labeler each."""
        rng = np.random.default_rng([self.options.seed, 3])
        envs = self.envs(self.out / "sft", "train", reward=None)
        ids = rng.choice(len(requests_of("train")), self.size.ranked_prompts, replace=False)
        repeats = rng.integers(4, 10, size=len(ids))
        answers = self.answer(self.out / "sft", envs, np.repeat(ids, repeats), seed=self.options.seed)
        rows, start = [], 0
        for i, k in zip(ids, repeats, strict=True):
            request, texts = requests_of("train")[i], answers[start : start + k]
            start += k
            labeler = labelers.TRAINING_LABELERS[int(rng.integers(len(labelers.TRAINING_LABELERS)))]
            ranks = labeler.rank(request, texts, rng)
            rows.append({"prompt": request.prompt, "completions": texts, "ranks": [int(r) for r in ranks]})
        lines = "\n".join(json.dumps(row) for row in rows)
        write_text(self.out / "rankings.jsonl", lines + "\n")
        return {"prompts": len(rows), "answers": len(answers)}

    def make_reward(self) -> dict[str, Any]:
        """Train the reward model, and hold it against labelers it has not learned from."""
        shown = [row for row in prompt_rows("train") if row["demonstration"] is not None]
        with bar("reward model", 1) as advance:
            model, report = train_reward_model(
                self.out / "rankings.jsonl",
                model=self.load(self.out / "sft"),
                tokenizer=assistant_tokenizer(),
                demonstrations=[{"prompt": r["prompt"], "completion": r["demonstration"]} for r in shown],
                seed=self.options.seed,
                progress=lambda done, total, loss: advance(done / total, f"loss {loss:.3f}"),
            )
        with replaced(self.out / "reward") as scratch:
            model.save_pretrained(scratch)
        held_out = self.held_out_rankings()
        metrics = evaluate_reward_model(model, held_out["labeled"])
        ceiling = evaluate_noiseless(held_out)
        return {
            "accuracy_train_labelers": report.validation.accuracy if report.validation else None,
            "accuracy_held_out_labelers": metrics.accuracy,
            "accuracy_noiseless_labeler": ceiling,
            "accuracy_length_alone": metrics.length_accuracy,
            "calibration_error": metrics.calibration_error,
            "length_correlation": metrics.length_correlation,
            "offset": model.offset,
        }

    def make_ppo(self, name: str = "ppo", **ptx: Any) -> dict[str, Any]:
        """Reinforce against the reward model."""
        settings = {name: value for name, value in self.settings.items() if name != "beta"}
        reward = RewardModel.from_pretrained(self.out / "reward")
        envs = self.envs(self.out / "sft", "train", reward, beta=self.settings["beta"])
        agent = PPO(envs, seed=self.options.seed, **settings, **ptx)
        agent.learn(self.size.ppo_tokens, progress_bar=True)
        save(agent.policy.model, self.out / name)
        write_json(self.out / f"{name}.json", agent.history)
        last = agent.history[-5:]
        return {
            "reward": float(np.mean([row["rollout/task_reward"] for row in last])),
            "kl": float(np.mean([row["rollout/kl"] for row in last])),
        }

    def make_ppo_ptx(self) -> dict[str, Any]:
        """The same with pretraining text mixed in."""
        stream = pack(corpus.make_corpus(self.size.corpus_tokens // 4, seed=self.options.seed + 1))
        width = 48
        rows = stream[: len(stream) // width * width].reshape(-1, width)
        return self.make_ppo("ppo_ptx", ptx_coef=0.5, ptx_data=rows)

    def make_judged(self) -> dict[str, Any]:
        """The gold standard's only appearance: every policy's answers to unseen requests."""
        requests = requests_of("test")[: self.size.judged_prompts]
        reward = RewardModel.from_pretrained(self.out / "reward")
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
            {"prompt": r.prompt, "family": r.family} | {name: texts[name][i] for name in POLICIES}
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

    def answer(self, model: Path, envs: Any, ids: NDArray[np.int64], seed: int) -> list[str]:
        """Answers of a model to prompts of an environment that was made around it, at temperature 1."""
        agent = Sampler(envs.unwrapped, seed)
        return envs.unwrapped.completions(run_prompts(agent, envs.unwrapped, ids))

    def test_answers(self, name: str, split: str, n: int) -> list[str]:
        """One answer per unseen request."""
        requests = requests_of(split)[:n]
        rows: list[Any] = [r.prompt for r in requests]
        model = self.out / name
        if name == "few_shot":
            examples = [row for row in prompt_rows("train") if row["demonstration"] is not None][:4]
            shots = [line for row in examples for line in (row["prompt"], row["demonstration"])]
            rows, model = [format_turns([*shots, prompt]) for prompt in rows], self.out / "base"
        envs = self.envs(model, split, None, prompts=rows)
        return self.answer(model, envs, np.arange(n), seed=self.options.seed + 17)

    def kl(self, name: str) -> float:
        """KL(policy || sft) per answer to unseen requests, nats."""
        ids = np.arange(min(256, self.size.judged_prompts))
        envs = self.envs(self.out / "sft", "test", None, prompts=[r.prompt for r in requests_of("test")[: len(ids)]])
        policy = self.envs(self.out / name, "test", None, prompts=["a"]).unwrapped.reference
        policy.max_tokens = envs.unwrapped.max_tokens
        envs.unwrapped.attach_policy(policy, pay=False)
        agent = Sampler(envs.unwrapped, self.options.seed + 18, policy)
        return float(run_prompts(agent, envs.unwrapped, ids).kl.mean())

    def held_out_rankings(self) -> dict[str, Any]:
        """Answers to validation prompts, ranked by people whom the reward model has not learned from."""
        rng = np.random.default_rng([self.options.seed, 4])
        requests = requests_of("validation")[: self.size.ranked_prompts]
        envs = self.envs(self.out / "sft", "validation", None)
        answers = self.answer(self.out / "sft", envs, np.repeat(np.arange(len(requests)), 4), self.options.seed + 5)
        rows = []
        for i, request in enumerate(requests):
            labeler = labelers.HELD_OUT_LABELERS[i % len(labelers.HELD_OUT_LABELERS)]
            texts = answers[4 * i : 4 * i + 4]
            ranks = [int(r) for r in labeler.rank(request, texts, rng)]
            rows.append({"prompt": request.prompt, "completions": texts, "ranks": ranks})
        return {"requests": requests, "labeled": rows}

    def _claim(self) -> None:
        """Take the directory, or go on in it; refuse one that another seed or size has begun."""
        mine = {"seed": self.options.seed, "size": self.options.size}
        settings, stages = self.out / "settings.json", self.out / "stages.json"
        if settings.exists():
            found = json.loads(settings.read_text())
            if found != mine:
                raise ValueError(
                    f"{self.out} holds a run with {found}, not {mine}: choose another --out, or remove it."
                )
            self.done = json.loads(stages.read_text()) if stages.exists() else {}
        else:
            self.out.mkdir(parents=True, exist_ok=True)
            write_json(settings, mine)


DESCRIPTIONS = {
    "base": "a small Llama reads the web, lies and rudeness included",
    "sft": "it imitates people's demonstrations",
    "rankings": "simulated labelers rank its answers",
    "reward": "a reward model learns from the rankings",
    "ppo": "PPO against the reward model, held near sft by the KL",
    "ppo_ptx": "the same, with pretraining text mixed in",
    "judged": "the gold standard sees the answers, for the first time",
}


class Sampler:
    """Samples from an environment's reference model, or from another one."""

    def __init__(self, lanes: Any, seed: int, lm: Any = None) -> None:
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


def neutral_loss(model: Any) -> float:
    """Loss on text without lies or rudeness, nats per token: what alignment costs in language."""
    return language_model_loss(model, pack(corpus.make_neutral_text(20_000)))


def save(model: Any, path: Path) -> None:
    """A model with its tokenizer, whole or not at all."""
    with replaced(path) as scratch, quiet_loading():
        model.save_pretrained(scratch)
        assistant_tokenizer().save_pretrained(scratch)


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A scratch directory that becomes `path` when all went well."""
    scratch = path.with_name(f".{path.name}.part")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    yield scratch
    shutil.rmtree(path, ignore_errors=True)
    os.replace(scratch, path)


def write_text(path: Path, text: str) -> None:
    """Write a file, whole or not at all."""
    scratch = path.with_name(f".{path.name}.part")
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, path)


def write_json(path: Path, value: Any) -> None:
    """The same, as JSON."""
    write_text(path, json.dumps(value, indent=1) + "\n")


@contextmanager
def bar(what: str, total: float) -> Iterator[Callable[[float, str], None]]:
    """A progress bar with time left; yields `advance(done, figures)`."""
    columns = (
        TextColumn("    {task.description}"),
        BarColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}"),
    )
    with Progress(*columns) as progress:
        task = progress.add_task(what, total=total, figures="")
        yield lambda done, figures: progress.update(task, completed=done, figures=figures)


def run_demo(options: DemoArguments) -> None:
    """Run the recipe and write its report."""
    from benchmarks.instructgpt_report import write_report

    torch.set_num_threads(options.threads)
    recipe = Recipe(options)
    already = all(stage in recipe.done for stage in STAGES)
    done = recipe.run()
    summary = {"settings": asdict(options) | {"out": str(options.out)}, "stages": done}
    write_json(options.out / "summary.json", summary)
    write_report(summary, options.out)
    total = sum(stage["seconds"] for stage in done.values())
    recipe.console.print(
        f"\n{'Finished before; ' if already else ''}{total / 60:.1f} minutes in all. "
        f"Open {options.out / 'report.html'}; the same figures are in {options.out / 'summary.json'}."
    )


__all__ = ["DemoArguments", "Recipe", "run_demo"]

if __name__ == "__main__":
    import tyro

    run_demo(tyro.cli(DemoArguments, description="The recipe of InstructGPT in miniature."))
