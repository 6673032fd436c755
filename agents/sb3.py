"""stable-baselines3 and sb3-contrib, unchanged: our vector environment as theirs, and our language model as their policy.

    from stable_baselines3 import PPO

    envs = gym.make_vec("textenv/Assistant-v0", num_envs=64)
    model = PPO(LMPolicy, as_vec_env(envs), gamma=1.0, n_steps=32, batch_size=256)
    model.learn(30_000)

`PPO`, `A2C`, `TRPO` and `MaskablePPO` take `LMPolicy`; its KL is paid by the environment. Any other policy class of theirs reads
tokens through `TokenEmbedding`, and `as_policy(model)` gives it the `log_probs` that the environment needs to pay its KL.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from numpy.typing import NDArray
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import VecEnv
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PretrainedConfig, PreTrainedModel

from agents.policy import Policy
from textenv.env import TextVectorEnv
from textenv.kl import PolicyLike
from textenv.lm import LanguageModel
from textenv.sampling import FORBIDDEN, Behaviour, draw_scored, entropy, log_prob

INTS = NDArray[np.int64]
Masks = NDArray[np.bool_] | torch.Tensor | None
"""What sb3-contrib passes to a maskable policy: (N, V), True (or 1) = allowed."""

FAR_BELOW = -1e8
"""In place of `-inf` in torch's distributions, whose KL and entropy are nan where a logit is infinite (sb3-contrib's value)."""


# ---------------------------------------------------------------------- the environment


def as_vec_env(envs: Any) -> TextVecEnv:
    """A textenv vector environment (wrapped or not) as stable-baselines3 wants it: one object, no process per lane.

    Args:
        envs: Made with `gymnasium.make_vec`, in its default autoreset mode SAME_STEP.

    Raises:
        ValueError: It is a single environment, of another library, or in another autoreset mode.
    """
    if isinstance(envs, gym.Env):
        raise ValueError(
            "Expected a vector environment, got a single one: make it with gymnasium.make_vec(id, num_envs=...)."
        )
    if not isinstance(envs, gym.vector.VectorEnv) or not isinstance(envs.unwrapped, TextVectorEnv):
        raise ValueError(
            f"Expected a textenv vector environment, got {envs!r}: make it with gymnasium.make_vec(id, num_envs=...), without a "
            "vectorization_mode."
        )
    if envs.metadata["autoreset_mode"] is not AutoresetMode.SAME_STEP:
        raise ValueError(
            f"stable-baselines3 resets on the step that ends an episode, got autoreset_mode {envs.metadata['autoreset_mode'].name}: make "
            "the environment with autoreset_mode='SAME_STEP'."
        )
    return TextVecEnv(envs)


class TextSpace(gym.spaces.Box):
    """The observation space, and the language model that writes in it: a policy of stable-baselines3 is given spaces only.

    Pickled (by `model.save`), it keeps the network's architecture and lets go of the environment: the weights are in the checkpoint.

    Args:
        vocab_size: V.
        max_tokens: L.
        source: The environment's adapter; or, unpickled, what `LanguageModel` is made of.
    """

    def __init__(
        self,
        vocab_size: int,
        max_tokens: int,
        source: TextVecEnv | tuple[type[PreTrainedModel], PretrainedConfig, Behaviour],
    ) -> None:
        super().__init__(0, vocab_size, (max_tokens,), np.int64)
        self.vocab_size, self.max_tokens, self.source = vocab_size, max_tokens, source

    @property
    def env(self) -> TextVecEnv | None:
        """The environment, where this space still belongs to one."""
        return self.source if isinstance(self.source, TextVecEnv) else None

    @property
    def behaviour(self) -> Behaviour:
        """Temperature and action mask of the environment."""
        return self.source.lanes.behaviour if isinstance(self.source, TextVecEnv) else self.source[2]

    def reference(self) -> LanguageModel:
        """What a policy starts from: the environment's reference model, or, unpickled, one of its architecture."""
        if isinstance(self.source, TextVecEnv):
            return self.source.lanes.reference
        model, config, behaviour = self.source
        return LanguageModel(model(config), self.max_tokens, behaviour)

    def __reduce__(self) -> tuple[Any, ...]:
        source = self.source
        if isinstance(source, TextVecEnv):
            lm = source.lanes.reference
            source = type(lm.model), lm.model.config, self.behaviour
        return TextSpace, (self.vocab_size, self.max_tokens, source)


class TextVecEnv(VecEnv):
    """stable-baselines3's vector environment over ours. Made by `as_vec_env`.

    Lanes share one environment, so `env_method` calls a method once for all of them, and what it returns is dealt out if it
    has an entry for each lane (`action_masks`, `render`) and repeated if not. Where an episode ends, its info holds what ours says
    in `final_info` (`task_reward`, `kl`, `finish_reason`, `reward/...`) and what `Monitor` says in `episode`, unrounded.

    Attributes:
        envs: The Gymnasium vector environment, wrappers included.
        lanes: The `TextVectorEnv` inside it.
    """

    def __init__(self, envs: gym.vector.VectorEnv[Any, Any, Any]) -> None:
        self.envs = envs
        self.lanes: TextVectorEnv = envs.unwrapped  # type: ignore[assignment]
        space = TextSpace(self.lanes.vocab_size, self.lanes.max_tokens, self)
        super().__init__(envs.num_envs, space, envs.single_action_space)
        self._shown: INTS | None = None
        self._actions = np.zeros(self.num_envs, np.int64)
        self._returns, self._lengths = np.zeros(self.num_envs), np.zeros(self.num_envs, np.int64)
        self._start = time.time()

    def reset(self) -> INTS:
        """Begin new episodes, with the seeds and options that `seed` and `set_options` have left. Shape: (N, L)."""
        seeds: Any = self._seeds if any(seed is not None for seed in self._seeds) else None
        observations, infos = self.envs.reset(seed=seeds, options=_merged(self._options))
        self._reset_seeds()
        self._reset_options()
        self.reset_infos = [_of_lane(infos, lane) for lane in range(self.num_envs)]
        self._returns[:], self._lengths[:] = 0, 0
        self._shown = observations
        return observations.copy()

    def step_async(self, actions: INTS) -> None:
        """Take note of the actions, and of whose they are. Shape: (N,)."""
        self._actions = np.asarray(actions)
        self._attach_actor()

    def step_wait(self) -> tuple[INTS, NDArray[np.float32], NDArray[np.bool_], list[dict[str, Any]]]:
        """Step: observations (N, L), rewards (N,) in float32 as theirs are, dones (N,), and an info for each lane."""
        observations, rewards, terminations, truncations, infos = self.envs.step(self._actions)
        dones = terminations | truncations
        self._returns += rewards
        self._lengths += 1
        lane_infos: list[dict[str, Any]] = []
        for lane in range(self.num_envs):
            info = _of_lane(infos, lane)
            if dones[lane]:
                terminal, final = info.pop("final_obs"), info.pop("final_info", {})  # cut by a wrapper, none
                self.reset_infos[lane], info = info, final
                info["terminal_observation"] = terminal
                info["episode"] = {
                    "r": float(self._returns[lane]),
                    "l": int(self._lengths[lane]),
                    "t": time.time() - self._start,
                }
            info["TimeLimit.truncated"] = bool(truncations[lane] and not terminations[lane])
            lane_infos.append(info)
        self._returns[dones], self._lengths[dones] = 0, 0
        self._shown = observations
        return observations.copy(), rewards.astype(np.float32), dones, lane_infos

    def attach_policy(self, policy: PolicyLike, pay: bool = True) -> None:
        """Have the environment pay (or only measure) this policy's KL. It speaks the actions of this environment's action space."""
        self._find("attach_policy")(policy, pay=pay)

    def _attach_actor(self) -> None:
        """Have the `LMPolicy` that drew these actions pay for them: after `load` and `set_env` nobody else tells who acts here.

        Where several drew the same, none is guessed at; what the user has attached stays.
        """
        attached = self.lanes.kl.policy
        if self._shown is None or not isinstance(attached, LMPolicy | None):
            return
        actors = [policy for policy in _POLICIES if policy.writer.drew(self._shown, self._actions)]
        if len(actors) == 1 and actors[0] is not attached:
            self.lanes.kl.attach(actors[0])

    def close(self) -> None:
        """Close the environment."""
        self.envs.close()

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """An attribute, of the outermost wrapper that has it; repeated, for the lanes share it."""
        value = self._find(attr_name)
        return [value for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Set an attribute where it is, or on the outermost wrapper if it is nowhere."""
        if sorted(self._get_indices(indices)) != list(range(self.num_envs)):
            raise ValueError(f"The lanes share one environment: {attr_name!r} can be set for all of them only.")
        owner = next((layer for layer in self._layers() if hasattr(layer, attr_name)), self.envs)
        setattr(owner, attr_name, value)

    def env_method(self, method_name: str, *method_args: Any, indices: Any = None, **method_kwargs: Any) -> list[Any]:
        """Call a method once; see the class."""
        result = self._find(method_name)(*method_args, **method_kwargs)
        dealt = isinstance(result, tuple | list | np.ndarray) and len(result) == self.num_envs
        return [result[lane] if dealt else result for lane in self._get_indices(indices)]

    def env_is_wrapped(self, wrapper_class: type, indices: Any = None) -> list[bool]:
        """Whether a wrapper of this class is there. `Monitor` counts as there: its `episode` is in the infos."""
        found = wrapper_class is Monitor or any(isinstance(layer, wrapper_class) for layer in self._layers())
        return [found for _ in self._get_indices(indices)]

    def _layers(self) -> Iterator[gym.vector.VectorEnv[Any, Any, Any]]:
        layer = self.envs
        while isinstance(layer, gym.vector.VectorWrapper):
            yield layer
            layer = layer.env
        yield layer

    def _find(self, name: str) -> Any:
        for layer in self._layers():
            if hasattr(layer, name):
                return getattr(layer, name)
        raise AttributeError(f"{self.envs} has no attribute {name!r}")


def _of_lane(infos: dict[str, Any], lane: int) -> dict[str, Any]:
    """One lane's part of Gymnasium's vector info, as plain values."""
    out: dict[str, Any] = {}
    for name, values in infos.items():
        if not name.startswith("_") and infos[f"_{name}"][lane]:
            value = _of_lane(values, lane) if isinstance(values, dict) else values[lane]
            out[name] = value.item() if isinstance(value, np.generic) else value
    return out


def _merged(options: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Options of each lane as one dict of arrays."""
    names = options[0].keys()
    if any(lane.keys() != names for lane in options):
        raise ValueError(
            f"The lanes are reset together: expected the same options for each, got {[sorted(o) for o in options]}."
        )
    return {name: np.array([lane[name] for lane in options]) for name in names} or None


# ---------------------------------------------------------------------- the policy


class LMPolicy(ActorCriticPolicy):
    """The language model as a policy of stable-baselines3: `PPO(LMPolicy, as_vec_env(envs))`.

    It starts as the environment's reference model, with a value head of zeros on its last hidden state, and is attached to the
    environment, which pays its KL. Rollouts run on the key/value cache. Temperature and action mask are the environment's, in
    rollouts, evaluation and `predict` alike; dropout is off. sb3-contrib's `MaskablePPO` takes the same class: the environment's own
    mask is applied anyway, and masks that `MaskablePPO` passes on top.

    Two of stable-baselines3's defaults do not suit text. `gamma=0.99` is another objective than the one that is scored
    here (a response of 30 tokens would lose a quarter of its reward): pass `gamma=1.0`. And `n_steps=2048` is per lane.
    An update re-encodes the prefix of every single token, as minibatches are random; our own agents update on whole responses.

    Args:
        observation_space: Of `as_vec_env`.
        action_space: `Discrete(V)`.
        lr_schedule: Gives the optimiser's first step size.
        use_sde: Must be False: state-dependent exploration is for continuous actions.
        top_k: Act by the k most probable tokens only, scored under the same truncation.
        top_p: Act by the smallest set of tokens of this probability only, scored under the same truncation.
        optimizer_class: Of the optimiser.
        optimizer_kwargs: Of the optimiser.

    Raises:
        ValueError: The spaces are not those of `as_vec_env`, or the environment leaves a part of the KL to the agent.
    """

    observation_space: TextSpace

    def __init__(
        self,
        observation_space: gym.Space[Any],
        action_space: gym.Space[Any],
        lr_schedule: Callable[[float], float],
        use_sde: bool = False,
        *,
        top_k: int | None = None,
        top_p: float | None = None,
        optimizer_class: type[torch.optim.Optimizer] = torch.optim.Adam,
        optimizer_kwargs: dict[str, Any] | None = None,
    ) -> None:
        if not isinstance(observation_space, TextSpace):
            raise ValueError(
                f"LMPolicy finds its language model through the observation space, got {observation_space}: make the environment with "
                "agents.sb3.as_vec_env(envs), and leave observations as they are."
            )
        if action_space != gym.spaces.Discrete(observation_space.vocab_size):
            raise ValueError(
                f"LMPolicy writes tokens: expected the action space Discrete({observation_space.vocab_size}), got {action_space}. For fewer "
                "tokens pass policy_kwargs={'top_k': ...} instead of wrapping the environment in TopKActions."
            )
        self.top_k, self.top_p = top_k, top_p
        super().__init__(
            observation_space,
            action_space,
            lr_schedule,
            net_arch=[],
            ortho_init=False,  # it would draw every Linear layer anew, those of the language model too
            use_sde=use_sde,
            optimizer_class=optimizer_class,
            optimizer_kwargs=optimizer_kwargs,
        )

    def _build(self, lr_schedule: Callable[[float], float]) -> None:
        self.writer = Policy(self.observation_space.reference(), self.top_k, self.top_p)
        self.language_model = self.writer.model  # so that its weights are this module's; the reference's are not
        width = self.language_model.get_output_embeddings().weight.shape[1]
        self.value_net = nn.Linear(width, 1)  # TRPO tells the critic's parameters by the word "value"
        nn.init.zeros_(self.value_net.weight)
        nn.init.zeros_(self.value_net.bias)
        self.optimizer = self.optimizer_class(self.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs)
        _POLICIES.add(self)
        if self.observation_space.env is not None:
            self._attach_to(self.observation_space.env)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {
            "observation_space": self.observation_space,
            "action_space": self.action_space,
            "lr_schedule": self._dummy_schedule,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "optimizer_class": self.optimizer_class,
            "optimizer_kwargs": self.optimizer_kwargs,
        }

    # ------------------------------------------------------------------ acting

    @torch.no_grad()
    def forward(
        self, obs: torch.Tensor, deterministic: bool = False, action_masks: Masks = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One step of a rollout. Shapes: (N, L) -> actions (N,), values (N, 1), log-probabilities (N,) in nats."""
        observations = _tokens(obs)
        actions, log_probs = self._act(observations, deterministic, action_masks)
        return actions, self.value_net(self.writer.lm.next_hidden(observations).float()), log_probs

    def _act(self, observations: INTS, deterministic: bool, action_masks: Masks) -> tuple[torch.Tensor, torch.Tensor]:
        logits = _masked(self.writer.next_logits(observations), action_masks)
        if deterministic:
            actions = logits.argmax(dim=-1)
            log_probs = log_prob(logits, actions)
        else:  # uniforms from torch's generator, which model.set_random_seed seeds
            actions, log_probs = draw_scored(logits, torch.rand(len(observations), dtype=torch.float64).numpy())
        self.writer.remember(observations, actions.cpu().numpy(), log_probs.double().cpu().numpy())
        return actions, log_probs

    def _predict(
        self, observation: torch.Tensor, deterministic: bool = False, action_masks: Masks = None
    ) -> torch.Tensor:
        actions, _ = self._act(_tokens(observation), deterministic, action_masks)
        return actions

    @torch.no_grad()
    def predict(
        self,
        observation: Any,
        state: Any = None,
        episode_start: Any = None,
        deterministic: bool = False,
        action_masks: Masks = None,
    ) -> tuple[Any, Any]:
        """Tokens for observations. Shape: (N, L) -> (N,), or (L,) -> ()."""
        tensor, vectorized = self.obs_to_tensor(observation)
        actions = self._predict(tensor, deterministic, action_masks).cpu().numpy()
        return (actions if vectorized else actions[0]), state

    def log_probs(self, observations: INTS, actions: INTS) -> NDArray[np.float64]:
        """Log-probabilities of `actions`, in nats; of what was just drawn, those it was drawn with. Shapes: (N, L), (N,) -> (N,)."""
        return self.writer.log_probs(observations, actions)

    def log_probs_all(self, observations: INTS) -> NDArray[np.float64]:
        """Log-probabilities of every token, in nats. Shape: (N, L) -> (N, V)."""
        return self.writer.log_probs_all(observations)

    def invalidate(self) -> None:
        """Forget cached computations: the weights have changed."""
        self.writer.invalidate()

    # ------------------------------------------------------------------ learning

    def evaluate_actions(
        self, obs: torch.Tensor, actions: torch.Tensor, action_masks: Masks = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Score single tokens after their prefixes. Differentiable.

        Returns:
            Values (B, 1), log-probabilities (B,), entropies (B,), both in nats.
        """
        hidden, logits = self._encode(obs, action_masks)
        return self.value_net(hidden.float()), log_prob(logits, actions.long()), entropy(logits)

    def get_distribution(self, obs: torch.Tensor, action_masks: Masks = None) -> Distribution:
        """The distribution over tokens. Differentiable twice, as TRPO needs it, which the fused attention kernels are not."""
        with sdpa_kernel(SDPBackend.MATH):
            _, logits = self._encode(obs, action_masks)
        return self.action_dist.proba_distribution(action_logits=logits.clamp(min=FAR_BELOW))

    def predict_values(self, obs: torch.Tensor) -> torch.Tensor:
        """Values of states. Shape: (N, L) -> (N, 1). Differentiable; without gradient it runs on the cache."""
        lm, observations = self.writer.lm, _tokens(obs)
        hidden = lm.last_hidden(observations) if torch.is_grad_enabled() else lm.next_hidden(observations)
        return self.value_net(hidden.float())

    def _encode(self, obs: torch.Tensor, action_masks: Masks) -> tuple[torch.Tensor, torch.Tensor]:
        """Last hidden states (B, d) and the distribution's logits (B, V), one teacher-forced pass per row."""
        lm, observations = self.writer.lm, _tokens(obs)
        hidden = lm.last_hidden(observations)
        return hidden, _masked(lm.behaviour.logits(lm.head(hidden), observations), action_masks)

    def train(self, mode: bool = True) -> LMPolicy:
        """Stay in eval mode, whatever is asked: with dropout the ratio of the first minibatch would not be 1.

        stable-baselines3 asks for training mode before each update and for eval mode after it, so caches are emptied here.
        """
        if mode:
            self.invalidate()
        return super().train(False)

    def _attach_to(self, env: TextVecEnv) -> None:
        """Have the environment pay this policy's KL, unless the user has attached something of their own."""
        if env.lanes.kl.kind == "reference":
            raise ValueError(
                "kl='reference' leaves -beta log pi(a|s) to the agent, and stable-baselines3's agents do not add it: make the environment "
                "with kl='policy' (the default)."
            )
        if isinstance(env.lanes.kl.policy, LMPolicy | None):
            env.attach_policy(self)


_POLICIES: weakref.WeakSet[LMPolicy] = weakref.WeakSet()
"""Those in use, for an environment to find the one that acts in it."""


def _tokens(obs: torch.Tensor) -> INTS:
    if obs.is_floating_point():
        raise ValueError(
            f"LMPolicy reads token ids, got observations of {obs.dtype}: leave them as they are (VecNormalize with norm_obs=False)."
        )
    return obs.cpu().numpy()


def _masked(logits: torch.Tensor, action_masks: Masks) -> torch.Tensor:
    if action_masks is None:
        return logits
    allowed = torch.as_tensor(action_masks, device=logits.device).bool().reshape(logits.shape)
    return logits.masked_fill(~allowed, FORBIDDEN)


try:
    from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
except ImportError:  # an optional extra
    pass
else:
    MaskableActorCriticPolicy.register(LMPolicy)  # MaskablePPO asks for this class; LMPolicy has all its methods


# ---------------------------------------------------------------------- policies of their own


class TokenEmbedding(BaseFeaturesExtractor):
    """Reads token ids for policies that know nothing of text: an embedding for each place, side by side.

    For `policy_kwargs={"features_extractor_class": TokenEmbedding}`. Without it ids would go into a linear layer as numbers.

    Args:
        observation_space: `Box(0, V, (L,), int64)`.
        embedding_dim: Features per token.
    """

    def __init__(self, observation_space: gym.spaces.Box, embedding_dim: int = 16) -> None:
        super().__init__(observation_space, observation_space.shape[0] * embedding_dim)
        self.embedding = nn.Embedding(int(observation_space.high.max()) + 1, embedding_dim)  # V is the padding

    def forward(self, observations: torch.Tensor) -> torch.Tensor:
        """Shape: (N, L) -> (N, L * embedding_dim)."""
        return self.embedding(observations.long()).flatten(start_dim=1)


def as_policy(model: Any) -> Any:
    """The `log_probs` of a stable-baselines3 model: for `attach_policy`, and for `textenv/Tree-v0`'s `evaluate`.

    Args:
        model: With `LMPolicy`, its policy is all that is needed. Of another actor-critic policy it is the distribution that is
            sampled; of a value-based agent (`DQN`) the greedy choice, with log-probability 0, and `-inf` for all else.

    Example:
        >>> model = PPO("MlpPolicy", as_vec_env(envs), policy_kwargs={"features_extractor_class": TokenEmbedding})
        >>> model.get_env().attach_policy(as_policy(model))
    """
    return model.policy if isinstance(model.policy, LMPolicy) else ModelPolicy(model)


class ModelPolicy:
    """What `as_policy` returns."""

    def __init__(self, model: Any) -> None:
        self.model = model

    @torch.no_grad()
    def log_probs_all(self, observations: INTS) -> NDArray[np.float64]:
        """Log-probabilities of every action, in nats. Shape: (N, L) -> (N, A)."""
        policy, count = self.model.policy, int(self.model.action_space.n)
        tensor, _ = policy.obs_to_tensor(observations)
        if not hasattr(policy, "get_distribution"):
            greedy = policy._predict(tensor, deterministic=True).cpu().numpy()
            return np.where(np.arange(count) == greedy[:, None], 0.0, FORBIDDEN)
        distribution = policy.get_distribution(tensor)
        if hasattr(distribution, "apply_masking"):  # MaskablePPO's: it samples under the environment's mask
            distribution.apply_masking(self._allowed(observations, count))
        return distribution.distribution.logits.double().log_softmax(dim=-1).cpu().numpy()

    def _allowed(self, observations: INTS, count: int) -> Masks:
        space = self.model.observation_space
        if space.behaviour.action_mask is None:
            return None
        if count != space.vocab_size:
            raise ValueError(
                "The log-probabilities of a maskable policy cannot be known under an action_mask and TopKActions together: use one of them."
            )
        return space.behaviour.allowed(observations, count)

    def log_probs(self, observations: INTS, actions: INTS) -> NDArray[np.float64]:
        """Log-probabilities of `actions`, in nats. Shapes: (N, L), (N,) -> (N,)."""
        return self.log_probs_all(observations)[np.arange(len(actions)), actions]
