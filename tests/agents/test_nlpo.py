"""NLPO: one mask for sampling, scoring and training. (Its expected gradient: test_gradients.py.)"""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import torch

from agents.nlpo import NLPO, NLPOConfig, nucleus
from agents.rollout import collect

from .test_checkpoints import assert_same
from .world import PassThrough, build_model, plain_logits, same_tensors

SMALL = {"episodes_per_update": 8, "minibatch_episodes": 4, "warmup_iterations": 0}


def test_nucleus_hand_worked():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.05, 0.9, 0.05, 0.0]]))
    assert nucleus(logits, 0.7, 1).tolist() == [[True, True, False, False], [False, True, False, False]]
    assert nucleus(logits, 0.9, 1).tolist() == [[True, True, True, False], [False, True, False, False]]
    assert nucleus(logits, 0.7, 3)[0].tolist() == [True, True, True, False]
    assert not nucleus(logits, 0.7, 4)[1, 3]  # what is not allowed stays out, whatever the least size
    assert nucleus(logits, 1.0, 1)[0].all()


def by_hand(agent, episode, top_p, temperature=1.0):
    """Log-probabilities of the drawn tokens: the policy renormalised over the mask policy's nucleus, in numpy."""
    out = []
    n, m = episode.response_length, episode.prompt_length
    ours, masks = (
        plain_logits(lm.model, episode.tokens, m).detach().double().numpy() / temperature
        for lm in (agent.policy.lm, agent.policy.mask_lm)
    )
    for t in range(n):
        q = np.exp(masks[t]) / np.exp(masks[t]).sum()
        order = np.argsort(-q)
        inside = order[: int(np.searchsorted(np.cumsum(q[order]), top_p)) + 1]
        token = episode.tokens[m + t]
        assert token in inside
        out.append(ours[t, token] - np.log(np.exp(ours[t, inside]).sum()))
    return np.array(out)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampling_scoring_and_training_are_under_one_mask(make_envs, temperature):
    agent = NLPO(make_envs(temperature=temperature), seed=0, mask_top_p=0.6, learning_rate=0.02, **SMALL).learn(60)
    assert not same_tensors(agent.policy.model.state_dict(), agent.policy.mask_lm.model.state_dict())
    episodes = collect(agent.env, agent.policy, 12, agent.rng)
    scored, _, _ = agent.policy.evaluate(episodes, np.arange(12))
    for i, episode in enumerate(episodes):
        expected = by_hand(agent, episode, 0.6, temperature)
        np.testing.assert_allclose(episode.log_probs, expected, atol=1e-4)
        np.testing.assert_allclose(scored[i, : len(expected)].detach().numpy(), expected, atol=1e-4)
        reference = agent.lanes.task.model
        log_ref = (plain_logits(reference, episode.tokens, episode.prompt_length) / temperature).log_softmax(-1)
        response = episode.tokens[episode.prompt_length :]
        log_ref = log_ref[range(len(response)), response].detach().numpy()  # the reference is not masked
        assert episode.kl == pytest.approx((expected - log_ref).sum(), abs=1e-3)


def test_the_kl_starts_above_zero(make_envs):
    row = NLPO(make_envs(), seed=0, mask_top_p=0.6, **SMALL).learn(1).history[0]
    assert row["rollout/kl"] > 0.1
    assert row["rollout/return"] - row["rollout/task_reward"] == pytest.approx(-0.1 * row["rollout/kl"], abs=1e-6)


def test_log_probs_of_all_tokens_are_a_distribution_of_the_nucleus(make_envs):
    agent = NLPO(make_envs(action_mask=np.arange(10) != 3), seed=0, mask_top_p=0.6, mask_min_tokens=2)
    observations, _ = agent.env.reset(seed=0)
    table = agent.policy.log_probs_all(observations)
    np.testing.assert_allclose(np.exp(table).sum(axis=1), 1.0, atol=1e-6)
    assert ((np.isfinite(table).sum(axis=1) >= 2) & (np.isfinite(table).sum(axis=1) < 9)).all()
    assert (table[:, 3] == -np.inf).all()
    actions, log_probs = agent.policy.act(observations, np.random.default_rng(0))
    np.testing.assert_allclose(log_probs, table[np.arange(8), actions], atol=1e-6)
    agent.policy.invalidate()
    np.testing.assert_allclose(agent.policy.log_probs(observations, actions), log_probs, atol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("wrapper", [None, PassThrough])
def test_first_ratio_is_one(make_envs, wrapper, kind):
    envs = make_envs(model=build_model(kind), temperature=0.7)
    agent = NLPO(wrapper(envs) if wrapper else envs, seed=0, mask_top_p=0.7, learning_rate=0.01, **SMALL).learn(150)
    assert len(agent.history) > 3
    assert max(row["train/first_ratio_error"] for row in agent.history) < 1e-4


def test_the_mask_policy_follows_every_few_rollouts(make_envs):
    agent = NLPO(make_envs(), seed=0, mask_update_iterations=3, **SMALL)
    distances, update = [], agent.update

    def note(episodes):
        ours, mask = agent.policy.model.state_dict(), agent.policy.mask_lm.model.state_dict()
        distances.append(max((ours[name] - mask[name]).abs().max().item() for name in ours))
        update(episodes)

    agent.update = note
    agent.learn(250)
    assert len(distances) > 6
    for i, distance in enumerate(distances):
        assert (distance == 0) == (i % 3 == 0)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_resume_is_bit_exact(make_envs, tmp_path, kind):
    """The mask policy is part of a checkpoint (with GPT-2's tied weights, which are stored once)."""

    def envs():
        return make_envs(model=build_model(kind))

    config = {"mask_top_p": 0.7, "mask_update_iterations": 4, "decay_timesteps": 300, **SMALL}
    whole = NLPO(envs(), seed=0, **config).learn(160)
    half = NLPO(envs(), seed=0, **config).learn(80)
    assert len(half.history) % 4 != 0
    half.save(tmp_path / "half")
    resumed = NLPO.load(tmp_path / "half", envs())
    assert len(resumed.history) < len(whole.history)
    assert_same(resumed.learn(80), whole)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [("mask_top_p", 0.0, "0 < mask_top_p <= 1, got 0.0"), ("mask_min_tokens", 0, ">= 1, got 0"), ("mask_update_iterations", 0, ">= 1"),
     ("top_k", 5, "Set mask_top_p"), ("top_p", 0.9, "Set mask_top_p"), ("epochs", 0, ">= 1")],
)  # fmt: skip
def test_impossible_settings_are_refused(field, value, message):
    with pytest.raises(ValueError, match=message) as error:
        NLPOConfig(**{field: value})
    assert field in str(error.value)


def test_raises_the_exact_score():
    envs = gym.make_vec("textenv/Tree-v0", num_envs=32, horizon=3, seed_of_task=5)
    agent = NLPO(envs, seed=0, episodes_per_update=32, learning_rate=3e-3, decay_timesteps=4_000, warmup_iterations=2)
    before = envs.unwrapped.evaluate(agent.policy).score
    assert envs.unwrapped.evaluate(agent.learn(4_000).policy).score > before + 0.3
