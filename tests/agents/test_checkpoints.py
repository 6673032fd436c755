"""Checkpoints: exact resume, and everything that can be wrong with a directory."""

from __future__ import annotations

import csv
import json
import os
from dataclasses import asdict

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback
from transformers import AutoModelForCausalLM, AutoTokenizer

from agents import PPO, CheckpointError, RandomAgent
from textenv.kl import AdaptiveKL

from .world import PassThrough, build_model, same_tensors

SMALL = {"episodes_per_update": 8, "minibatch_episodes": 4, "warmup_iterations": 3}
N = 60  # tokens: about three iterations


def weights(agent):
    modules = {"policy": agent.policy.model} | agent.trained_modules()
    return {f"{name}.{key}": t for name, module in modules.items() for key, t in module.state_dict().items()}


def plain(value):
    """Nested state as something that `==` compares exactly."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, torch.Tensor | np.ndarray):
        array = np.asarray(value)
        return (array.shape, str(array.dtype), array.tobytes())
    return value


def assert_same(a, b):
    assert same_tensors(weights(a), weights(b))
    assert plain(a.adam.state_dict()) == plain(b.adam.state_dict())
    assert plain(a.lanes.get_state()) == plain(b.lanes.get_state())
    assert a.rng.bit_generator.state == b.rng.bit_generator.state
    assert (a.num_timesteps, a.accounts) == (b.num_timesteps, b.accounts)
    histories = [
        [{k: v for k, v in row.items() if k not in ("time/seconds", "time/reward_seconds")} for row in agent.history]
        for agent in (a, b)
    ]
    assert histories[0] == histories[1]


# ---------------------------------------------------------------------- the same run, in one piece or in several

WORLDS = {
    "deferred": (None, {}),
    "deferred NEXT_STEP": (None, {"autoreset_mode": "NEXT_STEP"}),
    "step lane": (PassThrough, {}),
    "step lane NEXT_STEP": (PassThrough, {"autoreset_mode": "NEXT_STEP"}),
    "groups": (None, {"group_size": 2}),
}


@pytest.fixture
def make_agent(make_envs):
    def make(world="deferred", seed=0, load=None, **config):
        wrapper, kwargs = WORLDS[world]
        envs = make_envs(**({"beta": AdaptiveKL(beta=0.1, target=0.5, episodes_per_update=5)} | kwargs))
        envs = wrapper(envs) if wrapper else envs
        return PPO.load(load, envs) if load else PPO(envs, seed=seed, **(SMALL | config))

    return make


@pytest.mark.parametrize("world", WORLDS)
def test_resume_is_bit_exact(make_agent, tmp_path, world):
    whole = make_agent(world).learn(2 * N)
    make_agent(world).learn(N).save(tmp_path / "half")
    resumed = make_agent(world, load=tmp_path / "half")
    assert 1 <= len(resumed.history) < len(whole.history)
    resumed.learn(N)
    assert_same(resumed, whole)


@pytest.mark.parametrize(
    "config",
    [{"critic": "separate"}, {"top_k": 4, "ptx_coef": 0.5}, {"seed": None}],
    ids=["separate", "ptx", "no seed"],
)
def test_resume_is_bit_exact_with_other_settings(make_envs, tmp_path, config):
    data = {"ptx_data": np.arange(40).reshape(8, 5) % 10} if "ptx_coef" in config else {}
    half = PPO(make_envs(), **({"seed": 0} | SMALL | config), **data).learn(N)
    half.save(tmp_path / "half")
    resumed = PPO.load(tmp_path / "half", make_envs(), **data)
    assert_same(resumed, half)
    assert_same(resumed.learn(N), half.learn(N))


def test_learning_twice_is_learning_once_for_as_long(make_agent):
    assert_same(make_agent().learn(N).learn(N), make_agent().learn(2 * N))


def test_same_seed_same_weights_and_other_seed_other_weights(make_agent):
    first, second, other = make_agent(seed=5).learn(N), make_agent(seed=5).learn(N), make_agent(seed=6).learn(N)
    assert_same(first, second)
    assert not same_tensors(weights(first), weights(other))
    assert first.history[0]["rollout/task_reward"] != other.history[0]["rollout/task_reward"]


@pytest.mark.parametrize("world", ["deferred", "step lane"])
def test_checkpoints_in_the_middle_of_a_rollout_resume_exactly(make_agent, tmp_path, world):
    """SB3's CheckpointCallback saves whenever its count is up. The checkpoint holds the state after the last update."""
    callback = CheckpointCallback(save_freq=3, save_path=str(tmp_path), name_prefix="ppo")
    whole = make_agent(world).learn(2 * N, callback=callback)
    assert_same(whole, make_agent(world).learn(2 * N))  # saving has changed nothing
    paths = sorted(tmp_path.glob("ppo_*_steps.zip"), key=lambda p: int(p.name.split("_")[1]))
    assert len(paths) > 2
    for path in paths[:: len(paths) - 1]:
        resumed = make_agent(world, load=path)
        assert resumed.num_timesteps <= int(path.name.split("_")[1])
        assert_same(resumed.learn(2 * N - resumed.num_timesteps), whole)


def test_a_checkpoint_right_after_an_update_holds_the_update(make_agent, tmp_path):
    agent = make_agent()
    update = agent.update

    def update_and_save(episodes):
        update(episodes)
        agent.save(tmp_path / "after")
        agent.at_save = (
            agent.num_timesteps,
            agent.rng.bit_generator.state,
            {k: t.clone() for k, t in weights(agent).items()},
        )

    agent.update = update_and_save
    agent.learn(1)
    loaded = make_agent(load=tmp_path / "after")
    timesteps, generator, tensors = agent.at_save
    assert (loaded.num_timesteps, loaded.rng.bit_generator.state) == (timesteps, generator)
    assert same_tensors(weights(loaded), tensors)


def test_a_stopped_run_can_be_saved_and_goes_on_for_as_long_as_asked(make_agent, tmp_path):
    agent = make_agent()
    agent.learn(10_000, callback=lambda *_: agent.num_timesteps < 30)
    assert agent.num_timesteps < 100
    agent.save(tmp_path / "stopped")
    done, iterations = agent.num_timesteps, len(agent.history)
    agent.learn(N)
    assert done + N <= agent.num_timesteps < done + N + 8 * 5  # at most one rollout more
    assert len(agent.history) > iterations
    assert_same(make_agent(load=tmp_path / "stopped").learn(N), agent)


def test_an_exception_leaves_a_usable_agent(make_agent, tmp_path):
    class Interrupt(BaseCallback):
        def _on_step(self):
            if self.n_calls == 9:
                raise KeyboardInterrupt
            return True

    agent = make_agent()
    with pytest.raises(KeyboardInterrupt):
        agent.learn(10_000, callback=Interrupt())
    agent.save(tmp_path / "interrupted")
    agent.learn(N)
    assert_same(make_agent(load=tmp_path / "interrupted").learn(N), agent)


def test_another_number_of_lanes_loads_without_their_state(make_agent, make_envs, tmp_path):
    agent = make_agent().learn(N)
    agent.save(tmp_path / "a")
    other = PPO.load(tmp_path / "a", make_envs(num_envs=3))
    assert same_tensors(weights(other), weights(agent))
    other.learn(N)


# ---------------------------------------------------------------------- what is written


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_policy_loads_with_transformers(make_envs, tmp_path, kind):
    agent = PPO(make_envs(model=build_model(kind)), seed=0, **SMALL).learn(N)
    agent.save(tmp_path / "a")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a" / "policy")
    ids = torch.tensor([[1, 2, 3, 4]])
    assert torch.equal(model(ids).logits, agent.policy.model(ids).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "a" / "policy")("a b")["input_ids"] == [1, 2]


def test_trainer_state_loads_with_weights_only(make_agent, tmp_path):
    agent = make_agent().learn(N)
    agent.save(tmp_path / "a")
    state = torch.load(tmp_path / "a" / "trainer.pt", weights_only=True)
    assert state["num_timesteps"] == agent.num_timesteps
    about = json.loads((tmp_path / "a" / "agent.json").read_text())
    assert about["agent"] == "PPO"
    assert about["config"] == asdict(agent.config)
    assert about["num_timesteps"] == agent.num_timesteps


@pytest.mark.parametrize("critic", ["head", "separate"])
def test_the_critic_is_saved(make_envs, tmp_path, critic):
    agent = PPO(make_envs(), seed=0, critic=critic, **SMALL).learn(N)
    assert agent.critic.head.weight.abs().max() > 0
    agent.save(tmp_path / "a")
    stored = load_file(tmp_path / "a" / "critic.safetensors")
    assert torch.equal(stored["critic.head.weight"], agent.critic.head.weight)
    assert any("trunk" in name for name in stored) == (critic == "separate")
    assert same_tensors(PPO.load(tmp_path / "a", make_envs()).critic.state_dict(), agent.critic.state_dict())


def test_random_agent_round_trip(make_envs, tmp_path):
    agent = RandomAgent(make_envs(), seed=0).learn(N)
    agent.save(tmp_path / "a")
    again = RandomAgent.load(tmp_path / "a", make_envs())
    assert again.history == agent.history
    assert plain(again.lanes.get_state()) == plain(agent.lanes.get_state())


def test_saving_over_a_checkpoint_replaces_it(make_agent, tmp_path):
    agent = make_agent().learn(N)
    agent.save(tmp_path / "a")
    agent.learn(N)
    agent.save(tmp_path / "a")
    assert_same(make_agent(load=tmp_path / "a"), agent)
    assert os.listdir(tmp_path) == ["a"]


def test_saving_makes_folders_and_accepts_an_empty_one(make_agent, tmp_path):
    agent = make_agent()
    agent.save(tmp_path / "runs" / "today" / "a")
    (tmp_path / "empty").mkdir()
    agent.save(str(tmp_path / "empty"))
    assert_same(make_agent(load=tmp_path / "empty"), make_agent(load=tmp_path / "runs" / "today" / "a"))


# ---------------------------------------------------------------------- saving that fails


@pytest.mark.parametrize("failing", ["torch.save", "agents.base.save_file", "json.dumps", "os.replace"])
@pytest.mark.parametrize("existing", [True, False])
def test_a_failed_save_leaves_nothing_half_written(make_agent, tmp_path, monkeypatch, failing, existing):
    agent = make_agent().learn(N)
    if existing:
        agent.save(tmp_path / "a")
    twin = make_agent(load=tmp_path / "a") if existing else None
    agent.learn(N)
    import json as json_module

    original, calls = os.replace, []

    def full(*args, **kwargs):
        calls.append(args)
        raise OSError("No space left on device")

    def second(*args):  # the old checkpoint has been moved away, and the new one cannot be moved in
        calls.append(args)
        if len(calls) == 1 + existing:
            raise OSError("No space left on device")
        return original(*args)

    targets = {"torch.save": (torch, "save", full), "json.dumps": (json_module, "dumps", full),
               "agents.base.save_file": ("agents.base.save_file", full), "os.replace": (os, "replace", second)}  # fmt: skip
    with monkeypatch.context() as patched:
        patched.setattr(*targets[failing])
        with pytest.raises(OSError, match="No space left"):
            agent.save(tmp_path / "a")
    assert calls
    assert os.listdir(tmp_path) == (["a"] if existing else [])
    if existing:
        assert_same(make_agent(load=tmp_path / "a"), twin)
    agent.save(tmp_path / "a")
    assert_same(make_agent(load=tmp_path / "a"), agent)


@pytest.mark.parametrize("what", ["folder", "file"])
def test_other_peoples_files_are_never_overwritten(make_agent, tmp_path, what):
    path = tmp_path / "thesis"
    if what == "folder":
        path.mkdir()
        (path / "chapter1.tex").write_text("precious")
    else:
        path.write_text("precious")
    with pytest.raises(CheckpointError, match="no checkpoint: choose another path"):
        make_agent().save(path)
    assert (path / "chapter1.tex" if what == "folder" else path).read_text() == "precious"
    assert os.listdir(tmp_path) == ["thesis"]


# ---------------------------------------------------------------------- loading what is wrong


@pytest.fixture
def saved(make_agent, tmp_path):
    make_agent().save(tmp_path / "a")
    return tmp_path / "a"


def truncate(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def drop_tensor(file):
    tensors = load_file(file)
    tensors.pop(next(iter(tensors)))
    save_file(tensors, file)


DAMAGE = {
    "no directory": (lambda p: p.rename(p.with_name("b")), "No checkpoint at .*expected a directory with agent.json"),
    "no agent.json": (lambda p: (p / "agent.json").unlink(), "No checkpoint at"),
    "agent.json cut": (lambda p: truncate(p / "agent.json"), "agent.json is damaged.*expected JSON.*Take another"),
    "agent.json binary": (lambda p: (p / "agent.json").write_bytes(b"\xff\xfe\x00"), "agent.json is damaged"),
    "agent.json a list": (lambda p: (p / "agent.json").write_text("[1, 2]"), "agent.json is damaged"),
    "agent.json without config": (lambda p: (p / "agent.json").write_text('{"agent": "PPO"}'), "damaged.*config"),
    "weights cut": (lambda p: truncate(p / "policy" / "model.safetensors"), "model.safetensors cannot be read.*truncated"),
    "weights missing": (lambda p: (p / "policy" / "model.safetensors").unlink(), "cannot be read.*missing"),
    "weights not safetensors": (lambda p: (p / "policy" / "model.safetensors").write_bytes(b"x" * 999), "cannot be read"),
    "a weight missing": (lambda p: drop_tensor(p / "policy" / "model.safetensors"), "of another model: expected .* found it missing"),
    "critic cut": (lambda p: truncate(p / "critic.safetensors"), "critic.safetensors cannot be read"),
    "critic missing": (lambda p: (p / "critic.safetensors").unlink(), "critic.safetensors cannot be read.*missing"),
    "trainer cut": (lambda p: truncate(p / "trainer.pt"), "trainer.pt cannot be read.*truncated.*Take another checkpoint"),
    "trainer missing": (lambda p: (p / "trainer.pt").unlink(), "trainer.pt cannot be read.*missing"),
    "trainer of something else": (lambda p: torch.save({"a": 1}, p / "trainer.pt"), "trainer.pt does not fit.*expected"),
    "trainer a tensor": (lambda p: torch.save(torch.ones(2), p / "trainer.pt"), "trainer.pt does not fit"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_checkpoints_are_refused_with_one_clear_error(make_envs, saved, name):
    damage, message = DAMAGE[name]
    damage(saved)
    with pytest.raises(CheckpointError, match=f"(?s){message}"):
        PPO.load(saved, make_envs())


def test_a_checkpoint_of_another_agent(make_envs, saved):
    with pytest.raises(
        CheckpointError, match=r"checkpoint of PPO, expected one of RandomAgent: load it with PPO\.load"
    ):
        RandomAgent.load(saved, make_envs())


OTHER_MODELS = {
    "wider": {"width": 32},
    "deeper": {"layers": 2},
    "another architecture": {"kind": "gpt2"},
    "a smaller vocabulary": {"vocab_size": 12},
}


@pytest.mark.parametrize("name", OTHER_MODELS)
def test_a_checkpoint_of_another_model(make_envs, saved, name):
    """In both directions: a deeper model has tensors that a shallower one lacks, which must not be dropped in silence."""
    other = build_model(**OTHER_MODELS[name])
    message = "model.safetensors is of another model: expected .* Make the environment with the model"
    with pytest.raises(CheckpointError, match=message):
        PPO.load(saved, make_envs(model=other))
    PPO(make_envs(model=other), seed=0).save(saved.with_name("b"))
    with pytest.raises(CheckpointError, match=message):
        PPO.load(saved.with_name("b"), make_envs())


def test_a_state_of_other_groups(make_envs, make_agent, saved):
    with pytest.raises(CheckpointError, match="Make the environment as it was"):
        PPO.load(saved, make_envs(group_size=4))


def test_a_pickled_payload_is_not_run(make_envs, saved, tmp_path):
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    torch.save({"optimizers": Payload()}, saved / "trainer.pt")
    with pytest.raises(CheckpointError, match="never unpickled"):
        PPO.load(saved, make_envs())
    assert not (tmp_path / "owned").exists()


def test_resuming_into_the_same_log_directory_keeps_the_curve(make_envs, tmp_path):
    def rows():
        with (tmp_path / "progress.csv").open() as file:
            return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]

    agent = PPO(make_envs(), seed=0, log_dir=tmp_path, **SMALL)
    agent.learn(N)
    agent.save(tmp_path / "checkpoint")
    agent.logger.close()
    before = rows()
    resumed = PPO.load(tmp_path / "checkpoint", make_envs(), log_dir=tmp_path)
    resumed.learn(N)
    resumed.logger.close()
    after = rows()
    assert len(after) > len(before)
    assert after[: len(before)] == before
