"""Training a reward model on rankings (Ouyang et al. 2022, https://arxiv.org/abs/2203.02155, section 3.5, C.2).

Notation: a labeler ranks the K completions of a prompt; r_i is the score of completion i. The loss is the mean of
``-log sigmoid(r_better - r_worse)`` over all pairs of a prompt, then over prompts. The C(K, 2) pairs of a prompt
are one element of a batch: K forward passes instead of K (K - 1), and no overfitting from meeting each completion
K - 1 times in one epoch.

Differences from the paper: 1) a learning rate for small models  2) dropout off, as in training so in use.

Two other losses stand beside it by name: ``"plackett_luce"``, the likelihood of the whole ranking, and ``"best_of_k"``, that of
the best completion alone. For K = 2 all three are one.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch.nn.functional import logsigmoid
from torch.nn.utils.rnn import pad_sequence

from rewards.base import Completion, RewardError, did_you_mean
from rewards.learned import RewardModel

Rankings: TypeAlias = str | os.PathLike[str] | Iterable[Mapping[str, Any]]
"""A JSONL file, or an iterable of mappings, in any of the three forms of :func:`read_rankings`."""


@dataclass(frozen=True)
class Ranking:
    """The completions of one prompt, ranked.

    Args:
        prompt: A text or a conversation.
        completions: K of them.
        ranks: K numbers, 1 the best; equal ones are tied.
        margin: By how much a better completion should score higher, at least; see :func:`ranking_loss`.
    """

    prompt: Completion
    completions: tuple[Completion, ...]
    ranks: tuple[float, ...]
    margin: float = 0.0


@dataclass(frozen=True)
class RankingMetrics:
    """How well scores agree with rankings.

    Args:
        accuracy: Share of pairs whose better completion scores higher (equal scores count half).
        accuracy_interval: 95% interval of it. Pairs of a prompt are not independent; the interval allows for that.
        loss: Mean ranking loss, nats.
        calibration_error: Expected gap between ``sigmoid(|r_i - r_j|)`` and the share of such pairs that are right,
            over ten bins of equal width.
        length_correlation: Pearson correlation of score and length (tokens) within prompts; ``None`` if either is
            constant.
        length_accuracy: Accuracy of "the longer one is better": what a reward model must beat.
        pairs: Number of pairs, ties excluded.
        prompts: Number of rankings that have such pairs.
    """

    accuracy: float
    accuracy_interval: tuple[float, float]
    loss: float
    calibration_error: float
    length_correlation: float | None
    length_accuracy: float
    pairs: int
    prompts: int


@dataclass(frozen=True)
class RewardModelReport:
    """What :func:`train_reward_model` did.

    Args:
        validation: Agreement with the rankings held out; ``None`` if there were none.
        train: Agreement with the rankings trained on.
        offset: The head's mean output on the demonstrations, which are thereby scored 0 on average.
        score_std: Standard deviation of the scores of the training completions: the unit to choose a KL penalty by.
        losses: Loss of each update, nats.
        seconds: Wall-clock time.
    """

    validation: RankingMetrics | None
    train: RankingMetrics
    offset: float
    score_std: float
    losses: tuple[float, ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain numbers, lists and dicts, fit for JSON."""
        fields: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return fields


def ranking_loss(
    scores: torch.Tensor, ranks: torch.Tensor, margins: torch.Tensor | None = None, tie_weight: float = 0.0
) -> torch.Tensor:
    """Compute InstructGPT's ranking loss (its equation 1) over a batch of prompts.

    Args:
        scores: Scores of each prompt's completions. Shape: (P, K).
        ranks: Their ranks, 1 the best; equal ranks are tied, nan marks a place without a completion (prompts may differ
            in K). Shape: (P, K).
        margins: Subtracted from each difference of scores, so that clear preferences are told apart more (Touvron et al.
            2023, https://arxiv.org/abs/2307.09288, equation 2); None for 0. Shape: (P,).
        tie_weight: What a tied pair counts, against 1 of a pair of different ranks. Its target is an even chance, so it
            draws its scores together. By default it counts nothing.

    Returns:
        Mean over prompts of the mean over pairs of ``-log sigmoid(r_better - r_worse - margin)``, nats. Prompts without
        a pair are left out. Shape: ().
    """
    better = ranks[:, :, None] < ranks[:, None, :]  # (P, K, K); a comparison with nan is False
    differences = scores[:, :, None] - scores[:, None, :]
    wanted = differences if margins is None else differences - margins[:, None, None]
    # An absent completion must not reach the loss: 0 * inf would be nan.
    losses = -(logsigmoid(wanted.masked_fill(~better, 0.0)) * better).sum((1, 2))
    pairs = better.sum((1, 2)).to(scores.dtype)
    if tie_weight > 0:
        tied = (ranks[:, :, None] == ranks[:, None, :]) & ~torch.eye(
            ranks.shape[1], dtype=torch.bool, device=ranks.device
        )
        both = -(logsigmoid(differences.masked_fill(~tied, 0.0)) * tied).sum((1, 2))  # each pair from both sides
        losses, pairs = losses + tie_weight * both / 2, pairs + tie_weight * tied.sum((1, 2)) / 2
    return _mean_over_prompts(losses, pairs)


def plackett_luce_loss(scores: torch.Tensor, ranks: torch.Tensor) -> torch.Tensor:
    """Compute the negative log-likelihood of rankings (Plackett 1975; Luce 1959), per choice.

    A ranking is a series of choices, each of the best among those not yet chosen, with probabilities softmax(scores). Tied
    completions are each chosen from all that are not ranked above them (Breslow's approximation).

    Args:
        scores: Scores of each prompt's completions. Shape: (P, K).
        ranks: As for :func:`ranking_loss`. Shape: (P, K).

    Returns:
        Mean over prompts of the mean over choices, nats. What has nothing worse below it is no choice. Shape: ().
    """
    remaining = ranks[:, :, None] <= ranks[:, None, :]  # (P, K, K): what stood to choose from when i was chosen
    chosen = (ranks[:, :, None] < ranks[:, None, :]).any(2)  # (P, K)
    everything = torch.where(remaining, scores[:, None, :].expand_as(remaining), -torch.inf)
    everything = torch.where(chosen[:, :, None], everything, 0.0)  # no gradient through a logsumexp of nothing
    losses = torch.where(chosen, everything.logsumexp(2) - scores, 0.0).sum(1)
    return _mean_over_prompts(losses, chosen.sum(1).to(scores.dtype))


def best_of_k_loss(scores: torch.Tensor, ranks: torch.Tensor) -> torch.Tensor:
    """Compute the negative log-likelihood of the best completion among K, with probabilities softmax(scores).

    For labels that say no more than which of K was picked (as in Ziegler et al. 2019, https://arxiv.org/abs/1909.08593,
    equation 1). If several are best, their probabilities add up.

    Args:
        scores: Scores of each prompt's completions. Shape: (P, K).
        ranks: As for :func:`ranking_loss`; only the smallest matter. Shape: (P, K).

    Returns:
        Mean over prompts with a pair of different ranks, nats. Shape: ().
    """
    present = ~torch.isnan(ranks)
    best = ranks == torch.where(present, ranks, torch.inf).amin(1, keepdim=True)
    informative = (best != present).any(1)
    # Prompts that say nothing get a loss of 0, computed from finite numbers.
    best = torch.where(informative[:, None], best, True)
    present = torch.where(informative[:, None], present, True)
    losses = scores.masked_fill(~present, -torch.inf).logsumexp(1) - scores.masked_fill(~best, -torch.inf).logsumexp(1)
    return _mean_over_prompts(losses, informative.to(scores.dtype))


LOSSES: dict[str, Callable[..., torch.Tensor]] = {
    "pairs": ranking_loss,
    "plackett_luce": plackett_luce_loss,
    "best_of_k": best_of_k_loss,
}
"""The losses of :func:`train_reward_model` by name."""


def _mean_over_prompts(losses: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Mean over prompts of the mean over what each of them counts. Shapes: (P,), (P,) -> ()."""
    informative = counts > 0
    each = torch.where(informative, losses, 0.0) / torch.where(informative, counts, 1.0)
    return each.sum() / informative.sum().clamp(min=1)


def train_reward_model(
    rankings: Rankings,
    *,
    model: Any,
    tokenizer: Any = None,
    demonstrations: Iterable[Mapping[str, Any]] | None = None,
    epochs: int = 1,
    learning_rate: float = 1e-3,
    batch_prompts: int = 16,
    validation: float | Rankings | None = 0.1,
    loss: str = "pairs",
    tie_weight: float = 0.0,
    optimizer: Callable[[Any], torch.optim.Optimizer] | None = None,
    seed: int = 0,
    progress: Callable[[int, int, float], None] | None = None,
) -> tuple[RewardModel, RewardModelReport]:
    """Train a reward model: Adam (0.9, 0.95), cosine schedule to a tenth, then the offset.

    Args:
        rankings: A JSONL file or an iterable of mappings; see :func:`read_rankings`. Rankings of the same completions of a
            prompt by several people are read in one forward pass and count together: where people disagree, a pair
            pulls its scores apart less.
        model: What to start from: a causal language model (or its name or directory), or a :class:`RewardModel` or
            sequence classifier to train further. Not changed: a copy is trained.
        tokenizer: Its tokenizer; may be left out if ``model`` brings one.
        demonstrations: Mappings with ``prompt`` and ``completion`` (or ``demonstration``), which shall score 0 on
            average. If none are given, the training completions take their place: then the average sampled answer
            scores 0 (as in Ziegler et al. 2019), and good ones score above it.
        epochs: Passes over the rankings. More than one soon overfits.
        learning_rate: At the start. The default suits models of up to a few million parameters; the paper's 6B
            model took 9e-6.
        batch_prompts: Prompts per update (the paper: 64, of many more rankings).
        validation: Share of the prompts to hold out, or other rankings to validate on, or ``None``.
        loss: ``"pairs"`` (InstructGPT's), ``"plackett_luce"`` or ``"best_of_k"``.
        tie_weight: What a tied pair counts in the loss of pairs; see :func:`ranking_loss`.
        optimizer: Makes another optimiser than Adam from the classifier; its step sizes follow the same cosine.
        seed: Of the head, the split and the order.
        progress: Called after each update with (updates done, updates in all, loss in nats).

    Returns:
        The reward model, and a report.

    Raises:
        RewardError: The rankings are malformed, or hold nothing to train on; or an unknown loss, or one that knows nothing
            of margins or ties.
    """
    if loss not in LOSSES:
        raise RewardError(
            f"train_reward_model got loss={loss!r}; expected one of {list(LOSSES)}.{did_you_mean(loss, LOSSES)}"
        )
    started = time.perf_counter()
    rng = np.random.default_rng(seed)
    reward_model = _start(model, tokenizer, seed)
    train, held_out = _split(read_rankings(rankings), validation, rng)
    with_margins = any(ranking.margin for ranking in train)
    if loss != "pairs" and (tie_weight or with_margins):
        raise RewardError(
            f"loss={loss!r} has no {'tie_weight' if tie_weight else 'margins'}; expected loss='pairs' for rankings that use them"
        )
    train = [ranking for ranking in train if tie_weight > 0 or _pairs(ranking)]
    if not train:
        raise RewardError("no ranking to train on has a pair of different ranks; expected at least one")
    panels = _panels(train)
    sequences = _encode(reward_model, [train[panel[0]] for panel in panels])
    ranks = [torch.tensor(ranking.ranks, device=reward_model.model.device) for ranking in train]

    updates = epochs * math.ceil(len(panels) / batch_prompts)
    if optimizer is None:
        steps: torch.optim.Optimizer = torch.optim.Adam(
            reward_model.model.parameters(), lr=learning_rate, betas=(0.9, 0.95)
        )
    else:
        steps = optimizer(reward_model.model)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        steps, lambda update: 0.1 + 0.45 * (1 + math.cos(math.pi * update / updates))
    )
    losses: list[float] = []
    for _ in range(epochs):
        order = rng.permutation(len(panels))
        for part in (order[i : i + batch_prompts] for i in range(0, len(order), batch_prompts)):
            read = [sequences[index] for index in part]  # once, however many have ranked them
            flat = torch.split(
                reward_model.outputs([ids for group in read for ids in group]), [len(group) for group in read]
            )
            batch = [i for index in part for i in panels[index]]
            scores = pad_sequence(
                [one for one, index in zip(flat, part, strict=True) for _ in panels[index]], batch_first=True
            )
            padded_ranks = pad_sequence([ranks[i] for i in batch], batch_first=True, padding_value=math.nan)
            if loss == "pairs":
                margins = scores.new_tensor([train[i].margin for i in batch]) if with_margins else None
                objective = ranking_loss(scores, padded_ranks, margins, tie_weight)
            else:
                objective = LOSSES[loss](scores, padded_ranks)
            steps.zero_grad()
            objective.backward()
            steps.step()
            schedule.step()
            losses.append(objective.item())
            if progress is not None:
                progress(len(losses), updates, losses[-1])

    panel_scores = _score(reward_model, sequences)
    pool = np.concatenate(panel_scores)
    if demonstrations is None:
        correction = float(pool.mean())
    else:
        correction = float(np.mean(_score_demonstrations(reward_model, demonstrations)))
    reward_model.offset += correction  # the scores above were computed with the former offset
    return reward_model, RewardModelReport(
        validation=_evaluate(reward_model, held_out) if held_out else None,
        train=_metrics(
            [train[i] for panel in panels for i in panel],
            [score for score, panel in zip(panel_scores, panels, strict=True) for _ in panel],
            [group for group, panel in zip(sequences, panels, strict=True) for _ in panel],
        ),
        offset=reward_model.offset,
        score_std=float(pool.std()),
        losses=tuple(losses),
        seconds=time.perf_counter() - started,
    )


def evaluate_reward_model(reward_model: RewardModel, rankings: Rankings) -> RankingMetrics:
    """Measure how well a reward model agrees with rankings, those of other labelers for instance.

    Args:
        reward_model: The reward model.
        rankings: As for :func:`train_reward_model`.

    Returns:
        The metrics.

    Raises:
        RewardError: The rankings are malformed, or have no pair.
    """
    return _evaluate(reward_model, read_rankings(rankings))


def read_rankings(rankings: Rankings) -> list[Ranking]:
    """Read rankings and check them.

    Args:
        rankings: A JSONL file, or an iterable of mappings, each in one of three forms, which may be mixed:
            ``{prompt, completions}`` from best to worst; ``{prompt, completions, ranks}`` with 1 the best and ties
            allowed; ``{prompt, chosen, rejected}`` as in TRL. Each may have a ``margin``, a number: 0 unless given. Prompts
            and completions are texts or messages.

    Returns:
        The rankings.

    Raises:
        RewardError: A ranking is malformed; the message says which and how.
    """
    if isinstance(rankings, (str, os.PathLike)):
        path = Path(rankings)
        rows: list[Any] = []
        # Not splitlines(): it also breaks at characters like U+2028, which may stand inside a text.
        for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
            if line.strip():
                try:
                    rows.append((f"line {number} of {path}", json.loads(line)))
                except json.JSONDecodeError as error:
                    raise RewardError(f"line {number} of {path} is not JSON: {error}") from None
    else:
        rows = [(f"ranking {number}", row) for number, row in enumerate(rankings)]
    return [_read_ranking(where, row) for where, row in rows]


def _read_ranking(where: str, row: Any) -> Ranking:
    form = "expected {prompt, completions[, ranks]} or {prompt, chosen, rejected}"
    if not isinstance(row, Mapping) or "prompt" not in row:
        got = sorted(row) if isinstance(row, Mapping) else type(row).__name__
        raise RewardError(f"{where} has no `prompt`, but {got}; {form}")
    if "completions" in row:
        completions = row["completions"]
        ranks = row.get("ranks")
    elif "chosen" in row and "rejected" in row:
        completions, ranks = [row["chosen"], row["rejected"]], None
    else:
        raise RewardError(f"{where} has the entries {sorted(row)}; {form}")
    if isinstance(completions, str) or not isinstance(completions, Sequence) or len(completions) < 2:
        raise RewardError(f"{where} ranks {completions!r}; expected a list of at least two completions")
    for text in (row["prompt"], *completions):
        if not isinstance(text, str) and not (isinstance(text, Sequence) and all(isinstance(m, Mapping) for m in text)):
            raise RewardError(f"{where} has {text!r} for a prompt or completion; expected text or a list of messages")
    if ranks is not None and (isinstance(ranks, str) or not isinstance(ranks, Iterable)):
        raise RewardError(f"{where} has the ranks {ranks!r}; expected numbers, 1 for the best")
    ranks = list(range(1, len(completions) + 1)) if ranks is None else list(ranks)
    if len(ranks) != len(completions):
        raise RewardError(f"{where} has {len(ranks)} ranks for {len(completions)} completions; expected as many")
    try:
        numbers = tuple(float(rank) for rank in ranks)
    except (TypeError, ValueError):
        numbers = (math.nan,)
    if not all(math.isfinite(number) for number in numbers):
        raise RewardError(f"{where} has the ranks {ranks!r}; expected numbers, 1 for the best")
    margin = row.get("margin")
    margin = 0.0 if margin is None else margin
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not math.isfinite(margin):
        raise RewardError(
            f"{where} has the margin {margin!r}; expected a number, by how much better is better at least"
        )
    return Ranking(row["prompt"], tuple(completions), numbers, float(margin))


def _start(model: Any, tokenizer: Any, seed: int) -> RewardModel:
    if isinstance(model, RewardModel):
        reward_model = copy.deepcopy(model)
    elif hasattr(model, "score"):
        reward_model = RewardModel(copy.deepcopy(model), tokenizer)
    else:
        reward_model = RewardModel.from_language_model(model, tokenizer, seed=seed)
    if not any(parameter.requires_grad for parameter in reward_model.model.parameters()):
        reward_model.model.requires_grad_(True)  # frozen for use as a reward
    return reward_model


def _split(
    rankings: list[Ranking], validation: float | Rankings | None, rng: np.random.Generator
) -> tuple[list[Ranking], list[Ranking]]:
    """Hold out prompts, not rankings: a prompt in both parts would let memory pass for judgement."""
    if validation is None:
        return rankings, []
    if not isinstance(validation, (int, float)):
        return rankings, read_rankings(validation)
    if not 0 <= validation < 1:
        raise RewardError(f"validation={validation} is no share of the prompts; expected 0 <= validation < 1")
    keys = [json.dumps(ranking.prompt) for ranking in rankings]
    prompts = sorted(set(keys))
    count = math.ceil(validation * len(prompts))
    if count == len(prompts):
        raise RewardError(
            f"{len(prompts)} prompt(s) cannot be split into training and validation; pass validation=None"
        )
    held_out = {prompts[i] for i in rng.permutation(len(prompts))[:count]}
    return (
        [ranking for ranking, key in zip(rankings, keys, strict=True) if key not in held_out],
        [ranking for ranking, key in zip(rankings, keys, strict=True) if key in held_out],
    )


def _panels(rankings: Sequence[Ranking]) -> list[list[int]]:
    """Indices of rankings of the same completions of one prompt, by different people, together."""
    panels: dict[str, list[int]] = {}
    for i, ranking in enumerate(rankings):
        panels.setdefault(json.dumps([ranking.prompt, ranking.completions]), []).append(i)
    return list(panels.values())


def _encode(reward_model: RewardModel, rankings: Sequence[Ranking]) -> list[list[list[int]]]:
    """Token sequences of the completions of each ranking."""
    flat = iter(
        reward_model.encode(
            [ranking.prompt for ranking in rankings for _ in ranking.completions],
            [completion for ranking in rankings for completion in ranking.completions],
        )
    )
    return [list(itertools.islice(flat, len(ranking.completions))) for ranking in rankings]


def _score(reward_model: RewardModel, sequences: list[list[list[int]]]) -> list[np.ndarray]:
    """Score the completions of each ranking. Shape: (K,) each."""
    flat = np.array(reward_model.score(list(itertools.chain.from_iterable(sequences))))
    return np.split(flat, np.cumsum([len(group) for group in sequences])[:-1])


def _score_demonstrations(reward_model: RewardModel, demonstrations: Iterable[Mapping[str, Any]]) -> list[float]:
    rows = list(demonstrations)
    if not rows:
        raise RewardError("there are no demonstrations to score 0 on average; expected some, or None")
    completions = []
    for number, row in enumerate(rows):
        completion = row.get("completion", row.get("demonstration"))
        if completion is None or "prompt" not in row:
            raise RewardError(
                f"demonstration {number} has the entries {sorted(row)}; expected `prompt` and `completion`"
            )
        completions.append(completion)
    return reward_model(prompts=[row["prompt"] for row in rows], completions=completions)


def _evaluate(reward_model: RewardModel, rankings: list[Ranking]) -> RankingMetrics:
    sequences = _encode(reward_model, rankings)
    return _metrics(rankings, _score(reward_model, sequences), sequences)


def _pairs(ranking: Ranking) -> list[tuple[int, int]]:
    """The pairs (better, worse) of a ranking; ties make none."""
    ranks = ranking.ranks
    return [(i, j) for i, j in itertools.permutations(range(len(ranks)), 2) if ranks[i] < ranks[j]]


def _metrics(
    rankings: Sequence[Ranking], scores: Sequence[np.ndarray], sequences: Sequence[Sequence[Sequence[int]]]
) -> RankingMetrics:
    # The completions of a ranking share their prompt: its tokens cancel in every difference of lengths below.
    lengths = [np.array([float(len(ids)) for ids in group]) for group in sequences]
    margins, longer, losses = [], [], []  # per ranking with pairs; shape (pairs,) each
    for ranking, score, length in zip(rankings, scores, lengths, strict=True):
        if pairs := np.array(_pairs(ranking)).T.tolist():
            margins.append(score[pairs[0]] - score[pairs[1]])
            longer.append(length[pairs[0]] - length[pairs[1]])
            losses.append(float(np.logaddexp(0.0, -margins[-1]).mean()))
    if not margins:
        raise RewardError("no ranking to evaluate on has a pair of different ranks; expected at least one")
    return RankingMetrics(
        accuracy=float(np.concatenate([_right(margin) for margin in margins]).mean()),
        accuracy_interval=_accuracy_interval([_right(margin) for margin in margins]),
        loss=float(np.mean(losses)),
        calibration_error=_calibration_error(np.concatenate(margins)),
        length_correlation=_correlation(
            np.concatenate([score - score.mean() for score in scores]),
            np.concatenate([length - length.mean() for length in lengths]),
        ),
        length_accuracy=float(np.concatenate([_right(margin) for margin in longer]).mean()),
        pairs=sum(len(margin) for margin in margins),
        prompts=len(margins),
    )


def _right(margins: np.ndarray) -> np.ndarray:
    """1 where better - worse is positive, 1/2 where it is 0."""
    return np.asarray((np.sign(margins) + 1) / 2)


def _accuracy_interval(right: Sequence[np.ndarray]) -> tuple[float, float]:
    """95% Wilson interval of the mean of ``right``, with the number of pairs deflated for clustering by prompt.

    The effective number of pairs is p (1 - p) / v, with v the cluster-robust variance of the ratio (sum of hits) /
    (sum of pairs) (Cochran, Sampling Techniques, section 6.3). It never exceeds the number of pairs; if every pair
    is right, or wrong, v says nothing, and each prompt counts as one observation.

    Args:
        right: Hits of each prompt. Shape: (pairs,) each.

    Returns:
        Lower and upper bound.
    """
    hits = np.array([group.sum() for group in right])
    sizes = np.array([len(group) for group in right], dtype=float)
    clusters, pairs = len(sizes), float(sizes.sum())
    p = float(hits.sum() / pairs)
    effective = float(clusters)
    if 0 < p < 1 and clusters > 1:
        variance = float(((hits - p * sizes) ** 2).sum()) / pairs**2 * clusters / (clusters - 1)
        effective = min(p * (1 - p) / variance, pairs) if variance > 0 else pairs
    z = 1.959964  # the 97.5% quantile of the standard normal distribution
    centre = (p + z**2 / (2 * effective)) / (1 + z**2 / effective)
    half = z / (1 + z**2 / effective) * math.sqrt(p * (1 - p) / effective + z**2 / (4 * effective**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def _calibration_error(margins: np.ndarray, bins: int = 10) -> float:
    """Expected calibration error (Guo et al. 2017, https://arxiv.org/abs/1706.04599) of ``sigmoid(|margin|)``."""
    confidence = 1 / (1 + np.exp(-np.abs(margins)))  # in [1/2, 1]
    which = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    gaps = np.bincount(which, weights=_right(margins) - confidence, minlength=bins)
    return float(np.abs(gaps).sum() / len(margins))


def _correlation(x: np.ndarray, y: np.ndarray) -> float | None:
    """Pearson correlation of two centred variables; None if one is constant."""
    scale = math.sqrt(float(x @ x) * float(y @ y))
    return float(x @ y) / scale if scale > 0 else None
