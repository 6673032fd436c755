"""`TopKActions`: big vocabularies for agents that expect a handful of actions. `VectorTimeLimit`: episodes that end from outside.

    envs = TopKActions(gym.make_vec("textenv/Assistant-v0", num_envs=16, kl="reference"), k=8)
    envs.single_action_space            # Discrete(8): action 0 is the reference's most probable token here, action 1 the next, ...

An agent for a few actions (DQN, or any with a small network) chooses among what the reference itself might say. Nothing else
changes: observations hold tokens, and the KL is that of the k-way distribution that is sampled, to the reference *itself*, not to
what is left of it when its first k tokens are scaled up to 1. So `E[r] - beta KL` is the same objective as without the wrapper, over
fewer policies; and a policy that draws the k tokens in the reference's own proportions has a KL already: `-log` of their mass, for
each token.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.error import InvalidAction
from gymnasium.vector import AutoresetMode, VectorEnv, VectorWrapper
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from textenv.env import INTS, TextEnv, TextVectorEnv
from textenv.kl import PolicyLike


def TopKActions(env: Any, k: int) -> TopKEnv | TopKVectorEnv:
    """Let actions be ranks among the reference's k most probable (allowed) tokens at each state: `Discrete(k)`.

    Args:
        env: A textenv environment, single or vector, wrapped or not.
        k: Between 1 and V.

    Returns:
        The wrapped environment. Its `attach_policy` takes a policy that speaks ranks: `log_probs(observations, ranks)`.

    Raises:
        ValueError: The environment is of another library, or k does not fit.
    """
    if isinstance(getattr(env, "unwrapped", None), TextEnv):
        return TopKEnv(env, k)
    if isinstance(getattr(env, "unwrapped", None), TextVectorEnv):
        return TopKVectorEnv(env, k)
    raise ValueError(f"Expected a textenv environment, got {env!r}.")


class _Ranks:
    """Between ranks and tokens, for the lanes of one environment."""

    def __init__(self, lanes: TextVectorEnv, k: int) -> None:
        if isinstance(k, bool) or not isinstance(k, int | np.integer) or not 1 <= k <= lanes.vocab_size:
            raise ValueError(f"Expected k between 1 and the vocabulary size {lanes.vocab_size}, got {k!r}.")
        self.lanes, self.k = lanes, int(k)

    def tokens(self, observations: INTS) -> INTS:
        """The tokens that ranks stand for. Shape: (N, L) -> (N, k)."""
        lm = self.lanes.reference
        logits = lm.behaviour.logits(lm.next_logits(observations), observations)
        return logits.topk(self.k, dim=-1).indices.cpu().numpy()

    def allowed(self, observations: INTS) -> NDArray[np.bool_]:
        """False where fewer than k tokens are allowed, for the last ranks. Shape: (N, L) -> (N, k)."""
        allowed = self.lanes.behaviour.allowed(observations, self.lanes.vocab_size)
        return np.take_along_axis(allowed, self.tokens(observations), axis=1)

    def chosen(self, actions: Any) -> INTS:
        """The tokens that the lanes' actions stand for. Shape: (N,) -> (N,)."""
        ranks, shape = np.asarray(actions), (self.lanes.num_envs,)
        if ranks.shape != shape or not np.issubdtype(ranks.dtype, np.integer):
            raise InvalidAction(
                f"Expected actions to be {shape[0]} ranks (integers of shape {shape}), got {ranks.dtype} of shape {ranks.shape}."
            )
        active = self.lanes.active
        inside = (ranks >= 0) & (ranks < self.k)
        if (bad := active & ~inside).any():
            lane = int(bad.argmax())
            raise InvalidAction(f"Lane {lane}: expected a rank between 0 and {self.k - 1}, got {ranks[lane]}.")
        ranks = np.where(inside, ranks, 0)
        observations, every = self.lanes.observations, np.arange(len(ranks))
        if self.lanes.behaviour.action_mask is not None:
            allowed = self.allowed(observations)
            if (bad := active & ~allowed[every, ranks]).any():
                lane = int(bad.argmax())
                raise InvalidAction(
                    f"Lane {lane}: only {allowed[lane].sum()} tokens are allowed here, so rank {ranks[lane]} is masked: see action_masks()."
                )
        return self.tokens(observations)[every, ranks]


class InTokens:
    """A policy over ranks, read as one over tokens. Tokens that are not among the k have log-probability `-inf`.

    Args:
        policy: Has `log_probs(observations, ranks)`, and possibly `log_probs_all(observations) -> (N, k)`.
        ranks: Between ranks and tokens.
    """

    def __init__(self, policy: PolicyLike, ranks: _Ranks) -> None:
        self.policy, self.ranks = policy, ranks

    def log_probs(self, observations: INTS, actions: INTS) -> NDArray[np.float64]:
        """Log-probabilities of tokens, in nats. Shapes: (N, L), (N,) -> (N,)."""
        found = self.ranks.tokens(observations) == np.asarray(actions)[:, None]
        log_p = np.asarray(self.policy.log_probs(observations, found.argmax(axis=1)), np.float64)
        return np.where(found.any(axis=1), log_p, -np.inf)

    def log_probs_all(self, observations: INTS) -> NDArray[np.float64]:
        """Log-probabilities of every token, in nats. Shape: (N, L) -> (N, V)."""
        n, k = len(observations), self.ranks.k
        if hasattr(self.policy, "log_probs_all"):
            log_p = np.asarray(self.policy.log_probs_all(observations), np.float64)
        else:
            log_p = np.stack([self.policy.log_probs(observations, np.full(n, rank)) for rank in range(k)], axis=1)
        out = np.full((n, self.ranks.lanes.vocab_size), -np.inf)
        np.put_along_axis(out, self.ranks.tokens(observations), log_p, axis=1)
        return out

    def invalidate(self) -> None:
        """Forget what the policy has cached, where it has a cache."""
        if hasattr(self.policy, "invalidate"):
            self.policy.invalidate()


class TopKVectorEnv(gym.vector.VectorWrapper[INTS, INTS, INTS, INTS, NDArray[Any]]):
    """`TopKActions` of a vector environment."""

    def __init__(self, env: gym.vector.VectorEnv[Any, Any, Any], k: int) -> None:
        super().__init__(env)
        self._ranks = _Ranks(env.unwrapped, k)  # type: ignore[arg-type]  # checked by TopKActions
        self.single_action_space = gym.spaces.Discrete(self._ranks.k)
        self.action_space = batch_space(self.single_action_space, self.num_envs)

    def step(self, actions: INTS) -> tuple[INTS, NDArray[Any], NDArray[Any], NDArray[Any], dict[str, Any]]:
        """Append the token of each lane's rank. Shape: (N,)."""
        return self.env.step(self._ranks.chosen(actions))

    def action_tokens(self) -> INTS:
        """The token that each action stands for at the current observations, the most probable first. Shape: (N, k)."""
        return self._ranks.tokens(self._ranks.lanes.observations)

    def action_masks(self) -> NDArray[np.bool_]:
        """Allowed actions: all k, unless an action mask leaves fewer tokens. Shape: (N, k), True = allowed."""
        return self._ranks.allowed(self._ranks.lanes.observations)

    def attach_policy(self, policy: PolicyLike, pay: bool = True) -> None:
        """Measure, and pay, the KL of a policy over ranks: see `TextVectorEnv.attach_policy`."""
        self._ranks.lanes.attach_policy(self.in_tokens(policy), pay)

    def in_tokens(self, policy: PolicyLike) -> InTokens:
        """A policy over ranks as one over tokens: for `env.unwrapped.evaluate`, say."""
        return InTokens(policy, self._ranks)


class TopKEnv(gym.Wrapper[INTS, np.int64, INTS, np.int64], gym.utils.RecordConstructorArgs):
    """`TopKActions` of a single environment."""

    def __init__(self, env: gym.Env[Any, Any], k: int) -> None:
        gym.utils.RecordConstructorArgs.__init__(self, k=k)
        gym.Wrapper.__init__(self, env)
        self._ranks = _Ranks(env.unwrapped.lanes, k)  # type: ignore[attr-defined]  # checked by TopKActions
        self.action_space = gym.spaces.Discrete(self._ranks.k)

    def step(self, action: np.int64 | int) -> tuple[INTS, Any, bool, bool, dict[str, Any]]:
        """Append the token of this rank."""
        if np.ndim(action) != 0:
            raise InvalidAction(f"Expected the action to be one rank, got {action!r}.")
        return self.env.step(self._ranks.chosen(np.asarray([action]))[0])

    def action_tokens(self) -> INTS:
        """The token that each action stands for, the most probable first. Shape: (k,)."""
        return self._ranks.tokens(self._ranks.lanes.observations)[0]

    def action_masks(self) -> NDArray[np.bool_]:
        """Allowed actions. Shape: (k,), True = allowed."""
        return self._ranks.allowed(self._ranks.lanes.observations)[0]

    def attach_policy(self, policy: PolicyLike, pay: bool = True) -> None:
        """See `TopKVectorEnv.attach_policy`."""
        self._ranks.lanes.attach_policy(self.in_tokens(policy), pay)

    def in_tokens(self, policy: PolicyLike) -> InTokens:
        """See `TopKVectorEnv.in_tokens`."""
        return InTokens(policy, self._ranks)


class VectorTimeLimit(VectorWrapper[Any, Any, Any]):
    """Cuts episodes off after so many tokens: `gymnasium.wrappers.TimeLimit` for SAME_STEP vector environments.

    A token budget belongs to the task (`max_new_tokens`), and reaching it is an end; this is an end from outside, which the
    observation does not show, so it is `truncated`, and whoever values states has to bootstrap there.

    Args:
        env: A vector environment that resets lanes in the step that ends them.
        limit: Tokens.
    """

    def __init__(self, env: VectorEnv[Any, Any, Any], limit: int) -> None:
        super().__init__(env)
        if limit < 1:
            raise ValueError(f"Expected limit >= 1, got {limit}.")
        if env.metadata["autoreset_mode"] is not AutoresetMode.SAME_STEP:
            raise ValueError(f"Expected an environment in SAME_STEP mode, got {env.metadata['autoreset_mode']}.")
        self.limit = limit
        self._elapsed = np.zeros(env.num_envs, np.int64)

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin new episodes."""
        mask = (options or {}).get("reset_mask", np.ones(self.num_envs, bool))
        self._elapsed[mask] = 0
        return self.env.reset(seed=seed, options=options)

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Step, and reset the lanes whose time is up."""
        observations, rewards, terminations, truncations, info = self.env.step(actions)
        self._elapsed += 1
        cut = (self._elapsed >= self.limit) & ~terminations & ~truncations
        self._elapsed[cut | terminations | truncations] = 0
        if cut.any():
            final = info.get("final_obs", np.full(self.num_envs, None, object))
            for lane in np.flatnonzero(cut):
                final[lane] = observations[lane].copy()
            observations, begun = self.env.reset(options={"reset_mask": cut})
            info |= {"final_obs": final, "_final_obs": cut | terminations | truncations}
            for name, values in begun.items():  # of both kinds of lanes that begin anew
                if not name.startswith("_"):
                    info[name] = np.where(begun[f"_{name}"], values, info.get(name, np.zeros_like(values)))
                    info[f"_{name}"] = begun[f"_{name}"] | info.get(f"_{name}", False)
        return observations, rewards, terminations, truncations | cut, info
