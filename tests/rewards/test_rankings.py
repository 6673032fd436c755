import copy
import itertools
import json
import math
import random

import numpy as np
import pytest
import torch

from rewards import (
    RewardError,
    RewardModel,
    best_of_k_loss,
    evaluate_reward_model,
    plackett_luce_loss,
    ranking_loss,
    read_rankings,
    train_reward_model,
)
from rewards.rankings import _accuracy_interval, _calibration_error

NAN = math.nan


def loss_pair_by_pair(scores, ranks):
    """InstructGPT's equation 1, read off the paper: for each prompt 1 / C(K, 2) times the sum over its pairs."""
    prompts = []
    for row, rank in zip(scores, ranks, strict=True):
        pairs = [
            -torch.log(torch.sigmoid(row[i] - row[j]))
            for i, j in itertools.permutations(range(len(row)), 2)
            if rank[i] < rank[j]
        ]
        if pairs:
            prompts.append(sum(pairs) / len(pairs))
    return sum(prompts) / len(prompts)


# The loss --------------------------------------------------------------------------------------------------------


def test_loss_worked_by_hand():
    # K=3, scores 2 > 1 > 0 in the right order: margins 1, 2, 1.
    # log(1 + e^-1) = 0.3132617, log(1 + e^-2) = 0.1269280; mean (2 * 0.3132617 + 0.1269280) / 3
    assert ranking_loss(torch.tensor([[2.0, 1, 0]]), torch.tensor([[1.0, 2, 3]])).item() == pytest.approx(0.2511505)
    # equal scores: log 2 per pair, whatever the ranks
    assert ranking_loss(torch.zeros(2, 4), torch.tensor([[1.0, 2, 3, 4]] * 2)).item() == pytest.approx(math.log(2))
    # a pair the wrong way round: log(1 + e^1)
    assert ranking_loss(torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 2.0]])).item() == pytest.approx(1.3132617)


def test_grouped_loss_and_gradient_equal_the_pair_by_pair_loop():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(5, 6, generator=generator, dtype=torch.float64)
    ranks = torch.stack([torch.randperm(6, generator=generator) for _ in range(5)]).double()
    ranks[0, :3] = 2  # ties
    ranks[1] = 1  # nothing but ties: no pair, no part in the mean
    ranks[2, 4:] = NAN  # four completions only
    grouped, looped = scores.clone().requires_grad_(), scores.clone().requires_grad_()
    loss = ranking_loss(grouped, ranks)
    expected = loss_pair_by_pair(looped, ranks)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    loss.backward()
    expected.backward()
    assert torch.allclose(grouped.grad, looped.grad, atol=1e-14)
    assert torch.equal(grouped.grad[1], torch.zeros(6, dtype=torch.float64))


def test_a_constant_per_prompt_changes_nothing():
    scores = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ranks = torch.arange(5.0).repeat(4, 1)
    shifted = scores + torch.tensor([[1.0], [-7], [100], [0]])
    assert ranking_loss(shifted, ranks).item() == pytest.approx(ranking_loss(scores, ranks).item(), rel=1e-9)


def test_each_prompt_counts_the_same_whatever_its_number_of_pairs():
    # prompt 1: K=2, wrong by 1; prompt 2: K=4, all equal
    scores = torch.tensor([[0.0, 1, 0, 0], [0, 0, 0, 0]])
    ranks = torch.tensor([[1, 2, NAN, NAN], [1, 2, 3, 4]])
    assert ranking_loss(scores, ranks).item() == pytest.approx((1.3132617 + math.log(2)) / 2)


def test_absent_places_and_extreme_scores_stay_finite():
    scores = torch.tensor([[1e4, -1e4, math.inf]], requires_grad=True)
    loss = ranking_loss(scores, torch.tensor([[2.0, 1.0, NAN]]))
    loss.backward()
    assert loss.item() == pytest.approx(2e4)
    assert scores.grad.tolist() == [[1, -1, 0]]
    assert ranking_loss(torch.zeros(1, 2), torch.ones(1, 2)).item() == 0  # no pair at all


def test_a_margin_is_subtracted():
    # -log sigmoid(2 - 0 - 0.5) = 0.2014133
    loss = ranking_loss(torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, 2.0]]), torch.tensor([0.5]))
    assert loss.item() == pytest.approx(0.2014133)


def test_ties_draw_scores_together_when_they_are_given_weight():
    scores = torch.tensor([[1.0, 0.0, 3.0]], requires_grad=True)
    ranks = torch.tensor([[1.0, 1.0, NAN]])
    assert ranking_loss(scores, ranks).item() == 0
    loss = ranking_loss(scores, ranks, tie_weight=0.7)  # the mean over one pair, whatever its weight
    assert loss.item() == pytest.approx(-(math.log(1 / (1 + math.exp(-1))) + math.log(1 / (1 + math.e))) / 2)
    loss.backward()
    assert scores.grad[0].tolist() == pytest.approx([math.tanh(0.5) / 2, -math.tanh(0.5) / 2, 0])
    # beside a pair of different ranks it counts 0.5 of 1.5: scores 0 make every term log 2
    mixed = ranking_loss(torch.tensor([[0.0, 0.0, -1.0]]), torch.tensor([[1.0, 1.0, 2.0]]), tie_weight=0.5)
    assert mixed.item() == pytest.approx((2 * 0.3132617 + 0.5 * math.log(2)) / 2.5)


def softmax(values):
    return np.exp(values) / np.exp(values).sum()


def test_plackett_luce_is_the_likelihood_of_the_ranking():
    scores = torch.tensor([[0.3, -1.0, 2.0, 7.0]])
    ranks = torch.tensor([[2.0, 3.0, 1.0, NAN]])  # third, first, second; the fourth is absent
    likelihood = softmax([2.0, 0.3, -1.0])[0] * softmax([0.3, -1.0])[0]
    assert plackett_luce_loss(scores, ranks).item() == pytest.approx(-math.log(likelihood) / 2)
    # Over all rankings of three completions the likelihoods add up to one.
    total = sum(
        math.exp(-2 * plackett_luce_loss(scores[:, :3], torch.tensor([order], dtype=torch.float32)).item())
        for order in itertools.permutations((1, 2, 3))
    )
    assert total == pytest.approx(1)
    tied = plackett_luce_loss(torch.tensor([[1.0, 0.0, -1.0]]), torch.tensor([[1.0, 1.0, 2.0]])).item()
    first = softmax([1.0, 0.0, -1.0])
    assert tied == pytest.approx(-(math.log(first[0]) + math.log(first[1])) / 2)


def test_best_of_k_is_the_likelihood_of_the_best():
    scores = torch.tensor([[0.3, -1.0, 2.0, 7.0]])
    assert best_of_k_loss(scores, torch.tensor([[2.0, 3.0, 1.0, NAN]])).item() == pytest.approx(
        -math.log(softmax([0.3, -1.0, 2.0])[2])
    )
    two_best = best_of_k_loss(scores, torch.tensor([[1.0, 3.0, 1.0, NAN]])).item()
    assert two_best == pytest.approx(-math.log(softmax([0.3, -1.0, 2.0])[[0, 2]].sum()))


@pytest.mark.parametrize("loss", [plackett_luce_loss, best_of_k_loss])
def test_for_pairs_all_losses_are_one_and_what_says_nothing_counts_nothing(loss):
    torch.manual_seed(0)
    scores = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    ranks = torch.tensor([[1.0, 2], [2, 1], [1, 1], [1, NAN], [3, 1]])
    expected = ranking_loss(scores, ranks)
    assert loss(scores, ranks).item() == pytest.approx(expected.item(), rel=1e-9)
    (theirs,), (ours,) = torch.autograd.grad(expected, scores), torch.autograd.grad(loss(scores, ranks), scores)
    torch.testing.assert_close(ours, theirs)
    assert loss(torch.zeros(1, 3), torch.ones(1, 3)).item() == 0


# Reading ---------------------------------------------------------------------------------------------------------

BEST_FIRST = {"prompt": "p", "completions": ["a", "b", "c"]}
RANKED = {"prompt": "p", "completions": ["a", "b", "c"], "ranks": [2, 1, 2]}
PAIR = {"prompt": [{"role": "user", "content": "p"}], "chosen": [{"content": "a"}], "rejected": [{"content": "b"}]}


def test_the_three_forms(tmp_path):
    path = tmp_path / "rankings.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in (BEST_FIRST, RANKED, PAIR)) + "\n\n")
    rankings = read_rankings(path)
    assert rankings == read_rankings(row for row in (BEST_FIRST, RANKED, PAIR))
    assert rankings == read_rankings(str(path))
    assert rankings[0].ranks == (1, 2, 3)
    assert rankings[1].ranks == (2, 1, 2)
    assert rankings[2].completions == ([{"content": "a"}], [{"content": "b"}])
    assert [r.margin for r in read_rankings([RANKED, {**PAIR, "margin": 1}])] == [0, 1]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"completions": ["a", "b"]}, "ranking 1 has no `prompt`"),
        ("text", "ranking 1 has no `prompt`, but str"),
        ({"prompt": "p", "chosen": "a"}, r"entries \['chosen', 'prompt'\]; expected \{prompt, completions"),
        ({"prompt": "p", "completions": ["a"]}, "at least two completions"),
        ({"prompt": "p", "completions": "ab"}, "expected a list"),
        ({**RANKED, "ranks": [1, 2]}, "2 ranks for 3 completions"),
        ({**RANKED, "ranks": [1, 2, "x"]}, "expected numbers, 1 for the best"),
        ({**RANKED, "ranks": [1, 2, NAN]}, "expected numbers"),
        ({**RANKED, "margin": "large"}, "the margin 'large'; expected a number"),
    ],
)
def test_malformed_rankings(row, message):
    with pytest.raises(RewardError, match=message):
        read_rankings([BEST_FIRST, row])


def test_a_malformed_file(tmp_path):
    path = tmp_path / "rankings.jsonl"
    path.write_text(json.dumps(BEST_FIRST) + "\n{broken\n")
    with pytest.raises(RewardError, match=r"line 2 of .*rankings.jsonl is not JSON"):
        read_rankings(path)


# Metrics ---------------------------------------------------------------------------------------------------------


class Lookup(RewardModel):
    """A reward model with given scores, and one token per character."""

    def __init__(self, scores):
        self.scores = scores

    def encode(self, prompts, completions, completion_ids=None):
        return [list((prompt + completion).encode()) for prompt, completion in zip(prompts, completions, strict=True)]

    def score(self, sequences):
        return [self.scores[bytes(sequence).decode()] for sequence in sequences]


def test_metrics_worked_by_hand():
    rankings = [
        {"prompt": "p", "completions": ["aaa", "b", "cc"]},  # best first
        {"prompt": "q", "completions": ["d", "ee"], "ranks": [1, 1]},  # a tie: no pair
    ]
    model = Lookup({"paaa": 1.0, "pb": 3.0, "pcc": 1.0, "qd": 0.0, "qee": 0.0})
    metrics = evaluate_reward_model(model, rankings)
    # pairs: a > b (scored the wrong way, margin -2), a > c (equal: half), b > c (right, margin 2)
    assert metrics.accuracy == pytest.approx((0 + 0.5 + 1) / 3)
    assert metrics.loss == pytest.approx((math.log1p(math.exp(2)) + math.log(2) + math.log1p(math.exp(-2))) / 3)
    # the longer one: a > b right, a > c right, b > c wrong
    assert metrics.length_accuracy == pytest.approx(2 / 3)
    # within p: scores 1, 3, 1 - 5/3 and lengths 3, 1, 2 - 2: covariance -2, variances 8/3 and 2; q adds length only,
    # +-1/2: variance of length 2 + 1/2
    assert metrics.length_correlation == pytest.approx(-2 / math.sqrt(8 / 3 * 2.5))
    # confidences sigmoid(2) = 0.8808 twice (accuracy 1/2), 0.5 once (accuracy 1/2: no gap)
    assert metrics.calibration_error == pytest.approx(2 / 3 * (0.8807971 - 0.5))
    assert (metrics.pairs, metrics.prompts) == (3, 1)


def test_no_pairs_to_evaluate_on():
    with pytest.raises(RewardError, match="no ranking to evaluate on"):
        evaluate_reward_model(
            Lookup({"pa": 0.0, "pb": 0.0}), [{"prompt": "p", "completions": ["a", "b"], "ranks": [1, 1]}]
        )


def test_accuracy_interval_is_wilsons_for_independent_pairs():
    # 8 of 10, published Wilson interval: 0.490 to 0.943
    low, high = _accuracy_interval([np.array([1.0])] * 8 + [np.array([0.0])] * 2)
    # the cluster-robust variance has n - 1 in place of n: effective n = 9 here, so a little wider
    assert low == pytest.approx(0.490, abs=0.02)
    assert high == pytest.approx(0.943, abs=0.01)


def test_accuracy_interval_covers_the_truth_when_pairs_are_clustered():
    # Prompts of very different difficulty, 15 pairs each: the naive interval covers far less than 95%.
    rng = np.random.default_rng(0)
    covered = naive = 0
    for _ in range(400):
        difficulty = rng.beta(1.4, 0.6, size=60)  # mean 0.7
        right = [(rng.random(15) < p).astype(float) for p in difficulty]
        low, high = _accuracy_interval(right)
        covered += low <= 0.7 <= high
        mean = np.concatenate(right).mean()
        naive += abs(mean - 0.7) <= 1.96 * math.sqrt(mean * (1 - mean) / 900)
    assert 0.92 <= covered / 400 <= 0.98
    assert naive / 400 < 0.75


def test_accuracy_interval_of_a_perfect_score_is_not_a_point():
    low, high = _accuracy_interval([np.ones(3)] * 20)
    assert high == 1
    assert low == pytest.approx(20 / (20 + 1.96**2), abs=1e-3)  # Wilson with n = 20 prompts


def test_calibration_error_of_calibrated_margins_vanishes():
    rng = np.random.default_rng(0)
    margins = rng.normal(scale=2, size=100_000)
    right = rng.random(100_000) < 1 / (1 + np.exp(-np.abs(margins)))
    calibrated = np.where(right, np.abs(margins), -np.abs(margins))
    assert _calibration_error(calibrated) < 0.01
    assert _calibration_error(5 * calibrated) > 0.1  # overconfident


# Training --------------------------------------------------------------------------------------------------------


def preferences(count, seed=0, noise=0.0):
    """Rankings of random sentences by (good words - bad words)."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        prompt = " ".join(rng.choices(["what", "is", "sky", "blue", "?"], k=4))
        completions = {
            " ".join(rng.choices(["good", "bad", "dull", "sky", "."], k=rng.randint(2, 9))) for _ in range(4)
        }
        worth = {c: c.split().count("good") - c.split().count("bad") + rng.gauss(0, noise) for c in completions}
        ordered = sorted(completions, key=lambda c: (-worth[c], c))
        ranks = [sum(worth[other] > worth[c] for other in ordered) + 1 for c in ordered]
        rows.append({"prompt": prompt, "completions": ordered, "ranks": ranks})
    return rows


@pytest.fixture(scope="module")
def trained(language_model, tokenizer):
    demonstrations = [{"prompt": "what ?", "completion": c} for c in ("good sky .", "good good .", "sky .")]
    calls = []
    model, report = train_reward_model(
        preferences(300),
        model=language_model,
        tokenizer=tokenizer,
        demonstrations=demonstrations,
        learning_rate=3e-3,
        progress=lambda *call: calls.append(call),
    )
    return model, report, demonstrations, calls


def test_learns_the_preference(trained):
    model, report, _, _ = trained
    assert report.validation.accuracy > 0.9
    low, high = report.validation.accuracy_interval
    assert low < report.validation.accuracy <= high
    assert report.losses[0] > 0.5 > report.losses[-1]
    assert report.train.prompts + report.validation.prompts <= 300
    good, bad = model(["what ?"] * 2, ["good good sky .", "bad bad sky ."])
    assert good > bad + 1


def test_demonstrations_score_zero_on_average(trained):
    model, report, demonstrations, _ = trained
    scores = model([d["prompt"] for d in demonstrations], [d["completion"] for d in demonstrations])
    assert np.mean(scores) == pytest.approx(0, abs=1e-6)
    assert model.offset == report.offset != 0


def test_without_demonstrations_the_training_completions_do(language_model, tokenizer):
    rows = preferences(30)
    model, report = train_reward_model(rows, model=language_model, tokenizer=tokenizer, validation=None)
    scores = [s for row in rows for s in model([row["prompt"]] * len(row["completions"]), row["completions"])]
    assert np.mean(scores) == pytest.approx(0, abs=1e-5)
    assert np.std(scores) == pytest.approx(report.score_std, rel=1e-4)
    assert report.validation is None


def test_the_report_is_json_and_agrees_with_an_evaluation_from_outside(trained):
    model, report, _, calls = trained
    fields = json.loads(json.dumps(report.to_dict()))
    assert fields["validation"]["accuracy"] == report.validation.accuracy
    assert len(report.losses) == len(calls) == math.ceil(270 / 16)
    assert calls[-1][0] == calls[-1][1] == len(calls)
    fresh = preferences(200, seed=1)
    metrics = evaluate_reward_model(model, fresh)
    hits = pairs = 0
    for row in fresh:
        scores = model([row["prompt"]] * len(row["completions"]), row["completions"])
        for i, j in itertools.permutations(range(len(scores)), 2):
            if row["ranks"][i] < row["ranks"][j]:
                pairs += 1
                hits += scores[i] > scores[j]
    assert metrics.pairs == pairs
    assert metrics.accuracy == pytest.approx(hits / pairs, abs=1e-9)


def test_training_survives_a_round_trip(trained, tmp_path):
    model, _, demonstrations, _ = trained
    model.save_pretrained(tmp_path)
    again = RewardModel.from_pretrained(tmp_path)
    prompts, completions = [d["prompt"] for d in demonstrations], [d["completion"] for d in demonstrations]
    assert again(prompts, completions) == pytest.approx(model(prompts, completions), abs=1e-5)


def test_same_seed_same_model_and_the_start_is_left_alone(language_model, tokenizer):
    before = copy.deepcopy(language_model.state_dict())
    rows = preferences(20)

    def train(seed):
        return train_reward_model(rows, model=language_model, tokenizer=tokenizer, seed=seed)[0].model.state_dict()

    first, second, other = train(0), train(0), train(1)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["score.weight"], other["score.weight"])
    assert all(torch.equal(before[name], weight) for name, weight in language_model.state_dict().items())


def test_training_further(trained):
    model, report, demonstrations, _ = trained
    offset = model.offset
    rows = preferences(10, seed=2)
    frozen = copy.deepcopy(model)
    frozen.model.requires_grad_(False)
    for start in (model, model.model, frozen):
        further, _ = train_reward_model(
            rows, model=start, tokenizer=model.tokenizer, demonstrations=demonstrations, validation=None
        )
        scores = further([d["prompt"] for d in demonstrations], [d["completion"] for d in demonstrations])
        assert not torch.equal(further.model.score.weight, model.model.score.weight)
        assert np.mean(scores) == pytest.approx(0, abs=1e-5)  # the former offset does not count twice
    assert model.offset == offset == report.offset


def test_prompts_are_held_out_whole(language_model, tokenizer):
    # one prompt many times: it may not be in both parts, so there is nothing left to split
    rows = [{"prompt": "what ?", "completions": ["good .", "bad ."]}] * 10
    with pytest.raises(RewardError, match=r"1 prompt\(s\) cannot be split.*validation=None"):
        train_reward_model(rows, model=language_model, tokenizer=tokenizer)
    _, report = train_reward_model(
        [*rows, {"prompt": "sky ?", "completions": ["good .", "bad ."]}],
        model=language_model,
        tokenizer=tokenizer,
        validation=0.5,
    )
    assert {report.train.prompts, report.validation.prompts} == {10, 1}


def test_other_rankings_to_validate_on(language_model, tokenizer):
    _, report = train_reward_model(
        preferences(10), model=language_model, tokenizer=tokenizer, validation=preferences(5, seed=3)
    )
    assert report.validation.prompts <= 5


@pytest.mark.parametrize("loss", ["plackett_luce", "best_of_k"])
def test_other_losses_learn_as_well(language_model, tokenizer, loss):
    _, report = train_reward_model(
        preferences(300), model=language_model, tokenizer=tokenizer, learning_rate=3e-3, loss=loss
    )
    assert report.validation.accuracy > 0.85


def test_margins_and_ties_reach_the_loss(language_model, tokenizer):
    def first_loss(**extra):
        rows = [{"prompt": "what ?", "chosen": "good .", "rejected": "bad .", **extra}]
        _, report = train_reward_model(rows, model=language_model, tokenizer=tokenizer, validation=None)
        return report.losses[0]

    difference = -math.log(math.expm1(first_loss()))
    assert first_loss(margin=2.0) == pytest.approx(math.log1p(math.exp(2.0 - difference)), rel=1e-4)
    pair = [{"prompt": "sky ?", "chosen": "good sky .", "rejected": "dull ."}]
    tie = [{"prompt": "what ?", "completions": ["good .", "bad ."], "ranks": [1, 1]}, *pair]
    settings = {"model": language_model, "tokenizer": tokenizer, "validation": None}
    (without,) = train_reward_model(pair, **settings)[1].losses
    (with_tie,) = train_reward_model(tie, tie_weight=1.0, **settings)[1].losses
    even = (math.log1p(math.exp(difference)) + math.log1p(math.exp(-difference))) / 2
    assert with_tie == pytest.approx((without + even) / 2, rel=1e-4)  # the mean over two prompts


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "plackett-luce"}, "loss='plackett-luce'; expected one of .*Did you mean `plackett_luce`"),
        ({"loss": "best_of_k", "tie_weight": 1.0}, "loss='best_of_k' has no tie_weight"),
        ({"rankings": [{**RANKED, "margin": 1.0}], "validation": None, "loss": "best_of_k"}, "has no margins"),
        ({"rankings": []}, "cannot be split"),
        ({"rankings": [], "validation": None}, "no ranking to train on"),
        ({"rankings": [{**RANKED, "ranks": [1, 1, 1]}], "validation": None}, "no ranking to train on"),
        ({"validation": 1.0}, "validation=1.0 is no share"),
        ({"demonstrations": []}, "no demonstrations to score"),
        ({"demonstrations": [{"prompt": "p", "answer": "a"}]}, r"demonstration 0 .* expected `prompt`"),
    ],
)
def test_refused(language_model, tokenizer, options, message):
    with pytest.raises(RewardError, match=message):
        train_reward_model(**{"rankings": preferences(3), "model": language_model, "tokenizer": tokenizer} | options)


def test_rankings_of_the_same_completions_are_read_once_and_count_together(language_model, tokenizer, monkeypatch):
    """Three people rank the same two answers, one of them the other way round: the loss of three rows, the work of one."""
    prompt, first, second = "red", "red green", "blue"
    rows = [{"prompt": prompt, "completions": [first, second], "ranks": r} for r in ([1, 2], [1, 2], [2, 1])]
    start = RewardModel.from_language_model(language_model, tokenizer, seed=0)
    scores = start(prompts=[prompt] * 2, completions=[first, second])
    difference = scores[0] - scores[1]
    by_hand = (2 * np.logaddexp(0, -difference) + np.logaddexp(0, difference)) / 3
    read, outputs = [], RewardModel.outputs

    def counted(self, sequences):
        read.append(len(sequences))
        return outputs(self, sequences)

    monkeypatch.setattr(RewardModel, "outputs", counted)
    _, report = train_reward_model(rows, model=start, validation=None)
    assert report.losses == pytest.approx([by_hand], abs=1e-6)
    assert read[0] == 2
    assert report.train.pairs == 3
