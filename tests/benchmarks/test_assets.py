"""The shipped models of the Assistant world do what their card says: its figures are measured again."""

import json

import gymnasium as gym
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import textenv  # noqa: F401  # registers the ids
from agents import PPO
from benchmarks.assets import card
from benchmarks.instructgpt import DemoArguments, Recipe, evaluate_noiseless, neutral_loss
from rewards.rankings import evaluate_reward_model
from textenv.tasks.assistant import gold
from textenv.tasks.assistant.task import ASSETS, requests_of

FIGURES = json.loads((ASSETS / "figures.json").read_text())


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """A run whose stages are the shipped models."""
    out = tmp_path_factory.mktemp("assets") / "run"
    recipe = Recipe(DemoArguments(size="default", out=out, cores=1))
    for name in ("base", "sft", "reward"):
        (out / name).symlink_to(ASSETS / name)
    return recipe


@pytest.fixture(scope="module")
def held_out(recipe):
    return recipe.held_out_rankings()


@pytest.mark.parametrize("name", ["base", "sft"])
def test_gold_scores_are_those_of_the_card(recipe, name):
    requests = requests_of("test")[: FIGURES["prompts"]]
    verdicts = [
        gold.judge(r, t) for r, t in zip(requests, recipe.test_answers(name, "test", len(requests)), strict=True)
    ]
    stated = FIGURES["judged"][name]
    # The same draws; a rounding elsewhere may change a few answers.
    assert np.mean([v.total for v in verdicts]) == pytest.approx(stated["gold"], abs=0.02)
    assert np.mean([v.obeyed for v in verdicts]) == pytest.approx(stated["obeyed"], abs=0.03)
    assert np.mean([v.rude for v in verdicts]) == pytest.approx(stated["rude"], abs=0.03)
    false = np.mean([v.stated_false_fact for v in verdicts if v.states_facts])
    assert false == pytest.approx(stated["false_facts"], abs=0.06)
    assert neutral_loss(recipe.load(recipe.out / name)) == pytest.approx(stated["neutral_loss"], abs=0.01)


def test_the_base_model_rambles_lies_and_offends():
    base = FIGURES["judged"]["base"]
    assert base["obeyed"] < 0.3
    assert 0.1 <= base["false_facts"] <= 0.4
    assert base["rude"] >= 0.05


def test_the_reward_model_agrees_with_held_out_labelers_as_the_card_says(recipe, held_out):
    metrics = evaluate_reward_model(recipe.reward_model(), held_out["labeled"])
    stated = FIGURES["reward"]
    assert metrics.accuracy == pytest.approx(stated["accuracy_held_out_labelers"], abs=0.03)
    assert evaluate_noiseless(held_out) == pytest.approx(stated["accuracy_noiseless_labeler"], abs=0.03)
    assert metrics.length_accuracy == pytest.approx(stated["accuracy_length_alone"], abs=0.03)
    assert metrics.accuracy > metrics.length_accuracy + 0.08
    assert stated["share_of_noiseless"] >= 0.9
    assert held_out["agreement"] == pytest.approx(stated["labelers_agree"], abs=0.03)
    assert held_out["agreement"] == pytest.approx(0.726, abs=0.03)  # InstructGPT's, section 5.2


def test_the_card_holds_the_figures():
    text = (ASSETS / "README.md").read_text()
    rendered = card(FIGURES, 0.0).splitlines()
    minutes = next(i for i, line in enumerate(rendered) if "minutes on two cores" in line)
    assert [line for i, line in enumerate(text.splitlines()) if i != minutes] == [
        line for i, line in enumerate(rendered) if i != minutes
    ]


def test_they_load_with_plain_transformers_and_are_small():
    AutoModelForCausalLM.from_pretrained(ASSETS / "sft", dtype=torch.float32)
    AutoModelForSequenceClassification.from_pretrained(ASSETS / "reward", dtype=torch.float32)
    assert sum(file.stat().st_size for file in ASSETS.rglob("*") if file.is_file()) < 15e6


def test_the_environment_works_at_once_and_an_agent_learns_in_it():
    envs = gym.make_vec("textenv/Assistant-v0", num_envs=64)
    agent = PPO(envs, seed=0, learning_rate=1e-3)
    agent.learn(4_000)
    scores = [row["rollout/task_reward"] for row in agent.history]
    assert np.mean(scores[-2:]) > scores[0] + 0.1
    assert all(isinstance(text, str) and text for text in agent.generate(["what color is the sky ?"]))
