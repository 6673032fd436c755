"""Simulated labelers: people who rank answers by what they are worth, how they feel today, and how long they are.

A labeler weighs the four criteria of the gold standard in their own way, likes longer answers a little, and is noisy:
two of them agree on about 73% of the pairs of the recipe's answers, as InstructGPT's did (72.6% among training labelers;
Ouyang et al., 2022, section 5.2). So a reward model that learns from them inherits a taste for length that the gold standard does not share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from textenv.tasks.assistant.gold import assess
from textenv.tasks.assistant.requests import Request

CRITERIA = ("helpful", "truthful", "harmless", "concise")


@dataclass(frozen=True)
class Labeler:
    """Somebody who ranks answers.

    Attributes:
        helpful: What this criterion counts; as do the next three.
        truthful: See `helpful`.
        harmless: See `helpful`.
        concise: See `helpful`.
        length_taste: Worth of ten more words, up to twenty words in all.
        noise: Standard deviation of the mood that each answer is met with.
    """

    helpful: float = 0.6
    truthful: float = 0.125
    harmless: float = 0.15
    concise: float = 0.125
    length_taste: float = 0.05
    noise: float = 0.1

    def worth(self, request: Request, answer: str) -> float:
        """What the answer is worth to this person on an even day."""
        judgement = assess(request, answer)
        weighed = sum(getattr(self, name) * getattr(judgement, name) for name in CRITERIA)
        return float(weighed + self.length_taste * min(judgement.words, 20) / 10)

    def rank(self, request: Request, answers: Sequence[str], rng: np.random.Generator) -> NDArray[np.int64]:
        """Ranks, 1 the best; the same text gets the same rank. Shape: (K,)."""
        texts = list(dict.fromkeys(answers))
        felt = {text: self.worth(request, text) + self.noise * rng.standard_normal() for text in texts}
        order = sorted(texts, key=lambda text: -felt[text])
        return np.asarray([order.index(text) + 1 for text in answers], np.int64)


NOISELESS = Labeler(length_taste=0.0, noise=0.0)
"""The gold standard as a labeler: nobody agrees with people more, without knowing their moods."""

TRAINING_LABELERS = (
    Labeler(),
    Labeler(helpful=0.7, truthful=0.1, harmless=0.1, concise=0.1),
    Labeler(helpful=0.5, truthful=0.2, harmless=0.2, concise=0.1),
    Labeler(length_taste=0.09),
    Labeler(length_taste=0.01, concise=0.15),
    Labeler(helpful=0.65, truthful=0.15, harmless=0.1, concise=0.1, length_taste=0.07),
    Labeler(helpful=0.55, truthful=0.1, harmless=0.2, concise=0.15, length_taste=0.03),
    Labeler(helpful=0.5, truthful=0.25, harmless=0.15, concise=0.1),
    Labeler(helpful=0.6, truthful=0.1, harmless=0.1, concise=0.2, length_taste=0.03),
    Labeler(helpful=0.65, truthful=0.1, harmless=0.2, concise=0.05, length_taste=0.07),
)
"""Those whose rankings the reward model learns from."""

HELD_OUT_LABELERS = (
    Labeler(helpful=0.45, truthful=0.3, harmless=0.15, concise=0.1, length_taste=0.04),
    Labeler(helpful=0.45, truthful=0.1, harmless=0.35, concise=0.1, length_taste=0.04),
    Labeler(helpful=0.65, truthful=0.1, harmless=0.05, concise=0.2, length_taste=0.0),
)
"""Others, who weigh the criteria differently."""


def agreement(
    first: Labeler, second: Labeler, cases: Sequence[tuple[Request, Sequence[str]]], rng: np.random.Generator
) -> float:
    """Share of pairs of different answers that two people rank alike."""
    agreed, pairs = 0, 0
    for request, answers in cases:
        a, b = first.rank(request, answers, rng), second.rank(request, answers, rng)
        for i in range(len(answers)):
            for j in range(i):
                if a[i] != a[j]:
                    agreed += int((a[i] < a[j]) == (b[i] < b[j]))
                    pairs += 1
    return agreed / pairs
