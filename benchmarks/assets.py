"""How the shipped models are made.

Run: python -m benchmarks.assets arithmetic
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from agents.pretraining import PretrainingConfig, PretrainingProgress, pretrain
from textenv.tasks import arithmetic
from textenv.tokenizer import character_tokenizer


def build_arithmetic(path: Path = arithmetic.ASSET, steps: int = 1500) -> None:
    """Pretrain the arithmetic model on text of which 15% is right; took five minutes of CPU time on one core."""
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


def _report(progress: PretrainingProgress) -> None:
    if progress.step % 100 == 0:
        print(f"step {progress.step}/{progress.steps}  loss {progress.loss:.3f}  {progress.seconds:.0f} s", flush=True)


BUILDERS = {"arithmetic": build_arithmetic}

if __name__ == "__main__":
    torch.set_num_threads(1)
    if len(sys.argv) != 2 or sys.argv[1] not in BUILDERS:
        sys.exit(f"usage: python -m benchmarks.assets {{{','.join(BUILDERS)}}}")
    BUILDERS[sys.argv[1]]()
