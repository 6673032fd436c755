"""What all agents share: the verbs that do not differ between algorithms. The loops are in the agents' own files."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self, TypeAlias, runtime_checkable

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import save_file
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, ConvertCallback
from stable_baselines3.common.logger import CSVOutputFormat, Logger, configure

from agents.adapters import load_adapter, read_adapter_config, save_adapter, save_merged
from agents.checkpoints import (
    ADAPTER_DIR,
    AGENT_FILE,
    CRITIC_FILE,
    POLICY_DIR,
    TRAINER_FILE,
    CheckpointError,
    as_arrays,
    as_tensors,
    check_tensors,
    put_in_place,
    read_about,
    read_tensors,
    unshared,
)
from agents.config import AgentConfig, make_config
from agents.policy import Policy
from agents.rollout import StopTraining, run_prompts
from textenv.env import TextVectorEnv
from textenv.ledger import Episodes
from textenv.prompts import Prompts, encode_prompt
from textenv.task import quiet_loading

MaybeCallback: TypeAlias = Callable[[dict[str, Any], dict[str, Any]], bool] | BaseCallback | list[BaseCallback] | None

ACCOUNTS = ("gradient_tokens", "optimizer_steps", "reward_calls", "reference_calls", "reference_tokens")
"""What every agent counts, beside environment tokens and seconds (docs/logged-figures.md)."""


@runtime_checkable
class Agent(Protocol):
    """The verbs of stable-baselines3, which its models satisfy untouched."""

    def learn(self, total_timesteps: int, callback: Any = None, progress_bar: bool = False) -> Any:
        """Train for so many environment steps."""
        ...

    def predict(
        self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[Any, Any]:
        """Actions for observations."""
        ...

    def save(self, path: Any) -> None:
        """Write a checkpoint."""
        ...


class LanguageModelAgent:
    """An agent whose policy is the environment's language model.

    Args:
        env: A textenv vector environment (wrapped or not). The policy starts as its reference model.
        seed: Of sampling, minibatches and the environment's lanes.
        log_dir: Where `progress.csv` (and tensorboard's files, where installed) go; None logs nothing to disk.
        verbose: 1 prints each iteration's figures.
        peft_config: `peft.LoraConfig(...)`: train adapters on the reference's own weights instead of a copy (docs/performance.md).
        config: The agent's config dataclass; or give its fields as keywords.

    Attributes:
        policy: What acts. It has `log_probs`, so any environment can pay its KL.
        num_timesteps: Environment steps (tokens) so far.
        history: The logged figures of each iteration.
    """

    Config: ClassVar[type[AgentConfig]] = AgentConfig
    kl_placement: str = "reward"
    """Where the agent's KL lives: `"reward"` (the environment pays it), `"loss"` or `"none"`."""
    needs_groups: ClassVar[bool] = False
    """Whether the agent compares completions of one prompt: the environment is then made with `group_size` >= 2."""

    def __init__(
        self,
        env: gym.vector.VectorEnv[Any, Any, Any],
        *,
        seed: int | None = None,
        log_dir: str | Path | None = None,
        verbose: int = 0,
        peft_config: Any = None,
        config: AgentConfig | None = None,
        **overrides: Any,
    ) -> None:
        self.env = _checked_env(env)
        self.lanes: TextVectorEnv = env.unwrapped  # type: ignore[assignment]
        self.config: AgentConfig = make_config(type(self), config, overrides)
        self.seed = seed

        seeds = np.random.SeedSequence(seed).spawn(2)
        self.rng, self._predict_rng = (np.random.default_rng(child) for child in seeds)
        self.peft_config = peft_config
        self.policy = self.make_policy()
        self.policy.tokens_per_pass = self.config.tokens_per_pass
        if self.config.rollout_dtype is not None:
            self.policy.rollout_dtype = getattr(torch, self.config.rollout_dtype)
        self.attach_to_env()
        self.env.reset(seed=seed)

        self.num_timesteps = 0
        self.accounts = dict.fromkeys(ACCOUNTS, 0)
        self.history: list[dict[str, float]] = []
        self._decay = 1.0  # of the learning rate, in this iteration
        self._target_timesteps = 0
        self._seconds = self._reward_seconds = 0.0
        self._before_rollout: dict[str, Any] | None = None  # progress at the last update, until the next
        self.logger: Logger = configure(str(log_dir) if log_dir else None, _formats(log_dir, verbose))

    # ------------------------------------------------------------------ acting

    def predict(
        self,
        observation: NDArray[np.int64],
        state: Any = None,
        episode_start: Any = None,
        deterministic: bool = False,
    ) -> tuple[Any, Any]:
        """The next token of each observation.

        Args:
            observation: Shape: (N, L), or (L,) for one.
            state: Passed through: the observation is the whole state.
            episode_start: Ignored, for the same reason.
            deterministic: The most probable token instead of a sample.

        Returns:
            Actions, shape (N,) or (), and `state`.
        """
        observation = np.asarray(observation)
        actions, _ = self.policy.act(np.atleast_2d(observation), self._predict_rng, deterministic)
        return (actions if observation.ndim == 2 else actions[0]), state

    def generate(self, prompts: Sequence[Any], deterministic: bool = False, batch_size: int = 64) -> list[str]:
        """Complete prompts.

        Args:
            prompts: Texts or message lists.
            deterministic: Take the most probable token each time.
            batch_size: Lanes.

        Returns:
            One completion per prompt.
        """
        if isinstance(prompts, str):
            raise ValueError("Expected a list of prompts, got one string: pass [prompt].")
        if not len(prompts):
            return []
        task, behaviour = self.lanes.task, self.lanes.behaviour
        ids = [encode_prompt(task.tokenizer, prompt, f"prompt {i}") for i, prompt in enumerate(prompts)]
        longest = max(len(row) for row in ids)
        task = replace(task, prompts=Prompts(list(prompts), ids), reward=None, max_prompt_tokens=longest)
        lanes = min(batch_size, len(ids))
        env = TextVectorEnv(lanes, task, beta=0.0, temperature=behaviour.temperature, action_mask=behaviour.action_mask)
        return env.completions(run_prompts(self, env, np.arange(len(ids)), deterministic))

    def get_env(self) -> gym.vector.VectorEnv[Any, Any, Any]:
        """The environment: what stable-baselines3's callbacks call `training_env`."""
        return self.env

    def set_random_seed(self, seed: int | None = None) -> None:
        """Reseed `predict` and `generate` (training draws from a generator of its own)."""
        self._predict_rng = np.random.default_rng(seed)

    # ------------------------------------------------------------------ learning: what surrounds the loops

    def start_learning(self, total_timesteps: int, callback: MaybeCallback, progress_bar: bool) -> Learning:
        """Open a session of learning: a context manager that counts, shows progress, and calls back."""
        if total_timesteps < 1:
            raise ValueError(f"Expected total_timesteps >= 1, got {total_timesteps}.")
        return Learning(self, total_timesteps, callback, progress_bar)

    def make_policy(self) -> Policy:
        """What acts. An agent with another kind of policy returns it here."""
        return Policy(self.lanes.reference, self.config.top_k, self.config.top_p, self.peft_config)

    def attach_to_env(self) -> None:
        """Have the environment measure this policy's KL, and pay it if that is where the agent has it."""
        if self.lanes.kl.kind == "reference" and self.kl_placement == "reward":
            raise ValueError(
                f"kl='reference' leaves -beta log pi(a|s) to the agent, and {type(self).__name__} does not add it: make the "
                "environment with kl='policy' (the default)."
            )
        self.lanes.attach_policy(self.policy, pay=self.kl_placement == "reward")

    def optimizer(self, *modules: torch.nn.Module) -> torch.optim.Adam:
        """Adam over the policy (and further modules), with InstructGPT's betas and the eps of Ziegler's code."""
        parameters = [*self.policy.parameters(), *(p for module in modules for p in module.parameters())]
        return torch.optim.Adam(parameters, lr=self.learning_rate, betas=(0.9, 0.95), eps=1e-5, fused=True)

    @property
    def timesteps_counted(self) -> int:
        """What `learn` counts from: the target that finished calls have met, however far their last rollout went on."""
        return min(self._target_timesteps, self.num_timesteps)

    @property
    def learning_rate(self) -> float:
        """Adam's step size in this iteration."""
        if self.config.learning_rate is not None:
            return self.config.learning_rate * self._decay
        width: int = self.policy.model.config.get_text_config().hidden_size
        return 0.05 / width * self._decay

    def decay_learning_rate(self) -> None:
        """Set every optimiser's step size, at the beginning of an iteration.

        It depends on the tokens so far and on nothing else, so that a resumed run repeats an undisturbed one. The tokens before
        the rollout count: the first update takes full steps, and the last one does not take steps of 0.
        """
        if self.config.decay_timesteps is not None:
            self._decay = max(0.0, 1 - self.num_timesteps / self.config.decay_timesteps)
            for optimizer in self.optimizers().values():
                for group in optimizer.param_groups:
                    group["lr"] = self.learning_rate

    def apply_gradients(self, optimizer: torch.optim.Optimizer) -> float:
        """Clip, step, and tell the caches. Returns the gradient's norm before clipping."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, self.config.max_grad_norm))
        if not np.isfinite(norm):
            optimizer.zero_grad(set_to_none=True)
            raise FloatingPointError(
                f"The gradient's norm is {norm}; weights are left as they were. Lower the learning rate."
            )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self.policy.invalidate()
        self._before_rollout = None
        self.accounts["optimizer_steps"] += 1
        return norm

    def log_rollout(self, episodes: Episodes) -> None:
        """Record what the episodes say, under the names all agents share (docs/logged-figures.md)."""
        self.accounts["reward_calls"] += len(episodes)
        self.accounts["reference_calls"] += len(episodes)
        self.accounts["reference_tokens"] += int(episodes.response_length.sum())
        columns = {
            "rollout/task_reward": episodes.task_reward,
            "rollout/return": episodes.rewards.sum(axis=1),
            "rollout/kl": episodes.kl,
            "rollout/response_length": episodes.response_length,
            "rollout/finished": episodes.finish_reason == "stop",
        } | {f"reward/{name}": values for name, values in episodes.components.items()}
        for name, values in columns.items():
            if not np.isnan(values.astype(float)).all():  # what a wrapper has cut has neither task reward nor KL
                self.logger.record(name, float(np.nanmean(values)))
        self.logger.record("rollout/beta", self.lanes.kl.beta)
        if self.lanes.reward is not None:
            self._reward_seconds += self.lanes.reward.pop_seconds()
            for name, value in self.lanes.reward.pop_metrics().items():
                self.logger.record(f"reward/{name}", float(value))

    def reference_log_probs(self, episodes: Episodes) -> torch.Tensor:
        """Of each response token, for a KL in the loss. Shape: (B, T), nats.

        The deferred lane has them at hand; episodes that came through wrappers are scored here.
        """
        ref = episodes.ref_log_probs
        if np.isnan(ref).any():
            n = episodes.response_length
            ref = np.zeros_like(ref)
            ref[:, : n.max()] = self.lanes.reference.score(episodes.tokens, episodes.prompt_length, n)
            self.accounts["reference_calls"] += len(episodes)
            self.accounts["reference_tokens"] += int(n.sum())
        return torch.from_numpy(ref).to(self.policy.lm.device, torch.float32)

    # ------------------------------------------------------------------ checkpoints

    def trained_modules(self) -> dict[str, torch.nn.Module]:
        """Modules beside the policy that a checkpoint must hold."""
        return {}

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Optimisers that a checkpoint must hold."""
        return {}

    def save(self, path: str | Path) -> None:
        """Write a checkpoint directory, all of it or nothing.

        During a rollout (from a callback, say) it holds the state after the last update: resuming repeats the rollout.
        `policy/` loads with `AutoModelForCausalLM.from_pretrained` (adapters are merged into it, and by themselves in `adapter/`);
        `critic.safetensors` holds what else was trained; `trainer.pt` what resuming needs (it loads with `weights_only=True`);
        `agent.json` says what it is.
        """
        path = Path(path)
        if path.exists() and not (path / AGENT_FILE).exists() and (path.is_file() or any(path.iterdir())):
            raise CheckpointError(f"{path} exists and is no checkpoint: choose another path, or remove it.")
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
        scratch.chmod(0o755)  # mkdtemp makes it private
        try:
            with quiet_loading():
                if self.policy.adapter is None:
                    self.policy.model.save_pretrained(scratch / POLICY_DIR)
                else:
                    save_merged(self.policy.adapter, scratch / POLICY_DIR)
                    save_adapter(self.policy.adapter, scratch / ADAPTER_DIR)
            self.lanes.tokenizer.save_pretrained(scratch / POLICY_DIR)
            tensors = {
                f"{name}.{key}": value.contiguous()
                for name, module in self.trained_modules().items()
                for key, value in unshared(module.state_dict()).items()
            }
            if tensors:
                save_file(tensors, scratch / CRITIC_FILE)
            progress = self._before_rollout or self._progress()
            optimizers = {name: optimizer.state_dict() for name, optimizer in self.optimizers().items()}
            torch.save(
                {"optimizers": optimizers, **progress, "env": as_tensors(progress["env"])}, scratch / TRAINER_FILE
            )
            about = {
                "agent": type(self).__name__,
                "config": asdict(self.config),
                "seed": self.seed,
                "num_timesteps": progress["num_timesteps"],
                "env": self.lanes.spec.id if self.lanes.spec else None,
                "vocab_size": self.lanes.vocab_size,
                "adapters": self.policy.adapter is not None,
                "versions": {name: version(name) for name in ("torch", "transformers", "gymnasium")}
                | ({} if self.policy.adapter is None else {"peft": version("peft")}),
                "history": self.history,
            }
            (scratch / AGENT_FILE).write_text(json.dumps(about, indent=1))
            put_in_place(scratch, path)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    @classmethod
    def load(cls, path: str | Path, env: gym.vector.VectorEnv[Any, Any, Any], **kwargs: Any) -> Self:
        """Go on from a checkpoint, exactly: N steps, this, and N steps give the weights of 2N steps (on a CPU).

        Args:
            path: What `save` wrote.
            env: An environment with the same model and task. With the same number of lanes its state is restored as well.
            kwargs: `log_dir`, `verbose`; the config, and that of adapters, come from the checkpoint.

        Raises:
            CheckpointError: Missing, damaged, unsafe, or of another agent or model.
        """
        path = Path(path)
        about = read_about(path)
        if about["agent"] != cls.__name__:
            raise CheckpointError(
                f"{path} is a checkpoint of {about['agent']}, expected one of {cls.__name__}: load it with {about['agent']}.load."
            )
        try:
            state = torch.load(path / TRAINER_FILE, map_location="cpu", weights_only=True)
        except Exception as error:
            raise CheckpointError(
                f"{path / TRAINER_FILE} cannot be read ({type(error).__name__}): it is missing or truncated, or holds objects that plain "
                "checkpoints do not (which are never unpickled). Take another checkpoint; policy/ may still load by itself."
            ) from error
        peft_config = read_adapter_config(path / ADAPTER_DIR)
        if peft_config is None and about.get("adapters"):
            raise CheckpointError(
                f"{path} has lost its folder {ADAPTER_DIR!r}. Take another checkpoint; policy/ may still load by itself."
            )
        adapters = {} if peft_config is None else {"peft_config": peft_config}
        agent = cls(env, seed=about["seed"], **about["config"], **adapters, **kwargs)
        agent._load_tensors(path)
        try:
            agent._restore(state)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise CheckpointError(
                f"{path / TRAINER_FILE} does not fit ({type(error).__name__}: {error}): expected what {cls.__name__}.save has written for "
                "an environment like this one. Make the environment as it was, or take another checkpoint."
            ) from error
        agent.history = about["history"]
        for csv in (f for f in agent.logger.output_formats if isinstance(f, CSVOutputFormat)):
            for row in agent.history:  # the file begins anew: write again what the first run had logged
                csv.write(row, dict.fromkeys(row, ()), int(row["time/timesteps"]))
        return agent

    def _load_tensors(self, path: Path) -> None:
        if self.policy.adapter is not None:
            load_adapter(self.policy.adapter, path / ADAPTER_DIR)
        else:
            policy_file = path / POLICY_DIR / "model.safetensors"
            stored, expected = read_tensors(policy_file), self.policy.model.state_dict()
            tied = set(expected) - set(unshared(expected))  # stored once, under one of their names
            check_tensors(stored, expected, policy_file, optional=tied)
            self.policy.model.load_state_dict(stored, strict=False)
        modules = self.trained_modules()
        if modules:
            stored = read_tensors(path / CRITIC_FILE)
            for name, module in modules.items():
                part = {key.removeprefix(f"{name}."): t for key, t in stored.items() if key.startswith(f"{name}.")}
                expected = module.state_dict()
                tied = set(expected) - set(unshared(expected))
                check_tensors(part, expected, path / CRITIC_FILE, optional=tied)
                module.load_state_dict(part, strict=False)
        self.policy.invalidate()

    def _progress(self) -> dict[str, Any]:
        return {
            "rng": self.rng.bit_generator.state,
            "predict_rng": self._predict_rng.bit_generator.state,
            "num_timesteps": self.num_timesteps,
            "target_timesteps": self._target_timesteps,
            "seconds": self._seconds,
            "reward_seconds": self._reward_seconds,
            "accounts": dict(self.accounts),
            "env": self.lanes.get_state(),
        }

    def _restore(self, state: dict[str, Any]) -> None:
        for name, optimizer in self.optimizers().items():
            optimizer.load_state_dict(state["optimizers"][name])
        self._restore_progress(state)

    def _restore_progress(self, state: dict[str, Any]) -> None:
        self.rng.bit_generator.state = state["rng"]
        self._predict_rng.bit_generator.state = state["predict_rng"]
        self.num_timesteps, self._target_timesteps = state["num_timesteps"], state["target_timesteps"]
        self._seconds, self._reward_seconds = state["seconds"], state.get("reward_seconds", 0.0)
        self.accounts = dict.fromkeys(ACCOUNTS, 0) | state["accounts"]
        env_state = as_arrays(state["env"])
        if env_state["arrays"]["_tokens"].shape == (self.lanes.num_envs, self.lanes.max_tokens):
            self.lanes.set_state(env_state)


class Learning:
    """One call of `learn`: `while session.more(): ...` counts tokens, shows progress, calls back and writes the log."""

    def __init__(
        self, agent: LanguageModelAgent, total_timesteps: int, callback: MaybeCallback, progress_bar: bool
    ) -> None:
        self.agent = agent
        # A call that has run to its end is counted by its target, not by the end of its last rollout: then learn(N) twice
        # runs the same iterations as learn(2N). One that was stopped is counted by what it has done.
        agent._target_timesteps = agent.timesteps_counted + total_timesteps
        self.callback = _as_callback(callback)
        self.callback.init_callback(agent)
        self.begin, self.total = agent.num_timesteps, agent._target_timesteps
        self.progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("tokens"), TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"), disable=not progress_bar,
        )  # fmt: skip

    def __enter__(self) -> Learning:
        agent = self.agent
        agent.attach_to_env()  # another agent on the same environment may have attached its own policy since
        self.callback.on_training_start({"self": agent, "total_timesteps": self.total}, globals())
        self._clock = time.perf_counter()
        self.progress.start()
        self._bar = self.progress.add_task(type(agent).__name__, total=self.total, completed=self.begin, figures="")
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> bool:
        self.progress.stop()
        if kind is not None and self.agent._before_rollout is not None:
            # Stopped within a rollout: back to where it began, so that going on repeats an undisturbed run.
            self.agent._restore_progress(self.agent._before_rollout)
        self.agent._before_rollout = None
        self.agent.lanes.reference.invalidate()
        self.agent.policy.invalidate()
        if kind is None or kind is StopTraining:
            self.callback.on_training_end()
        return kind is StopTraining

    def more(self) -> bool:
        """Whether to begin another iteration. Caches start empty, so that a resumed run repeats an undisturbed one."""
        if self.agent.num_timesteps >= self.total:
            return False
        self.callback.on_rollout_start()
        self.agent.policy.invalidate()
        self.agent.lanes.reference.invalidate()
        self.agent.decay_learning_rate()
        self.agent._before_rollout = self.agent._progress()
        if self.agent.lanes.reward is not None:
            self.agent.lanes.reward.pop_seconds()  # of an evaluation in between, say: not training's
        return True

    def on_step(self, tokens: int) -> None:
        """After each `env.step`."""
        self.agent.num_timesteps += tokens
        self.progress.update(self._bar, completed=self.agent.num_timesteps)
        if not self.callback.on_step():
            raise StopTraining

    def rollout_done(self, episodes: Episodes) -> None:
        """After the last step of a rollout."""
        self.callback.update_locals({"episodes": episodes})
        self.callback.on_rollout_end()
        self.agent.log_rollout(episodes)

    def iteration_done(self) -> None:
        """After an update: write the log."""
        agent, now = self.agent, time.perf_counter()
        agent._seconds += now - self._clock
        self._clock = now
        for name, value in agent.accounts.items():
            agent.logger.record(f"time/{name}", value)
        agent.logger.record("time/timesteps", agent.num_timesteps)
        agent.logger.record("time/seconds", agent._seconds)
        agent.logger.record("time/reward_seconds", agent._reward_seconds)
        logged = agent.logger.name_to_value.items()  # a callback may have recorded a picture or a text as well
        figures = {name: float(value) for name, value in logged if isinstance(value, int | float | np.number)}
        agent.history.append(figures)
        shown = [
            f"{name} {figures[key]:.3g}"
            for name, key in (("reward", "rollout/task_reward"), ("KL", "rollout/kl"))
            if key in figures
        ]
        self.progress.update(self._bar, figures="  ".join(shown))
        agent.logger.dump(agent.num_timesteps)


def check_groups(agent: LanguageModelAgent, episodes_per_update: int) -> list[int]:
    """See that rollouts consist of whole groups, and say in how many waves they are collected.

    A lane that has finished goes on with the next prompt of its group's stream, ahead of its neighbours. In a wave each lane runs
    one episode, so that all groups are complete and no group is made of those that happened to be short.

    Returns:
        Episodes of each wave. With as many lanes as episodes it is one wave, which is fastest.

    Raises:
        ValueError: The environment has no groups, or they do not fit.
    """
    size, lanes, name = agent.lanes.group_size, agent.lanes.num_envs, type(agent).__name__
    if size < 2:
        raise ValueError(
            f"{name} compares completions of one prompt: expected an environment with group_size >= 2, got {size}. Make it with "
            "gymnasium.make_vec(..., group_size=4)."
        )
    if lanes % size or episodes_per_update % size:
        raise ValueError(
            f"Expected num_envs and episodes_per_update to be multiples of group_size={size}, got {lanes} and {episodes_per_update}."
        )
    waves, rest = divmod(episodes_per_update, lanes)
    return [lanes] * waves + [rest] * (rest > 0)


def _checked_env(env: Any) -> gym.vector.VectorEnv[Any, Any, Any]:
    if isinstance(env, gym.Env):
        raise ValueError(
            "Expected a vector environment, got a single one: make it with gymnasium.make_vec(id, num_envs=...)."
        )
    if not isinstance(env, gym.vector.VectorEnv) or not isinstance(env.unwrapped, TextVectorEnv):
        raise ValueError(
            f"Expected a textenv vector environment (gymnasium.make_vec('textenv/...', num_envs=...)), got {env!r}."
        )
    if env.metadata["autoreset_mode"] is gym.vector.AutoresetMode.DISABLED:
        raise ValueError(
            "Agents need lanes that begin their next episode by themselves, got autoreset_mode DISABLED: make the environment with "
            "autoreset_mode='SAME_STEP' or 'NEXT_STEP'."
        )
    return env


def _as_callback(callback: MaybeCallback) -> BaseCallback:
    if callback is None:
        return CallbackList([])
    if isinstance(callback, list):
        return CallbackList(callback)
    return callback if isinstance(callback, BaseCallback) else ConvertCallback(callback)


def _formats(log_dir: str | Path | None, verbose: int) -> list[str]:
    formats = ["stdout"] if verbose else []
    if log_dir:
        formats.append("csv")
        try:
            import torch.utils.tensorboard  # noqa: F401  # found out by importing it
        except ImportError:
            pass
        else:
            formats.append("tensorboard")
    return formats


__all__ = ["Agent", "AgentConfig", "LanguageModelAgent", "Learning", "check_groups"]
