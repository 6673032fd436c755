"""GRPO and its variants: losses by hand, what each variant is equal to, and that it learns. (Gradients: test_gradients.py.)"""

from __future__ import annotations

import itertools

import gymnasium as gym
import numpy as np
import pytest
import torch

from agents.advantages import leave_one_out
from agents.grpo import GRPO, VARIANTS, GRPOConfig, clipped_losses, overlong
from agents.rloo import RLOO

from .test_checkpoints import assert_same
from .world import PassThrough, Truncate, build_model, count_a, same_tensors

SMALL = {"episodes_per_update": 8, "minibatch_episodes": 4}


def test_losses_hand_worked():
    # max(-1.5, -1.28), max(0.5, 0.8), max(1.5, 1.28), max(-0.5, -0.8): up to 1.28 and down to 0.8
    ratio, advantages = torch.tensor([[1.5, 1.2], [0.5, 0.9]]), torch.tensor([[1.0], [-1.0]])
    expected = torch.tensor([[-1.28, -1.2], [0.8, 0.9]])
    torch.testing.assert_close(clipped_losses(ratio, advantages, 0.2, 0.28), expected)


def test_overlong_penalty_hand_worked():
    # DAPO, eq. 13, with L_max = 10 and L_cache = 4: 0 up to 6, then (6 - n) / 4, negated
    lengths = np.array([1, 6, 7, 8, 10])
    assert overlong(lengths, 10, 0.4).tolist() == [0.0, 0.0, 0.25, 0.5, 1.0]


def test_a_variant_is_what_is_not_said_otherwise():
    assert GRPOConfig(variant="dapo").resolved().clip_high == 0.28
    assert GRPOConfig(variant="dapo", clip_high=0.5).resolved().clip_high == 0.5
    assert GRPOConfig(variant="dapo", dynamic_sampling=False).resolved().dynamic_sampling is False
    assert GRPOConfig(variant="dapo").clip_high is None  # so that a config can be given another variant
    for variant, settings in VARIANTS.items():
        resolved = GRPOConfig(variant=variant).resolved()
        assert {name: getattr(resolved, name) for name in settings} == settings
        assert settings.keys() == VARIANTS["grpo"].keys()


def test_a_config_takes_another_variant(make_envs):
    agent = GRPO(make_envs(group_size=4), config=GRPOConfig(**SMALL), variant="dr_grpo")
    assert agent.kl_placement == "reward"
    assert GRPO(make_envs(group_size=4), config=GRPOConfig(**SMALL)).kl_placement == "loss"


# ---------------------------------------------------------------------- what the variants are equal to


def first_gradient(cls, envs, **config):
    """Of a rollout that is the same for all: same seed, same weights."""
    agent = cls(envs, seed=0, episodes_per_update=8, minibatch_episodes=8, **config)
    taken = []

    def note(optimizer):
        taken.append(torch.cat([p.grad.flatten() for p in agent.policy.parameters()]).clone())
        optimizer.zero_grad()
        return 0.0

    agent.apply_gradients = note
    agent.learn(1)
    assert len(taken) == 1
    assert taken[0].norm() > 1e-3
    return taken[0]


def test_dr_grpo_is_rloo_up_to_a_factor(make_envs):
    grpo = first_gradient(GRPO, make_envs(group_size=4), variant="dr_grpo")
    rloo = first_gradient(RLOO, make_envs(group_size=4))
    torch.testing.assert_close(grpo, rloo * (3 / 4) / 5, atol=1e-6, rtol=1e-4)  # (G - 1) / G / max_new_tokens


def test_gspo_is_grpo_on_policy(make_envs):
    gspo = first_gradient(GRPO, make_envs(group_size=4), variant="gspo")
    grpo = first_gradient(GRPO, make_envs(group_size=4), variant="grpo", kl_placement="none")
    torch.testing.assert_close(gspo, grpo, atol=1e-6, rtol=1e-4)


def test_the_variants_differ_otherwise(make_envs):
    gradients = {variant: first_gradient(GRPO, make_envs(group_size=4), variant=variant) for variant in VARIANTS}
    directions = {variant: g / g.norm() for variant, g in gradients.items()}
    for a, b in itertools.combinations(VARIANTS, 2):
        if (a, b) != ("grpo", "gspo"):  # one and the same where the policy is the reference: k3 is flat there
            assert directions[a] @ directions[b] < 0.9999


@pytest.mark.parametrize("variant", VARIANTS)
def test_first_ratio_is_one(make_envs, variant):
    envs = make_envs(model=build_model("gpt2"), group_size=4, temperature=0.7)  # dropout 0.1 in its config
    agent = GRPO(envs, seed=0, variant=variant, top_k=5, **SMALL).learn(90)
    assert max(row["train/first_ratio_error"] for row in agent.history) < 1e-4


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("wrapper", [None, PassThrough])
def test_resume_is_bit_exact(make_envs, tmp_path, variant, wrapper):
    def envs():
        return wrapper(make_envs(group_size=4)) if wrapper else make_envs(group_size=4)

    config = {"variant": variant, "decay_timesteps": 200, **SMALL}
    whole = GRPO(envs(), seed=0, **config).learn(120)
    GRPO(envs(), seed=0, **config).learn(60).save(tmp_path / "half")
    resumed = GRPO.load(tmp_path / "half", envs())
    assert 1 <= len(resumed.history) < len(whole.history)
    assert_same(resumed.learn(60), whole)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_kl_is_counted_once(make_envs, variant):
    agent = GRPO(make_envs(group_size=4), seed=0, variant=variant, learning_rate=0.02, **SMALL).learn(200)
    placement, row = VARIANTS[variant]["kl_placement"], agent.history[-1]
    paid = row["rollout/return"] - row["rollout/task_reward"]
    assert abs(row["rollout/kl"]) > 1e-3
    assert paid == pytest.approx(-0.1 * row["rollout/kl"] if placement == "reward" else 0.0, abs=1e-6)
    assert ("train/kl_loss" in row) == (placement == "loss")


# ---------------------------------------------------------------------- groups that say nothing


@pytest.mark.parametrize("variant", VARIANTS)
def test_all_equal_groups_move_nothing(make_envs, variant):
    envs = make_envs(group_size=4, beta=0.0, reward=lambda completions, **_: [0.1] * len(completions))
    agent = GRPO(envs, seed=0, variant=variant, overlong_penalty=0.0, **SMALL)
    before = {name: t.clone() for name, t in agent.policy.model.state_dict().items()}
    agent.learn(50)
    assert same_tensors(agent.policy.model.state_dict(), before)
    assert agent.history[0]["train/informative_groups"] == 0
    assert agent.accounts["optimizer_steps"] == 0 or variant != "dapo"
    assert np.isfinite(list(agent.history[0].values())).all()


def rarely(prompts, completions, **columns):
    """Pays for the first word `a` only: most groups of four pay nothing."""
    return [float(text.startswith("a")) for text in completions]


def test_dynamic_sampling_looks_for_groups_that_differ(make_envs):
    agent = GRPO(make_envs(group_size=4, reward=rarely), seed=0, variant="dapo", overlong_penalty=0.0, **SMALL)
    seen, rows_used = [], []
    update, minibatches = agent.update, agent.minibatches
    agent.update = lambda episodes: (seen.append(episodes), update(episodes))
    agent.minibatches = lambda rows: (rows_used.append(rows), minibatches(rows))[1]
    agent.learn(400)
    assert len({len(episodes) for episodes in seen}) > 1
    for episodes, rows, row in zip(seen, rows_used, agent.history, strict=True):
        assert 8 <= len(episodes) <= 3 * 8
        assert row["train/informative_groups"] <= 1
        groups = episodes.rewards.sum(axis=1).reshape(-1, 4)
        differ = np.array([len(set(group)) > 1 for group in groups])
        expected = np.flatnonzero(np.repeat(differ, 4))[:8]
        assert rows.tolist() == expected.tolist()
        assert differ.sum() >= 2 or len(episodes) == 24  # it stops when it has enough, or after three rounds
    assert agent.accounts["reward_calls"] == sum(map(len, seen))
    assert agent.accounts["gradient_tokens"] < agent.num_timesteps


def test_advantages_are_those_of_the_groups_the_environment_made(make_envs):
    agent = GRPO(make_envs(group_size=4), seed=0, variant="dr_grpo", **SMALL)
    seen = []
    agent.update = seen.append
    agent.learn(1)
    returns = agent.returns(seen[0])
    texts, prompts = agent.lanes.completions(seen[0]), seen[0].prompt_id.reshape(2, 4)
    assert (prompts == prompts[:, :1]).all()
    np.testing.assert_allclose(returns.flatten().numpy(), count_a(None, texts), atol=1e-5)  # nothing to pay yet: KL 0
    assert leave_one_out(returns).sum(dim=1).abs().max() < 1e-9


def test_the_overlong_penalty_reaches_the_returns(make_envs):
    agent = GRPO(make_envs(group_size=4), seed=0, variant="dapo", overlong_penalty=2.0, overlong_share=0.4, **SMALL)
    seen = []
    agent.update = seen.append
    agent.learn(1)
    length = seen[0].response_length
    expected = seen[0].task_reward - 2.0 * np.clip((length - 3) / 2, 0, 1)  # 5 tokens, of which the last two are dear
    np.testing.assert_allclose(agent.returns(seen[0]).flatten().numpy(), expected)
    assert len(set(length)) > 1


# ---------------------------------------------------------------------- the rest


@pytest.mark.parametrize("variant", VARIANTS)
def test_tokens_that_leave_the_truncated_set_do_no_harm(make_envs, variant):
    agent = GRPO(
        make_envs(group_size=4), seed=0, variant=variant, top_p=0.5, epochs=3, learning_rate=0.03, **SMALL
    ).learn(200)
    assert all(torch.isfinite(p).all() for p in agent.policy.parameters())
    assert all(np.isfinite(value) for row in agent.history for value in row.values())


def test_episodes_that_a_wrapper_cuts(make_envs):
    agent = GRPO(Truncate(make_envs(group_size=4), limit=2), seed=0, **SMALL).learn(60)
    assert all(torch.isfinite(p).all() for p in agent.policy.parameters())


def test_an_environment_without_groups_is_refused(make_envs):
    with pytest.raises(ValueError, match=r"GRPO compares completions of one prompt.*group_size >= 2, got 1"):
        GRPO(make_envs())


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [("variant", "drgrpo", "Did you mean `dr_grpo`"), ("episodes_per_update", 0, ">= 1, got 0"), ("epochs", 0, ">= 1"),
     ("sampling_rounds", 0, ">= 1"), ("clip_low", 0.0, "> 0"), ("clip_high", -1.0, "> 0"), ("overlong_share", 1.5, "at most 1, got 1.5"),
     ("overlong_penalty", -1.0, ">= 0"), ("ratio_of", "tokens", "Did you mean `token`"), ("loss_aggregation", "sum", "fixed"),
     ("kl_placement", "rewards", "`reward`"), ("kl_estimator", "k1", "nothing but noise")],
)  # fmt: skip
def test_impossible_settings_are_refused(field, value, message):
    with pytest.raises(ValueError, match=rf"{field}.*{message}"):
        GRPOConfig(**{field: value})


def test_raises_the_exact_score():
    envs = gym.make_vec("textenv/Tree-v0", num_envs=32, group_size=4, horizon=3, seed_of_task=5)
    agent = GRPO(envs, seed=0, variant="dr_grpo", episodes_per_update=32, learning_rate=3e-3, decay_timesteps=4_000)
    assert envs.unwrapped.evaluate(agent.learn(4_000).policy).score > 0.8
