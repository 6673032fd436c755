"""Implicit language Q-learning: values from a fixed data set, and a policy that leans on them when it decodes.

Snell et al. (2022), https://arxiv.org/abs/2206.11871; Kostrikov et al. (2021), https://arxiv.org/abs/2110.06169; the losses as in
https://github.com/CarperAI/trlx.

    Q loss      (Q_i(s, a) - r - gamma V(s'))^2, i = 1, 2                  V loss    |tau - 1[u < 0]| u^2,  u = min_i Qbar_i(s, a) - V(s)
    CQL loss    -log softmax(Q_i(s, .))[a]                                 AWAC loss -exp(awac_beta u) log pi(a|s)
    acts by     log pi(a|s) + advantage_weight (min_i Qbar_i(s, a) - V(s)),  normalised

Offline: the data are completions of the reference, drawn through the environment within the token budget, and no token
is ever drawn from the policy that is learnt. Qbar are slow copies of the Q heads. The distribution of the last line is one
object: it acts, it is scored and evaluated, its KL is what the environment reports; where it starts, Q = V = 0, it is the
reference.

What it tends to: with tau = 0.5 V is the reference's own value and the policy improves on it by one step; as tau goes to 1
V nears the best completion in the data. The optimum of r - beta KL has another mean in their place, beta log E_ref[exp(Q /
beta)], so the fixed point is not V*, except on one-token episodes with advantage_weight = 1 / beta and cql_coef = 0, where no
V is passed on: there it is the optimum. CQL's term shifts Q towards the log-frequency of the data, which sharpens the
policy even where all rewards are equal. gamma = 0.99 in the paper; 1 here, since the closed form of the optimum needs
it, and a token budget bounds every return.

Differences from the paper: 1) gamma is 1 2) advantage_weight is 1 / the environment's beta by default, not tuned 3) Q and V share
the policy's trunk (as in trlx; the paper has a model of its own for pi) 4) the data set grows while training goes on, so that
N tokens and N more are 2N; the data's distribution stays the reference's 5) heads start at 0.

Run: textenv train ILQL textenv/Tree-v0 --seed 0
"""

from __future__ import annotations

import copy
from collections import defaultdict
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from agents.base import AgentConfig, LanguageModelAgent, MaybeCallback
from agents.policy import Policy
from agents.rollout import collect
from textenv.ledger import Episodes
from textenv.lm import LanguageModel, response_index
from textenv.sampling import log_prob


@dataclass(frozen=True, kw_only=True)
class ILQLConfig(AgentConfig):
    """Settings of ILQL."""

    episodes_per_update: int = 128
    """B: episodes added to the data per iteration."""
    minibatch_episodes: int = 64
    """Episodes per gradient step, drawn from all data so far."""
    gradient_steps: int = 16
    """Gradient steps per iteration."""
    gamma: float = 1.0
    """Discount per token. 0.99 in the paper; only 1 fits a KL-penalised return."""
    expectile: float = 0.7
    """tau: 0.5 is the mean over the data's actions, 1 the best of them."""
    cql_coef: float = 0.1
    """Weight of the conservative term."""
    awac_coef: float = 1.0
    """Weight of the imitation term, which keeps log pi on the data."""
    awac_beta: float = 0.0
    """Imitated actions are weighted by exp(awac_beta (Q - V)), per reward: 0 imitates all alike, as trlx does by default."""
    polyak: float = 0.05
    """Share of the Q heads that goes into their slow copies at each step. 0.001 in trlx, for runs of many more steps."""
    advantage_weight: float | None = None
    """The paper's beta: nats per reward by which advantages tilt the policy. None: 1 / the environment's KL coefficient."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rollout_dtype is not None:
            raise ValueError(
                f"Expected rollout_dtype=None, got {self.rollout_dtype!r}: ILQL writes by heads on the policy's own states. Leave it out."
            )
        for name in ("episodes_per_update", "minibatch_episodes", "gradient_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"Expected {name} >= 1, got {getattr(self, name)!r}.")
        for name in ("cql_coef", "awac_coef", "awac_beta"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"Expected {name} >= 0, got {getattr(self, name)!r}.")
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"Expected gamma between 0 and 1, got {self.gamma!r}.")
        if not 0 < self.expectile < 1:
            raise ValueError(
                f"Expected expectile between 0 and 1, ends excluded, got {self.expectile!r}: 0.5 is the mean."
            )
        if not 0 < self.polyak <= 1:
            raise ValueError(f"Expected 0 < polyak <= 1, got {self.polyak!r}: at 0 the slow copies never move.")
        if self.advantage_weight is not None and not self.advantage_weight >= 0:
            raise ValueError(f"Expected advantage_weight >= 0 or None, got {self.advantage_weight!r}.")


@dataclass(frozen=True)
class Dataset:
    """Episodes as they are learnt from.

    Attributes:
        tokens: Prompt, response, padding V. Shape: (D, L).
        prompt_length: Shape: (D,).
        response_length: Shape: (D,).
        rewards: Of each token, 0 after a response's end. Shape: (D, T).
        cut: Whether a wrapper has ended the episode: what its last token led to is unknown. Shape: (D,).
    """

    tokens: NDArray[np.int64]
    prompt_length: NDArray[np.int64]
    response_length: NDArray[np.int64]
    rewards: NDArray[np.float64]
    cut: NDArray[np.bool_]


class Heads(nn.Module):
    """Two Q heads with their slow copies, and a V head, on the trunk's hidden states.

    Args:
        width: d.
        vocab_size: V.
        seed: Of the hidden layers; outputs start at 0, so the policy starts as the reference.
    """

    def __init__(self, width: int, vocab_size: int, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.q = nn.ModuleList(_head(width, vocab_size) for _ in range(2))
            self.v = _head(width, 1)
        self.slow_q = copy.deepcopy(self.q).requires_grad_(False)

    def advantages(self, hidden: torch.Tensor) -> torch.Tensor:
        """min_i Qbar_i(s, .) - V(s). Shape: (M, d) -> (M, V)."""
        return torch.minimum(self.slow_q[0](hidden), self.slow_q[1](hidden)) - self.v(hidden)

    @torch.no_grad()
    def follow(self, share: float) -> None:
        """Move the slow copies towards the Q heads by this share of the way."""
        for slow, fast in zip(self.slow_q.parameters(), self.q.parameters(), strict=True):
            slow.lerp_(fast, share)


class TiltedLanguageModel(LanguageModel):
    """A language model whose logits lean towards actions of high advantage, wherever they are asked for.

    Args:
        lm: The model and its behaviour.
        heads: Advantages from hidden states.
        weight: Nats per reward.
    """

    def __init__(self, lm: LanguageModel, heads: Heads, weight: float) -> None:
        super().__init__(lm.model, lm.max_tokens, lm.behaviour, check=lm.check, cached=lm.cached)
        self.heads, self.weight = heads, weight

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Raw logits and tilt. Shape: (M, d) -> (M, V)."""
        # `behaviour` divides by the temperature after this, and log pi is meant to be the policy under it.
        tilt = self.weight * self.behaviour.temperature * self.heads.advantages(hidden.float())
        return super().head(hidden) + tilt


class ILQL(LanguageModelAgent):
    """Offline Q-learning on completions of the reference.

    A checkpoint's `policy/` holds log pi; the heads are in `critic.safetensors`, and the data in `trainer.pt`.

    Args:
        env: A textenv vector environment.
        kwargs: See `LanguageModelAgent`; further keywords are fields of `ILQLConfig`.

    Example:
        >>> agent = ILQL(gym.make_vec("textenv/Arithmetic-v0", num_envs=64), seed=0)
        >>> agent.learn(total_timesteps=50_000)
    """

    Config = ILQLConfig
    config: ILQLConfig
    kl_placement = "none"

    def __init__(self, env: Any, **kwargs: Any) -> None:
        super().__init__(env, **kwargs)
        self.adam = self.optimizer(self.heads.q, self.heads.v)
        self.collector = Policy(self.lanes.reference)
        self.data: list[Dataset] = []

    def make_policy(self) -> Policy:
        """Log pi + advantage_weight (Q - V), starting as the reference."""
        weight, beta = self.config.advantage_weight, self.lanes.kl.beta
        if weight is None and not beta > 0:
            raise ValueError(
                f"advantage_weight=None means 1 / the environment's KL coefficient, which is {beta}: pass ILQL(env, advantage_weight=...), "
                "or make the environment with beta > 0."
            )
        policy = super().make_policy()
        width = policy.model.get_output_embeddings().weight.shape[1]
        self.heads = Heads(width, self.lanes.vocab_size, int(self.rng.integers(2**31))).to(policy.lm.device)
        self.plain = policy.lm  # log pi: the same network, not tilted
        policy.lm = TiltedLanguageModel(self.plain, self.heads, 1 / beta if weight is None else weight)
        return policy

    def learn(self, total_timesteps: int, callback: MaybeCallback = None, progress_bar: bool = False) -> Self:
        """Train until `total_timesteps` more tokens have been drawn from the reference (the last rollout is finished)."""
        with self.start_learning(total_timesteps, callback, progress_bar) as session:
            self.lanes.attach_policy(self.collector, pay=False)  # what acts meanwhile, so rollouts report its KL: 0
            try:
                while session.more():
                    size = self.config.episodes_per_update
                    episodes = collect(self.env, self.collector, size, self.rng, session.on_step)
                    session.rollout_done(episodes)
                    self.add(episodes)
                    self.update()
                    session.iteration_done()
            finally:
                self.attach_to_env()
        return self

    def add(self, episodes: Episodes) -> None:
        """Put episodes into the data."""
        cut = episodes.finish_reason == "truncated"
        lengths = episodes.prompt_length, episodes.response_length
        self.data.append(Dataset(episodes.tokens, *lengths, episodes.rewards, cut))

    def update(self) -> None:
        """Improve Q, V and log pi on minibatches of all data."""
        cfg, heads, device = self.config, self.heads, self.policy.lm.device
        figures: dict[str, list[float]] = defaultdict(list)
        for _ in range(cfg.gradient_steps):
            batch = self.minibatch()
            part = batch.tokens, batch.prompt_length, batch.response_length
            hidden = self.plain.response_hidden(*part)  # at M tokens, episodes back to back
            logits, actions = self.plain.response_logits(hidden, *part)
            row, column = response_index(batch.prompt_length, batch.response_length)
            step = column - batch.prompt_length[row] + 1
            last = step == batch.response_length[row] - 1
            rewards = torch.from_numpy(batch.rewards[row, step]).to(device, torch.float32)
            known = torch.from_numpy(~(last & batch.cut[row])).to(device)

            hidden = hidden.float()
            values = heads.v(hidden).squeeze(-1)
            next_values = values.detach().roll(-1) * torch.from_numpy(~last).to(device)
            qs = [head(hidden) for head in heads.q]
            with torch.no_grad():
                slow = [head(hidden).gather(-1, actions[:, None]).squeeze(-1) for head in heads.slow_q]
            target = torch.minimum(*slow)

            losses = {
                "q_loss": torch.stack([td_loss(q, actions, rewards, next_values, known, cfg.gamma) for q in qs]).sum(),
                "value_loss": expectile_loss(values, target, cfg.expectile),
                "cql_loss": torch.stack([conservative_loss(q, actions) for q in qs]).sum(),
                "awac_loss": awac_loss(log_prob(logits, actions), target - values.detach(), cfg.awac_beta),
            }
            loss = losses["q_loss"] + losses["value_loss"]
            loss = loss + cfg.cql_coef * losses["cql_loss"] + cfg.awac_coef * losses["awac_loss"]
            loss.backward()
            figures["grad_norm"].append(self.apply_gradients(self.adam))
            heads.follow(cfg.polyak)
            self.accounts["gradient_tokens"] += len(actions)
            for name, value in losses.items():
                figures[name].append(value.item())
            figures["value"].append(values.mean().item())
        self.policy.invalidate()  # the slow copies have moved once more
        for name, seen in figures.items():
            self.logger.record(f"train/{name}", float(np.mean(seen)))
        self.logger.record("train/data_episodes", sum(len(part.tokens) for part in self.data))
        self.logger.record("train/learning_rate", self.adam.param_groups[0]["lr"])

    def minibatch(self) -> Dataset:
        """Episodes drawn uniformly from all data, with replacement."""
        ends = np.cumsum([len(part.tokens) for part in self.data])
        drawn = np.sort(self.rng.integers(ends[-1], size=self.config.minibatch_episodes))
        which = np.searchsorted(ends, drawn, side="right")
        picked = [(self.data[k], drawn[which == k] - (ends[k] - len(self.data[k].tokens))) for k in np.unique(which)]
        columns = {
            name: np.concatenate([vars(part)[name][rows] for part, rows in picked]) for name in vars(self.data[0])
        }
        return Dataset(**columns)

    # ------------------------------------------------------------------ checkpoints

    def trained_modules(self) -> dict[str, torch.nn.Module]:
        """Without the heads the policy is another one."""
        return {"heads": self.heads}

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """One Adam for log pi, Q and V."""
        return {"adam": self.adam}

    def _progress(self) -> dict[str, Any]:
        """The data too: a resumed run goes on learning from all of them."""
        data = [{name: torch.from_numpy(column) for name, column in vars(part).items()} for part in self.data]
        return super()._progress() | {"data": data}

    def _restore_progress(self, state: dict[str, Any]) -> None:
        super()._restore_progress(state)
        self.data = [Dataset(**{name: column.numpy() for name, column in part.items()}) for part in state["data"]]


def _head(width: int, outputs: int) -> nn.Sequential:
    """A head of one hidden layer, as in trlx, whose output starts at 0."""
    out = nn.Linear(2 * width, outputs)
    nn.init.zeros_(out.weight)
    nn.init.zeros_(out.bias)
    return nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), out)


def td_loss(
    q: torch.Tensor,
    actions: torch.Tensor,
    rewards: torch.Tensor,
    next_values: torch.Tensor,
    known: torch.Tensor,
    gamma: float,
) -> torch.Tensor:
    """Squared error of Q(s, a) to `r + gamma V(s')`: mean over the tokens whose outcome is known.

    Args:
        q: Of every action. Shape: (M, V).
        actions: Shape: (M,).
        rewards: Shape: (M,).
        next_values: V(s'), 0 where the episode has ended. Shape: (M,).
        known: False at the last token of an episode that a wrapper has cut. Shape: (M,).
        gamma: Discount.

    Returns:
        Shape: ().
    """
    error = q.gather(-1, actions[:, None]).squeeze(-1) - rewards - gamma * next_values
    return (error**2 * known).sum() / known.sum().clamp(min=1)


def expectile_loss(values: torch.Tensor, targets: torch.Tensor, expectile: float) -> torch.Tensor:
    """Squared error, weighted tau where the target lies above and 1 - tau below: mean. Shapes: (M,), (M,) -> ()."""
    error = targets - values
    return (torch.where(error < 0, 1 - expectile, expectile) * error**2).mean()


def conservative_loss(q: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
    """CQL's term: cross-entropy of softmax(Q) at the data's actions, mean. Shapes: (M, V), (M,) -> ()."""
    return nn.functional.cross_entropy(q, actions)


def awac_loss(log_probs: torch.Tensor, advantages: torch.Tensor, beta: float) -> torch.Tensor:
    """Imitation, weighted by exp(beta A): mean over tokens that can be drawn. Shapes: (M,), (M,) -> ()."""
    kept = torch.isfinite(log_probs)
    weights = torch.exp(beta * advantages)
    return -torch.where(kept, weights * log_probs, 0.0).sum() / kept.sum().clamp(min=1)
