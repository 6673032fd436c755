"""The floor: uniform over what is allowed, whatever the head."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from agents import RandomAgent

from .world import build_model


def biased_model():
    """GPT-J: its head has a bias."""
    from transformers import GPTJConfig, GPTJForCausalLM

    torch.manual_seed(0)
    model = GPTJForCausalLM(
        GPTJConfig(vocab_size=10, n_embd=16, n_layer=1, n_head=2, rotary_dim=4, n_positions=64, bos_token_id=None, eos_token_id=0)
    )  # fmt: skip
    torch.nn.init.normal_(model.lm_head.bias)
    return model


MODELS = {"untied": build_model, "tied": lambda: build_model("gpt2"), "biased head": biased_model}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("allowed", [np.ones(10, bool), np.arange(10) % 3 != 0], ids=["all", "masked"])
def test_uniform_over_allowed_tokens(make_envs, name, allowed):
    envs = make_envs(model=MODELS[name](), action_mask=allowed, max_new_tokens=4)
    agent = RandomAgent(envs, seed=0)
    observations, _ = envs.reset(seed=0)
    expected = np.where(allowed, -np.log(allowed.sum()), -np.inf)
    for _ in range(4):
        table = agent.policy.log_probs_all(observations)
        np.testing.assert_allclose(table, np.tile(expected, (8, 1)), atol=1e-6)
        observations, *_ = envs.step(agent.predict(observations)[0])
    counts = np.bincount(agent.predict(np.repeat(observations[:1], 2000, axis=0))[0], minlength=10)
    assert (counts[~allowed] == 0).all()
    n = allowed.sum()
    assert ((counts[allowed] - 2000 / n) ** 2 / (2000 / n)).sum() < 27.9  # 0.999 quantile at 9 degrees of freedom


def test_pays_no_kl_and_reports_it(make_envs):
    envs = make_envs(beta=0.5)
    agent = RandomAgent(envs, seed=0).learn(100)
    assert envs.kl.policy is agent.policy
    assert not envs.kl.pay
    for row in agent.history:
        assert row["rollout/return"] == pytest.approx(row["rollout/task_reward"])
        assert row["rollout/kl"] > 0.1
    assert agent.accounts["optimizer_steps"] == 0


def test_the_environments_model_is_left_alone(make_envs, model):
    RandomAgent(make_envs(), seed=0)
    assert model.get_output_embeddings().weight.abs().max() > 0
