"""Plain rewards on text, one idea each; they also show how to write one.

The metrics of summaries and translations (:class:`Rouge`, :class:`Bleu`, :class:`ChrF`) are those of the libraries that papers
report: ``pip install textenv[text]``.

Notation: B completions per call; every reward returns B floats, or ``None`` where it does not apply.
"""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rewards.base import Completion, RewardError, completion_text, did_you_mean


def exact_match(completions: Sequence[Completion], answer: Sequence[Any], **columns: Any) -> list[float | None]:
    r"""1 if the completion is the answer, up to white space around it; else 0.

    Args:
        completions: B completions.
        answer: Column of B answers; ``None`` where there is none.
        **columns: Ignored.

    Returns:
        B values, each 0, 1 or ``None``.

    Example:
        >>> exact_match(completions=[" 42\n", "43"], answer=[42, 42])
        [1.0, 0.0]
    """
    return [
        None if expected is None else float(completion_text(completion).strip() == str(expected).strip())
        for completion, expected in zip(completions, answer, strict=True)
    ]


def contains(completions: Sequence[Completion], answer: Sequence[Any], **columns: Any) -> list[float | None]:
    """1 if the answer occurs in the completion as whole words, whatever the case; else 0.

    Whole words, since otherwise the answer 12 would be found in 312.

    Args:
        completions: B completions.
        answer: Column of B answers; ``None`` where there is none.
        **columns: Ignored.

    Returns:
        B values, each 0, 1 or ``None``.

    Raises:
        RewardError: An answer is empty: it would be found anywhere.

    Example:
        >>> contains(completions=["It is Paris.", "It is 312."], answer=["paris", "12"])
        [1.0, 0.0]
    """
    rewards: list[float | None] = []
    for completion, expected in zip(completions, answer, strict=True):
        if expected is None:
            rewards.append(None)
            continue
        words = str(expected).strip()
        if not words:
            raise RewardError("the column `answer` holds an empty text; expected some words, or None")
        pattern = rf"(?<!\w){re.escape(words)}(?!\w)"
        rewards.append(float(re.search(pattern, completion_text(completion), re.IGNORECASE) is not None))
    return rewards


@dataclass(frozen=True)
class Matches:
    r"""1 if a regular expression matches the whole completion (white space around it aside), else 0.

    Args:
        pattern: In the syntax of :mod:`re`; ``.`` matches newlines too.

    Raises:
        RewardError: The pattern is no regular expression.

    Example:
        >>> Matches(r"<think>.*</think>.*\d+")(completions=["<think>6*7</think> 42", "42"])
        [1.0, 0.0]
    """

    pattern: str

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise RewardError(f"Matches got the pattern {self.pattern!r}: {error}") from error

    def __call__(self, completions: Sequence[Completion], **columns: Any) -> list[float]:
        """Score B completions."""
        return [
            float(re.fullmatch(self.pattern, completion_text(completion).strip(), re.DOTALL) is not None)
            for completion in completions
        ]


@dataclass(frozen=True)
class LengthPenalty:
    """0 up to a target length; beyond it minus the excess, in units of the target.

    So twice the target costs 1, whatever the target, and there is no reward for being shorter still.

    Args:
        target: Longest completion without a penalty, in tokens.

    Raises:
        RewardError: The target is not positive.

    Example:
        >>> LengthPenalty(target=4)(completion_ids=[[1, 2], [1, 2, 3, 4, 5]])
        [0.0, -0.25]
    """

    target: int

    def __post_init__(self) -> None:
        if self.target <= 0:
            raise RewardError(f"LengthPenalty got target={self.target}; expected a positive number of tokens")

    def __call__(self, completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float]:
        """Score B completions by their numbers of tokens."""
        return [min(0.0, 1.0 - len(ids) / self.target) for ids in completion_ids]


@dataclass(frozen=True)
class Distinct:
    """Share of distinct n-grams among the n-grams of words in a completion, in (0, 1]: 1 is no repetition.

    "distinct-n" of Li et al. (2016), https://arxiv.org/abs/1510.03055, within one completion.

    Args:
        n: Words per n-gram. A completion of fewer than n words repeats nothing and scores 1.

    Raises:
        RewardError: ``n`` is not positive.

    Example:
        >>> Distinct(n=1)(completions=["the cat sat", "no no no no"])
        [1.0, 0.25]
    """

    n: int = 2

    def __post_init__(self) -> None:
        if self.n <= 0:
            raise RewardError(f"Distinct got n={self.n}; expected a positive number of words")

    def __call__(self, completions: Sequence[Completion], **columns: Any) -> list[float]:
        """Score B completions."""
        rewards = []
        for completion in completions:
            words = completion_text(completion).split()
            ngrams = [tuple(words[i : i + self.n]) for i in range(len(words) - self.n + 1)]
            rewards.append(len(set(ngrams)) / len(ngrams) if ngrams else 1.0)
        return rewards


ROUGE_KINDS = ("rouge1", "rouge2", "rougeL", "rougeLsum")


@dataclass(frozen=True)
class Rouge:
    """ROUGE (Lin 2004), its F-measure against a reference text, in [0, 1], as the ``rouge-score`` library computes it.

    With several references the best match counts.

    Args:
        kind: ``"rouge1"``, ``"rouge2"`` (shared words, pairs of words), ``"rougeL"`` (longest common subsequence) or
            ``"rougeLsum"`` (the same over sentences, which newlines separate).
        stem: Whether words that differ by an English ending only count as equal.

    Raises:
        RewardError: Another kind, or ``rouge-score`` is not installed.

    Example:
        >>> Rouge("rouge1")(completions=["the cat sat"], reference=["the cat slept"])
        [0.666...]
    """

    kind: str = "rougeL"
    stem: bool = False

    def __post_init__(self) -> None:
        if self.kind not in ROUGE_KINDS:
            raise RewardError(
                f"Rouge got kind={self.kind!r}; expected one of {', '.join(ROUGE_KINDS)}."
                f"{did_you_mean(str(self.kind), ROUGE_KINDS)}"
            )
        _library("rouge_score.rouge_scorer", "Rouge")

    def __call__(
        self, completions: Sequence[Completion], reference: Sequence[Any], **columns: Any
    ) -> list[float | None]:
        """Score B completions against the column ``reference``: texts, lists of texts, or None where there is none."""
        scorer = _rouge_scorer(self.kind, self.stem)
        return _against(
            lambda text, references: scorer.score_multi(references, text)[self.kind].fmeasure, completions, reference
        )


@dataclass(frozen=True)
class Bleu:
    """BLEU (Papineni et al. 2002) of one completion, in [0, 1], as ``sacrebleu`` computes it for sentences.

    For sentences shorter than four words, only the n-grams that they can have count (its "effective order"), and counts of
    0 are smoothed exponentially. The mean over completions is not the BLEU of the corpus.

    Raises:
        RewardError: ``sacrebleu`` is not installed.

    Example:
        >>> Bleu()(completions=["the cat sat down"], reference=["the cat sat down"])
        [1.0]
    """

    def __post_init__(self) -> None:
        _library("sacrebleu.metrics", "Bleu")

    def __call__(
        self, completions: Sequence[Completion], reference: Sequence[Any], **columns: Any
    ) -> list[float | None]:
        """Score B completions against the column ``reference``: texts, lists of texts, or None where there is none."""
        metric = _sacrebleu("BLEU", effective_order=True)
        return _against(lambda text, refs: metric.sentence_score(text, refs).score / 100, completions, reference)


@dataclass(frozen=True)
class ChrF:
    """chrF (Popovic 2015), in [0, 1]: character n-grams shared with a reference text, as ``sacrebleu`` computes it.

    Args:
        word_order: Longest word n-grams to count as well; 2 is chrF++.

    Raises:
        RewardError: ``sacrebleu`` is not installed.

    Example:
        >>> ChrF()(completions=["the cat sat down"], reference=["the cat sat down"])
        [1.0]
    """

    word_order: int = 0

    def __post_init__(self) -> None:
        _library("sacrebleu.metrics", "ChrF")

    def __call__(
        self, completions: Sequence[Completion], reference: Sequence[Any], **columns: Any
    ) -> list[float | None]:
        """Score B completions against the column ``reference``: texts, lists of texts, or None where there is none."""
        metric = _sacrebleu("CHRF", word_order=self.word_order)
        return _against(lambda text, refs: metric.sentence_score(text, refs).score / 100, completions, reference)


def _against(
    score: Callable[[str, list[str]], float], completions: Sequence[Completion], reference: Sequence[Any]
) -> list[float | None]:
    """Score each completion against its references."""
    rewards: list[float | None] = []
    for completion, expected in zip(completions, reference, strict=True):
        texts = [expected] if isinstance(expected, str) else expected
        if texts is not None and (not isinstance(texts, (list, tuple)) or not all(isinstance(t, str) for t in texts)):
            raise RewardError(f"the column `reference` holds {expected!r}; expected a text, a list of texts, or None")
        rewards.append(float(score(completion_text(completion), list(texts))) if texts else None)
    return rewards


@functools.cache
def _rouge_scorer(kind: str, stem: bool) -> Any:
    return _library("rouge_score.rouge_scorer", "Rouge").RougeScorer([kind], use_stemmer=stem)


@functools.cache
def _sacrebleu(metric: str, **settings: Any) -> Any:
    return getattr(_library("sacrebleu.metrics", metric), metric)(**settings)


def _library(module: str, user: str) -> Any:
    """Import what only some rewards need.

    Raises:
        RewardError: It is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise RewardError(
            f"{user} needs the library {module.split('.')[0]!r}: pip install 'textenv[text]' ({error})"
        ) from error
