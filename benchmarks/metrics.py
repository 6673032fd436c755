"""What is measured of an agent after its run. A metric of your own is a function of the same kind: (Answers) -> figures.

All agents answer the same prompts. Figures that do not apply to a task are left away.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:  # reports do without torch
    from textenv.ledger import Episodes

BETAS = np.logspace(-3, 3, 400)
"""Of the frontier that no policy can lie above, reward per nat."""
DRAWN_BETAS = np.logspace(-1.3, 1.5, 25)
"""Of the part of it that is drawn."""

LOWER_IS_BETTER = frozenset(
    {
        "regret",
        "kl_to_optimum",
        "false_facts",
        "rude",
        "over_refusal",
        "lm_loss",
        "failed",
        "optimality_gap",
        "cost_of_wording",
    }
)
NEITHER = frozenset({"kl", "length", "words"})
"""What is described and not judged: a KL is the price of a reward, which `objective` counts."""
OF_THE_TASK = frozenset(
    {"beta", "optimum", "optimum_reward", "optimum_kl", "reward_reference", "frontier_reward", "best_greedy_score"}
)
"""What is no figure of the agent."""


@dataclass(frozen=True)
class Answers:
    """An agent and what it answers; drawn when it is first asked for."""

    agent: Any
    env_id: str
    lanes: Any
    """The evaluation's environment, unwrapped."""
    split: str | None
    prompt_ids: NDArray[np.int64]
    """Rows of its prompts, each as often as it is answered. Shape: (B,)."""
    samples: int
    """Answers per prompt."""
    seed: int
    """Of sampling."""
    elsewhere: Callable[[str], Answers] | None = None
    """The same agent's answers on another split of the task."""

    @cached_property
    def episodes(self) -> Episodes:
        """One per prompt id. Shape: (B,)."""
        return self.answer(self.agent)

    @cached_property
    def texts(self) -> list[str]:
        """The answers."""
        return list(self.lanes.completions(self.episodes))

    @cached_property
    def reference_texts(self) -> list[str]:
        """What the model that training starts from answers, with the same seed."""
        from agents.base import LanguageModelAgent

        reference = LanguageModelAgent(self.lanes, seed=self.seed)
        return list(self.lanes.completions(self.answer(reference)))

    @property
    def kl(self) -> float:
        """To the reference, nats per answer; a bound where the agent only knows one (`BestOfN`), nan without a policy."""
        bound = getattr(self.agent, "kl_bound", None)
        return float(np.mean(self.episodes.kl)) if bound is None else float(bound)

    def answer(self, agent: Any) -> Episodes:
        """Any agent's answers to these prompts."""
        from agents.rollout import run_prompts

        policy = getattr(agent, "policy", None)
        if hasattr(policy, "log_probs"):
            self.lanes.attach_policy(policy, pay=False)
        if hasattr(agent, "set_random_seed"):
            agent.set_random_seed(self.seed)
        return run_prompts(agent, self.lanes, self.prompt_ids)


def sampled(answers: Answers) -> dict[str, float]:
    """Reward, KL and language of the answers."""
    episodes = answers.episodes
    tokens = [
        row[start : start + n].tolist()
        for row, start, n in zip(episodes.tokens, episodes.prompt_length, episodes.response_length, strict=True)
    ]
    reward = float(np.mean(episodes.task_reward))
    return {
        "objective": reward - float(answers.lanes.kl.beta) * answers.kl,
        "reward": reward,
        "kl": answers.kl,
        "beta": float(answers.lanes.kl.beta),
        "length": float(np.mean(episodes.response_length)),
        "finished": float(np.mean(episodes.finish_reason == "stop")),
        "distinct_1": distinct(tokens, 1),
        "distinct_2": distinct(tokens, 2),
    }


def distinct(texts: Sequence[Sequence[int]], n: int) -> float:
    """Different n-grams as a share of all n-grams (Li et al., 2016, https://arxiv.org/abs/1510.03055); nan if there are none."""
    grams = Counter(tuple(text[i : i + n]) for text in texts for i in range(len(text) - n + 1))
    return len(grams) / grams.total() if grams else float("nan")


def exact(answers: Answers) -> dict[str, float]:
    """Where the optimum is known: what the agent is worth, exactly, and what no policy of its KL can exceed."""
    lanes = answers.lanes
    return exact_figures(lanes, policy_of(answers.agent)) if hasattr(lanes, "solve") else {}


def policy_of(agent: Any) -> Any:
    """What an environment can evaluate or attach: the agent's distribution over completions where it is known, or its policy."""
    if hasattr(agent, "completion_log_probs"):
        return agent.completion_log_probs()
    policy = getattr(agent, "policy", None)
    if hasattr(policy, "log_probs"):
        return policy
    if policy is None:
        raise ValueError(
            f"The exact score is that of a policy, and {type(agent).__name__} has no `policy` with `log_probs` (or `log_probs_all`): give it "
            "one, or measure its answers only (a suite with metrics=('sampled',))."
        )
    from agents.sb3 import as_policy

    return as_policy(agent)


def exact_figures(lanes: Any, policy: Any) -> dict[str, float]:
    """The exact figures of a policy."""
    result, best = asdict(lanes.evaluate(policy)), lanes.solve()
    at_best = lanes.evaluate(best.policy)
    return result | {
        "beta": float(lanes.kl.beta),
        "optimum": best.value,
        "optimum_reward": at_best.reward,
        "optimum_kl": at_best.kl,
        "reward_reference": float(np.exp(lanes.leaves.log_ref) @ lanes.leaves.rewards),
        "frontier_reward": float(lanes.frontier(BETAS).bound(result["kl"])),
    }


def greedy(answers: Answers) -> dict[str, float]:
    """The best score of a policy that says one completion always, as `DQN`'s does: its KL is -log ref of that completion."""
    lanes = answers.lanes
    if not hasattr(lanes, "solve"):
        return {}
    leaves = lanes.leaves
    floor = float(np.exp(leaves.log_ref) @ leaves.rewards)
    best = float((leaves.rewards + lanes.kl.beta * leaves.log_ref).max())
    return {"best_greedy_score": (best - floor) / (lanes.solve().value - floor)}


def pass_at(answers: Answers) -> dict[str, float]:
    """Share of prompts with a right answer (reward 1) among k, which narrowing to one way of answering lowers."""
    if answers.samples < 2:
        return {}
    solved = (answers.episodes.task_reward >= 1).reshape(-1, answers.samples)
    return {f"pass_at_{answers.samples}": float(solved.any(axis=1).mean())}


def assistant(answers: Answers) -> dict[str, float]:
    """The Assistant world's gold standard and held-out labelers, against the model that training started from."""
    if not answers.env_id.startswith("textenv/Assistant-"):
        return {}
    from scipy.stats import binomtest

    from benchmarks.instructgpt import against, labelers_prefer, measures, neutral_loss
    from textenv.tasks.assistant.gold import judge
    from textenv.tasks.assistant.task import requests_of

    known = requests_of(answers.split or "train")
    requests = [known[i] for i in answers.prompt_ids]
    verdicts = [judge(*pair) for pair in zip(requests, answers.texts, strict=True)]
    theirs = np.asarray([judge(*pair).total for pair in zip(requests, answers.reference_texts, strict=True)])
    versus = against(np.asarray([verdict.total for verdict in verdicts]), theirs)
    preferred = labelers_prefer(requests, answers.texts, answers.reference_texts, seed=answers.seed)
    n = len(requests)
    interval = binomtest(round(preferred * n), n).proportion_ci(method="wilson")  # too wide where texts are equal
    figures = measures(requests, verdicts) | {
        "win_rate": (1 + versus["net_win_rate"]) / 2,
        "win_rate_low": (1 + versus["net_win_interval"][0]) / 2,
        "win_rate_high": (1 + versus["net_win_interval"][1]) / 2,
        "labelers_win_rate": preferred,
        "labelers_win_rate_low": interval.low,
        "labelers_win_rate_high": interval.high,
    }
    model = getattr(getattr(answers.agent, "policy", None), "model", None)
    return figures | ({} if model is None else {"lm_loss": neutral_loss(model)})


def wording(answers: Answers) -> dict[str, float]:
    """Sensitivity to paraphrase: gold on test requests in wordings that no stage has seen, and by how much it is lower.

    The requests are others than those of the evaluation, from the same families: the difference is unpaired.
    """
    if not answers.env_id.startswith("textenv/Assistant-") or answers.elsewhere is None:
        return {}
    from textenv.tasks.assistant.gold import judge
    from textenv.tasks.assistant.task import requests_of

    def score(of: Answers) -> float:
        known = requests_of(of.split or "train")
        return float(np.mean([judge(known[i], text).total for i, text in zip(of.prompt_ids, of.texts, strict=True)]))

    unseen = score(answers.elsewhere("test_paraphrases"))
    return {"gold_unseen_wording": unseen, "cost_of_wording": score(answers) - unseen}


METRICS: Mapping[str, Callable[[Answers], dict[str, float]]] = {
    "sampled": sampled,
    "exact": exact,
    "greedy": greedy,
    "pass_at": pass_at,
    "assistant": assistant,
    "wording": wording,
}
"""Name -> group. Where two have a figure of the same name, the later one of a suite's list counts."""


def direction(metric: str, lower_is_better: Sequence[str] = ()) -> int:
    """1 if more of it is better, -1 if less is, 0 if neither."""
    if metric in NEITHER | OF_THE_TASK or metric.endswith(("_low", "_high")):
        return 0
    return -1 if metric in LOWER_IS_BETTER or metric in lower_is_better else 1
