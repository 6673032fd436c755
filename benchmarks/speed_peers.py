"""The other side of `textenv bench speed`: the same work as people do it with the libraries that they have.

Plain padded rows, the libraries' own loops, the fastest micro-batch; no step that their users would leave out, and none that
they would put in. TRL with `transformers` generation: no vLLM, which does not serve two CPU cores.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from benchmarks.speed_measure import Run, Stopwatch
from benchmarks.speed_work import EOS, PAD, variety

# ---------------------------------------------------------------------- writing


def generate(model: Any, tokenizer: Any, prompts: Sequence[str], lanes: int, budget: int) -> int:
    """`model.generate`, one left-padded batch after another. Returns tokens up to the stop token, padding not counted."""
    from transformers import GenerationConfig

    settings = GenerationConfig(
        do_sample=True, top_k=0, max_new_tokens=budget, pad_token_id=PAD, bos_token_id=None, eos_token_id=EOS
    )
    total = 0
    for begin in range(0, len(prompts), lanes):
        batch = tokenizer(prompts[begin : begin + lanes], return_tensors="pt", padding=True)
        rows = model.generate(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], generation_config=settings
        )
        written = rows[:, batch["input_ids"].shape[1] :]
        ended = written == EOS
        total += int(torch.where(ended.any(1), ended.int().argmax(1) + 1, written.shape[1]).sum())
    return total


# ---------------------------------------------------------------------- TRL


@dataclass(frozen=True, kw_only=True)
class TRLSettings:
    """One of TRL's trainers at work."""

    algorithm: str
    """`RLOO` or `GRPO`."""
    model: str
    """Directory of the model: policy and reference are read from it."""
    episodes: int
    """Per iteration, with one optimiser step."""
    group_size: int
    budget: int
    """Tokens per completion at most."""
    beta: float
    learning_rate: float
    micro_batch: int
    """Episodes per forward and backward pass."""
    checkpointing: bool = False
    """Gradient checkpointing, TRL's default: less memory for more time."""


@contextmanager
def quiet() -> Iterator[None]:
    """Without progress bars, advice and log lines, which would stand among the rows."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


class TRL:
    """One of TRL's trainers, whose iterations can be watched.

    Args:
        settings: What it trains.
        tokenizer: The model's.
        prompts: Texts.
    """

    def __init__(self, settings: TRLSettings, tokenizer: Any, prompts: Sequence[str]) -> None:
        import trl
        from datasets import Dataset, disable_progress_bars

        disable_progress_bars()
        self.settings = settings
        self.tokens = 0
        if settings.episodes % settings.micro_batch:
            raise ValueError(
                f"Expected micro_batch to divide {settings.episodes} episodes, got {settings.micro_batch}."
            )
        config, trainer = getattr(trl, f"{settings.algorithm}Config"), getattr(trl, f"{settings.algorithm}Trainer")
        grpo = {"loss_type": "grpo", "scale_rewards": "group"} if settings.algorithm == "GRPO" else {}
        with quiet():
            self.trainer = trainer(
                model=settings.model,
                args=config(
                    output_dir=f"{settings.model}-trl",
                    per_device_train_batch_size=settings.micro_batch,
                    gradient_accumulation_steps=settings.episodes // settings.micro_batch,
                    num_generations=settings.group_size,
                    max_completion_length=settings.budget,
                    beta=settings.beta,
                    learning_rate=settings.learning_rate,
                    lr_scheduler_type="constant",
                    max_steps=1,
                    gradient_checkpointing=settings.checkpointing,
                    bf16=False,
                    use_cpu=True,
                    dataloader_pin_memory=False,
                    model_init_kwargs={"dtype": "float32"},
                    save_strategy="no",
                    report_to="none",
                    disable_tqdm=True,
                    log_level="error",
                    **grpo,
                ),
                reward_funcs=self.reward,
                train_dataset=Dataset.from_dict({"prompt": list(prompts)}),
                processing_class=tokenizer,
            )
        from transformers import PrinterCallback

        self.trainer.remove_callback(PrinterCallback)

    def reward(self, completion_ids: list[list[int]], **columns: Any) -> list[float]:
        """The reward of the run; it also counts tokens, where TRL shows them."""
        self.tokens += sum(map(len, completion_ids))
        return variety(completion_ids)

    def run(
        self, iterations: int, threads: int | Sequence[int], between: Callable[[], None] = lambda: None
    ) -> list[Run]:
        """Train, as `trainer.train()` does.

        Args:
            iterations: Each one rollout and one optimiser step.
            threads: Of each iteration, or of all.
            between: Called after each iteration, off the clock: the other side's turn.

        Returns:
            One run per iteration.
        """
        from transformers import TrainerCallback

        per_iteration = [threads] * iterations if isinstance(threads, int) else threads
        runs: list[Run] = []
        outer = self

        class Clock(TrainerCallback):
            def on_step_begin(self, *_: Any, **__: Any) -> None:
                outer.tokens = 0
                self.watch = Stopwatch(per_iteration[len(runs)])

            def on_step_end(self, *_: Any, **__: Any) -> None:
                runs.append(self.watch.stop(outer.tokens))
                between()

        clock = Clock()
        self.trainer.args.max_steps = iterations
        self.trainer.add_callback(clock)
        with quiet():
            self.trainer.train()
        self.trainer.remove_callback(clock)
        return runs


# ---------------------------------------------------------------------- PPO, one row per (prefix, token)


@dataclass(frozen=True)
class Rows:
    """Every token of a rollout as a row of its own. R rows."""

    prefixes: list[NDArray[np.int64]]
    """The tokens before it."""
    actions: torch.Tensor
    """The token. Shape: (R,)."""
    old_log_probs: torch.Tensor
    """Shape: (R,), nats."""
    advantages: torch.Tensor
    """Shape: (R,)."""
    old_values: torch.Tensor
    """Shape: (R,)."""
    returns: torch.Tensor
    """Shape: (R,)."""

    def __len__(self) -> int:
        return len(self.prefixes)


def prefix_row_update(
    model: Any,
    value_head: nn.Module,
    optimizer: torch.optim.Optimizer,
    rows: Rows,
    minibatches: Sequence[NDArray[np.int64]],
    micro_batch: int,
    clip_range: float = 0.2,
    vf_coef: float = 0.1,
) -> int:
    """PPO's update on (prefix, token) rows, as RL4LMs and stable-baselines3 do it: each row encodes its prefix again.

    Args:
        model: The policy.
        value_head: From its last hidden state, (R, d) -> (R, 1).
        optimizer: Of both.
        rows: The rollout.
        minibatches: Rows of each optimiser step.
        micro_batch: Rows per forward and backward pass; gradients are accumulated.
        clip_range: Of ratios and of values.
        vf_coef: Weight of the value loss.

    Returns:
        Tokens that were given a gradient.
    """
    count = 0
    for minibatch in minibatches:
        for begin in range(0, len(minibatch), micro_batch):
            part = minibatch[begin : begin + micro_batch]
            ids, mask = _left_padded([rows.prefixes[i] for i in part])
            hidden = model.base_model(
                input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), use_cache=False
            ).last_hidden_state[:, -1]
            logits = model.get_output_embeddings()(hidden)  # of the last position only: the others are not needed
            log_probs = logits.log_softmax(-1).gather(1, rows.actions[part, None]).squeeze(1)
            values = value_head(hidden).squeeze(1)
            ratio = torch.exp(log_probs - rows.old_log_probs[part])
            advantages, old_values, returns = rows.advantages[part], rows.old_values[part], rows.returns[part]
            clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
            policy_loss = torch.maximum(-advantages * ratio, -advantages * clipped).sum()
            near = old_values + (values - old_values).clamp(-clip_range, clip_range)
            value_loss = 0.5 * torch.maximum((values - returns) ** 2, (near - returns) ** 2).sum()
            ((policy_loss + vf_coef * value_loss) / len(minibatch)).backward()
            count += len(part)
        nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return count


def _left_padded(prefixes: Sequence[NDArray[np.int64]]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, prefixes))
    ids = np.full((len(prefixes), width), PAD)
    mask = np.zeros((len(prefixes), width), np.int64)
    for row, prefix in enumerate(prefixes):
        ids[row, width - len(prefix) :] = prefix
        mask[row, width - len(prefix) :] = 1
    return torch.from_numpy(ids), torch.from_numpy(mask)


def sb3_update(envs: Any, steps: int, minibatches: int, learning_rate: float) -> Callable[[], int]:
    """The same update by stable-baselines3's own PPO, whose policy is our `LMPolicy`.

    Args:
        envs: A textenv vector environment.
        steps: Of every lane: the rollout is `steps` times lanes rows.
        minibatches: Optimiser steps; it takes a minibatch in one pass.
        learning_rate: Adam's.

    Returns:
        The update. It returns the tokens that were given a gradient.
    """
    from stable_baselines3 import PPO

    from agents.sb3 import LMPolicy, as_vec_env

    rows = steps * envs.num_envs
    model = PPO(
        LMPolicy,
        as_vec_env(envs),
        n_steps=steps,
        batch_size=rows // minibatches,
        n_epochs=1,
        gamma=1.0,
        learning_rate=learning_rate,
        seed=0,
        device="cpu",
    )
    model.learn(rows)  # fills its buffer

    def update() -> int:
        model.train()
        return rows

    return update


# ---------------------------------------------------------------------- the floor


def bare_iteration(
    policy: Any,
    reference: Any,
    reward_model: Any,
    prompts: torch.Tensor,
    budget: int,
    minibatch: int,
    epochs: int,
) -> int:
    """The matrix work of a PPO iteration and nothing else: no sampling, no environment, no advantages, no optimiser.

    Args:
        policy: Decodes, and gets a gradient.
        reference: Scores the responses.
        reward_model: A sequence classifier, reads the whole texts.
        prompts: All of one length, so that no row needs padding. Shape: (B, P).
        budget: Response tokens. They are drawn beforehand: what is decoded does not depend on what is written.
        minibatch: Episodes per backward pass.
        epochs: Passes over the episodes.

    Returns:
        Tokens that were decoded.
    """
    written = torch.randint(EOS + 2, policy.config.vocab_size, (len(prompts), budget))
    whole = torch.cat([prompts, written], dim=1)
    with torch.no_grad():
        cache = policy(input_ids=prompts, use_cache=True, logits_to_keep=1).past_key_values
        for t in range(budget - 1):
            cache = policy(input_ids=written[:, t : t + 1], past_key_values=cache, use_cache=True).past_key_values
        reference(input_ids=whole[:, :-1], use_cache=False, logits_to_keep=budget)
        reward_model(input_ids=whole, use_cache=False)
    for _ in range(epochs):
        for rows in whole.split(minibatch):
            logits = policy(input_ids=rows[:, :-1], use_cache=False, logits_to_keep=budget).logits
            F.cross_entropy(logits.flatten(0, 1), rows[:, -budget:].flatten()).backward()
        policy.zero_grad(set_to_none=True)
    return written.numel()
