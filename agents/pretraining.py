"""Pretraining: next-token prediction on one long stream of tokens.

Makes a base model from nothing, or continues the training of any ``transformers`` causal language model.
The stream is documents laid end to end; each batch is blocks cut from it at random.

Example:
    >>> model = LlamaForCausalLM(config)
    >>> report = pretrain(model, stream, PretrainingConfig(steps=1000), seed=0, on_step=print)
    >>> held_out_loss = language_model_loss(model, held_out_stream)

Notation: B blocks per batch, T tokens per block, N tokens in the stream.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from agents.optim import Muon


@dataclass(frozen=True, kw_only=True)
class PretrainingConfig:
    """How to pretrain. The defaults suit a Llama of width 128 and a small vocabulary, on one CPU thread."""

    steps: int = 2200
    """Gradient steps; the time taken is proportional to it."""
    batch_size: int = 12
    """B: blocks per step. For the same number of tokens, more and smaller steps learnt to copy from the text earlier."""
    block_length: int = 64
    """T: tokens per block. Long enough that an answer mostly has its question in the same block."""
    learning_rate: float = 5e-3
    """AdamW's at the peak, after the warm-up."""
    matrix_learning_rate: float | None = None
    """Muon's, for hidden matrices; None trains them by AdamW as well."""
    final_learning_rate: float = 0.02
    """At the end of the cosine, as a share of the peak."""
    warmup_steps: int = 50
    """Steps from zero to the peak, linearly."""
    weight_decay: float = 0.01
    """AdamW's, on matrices only."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""


@dataclass(frozen=True)
class PretrainingProgress:
    """Where the training stands after a step.

    Attributes:
        step: Steps done.
        steps: Steps in all.
        loss: Of the last batch, nats per token.
        tokens: Tokens seen.
        seconds: Wall time since the start.
    """

    step: int
    steps: int
    loss: float
    tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Speed so far."""
        return self.tokens / max(self.seconds, 1e-9)

    @property
    def seconds_left(self) -> float:
        """Time to go, at the speed so far."""
        return self.seconds * (self.steps - self.step) / max(self.step, 1)


def silence_residual_branches(model: nn.Module) -> None:
    """Zeroes the output projections of attention and MLP, so that a fresh model starts as its embedding alone.

    Else a small model's random branches drown the embedding, and it learns facts and copying later.
    For models whose projections are called ``o_proj`` and ``down_proj``, as in Llama, Mistral, Qwen and Gemma.

    Raises:
        ValueError: If there are none.
    """
    weights = [p for name, p in model.named_parameters() if name.endswith(("o_proj.weight", "down_proj.weight"))]
    if not weights:
        raise ValueError(f"{type(model).__name__} has no parameters called o_proj or down_proj")
    for weight in weights:
        nn.init.zeros_(weight)


def learning_rate(step: int, config: PretrainingConfig) -> float:
    """Share of the peak: linear warm-up, then a cosine down to the final share."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(config.steps - config.warmup_steps, 1)
    return config.final_learning_rate + (1 - config.final_learning_rate) * 0.5 * (1 + math.cos(math.pi * done))


def next_token_loss(model: nn.Module, blocks: Tensor) -> Tensor:
    """Mean cross-entropy of each token given those before it.

    Args:
        model: A causal language model whose output has ``logits``. Shape of these: (B, T, V).
        blocks: Token ids. Shape: (B, T).

    Returns:
        Nats per token. Shape: ().
    """
    logits = model(input_ids=blocks[:, :-1], use_cache=False).logits
    return cross_entropy(logits.flatten(0, 1).float(), blocks[:, 1:].flatten())


def pretrain(
    model: nn.Module,
    stream: NDArray[np.int64],
    config: PretrainingConfig | None = None,
    *,
    seed: int = 0,
    on_step: Callable[[PretrainingProgress], None] | None = None,
) -> PretrainingProgress:
    """Trains a causal language model, in place, to predict the next token of a stream.

    Args:
        model: Any ``transformers`` causal language model, on any device.
        stream: Token ids of all documents, end to end. Shape: (N,).
        config: How to train.
        seed: Of the order in which blocks are drawn. The same seed, model and threads give the same weights.
        on_step: Called after each step. May raise to stop: the model keeps what it has learnt.

    Returns:
        The progress after the last step.

    Raises:
        ValueError: If the stream is shorter than a block.
    """
    config = config or PretrainingConfig()
    if len(stream) <= config.block_length:
        raise ValueError(f"a stream of {len(stream)} tokens is too short for blocks of {config.block_length}")
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.as_tensor(stream)
    offsets = torch.arange(config.block_length + 1)

    optimizer = make_optimizer(model, config)
    peaks = [group["lr"] for group in optimizer.param_groups]

    was_training = model.training
    model.train()
    start = time.perf_counter()
    progress = PretrainingProgress(0, config.steps, math.nan, 0, 0.0)
    for step in range(config.steps):
        # 1 draw
        first = torch.randint(len(tokens) - config.block_length, (config.batch_size, 1), generator=generator)
        blocks = tokens[first + offsets].to(device)
        # 2 loss
        loss = next_token_loss(model, blocks)
        optimizer.zero_grad()
        loss.backward()
        # 3 step
        nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * learning_rate(step, config)
        optimizer.step()
        # 4 report
        seen = (step + 1) * config.batch_size * config.block_length
        progress = PretrainingProgress(step + 1, config.steps, loss.item(), seen, time.perf_counter() - start)
        if on_step is not None:
            on_step(progress)
    model.train(was_training)
    return progress


def make_optimizer(model: nn.Module, config: PretrainingConfig) -> torch.optim.Optimizer:
    """AdamW, or Muon with AdamW for what is no hidden matrix."""
    if config.matrix_learning_rate is not None:
        return Muon(model, config.learning_rate, config.matrix_learning_rate, config.betas, config.weight_decay)
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)


@torch.no_grad()
def language_model_loss(
    model: nn.Module, stream: NDArray[np.int64], block_length: int = 64, batch_size: int = 64
) -> float:
    """Mean loss on a stream, cut into blocks one after another.

    Args:
        model: A causal language model.
        stream: Token ids. Shape: (N,). A last block that is not full is left out.
        block_length: Tokens predicted per block.
        batch_size: Blocks per forward pass; no influence on the result.

    Returns:
        Nats per token.

    Raises:
        ValueError: If the stream is shorter than a block.
    """
    n_blocks = (len(stream) - 1) // block_length
    if n_blocks < 1:
        raise ValueError(f"a stream of {len(stream)} tokens is too short for blocks of {block_length}")
    device = next(model.parameters()).device
    tokens = torch.as_tensor(stream)
    first = torch.arange(n_blocks)[:, None] * block_length
    blocks = tokens[first + torch.arange(block_length + 1)].to(device)
    was_training = model.training
    model.eval()
    batches = blocks.split(batch_size)
    total = sum(next_token_loss(model, batch).item() * len(batch) for batch in batches)
    model.train(was_training)
    return total / n_blocks
