"""Advantages and reductions against hand-worked values, plain loops, and stable-baselines3's own buffer."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3.common.buffers import RolloutBuffer

from agents.advantages import (
    aggregate,
    gae,
    group_advantages,
    kl_terms,
    leave_one_out,
    masked_mean,
    normalize,
    returns_to_go,
    whiten,
)


def ragged(seed=0, rows=6, width=7):
    rng = np.random.default_rng(seed)
    lengths = np.array([7, 1, 3, 7, 2, 5])[:rows]
    mask = np.arange(width) < lengths[:, None]
    rewards, values = (rng.normal(size=(rows, width)) * mask for _ in range(2))
    return lengths, torch.from_numpy(mask), torch.from_numpy(rewards), torch.from_numpy(values)


def test_gae_hand_worked():
    # delta = r + V' - V = 1 + 1 - 0.5, 0 - 1 - 1, 2 + 0 + 1;  A = 3, then -2 + 3/2, then 1.5 - 0.5/2
    rewards, values = torch.tensor([[1.0, 0.0, 2.0]]), torch.tensor([[0.5, 1.0, -1.0]])
    advantages, targets = gae(rewards, values, torch.ones(1, 3, dtype=torch.bool), gamma=1.0, lam=0.5)
    assert advantages.tolist() == [[1.25, -0.5, 3.0]]
    assert targets.tolist() == [[1.75, 0.5, 2.0]]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (1.0, 0.0)])
@pytest.mark.parametrize("cut", [False, True])
def test_gae_equals_stable_baselines3(gamma, lam, cut):
    """The rows stand one after another in one lane of SB3's buffer, so a leak over a border would show."""
    lengths, mask, rewards, values = ragged()
    bootstrap = torch.zeros(len(lengths), dtype=torch.float64)
    if cut:
        bootstrap[[1, 4]] = torch.tensor([2.0, -3.0], dtype=torch.float64)
    space = gym.spaces.Box(0, 1, (1,))
    buffer = RolloutBuffer(
        int(lengths.sum()), space, gym.spaces.Discrete(2), gamma=gamma, gae_lambda=lam, n_envs=1, device="cpu"
    )
    for i, n in enumerate(lengths):
        for t in range(n):
            # SB3 bootstraps a truncated episode by adding gamma V to its last reward ("Handle timeout by bootstraping")
            extra = gamma * bootstrap[i].item() if t == n - 1 else 0.0
            reward, value = np.array([rewards[i, t].item() + extra]), values[i, t].reshape(1, 1)
            buffer.add(np.zeros((1, 1)), np.zeros((1, 1)), reward, np.array([t == 0]), value, torch.zeros(1))
    buffer.compute_returns_and_advantage(torch.zeros(1), np.ones(1))

    advantages, targets = gae(rewards, values, mask, gamma, lam, bootstrap)
    np.testing.assert_allclose(advantages[mask].numpy(), buffer.advantages[:, 0], atol=1e-5)
    np.testing.assert_allclose(targets[mask].numpy(), buffer.returns[:, 0], atol=1e-5)
    assert (advantages[~mask] == 0).all()
    assert (targets[~mask] == 0).all()


def test_lambda_one_is_return_minus_value():
    lengths, mask, rewards, values = ragged()
    advantages, targets = gae(rewards, values, mask, lam=1.0)
    for i, n in enumerate(lengths):
        to_go = [rewards[i, t:n].sum().item() for t in range(n)]
        np.testing.assert_allclose(advantages[i, :n].numpy(), np.array(to_go) - values[i, :n].numpy(), atol=1e-12)
        np.testing.assert_allclose(targets[i, :n].numpy(), to_go, atol=1e-12)


def test_rows_are_episodes_of_their_own():
    _, mask, rewards, values = ragged()
    together, _ = gae(rewards, values, mask)
    for i in range(len(mask)):
        alone, _ = gae(rewards[i : i + 1], values[i : i + 1], mask[i : i + 1])
        assert torch.equal(alone[0], together[i])


def test_bootstrap_counts_where_a_row_was_cut_and_nowhere_else():
    """A chain that pays 1 for ever, cut at three steps, is worth 1 / (1 - gamma) everywhere. Without bootstrap it is not."""
    gamma, value = 0.9, 1 / (1 - 0.9)
    rewards, values = torch.ones(2, 3), torch.full((2, 3), value)
    mask = torch.ones(2, 3, dtype=torch.bool)
    cut, _ = gae(rewards, values, mask, gamma, 0.95, bootstrap=torch.tensor([value, 0.0]))
    torch.testing.assert_close(cut[0], torch.zeros(3))
    assert (cut[1] < -1).all()


def test_whiten_hand_worked():
    # mean 2, *population* variance 1 (a sample variance would be 2); what is masked takes no part
    x, mask = torch.tensor([[1.0, 100.0], [3.0, -7.0]]), torch.tensor([[True, False], [True, False]])
    torch.testing.assert_close(whiten(x, mask), torch.tensor([[-1.0, 0.0], [1.0, 0.0]]))
    torch.testing.assert_close(whiten(x, mask, shift_mean=False), torch.tensor([[1.0, 0.0], [3.0, 0.0]]))
    # mean 2, standard deviation 2
    x, mask = torch.tensor([[0.0, 0.0, 4.0, 4.0]]), torch.ones(1, 4, dtype=torch.bool)
    torch.testing.assert_close(whiten(x, mask), torch.tensor([[-1.0, -1.0, 1.0, 1.0]]))
    torch.testing.assert_close(whiten(x, mask, shift_mean=False), torch.tensor([[1.0, 1.0, 3.0, 3.0]]))


def test_whitening_equal_values_stays_finite():
    x, mask = torch.full((2, 2), 5.0), torch.ones(2, 2, dtype=torch.bool)
    assert (whiten(x, mask) == 0).all()


@pytest.mark.parametrize("value", [0.1, 1000.1, -3e7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_whitening_does_not_scale_rounding_noise_up(value, dtype):
    """Equal up to the last digits: the wrong setting, plain (x - mean) / std, makes advantages of 1 of them."""
    rng = np.random.default_rng(0)
    noise = 1 + torch.finfo(dtype).eps * torch.from_numpy(rng.integers(-1, 2, size=(64, 9))).to(dtype)
    x, mask = value * noise, torch.ones(64, 9, dtype=torch.bool)
    assert len(x.unique()) > 1
    assert (whiten(x, mask) == 0).all()
    assert ((x - x.mean()) / x.std()).abs().max() > 0.5


def test_whitening_ignores_what_is_masked():
    x, mask = torch.tensor([[5.0, 5.0, 1e9]]), torch.tensor([[True, True, False]])
    assert (whiten(x, mask) == 0).all()
    x = torch.tensor([[1.0, 3.0, 1e9]])
    torch.testing.assert_close(whiten(x, mask), torch.tensor([[-1.0, 1.0, 0.0]]))


def test_normalize_is_over_the_whole_batch():
    torch.testing.assert_close(normalize(torch.tensor([1.0, 3.0, 1.0, 3.0])), torch.tensor([-1.0, 1.0, -1.0, 1.0]))
    assert (normalize(torch.full((3,), 0.1)) == 0).all()


# ---------------------------------------------------------------------- returns, groups


def test_returns_to_go_hand_worked():
    rewards, mask = torch.tensor([[1.0, 2.0, 4.0], [3.0, 5.0, 99.0]]), torch.tensor([[True] * 3, [True, True, False]])
    assert returns_to_go(rewards, mask).tolist() == [[7.0, 6.0, 4.0], [8.0, 5.0, 0.0]]


def test_returns_to_go_equals_a_loop():
    lengths, mask, rewards, _ = ragged()
    ours = returns_to_go(rewards, mask)
    for i, n in enumerate(lengths):
        for t in range(7):
            assert ours[i, t].item() == pytest.approx(sum(rewards[i, s].item() for s in range(t, n)), abs=1e-12)


def test_leave_one_out_hand_worked():
    # 1 - (2 + 6) / 2, 2 - (1 + 6) / 2, 6 - (1 + 2) / 2
    assert leave_one_out(torch.tensor([[1.0, 2.0, 6.0]])).tolist() == [[-3.0, -1.5, 4.5]]


@pytest.mark.parametrize("size", [2, 3, 8])
def test_leave_one_out_equals_a_loop_and_k_over_k_minus_one_times_the_centred_return(size):
    returns = np.random.default_rng(1).normal(size=(5, size))
    ours = leave_one_out(torch.from_numpy(returns)).numpy()
    for p in range(5):
        for k in range(size):
            others = [returns[p, j] for j in range(size) if j != k]
            assert ours[p, k] == pytest.approx(returns[p, k] - sum(others) / len(others), abs=1e-12)
    np.testing.assert_allclose(ours, size / (size - 1) * (returns - returns.mean(axis=1, keepdims=True)), atol=1e-12)
    np.testing.assert_allclose(
        ours, size / (size - 1) * group_advantages(torch.from_numpy(returns)).numpy(), atol=1e-12
    )


def test_group_advantages_hand_worked():
    # mean 3, squares 4 + 1 + 9 = 14 -> sd sqrt(14 / 2)
    returns = torch.tensor([[1.0, 2.0, 6.0]])
    assert group_advantages(returns).tolist() == [[-2.0, -1.0, 3.0]]
    expected = torch.tensor([[-2.0, -1.0, 3.0]]) / (np.sqrt(7) + 1e-4)
    torch.testing.assert_close(group_advantages(returns, scale_by_std=True), expected)


def test_groups_are_apart():
    together = group_advantages(torch.tensor([[0.0, 2.0], [100.0, 200.0]]))
    assert together.tolist() == [[-1.0, 1.0], [-50.0, 50.0]]


@pytest.mark.parametrize("advantages", [leave_one_out, group_advantages, lambda r: group_advantages(r, True)])
@pytest.mark.parametrize("value", [0.1, 1000.1, -1e6 / 3])
def test_an_all_equal_group_has_no_advantage_at_all(advantages, value):
    returns = torch.full((1, 3), value)
    assert (advantages(returns) == 0).all()
    assert (advantages(returns.double()) == 0).all()


# ---------------------------------------------------------------------- reductions, KL terms


def test_aggregate_hand_worked():
    loss, mask = torch.tensor([[1.0, 2.0, 3.0], [10.0, 99.0, 99.0]]), torch.tensor([[True] * 3, [True, False, False]])
    assert aggregate(loss, mask, "token", 5).item() == pytest.approx(16 / 4)
    assert aggregate(loss, mask, "sequence", 5).item() == pytest.approx((2 + 10) / 2)
    assert aggregate(loss, mask, "fixed", 5).item() == pytest.approx((6 + 10) / (2 * 5))
    with pytest.raises(ValueError, match="token"):
        aggregate(loss, mask, "mean", 5)


def test_aggregate_equals_loops():
    lengths, mask, loss, _ = ragged()
    rows = [[loss[i, t].item() for t in range(n)] for i, n in enumerate(lengths)]
    expected = {
        "token": sum(map(sum, rows)) / sum(map(len, rows)),
        "sequence": sum(sum(row) / len(row) for row in rows) / len(rows),
        "fixed": sum(map(sum, rows)) / (len(rows) * 11),
    }
    for how, value in expected.items():
        assert aggregate(loss, mask, how, 11).item() == pytest.approx(value, abs=1e-12)


def test_kl_terms_hand_worked():
    log_ratio, ratio = torch.tensor([np.log(2.0), 0.0, -np.log(2.0)]), torch.tensor([3.0, 3.0, 3.0])
    torch.testing.assert_close(kl_terms(log_ratio, ratio, "k2"), log_ratio**2 / 2)
    k3 = torch.tensor([0.5 - 1 + np.log(2.0), 0.0, 2 - 1 - np.log(2.0)])
    torch.testing.assert_close(kl_terms(log_ratio, ratio, "k3"), k3)
    torch.testing.assert_close(kl_terms(log_ratio, ratio, "ratio_k3"), 3 * k3)
    assert (kl_terms(torch.tensor([-torch.inf]), torch.tensor([0.0]), "k2") == 0).all()
    with pytest.raises(ValueError, match="ratio_k3"):
        kl_terms(log_ratio, ratio, "k1")


def test_masked_mean():
    x, mask = torch.tensor([[1.0, 2.0], [6.0, 50.0]]), torch.tensor([[True, True], [True, False]])
    assert masked_mean(x, mask).item() == 3.0
    assert masked_mean(x, torch.zeros(2, 2, dtype=torch.bool)).item() == 0.0
