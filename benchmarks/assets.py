"""How the shipped models are made.

Run: python -m benchmarks.assets arithmetic
     python -m benchmarks.assets assistant
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from agents.pretraining import PretrainingConfig, PretrainingProgress, pretrain
from benchmarks.instructgpt import DemoArguments, Recipe
from rewards import RewardModel
from textenv.task import quiet_loading
from textenv.tasks import arithmetic
from textenv.tasks.assistant import task as assistant
from textenv.tokenizer import character_tokenizer


def build_arithmetic(path: Path = arithmetic.ASSET, steps: int = 1500) -> None:
    """Pretrain the arithmetic model on text of which 15% is right; three minutes of CPU time on one core."""
    tokenizer = character_tokenizer(arithmetic.CHARACTERS)
    lines = [[*tokenizer(line)["input_ids"], tokenizer.eos_token_id] for line in arithmetic.pretraining_text(300_000)]
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    settings = PretrainingConfig(steps=steps, batch_size=64, block_length=40, learning_rate=3e-3)
    pretrain(model, np.concatenate(lines), settings, on_step=_report)
    model.half().save_pretrained(path)  # half the size; it is read in float32
    tokenizer.save_pretrained(path)


def build_assistant(path: Path = assistant.ASSETS, run: Path = Path("runs/demo")) -> None:
    """Run the recipe (`textenv demo`), and keep base, fine-tuned and reward model, with a card that says what they can do."""
    done = Recipe(DemoArguments(out=run)).run()
    with quiet_loading():
        for name in ("base", "sft"):
            model = AutoModelForCausalLM.from_pretrained(run / name)
            model.half().save_pretrained(path / name)
            assistant.assistant_tokenizer().save_pretrained(path / name)
        reward = RewardModel.from_pretrained(run / "reward")
        reward.model.half()
        reward.save_pretrained(path / "reward")
    # Rounded weights draw other answers: the card's figures are those of the models as they come.
    shipped = Recipe(DemoArguments(out=run / "shipped"))
    for name in ("base", "sft", "reward", "ppo", "ppo_ptx"):
        place = shipped.out / name
        place.unlink(missing_ok=True)
        place.symlink_to(((run if name.startswith("ppo") else path) / name).resolve())
    judged = shipped.make_judged()
    figures = {"reward": shipped.reward_figures(), "judged": judged["rows"], "prompts": judged["prompts"]}
    (path / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    (path / "README.md").write_text(card(figures, sum(stage["seconds"] for stage in done.values())))


def card(figures: dict[str, Any], seconds: float) -> str:
    """The model card of the Assistant world's models."""
    rows, reward = figures["judged"], figures["reward"]
    lines = [
        f"| {name} | {row['gold']:.3f} | {row['obeyed']:.0%} | {row['false_facts']:.0%} | {row['rude']:.1%} | {row['neutral_loss']:.3f} |"
        for name, row in rows.items()
        if name in ("base", "sft", "ppo_ptx")
    ]
    return CARD.format(
        rows="\n".join(lines),
        prompts=figures["prompts"],
        minutes=seconds / 60,
        held_out=reward["accuracy_held_out_labelers"],
        noiseless=reward["accuracy_noiseless_labeler"],
        share=reward["share_of_noiseless"],
        own=reward["share_among_fine_tuned"],
        agree=reward["labelers_agree"],
        length=reward["accuracy_length_alone"],
        ceiling=rows["ceiling"]["gold"],
    )


CARD = """# The models of `textenv/Assistant-v0`

Three Llamas of two layers and width 128 (385,000 parameters each), in half precision, English of 446 words.

- `base/` has read three million tokens of the world's web, with its lies and its rudeness.
- `sft/` has imitated 1,500 demonstrations. It is the environment's reference model, and what policies start from.
- `reward/` has learned from simulated labelers' rankings of their answers. It is the environment's reward.

```bash
python -m benchmarks.assets assistant    # {minutes:.0f} minutes on two cores: the models of `textenv demo --seed 0`
```

On {prompts} requests that no stage had seen, one answer each at temperature 1, judged by the gold standard (ideal answers score
{ceiling:.3f}); PPO-ptx, which is not shipped, stands beside them. (Weights in half precision draw other answers than the demo's, so figures differ a
little from those of its report. "Obeyed" is whether the request was carried out, right or wrong; "helpful", there, also whether rightly.)

| model | gold score | instruction obeyed | false facts | rude | loss on neutral text, nats |
|---|---|---|---|---|---|
{rows}

The reward model agrees with held-out labelers on {held_out:.1%} of the pairs of different ranks; the gold standard without any noise agrees on
{noiseless:.1%} (training labelers with each other: {agree:.1%}), so it reaches {share:.1%} of that; {own:.1%} among answers of the fine-tuned model alone; "the longer answer is better" on {length:.1%}.

Meant for experiments with reinforcement learning; the models know nothing outside their small world. Their text holds insults
and advice to do harm to the world's people and animals on purpose: so that harm can be measured, and unlearnt.
"""


def _report(progress: PretrainingProgress) -> None:
    if progress.step % 100 == 0:
        print(f"step {progress.step}/{progress.steps}  loss {progress.loss:.3f}  {progress.seconds:.0f} s", flush=True)


BUILDERS: dict[str, Callable[[], None]] = {"arithmetic": build_arithmetic, "assistant": build_assistant}

if __name__ == "__main__":
    torch.set_num_threads(2)
    if len(sys.argv) != 2 or sys.argv[1] not in BUILDERS:
        sys.exit(f"usage: python -m benchmarks.assets {{{','.join(BUILDERS)}}}")
    BUILDERS[sys.argv[1]]()
