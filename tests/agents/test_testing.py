"""The conformance suite: our agents pass it, and agents that break the contract are told which part of it, and what to do."""

from __future__ import annotations

import math
import os

import gymnasium as gym
import numpy as np
import pytest
import torch

from agents import PPO
from agents.best_of_n import BestOfN
from agents.expert_iteration import ExpertIteration
from agents.ilql import ILQL
from agents.online_dpo import OnlineDPO
from agents.testing import CHECKS, AgentCheckError, check_agent

QUICK = {"episodes_per_update": 64, "minibatch_episodes": 32}


def only(*names):
    """What to skip so that these checks remain, and the two that others stand on."""
    return [name for name in CHECKS if name not in ("verbs", "budget", *names)]


# ---------------------------------------------------------------------- agents that pass


@pytest.mark.parametrize(
    ("agent", "config"),
    [
        (PPO, {"learning_rate": 3e-3, "warmup_iterations": 0}),
        (BestOfN, {"n": 4}),
        (ExpertIteration, {}),
        (OnlineDPO, {}),
        (ILQL, {"gradient_steps": 8}),
    ],
    ids=["PPO", "BestOfN", "ExpertIteration", "OnlineDPO", "ILQL"],
)
def test_our_agents_pass(agent, config):
    report = check_agent(agent, structures=["random"], timesteps=3_000, **config)
    assert report.passed == tuple(CHECKS)
    assert report.agent == agent.__name__
    (result,) = report.results
    assert result.after.score <= 1
    assert result.after.regret == pytest.approx(0.5 * result.after.kl_to_optimum, abs=1e-6)
    assert agent.__name__ in str(report)
    assert "random" in str(report)
    assert f"{result.after.score:.3f}" in str(report)


class Frozen:
    """An agent of no library: a table of one distribution, with stable-baselines3's verbs and nothing else."""

    def __init__(self, env, seed=None):
        self.env, self.rng, self.num_timesteps = env, np.random.default_rng(seed), 0
        env.reset(seed=seed)

    def learn(self, total_timesteps, callback=None, progress_bar=False):
        target = self.num_timesteps + total_timesteps
        observations, _ = self.env.reset()
        while self.num_timesteps < target:
            observations, *_ = self.env.step(self.predict(observations)[0])
            self.num_timesteps += self.env.num_envs
        return self

    def predict(self, observation, state=None, episode_start=None, deterministic=False):
        size = len(observation) if np.ndim(observation) == 2 else None
        tokens = np.ones(size or 1, int) if deterministic else self.rng.integers(3, size=size or 1)
        return (tokens if size else tokens[0]), state

    def save(self, path):
        path.write_text(str(self.num_timesteps))

    @classmethod
    def load(cls, path, env):
        agent = cls(env)
        agent.num_timesteps = int(path.read_text())
        return agent

    def optimizers(self):
        return {}


def test_an_agent_without_log_probs_is_judged_by_what_it_draws():
    report = check_agent(Frozen, structures=["random"], timesteps=500)
    (result,) = report.results
    # uniform over three tokens, estimated from 2,048 episodes; exactly: the mean over 15 completions, 3^-length each
    env = gym.make_vec("textenv/Tree-v0", num_envs=2, vocab_size=3, horizon=3).unwrapped
    exact = env.evaluate(-math.log(3) * (env.leaves.tokens < 3).sum(axis=1))
    assert result.after.reward == pytest.approx(exact.reward, abs=0.1)
    assert result.after.kl == pytest.approx(exact.kl, abs=0.05)


# ---------------------------------------------------------------------- agents that are broken


class IgnoresItsSeed(PPO):
    def __init__(self, env, *, seed=None, **kwargs):
        super().__init__(env, seed=int.from_bytes(os.urandom(4), "big"), **kwargs)


class OneSeedForAll(PPO):
    def __init__(self, env, *, seed=None, **kwargs):
        super().__init__(env, seed=0, **kwargs)


class LosesItsOptimizer(PPO):
    def _restore(self, state):
        self._restore_progress(state)


class LosesItsWeights(PPO):
    def _load_tensors(self, path):
        pass


class CountsNothing(PPO):
    def start_learning(self, *args):
        session = super().start_learning(*args)
        session.on_step = lambda tokens: None
        return session


class CountsSteps(PPO):
    """One for each env.step, however many lanes."""

    def start_learning(self, *args):
        session = super().start_learning(*args)
        on_step = session.on_step
        session.on_step = lambda tokens: on_step(1)
        return session


class LearnsNan(PPO):
    def update(self, episodes):
        with torch.no_grad():
            next(iter(self.policy.parameters())).fill_(float("nan"))
        self.policy.invalidate()


class LearnsNothing(PPO):
    def update(self, episodes):
        pass


class CountsTheKLTwice(PPO):
    kl_placement = "loss"

    def attach_to_env(self):
        self.lanes.attach_policy(self.policy, pay=True)


class ActsByAnotherDistribution(PPO):
    def predict(self, observation, state=None, episode_start=None, deterministic=False):
        if not deterministic and self._predict_rng.random() < 0.3:
            deterministic = True
        return super().predict(observation, state, episode_start, deterministic)


class DividesByZero(PPO):
    """Whitens rewards by their spread, and steps on what comes out."""

    def update(self, episodes):
        spread = episodes.task_reward.std()
        with torch.no_grad(), np.errstate(invalid="ignore", divide="ignore"):
            scale = float(np.float64(1e-6) / spread) if spread else float("nan")
            for parameter in self.policy.parameters():
                parameter.mul_(1 + scale * 0)
        self.policy.invalidate()


class ForgetsTruncation(PPO):
    def update(self, episodes):
        if (episodes.finish_reason == "truncated").any():
            raise KeyError("task_reward")
        super().update(episodes)


class ReturnsNothing(PPO):
    def learn(self, *args, **kwargs):
        super().learn(*args, **kwargs)


BROKEN = [
    (IgnoresItsSeed, "seeds", "two runs with seed 0 to end alike", "generators made from `seed`"),
    (OneSeedForAll, "seeds", "seeds 0 and 1 to give different runs", "not a constant"),
    (LosesItsOptimizer, "resume", r"tokens, save, load and \d+ tokens to be", "optimiser's state"),
    (LosesItsWeights, "resume", "give back the agent that was saved", "save all weights"),
    (CountsNothing, "budget", "end soon after so many environment tokens", "add to `num_timesteps`"),
    (
        CountsSteps,
        "budget",
        "num_timesteps to be the tokens that the environment has seen",
        "each token of each lane once",
    ),
    (LearnsNan, "one_token", "no exception|probabilities are numbers", "nan|by hand"),
    (LearnsNothing, "learning", "of the way to the optimum", "sign of the loss"),
    (CountsTheKLTwice, "kl", "pay=False", "attach_policy"),
    (ActsByAnotherDistribution, "predict", "as often as the policy's log_probs say", "one distribution"),
    (DividesByZero, "equal_rewards", "no exception|probabilities are numbers", "nan|by hand"),
    (ForgetsTruncation, "cut", "no exception", "KeyError"),
    (ReturnsNothing, "verbs", "learn\\(\\) to return the agent", "return self"),
]


@pytest.mark.parametrize(("agent", "check", "expected", "remedy"), BROKEN, ids=[case[0].__name__ for case in BROKEN])
def test_broken_agents_are_told_what_is_wrong(agent, check, expected, remedy):
    with pytest.raises(AgentCheckError, match=expected) as caught:
        check_agent(agent, skip=only(check), structures=["random"], timesteps=600, max_rollout=2_000, **QUICK)
    assert check in {failure.check for failure in caught.value.failures}
    message = str(caught.value)
    assert agent.__name__ in message
    assert any(part in message for part in remedy.split("|"))
    for word in ("expected", "seen", "remedy"):
        assert word in message


def test_all_faults_are_listed_together():
    class Twice(LosesItsOptimizer, CountsTheKLTwice):
        pass

    with pytest.raises(AgentCheckError, match="fails 2 of 4 checks: kl, resume") as caught:
        check_agent(Twice, skip=only("kl", "resume"), **QUICK)
    assert len(caught.value.failures) == 2


def test_an_agent_that_cannot_be_made_is_one_fault():
    with pytest.raises(AgentCheckError, match="fails 1 of 10 checks: verbs") as caught:
        check_agent(PPO, clip_rang=0.2)
    assert "Did you mean" in str(caught.value)


def test_a_missing_verb_is_named():
    class Mute:
        num_timesteps = 0

        def __init__(self, env, seed):
            pass

        def learn(self, total_timesteps):
            return self

    with pytest.raises(AgentCheckError, match="no predict, save, load"):
        check_agent(Mute)


def test_an_unknown_check_is_an_error():
    with pytest.raises(ValueError, match=r"'seed'.*Did you mean"):
        check_agent(PPO, skip=["seed"])
