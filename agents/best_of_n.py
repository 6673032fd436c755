"""Best-of-n: draw n completions from the reference and answer with the one that the reward likes best. Learns nothing.

Stiennon et al. (2020), https://arxiv.org/abs/2009.01325; Nakano et al. (2021), https://arxiv.org/abs/2112.09332.

    y = argmax_k r(x, y_k),    y_1 .. y_n ~ pi_ref(.|x)

Its distribution is known: with F(y) the probability that a sample is worth at most as much as y, and F-(y) that it is
worth less, the best is one of y's equals with probability F(y)^n - F-(y)^n, and equals keep their proportions. Its KL to the
reference is at most log n - (n - 1) / n nats (Beirami et al., 2024, https://arxiv.org/abs/2401.01879), less where rewards tie or
where a few completions hold much of the probability. It is no fixed point of training and no maximiser of r - beta KL: n
alone sets how far it goes, so on the exact tasks its score is that of one point near the frontier of KL and reward.

Where all completions can be listed, `completion_log_probs` is its exact distribution, for the environment's `evaluate`.
`policy` is the policy that is sampled *from*; the environment reports that one's KL (0, unless it is truncated).

Differences from the papers: 1) `predict` serves it token by token: where an observation does not follow what was planned
for its lane, n continuations are drawn from there, scored as whole responses, and the best is played 2) `learn` trains
nothing: it draws samples, and logs by them what best-of-n is worth.

Run: textenv train BestOfN textenv/Arithmetic-v0 --n 16 --env-arg group_size=16
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import lgamma, log
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from agents.base import AgentConfig, LanguageModelAgent, MaybeCallback
from agents.rollout import collect
from textenv.env import TextVectorEnv
from textenv.exact import best_of_n
from textenv.ledger import Episodes
from textenv.prompts import Prompts, encode_prompt
from textenv.task import Task


@dataclass(frozen=True, kw_only=True)
class BestOfNConfig(AgentConfig):
    """Settings of best-of-n."""

    n: int = 16
    """Completions drawn for each answer. The KL grows as log n, the cost as n."""
    samples_in_parallel: int = 64
    """Lanes that they are drawn in."""
    episodes_per_update: int = 128
    """Samples between two rows of `learn`'s log."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("n", "samples_in_parallel", "episodes_per_update"):
            if getattr(self, name) < 1:
                raise ValueError(f"Expected {name} >= 1, got {getattr(self, name)!r}.")


class BestOfN(LanguageModelAgent):
    """The best of n samples of the reference, by the environment's own reward.

    Args:
        env: A textenv vector environment with a reward. `predict` answers its prompts; to answer those of another split,
            make the agent on an environment of that split: nothing has been learnt that would be lost.
        kwargs: See `LanguageModelAgent`; further keywords are fields of `BestOfNConfig`.

    Raises:
        ValueError: The environment has no reward to choose by.

    Example:
        >>> agent = BestOfN(gym.make_vec("textenv/Arithmetic-v0", num_envs=8), n=64, seed=0)
        >>> agent.generate(["6*7="])
    """

    Config = BestOfNConfig
    config: BestOfNConfig
    kl_placement = "none"

    def __init__(self, env: Any, **kwargs: Any) -> None:
        super().__init__(env, **kwargs)
        if self.peft_config is not None:
            raise ValueError("Expected no peft_config: BestOfN learns nothing, so there is nothing to adapt.")
        if self.lanes.task.reward is None:
            raise ValueError("BestOfN chooses by the environment's reward, and there is none: make it with reward=...")
        self._sampler = self.sampler(self.lanes.task)
        self._plans: NDArray[np.int64] = np.zeros((0, 0), np.int64)  # by lane: prompt, planned response, padding
        self._planned_at: NDArray[np.int64] = np.zeros(0, np.int64)  # tokens of the observation that each was made for
        self._prompt_ids = {ids.tobytes(): i for i, ids in reversed([*enumerate(self.lanes.task.prompts.token_ids)])}

    # ------------------------------------------------------------------ acting

    def predict(
        self,
        observation: NDArray[np.int64],
        state: Any = None,
        episode_start: Any = None,
        deterministic: bool = False,
    ) -> tuple[Any, Any]:
        """The next token of each observation's plan; n continuations are drawn where there is none that fits.

        A plan fits while its lane's observation is longer than when it was made and agrees with it, so each episode has
        samples of its own, and lanes may be asked about in any order, at the price of new plans.

        Args:
            observation: Shape: (N, L), or (L,) for one.
            state: Passed through.
            episode_start: Ignored: a bare prompt says as much.
            deterministic: Draw from the same generator each time, one observation at a time: the same observation has the
                same answer, whatever came before.

        Returns:
            Actions, shape (N,) or (), and `state`.

        Raises:
            ValueError: An observation begins with no prompt of the environment.
        """
        rows = np.atleast_2d(np.asarray(observation, np.int64))
        length = (rows != self.lanes.vocab_size).sum(axis=1)
        if self._plans.shape != rows.shape:
            self._plans, self._planned_at = np.full_like(rows, -1), np.zeros_like(length)
        agrees = ((self._plans == rows) | (np.arange(rows.shape[1]) >= length[:, None])).all(axis=1)
        new = np.flatnonzero(~(agrees & (length > self._planned_at)))
        if len(new):
            batches = [(new, self._predict_rng)]
            if deterministic:
                batches = [(new[i : i + 1], np.random.default_rng(0)) for i in range(len(new))]
            for part, rng in batches:
                prompt_ids = np.asarray([self.prompt_of(rows[lane]) for lane in part])
                best = self.answer(self._sampler, prompt_ids, rng, rows[part])
                self._plans[part], self._planned_at[part] = best.tokens, length[part]
        last = np.minimum(length, rows.shape[1] - 1)  # lanes at the end of their plan are idle: their action is ignored
        tokens = self._plans[np.arange(len(rows)), last]
        actions = np.where(tokens < self.lanes.vocab_size, tokens, 0)
        return (actions if np.ndim(observation) == 2 else actions[0]), state

    def generate(self, prompts: Sequence[Any], deterministic: bool = False, batch_size: int = 64) -> list[str]:
        """Complete prompts, new ones too, if the reward can judge them by prompt and completion alone.

        Args:
            prompts: Texts or message lists.
            deterministic: Draw from the same generator each time.
            batch_size: Ignored: `samples_in_parallel` holds.

        Returns:
            One completion per prompt.
        """
        if isinstance(prompts, str):
            raise ValueError("Expected a list of prompts, got one string: pass [prompt].")
        if not len(prompts):
            return []
        task = self.lanes.task
        ids = [encode_prompt(task.tokenizer, prompt, f"prompt {i}") for i, prompt in enumerate(prompts)]
        task = replace(task, prompts=Prompts(list(prompts), ids), max_prompt_tokens=max(len(row) for row in ids))
        try:
            sampler = self.sampler(task)
        except ValueError as error:
            raise ValueError(
                f"BestOfN cannot judge completions of new prompts: {error} Make the agent on an environment that holds the prompts with "
                "all their columns, and use predict."
            ) from error
        rng = np.random.default_rng(0) if deterministic else self._predict_rng
        return sampler.completions(self.answer(sampler, np.arange(len(ids)), rng))

    def answer(
        self,
        sampler: TextVectorEnv,
        prompt_ids: NDArray[np.int64],
        rng: np.random.Generator,
        begun: NDArray[np.int64] | None = None,
    ) -> Episodes:
        """The best of n for each of these prompts.

        Args:
            sampler: Where samples are drawn.
            prompt_ids: Rows of its prompts. Shape: (K,).
            rng: Draws the tokens.
            begun: Observations to go on from, instead of bare prompts. Shape: (K, L).

        Returns:
            K episodes.
        """
        samples = []
        rows = np.repeat(np.arange(len(prompt_ids)), self.config.n)
        for begin in range(0, len(rows), sampler.num_envs):
            count = len(rows[begin : begin + sampler.num_envs])
            part = np.resize(rows[begin : begin + count], sampler.num_envs)
            observations, _ = sampler.reset(options={"prompt_id": prompt_ids[part]})
            with sampler.deferred(episodes=count) as ledger:
                while not ledger.done:
                    actions, _ = self.policy.act(observations, rng)
                    if begun is not None:  # repeat what stands there, then go on
                        place = (observations != sampler.vocab_size).sum(axis=1)
                        given = begun[part, np.minimum(place, begun.shape[1] - 1)]
                        actions = np.where(given < sampler.vocab_size, given, actions)
                    observations, *_ = sampler.step(actions)
            samples.append(ledger.episodes)
        episodes = Episodes.concatenate(samples)
        best = (
            episodes.task_reward.reshape(-1, self.config.n).argmax(axis=1) + np.arange(len(prompt_ids)) * self.config.n
        )
        return take(episodes, best)

    def sampler(self, task: Task) -> TextVectorEnv:
        """An environment of the agent's own to draw samples in: the user's one is left where it stands."""
        behaviour = self.lanes.behaviour
        return TextVectorEnv(
            self.config.samples_in_parallel, task, beta=0.0, temperature=behaviour.temperature, action_mask=behaviour.action_mask
        )  # fmt: skip

    def prompt_of(self, observation: NDArray[np.int64]) -> int:
        """The prompt that an observation begins with, the longest if there are several. Shape: (L,)."""
        for length in range(int((observation != self.lanes.vocab_size).sum()), 0, -1):
            found = self._prompt_ids.get(observation[:length].tobytes())
            if found is not None:
                return found
        raise ValueError(
            f"The observation {observation.tolist()} begins with no prompt of the agent's environment, so its completions cannot be scored. "
            "Expected one of its prompts: make BestOfN on an environment of the split that is played."
        )

    def set_random_seed(self, seed: int | None = None) -> None:
        """Reseed `predict` and `generate`, and forget what was planned."""
        super().set_random_seed(seed)
        self._plans = np.zeros((0, 0), np.int64)

    # ------------------------------------------------------------------ what it is worth

    @property
    def kl_bound(self) -> float:
        """What the KL to the policy that is sampled from cannot exceed, nats per episode."""
        return log(self.config.n) - (self.config.n - 1) / self.config.n

    def completion_log_probs(self) -> NDArray[np.float64]:
        """The exact log-probability of each completion, in the order of `leaves`, for the environment's `evaluate`. Shape: (Y,).

        Raises:
            ValueError: The environment's completions cannot be listed.
        """
        leaves = getattr(self.lanes, "leaves", None)
        if leaves is None:
            raise ValueError(
                f"The completions of {type(self.lanes).__name__} cannot be listed, expected an environment with `leaves` such as "
                "textenv/Tree-v0. Elsewhere `learn` estimates what best-of-n is worth, and `kl_bound` bounds its KL."
            )
        prompt = self.lanes.task.prompts.token_ids[0]
        count, length = len(leaves.tokens), (leaves.tokens < self.lanes.vocab_size).sum(axis=1)
        tokens = np.hstack([np.broadcast_to(prompt, (count, len(prompt))), leaves.tokens])
        log_p = self.policy.sampler.score(tokens, np.full(count, len(prompt)), length).sum(axis=1)
        return best_of_n(log_p, leaves.rewards, self.config.n)

    def learn(self, total_timesteps: int, callback: MaybeCallback = None, progress_bar: bool = False) -> Self:
        """Draw samples for so many tokens, and log what the best of n of them is worth. Changes nothing."""
        with self.start_learning(total_timesteps, callback, progress_bar) as session:
            while session.more():
                episodes = collect(self.env, self.policy, self.config.episodes_per_update, self.rng, session.on_step)
                session.rollout_done(episodes)
                self.update(episodes)
                session.iteration_done()
        return self

    def update(self, episodes: Episodes) -> None:
        """Log an estimate, from the prompts with n samples or more (`group_size=n` makes sure of them)."""
        worth = np.where(episodes.finish_reason == "truncated", np.nan, episodes.rewards.sum(axis=1))
        estimates = []
        for prompt_id in np.unique(episodes.prompt_id):
            rewards = worth[(episodes.prompt_id == prompt_id) & ~np.isnan(worth)]
            if len(rewards) >= self.config.n:
                estimates.append(expected_best(rewards, self.config.n))
        if estimates:
            self.logger.record("train/best_of_n_reward", float(np.mean(estimates)))
        self.logger.record("train/kl_bound", self.kl_bound)


def expected_best(rewards: NDArray[np.float64], n: int) -> float:
    """The expected best of n, estimated without bias from N >= n samples (Nakano et al., 2021, appendix I).

    The i-th worst of N is the best of a random n of them with probability C(i - 1, n - 1) / C(N, n).

    Args:
        rewards: Shape: (N,).
        n: At most N.
    """
    size = len(rewards)
    if not 1 <= n <= size:
        raise ValueError(f"Expected n between 1 and the number of samples, {size}, got {n}.")

    def log_choose(a: int, b: int) -> float:
        return lgamma(a + 1) - lgamma(b + 1) - lgamma(a - b + 1)

    weights = [np.exp(log_choose(i - 1, n - 1) - log_choose(size, n)) for i in range(n, size + 1)]
    return float(np.sort(rewards)[n - 1 :] @ np.asarray(weights))


def take(episodes: Episodes, rows: NDArray[np.int64]) -> Episodes:
    """Some of these episodes, numbered anew. Shape: (K,)."""
    columns = {name: values[rows] for name, values in vars(episodes).items() if name not in ("order", "components")}
    components = {name: values[rows] for name, values in episodes.components.items()}
    return Episodes(order=np.arange(len(rows)), components=components, **columns)
