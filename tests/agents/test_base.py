"""The verbs all agents share: predict, generate, learn with callbacks and logs, and their configs."""

from __future__ import annotations

import ast
import csv
import importlib
import re
import time
from dataclasses import FrozenInstanceError, fields
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, EveryNTimesteps
from stable_baselines3.common.evaluation import evaluate_policy

import agents
from agents import AGENTS, PPO, Agent, PPOConfig, RandomAgent
from agents.rollout import run_prompts

from .world import PROMPTS, PassThrough, Truncate, build_model, count_a, plain_logits, same_tensors

SMALL = {"episodes_per_update": 8, "minibatch_episodes": 4, "warmup_iterations": 0}
PACKAGE = Path(agents.__file__).parent
DOC = PACKAGE.parent / "docs" / "logged-figures.md"


@pytest.fixture
def agent(make_envs):
    return PPO(make_envs(), seed=0, **SMALL)


# ---------------------------------------------------------------------- predict


def test_predict_shapes_and_state(agent):
    observations, _ = agent.env.reset()
    actions, state = agent.predict(observations, state="passed through", episode_start=np.ones(8, bool))
    assert actions.shape == (8,)
    assert np.issubdtype(actions.dtype, np.integer)
    assert state == "passed through"
    action, state = agent.predict(observations[0])
    assert np.shape(action) == ()
    assert agent.env.single_action_space.contains(action)
    assert state is None
    agent.env.step(agent.predict(observations)[0])


def test_deterministic_predict_is_the_most_probable_token(agent):
    observations, _ = agent.env.reset()
    actions, _ = agent.predict(observations, deterministic=True)
    for observation, action in zip(observations, actions, strict=True):
        prompt = observation[observation != 10]
        logits = agent.policy.model(torch.from_numpy(prompt)[None]).logits[0, -1]
        assert action == logits.argmax().item()
    assert (agent.predict(observations, deterministic=True)[0] == actions).all()
    assert agent.predict(observations[2], deterministic=True)[0] == actions[2]


def test_predict_samples_the_policy(agent):
    """Chi-square against the exact distribution."""
    observation = np.array([1, 2] + [10] * 6)
    logits = agent.policy.model(torch.tensor([[1, 2]])).logits[0, -1]
    expected = 2000 * logits.double().softmax(-1).detach().numpy()
    actions = np.concatenate([agent.predict(np.tile(observation, (500, 1)))[0] for _ in range(4)])
    counts = np.bincount(actions, minlength=10)
    likely = expected > 5
    chi_square = ((counts - expected) ** 2 / expected)[likely].sum()
    assert chi_square < 27.9  # 0.999 quantile at 9 degrees of freedom


def test_seeding_predict_repeats_it_and_leaves_training_alone(agent):
    observations, _ = agent.env.reset()
    training = agent.rng.bit_generator.state
    agent.set_random_seed(7)
    first = [agent.predict(observations)[0].tolist() for _ in range(5)]
    agent.set_random_seed(7)
    assert first == [agent.predict(observations)[0].tolist() for _ in range(5)]
    assert agent.rng.bit_generator.state == training


# ---------------------------------------------------------------------- generate


def hf_generate(agent, prompt):
    tokenizer = agent.lanes.tokenizer
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    out = agent.policy.model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=5, eos_token_id=0, pad_token_id=0
    )
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("batch_size", [2, 64])
def test_generate_equals_transformers_on_unseen_and_longer_prompts(agent, batch_size):
    agent.learn(50)
    prompts = ["a", "h g f e d c b a ? a b c", "c", "e e", "a"]  # the environment's longest has three words
    texts = agent.generate(prompts, deterministic=True, batch_size=batch_size)
    assert texts == [hf_generate(agent, prompt) for prompt in prompts]


def test_generate_samples_from_a_generator_of_its_own(agent):
    texts = agent.generate(["a"] * 64)
    assert len(set(texts)) > 5
    twin = PPO(agent.env, seed=0, **SMALL)
    assert twin.generate(["a"] * 64) == texts


def test_generate_keeps_temperature_and_mask(make_envs):
    envs = make_envs(temperature=0.5, action_mask=np.arange(10) != 1)
    texts = PPO(envs, seed=0).generate(PROMPTS * 8)
    assert not any("a" in text.split() for text in texts)


def test_generate_nothing(agent):
    assert agent.generate([]) == []


@pytest.mark.parametrize("prompt", ["a b", ""])
def test_generate_one_string_is_an_error(agent, prompt):
    with pytest.raises(ValueError, match=r"list of prompts.*\[prompt\]"):
        agent.generate(prompt)


@pytest.mark.parametrize(
    ("prompts", "message"), [(["a", ""], "prompt 1"), ([3], "prompt 0"), (["a " * 100], "only 64 positions")]
)
def test_generate_says_which_prompt_is_wrong(agent, prompts, message):
    with pytest.raises(ValueError, match=message):
        agent.generate(prompts)


# ---------------------------------------------------------------------- nothing of this disturbs training


class Busybody(BaseCallback):
    """Generates, predicts and evaluates at every opportunity, in the middle of rollouts too."""

    def __init__(self, evaluation):
        super().__init__()
        self.evaluation = evaluation

    def busy(self):
        self.model.generate(["a b c d", "e"])
        self.model.predict(self.evaluation.reset()[0][:3])
        run_prompts(self.model, self.evaluation, np.arange(3))

    def _on_step(self):
        self.busy()
        return True

    _on_training_start = _on_rollout_start = _on_rollout_end = _on_training_end = busy


@pytest.mark.parametrize("wrapper", [None, PassThrough])
def test_use_in_between_does_not_disturb_training(make_envs, wrapper):
    def train(callback, between):
        envs = make_envs()
        agent = PPO(wrapper(envs) if wrapper else envs, seed=0, **SMALL)
        agent.learn(20, callback=callback)
        if between:
            agent.generate(PROMPTS * 3)
            agent.predict(envs.observation_space.sample())
            # 8 lanes of the same width: the very shape that training uses
            run_prompts(agent, make_envs(beta=0.0), np.arange(4))
        return agent.learn(40).policy.model.state_dict()

    quiet = train(None, between=False)
    assert same_tensors(quiet, train(None, between=True))
    assert same_tensors(quiet, train(Busybody(make_envs(num_envs=3, beta=0.0)), between=True))


def test_evaluation_in_the_shape_of_training_costs_rounding_only(make_envs):
    """Within a rollout it shares the cache of that shape, so lanes are encoded anew: equal, but not bit by bit."""
    quiet = PPO(make_envs(), seed=0, **SMALL).learn(30)
    busy = PPO(make_envs(), seed=0, **SMALL).learn(30, callback=Busybody(make_envs(beta=0.0)))
    assert [row["rollout/task_reward"] for row in busy.history] == [row["rollout/task_reward"] for row in quiet.history]
    for name, tensor in quiet.policy.model.state_dict().items():
        torch.testing.assert_close(busy.policy.model.state_dict()[name], tensor, atol=1e-3, rtol=1e-3)


# ---------------------------------------------------------------------- the protocol, and SB3's evaluation


def test_our_agents_and_those_of_stable_baselines3_are_agents(make_envs):
    from stable_baselines3 import A2C

    assert isinstance(PPO(make_envs(), seed=0), Agent)
    assert isinstance(RandomAgent(make_envs(), seed=0), Agent)
    assert isinstance(A2C("MlpPolicy", gym.make("CartPole-v1"), device="cpu"), Agent)
    assert not isinstance(object(), Agent)


def test_evaluate_policy_of_stable_baselines3_serves_our_agents(agent, model, tokenizer):
    env = gym.make(
        "textenv/Prompts-v0", model=model, tokenizer=tokenizer, prompts=["b c"], reward=count_a, max_new_tokens=5, beta=0.0
    )  # fmt: skip
    mean, std = evaluate_policy(agent, env, n_eval_episodes=3, deterministic=True, warn=False)
    assert mean == pytest.approx(count_a(None, [hf_generate(agent, "b c")])[0])
    assert std == 0
    env.close()


# ---------------------------------------------------------------------- callbacks


class Notes(BaseCallback):
    def __init__(self, stop_at=None):
        super().__init__()
        self.events, self.stop_at = [], stop_at

    def _on_training_start(self):
        self.events.append("training start")

    def _on_rollout_start(self):
        self.events.append("rollout start")

    def _on_step(self):
        self.events.append("step")
        assert self.num_timesteps == self.model.num_timesteps
        return self.n_calls != self.stop_at

    def _on_rollout_end(self):
        self.events.append("rollout end")
        assert len(self.locals["episodes"]) == 8

    def _on_training_end(self):
        self.events.append("training end")


@pytest.mark.parametrize("wrapper", [None, PassThrough])
def test_a_callback_object_hears_of_everything_in_order(make_envs, wrapper):
    notes, envs = Notes(), make_envs()
    agent = PPO(wrapper(envs) if wrapper else envs, seed=0, **SMALL).learn(50, callback=notes)
    text = " ".join(notes.events)
    assert re.fullmatch(r"training start (rollout start (step )+rollout end )+training end", text)
    assert notes.events.count("rollout end") == len(agent.history)
    assert notes.model is agent
    assert notes.training_env is agent.env
    assert notes.logger is agent.logger
    assert notes.locals["self"] is agent


def test_a_function_is_called_at_each_step(agent):
    seen = []

    def callback(local_variables, global_variables):
        seen.append(local_variables["self"].num_timesteps)
        return True

    agent.learn(50, callback=callback)
    assert seen == sorted(seen)
    assert seen[-1] == agent.num_timesteps
    assert len(seen) > 5


def test_a_list_of_callbacks_and_those_of_stable_baselines3(agent):
    notes, inner = Notes(), Notes()
    agent.learn(50, callback=[notes, EveryNTimesteps(20, inner)])
    assert notes.events.count("step") > inner.events.count("step") >= 1
    agent.learn(10, callback=CallbackList([Notes()]))


@pytest.mark.parametrize("wrapper", [None, PassThrough])
def test_returning_false_stops_and_leaves_a_usable_agent(make_envs, tmp_path, wrapper):
    envs = make_envs()
    agent = PPO(wrapper(envs) if wrapper else envs, seed=0, **SMALL)
    notes = Notes(stop_at=9)
    assert agent.learn(10_000, callback=notes) is agent
    assert notes.events.count("step") == 9
    assert notes.events[-1] == "training end"
    assert 9 <= agent.num_timesteps <= 9 * 8
    agent.save(tmp_path / "a")
    assert len(agent.generate(["a"])) == 1
    before = len(agent.history)
    agent.learn(20)
    assert len(agent.history) > before


def test_an_error_of_a_callback_is_raised_and_leaves_a_usable_agent(agent):
    def fail(*_):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        agent.learn(100, callback=fail, progress_bar=True)
    agent.learn(20)


@pytest.mark.parametrize("steps", [0, -5])
def test_learning_for_no_time_is_refused(agent, steps):
    with pytest.raises(ValueError, match="total_timesteps >= 1"):
        agent.learn(steps)


# ---------------------------------------------------------------------- logs


def test_progress_is_written_to_csv(make_envs, tmp_path):
    agent = PPO(make_envs(), seed=0, log_dir=tmp_path / "logs", **SMALL).learn(100)
    with (tmp_path / "logs" / "progress.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(agent.history)
    for row, figures in zip(rows, agent.history, strict=True):
        assert row.keys() == figures.keys()
        assert {name: float(value) for name, value in row.items()} == figures
    assert float(rows[-1]["time/timesteps"]) == agent.num_timesteps
    agent.logger.close()


def test_nothing_is_written_without_a_log_dir(make_envs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    PPO(make_envs(), seed=0, **SMALL).learn(20)
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


def test_verbose_prints_the_figures(make_envs, capsys):
    PPO(make_envs(), seed=0, verbose=1, **SMALL).learn(20)
    assert "task_reward" in capsys.readouterr().out


def test_progress_bar_counts_tokens(agent, capsys):
    agent.learn(50, progress_bar=True)
    shown = capsys.readouterr().out
    assert f"{agent.num_timesteps}/50 tokens" in shown
    assert "reward" in shown


def test_figures_that_are_no_numbers_stay_out_of_the_history(agent):
    def callback(*_):
        agent.logger.record("notes/text", "hello", exclude=("stdout", "csv"))
        agent.logger.record("notes/number", 3)
        return True

    agent.learn(20, callback=callback)
    assert agent.history[0]["notes/number"] == 3
    assert "notes/text" not in agent.history[0]


def test_logged_rollout_figures_are_means_over_the_episodes(make_envs):
    seen = {}

    class Keep(Notes):
        def _on_rollout_end(self):
            seen["episodes"] = self.locals["episodes"]

    agent = PPO(make_envs(), seed=0, target_kl=None, **SMALL).learn(1, callback=Keep())
    episodes, row = seen["episodes"], agent.history[0]
    completions = agent.lanes.completions(episodes)
    assert row["rollout/task_reward"] == pytest.approx(np.mean(count_a(None, completions)))
    assert row["rollout/return"] == pytest.approx(sum(e.rewards.sum() for e in episodes) / 8)
    assert row["rollout/response_length"] == pytest.approx(np.mean([len(e.rewards) for e in episodes]))
    assert row["rollout/finished"] == pytest.approx(np.mean([e.tokens[-1] == 0 for e in episodes]))
    assert row["rollout/beta"] == 0.1
    assert row["time/timesteps"] == row["time/reference_tokens"] == sum(len(e.rewards) for e in episodes)
    assert row["time/reward_calls"] == 8
    assert row["time/optimizer_steps"] == 4
    assert row["time/gradient_tokens"] == 2 * row["time/timesteps"]


def documented():
    """The figures of the document's tables: name -> (unit, meaning)."""
    table = {}
    for line in DOC.read_text().splitlines():
        if line.startswith("| `"):
            name, unit, meaning = (cell.strip() for cell in line.strip("|").split("|", 2))
            assert name.strip("`") not in table, f"{name} is explained twice"
            table[name.strip("`")] = (unit, meaning.strip("| "))
    return table


def test_every_logged_figure_is_explained_once_with_its_unit(make_envs):
    from rewards import WeightedSum

    reward = WeightedSum({"a": (count_a, 1.0)})
    runs = [
        PPO(make_envs(reward=reward), seed=0, ptx_coef=0.1, ptx_data=np.ones((4, 4), np.int64), **SMALL).learn(1),
        PPO(Truncate(make_envs(), limit=2), seed=0, **SMALL).learn(1),
        RandomAgent(make_envs(), seed=0).learn(1),
    ]
    table = documented()
    logged = {name for run in runs for row in run.history for name in row}
    names = {re.sub(r"^reward/.*", "reward/<name>", name) for name in logged}
    assert names - table.keys() == set()
    for name, (unit, meaning) in table.items():
        assert unit, name
        assert len(meaning) > 10, name
    shared = {name for name in table if name.split("/")[0] in ("rollout", "reward", "time")}
    assert shared - names == set(), "explained, but never logged"


# ---------------------------------------------------------------------- configs


def test_configs_are_frozen():
    config = PPOConfig(epochs=3)
    with pytest.raises(FrozenInstanceError):
        config.epochs = 4


def test_config_and_keywords_go_together(make_envs):
    agent = PPO(make_envs(), seed=0, config=PPOConfig(epochs=3, ent_coef=0.5), epochs=7)
    assert (agent.config.epochs, agent.config.ent_coef) == (7, 0.5)


@pytest.mark.parametrize(
    ("name", "near"),
    [("learnin_rate", "learning_rate"), ("epoch", "epochs"), ("gae_lamda", "gae_lambda"), ("sed", "seed")],
)
def test_an_unknown_setting_names_the_nearest(make_envs, name, near):
    with pytest.raises(ValueError, match=rf"PPO has no setting '{name}'.*Did you mean `{near}`\?"):
        PPO(make_envs(), **{name: 1})


def test_a_config_of_another_agent_is_refused(make_envs):
    with pytest.raises(ValueError, match="Expected config to be a PPOConfig, got dict"):
        PPO(make_envs(), config={"epochs": 3})


def test_default_learning_rate_shrinks_with_width(make_envs):
    for width in (16, 32):
        agent = PPO(make_envs(model=build_model(width=width)), seed=0)
        assert agent.adam.param_groups[0]["lr"] == pytest.approx(0.05 / width)
    assert PPO(make_envs(), learning_rate=3e-4).adam.param_groups[0]["lr"] == 3e-4


def config_classes():
    for file in sorted(PACKAGE.glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ClassDef) and node.name.endswith("Config"):
                yield pytest.param(node, id=f"{file.name}:{node.name}")


@pytest.mark.parametrize("node", list(config_classes()))
def test_every_setting_has_a_docstring(node):
    for field, after in zip(node.body, [*node.body[1:], None], strict=True):
        if isinstance(field, ast.AnnAssign):
            described = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            assert described, field.target.id
            assert isinstance(after.value.value, str), field.target.id


# ---------------------------------------------------------------------- what an agent needs


def test_every_name_in_the_package_imports():
    for name in agents.__all__:
        assert getattr(agents, name) is not None
    for name, module in AGENTS.items():
        assert getattr(importlib.import_module(module), name).__name__ == name
        config = getattr(agents, name).Config
        assert all(field.kw_only for field in fields(config))
    with pytest.raises(AttributeError, match="no attribute 'PPPO'"):
        _ = agents.PPPO


def test_a_single_environment_is_refused(model, tokenizer):
    env = gym.make("textenv/Prompts-v0", model=model, tokenizer=tokenizer, prompts=["a"], reward=count_a)
    with pytest.raises(ValueError, match=r"Expected a vector environment.*make_vec"):
        PPO(env)
    env.close()


@pytest.mark.parametrize(
    "env", [None, "textenv/Prompts-v0", gym.vector.SyncVectorEnv([lambda: gym.make("CartPole-v1")])]
)
def test_other_environments_are_refused(env):
    with pytest.raises(ValueError, match="Expected a textenv vector environment"):
        PPO(env)


def test_the_reference_never_moves(make_envs, model):
    before = {name: t.clone() for name, t in model.state_dict().items()}
    agent = PPO(make_envs(), seed=0, learning_rate=1e-2, **SMALL).learn(100)
    assert same_tensors(model.state_dict(), before)
    assert not same_tensors(agent.policy.model.state_dict(), before)
    logits = plain_logits(agent.policy.model, np.array([1, 2, 3]), 1)
    assert not torch.equal(logits, plain_logits(model, np.array([1, 2, 3]), 1))


def test_the_time_spent_in_rewards_is_a_part_of_the_whole_and_evaluations_are_not_counted(make_envs):
    def slow(completions, **columns):
        time.sleep(0.01)
        return [0.0] * len(completions)

    envs = make_envs(reward=slow)
    agent = PPO(envs, seed=0, **SMALL)
    agent.learn(1)
    envs.unwrapped.reward.seconds += 1000.0  # an evaluation in between
    agent.learn(agent.num_timesteps)
    first, second = (row["time/reward_seconds"] for row in agent.history)
    assert 0.01 <= first < agent.history[0]["time/seconds"]
    assert first + 0.01 <= second < min(agent.history[1]["time/seconds"], 1000)
