"""What is drawn, what is scored and what is allowed are one distribution, computed here a second time in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from textenv import Behaviour
from textenv.sampling import draw, draw_scored, entropy, log_prob, log_prob_and_entropy

LOGITS = np.array([1.0, -0.5, 2.0, 0.0, -3.0, 1.5, 0.7, -1.0])
MASK = np.array([True, True, False, True, True, False, True, True])
BEHAVIOURS = {
    "as it is": {},
    "cold": {"temperature": 0.5},
    "hot": {"temperature": 3.0},
    "top-k": {"top_k": 3},
    "top-p": {"top_p": 0.7},
    "masked": {"action_mask": MASK},
    "everything": {"temperature": 1.7, "top_k": 4, "top_p": 0.8, "action_mask": MASK},
}
EDGES = [0.0, 2.0**-149, 1e-12, 0.5, 1 - 2.0**-24, 1 - 2.0**-25, np.nextafter(1.0, 0.0)]


def exact(
    temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None, action_mask: Any = None
) -> Any:
    """The truncated distribution by its definition: mask, sort, keep, renormalise. Shape: (V,)."""
    weight = np.exp(LOGITS / temperature) * (1.0 if action_mask is None else action_mask)
    order = sorted(range(len(weight)), key=lambda token: -weight[token])
    kept = order[:top_k]
    if top_p is not None:
        total, nucleus = sum(weight[kept]), []
        while sum(weight[nucleus]) < top_p * total:
            nucleus.append(kept[len(nucleus)])
        kept = nucleus
    p = np.zeros_like(weight)
    p[kept] = weight[kept] / sum(weight[kept])
    return p


def shaped(settings: dict[str, Any], rows: int = 1) -> torch.Tensor:
    raw = torch.from_numpy(LOGITS).float().expand(rows, -1)
    return Behaviour(**settings).logits(raw, np.zeros((rows, 1), np.int64))


@pytest.mark.parametrize("settings", BEHAVIOURS.values(), ids=BEHAVIOURS)
def test_draws_follow_the_exact_distribution(settings: dict[str, Any]) -> None:
    n, p = 40_000, exact(**settings)
    drawn = draw(shaped(settings, n), np.random.default_rng(0).random(n)).numpy()
    counts = np.bincount(drawn, minlength=len(p))
    assert (counts[p == 0] == 0).all()
    possible = p > 0
    statistic = ((counts - n * p)[possible] ** 2 / (n * p)[possible]).sum()
    freedom = possible.sum() - 1
    p_value = torch.special.gammaincc(torch.tensor(freedom / 2), torch.tensor(statistic / 2)).item()
    assert p_value > 1e-3


def test_the_chi_square_above_would_see_a_wrong_temperature() -> None:
    n, p = 40_000, exact(temperature=1.0)
    drawn = draw(shaped({"temperature": 1.05}, n), np.random.default_rng(0).random(n)).numpy()
    assert ((np.bincount(drawn, minlength=len(p)) - n * p) ** 2 / (n * p)).sum() > 50  # 7 degrees of freedom


@pytest.mark.parametrize("settings", BEHAVIOURS.values(), ids=BEHAVIOURS)
def test_scores_are_the_log_probabilities_of_the_truncated_distribution(settings: dict[str, Any]) -> None:
    p = exact(**settings)
    ours = log_prob(shaped(settings, len(p)), torch.arange(len(p))).numpy()
    with np.errstate(divide="ignore"):
        np.testing.assert_allclose(ours, np.log(p), atol=1e-5)


@pytest.mark.parametrize("uniform", EDGES)
@pytest.mark.parametrize("settings", BEHAVIOURS.values(), ids=BEHAVIOURS)
def test_no_uniform_however_extreme_draws_a_forbidden_token(settings: dict[str, Any], uniform: float) -> None:
    (token,) = draw(shaped(settings), np.array([uniform])).tolist()
    assert exact(**settings)[token] > 0


@pytest.mark.parametrize("uniform", EDGES)
@pytest.mark.parametrize("seed", range(3))
def test_nor_in_a_large_vocabulary_with_tiny_tails(seed: int, uniform: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows, vocabulary = 8, 50_257
    logits = 12 * torch.randn(rows, vocabulary, generator=generator)
    forbidden = torch.rand(rows, vocabulary, generator=generator) < 0.5
    forbidden[: rows // 2, :100] = forbidden[: rows // 2, -100:] = True  # the ends, where rounding errs
    forbidden[-1] = True
    forbidden[-1, 31_415] = False  # one way out
    tokens = draw(logits.masked_fill(forbidden, -torch.inf), np.full(rows, uniform))
    assert not forbidden.gather(1, tokens[:, None]).any()
    assert tokens[-1] == 31_415


def test_a_uniform_of_zero_skips_forbidden_tokens_in_front() -> None:
    logits = torch.tensor([[-torch.inf, -torch.inf, 0.0, 1.0]])
    assert draw(logits, np.array([0.0])).tolist() == [2]


def test_the_inverse_of_the_cdf_worked_by_hand() -> None:
    logits = torch.tensor([[0.5, 0.25, 0.25]]).log().expand(5, -1)
    assert draw(logits, np.array([0.0, 0.49, 0.51, 0.74, 0.76])).tolist() == [0, 0, 1, 1, 2]


def test_top_k_keeps_ties_and_top_p_always_keeps_the_most_probable_token() -> None:
    raw = torch.tensor([[1.0, 1.0, 1.0, 0.0]])
    assert torch.isfinite(Behaviour(top_k=2).logits(raw)).tolist() == [[True, True, True, False]]
    assert torch.isfinite(Behaviour(top_p=1e-9).logits(torch.tensor([[0.0, 3.0, 1.0]]))).tolist() == [
        [False, True, False]
    ]


def test_a_mask_may_depend_on_the_observation() -> None:
    def not_twice(observations: np.ndarray) -> np.ndarray:
        return np.arange(4) != observations[:, -1:]

    logits = Behaviour(action_mask=not_twice).logits(torch.zeros(2, 4), np.array([[0, 3], [0, 1]]))
    assert torch.isinf(logits).nonzero().tolist() == [[0, 3], [1, 1]]


@pytest.mark.parametrize("settings", BEHAVIOURS.values(), ids=BEHAVIOURS)
def test_gradients_reach_the_allowed_logits_and_are_never_nan(settings: dict[str, Any]) -> None:
    raw = torch.from_numpy(LOGITS)[None].requires_grad_()
    p = torch.from_numpy(exact(**settings))
    best = p.argmax()
    log_prob(Behaviour(**settings).logits(raw, np.zeros((1, 1), np.int64)), best[None]).backward()
    expected = torch.nn.functional.one_hot(best, len(p)) - p  # of log softmax
    torch.testing.assert_close(raw.grad[0] * settings.get("temperature", 1.0), expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, r"temperature > 0, got 0.0.*deterministic=True"),
        ({"temperature": float("nan")}, "temperature > 0, got nan"),
        ({"top_k": 0}, "top_k >= 1 or None, got 0"),
        ({"top_p": 0.0}, "0 < top_p <= 1 or None, got 0.0"),
        ({"top_p": 1.5}, "0 < top_p <= 1 or None, got 1.5"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Behaviour(**settings)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (lambda observations: np.zeros((1, 8), bool), "forbids every token at some observation"),
        (lambda observations: np.ones((1, 7), bool), r"to have the shape \(1, 8\), got \(1, 7\)"),
        (lambda observations: np.ones((1, 1), bool), r"to have the shape \(1, 8\), got \(1, 1\)"),
        (lambda observations: np.ones((1, 8)), "to be bool .* got dtype float64"),
    ],
)
def test_masks_that_make_no_sense_are_refused(mask: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        shaped({"action_mask": mask})


# ---------------------------------------------------------------------- large vocabularies are drawn block by block


@pytest.mark.parametrize("size", [700, 2_048, 2_049, 2_560, 3_000])  # drawn directly, or by blocks of 256
def test_a_large_vocabulary_is_drawn_as_its_cumulative_distribution_says(size: int) -> None:
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.normal(size=(50, size)) * 3).float()
    logits[:, [0, size - 1, *rng.integers(size, size=300)]] = -torch.inf
    uniforms = np.concatenate([rng.random(46), [0.0, 1e-12, 1 - 2.0**-24, np.nextafter(1.0, 0.0)]])
    tokens, scores = draw_scored(logits, uniforms)
    p = np.exp(logits.double().numpy() - logits.double().logsumexp(-1, keepdim=True).numpy())
    cdf = p.cumsum(axis=1)
    at = np.arange(50)
    assert (p[at, tokens] > 0).all()
    assert (cdf[at, tokens] >= uniforms - 1e-5).all()  # the cdf passes the uniform at the token drawn,
    assert (cdf[at, tokens] - p[at, tokens] <= uniforms + 1e-5).all()  # and not before
    np.testing.assert_allclose(scores, np.log(p[at, tokens]), atol=1e-5)


@pytest.mark.parametrize(("size", "limit"), [(600, "DRAW_DIRECTLY_AT_ONCE"), (3_000, "DRAW_AT_ONCE")])
def test_rows_drawn_in_groups_are_drawn_as_alone(monkeypatch: pytest.MonkeyPatch, size: int, limit: str) -> None:
    rng = np.random.default_rng(0)
    logits, uniforms = torch.from_numpy(rng.normal(size=(7, size))).float(), rng.random(7)
    whole = draw_scored(logits, uniforms)
    monkeypatch.setattr(f"textenv.sampling.{limit}", 2 * size)
    for one, other in zip(whole, draw_scored(logits, uniforms), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("settings", BEHAVIOURS.values(), ids=BEHAVIOURS)
def test_gradients_of_scores_are_the_softmaxs(settings: dict[str, Any]) -> None:
    p, action = exact(**settings), int(np.argmax(exact(**settings)))
    raw = torch.from_numpy(LOGITS).float()[None].requires_grad_()
    (
        2 * log_prob(Behaviour(**settings).logits(raw, np.zeros((1, 1), np.int64)), torch.tensor([action]))
    ).sum().backward()
    expected = 2 * ((np.arange(len(p)) == action) - p) / settings.get("temperature", 1.0)
    np.testing.assert_allclose(raw.grad[0], expected, atol=1e-5)


@pytest.mark.parametrize("settings", BEHAVIOURS.values(), ids=BEHAVIOURS)
def test_entropy_is_that_of_the_truncated_distribution(settings: dict[str, Any]) -> None:
    p = exact(**settings)
    expected = -sum(x * np.log(x) for x in p if x > 0)
    assert entropy(shaped(settings)).item() == pytest.approx(expected, abs=1e-5)
    assert entropy(shaped(settings).requires_grad_()).item() == pytest.approx(expected, abs=1e-5)


def test_scores_entropies_and_gradients_of_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(7, 600), scale=3)
    rows[:, ::5] = -np.inf
    actions = 1 + 5 * rng.integers(119, size=7)
    raw = torch.from_numpy(rows).float().requires_grad_()
    monkeypatch.setattr("textenv.sampling.ENTROPY_AT_ONCE", 2 * 600)  # two rows at a time
    scores, entropies = log_prob_and_entropy(raw, torch.from_numpy(actions))

    p = np.exp(rows - rows.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(scores.detach(), np.log(p[np.arange(7), actions]), atol=1e-5)
    np.testing.assert_allclose(entropies, -np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0).sum(axis=1), atol=1e-5)
    for _ in range(2):  # going back once more finds what was kept as it was
        raw.grad = None
        scores.sum().backward(retain_graph=True)
        np.testing.assert_allclose(raw.grad, (np.arange(600) == actions[:, None]) - p, atol=1e-6)
    assert not entropies.requires_grad


@pytest.mark.parametrize("before", [lambda x: x, torch.square], ids=["leaf", "behind a square"])
@pytest.mark.parametrize("after", [torch.sum, lambda s: s.exp().sum()], ids=["linear", "exponential"])
def test_second_derivatives_of_scores_are_those_of_the_plain_formula(before: Any, after: Any) -> None:
    weights = torch.linspace(-1.0, 2.0, 12, dtype=torch.float64).view(3, 4)
    actions = torch.tensor([3, 0, 2])

    def plain(w: torch.Tensor) -> torch.Tensor:
        return after(before(w).log_softmax(dim=-1).gather(1, actions[:, None]))

    def ours(w: torch.Tensor) -> torch.Tensor:
        return after(log_prob(before(w), actions))

    hessian = torch.autograd.functional.hessian
    torch.testing.assert_close(hessian(ours, weights), hessian(plain, weights))


def test_an_offset_of_all_logits_leaves_the_entropy_as_it_is() -> None:
    logits = torch.from_numpy(
        np.random.default_rng(0).integers(-8, 8, size=(5, 100)) / 4
    ).float()  # exact with an offset, too
    scored = log_prob_and_entropy(logits + 10_000, torch.zeros(5, dtype=torch.long))[1]
    assert torch.equal(scored, log_prob_and_entropy(logits, torch.zeros(5, dtype=torch.long))[1])


def test_no_rows_have_no_scores() -> None:
    scores, entropies = log_prob_and_entropy(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long))
    assert scores.shape == entropies.shape == (0,)
