"""A suite of a user's own, with agents of their own: small, and with one of each way to fail."""

import os
import time

from agents import RLOO
from benchmarks.suites import PRESETS, Preset, Suite, tree

RUNS = {"episodes_per_update": 16, "minibatch_episodes": 16}


class Mine(RLOO):
    """Ours under another name."""


class Failing(RLOO):
    """Raises in training."""

    def update(self, episodes):
        raise RuntimeError("this agent cannot learn")


class Dying(RLOO):
    """Takes its process along, at seed 0."""

    def update(self, episodes):
        if self.seed == 0:
            os._exit(9)
        super().update(episodes)


class Slow(RLOO):
    """Takes its time, so that a test can kill it in the midst of training."""

    def update(self, episodes):
        time.sleep(0.02)
        super().update(episodes)


def brevity(answers):
    """A metric of one's own."""
    return {"brevity": -float(answers.episodes.response_length.mean()), "waste": 1.0}


def mine(name: str) -> Preset:
    """An agent of this file."""
    return Preset(agent=f"{__file__}:{name}", config=RUNS, lanes=16, group_size=4)


suite = Suite(
    title="A suite of one's own",
    tasks={name: tree(name, vocab_size=3, horizon=2) for name in ("random", "trap")},
    agents={
        "RLOO": Preset(agent="RLOO", config=RUNS, lanes=16, group_size=4),
        "Mine": mine("Mine"),
        "BestOfN": PRESETS["BestOfN"],
    },
    seeds=2,
    tokens=130,
    metrics=("sampled", "exact", f"{__file__}:brevity"),
    headline="score",
    lower_is_better=("waste",),
)
