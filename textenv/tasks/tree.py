"""`textenv/Tree-v0`: every completion can be listed, so the best policy is known and any other has an exact score.

The alphabet is small and the budget short; the reference is a little transformer with seeded random weights. What is
asked of an agent is what is asked of it on text: to find the completions that pay, and to stay close to the reference.
Here its expected reward, its KL and its distance from the optimum are sums over all completions, without sampling noise.

    env = gym.make_vec("textenv/Tree-v0", num_envs=64, structure="trap")
    agent = PPO(env, seed=0).learn(50_000)
    env.unwrapped.evaluate(agent.policy).score         # 0 for the reference, 1 for the optimum
"""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from rewards import Batch, bind
from textenv.env import TextEnv, TextVectorEnv
from textenv.exact import (
    CompletionTree,
    Frontier,
    TabularPolicy,
    best_of_n,
    completion_count,
    expectation,
    frontier,
    grow,
    kl_divergence,
    logsumexp,
    policy_table,
    soft_values,
)
from textenv.kl import Controller, KLPenalty
from textenv.lm import LanguageModel
from textenv.prompts import did_you_mean
from textenv.sampling import Behaviour
from textenv.task import Task, build_task, entry_points

FLOATS = NDArray[np.float64]
INTS = NDArray[np.int64]

STOP = 0
LETTERS = string.ascii_letters + string.digits
PROMPT = "a"

BETA = 0.5
"""Reward per nat. Smaller ones are another, harder setting: an agent without the pull of the reference may rightly stick
to the first good completion it meets (exploration, not correctness)."""
DECAY = 0.7
"""Of the draws of `random_walks`, per token."""
WIDTH = 32
"""Hidden size of the reference."""
SPREAD = 0.7
"""Standard deviation of the reference's logits: uneven enough to matter, even enough to reach most of the tree."""
MAX_COMPLETIONS = 1_000_000
SUM_TOLERANCE = 1e-4
"""How far from 1 the probabilities of all completions may sum: float32 stays a thousand times closer."""


# ---------------------------------------------------------------------- reward structures


def random_walks(rng: np.random.Generator, tree: CompletionTree, log_ref: FLOATS) -> FLOATS:
    """Each token adds a draw of its own at each place, 0.7 times as large as the one before: related completions pay alike.

    Scaled so that a completion of T tokens has standard deviation 1 over tasks.
    """
    scale = DECAY ** np.arange(tree.leaves.shape[1])
    depth = (tree.prefixes < tree.vocab_size).sum(axis=1)
    draws = scale[depth, None] * rng.standard_normal(tree.child.shape)
    return tree.sum_along(draws) / np.sqrt((scale**2).sum())


def independent(rng: np.random.Generator, tree: CompletionTree, log_ref: FLOATS) -> FLOATS:
    """Each completion pays a draw of its own from N(0, 1): there is nothing to generalise from.

    What has never been sampled cannot be known, so in E episodes an agent can at best make use of the completions that
    are likelier than about 1 in E / 10: a matter of exploration more than of correctness.
    """
    return rng.standard_normal(len(tree.leaves))


def needle(rng: np.random.Generator, tree: CompletionTree, log_ref: FLOATS) -> FLOATS:
    """One completion pays, all others nothing.

    It is as near as can be to 1 in Y^(3/4) under the reference (190 by default: an agent that learns from a few thousand
    episodes will have met it), and pays so much that the optimum at beta = 0.5 draws it with probability 0.95.
    """
    target = np.abs(log_ref + 0.75 * np.log(len(log_ref))).argmin()
    log_others = np.log1p(-np.exp(log_ref[target]))
    rewards = np.zeros(len(log_ref))
    rewards[target] = BETA * (np.log(19) + log_others - log_ref[target])
    return rewards


def trap(rng: np.random.Generator, tree: CompletionTree, log_ref: FLOATS) -> FLOATS:
    """A treasure behind a first token that looks bad: choosing tokens by what they pay on average leads away from it.

    Completions that begin with another token all pay 1. Those that begin as the treasure does pay 0 on average under the
    reference: the treasure so much that the optimum at beta = 0.5 draws it nine times as often as all that pay 1, the
    others the balance. The treasure takes at least half of the budget, and is as near as can be to 1 in sqrt(Y).
    """
    first, length = tree.leaves[:, 0], (tree.leaves < tree.vocab_size).sum(axis=1)
    hidden = np.flatnonzero((first != STOP) & (2 * length >= tree.leaves.shape[1]))
    treasure = hidden[np.abs(log_ref[hidden] + 0.5 * np.log(len(log_ref))).argmin()]
    begins_so = first == first[treasure]
    misses = begins_so & (np.arange(len(first)) != treasure)
    prize = 1 + BETA * (np.log(9) + logsumexp(log_ref[~begins_so]) - log_ref[treasure])
    rewards = np.where(begins_so, 0.0, 1.0)
    rewards[treasure] = prize
    rewards[misses] = -prize * np.exp(log_ref[treasure] - logsumexp(log_ref[misses]))
    return rewards


def conflict(rng: np.random.Generator, tree: CompletionTree, log_ref: FLOATS) -> FLOATS:
    """The likelier under the reference, the less it pays: `-0.5 log ref(y)`.

    At beta = 0.5 reward and penalty cancel: the optimum draws all Y completions alike, and V* = 0.5 log Y.
    """
    return -BETA * log_ref


STRUCTURES: dict[str, Callable[[np.random.Generator, CompletionTree, FLOATS], FLOATS]] = {
    "random": random_walks,
    "independent": independent,
    "needle": needle,
    "trap": trap,
    "conflict": conflict,
}
"""Name -> (generator, completions, reference log-probabilities (Y,)) -> rewards (Y,)."""


@dataclass(frozen=True)
class LeafReward:
    """A reward that is a table of completions."""

    structure: str
    """Its name."""
    values: Mapping[str, float] = field(repr=False)
    """Completion -> reward."""

    @property
    def __name__(self) -> str:
        return self.structure

    def __call__(self, completions: Sequence[str], **columns: Any) -> list[float]:
        """Look the completions up."""
        return [self.values[text] for text in completions]


# ---------------------------------------------------------------------- the task


def tree_task(
    vocab_size: int = 4,
    horizon: int = 6,
    structure: str = "random",
    seed_of_task: int = 0,
    reward: Any = None,
) -> Task:
    """A tree of completions: letters until the stop token or the budget. There is one prompt.

    Args:
        vocab_size: V: the stop token and V - 1 letters.
        horizon: T, the response budget in tokens. There are `sum_{t=0..T} (V - 1)^t` completions, 1,093 by default.
        structure: What completions pay: `"random"`, `"needle"`, `"trap"`, `"conflict"` or `"independent"`; see the functions
            of this module.
        seed_of_task: Of the reference's weights and of the rewards: another seed is another task of the same kind.
        reward: Any (deterministic) reward function, instead of a structure.
    """
    for name, value, least in (
        ("vocab_size", vocab_size, 2),
        ("horizon", horizon, 1),
        ("seed_of_task", seed_of_task, 0),
    ):
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
            raise ValueError(f"Expected {name} to be an integer of at least {least}, got {value!r}.")
    if vocab_size > len(LETTERS) + 1:
        raise ValueError(
            f"Expected vocab_size of at most {len(LETTERS) + 1} (the stop token and a letter or digit each), got {vocab_size}."
        )
    if (count := completion_count(vocab_size, horizon)) > MAX_COMPLETIONS:
        raise ValueError(
            f"vocab_size={vocab_size} and horizon={horizon} give {count:.3g} completions, too many to list; expected at most {MAX_COMPLETIONS:,}."
        )
    if structure not in STRUCTURES:
        raise ValueError(
            f"Expected structure to be one of {list(STRUCTURES)}, got {structure!r}.{did_you_mean(str(structure), list(STRUCTURES))}"
        )
    if structure == "trap" and horizon < 2:
        raise ValueError("structure='trap' needs horizon >= 2: with one token there is nothing behind the first.")
    weights, draws = map(np.random.default_rng, np.random.SeedSequence(int(seed_of_task)).spawn(2))
    task = build_task(
        random_transformer(int(vocab_size), int(horizon) + 1, weights),
        [PROMPT],
        reward,
        tokenizer=letter_tokenizer(int(vocab_size)),
        max_new_tokens=int(horizon),
    )
    if reward is not None:
        return task
    tree = grow(task.vocab_size, task.max_new_tokens, task.stop_tokens)
    log_ref = tree.sum_along(reference_table(task, tree))
    values = STRUCTURES[structure](draws, tree, log_ref)
    return replace(task, reward=LeafReward(structure, dict(zip(leaf_texts(tree), values.tolist(), strict=True))))


def random_transformer(vocab_size: int, positions: int, rng: np.random.Generator) -> PreTrainedModel:
    """A little GPT-2 whose weights are drawn wide enough that its distribution is uneven and every token matters."""
    config = GPT2Config(
        vocab_size=vocab_size, n_positions=positions, n_embd=WIDTH, n_layer=2, n_head=4, n_inner=2 * WIDTH,
        activation_function="relu",
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, tie_word_embeddings=False,
        bos_token_id=STOP, eos_token_id=STOP,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]), torch.no_grad():  # building it draws from the global generator
        model = GPT2LMHeadModel(config)
        for parameter in model.parameters():
            if parameter.ndim == 2:  # biases stay 0, norms 1
                draws = rng.standard_normal(tuple(parameter.shape)) / np.sqrt(WIDTH)
                parameter.copy_(torch.from_numpy(draws))
        model.lm_head.weight.mul_(SPREAD)  # its inputs are normalised
    return model.eval()


def letter_tokenizer(vocab_size: int) -> Any:
    """The stop token, and a letter for each further id."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    stop = "</s>"
    core = Tokenizer(models.WordLevel({token: i for i, token in enumerate([stop, *LETTERS[: vocab_size - 1]])}))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=stop, bos_token=stop, pad_token=stop)


# ---------------------------------------------------------------------- the environment


@dataclass(frozen=True, eq=False)
class Leaves:
    """Every completion of a task, shorter ones first."""

    tokens: INTS
    """Stop token included, padded with V. Shape: (Y, T)."""
    texts: list[str]
    """As the reward sees them. Length: Y."""
    rewards: FLOATS
    """Task rewards. Shape: (Y,)."""
    log_ref: FLOATS
    """Log-probabilities under the reference, nats. Shape: (Y,)."""


@dataclass(frozen=True, eq=False)
class Solution:
    """The optimum of `E[r] - beta KL(pi || ref)`."""

    value: float
    """V*, what it is worth."""
    log_z: float
    """log E_ref[exp(r / beta)], nats; `value = beta log_z`."""
    policy: TabularPolicy
    """pi*, a policy like any other: it can be run, attached and evaluated."""


@dataclass(frozen=True)
class Evaluation:
    """What a policy is worth, exactly."""

    objective: float
    """J = reward - beta kl."""
    reward: float
    """Expected task reward."""
    kl: float
    """KL(pi || ref), nats per episode."""
    kl_to_optimum: float
    """KL(pi || pi*), nats per episode."""
    regret: float
    """V* - J; equal to beta kl_to_optimum."""
    score: float
    """(J - J_ref) / (V* - J_ref): 0 for the reference, 1 for the optimum; nan where the reference is the optimum."""


class KnownOptimum:
    """What an environment can say when all completions of its one prompt can be listed.

    Everything is about the distributions that are sampled: under the environment's temperature and action mask, and
    with the beta that the next episode starts with.
    """

    task: Task
    kl: KLPenalty
    behaviour: Behaviour

    @cached_property
    def leaves(self) -> Leaves:
        """Every completion, with its reward and its log-probability under the reference."""
        task, tokens = self.task, self._tree.leaves
        texts = leaf_texts(self._tree)
        batch = Batch(
            prompts=task.prompts.prompts * len(tokens),
            completions=texts,
            completion_ids=[row[row < self._tree.vocab_size].tolist() for row in tokens],
            columns={name: values * len(tokens) for name, values in task.prompts.columns.items()},
        )
        rewards = bind(task.reward, task.prompts.columns)(batch).total
        return Leaves(tokens, texts, rewards, self._tree.sum_along(self._log_ref))

    def solve(self) -> Solution:
        """The optimum, by backward recursion over the tree.

        Raises:
            ValueError: beta is 0: no single policy is best then.
        """
        beta = self.kl.beta
        if not beta > 0:
            raise ValueError(
                f"Expected beta > 0, got {beta}: without a KL penalty any policy that draws only the best completions is optimal. "
                "Make the environment with a small beta instead."
            )
        q, value = soft_values(self._tree, self._log_ref, self.leaves.rewards, beta)
        table = self._log_ref + (q - value[:, None]) / beta
        policy = TabularPolicy(self._tree, table, self.task.max_prompt_tokens)
        return Solution(float(value[0]), float(value[0]) / beta, policy)

    def evaluate(self, policy: Any) -> Evaluation:
        """What a policy is worth, by summing over all completions.

        Args:
            policy: Any object with `log_probs(observations: (N, L), actions: (N,)) -> (N,)` (asked in batches of up to 1,024;
                `log_probs_all(observations) -> (N, V)` is used where there is one); or one log-probability per completion, in
                the order of `leaves`. Shape: (Y,).

        Raises:
            ValueError: The probabilities do not sum to 1.
        """
        solution, leaves = self.solve(), self.leaves
        log_p = self._log_probs_of(policy)
        reward, kl = expectation(log_p, leaves.rewards), kl_divergence(log_p, leaves.log_ref)
        objective = reward - self.kl.beta * kl
        floor = expectation(leaves.log_ref, leaves.rewards)
        room = solution.value - floor
        return Evaluation(
            objective=objective,
            reward=reward,
            kl=kl,
            kl_to_optimum=kl_divergence(log_p, self._tree.sum_along(solution.policy.table)),
            regret=solution.value - objective,
            score=(objective - floor) / room if room > 1e-12 else float("nan"),
        )

    def frontier(self, betas: Sequence[float] | FLOATS) -> Frontier:
        """The exact Pareto front of KL and expected reward, at these betas (reward per nat): no policy lies above it."""
        return frontier(self.leaves.log_ref, self.leaves.rewards, betas)

    def best_of_n(self, n: int, policy: Any = None) -> Evaluation:
        """What it is worth to draw n completions and keep the one that pays most.

        Args:
            n: Samples.
            policy: What is sampled from, as for `evaluate`; None is the reference.
        """
        leaves = self.leaves
        log_p = leaves.log_ref if policy is None else self._log_probs_of(policy)
        return self.evaluate(best_of_n(log_p, leaves.rewards, n))

    @cached_property
    def _tree(self) -> CompletionTree:
        task, behaviour = self.task, self.behaviour
        prompt = task.prompts.token_ids[0]

        def allowed(prefixes: INTS) -> NDArray[np.bool_]:
            return behaviour.allowed(observations(prompt, prefixes), task.vocab_size)

        return grow(task.vocab_size, task.max_new_tokens, task.stop_tokens, allowed)

    @cached_property
    def _log_ref(self) -> FLOATS:
        return reference_table(self.task, self._tree, self.behaviour)

    def _log_probs_of(self, policy: Any) -> FLOATS:
        """A policy's log-probability of each completion, checked. Shape: (Y,)."""
        if hasattr(policy, "log_probs"):
            states = observations(self.task.prompts.token_ids[0], self._tree.prefixes)
            log_p = self._tree.sum_along(policy_table(policy, states, self._tree.allowed))
        elif isinstance(policy, np.ndarray | Sequence) and len(policy) == len(self._tree.leaves):
            log_p = np.asarray(policy, np.float64)
        else:
            got = f"{len(policy)} values" if isinstance(policy, np.ndarray | Sequence) else type(policy).__name__
            hint = " Did you mean its `.policy`?" if hasattr(policy, "policy") else ""
            raise ValueError(
                f"Expected a policy with log_probs(observations: (N, L), actions: (N,)) -> (N,), or one log-probability for each of the "
                f"{len(self._tree.leaves)} completions of `leaves`, got {got}.{hint}"
            )
        log_sum = float("nan") if np.isnan(log_p).any() else logsumexp(log_p)
        if not abs(np.exp(log_sum) - 1) <= SUM_TOLERANCE:  # nan fails too
            raise ValueError(
                f"Expected the probabilities of all {len(log_p)} completions to sum to 1, got {np.exp(log_sum):.6g}. log_probs must give "
                "log-probabilities in nats, of the distribution that is sampled: under the environment's temperature and action mask."
            )
        # What float32 leaves short of 1 is shared out, so that regret = beta KL holds to the last digit.
        return np.asarray(log_p - log_sum)


class TreeVectorEnv(KnownOptimum, TextVectorEnv):
    """`TextVectorEnv` whose optimum is known."""

    def __init__(self, num_envs: int, task: Task, *, beta: float | Controller = BETA, **kwargs: Any) -> None:
        super().__init__(num_envs, task, beta=beta, **kwargs)


class TreeEnv(KnownOptimum, TextEnv):
    """`TextEnv` whose optimum is known."""

    def __init__(self, task: Task, *, beta: float | Controller = BETA, **kwargs: Any) -> None:
        super().__init__(task, beta=beta, **kwargs)


def observations(prompt: INTS, prefixes: INTS) -> INTS:
    """What an agent sees at each prefix. Shapes: (m,), (S, T) -> (S, m + T)."""
    return np.hstack([np.broadcast_to(prompt, (len(prefixes), len(prompt))), prefixes])


def reference_table(task: Task, tree: CompletionTree, behaviour: Behaviour | None = None) -> FLOATS:
    """The reference's log-probabilities at every prefix, apart from the cache that episodes use. Shape: (S, V)."""
    states = observations(task.prompts.token_ids[0], tree.prefixes)
    lm = LanguageModel(task.model, states.shape[1], behaviour, cached=False)
    return np.asarray(lm.log_probs_all(states))


def leaf_texts(tree: CompletionTree) -> list[str]:
    """Completions as `letter_tokenizer` decodes them (which takes seconds for 100,000): without the stop token. Length: Y."""
    text = ["", *LETTERS[: tree.vocab_size - 1], ""]  # the stop token, letters, padding
    return ["".join([text[token] for token in row]) for row in tree.leaves.tolist()]


make, make_vec = entry_points(tree_task, TreeEnv, TreeVectorEnv)
