"""Half precision: tokens drawn by a rounded copy, a rounded reference, and a policy that is trained in float32 all the same."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from agents import A2C, GRPO, ILQL, NLPO, PPO, REINFORCE, RLOO
from agents.advantages import IMPORTANCE_CAP, importance_weights
from agents.rollout import collect

from .world import PassThrough, same_tensors

HALF = {"rollout_dtype": "bfloat16"}


def read_in_half(model, folder):
    """As `transformers` reads a checkpoint in bfloat16."""
    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()


def last_log_probs(model, observations):
    rows = [row[row != model.config.vocab_size] for row in observations]
    with torch.no_grad():
        logits = [model(torch.from_numpy(row)[None]).logits[0, -1].double() for row in rows]
    return torch.stack(logits).log_softmax(-1).numpy()


def test_tokens_are_drawn_by_the_weights_in_bfloat16_as_new_as_they_are(make_envs, tmp_path):
    agent = PPO(make_envs(), seed=0, **HALF)
    policy, seen = agent.policy, []
    for step in range(2):
        observations, _ = agent.env.reset()
        plain = read_in_half(policy.model, tmp_path / str(step))
        table = policy.log_probs_all(observations)
        np.testing.assert_allclose(table, last_log_probs(plain, observations), atol=0.1)
        assert np.abs(table - last_log_probs(policy.model, observations)).max() > 1e-4
        assert all(
            torch.equal(*pair) for pair in zip(policy.sampler.model.parameters(), plain.parameters(), strict=True)
        )
        tokens, drawn = policy.act(observations, np.random.default_rng(0))
        np.testing.assert_allclose(drawn, table[np.arange(len(tokens)), tokens], atol=1e-6)
        np.testing.assert_array_equal(policy.log_probs(observations, tokens), drawn)
        seen.append(table)
        policy.model.get_output_embeddings().weight.data.mul_(2.0)
    assert np.abs(seen[1] - seen[0]).max() > 0.5
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    assert {b.dtype for b in policy.sampler.model.buffers()} == {
        torch.float32
    }  # a rotation's frequencies keep their digits


def test_without_it_there_is_no_copy(make_envs):
    policy = PPO(make_envs(), seed=0).policy
    assert policy.sampler is policy.lm


@pytest.mark.parametrize("wrapper", [None, PassThrough])
def test_episodes_carry_the_probabilities_by_which_they_were_drawn(make_envs, tmp_path, wrapper):
    envs = make_envs()
    agent = PPO(wrapper(envs) if wrapper else envs, seed=0, **HALF)
    agent.policy.model.get_output_embeddings().weight.data.mul_(1.5)
    episodes = collect(agent.env, agent.policy, 12, agent.rng)
    plain = read_in_half(agent.policy.model, tmp_path)
    for episode in episodes:
        with torch.no_grad():
            logits = plain(torch.from_numpy(episode.tokens)[None]).logits[0, episode.prompt_length - 1 : -1].double()
        drawn = logits.log_softmax(-1)[range(episode.response_length), episode.tokens[episode.prompt_length :]]
        np.testing.assert_allclose(episode.log_probs, drawn, atol=0.05)
    np.testing.assert_allclose(episodes.rewards.sum(axis=1), episodes.task_reward - 0.1 * episodes.kl, atol=1e-6)
    exact, _, _ = agent.policy.evaluate(episodes, np.arange(12))
    error = np.abs(exact.detach().numpy() - episodes.log_probs[:, : exact.shape[1]])
    assert 1e-4 < error.max() < 0.1


@pytest.mark.parametrize("cls", [PPO, NLPO, A2C, REINFORCE, RLOO, GRPO])
def test_agents_learn_from_them_and_log_how_far_off_they_were(make_envs, cls):
    agent = cls(make_envs(group_size=4 if cls.needs_groups else 1), seed=0, episodes_per_update=8, **HALF).learn(60)
    assert all(np.isfinite(value) for row in agent.history for value in row.values())
    assert all(1e-4 < row["train/first_ratio_error"] < 0.1 for row in agent.history)
    assert {p.dtype for p in agent.policy.parameters()} == {torch.float32}


def test_a_resumed_run_repeats_an_undisturbed_one(make_envs, tmp_path):
    def make():
        return make_envs(group_size=4)

    config = {"seed": 0, "episodes_per_update": 8, "minibatch_episodes": 8} | HALF
    whole = RLOO(make(), **config).learn(80)
    RLOO(make(), **config).learn(40).save(tmp_path / "half")
    resumed = RLOO.load(tmp_path / "half", make()).learn(40)
    assert resumed.config.rollout_dtype == "bfloat16"
    assert same_tensors(resumed.policy.model.state_dict(), whole.policy.model.state_dict())


def test_importance_weights_by_hand():
    log_probs = torch.tensor([[-1.0, -2.0], [-1.0, 9.0], [0.0, 0.0]], requires_grad=True)
    drawn = torch.tensor([[-1.1, -1.7], [-1.2, -9.0], [-3.0, -3.0]])
    mask = torch.tensor([[True, True], [True, False], [True, True]])
    weights = importance_weights(log_probs, drawn, mask)
    assert not weights.requires_grad
    torch.testing.assert_close(weights, torch.tensor([[np.exp(-0.2)], [np.exp(0.2)], [IMPORTANCE_CAP]]).float())


# ---------------------------------------------------------------------- a reference in half precision


@pytest.fixture
def half_model(model, tmp_path):
    return read_in_half(model, tmp_path / "reference")


def test_the_policy_of_a_rounded_reference_is_trained_in_float32(make_envs, half_model):
    agent = RLOO(make_envs(model=half_model, group_size=4), seed=0, episodes_per_update=8)
    pairs = list(zip(agent.policy.parameters(), half_model.parameters(), strict=True))
    assert all(torch.equal(p, r.float()) and p.dtype == torch.float32 for p, r in pairs)
    before = [r.clone() for _, r in pairs]
    agent.learn(60)
    assert agent.history[0]["rollout/kl"] == pytest.approx(0, abs=0.05)
    assert all(torch.equal(r, b) and r.dtype == torch.bfloat16 for (_, r), b in zip(pairs, before, strict=True))
    assert not any(torch.equal(p, b.float()) for (p, _), b in zip(pairs, before, strict=True))
    assert all(row["train/first_ratio_error"] < 1e-4 for row in agent.history)  # drawn in float32


def test_rounded_alike_policy_and_reference_begin_at_a_kl_of_zero(make_envs, half_model):
    agent = PPO(PassThrough(make_envs(model=half_model)), seed=0, **HALF)
    episodes = collect(agent.env, agent.policy, 12, agent.rng)
    assert (episodes.kl == 0).all()


# ---------------------------------------------------------------------- what does not go together


@pytest.mark.parametrize(
    ("cls", "config", "message"),
    [
        (PPO, {"rollout_dtype": "float16"}, "Expected rollout_dtype to be 'bfloat16' or None, got 'float16'"),
        (PPO, HALF | {"top_k": 3}, "goes with neither top_k nor top_p"),
        (RLOO, HALF | {"top_p": 0.9}, "goes with neither top_k nor top_p"),
        (GRPO, HALF | {"variant": "gspo"}, "clip range is as narrow as the rounding"),
        (ILQL, HALF, "Expected rollout_dtype=None"),
    ],
)
def test_settings_that_make_no_sense_are_refused(cls, config, message):
    with pytest.raises(ValueError, match=message):
        cls.Config(**config)
