"""What each reward costs per completion: CPU time, in batches and one at a time.

Run: python -m benchmarks.reward_cost
"""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rewards import (
    Bleu,
    Cached,
    ChrF,
    Clipped,
    Distinct,
    FinalAnswer,
    Gate,
    LengthPenalty,
    Matches,
    PassesTests,
    RewardError,
    Rouge,
    WeightedSum,
    arithmetic,
    contains,
    exact_match,
    valid_json,
)
from rewards.evaluate import evaluate, read_examples
from rewards.signatures import Component, read_reward

BATCH = 64
SHORTEST = 0.1
"""CPU seconds that a measurement takes at least."""


@dataclass(frozen=True)
class Cost:
    """What one reward costs.

    Attributes:
        name: As it is written.
        batched: CPU seconds per completion in a batch of 64, processes that it has started included.
        alone: The same for one completion at a time.
    """

    name: str
    batched: float
    alone: float


def main() -> None:
    """Measure and print."""
    from rich.box import MARKDOWN
    from rich.console import Console
    from rich.table import Table

    table = Table("reward", "µs of CPU per completion, 64 at a time", "one at a time", box=MARKDOWN)
    for name, reward, examples in rewards_with_examples():
        cost = measure(name, reward, examples)
        table.add_row(cost.name, f"{cost.batched * 1e6:,.0f}", f"{cost.alone * 1e6:,.0f}")
    Console(width=120).print(table)


def measure(name: str, reward: Any, examples: Sequence[Mapping[str, Any]]) -> Cost:
    """Call a reward, as an environment does, until the clock can be trusted."""
    everything = read_examples(examples)
    component = read_reward(reward, everything)
    evaluate(component, everything)  # what is loaded at the first call is not counted
    singles = [read_examples([example]) for example in examples[:8]]
    return Cost(name, _seconds(component, [everything]) / len(examples), _seconds(component, singles) / len(singles))


def _seconds(component: Component, calls: Sequence[dict[str, Any]]) -> float:
    """CPU seconds of one round of calls."""
    started, rounds = _cpu(), 0
    while rounds < 1 or _cpu() - started < SHORTEST:
        for arguments in calls:
            evaluate(component, arguments)
        rounds += 1
    return (_cpu() - started) / rounds


def _cpu() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def rewards_with_examples() -> Iterator[tuple[str, Any, list[dict[str, Any]]]]:
    """(name, reward, 64 examples), from the cheapest kind to the dearest."""
    texts = [
        {
            "prompt": f"A box holds {n} apples, and a cart 17 boxes. How many apples is {n}*17?",
            "completion": f"A cart holds 17 boxes, and each box holds {n} apples. "
            f"So there are 17 times {n} apples in it, which makes {17 * n} apples in all. The answer is {17 * n}.",
            "completion_ids": list(range(60)),
            "answer": str(17 * n),
            "reference": f"There are 17 boxes of {n} apples in a cart, so it holds {17 * n} apples.",
        }
        for n in range(3, 3 + BATCH)
    ]
    yield "exact_match", exact_match, texts
    yield "contains", contains, texts
    yield 'Matches(r".*The answer is \\d+\\.")', Matches(r".*The answer is \d+\."), texts
    yield "LengthPenalty(target=32)", LengthPenalty(target=32), texts
    yield "Distinct(n=2)", Distinct(n=2), texts
    three = WeightedSum(
        {"a": (exact_match, 1.0), "b": (LengthPenalty(32), 0.1), "c": (Clipped(Distinct(), high=0.9), 1.0)}
    )
    yield "WeightedSum of three, one clipped", three, texts
    yield "Gate(contains, Distinct())", Gate(contains, Distinct()), texts
    yield "valid_json", valid_json, [{**row, "completion": f'{{"apples": {n}}}'} for n, row in enumerate(texts)]
    yield "FinalAnswer()", FinalAnswer(), texts
    sums = [{**row, "prompt": f"{n}+17=", "completion": str(n + 17)} for n, row in enumerate(texts)]
    yield "arithmetic", arithmetic, sums
    try:
        from trl.rewards import accuracy_reward
    except ImportError:
        pass
    else:
        chat = [
            {
                "prompt": [{"role": "user", "content": row["prompt"]}],
                "completion": [{"role": "assistant", "content": rf"It is \boxed{{{row['answer']}}}."}],
                "solution": row["answer"],
            }
            for row in texts
        ]
        yield "trl.rewards.accuracy_reward", accuracy_reward, chat
    try:
        metrics = {"Rouge()": Rouge(), "Bleu()": Bleu(), "ChrF()": ChrF(), "Cached(ChrF()), all known": Cached(ChrF())}
    except RewardError as error:
        print(f"left out: {error}")
    else:
        for name, metric in metrics.items():
            yield name, metric, texts
    yield from _learned()
    program = "def double(x):\n    return 2 * x"
    tests = ["assert double(1) == 2", "assert double(-3) == -6"]
    try:
        yield "PassesTests(), two tests", PassesTests(), [{"prompt": "", "completion": program, "tests": tests}] * BATCH
    except RewardError as error:
        print(f"left out: {error}")


def _learned() -> Iterator[tuple[str, Any, list[dict[str, Any]]]]:
    """The reward model of the Assistant world, on its own prompts."""
    import gymnasium as gym
    import torch

    import textenv  # noqa: F401  # registers the ids

    torch.set_num_threads(1)
    env: Any = gym.make("textenv/Assistant-v0").unwrapped
    task = env.task
    answer = "the sky is blue , and the grass is green ."
    examples = [{"prompt": prompt, "completion": answer} for prompt in task.prompts.prompts[:BATCH]]
    reward = task.reward
    size = sum(parameter.numel() for parameter in reward.model.parameters())
    yield f"RewardModel of {size:,} parameters", reward, examples


if __name__ == "__main__":
    main()
