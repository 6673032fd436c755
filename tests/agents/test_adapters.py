"""Adapters: one base for policy and reference, a KL that begins at 0, checkpoints that load with and without `peft`."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from agents import A2C, GRPO, NLPO, PPO, REINFORCE, RLOO, BestOfN, RandomAgent
from agents.checkpoints import CheckpointError
from agents.policy import Policy
from agents.rollout import collect
from textenv.decoder import Decoder

from .world import PassThrough, build_model, plain_logits, same_tensors

peft = pytest.importorskip("peft")
asked_by_peft = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")


def lora(**changes):
    return peft.LoraConfig(**({"r": 2, "target_modules": "all-linear"} | changes))


def disturb(policy):
    """Adapters that do something: `peft` begins with B = 0."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    policy.invalidate()


def places(model):
    return {p.data_ptr() for p in model.parameters()}


# ---------------------------------------------------------------------- one base


def test_policy_and_reference_hold_one_base(make_envs, model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    agent = RLOO(make_envs(group_size=4), seed=0, episodes_per_update=8, learning_rate=0.05, peft_config=lora())
    own = [p for p in agent.policy.model.parameters() if p.data_ptr() not in places(model)]
    assert places(model) < places(agent.policy.model)
    assert {id(p) for p in own} == {id(p) for p in agent.policy.parameters()}
    assert sum(p.numel() for p in own) == sum(2 * sum(w.shape) for n, w in before.items() if n.endswith("_proj.weight"))
    agent.learn(80)
    assert agent.lanes.reference.model is model
    assert same_tensors(model.state_dict(), before)
    assert agent.history[0]["rollout/kl"] == pytest.approx(0, abs=1e-5)
    assert abs(agent.history[-1]["rollout/kl"]) > 1e-3
    assert all(row["train/first_ratio_error"] < 1e-4 for row in agent.history)


@pytest.mark.parametrize("cls", [PPO, NLPO, A2C, REINFORCE, GRPO])
def test_agents_learn_through_adapters(make_envs, cls):
    envs = make_envs(group_size=4 if cls.needs_groups else 1)
    agent = cls(envs, seed=0, episodes_per_update=8, peft_config=lora()).learn(60)
    assert all(np.isfinite(value) for row in agent.history for value in row.values())
    assert all(row["train/first_ratio_error"] < 1e-4 for row in agent.history)
    assert max(p.abs().max() for name, p in agent.policy.model.named_parameters() if "lora_B" in name) > 0


def test_a_kl_of_exactly_zero_at_the_start(make_envs):
    agent = PPO(PassThrough(make_envs()), seed=0, peft_config=lora())
    assert collect(agent.env, agent.policy, 12, agent.rng).kl == pytest.approx(0, abs=1e-6)


# ---------------------------------------------------------------------- the numbers of peft


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "config",
    [{}, {"target_modules": r".*\.(q_proj|v_proj|c_attn)"}, {"use_dora": True}, {"lora_dropout": 0.5}],
    ids=["LoRA", "LoRA on some", "DoRA", "dropout"],
)
def test_drawn_and_scored_as_by_the_plain_forward_pass(make_envs, kind, config):
    """Decoding has adapters merged into its weights, an update has not. DoRA goes through `transformers`."""
    agent = PPO(make_envs(model=build_model(kind)), seed=0, peft_config=lora(**config))
    disturb(agent.policy)
    assert (Decoder.of(agent.policy.model.base_model) is None) == ("use_dora" in config)
    episodes = collect(agent.env, agent.policy, 12, agent.rng)
    scored, _, _ = agent.policy.evaluate(episodes, np.arange(12))
    assert np.abs(episodes.kl).max() > 0.1
    for i, episode in enumerate(episodes):
        n = episode.response_length
        plain = plain_logits(agent.policy.model, episode.tokens, episode.prompt_length).log_softmax(-1)
        expected = plain[range(n), episode.tokens[episode.prompt_length :]].detach().numpy()
        np.testing.assert_allclose(episode.log_probs, expected, atol=1e-4)
        np.testing.assert_allclose(scored[i, :n].detach().numpy(), expected, atol=1e-4)


def test_gradients_of_adapters_are_those_of_the_plain_forward_pass(make_envs):
    agent = PPO(make_envs(), seed=0, peft_config=lora())
    disturb(agent.policy)
    episodes = collect(agent.env, agent.policy, 6, agent.rng)
    parameters = list(agent.policy.parameters())
    ours = torch.autograd.grad(agent.policy.evaluate(episodes, np.arange(6))[0].sum(), parameters)
    total = torch.zeros(())
    for e in episodes:
        plain = plain_logits(agent.policy.model, e.tokens, e.prompt_length).log_softmax(-1)
        total = total + plain[range(e.response_length), e.tokens[e.prompt_length :]].sum()
    for one, other in zip(ours, torch.autograd.grad(total, parameters), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


def test_an_adapter_that_is_switched_off_is_not_merged(make_envs):
    policy = PPO(make_envs(), seed=0, peft_config=lora()).policy
    disturb(policy)
    observations = make_envs().reset(seed=0)[0]
    adapted = policy.log_probs_all(observations)
    with policy.adapter.disable_adapter():
        policy.invalidate()
        base = policy.log_probs_all(observations)
    policy.invalidate()
    plain = Policy(make_envs().unwrapped.reference).log_probs_all(observations)
    np.testing.assert_allclose(base, plain, atol=1e-5)
    np.testing.assert_array_equal(policy.log_probs_all(observations), adapted)
    assert np.abs(adapted - base).max() > 0.1


def test_rollouts_in_bfloat16_through_adapters(make_envs):
    agent = PPO(make_envs(), seed=0, episodes_per_update=8, peft_config=lora(), rollout_dtype="bfloat16").learn(60)
    assert all(row["train/first_ratio_error"] < 0.3 for row in agent.history)


# ---------------------------------------------------------------------- checkpoints


@asked_by_peft
def test_a_checkpoint_loads_as_a_model_as_adapters_and_as_a_run(make_envs, model, tmp_path):
    def make():
        return make_envs(group_size=4)

    config = {"seed": 0, "episodes_per_update": 8, "learning_rate": 0.02}
    whole = RLOO(make(), peft_config=lora(), **config).learn(80)
    half = RLOO(make(), peft_config=lora(), **config).learn(40)
    half.save(tmp_path / "half")

    tokens = torch.arange(1, 9)[None]
    expected = half.policy.model(tokens).logits
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "half" / "policy")
    torch.testing.assert_close(merged(tokens).logits, expected, atol=1e-5, rtol=1e-4)
    assert (model(tokens).logits - expected).abs().max() > 1e-3
    with_adapters = peft.PeftModel.from_pretrained(build_model(), tmp_path / "half" / "adapter")
    torch.testing.assert_close(with_adapters(tokens).logits, expected, atol=1e-6, rtol=1e-5)

    resumed = RLOO.load(tmp_path / "half", make())
    assert places(model) < places(resumed.policy.model)
    assert same_tensors(resumed.policy.model.state_dict(), half.policy.model.state_dict())
    assert same_tensors(resumed.learn(40).policy.model.state_dict(), whole.policy.model.state_dict())


def test_adapters_of_another_model_are_refused(make_envs, tmp_path):
    PPO(make_envs(), seed=0, peft_config=lora()).save(tmp_path / "run")
    with pytest.raises(CheckpointError, match="is of another model"):
        PPO.load(tmp_path / "run", make_envs(model=build_model(width=32)))


# ---------------------------------------------------------------------- what does not go together


@pytest.mark.parametrize("given", [{"r": 8}, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)])
def test_what_adapts_no_layer_is_refused(make_envs, given):
    with pytest.raises(ValueError, match=r"Expected peft_config to be a configuration of peft that adapts layers.*got"):
        PPO(make_envs(), peft_config=given)


@pytest.mark.parametrize("changes", [{"bias": "all"}, {"init_lora_weights": "pissa"}, {"init_lora_weights": False}])
def test_what_would_write_to_the_reference_is_refused(make_envs, changes):
    model = build_model("gpt2")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="which leave the base as it is"):
        PPO(make_envs(model=model), peft_config=lora(**changes))
    assert same_tensors(model.state_dict(), before)


def test_a_reference_in_half_precision_is_refused(make_envs, tmp_path, model):
    model.save_pretrained(tmp_path)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"Expected a reference in float32 for adapters, got torch\.bfloat16"):
        PPO(make_envs(model=half), peft_config=lora())


@pytest.mark.parametrize("damage", ["", "{"])
def test_a_damaged_adapter_is_a_damaged_checkpoint(make_envs, tmp_path, damage):
    PPO(make_envs(), seed=0, peft_config=lora()).save(tmp_path / "run")
    file = tmp_path / "run" / "adapter" / "adapter_config.json"
    file.unlink() if not damage else file.write_text(damage)
    with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
        PPO.load(tmp_path / "run", make_envs())


@pytest.mark.parametrize("cls", [RandomAgent, BestOfN])
def test_nothing_to_adapt(make_envs, cls):
    with pytest.raises(ValueError, match=f"{cls.__name__} learns nothing"):
        cls(make_envs(), peft_config=lora())


@asked_by_peft
def test_a_model_that_comes_with_adapters_is_refused_with_a_remedy(make_envs):
    with pytest.raises(ValueError, match="merge_and_unload"):
        make_envs(model=peft.get_peft_model(build_model("gpt2"), lora(fan_in_fan_out=True)))
