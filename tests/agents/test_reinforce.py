"""REINFORCE: its baselines, its accounts, and that it learns. (Its expected gradient: test_gradients.py.)"""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import torch

from agents.reinforce import BASELINES, REINFORCE, MovingAverage, REINFORCEConfig
from textenv.kl import AdaptiveKL

from .test_checkpoints import assert_same, plain
from .world import PassThrough, Truncate, build_model, same_tensors

SMALL = {"episodes_per_update": 8}


def learn_one_rollout(agent):
    """`learn` counts from the target that its last call has met, not from the end of that call's last rollout."""
    agent.learn(agent.num_timesteps - agent.timesteps_counted + 1)


def test_moving_average_hand_worked():
    average = MovingAverage(0.5)
    assert average.mean == 0.0
    average.add(4.0)
    assert average.mean == 4.0  # not 2: unbiased from the first value on
    average.add(1.0)
    assert average.mean == pytest.approx((0.5 * 1 + 0.25 * 4) / 0.75)


def test_baselines_hand_worked(make_envs):
    returns = torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64)

    def baseline(name):
        agent = REINFORCE(make_envs(), seed=0, baseline=name)
        first = agent.baseline(returns, returns.flip(0)).tolist()
        return first, agent.baseline(returns, returns.flip(0)).tolist()

    assert baseline("none") == ([0, 0, 0], [0, 0, 0])
    assert baseline("batch_mean") == ([3, 3, 3], [3, 3, 3])
    assert baseline("greedy") == ([6, 2, 1], [6, 2, 1])
    before, after = baseline("moving_average")  # a batch never sees its own
    assert before == [0, 0, 0]
    assert after == pytest.approx([3, 3, 3])


@pytest.mark.parametrize("baseline", BASELINES)
def test_first_ratio_is_one_and_there_is_one_step_per_rollout(make_envs, baseline):
    envs = make_envs(model=build_model("gpt2"), temperature=0.7)  # dropout 0.1 in its config
    agent = REINFORCE(envs, seed=0, top_k=5, baseline=baseline, **SMALL).learn(90)
    assert len(agent.history) >= 2
    assert max(row["train/first_ratio_error"] for row in agent.history) < 1e-4
    assert agent.accounts["optimizer_steps"] == len(agent.history)


@pytest.mark.parametrize("baseline", BASELINES)
def test_resume_is_bit_exact(make_envs, tmp_path, baseline):
    def envs():
        return make_envs(beta=AdaptiveKL(beta=0.1, target=0.5, episodes_per_update=5))

    config = {"baseline": baseline, "decay_timesteps": 100, **SMALL}
    whole = REINFORCE(envs(), seed=0, **config).learn(120)
    REINFORCE(envs(), seed=0, **config).learn(60).save(tmp_path / "half")
    resumed = REINFORCE.load(tmp_path / "half", envs())
    assert 1 <= len(resumed.history) < len(whole.history)
    assert_same(resumed.learn(60), whole)


def test_greedy_episodes_are_those_of_deterministic_generation_and_are_counted(make_envs):
    envs = make_envs()
    agent = REINFORCE(envs, seed=0, baseline="greedy", learning_rate=0.02, **SMALL).learn(60)
    before, state = dict(agent.accounts), plain(envs.get_state())
    seen = []
    agent.update = lambda episodes, greedy: seen.append((episodes, greedy, dict(agent.accounts)))
    timesteps = agent.num_timesteps
    learn_one_rollout(agent)
    assert state != plain(envs.get_state())
    episodes, greedy, accounts = seen[0]
    prompts = [envs.task.prompts.prompts[i] for i in episodes.prompt_id]
    texts = agent.generate(prompts, deterministic=True)
    assert len(set(texts)) > 1
    rewards = envs.task.reward(prompts=prompts, completions=texts)
    kl = (np.array(rewards) - greedy.numpy()) / 0.1  # the rest of the return is -beta KL
    for prompt in set(prompts):
        assert len({round(float(kl[i]), 6) for i, other in enumerate(prompts) if other == prompt}) == 1
    assert np.abs(kl).max() > 1e-3
    distinct = len(set(prompts))
    assert accounts["reward_calls"] - before["reward_calls"] == 8 + distinct
    assert accounts["reference_calls"] - before["reference_calls"] == 8 + distinct
    taken = agent.num_timesteps - timesteps
    assert accounts["reference_tokens"] - before["reference_tokens"] == taken
    assert taken > episodes.response_length.sum()


def test_greedy_episodes_leave_lanes_and_controller_alone(make_envs):
    envs = make_envs(beta=AdaptiveKL(beta=0.1, target=0.5, episodes_per_update=5))
    agent = REINFORCE(envs, seed=0, baseline="greedy", **SMALL).learn(30)
    seen, update = [], agent.update
    agent.update = lambda episodes, greedy: (seen.append(episodes), update(episodes, greedy))
    learn_one_rollout(agent)
    state = plain(envs.get_state())
    agent.greedy_returns(seen[0])
    assert plain(envs.get_state()) == state


def test_the_greedy_baseline_needs_a_bare_environment(make_envs):
    with pytest.raises(ValueError, match=r"bare environment, got it wrapped in PassThrough.*another baseline"):
        REINFORCE(PassThrough(make_envs()), baseline="greedy")


@pytest.mark.parametrize("placement", ["reward", "loss", "none"])
def test_the_kl_is_counted_once(make_envs, placement):
    agent = REINFORCE(make_envs(), seed=0, kl_placement=placement, learning_rate=0.02, **SMALL).learn(200)
    row = agent.history[-1]
    paid = row["rollout/return"] - row["rollout/task_reward"]
    assert abs(row["rollout/kl"]) > 1e-3
    assert paid == pytest.approx(-0.1 * row["rollout/kl"] if placement == "reward" else 0.0, abs=1e-6)
    assert ("train/kl_loss" in row) == (placement == "loss")


def test_equal_rewards_move_nothing(make_envs):
    envs = make_envs(beta=0.0, reward=lambda completions, **_: [0.1] * len(completions))
    agent = REINFORCE(envs, seed=0, **SMALL)
    before = {name: t.clone() for name, t in agent.policy.model.state_dict().items()}
    agent.learn(50)
    assert same_tensors(agent.policy.model.state_dict(), before)


def test_episodes_that_a_wrapper_cuts(make_envs):
    agent = REINFORCE(Truncate(make_envs(), limit=2), seed=0, kl_placement="loss", **SMALL).learn(60)
    assert all(torch.isfinite(p).all() for p in agent.policy.parameters())


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [("episodes_per_update", 0, ">= 1, got 0"), ("baseline", "gredy", "Did you mean `greedy`"), ("baseline_decay", 1.0, "below 1, got 1.0"),
     ("loss_aggregation", "tokens", "Did you mean `token`"), ("kl_estimator", "k1", "nothing but noise"), ("kl_placement", "losss", "`loss`")],
)  # fmt: skip
def test_impossible_settings_are_refused(field, value, message):
    with pytest.raises(ValueError, match=rf"{field}.*{message}"):
        REINFORCEConfig(**{field: value})


@pytest.mark.parametrize("baseline", ["batch_mean", "moving_average", "greedy"])
def test_raises_the_exact_score(baseline):
    envs = gym.make_vec("textenv/Tree-v0", num_envs=32, horizon=3, seed_of_task=5)
    agent = REINFORCE(envs, seed=0, learning_rate=3e-3, decay_timesteps=4_000, baseline=baseline)
    assert envs.unwrapped.evaluate(agent.learn(4_000).policy).score > 0.8
