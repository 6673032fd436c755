"""The token-level Markov decision process: one batched implementation, and its one-lane view.

Observation   `Box(0, V, (L,), int64)`: prompt, then response, right-padded with V, an id that no action can produce.
Action        `Discrete(V)`: the next token.
Reward        0, or the KL penalty, at each transition; plus the task reward on the one that ends the episode.
End           a stop token or the token budget. Both are `terminated`: the budget can be read off the observation, so it
              is part of the task, and there is nothing left to bootstrap from. `truncated` is left to wrappers.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.error import InvalidAction, ResetNeeded
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from rewards import Batch, BoundReward, Scores, bind
from textenv.kl import AdaptiveKL, Controller, KLPenalty, PolicyLike
from textenv.ledger import Episodes, Ledger
from textenv.lm import LanguageModel
from textenv.prompts import PromptStream
from textenv.render import outcome_text, render_episode
from textenv.sampling import ActionMask, Behaviour
from textenv.task import Task

INTS = NDArray[np.int64]
RENDER_MODES = ["ansi", "human"]
REASONS = np.array(["length", "stop"], object)


class TextVectorEnv(gym.vector.VectorEnv[INTS, INTS, NDArray[Any]]):
    """N lanes of language generation, stepped together.

    Args:
        num_envs: N.
        task: Model, prompts, reward and budgets.
        beta: KL coefficient in reward per nat, or `FixedKL` / `AdaptiveKL`. Fixed per episode when it starts.
        kl: Whose KL is paid: see `KLPenalty`.
        group_size: G neighbouring lanes share a prompt stream (for RLOO, GRPO, best-of-n); with fewer lanes than G, each
            lane gives a prompt out for G / N consecutive episodes. N % G or G % N must be 0.
        autoreset_mode: SAME_STEP (default), NEXT_STEP or DISABLED; the enum, its value or its name.
        render_mode: `"ansi"` (render() returns text), `"human"` (tokens are printed as they come) or None.
        temperature: Of policy and reference alike.
        action_mask: Allowed tokens, of policy and reference alike: (V,) bool, or a function (N, L) -> (N, V).
        max_episode_steps: Not supported; here to be refused with a reason.

    Raises:
        ValueError: Keywords that do not fit together.
    """

    metadata: dict[str, Any] = {  # noqa: RUF012  # Gymnasium declares it as an instance attribute
        "render_modes": RENDER_MODES,
        "render_fps": 8,
        "autoreset_mode": AutoresetMode.SAME_STEP,
    }

    def __init__(
        self,
        num_envs: int,
        task: Task,
        *,
        beta: float | Controller = 0.05,
        kl: str = "policy",
        group_size: int = 1,
        autoreset_mode: AutoresetMode | str = AutoresetMode.SAME_STEP,
        render_mode: str | None = None,
        temperature: float = 1.0,
        action_mask: ActionMask | None = None,
        max_episode_steps: int | None = None,
    ) -> None:
        if max_episode_steps is not None:
            raise ValueError(
                "max_episode_steps is not supported by the vector environment: the token budget is max_new_tokens, and reaching it terminates "
                "the episode. For a time limit on top, use gymnasium.make(..., max_episode_steps=...)."
            )
        if num_envs < 1:
            raise ValueError(f"Expected num_envs >= 1, got {num_envs}.")
        if group_size < 1 or (num_envs % group_size and group_size % num_envs):
            raise ValueError(
                f"group_size={group_size} does not fit num_envs={num_envs}: one must be a multiple of the other, so that groups fill up."
            )
        if render_mode is not None and render_mode not in RENDER_MODES:
            hint = " stable-baselines3 asks for it where it makes environments from an id: pass them made."
            raise ValueError(
                f"Expected render_mode to be one of {RENDER_MODES} or None, got {render_mode!r}."
                + (hint if render_mode == "rgb_array" else "")
            )
        self.task, self.render_mode = task, render_mode
        self.num_envs, self.group_size = num_envs, group_size
        self.vocab_size = task.vocab_size
        self.max_tokens = task.max_prompt_tokens + task.max_new_tokens
        self.autoreset_mode = autoreset(autoreset_mode)
        self.metadata = {**type(self).metadata, "autoreset_mode": self.autoreset_mode}
        self.behaviour = Behaviour(temperature=temperature, action_mask=_frozen_mask(action_mask, self.vocab_size))
        self.reference = LanguageModel(task.model, self.max_tokens, self.behaviour)
        self.kl = KLPenalty(beta, kl)
        self.reward: BoundReward | None = None if task.reward is None else bind(task.reward, task.prompts.columns)

        self.single_observation_space = gym.spaces.Box(0, self.vocab_size, (self.max_tokens,), np.int64)
        self.single_action_space = gym.spaces.Discrete(self.vocab_size)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

        n = num_envs
        self._rngs: list[np.random.Generator | None] = [None] * n
        self._streams = self._new_streams()
        self._tokens = np.full((n, self.max_tokens), self.vocab_size, np.int64)
        self._prompt_length = np.zeros(n, np.int64)
        self._length = np.zeros(n, np.int64)
        self._prompt_id = np.zeros(n, np.int64)
        self._group_id = np.full(n, -1, np.int64)
        self._beta = np.zeros(n)
        self._kl = np.zeros(n)
        self._ref_log_prob = np.zeros(n)
        self._token_rewards = np.zeros((n, task.max_new_tokens))  # for render()
        self._outcomes = [""] * n  # for render(): what the reward said of the lane's episode, once it has ended
        self._done = np.ones(n, bool)  # before the first reset every lane needs one
        self._was_reset = np.zeros(n, bool)
        self._steps = 0
        self._ledger: Ledger | None = None
        self._warned = False
        self.closed = False

    # ------------------------------------------------------------------ what agents use beside reset and step

    def attach_policy(self, policy: PolicyLike, pay: bool = True) -> None:
        """Measure `log pi` of this policy at each step, and pay the KL penalty for it.

        Args:
            policy: Has `log_probs(observations: (N, L) int64, actions: (N,) int64) -> (N,)`, of the distribution that
                is sampled. For N of any size, without effect on later calls.
            pay: False where the agent has the KL in its loss, or nowhere: `info["kl"]` is reported all the same.
        """
        self.kl.attach(policy, pay)
        self.reference.invalidate()
        if hasattr(policy, "invalidate"):
            policy.invalidate()

    def deferred(self, episodes: int) -> Ledger:
        """A block in which the same loop runs, and scoring waits for its end: see `textenv.ledger`."""
        return Ledger(self, episodes)

    def action_masks(self) -> NDArray[np.bool_]:
        """Allowed tokens at the current observations, computed on call. Shape: (N, V), True = allowed."""
        return self.behaviour.allowed(self._tokens, self.vocab_size)

    @property
    def observations(self) -> INTS:
        """What the lanes show now. Shape: (N, L)."""
        return self._tokens.copy()

    @property
    def active(self) -> NDArray[np.bool_]:
        """Whose episode goes on; the actions of the other lanes are ignored. Shape: (N,)."""
        return ~self._done

    @property
    def tokenizer(self) -> Any:
        """The task's tokenizer."""
        return self.task.tokenizer

    def completions(self, episodes: Episodes) -> list[str]:
        """The responses as the reward sees them: decoded, without special tokens."""
        return [
            self.tokenizer.decode(row[m : m + n], skip_special_tokens=True)
            for row, m, n in zip(episodes.tokens, episodes.prompt_length, episodes.response_length, strict=True)
        ]

    @property
    def demonstrations(self) -> list[tuple[INTS, INTS]]:
        """(prompt tokens, demonstrated response tokens) of this split, for imitation.

        Raises:
            ValueError: The prompts have no `demonstration` column.
        """
        prompts = self.task.prompts
        if prompts.demonstrations is None:
            raise ValueError(
                f"These prompts have no `demonstration` column, only {list(prompts.columns) or 'prompts'}."
            )
        pairs = zip(prompts.token_ids, prompts.demonstrations, strict=True)
        return [(prompt, response) for prompt, response in pairs if response is not None]

    @property
    def needs_reference(self) -> bool:
        """Whether the reference model is run: to pay or to report the KL."""
        return self.kl.policy is not None or self.kl.kind == "reference"

    @property  # type: ignore[misc]  # read only, as SyncVectorEnv's
    def np_random(self) -> tuple[np.random.Generator, ...]:  # type: ignore[override]  # one per lane
        """The lanes' generators. Lane i of `reset(seed=s)` has that of a single environment with seed s + i."""
        return tuple(self._rng(lane) for lane in range(self.num_envs))

    # ------------------------------------------------------------------ reset

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[INTS, dict[str, Any]]:
        """Begin new episodes.

        Args:
            seed: Lane i gets seed + i, or the i-th of a sequence; None goes on with the generators as they are.
            options: `reset_mask`: (N,) bool, the lanes to reset (all). `prompt_id`: an int or (N,) ints, prompts to begin
                with instead of drawn ones.

        Returns:
            Observations, shape (N, L), and infos with `prompt_id` (and `group_id`).
        """
        mask = self._reset_mask(options)
        seeds = self._seeds(seed)
        chosen = self._chosen_prompts(options)
        for lane, value in enumerate(seeds):
            if value is not None and mask[lane]:
                self._rngs[lane], _ = seeding.np_random(value)
        if mask.all():
            if all(value is not None for value in seeds):
                self._streams = self._new_streams()
            elif "reset_mask" not in (options or {}):  # lanes that a mask names only go on, be they all of them
                for stream in self._streams:
                    stream.align()
            if self._ledger is not None:
                self._ledger.clear()
        self._begin(np.flatnonzero(mask), chosen)
        if self.render_mode == "human":
            self._print(np.flatnonzero(mask))
        self._await()
        return self._tokens.copy(), self._start_info(mask & ~self._done)

    def _begin(self, lanes: INTS, chosen: INTS | None = None) -> None:
        """Put each lane at the start of an episode, or leave it idle when a deferred block has started all it wants."""
        if self._ledger is not None:
            lanes, idle = np.split(lanes, [self._ledger.size - self._ledger.started])
        if len(lanes):
            if chosen is None:
                self._prompt_id[lanes], self._group_id[lanes] = np.transpose(
                    [self._draw(lane) for lane in lanes.tolist()]
                )
            else:
                self._prompt_id[lanes], self._group_id[lanes] = chosen[lanes], -1
            self._tokens[lanes] = self.vocab_size
            for lane, prompt_id in zip(lanes.tolist(), self._prompt_id[lanes].tolist(), strict=True):
                prompt = self.task.prompts.token_ids[prompt_id]
                self._tokens[lane, : len(prompt)] = prompt
                self._length[lane], self._outcomes[lane] = len(prompt), ""
            self._prompt_length[lanes] = self._length[lanes]
            self._beta[lanes] = self.kl.beta
            self._kl[lanes] = self._ref_log_prob[lanes] = 0.0
            self._token_rewards[lanes] = 0.0
            self._done[lanes], self._was_reset[lanes] = False, True
        if self._ledger is not None:
            self._start_in_ledger(lanes)
            never = idle[self._length[idle] == 0]  # policies are asked about all lanes, so these show lane 0's prompt
            self._tokens[never], self._length[never] = self._tokens[0], self._length[0]

    def _start_in_ledger(self, lanes: INTS) -> None:
        assert self._ledger is not None
        self._ledger.start(
            lanes, self._prompt_id[lanes], self._group_id[lanes], self._prompt_length[lanes], self._beta[lanes]
        )

    def _draw(self, lane: int) -> tuple[int, int]:
        group, member = divmod(lane, min(self.group_size, self.num_envs))
        first = lane - member
        prompt_id, place = self._streams[group].take(member, len(self.task.prompts), self._rng(first))
        return prompt_id, place * len(self._streams) + group if self.group_size > 1 else -1

    def _new_streams(self) -> list[PromptStream]:
        lanes = min(self.group_size, self.num_envs)
        repeats = max(1, self.group_size // self.num_envs)
        return [PromptStream(np.zeros(lanes, np.int64), repeats) for _ in range(self.num_envs // lanes)]

    def _rng(self, lane: int) -> np.random.Generator:
        generator = self._rngs[lane]
        if generator is None:
            generator = self._rngs[lane] = seeding.np_random()[0]
        return generator

    # ------------------------------------------------------------------ step

    def step(
        self, actions: INTS
    ) -> tuple[INTS, NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]]:
        """Append one token to each lane.

        Args:
            actions: Token ids. Shape: (N,). Ignored for lanes that this step resets (NEXT_STEP), or that a deferred block
                leaves idle.

        Returns:
            Observations (N, L), rewards (N,), terminations (N,), truncations (N,; never True), infos.

        Raises:
            ResetNeeded: A lane is not in an episode.
            InvalidAction: An action is no token id, or is masked.
        """
        idle = self._ledger is not None and self._ledger.full
        waiting = (
            self._done & self._was_reset
            if self.autoreset_mode is AutoresetMode.NEXT_STEP
            else np.zeros(self.num_envs, bool)
        )
        active = ~self._done
        if not idle and (lost := ~(active | waiting)).any():
            self._refuse_step(lost)
        actions = self._checked(actions, active)
        lanes = np.flatnonzero(active)
        place = (self._length - self._prompt_length)[lanes]
        rewards = np.zeros(self.num_envs)
        rewards[lanes] += self._kl_step(lanes, place, actions)

        self._tokens[lanes, self._length[lanes]] = actions[lanes]
        self._length[lanes] += 1
        self._steps += len(lanes)
        stopped = active & (actions[:, None] == np.array(self.task.stop_tokens, np.int64)).any(axis=1)
        ended = active & (stopped | (self._length - self._prompt_length == self.task.max_new_tokens))
        reasons = REASONS[stopped.astype(np.intp)]
        finished = np.flatnonzero(ended)
        infos: dict[str, Any] = {}
        if self._ledger is not None:
            rewards[:] = np.nan  # nobody may use by mistake what is not known yet
            end = self._end_info(ended, {"finish_reason": reasons})
            if len(finished):
                response = (self._length - self._prompt_length)[finished]
                self._ledger.finish(finished, self._tokens[finished], response, reasons[finished])
        else:
            end = self._settle(ended, finished, reasons, rewards)
            self._token_rewards[lanes, place] = rewards[lanes]
        self._done |= ended
        if self.render_mode == "human":
            self._print(lanes)

        if self.autoreset_mode is AutoresetMode.SAME_STEP:
            if len(finished):
                final_obs = np.full(self.num_envs, None, object)
                for lane in finished:
                    final_obs[lane] = self._tokens[lane].copy()
                infos |= {
                    "final_obs": final_obs,
                    "_final_obs": ended.copy(),
                    "final_info": end,
                    "_final_info": ended.copy(),
                }
                self._begin(finished)
                infos |= self._start_info(ended & ~self._done)
        else:
            infos |= end
            if waiting.any():
                self._begin(np.flatnonzero(waiting))
                infos |= _merge(infos, self._start_info(waiting & ~self._done))
        self._await()
        return self._tokens.copy(), rewards, ended, np.zeros(self.num_envs, bool), infos

    def _await(self) -> None:
        """Say what the reference will be asked at the next step, if it will be."""
        self.reference.awaited = self._tokens if self.needs_reference and self._ledger is None else None

    def _kl_step(self, lanes: INTS, place: INTS, actions: INTS) -> NDArray[np.float64] | float:
        """Measure and pay the KL of these lanes' actions."""
        if self.kl.policy is None and self.kl.kind == "policy":
            if self.kl.beta > 0 and not self._warned:
                gym.logger.warn(
                    f"The KL penalty (beta={self.kl.beta}) is off: no policy is attached, so log pi is unknown. Attach one with "
                    "env.unwrapped.attach_policy(policy), pay log pi_ref alone with kl='reference', or make the environment with beta=0."
                )
                self._warned = True
            return 0.0
        log_prob = None
        if self.kl.policy is not None:
            log_prob = self.kl.log_probs(self._tokens.copy(), actions, lanes)
            if self._ledger is not None:
                self._ledger.record(lanes, place, log_prob)
        if self._ledger is not None:
            return 0.0  # the reference is asked when the block is settled
        ref = self.reference.log_probs(self._tokens, actions)[lanes]
        self._ref_log_prob[lanes] += ref
        log_ratio = None if log_prob is None else log_prob - ref
        if log_ratio is not None:
            self._kl[lanes] += log_ratio
        return self.kl.paid(self._beta[lanes], log_ratio, ref)

    def _settle(
        self,
        ended: NDArray[np.bool_],
        finished: INTS,
        reasons: NDArray[np.object_],
        rewards: NDArray[np.float64],
    ) -> dict[str, Any]:
        """Score the episodes that have just ended, add their task reward, and say so in the info."""
        if not len(finished):
            return {}
        response = (self._length - self._prompt_length)[finished]
        scores = self._score(self._tokens[finished], self._prompt_length[finished], response, self._prompt_id[finished])
        rewards[finished] += scores.total
        columns: dict[str, NDArray[Any]] = {
            "finish_reason": reasons,
            "task_reward": self._spread(finished, scores.total),
        }
        if self.kl.policy is not None:
            columns["kl"] = self._kl
            self.kl.controller.observe(self._kl[finished])
        if self.kl.kind == "reference":
            columns["ref_log_prob"] = self._ref_log_prob
        if self.render_mode is not None:
            for row, lane in enumerate(finished):
                components = {name: float(values[row]) for name, values in scores.components.items()}
                kl = float(self._kl[lane]) if self.kl.policy is not None else None
                self._outcomes[lane] = outcome_text(float(scores.total[row]), components, kl)
        info = self._end_info(ended, columns)
        for name, values in scores.components.items():
            known = np.zeros(self.num_envs, bool)
            known[finished] = ~np.isnan(values)
            if known.any():
                info |= _info(known, {f"reward/{name}": self._spread(finished, values)})
        return info

    def _score(self, tokens: INTS, prompt_length: INTS, response_length: INTS, prompt_id: INTS) -> Scores:
        """The task reward of finished episodes. Shapes: (B, L), (B,), (B,), (B,)."""
        if self.reward is None:
            return Scores(np.zeros(len(tokens)), {})
        prompts = self.task.prompts
        ids = [row[m : m + n].tolist() for row, m, n in zip(tokens, prompt_length, response_length, strict=True)]
        known: dict[tuple[int, ...], str] = {}  # small tasks say the same again and again, and decoding is slow
        for row in map(tuple, ids):
            if row not in known:
                known[row] = self.task.tokenizer.decode(list(row), skip_special_tokens=True)
        texts = [known[tuple(row)] for row in ids]
        return self.reward(
            Batch(
                prompts=[prompts.prompts[i] for i in prompt_id],
                completions=[[{"role": "assistant", "content": text}] for text in texts]
                if prompts.conversational
                else texts,
                completion_ids=ids,
                columns={name: [values[i] for i in prompt_id] for name, values in prompts.columns.items()},
                step=self._steps,
                finish_reasons=["stop" if row[-1] in self.task.stop_tokens else "length" for row in ids],
            )
        )

    # ------------------------------------------------------------------ infos

    def _start_info(self, mask: NDArray[np.bool_]) -> dict[str, Any]:
        return _info(
            mask,
            {"prompt_id": self._prompt_id} | ({"group_id": self._group_id} if self.group_size > 1 else {}),
        )

    def _end_info(self, mask: NDArray[np.bool_], columns: dict[str, NDArray[Any]]) -> dict[str, Any]:
        return _info(mask, columns) | self._start_info(mask) if mask.any() else {}

    def _spread(self, lanes: INTS, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Values of some lanes, in an array of all. Shapes: (M,), (M,) -> (N,)."""
        out = np.zeros(self.num_envs)
        out[lanes] = values
        return out

    # ------------------------------------------------------------------ bad input, before anything has changed

    def _checked(self, actions: Any, active: NDArray[np.bool_]) -> INTS:
        array = np.asarray(actions)
        if array.shape != (self.num_envs,) or not np.issubdtype(array.dtype, np.integer):
            raise InvalidAction(
                f"Expected actions to be {self.num_envs} token ids (integers of shape ({self.num_envs},)), got {array.dtype} of shape {array.shape}."
            )
        array = array.astype(np.int64)
        bad = (array < 0) | (array >= self.vocab_size)
        array[bad & ~active] = 0  # ignored, but a policy may be asked about whole batches
        if (bad := bad & active).any():
            lane = int(bad.argmax())
            raise InvalidAction(
                f"Lane {lane}: expected a token id between 0 and {self.vocab_size - 1}, got {array[lane]}."
            )
        if self.behaviour.action_mask is not None:
            forbidden = active & ~self.action_masks()[np.arange(self.num_envs), array]
            if forbidden.any():
                lane = int(forbidden.argmax())
                raise InvalidAction(
                    f"Lane {lane}: token {array[lane]} is masked here. Sample with env.unwrapped.action_masks(), or through a policy that does."
                )
        return array

    def _refuse_step(self, lost: NDArray[np.bool_]) -> None:
        lane = int(lost.argmax())
        if not self._was_reset[lane]:
            raise ResetNeeded(f"Lane {lane} has not been reset: call reset() before step().")
        call = "reset()" if self.num_envs == 1 else "reset(options={'reset_mask': terminations})"
        raise ResetNeeded(f"The episode of lane {lane} has ended: call {call} before step().")

    def _reset_mask(self, options: dict[str, Any] | None) -> NDArray[np.bool_]:
        # Left in `options`: RecordEpisodeStatistics reads it there after us.
        mask = (options or {}).get("reset_mask")
        if mask is None:
            return np.ones(self.num_envs, bool)
        if (
            not isinstance(mask, np.ndarray)
            or mask.dtype != np.bool_
            or mask.shape != (self.num_envs,)
            or not mask.any()
        ):
            raise ValueError(
                f"Expected options['reset_mask'] to be a bool array of shape ({self.num_envs},) with at least one True, got {mask!r}."
            )
        if self._ledger is not None and not mask.all():
            raise ValueError("Inside a deferred block lanes are refilled by themselves: reset all of them, or none.")
        return mask

    def _seeds(self, seed: int | Sequence[int | None] | None) -> list[int | None]:
        if seed is None:
            return [None] * self.num_envs
        if isinstance(seed, int | np.integer):
            seeds: list[int | None] = [int(seed) + lane for lane in range(self.num_envs)]
        elif isinstance(seed, Sequence | np.ndarray) and len(seed) == self.num_envs:
            seeds = list(seed)
        else:
            raise ValueError(f"Expected one seed, or one for each of the {self.num_envs} lanes, got {seed!r}.")
        for value in seeds:
            if value is not None and not (isinstance(value, int | np.integer) and value >= 0):
                raise ValueError(f"Expected each seed to be an integer >= 0 (or None), got {value!r}.")
        return [None if value is None else int(value) for value in seeds]

    def _chosen_prompts(self, options: dict[str, Any] | None) -> INTS | None:
        chosen = (options or {}).get("prompt_id")
        if chosen is None:
            return None
        ids, n = np.asarray(chosen), len(self.task.prompts)
        fits = np.issubdtype(ids.dtype, np.integer) and ids.shape in ((), (self.num_envs,))
        if not fits or ids.min() < 0 or ids.max() >= n:
            raise ValueError(
                f"Expected options['prompt_id'] to be one id, or {self.num_envs} of them, between 0 and {n - 1}, got {chosen!r}."
            )
        if self.group_size > 1:
            raise ValueError(
                "options['prompt_id'] and group_size > 1 exclude each other: a group's prompts come from its own stream."
            )
        return np.broadcast_to(ids, (self.num_envs,))

    # ------------------------------------------------------------------ deferred blocks

    def _open(self, ledger: Ledger) -> None:
        if self._ledger is not None:
            raise RuntimeError("A deferred block is open already; they do not nest.")
        if self.autoreset_mode is AutoresetMode.DISABLED:
            raise ValueError(
                "A deferred block refills lanes by itself: make the environment with autoreset_mode='SAME_STEP' or 'NEXT_STEP'."
            )
        self._ledger, self.reference.awaited = ledger, None
        fresh = ~self._done & (self._length == self._prompt_length)
        if fresh.all():  # reset just before the block: those are its first episodes
            self._done[ledger.size :] = True
            self._start_in_ledger(np.arange(min(ledger.size, self.num_envs)))
        else:  # nothing is carried over: the loop begins with a reset
            self._done[:], self._was_reset[:] = True, False

    def _close(self, ledger: Ledger) -> None:
        self._ledger = None
        self._done[:], self._was_reset[:] = True, False

    # ------------------------------------------------------------------ state, picture, end

    _STATE = (
        "_tokens", "_prompt_length", "_length", "_prompt_id", "_group_id", "_beta", "_kl", "_ref_log_prob", "_token_rewards", "_done", "_was_reset",
    )  # fmt: skip

    def get_state(self) -> dict[str, Any]:
        """Everything that the next steps depend on, as plain data: for resuming, and for tree search."""
        if self._ledger is not None:
            raise RuntimeError("The state cannot be taken inside a deferred block.")
        arrays = {name: getattr(self, name).copy() for name in self._STATE}
        streams = [(s.taken.copy(), s.base, list(s.pending)) for s in self._streams]
        generators = [None if rng is None else rng.bit_generator.state for rng in self._rngs]
        controller = {name: _copied(value) for name, value in vars(self.kl.controller).items()}
        return {
            "arrays": arrays,
            "streams": streams,
            "generators": generators,
            "controller": controller,
            "steps": self._steps,
            "group_size": self.group_size,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Go back to a state that `get_state` gave, of an environment with the same task, number of lanes and group size."""
        if self._ledger is not None:
            raise RuntimeError("The state cannot be set inside a deferred block.")
        if state["group_size"] != self.group_size:
            raise ValueError(
                f"This state is of another environment: its group_size is {state['group_size']}, expected {self.group_size}."
            )
        arrays = state["arrays"]
        for name in self._STATE:
            here = getattr(self, name)
            if arrays[name].shape != here.shape:
                raise ValueError(
                    f"This state is of another environment: {name.strip('_')} has shape {arrays[name].shape}, expected {here.shape}."
                )
        for name in self._STATE:
            getattr(self, name)[:] = arrays[name]
        self._outcomes = [""] * self.num_envs
        self._streams = [
            PromptStream(taken.copy(), old.repeats, base, list(pending))
            for old, (taken, base, pending) in zip(self._streams, state["streams"], strict=True)
        ]
        for lane, saved in enumerate(state["generators"]):
            if saved is None:
                self._rngs[lane] = None
            else:
                self._rng(lane).bit_generator.state = saved
        if isinstance(self.kl.controller, AdaptiveKL):  # a fixed beta is a setting of this environment, not a state
            for name, value in state["controller"].items():
                setattr(self.kl.controller, name, _copied(value))
        self._steps = state["steps"]

    def render(self) -> tuple[str, ...] | None:
        """The lanes' texts, tokens coloured by reward (`"ansi"`); an episode that has ended, with what each reward said of it.

        In `"human"` mode tokens print as they come.
        """
        if self.render_mode is None:
            gym.logger.warn(
                "render() was called on an environment without a render_mode; make it with render_mode='ansi' or 'human'."
            )
            return None
        frames = tuple(
            render_episode(
                self.tokenizer,
                self._tokens[lane, : self._length[lane]],
                int(self._prompt_length[lane]),
                self._token_rewards[lane],
                outcome=self._outcomes[lane],
            )
            for lane in range(self.num_envs)
        )
        return frames if self.render_mode == "ansi" else None

    def _print(self, lanes: INTS) -> None:
        """Print what has come: with one lane the token alone, with several each lane's line when it ends."""
        for lane in lanes:
            if self.num_envs == 1 or self._done[lane]:
                tokens, m = self._tokens[lane, : self._length[lane]], int(self._prompt_length[lane])
                since = max(m, len(tokens) - 1) if self.num_envs == 1 and len(tokens) > m else 0
                text = render_episode(self.tokenizer, tokens, m, self._token_rewards[lane], since, self._outcomes[lane])
                sys.stdout.write(text + ("\n" if self._done[lane] else ""))
        sys.stdout.flush()

    def close_extras(self, **kwargs: Any) -> None:
        """Free the caches."""
        self.reference.invalidate()
        self.reference.awaited = None


class TextEnv(gym.Env[INTS, np.int64]):
    """One lane of `TextVectorEnv`, with Gymnasium's single-environment interface.

    Takes the same keyword arguments (`autoreset_mode` has no meaning for one lane and is accepted for symmetry).
    """

    metadata: dict[str, Any] = {"render_modes": RENDER_MODES, "render_fps": 8}  # noqa: RUF012  # as Gymnasium declares it

    def __init__(self, task: Task, **kwargs: Any) -> None:
        autoreset(kwargs.pop("autoreset_mode", AutoresetMode.DISABLED))
        self.lanes = TextVectorEnv(1, task, autoreset_mode=AutoresetMode.DISABLED, **kwargs)
        self.render_mode = self.lanes.render_mode
        self.observation_space = self.lanes.single_observation_space
        self.action_space = self.lanes.single_action_space
        # Shared with the one lane, so that there is one account of each thing.
        self.task, self.kl, self.reference, self.behaviour = (
            task,
            self.lanes.kl,
            self.lanes.reference,
            self.lanes.behaviour,
        )
        self.vocab_size, self.max_tokens, self.group_size = (
            self.lanes.vocab_size,
            self.lanes.max_tokens,
            self.lanes.group_size,
        )
        self.attach_policy = self.lanes.attach_policy

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[INTS, dict[str, Any]]:
        """Begin an episode. `options["prompt_id"]` chooses the prompt. Shape: (L,)."""
        super().reset(seed=seed)
        if seed is not None:
            self.lanes._streams = self.lanes._new_streams()
        self.lanes._rngs[0] = self.np_random
        # With a mask the lane goes on in its prompt stream, so that group_size counts episodes over resets.
        observations, infos = self.lanes.reset(options={**(options or {}), "reset_mask": np.ones(1, bool)})
        return observations[0], _first(infos)

    def step(self, action: np.int64 | int) -> tuple[INTS, float, bool, bool, dict[str, Any]]:
        """Append one token. See `TextVectorEnv.step`."""
        if np.ndim(action) != 0:
            raise InvalidAction(f"Expected the action to be one token id, got {action!r}.")
        observations, rewards, terminations, _, infos = self.lanes.step(np.asarray([action]))
        return observations[0], float(rewards[0]), bool(terminations[0]), False, _first(infos)

    def action_masks(self) -> NDArray[np.bool_]:
        """Allowed tokens at the current observation. Shape: (V,), True = allowed."""
        (mask,) = self.lanes.action_masks()
        return mask

    @property
    def tokenizer(self) -> Any:
        """The task's tokenizer."""
        return self.task.tokenizer

    @property
    def demonstrations(self) -> list[tuple[INTS, INTS]]:
        """See `TextVectorEnv.demonstrations`."""
        return self.lanes.demonstrations

    def get_state(self) -> dict[str, Any]:
        """See `TextVectorEnv.get_state`."""
        self.lanes._rngs[0] = self.np_random
        return self.lanes.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        """See `TextVectorEnv.set_state`."""
        self.lanes._rngs[0] = self.np_random
        self.lanes.set_state(state)

    def render(self) -> str | None:
        """The episode's text, tokens coloured by reward."""
        frames = self.lanes.render()
        return None if frames is None else frames[0]

    def close(self) -> None:
        """Free the caches."""
        self.lanes.close()


def autoreset(mode: AutoresetMode | str) -> AutoresetMode:
    """The mode from the enum, its value ("NextStep") or its name ("NEXT_STEP")."""
    for known in AutoresetMode:
        if mode in (known, known.value, known.name):
            return known
    raise ValueError(f"Expected autoreset_mode to be one of {[m.name for m in AutoresetMode]}, got {mode!r}.")


def _frozen_mask(mask: Any, vocab_size: int) -> ActionMask | None:
    if mask is None or callable(mask):
        return mask
    array = np.array(mask)
    if array.dtype != np.bool_ or array.shape != (vocab_size,) or not array.any():
        raise ValueError(
            f"Expected action_mask to be a function, or a bool array of shape ({vocab_size},) that allows something, got {array.dtype} {array.shape}."
        )
    array.flags.writeable = False
    return array


def _info(mask: NDArray[np.bool_], columns: dict[str, NDArray[Any]]) -> dict[str, Any]:
    """Gymnasium's vector info: arrays, each with a `_key` mask; zero (or None) where the mask is False."""
    out: dict[str, Any] = {}
    for name, values in columns.items():
        blank = np.full(values.shape, None, object) if values.dtype == object else np.zeros_like(values)
        blank[mask] = values[mask]
        out[name], out[f"_{name}"] = blank, mask.copy()
    return out


def _merge(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """Two vector infos about different lanes, as one."""
    out = dict(b)
    for name in b.keys() & a.keys():
        if name.startswith("_"):
            out[name] = a[name] | b[name]
        else:
            out[name] = np.where(b[f"_{name}"], b[name], a[name])
    return out


def _first(infos: dict[str, Any]) -> dict[str, Any]:
    """The info of the one lane, as plain values."""
    values = {name: value[0] for name, value in infos.items() if not name.startswith("_") and infos[f"_{name}"][0]}
    return {name: value.item() if isinstance(value, np.generic) else value for name, value in values.items()}


def _copied(value: Any) -> Any:
    return list(value) if isinstance(value, list) else value
