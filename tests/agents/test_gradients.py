"""Which way each agent goes: its expected gradient, by enumerating every batch it could draw, without a sample.

The agent's own `update` is run on every possible batch of one prompt (every completion, every pair, every triple), and
the gradients it would take are averaged with the probabilities of the batches. What that average should be comes from
plain forward passes and autograd on a closed form: J = sum_y p(y) (r(y) - beta (log p(y) - log ref(y))).
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from agents.a2c import A2C
from agents.advantages import aggregate, kl_terms, leave_one_out, returns_to_go
from agents.grpo import GRPO
from agents.nlpo import NLPO
from agents.ppo import PPO
from agents.reinforce import REINFORCE
from agents.rloo import RLOO, clipped_sequence_loss
from textenv.env import TextVectorEnv
from textenv.ledger import Episodes
from textenv.task import build_task

from .world import build_model, plain_logits, word_tokenizer

BETA, VOCAB, HORIZON = 0.5, 3, 2
FIXED, STOPPING = (), (0,)
"""Nine completions of two tokens; or seven, which the first token may end."""


def completions(stops):
    full = [c for n in range(1, HORIZON + 1) for c in itertools.product(range(VOCAB), repeat=n)]
    ends = [c for c in full if len(c) == HORIZON or c[-1] in stops]
    return [c for c in ends if not any(token in stops for token in c[:-1])]


def task_reward(prompts, completions, completion_ids, **columns):
    """Something without structure."""
    return [float(np.sin(3 * ids[0] + 7 * ids[-1] + len(ids))) for ids in completion_ids]


# ---------------------------------------------------------------------- every batch that an agent could draw


def take(episodes, rows):
    """Some episodes as a batch of their own."""
    names = [field.name for field in fields(Episodes) if field.name not in ("order", "components")]
    columns = {name: getattr(episodes, name)[list(rows)] for name in names}
    return Episodes(order=np.arange(len(rows)), components={}, **columns)


@dataclass
class World:
    """An agent in double precision whose policy has left its reference, and every episode it could run."""

    agent: Any
    responses: list[tuple[int, ...]]
    episodes: Episodes | None
    model: Any  # the policy's
    reference: Any
    prompt: Any

    def parameters(self):
        return list(self.agent.policy.parameters())

    def tables(self, model):
        """Log-probabilities of every token before every token of every completion. Shapes: (n, V) each."""
        prompt = self.prompt
        return [plain_logits(model, np.array([*prompt, *y]), len(prompt)).log_softmax(-1) for y in self.responses]

    def log_probs(self, model):
        """log p(y). Shape: (Y,)."""
        tables = self.tables(model)
        return torch.stack([t[range(len(y)), y].sum() for t, y in zip(tables, self.responses, strict=True)])

    @property
    def rewards(self):
        return torch.tensor(task_reward(None, None, self.responses), dtype=torch.float64)

    @property
    def lengths(self):
        return torch.tensor([len(y) for y in self.responses], dtype=torch.float64)

    def gradient(self, objective, keep=False):
        return torch.cat([g.flatten() for g in torch.autograd.grad(objective, self.parameters(), retain_graph=keep)])

    def objective(self, beta=BETA):
        """J in closed form."""
        log_p, log_ref = self.log_probs(self.model), self.log_probs(self.reference).detach()
        assert log_p.exp().sum().item() == pytest.approx(1.0)  # nothing has been left out
        return (log_p.exp() * (self.rewards - beta * (log_p - log_ref))).sum()

    def batches(self, size, log_p=None):
        """Every batch (the order does not matter), and how probable it is."""
        p = (self.log_probs(self.model).detach() if log_p is None else log_p).exp().tolist()
        for rows in itertools.combinations_with_replacement(range(len(p)), size):
            ways = math.factorial(size) // math.prod(math.factorial(n) for n in Counter(rows).values())
            yield rows, ways * math.prod(p[i] for i in rows)

    def expected_gradient(self, size, before=lambda agent: None, log_p=None, **kwargs):
        """Minus the gradient of the step that `update` takes, averaged over all batches. A skipped step counts as 0.

        Batches are drawn from the policy, or from completions of log-probabilities `log_p`.
        """
        agent, taken = self.agent, []

        def note(optimizer):
            taken.append(torch.cat([q.grad.flatten() for q in self.parameters()]).clone())
            optimizer.zero_grad()
            return 0.0

        agent.apply_gradients = note
        total, mass = 0.0, 0.0
        for rows, probability in self.batches(size, log_p):
            before(agent)
            agent.update(take(self.episodes, rows), **kwargs)
            assert len(taken) <= 1
            total, mass = total - probability * taken.pop() if taken else total, mass + probability
        assert mass == pytest.approx(1.0)
        return total


def build(cls, stops=STOPPING, size=1, temperature=1.0, **config):
    """A world for an agent that updates on `size` completions at a time."""
    reference = build_model("gpt2", vocab_size=VOCAB, width=8, layers=1, resid_pdrop=0.3, embd_pdrop=0.3).double()
    task = build_task(
        reference, ["a b a"], task_reward, tokenizer=word_tokenizer(["a", "b"]), max_new_tokens=HORIZON, stop_tokens=stops
    )  # fmt: skip
    responses = completions(stops)
    envs = TextVectorEnv(size, task, beta=BETA, temperature=temperature, group_size=size if cls.needs_groups else 1)
    batch = {"minibatch_episodes": size} if hasattr(cls.Config, "minibatch_episodes") else {}
    agent = cls(envs, seed=0, **({"episodes_per_update": size, "max_grad_norm": 1e9} | batch | config))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in agent.policy.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    if hasattr(agent, "critic"):  # whatever the critic says: a baseline of the state changes nothing in expectation
        torch.nn.init.normal_(agent.critic.head.weight, generator=generator)
    world = World(agent, responses, None, agent.policy.model, reference, task.prompts.token_ids[0])
    if cls is not NLPO:  # which cannot draw them all
        world.episodes = play(world, responses)
    return world


def play(world, responses):
    """Each response once, through the environment."""
    lanes = world.agent.lanes
    envs = TextVectorEnv(len(responses), lanes.task, beta=BETA, temperature=lanes.behaviour.temperature)
    envs.attach_policy(world.agent.policy, pay=world.agent.kl_placement == "reward")
    with envs.deferred(episodes=len(responses)) as ledger:
        envs.reset()
        step = 0
        while not ledger.done:
            envs.step(np.array([y[min(step, len(y) - 1)] for y in responses]))
            step += 1
    assert [tuple(e.tokens[e.prompt_length :]) for e in ledger.episodes] == list(responses)
    return ledger.episodes


def relative_error(ours, exact):
    return ((ours - exact).norm() / exact.norm()).item()


# ---------------------------------------------------------------------- agents that follow J

ACTOR_CRITIC = {"gae_lambda": 1.0, "vf_coef": 0.0, "whiten_advantages": False}
PPO_SETTINGS = ACTOR_CRITIC | {"epochs": 1, "target_kl": None, "warmup_iterations": 0}


@pytest.mark.parametrize("stops", [FIXED, STOPPING], ids=["fixed length", "with a stop token"])
@pytest.mark.parametrize(
    ("cls", "size", "config", "factor"),
    [
        (A2C, 1, ACTOR_CRITIC, 1 / HORIZON),
        (A2C, 2, ACTOR_CRITIC, 1 / HORIZON),
        (REINFORCE, 1, {"baseline": "none"}, 1 / HORIZON),
        (REINFORCE, 2, {"baseline": "batch_mean"}, 1 / 2 / HORIZON),
        (REINFORCE, 3, {"baseline": "batch_mean"}, 2 / 3 / HORIZON),
        (RLOO, 2, {}, 1.0),
        (RLOO, 3, {"clip_range": None}, 1.0),
        (RLOO, 2, {"kl_placement": "loss", "kl_estimator": "k2"}, 1.0),
        (RLOO, 2, {"kl_placement": "loss", "kl_estimator": "ratio_k3"}, 1.0),
        (GRPO, 2, {"variant": "dr_grpo"}, 1 / 2 / HORIZON),
        (GRPO, 3, {"variant": "dr_grpo"}, 2 / 3 / HORIZON),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_the_expected_gradient_is_that_of_the_objective(cls, size, config, factor, stops):
    world = build(cls, stops, size, **config)
    assert relative_error(world.expected_gradient(size), factor * world.gradient(world.objective())) < 1e-5


@pytest.mark.parametrize(
    ("cls", "size", "config", "factor"),
    [
        (A2C, 1, ACTOR_CRITIC, 1 / HORIZON),
        (REINFORCE, 1, {"baseline": "none"}, 1 / HORIZON),
        (REINFORCE, 3, {"baseline": "batch_mean"}, 2 / 3 / HORIZON),
        (REINFORCE, 1, {"baseline": "none", "kl_placement": "loss", "kl_estimator": "k2"}, 1 / HORIZON),
        (RLOO, 2, {}, 1.0),
        (RLOO, 2, {"kl_placement": "loss", "kl_estimator": "ratio_k3"}, 1.0),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_completions_of_a_rounded_copy_are_weighed_to_the_gradient_of_the_policy(cls, size, config, factor):
    """They are drawn by probabilities that are off by percents; the gradient is not."""
    world = build(cls, STOPPING, size, rollout_dtype="bfloat16", **config)
    drawn = torch.from_numpy(world.episodes.log_probs.sum(axis=1))
    log_p, log_ref = world.log_probs(world.model), world.log_probs(world.reference).detach()
    assert drawn.exp().sum().item() == pytest.approx(1.0, abs=1e-5)
    assert (drawn - log_p).abs().max() > 5e-3
    if "kl_placement" in config and cls is REINFORCE:  # its k2 of tokens follows the KL of visited states
        tables = zip(world.tables(world.model), world.tables(world.reference), strict=True)
        kl = torch.stack([(p.exp() * (p - r.detach())).sum() for p, r in tables])
        goal = (log_p.exp() * world.rewards).sum() - BETA * (log_p.detach().exp() * kl).sum()
    else:
        paid = drawn if "kl_placement" not in config else log_p
        goal = (log_p.exp() * (world.rewards - BETA * (paid - log_ref))).sum()
    exact = factor * world.gradient(goal)
    assert relative_error(world.expected_gradient(size, log_p=drawn), exact) < 1e-5


def test_ppo_does_too():
    """It takes the mean over tokens, a constant where all completions are of one length. (Others: see test_ppo.py.)"""
    world = build(PPO, FIXED, 1, **PPO_SETTINGS)
    assert relative_error(world.expected_gradient(1), world.gradient(world.objective()) / HORIZON) < 1e-5


@pytest.mark.parametrize("stops", [FIXED, STOPPING], ids=["fixed length", "with a stop token"])
def test_a_moving_average_of_earlier_returns_changes_nothing_in_expectation(stops):
    world = build(REINFORCE, stops, 1, baseline="moving_average")

    def remember(agent):
        agent.average.total.fill_(0.9)
        agent.average.weight.fill_(0.5)

    ours = world.expected_gradient(1, before=remember)
    assert relative_error(ours, world.gradient(world.objective()) / HORIZON) < 1e-5


@pytest.mark.parametrize("stops", [FIXED, STOPPING], ids=["fixed length", "with a stop token"])
def test_nor_does_the_greedy_completion(stops):
    world = build(REINFORCE, stops, 1, baseline="greedy")
    greedy = world.agent.greedy_returns(take(world.episodes, [0]))
    y: list[int] = []  # the most probable token, one after another
    while tuple(y) not in world.responses:
        ids = torch.tensor([[*world.prompt, *y]])
        y.append(world.model(ids).logits[0, -1].argmax().item())
    i = world.responses.index(tuple(y))
    log_ratio = (world.log_probs(world.model) - world.log_probs(world.reference))[i]
    assert greedy.item() == pytest.approx((world.rewards[i] - BETA * log_ratio).item(), abs=1e-5)
    assert abs(greedy.item()) > 0.01
    ours = world.expected_gradient(1, greedy_returns=greedy)
    assert relative_error(ours, world.gradient(world.objective()) / HORIZON) < 1e-5


def test_the_batch_mean_of_one_episode_would_teach_nothing():
    with pytest.raises(ValueError, match=r"episodes_per_update >= 2.*moving_average"):
        build(REINFORCE, FIXED, 1, baseline="batch_mean")


def test_nlpo_follows_the_objective_of_its_masked_policy():
    """The closed form again, with both of the mask's sides by hand: pi renormalised over the mask policy's nucleus."""
    world = build(NLPO, FIXED, 1, mask_top_p=0.7, **PPO_SETTINGS)
    agent = world.agent
    mask_tables = [table.detach().exp() for table in world.tables(agent.policy.mask_lm.model)]
    inside = []
    for table in mask_tables:
        order = table.argsort(dim=-1, descending=True)
        before = table.gather(-1, order).cumsum(-1) - table.gather(-1, order)
        inside.append(torch.zeros_like(table, dtype=torch.bool).scatter(-1, order, before < 0.7))
    assert not all(rows.all() for rows in inside)
    log_p = []
    for table, rows, y in zip(world.tables(world.model), inside, world.responses, strict=True):
        masked = table.masked_fill(~rows, -torch.inf).log_softmax(-1)
        log_p.append(masked[range(len(y)), y].sum())
    log_p = torch.stack(log_p)
    drawn = torch.isfinite(log_p).nonzero().squeeze(-1)
    assert 1 < len(drawn) < len(log_p)
    log_ref = world.log_probs(world.reference).detach()
    kept = log_p[drawn]
    assert kept.exp().sum().item() == pytest.approx(1.0)
    objective = (kept.exp() * (world.rewards[drawn] - BETA * (kept - log_ref[drawn]))).sum()
    world.responses = [world.responses[i] for i in drawn]
    world.log_probs = lambda model: kept  # batches are drawn from the masked policy
    exact = world.gradient(objective) / HORIZON
    world.episodes = play(world, world.responses)
    np.testing.assert_allclose(world.episodes.kl, (kept - log_ref[drawn]).detach().numpy(), atol=1e-4)
    assert relative_error(world.expected_gradient(1), exact) < 1e-5


# ---------------------------------------------------------------------- agents that follow something else, as documented


def forward_kl_of_visited_states(world):
    """E_y [ mean over t of KL(ref(.|s_t) || pi(.|s_t)) ] with the visits held fixed."""
    p = world.log_probs(world.model).detach().exp()
    ours, refs = world.tables(world.model), world.tables(world.reference)
    per_state = [(r.detach().exp() * (r.detach() - o)).sum(-1).mean() for o, r in zip(ours, refs, strict=True)]
    return (p * torch.stack(per_state)).sum()


def reverse_kl_of_visited_states(world):
    p = world.log_probs(world.model).detach().exp()
    ours, refs = world.tables(world.model), world.tables(world.reference)
    per_state = [(o.exp() * (o - r.detach())).sum(-1).mean() for o, r in zip(ours, refs, strict=True)]
    return (p * torch.stack(per_state)).sum()


def group_objective(world, size, weights, penalty=None):
    """E over groups of sum_i A_i w_i log p(y_i): A = (R - mean) / (sd + 1e-4) with numpy, w from the lengths."""
    log_p, returns = world.log_probs(world.model), world.rewards.numpy().copy()
    if penalty is not None:
        returns = returns - penalty
    total = torch.zeros((), dtype=torch.float64)
    for rows, probability in world.batches(size):
        group = returns[list(rows)]
        advantages = (group - np.mean(group)) / (np.std(group, ddof=1) + 1e-4)
        for i, a, w in zip(rows, advantages, weights(world.lengths[list(rows)]), strict=True):
            total = total + probability * a * w * log_p[i]
    return total


def mean_of_means(lengths):
    return 1 / (len(lengths) * lengths)


def mean_of_tokens(lengths):
    return [1 / lengths.sum()] * len(lengths)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(
    ("estimator", "kl"),
    [("k3", forward_kl_of_visited_states), ("k2", reverse_kl_of_visited_states), ("ratio_k3", reverse_kl_of_visited_states)],
    ids=["k3", "k2", "ratio_k3"],
)  # fmt: skip
def test_grpo_follows_its_scaled_advantages_and_the_kl_of_visited_states(size, estimator, kl):
    world = build(GRPO, FIXED, size, variant="grpo", kl_estimator=estimator)
    exact = world.gradient(group_objective(world, size, mean_of_means) - BETA * kl(world))
    assert relative_error(world.expected_gradient(size), exact) < 1e-5


@pytest.mark.parametrize("size", [2, 3])
def test_grpo_and_gspo_without_kl_are_the_same_on_policy(size):
    for variant in ("grpo", "gspo"):
        world = build(GRPO, STOPPING, size, variant=variant, kl_placement="none")
        exact = world.gradient(group_objective(world, size, mean_of_means))
        assert relative_error(world.expected_gradient(size), exact) < 1e-5


@pytest.mark.parametrize("size", [2, 3])
def test_dapo_weighs_tokens_and_fears_the_budget(size):
    world = build(GRPO, STOPPING, size, variant="dapo", overlong_share=0.75)
    # over the last 1.5 of 2 tokens: one token costs 0.5 / 1.5, two cost 1
    penalty = np.where(world.lengths.numpy() == 2, 1.0, 1 / 3)
    exact = world.gradient(group_objective(world, size, mean_of_tokens, penalty))
    assert relative_error(world.expected_gradient(size), exact) < 1e-5


def test_pairs_scaled_by_their_deviation_climb_the_probability_of_beating_oneself():
    world = build(GRPO, FIXED, 2, variant="dr_grpo", scale_by_std=True, kl_placement="none")
    p, r = world.log_probs(world.model).exp(), world.rewards
    win = (p[:, None] * p.detach()[None, :] * torch.sign(r[:, None] - r[None, :])).sum()
    exact = world.gradient(win) / (HORIZON * math.sqrt(2))  # A = +-1 / sqrt 2
    assert relative_error(world.expected_gradient(2), exact) < 2e-3  # the eps of 1e-4 beside the deviation


def test_scaling_by_the_deviation_is_another_direction():
    world = build(GRPO, STOPPING, 3, variant="dr_grpo", scale_by_std=True)
    ours, exact = world.expected_gradient(3), world.gradient(world.objective())
    assert torch.cosine_similarity(ours, exact, dim=0) < 0.999


@pytest.mark.parametrize("how", ["token", "sequence"])
def test_only_a_fixed_length_leaves_the_direction_alone(how):
    world = build(REINFORCE, STOPPING, 2, baseline="none", loss_aggregation=how)
    exact = world.gradient(world.objective())
    assert torch.cosine_similarity(world.expected_gradient(2), exact, dim=0) < 0.999


def test_rloo_with_k3_in_the_loss_follows_the_forward_kl_of_completions():
    world = build(RLOO, STOPPING, 2, kl_placement="loss", kl_estimator="k3")
    log_p, log_ref = world.log_probs(world.model), world.log_probs(world.reference).detach()
    exact = world.gradient((log_p.exp() * world.rewards).sum() - BETA * (log_ref.exp() * (log_ref - log_p)).sum())
    assert relative_error(world.expected_gradient(2), exact) < 1e-5


def test_without_a_kl_the_reward_alone_is_followed():
    world = build(RLOO, STOPPING, 2, kl_placement="none")
    exact = world.gradient(world.objective(beta=0.0))
    assert relative_error(world.expected_gradient(2), exact) < 1e-5
    assert relative_error(exact, world.gradient(world.objective())) > 0.1


# ---------------------------------------------------------------------- the well-known wrong settings, on the pure functions


@cache
def plain_world():
    return build(REINFORCE, FIXED, 1, baseline="none")


def policy_gradient(world, penalties, training=False):
    """Expected gradient of `aggregate(-returns_to_go * log_probs)` when `-BETA * penalties` is paid. (Y, T) -> vector."""
    p = world.log_probs(world.model).detach().exp()
    mask = torch.ones(len(p), HORIZON, dtype=torch.bool)
    rewards = -BETA * penalties.detach()
    rewards[:, -1] += world.rewards
    world.model.train(training)
    torch.manual_seed(0)
    log_probs, _, _ = world.agent.policy.evaluate(world.episodes, np.arange(len(p)))
    world.model.eval()
    weighted = returns_to_go(rewards, mask) * p[:, None] * len(p)
    return world.gradient(-aggregate(-weighted * log_probs, mask, "fixed", HORIZON)) * HORIZON


def log_ratios(world):
    """L of each token, and KL(pi(.|s) || ref(.|s)) of each state. Shapes: (Y, T), (Y, T)."""
    ours, refs = world.tables(world.model), world.tables(world.reference)
    log_ratio = torch.stack([(o - r)[range(len(y)), y] for o, r, y in zip(ours, refs, world.responses, strict=True)])
    return log_ratio, torch.stack([(o.exp() * (o - r)).sum(-1) for o, r in zip(ours, refs, strict=True)])


def test_the_right_setting_passes_and_the_wrong_ones_fail():
    world = plain_world()
    exact = world.gradient(world.objective())
    k1, full = log_ratios(world)
    assert relative_error(policy_gradient(world, k1), exact) < 1e-5
    wrong = {
        "k3 in the reward": policy_gradient(world, torch.expm1(-k1) + k1),
        "the full KL of each state in the reward": policy_gradient(world, full),
        "dropout on": policy_gradient(world, k1, training=True),
    }
    for name, gradient in wrong.items():
        assert relative_error(gradient, exact) > 0.1, name


def test_k1_in_the_loss_is_no_penalty_at_all():
    world = plain_world()
    log_p, log_ref = world.log_probs(world.model), world.log_probs(world.reference).detach()
    p = log_p.detach().exp()
    exact_kl = world.gradient((log_p.exp() * (log_p - log_ref)).sum(), keep=True)
    noise = world.gradient((p * (log_p - log_ref)).sum())
    assert noise.norm() < 1e-9 * exact_kl.norm()
    returns_only = world.gradient(world.objective(beta=0.0)) - BETA * noise
    assert relative_error(returns_only, world.gradient(world.objective())) > 0.1


@pytest.mark.parametrize(("estimator", "right"), [("k2", True), ("ratio_k3", True), ("k3", False)])
def test_what_the_estimators_of_whole_completions_follow_in_the_loss(estimator, right):
    world = plain_world()
    log_p, log_ref = world.log_probs(world.model), world.log_probs(world.reference).detach()
    p, ratio = log_p.detach().exp(), (log_p - log_p.detach()).exp()
    ours = world.gradient((p * kl_terms(log_p - log_ref, ratio, estimator)).sum(), keep=True)
    error = relative_error(ours, world.gradient((log_p.exp() * (log_p - log_ref)).sum()))
    assert error < 1e-9 if right else error > 0.1


def test_the_loss_of_whole_completions_on_tensors():
    """All pairs of three completions with logits theta: the average gradient is that of sum_y p(y) R(y)."""
    theta, returns = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64, requires_grad=True), torch.tensor([1.0, 3.0, -2.0]).double()  # fmt: skip
    log_p = theta.log_softmax(-1)
    total = 0.0
    for pair in itertools.product(range(3), repeat=2):
        rows = list(pair)
        advantages = leave_one_out(returns[rows][None]).flatten()
        ratio = (log_p[rows] - log_p[rows].detach()).exp()
        total = total + log_p[rows].detach().sum().exp() * clipped_sequence_loss(ratio, advantages, 0.2)
    (ours,) = torch.autograd.grad(-total, theta, retain_graph=True)
    p = theta.detach().softmax(-1)
    torch.testing.assert_close(ours, p * (returns - (p * returns).sum()))  # the softmax policy gradient, in closed form
