"""What is run, as data: suites of tasks, agents with their settings, seeds, budgets in tokens and metrics.

A suite of your own is one file: `suite = Suite(...)` in `my_suite.py`, run by `textenv bench my_suite.py:suite`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Task:
    """Where agents are trained, and what they are evaluated on."""

    env: str
    """Id of a vector environment."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Its keywords. A `reward` may be `file.py:function`, `module:function` or the directory of a reward model."""
    first_task_seed: int | None = None
    """Run i plays the task of `seed_of_task = first_task_seed + i`; None: all runs play the same task."""
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    """Keywords that differ in the evaluation, such as `{"split": "test"}`."""
    prompts: int = 256
    """Of the evaluation: the first of the split in one fixed random order, the same for all agents and seeds."""
    samples: int = 1
    """Answers per prompt in the evaluation."""


@dataclass(frozen=True, kw_only=True)
class Preset:
    """One agent with the settings that it has on every task."""

    agent: str
    """Its name in `agents`; or `module:Class` or `file.py:Class`: whatever is called as `Class(env, seed=..., **config)`
    and has stable-baselines3's `learn` and `predict`."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Keywords of the agent: fields of its config."""
    tokens: int | None = None
    """Length of a run (default: the suite's). The learning rate falls to 0 over it."""
    lanes: int = 128
    """`num_envs`; as many as episodes per update is fastest."""
    group_size: int = 1
    """Completions per prompt, for agents that compare them."""
    env: Mapping[str, Any] = field(default_factory=dict)
    """Keywords of the environment that this agent has otherwise than the task says, such as `beta`."""
    decay: bool = True
    """Whether the learning rate falls: the agent is given `decay_timesteps`, the length of the run. An agent of your own that does
    not take it has False here."""
    trains: bool = True
    """Whether it learns. One that does not is made on the evaluation's environment right away."""
    follows_j: bool = True
    """Whether the optimum of J is what the agent tends to. Others are scored all the same (docs/agents says why)."""

    def keywords(self, tokens: int) -> dict[str, Any]:
        """The agent's keywords for a run of this length."""
        return dict(self.config) | ({"decay_timesteps": tokens} if self.decay and self.trains else {})


@dataclass(frozen=True, kw_only=True)
class Suite:
    """Agents x tasks x seeds, and how they are measured."""

    title: str
    """One line."""
    tasks: Mapping[str, Task]
    """Name -> task."""
    agents: Mapping[str, Preset]
    """Name -> agent."""
    seeds: int = 5
    """Runs per agent and task, of seeds 0, 1, ..."""
    tokens: int = 60_000
    """Budget of a run, for agents that do not set it."""
    metrics: Sequence[str] = ("sampled",)
    """Groups of `benchmarks.metrics.METRICS`, or `file.py:function` of your own: (Answers) -> {name: number}."""
    headline: str = "objective"
    """The metric by which agents are ranked and compared. `objective` is J = E[r] - beta KL: how high the line of slope beta
    through an agent's point in the picture of reward against KL lies."""
    bounded: str | None = None
    """A metric in [0, 1] for performance profiles and optimality gaps."""
    frontier: Sequence[str] = ("reward",)
    """Metrics that are drawn against the KL."""
    columns: Sequence[str] = ("reward", "kl", "length")
    """Metrics of the report's second table."""
    lower_is_better: Sequence[str] = ()
    """Metrics of your own of which less is better."""


# ---------------------------------------------------------------------- the exact tasks

ROLLOUT: dict[str, Any] = {"episodes_per_update": 128, "minibatch_episodes": 64}
PRESETS: dict[str, Preset] = {
    "PPO": Preset(
        agent="PPO",
        config=ROLLOUT | {"learning_rate": 2e-3},
        tokens=50_000,
    ),
    "A2C": Preset(agent="A2C", config={"learning_rate": 3e-3, "episodes_per_update": 64}, tokens=80_000, lanes=64),
    "REINFORCE": Preset(agent="REINFORCE", config={"learning_rate": 4e-3, "episodes_per_update": 128}, tokens=80_000),
    "RLOO": Preset(agent="RLOO", config=ROLLOUT | {"learning_rate": 2e-3}, group_size=16),
    "GRPO-dr_grpo": Preset(agent="GRPO", config=ROLLOUT | {"variant": "dr_grpo", "learning_rate": 2e-3}, group_size=16),
    "GRPO": Preset(
        agent="GRPO",
        config=ROLLOUT | {"variant": "grpo", "learning_rate": 1e-3},
        group_size=16,
        follows_j=False,
    ),
    "GRPO-dapo": Preset(
        agent="GRPO",
        config=ROLLOUT | {"variant": "dapo", "learning_rate": 1e-3},
        group_size=16,
        follows_j=False,
    ),
    "GRPO-gspo": Preset(
        agent="GRPO",
        config=ROLLOUT | {"variant": "gspo", "learning_rate": 1e-3},
        group_size=16,
        follows_j=False,
    ),
    "NLPO": Preset(
        agent="NLPO",
        config=ROLLOUT | {"learning_rate": 2e-3, "mask_top_p": 0.99},
        tokens=50_000,
        follows_j=False,
    ),
    "OnlineDPO": Preset(
        agent="OnlineDPO",
        config={"labels": "bradley_terry", "learning_rate": 2e-3, "episodes_per_update": 128, "minibatch_pairs": 32},
        group_size=2,
    ),
    "ExpertIteration": Preset(
        agent="ExpertIteration",
        config={"rank_by": "return", "learning_rate": 3e-3, "episodes_per_update": 128, "minibatch_episodes": 16},
        group_size=4,
    ),
    "ILQL": Preset(
        agent="ILQL",
        config={"learning_rate": 2e-3, "expectile": 0.9, "cql_coef": 0.0, "gradient_steps": 8},
        follows_j=False,
    ),
    "BestOfN": Preset(agent="BestOfN", config={"n": 8}, trains=False, follows_j=False),
}
"""Name -> what is run under it, on the exact tasks. Chosen on task seeds 0 to 9."""

REFERENCE = Preset(agent="agents.base:LanguageModelAgent", trains=False)
"""The model that training starts from: where every frontier begins."""
RANDOM = Preset(agent="RandomAgent", trains=False)
"""Uniform over the allowed tokens: the floor."""


def tree(structure: str, **settings: Any) -> Task:
    """An exact task; tuning is on task seeds 0 to 9, so seeds from 1000 on are new."""
    return Task(env="textenv/Tree-v0", settings={"structure": structure} | settings, first_task_seed=1000)


STRUCTURES = ("random", "needle", "trap", "conflict")

EXACT = Suite(
    title="How near each agent comes to an optimum that is known exactly, and how many tokens it takes",
    tasks={structure: tree(structure) for structure in STRUCTURES},
    agents=PRESETS,
    seeds=10,
    metrics=("exact",),
    headline="score",
    bounded="score",
    columns=("regret", "reward", "kl"),
)


# ---------------------------------------------------------------------- language

ASSISTANT_TASK = Task(env="textenv/Assistant-v0", evaluation={"split": "test"}, prompts=600)
ASSISTANT_ROLLOUT: dict[str, Any] = {"learning_rate": 1e-3, "episodes_per_update": 256}

ASSISTANT_AGENTS: dict[str, Preset] = {
    "PPO": Preset(agent="PPO", config=ASSISTANT_ROLLOUT | {"epochs": 1}),
    "PPO-ptx": Preset(agent="benchmarks.factories:ppo_ptx", config=ASSISTANT_ROLLOUT | {"epochs": 1}),
    "A2C": Preset(agent="A2C", config=ASSISTANT_ROLLOUT),
    "REINFORCE": Preset(agent="REINFORCE", config=ASSISTANT_ROLLOUT),
    "RLOO": Preset(agent="RLOO", config=ASSISTANT_ROLLOUT | {"minibatch_episodes": 256}, group_size=4),
    "GRPO-dr_grpo": Preset(
        agent="GRPO", config=ASSISTANT_ROLLOUT | {"variant": "dr_grpo", "minibatch_episodes": 256}, group_size=4
    ),
    "BestOfN-4": Preset(agent="BestOfN", config={"n": 4}, trains=False),
    "BestOfN-16": Preset(agent="BestOfN", config={"n": 16}, trains=False),
    "Reference": REFERENCE,
    "RandomAgent": RANDOM,
}
"""PPO's settings are those of the recipe (docs/results/assistant.md), at the environment's beta of 0.05 instead of the recipe's 0.1, and
with a learning rate that falls to 0. The others have its learning rate, untuned, and one gradient
step per rollout: smaller minibatches cost RLOO twice the KL for the same training reward (16,000 tokens of one seed)."""

ASSISTANT = Suite(
    title="Following instructions: a learned reward, judged by a gold standard that no stage has seen",
    tasks={"assistant": ASSISTANT_TASK},
    agents=ASSISTANT_AGENTS,
    seeds=5,
    tokens=70_000,
    metrics=("sampled", "assistant", "wording"),
    bounded="gold",
    frontier=("reward", "gold"),
    columns=(
        "gold",
        "gold_unseen_wording",
        "win_rate",
        "labelers_win_rate",
        "reward",
        "kl",
        "length",
        "distinct_2",
        "lm_loss",
    ),
)

ARITHMETIC_TASK = Task(
    env="textenv/Arithmetic-v0", settings={"beta": 0.02}, evaluation={"split": "test"}, prompts=256, samples=8
)
ARITHMETIC_ROLLOUT: dict[str, Any] = {"episodes_per_update": 256, "minibatch_episodes": 256, "epochs": 4}
CAREFUL: dict[str, Any] = {"learning_rate": 3e-4}
"""Without a critic, PPO's rate of 1e-3 takes the first update 2 to 4 nats away, from 30% of sums right to below 13%. Eight other settings of
RLOO, Dr. GRPO and REINFORCE (rates to 1e-3, smaller minibatches, one to two epochs), tried on training prompts, ended between 35% and 46%."""

VERIFIABLE = Suite(
    title="Sums: the reward is whether the answer is right",
    tasks={"arithmetic": ARITHMETIC_TASK},
    agents={
        "PPO": Preset(agent="PPO", config=ARITHMETIC_ROLLOUT | {"learning_rate": 1e-3}, decay=False),
        "REINFORCE": Preset(agent="REINFORCE", config=CAREFUL | {"episodes_per_update": 256}, decay=False),
        "RLOO": Preset(agent="RLOO", config=ARITHMETIC_ROLLOUT | CAREFUL, group_size=8, decay=False),
        "GRPO-dr_grpo": Preset(
            agent="GRPO", config=ARITHMETIC_ROLLOUT | CAREFUL | {"variant": "dr_grpo"}, group_size=8, decay=False
        ),
        "BestOfN-8": Preset(agent="BestOfN", config={"n": 8}, trains=False),
        "Reference": REFERENCE,
        "RandomAgent": RANDOM,
    },
    seeds=5,
    tokens=70_000,
    metrics=("sampled", "pass_at"),
    bounded="reward",
    columns=("reward", "pass_at_8", "kl", "length", "distinct_2"),
)


# ---------------------------------------------------------------------- what a nat costs


def sweep(agents: Mapping[str, Preset], names: Sequence[str], betas: Sequence[float]) -> dict[str, Preset]:
    """These agents, once per beta."""
    return {
        f"{name} beta={beta:g}": replace(agents[name], env=dict(agents[name].env) | {"beta": beta})
        for name in names
        for beta in betas
    }


BETA_SWEEP = Suite(
    title="Reward against KL: what each agent makes of a nat, over the price of a nat",
    tasks={"assistant": ASSISTANT_TASK},
    agents=sweep(ASSISTANT_AGENTS, ("PPO", "RLOO"), (0.03, 0.1, 0.3, 1.0))
    | {name: ASSISTANT_AGENTS[name] for name in ("BestOfN-4", "BestOfN-16", "Reference")},
    seeds=3,
    tokens=40_000,
    metrics=("sampled", "assistant"),
    bounded="gold",
    frontier=("reward", "gold"),
    columns=("reward", "gold", "kl", "win_rate", "length"),
)

BETA_SWEEP_EXACT = Suite(
    title="Reward against KL over the price of a nat, beside the frontier that no policy can lie above",
    tasks={structure: tree(structure) for structure in ("random", "trap")},
    agents=sweep(PRESETS, ("PPO", "RLOO"), (0.2, 0.35, 0.5, 1.0, 2.0)),
    seeds=5,
    metrics=("exact",),
    headline="score",
    bounded="score",
    columns=("regret", "reward", "kl"),
)


# ---------------------------------------------------------------------- stable-baselines3, unmodified

SB3 = "benchmarks.factories:sb3"
SB3_PPO: dict[str, Any] = {"algorithm": "PPO", "gamma": 1.0, "n_steps": 16, "batch_size": 256, "n_epochs": 4}
DQN = Preset(
    agent=SB3,
    config={
        "algorithm": "DQN", "gamma": 1.0, "learning_rate": 2e-3, "batch_size": 128, "buffer_size": 10_000,
        "learning_starts": 1_000, "train_freq": 1, "target_update_interval": 500, "exploration_fraction": 0.5,
    },
    tokens=10_000,
    lanes=16,
    env={"kl": "reference"},
    decay=False,
    follows_j=False,
)  # fmt: skip
"""A greedy choice has log pi = 0, so what is left of the KL penalty is beta log ref, which the environment pays by itself."""

THIRD_PARTY = Suite(
    title="Agents of stable-baselines3 and sb3-contrib, unmodified, beside our own",
    tasks={structure: replace(tree(structure), first_task_seed=2000) for structure in ("random", "trap")},
    agents={
        "PPO": Preset(agent="PPO", config={"learning_rate": 2e-3, "minibatch_episodes": 64}, tokens=10_000, lanes=64),
        "A2C": Preset(
            agent="A2C", config={"learning_rate": 4e-3, "episodes_per_update": 128}, tokens=20_000, lanes=64
        ),
        "sb3 PPO": Preset(
            agent=SB3, config=SB3_PPO | {"learning_rate": 2e-3}, tokens=10_000, lanes=64, decay=False
        ),
        "sb3 A2C": Preset(
            agent=SB3,
            config={"algorithm": "A2C", "gamma": 1.0, "n_steps": 8, "learning_rate": 2e-3},
            tokens=20_000,
            lanes=64,
            decay=False,
        ),
        "sb3-contrib MaskablePPO": Preset(
            agent=SB3,
            config=SB3_PPO | {"library": "sb3_contrib", "algorithm": "MaskablePPO", "learning_rate": 2e-3},
            tokens=10_000,
            lanes=64,
            decay=False,
        ),
        "sb3-contrib TRPO": Preset(
            agent=SB3,
            config={
                "library": "sb3_contrib", "algorithm": "TRPO", "gamma": 1.0, "n_steps": 16, "batch_size": 1024,
                "target_kl": 0.1, "cg_max_steps": 3,
            },
            tokens=2_000,
            lanes=64,
            decay=False,
        ),
        "sb3 DQN": DQN,
        "sb3 DQN untrained": replace(DQN, trains=False),
        "Reference": REFERENCE,
    },
    seeds=5,
    metrics=("exact", "greedy"),
    headline="score",
    bounded="score",
    columns=("regret", "reward", "kl", "best_greedy_score"),
)  # fmt: skip
"""Not tuned on these tasks; TRPO is slow, so its runs are short. Agents with our language model as their policy start as the
`Reference`, DQN as the untrained one."""

THIRD_PARTY_TEXT = Suite(
    title="What PPO of stable-baselines3, unmodified, gains on held-out requests",
    tasks={"assistant": ASSISTANT_TASK},
    agents={
        "sb3 PPO": Preset(
            agent=SB3,
            config=SB3_PPO | {"n_steps": 32, "n_epochs": 1, "learning_rate": 4e-4},
            lanes=64,
            decay=False,
        ),
        "Reference": REFERENCE,
    },
    seeds=5,
    tokens=30_000,
)
"""The `Reference` is the agent before training: it answers the same prompts."""


# ---------------------------------------------------------------------- others

TINY_TREE = {"vocab_size": 3, "horizon": 3}

SMOKE = Suite(
    title="Everything once, small: shows that it runs, not how good anything is",
    tasks={
        "tree": tree("random", **TINY_TREE),
        "arithmetic": replace(ARITHMETIC_TASK, prompts=16, samples=2),
        "assistant": replace(ASSISTANT_TASK, prompts=16),
    },
    agents={
        "PPO": Preset(agent="PPO", config={"episodes_per_update": 32}, lanes=32),
        "RLOO": Preset(agent="RLOO", config={"episodes_per_update": 32}, lanes=32, group_size=4),
        "BestOfN": Preset(agent="BestOfN", config={"n": 4}, trains=False),
        "Reference": REFERENCE,
    },
    seeds=2,
    tokens=300,
    metrics=("sampled", "exact", "assistant", "pass_at"),
)

SUITES: dict[str, Suite] = {
    "smoke": SMOKE,
    "exact": EXACT,
    "assistant": ASSISTANT,
    "verifiable": VERIFIABLE,
    "beta-sweep": BETA_SWEEP,
    "beta-sweep-exact": BETA_SWEEP_EXACT,
    "third-party": THIRD_PARTY,
    "third-party-text": THIRD_PARTY_TEXT,
    "custom": Suite(title="Your tasks and agents, from the command line", tasks={}, agents={}),
}
"""What `textenv bench` knows by name."""
