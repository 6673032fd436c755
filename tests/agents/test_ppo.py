"""PPO: its losses by hand, its first ratio, its expected gradient by enumeration, and that it learns."""

from __future__ import annotations

import itertools
import time
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch

from agents import PPO, PPOConfig
from agents.ppo import clipped_policy_loss, clipped_value_loss
from agents.rollout import collect
from textenv.env import TextVectorEnv
from textenv.task import build_task

from .world import PassThrough, build_model, plain_logits, word_tokenizer

# ---------------------------------------------------------------------- losses, by hand


def test_policy_loss_hand_worked():
    # max(-A rho, -A clip(rho, 0.8, 1.2)):  max(-1.5, -1.2), max(0.5, 0.8), max(-2.2, -2.2), max(1.5, 1.2), and one masked
    ratio = torch.tensor([[1.5, 0.5, 1.1], [1.5, 9.0, 1.0]])
    advantages = torch.tensor([[1.0, -1.0, 2.0], [-1.0, 9.0, 0.0]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    expected = (-1.2 + 0.8 - 2.2 + 1.5) / 4
    assert clipped_policy_loss(ratio, advantages, mask, 0.2).item() == pytest.approx(expected)


def test_policy_loss_gradient_vanishes_where_clipping_pays_no_more():
    ratio = torch.tensor([[1.3, 1.3, 0.7, 0.7]], requires_grad=True)
    advantages, mask = torch.tensor([[1.0, -1.0, 1.0, -1.0]]), torch.ones(1, 4, dtype=torch.bool)
    clipped_policy_loss(ratio, advantages, mask, 0.2).backward()
    torch.testing.assert_close(ratio.grad, torch.tensor([[0.0, 0.25, -0.25, 0.0]]))


def test_value_loss_hand_worked():
    # old 0, clip 0.2.  V = 1, R = 0.5: max(0.25, 0.09).  V = 1, R = 2: max(1, 3.24).  V = 0.1, R = 0.1: 0.
    values, returns = torch.tensor([[1.0, 1.0, 0.1]]), torch.tensor([[0.5, 2.0, 0.1]])
    old, mask = torch.zeros(1, 3), torch.ones(1, 3, dtype=torch.bool)
    assert clipped_value_loss(values, old, returns, mask, 0.2).item() == pytest.approx(0.5 * (0.25 + 3.24) / 3)
    assert clipped_value_loss(values, old, returns, mask, None).item() == pytest.approx(0.5 * (0.25 + 1.0) / 3)


# ---------------------------------------------------------------------- what is sampled is what is trained

BEHAVIOURS = {
    "plain": ({}, {}),
    "temperature": ({"temperature": 0.7}, {}),
    "top-k": ({}, {"top_k": 4}),
    "top-p": ({"temperature": 1.3}, {"top_p": 0.8}),
    "mask": ({"action_mask": np.arange(10) != 3}, {}),
    "all": ({"temperature": 0.7, "action_mask": np.arange(10) % 4 != 3}, {"top_k": 5, "top_p": 0.9}),
}


def reference_log_probs(logits, temperature=1.0, action_mask=None, top_k=None, top_p=None):
    """The behaviour distribution, row by row, in plain numpy."""
    out = []
    for row in logits.detach().double().numpy() / temperature:
        allowed = np.ones(len(row), bool) if action_mask is None else action_mask.copy()
        order = [i for i in np.argsort(-row) if allowed[i]]
        order = order[: top_k or len(order)]
        if top_p is not None:
            p = np.exp(row[order]) / np.exp(row[order]).sum()
            order = order[: int(np.searchsorted(np.cumsum(p), top_p)) + 1]
        full = np.full(len(row), -np.inf)
        full[order] = row[order] - np.log(np.exp(row[order]).sum())
        out.append(full)
    return np.array(out)


@pytest.mark.parametrize("name", BEHAVIOURS)
def test_log_probs_of_rollout_and_update_are_those_of_the_sampled_distribution(make_envs, name):
    env_kwargs, agent_kwargs = BEHAVIOURS[name]
    envs = make_envs(**env_kwargs)
    agent = PPO(envs, seed=0, **agent_kwargs)
    episodes = collect(envs, agent.policy, 12, agent.rng)
    scored, _, _ = agent.policy.evaluate(episodes, np.arange(12))
    for i, episode in enumerate(episodes):
        logits = plain_logits(agent.policy.model, episode.tokens, episode.prompt_length)
        table = reference_log_probs(logits, **env_kwargs, **agent_kwargs)
        response = episode.tokens[episode.prompt_length :]
        expected = table[np.arange(len(response)), response]
        np.testing.assert_allclose(episode.log_probs, expected, atol=1e-4)
        np.testing.assert_allclose(scored[i, : len(response)].detach().numpy(), expected, atol=1e-4)
        assert (scored[i, len(response) :] == 0).all()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("wrapper", [None, PassThrough])
@pytest.mark.parametrize("name", ["plain", "all"])
def test_first_ratio_is_one(make_envs, tokenizer, name, wrapper, kind):
    env_kwargs, agent_kwargs = BEHAVIOURS[name]
    envs = make_envs(model=build_model(kind), **env_kwargs)
    agent = PPO(
        wrapper(envs) if wrapper else envs, seed=0, episodes_per_update=8, minibatch_episodes=4, warmup_iterations=0,
        **agent_kwargs,
    )  # fmt: skip
    agent.learn(90)
    assert len(agent.history) >= 2
    assert max(row["train/first_ratio_error"] for row in agent.history) < 1e-4
    assert abs(agent.history[-1]["rollout/kl"]) > 1e-3  # the policy has moved


def test_dropout_would_show_in_the_first_ratio(make_envs):
    agent = PPO(make_envs(model=build_model("gpt2")), seed=0, episodes_per_update=8)
    episodes = collect(agent.env, agent.policy, 8, agent.rng)
    agent.policy.model.train()
    agent.update(episodes)
    assert agent.logger.name_to_value["train/first_ratio_error"] > 1e-2


def test_one_epoch_of_one_minibatch_clips_nothing(make_envs):
    agent = PPO(
        make_envs(),
        seed=0,
        episodes_per_update=8,
        minibatch_episodes=8,
        epochs=1,
        learning_rate=0.1,
        warmup_iterations=0,
    )
    agent.learn(100)
    assert [row["train/clip_fraction"] for row in agent.history] == [0.0] * len(agent.history)
    several = PPO(
        make_envs(),
        seed=0,
        episodes_per_update=8,
        minibatch_episodes=2,
        learning_rate=0.1,
        warmup_iterations=0,
        target_kl=None,
    )
    assert several.learn(30).history[0]["train/clip_fraction"] > 0  # the figure can be something else


# ---------------------------------------------------------------------- the expected gradient, by enumeration

BETA = 0.5
VOCAB, HORIZON = 3, 2


def completions(stops):
    """Every response over three tokens, of two tokens at most."""
    full = [c for n in range(1, HORIZON + 1) for c in itertools.product(range(VOCAB), repeat=n)]
    ends = [c for c in full if len(c) == HORIZON or c[-1] in stops]
    return [c for c in ends if not any(token in stops for token in c[:-1])]


def task_reward(prompts, completions, completion_ids, **columns):
    """Something without structure."""
    return [float(np.sin(3 * ids[0] + 7 * ids[-1] + len(ids))) for ids in completion_ids]


def enumerated_world(stops, temperature):
    """A policy that has moved away from its reference, in double precision; GPT-2 with dropout in its config."""
    reference = build_model("gpt2", vocab_size=VOCAB, width=8, layers=1, resid_pdrop=0.3, embd_pdrop=0.3).double()
    task = build_task(
        reference,
        ["a b a"],
        task_reward,
        tokenizer=word_tokenizer(["a", "b"]),
        max_new_tokens=HORIZON,
        stop_tokens=stops,
    )
    envs = TextVectorEnv(len(completions(stops)), task, beta=BETA, temperature=temperature)
    agent = PPO(
        envs, seed=0, epochs=1, minibatch_episodes=64, gae_lambda=1.0, whiten_advantages=False, vf_coef=0.0,
        max_grad_norm=1e9, target_kl=None,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in agent.policy.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return envs, agent


def sequence_log_probs(model, prompt, responses, temperature):
    """log pi(y | x) of each response by plain forward passes. Shape: (K,)."""
    total = []
    for response in responses:
        tokens = np.array([*prompt, *response])
        log_p = (plain_logits(model, tokens, len(prompt)) / temperature).log_softmax(-1)
        total.append(log_p[torch.arange(len(response)), torch.tensor(response)].sum())
    return torch.stack(total)


def enumerated_gradient(agent, envs, stops, temperature):
    """Autograd on J = sum_y p(y) (r(y) - beta (log p(y) - log ref(y))), the closed form; and p."""
    responses, prompt = completions(stops), envs.task.prompts.token_ids[0]
    log_p = sequence_log_probs(agent.policy.model, prompt, responses, temperature)
    with torch.no_grad():
        log_ref = sequence_log_probs(envs.task.model, prompt, responses, temperature)
    r = torch.tensor(task_reward(None, None, completion_ids=responses), dtype=torch.float64)
    assert log_p.exp().sum().item() == pytest.approx(1.0)  # nothing has been left out
    objective = (log_p.exp() * (r - BETA * (log_p - log_ref))).sum()
    parameters = list(agent.policy.parameters())
    return torch.cat([g.flatten() for g in torch.autograd.grad(objective, parameters)]), log_p.detach().exp()


def ppo_gradient(agent, envs, stops, p, monkeypatch):
    """Minus the gradient that PPO's first step takes, each completion weighted by its probability.

    The environment pays the rewards, every completion once. Advantages are linear in rewards (V = 0), so multiplying
    row y by K p(y) turns the mean over K rows into an expectation. The loss is a mean over tokens, J a sum.
    """
    responses = completions(stops)
    with envs.deferred(episodes=len(responses)) as ledger:
        envs.reset()
        step = 0
        while not ledger.done:
            envs.step(np.array([c[min(step, len(c) - 1)] for c in responses]))
            step += 1
    episodes = ledger.episodes
    assert [tuple(e.tokens[e.prompt_length :]) for e in episodes] == responses
    weights = len(responses) * p.numpy()
    taken = []

    def note(optimizer):
        taken.append(torch.cat([q.grad.flatten() for q in agent.policy.parameters()]).clone())
        return 0.0

    monkeypatch.setattr(agent, "apply_gradients", note)
    agent.update(replace(episodes, rewards=episodes.rewards * weights[:, None]))
    assert len(taken) == 1
    return -taken[0] * episodes.response_length.sum() / len(responses)


def relative_error(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("stops", [(), (0,)], ids=["fixed length", "with a stop token"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_expected_gradient_is_the_enumerated_one(monkeypatch, stops, temperature):
    assert len(completions(stops)) == (7 if stops else 9)
    envs, agent = enumerated_world(stops, temperature)
    exact, p = enumerated_gradient(agent, envs, stops, temperature)
    assert relative_error(ppo_gradient(agent, envs, stops, p, monkeypatch), exact) < 1e-5


def test_expected_gradient_is_wrong_without_the_kl(monkeypatch):
    envs, agent = enumerated_world((), 1.0)
    exact, p = enumerated_gradient(agent, envs, (), 1.0)
    envs.attach_policy(agent.policy, pay=False)
    assert relative_error(ppo_gradient(agent, envs, (), p, monkeypatch), exact) > 0.1


def test_expected_gradient_is_wrong_under_dropout(monkeypatch):
    envs, agent = enumerated_world((), 1.0)
    exact, p = enumerated_gradient(agent, envs, (), 1.0)
    agent.policy.model.train()
    torch.manual_seed(0)
    assert relative_error(ppo_gradient(agent, envs, (), p, monkeypatch), exact) > 0.1


# ---------------------------------------------------------------------- settings that must do something


@pytest.mark.parametrize(("iterations", "expected"), [(4, [0.1, 0.325, 0.55, 0.775, 1.0, 1.0]), (0, [1.0, 1.0])])
def test_the_learning_rate_warms_up_from_a_tenth(make_envs, iterations, expected):
    agent = PPO(make_envs(), seed=0, episodes_per_update=4, learning_rate=1e-3, warmup_iterations=iterations)
    agent.learn(4 * 5 * len(expected))
    rates = [row["train/learning_rate"] for row in agent.history]
    np.testing.assert_allclose(rates[: len(expected)], 1e-3 * np.array(expected), rtol=1e-6)
    assert agent.adam.param_groups[0]["lr"] == rates[-1]


def test_entropy_bonus_reaches_the_weights(make_envs):
    def entropy(coefficient):
        agent = PPO(
            make_envs(beta=0.0),
            seed=0,
            episodes_per_update=16,
            ent_coef=coefficient,
            learning_rate=2e-2,
            warmup_iterations=0,
        )
        return agent.learn(300).history[-1]["train/entropy"]

    assert entropy(1.0) > entropy(0.0) + 0.2


def test_target_kl_ends_the_updates_of_a_rollout(make_envs):
    def steps(target):
        agent = PPO(
            make_envs(), seed=0, episodes_per_update=8, minibatch_episodes=2, epochs=4, learning_rate=0.05,
            target_kl=target, warmup_iterations=0,
        )  # fmt: skip
        agent.learn(1)
        assert len(agent.history) == 1
        return agent.accounts["optimizer_steps"]

    assert steps(None) == 16
    assert 1 <= steps(0.01) < 16


@pytest.mark.parametrize("truncation", [{"top_k": 2}, {"top_p": 0.5}])
def test_tokens_that_leave_the_truncated_set_do_no_harm(make_envs, truncation):
    """After an update a sampled token may have probability 0: its ratio is 0, and neither gradients nor figures break."""
    agent = PPO(
        make_envs(),
        seed=0,
        episodes_per_update=16,
        minibatch_episodes=4,
        learning_rate=0.02,
        warmup_iterations=0,
        **truncation,
    )
    agent.learn(200)
    assert all(np.isfinite(value) for row in agent.history for value in row.values())
    assert all(torch.isfinite(p).all() for p in agent.policy.parameters())


def test_ptx_lowers_the_loss_on_pretraining_text(make_envs):
    rows = np.tile(np.array([1, 2, 3, 4, 5, 6]), (16, 1))
    agent = PPO(
        make_envs(), seed=0, episodes_per_update=8, ptx_coef=1.0, ptx_data=rows, learning_rate=5e-3, warmup_iterations=0
    )
    with torch.no_grad():
        logits = agent.policy.model(torch.from_numpy(rows[:1, :-1])).logits[0]
    expected = torch.nn.functional.cross_entropy(logits, torch.from_numpy(rows[0, 1:])).item()
    assert agent.ptx_loss().item() == pytest.approx(expected, rel=1e-5)
    agent.learn(500)
    assert agent.history[-1]["train/ptx_loss"] < 0.5 * agent.history[0]["train/ptx_loss"]


@pytest.mark.parametrize("kwargs", [{"ptx_coef": 1.0}, {"ptx_data": np.ones((2, 3), np.int64)}])
def test_ptx_needs_both_halves(make_envs, kwargs):
    with pytest.raises(ValueError, match="belong together"):
        PPO(make_envs(), **kwargs).learn(10)


@pytest.mark.parametrize("rows", [np.ones(3, np.int64), np.ones((2, 3)), np.full((2, 3), 10), np.full((2, 3), -100)])
def test_ptx_data_is_checked(make_envs, rows):
    with pytest.raises(ValueError, match="ptx_data"):
        PPO(make_envs(), ptx_coef=1.0, ptx_data=rows)


@pytest.mark.parametrize(
    ("field", "value"),
    [("episodes_per_update", 0), ("minibatch_episodes", 0), ("epochs", 0), ("gae_lambda", 1.5), ("clip_range", 0.0),
     ("clip_range_value", -1.0), ("warmup_iterations", -1), ("target_kl", 0.0), ("learning_rate", 0.0), ("max_grad_norm", -1.0)],
)  # fmt: skip
def test_impossible_settings_are_refused(field, value):
    with pytest.raises(ValueError, match=field):
        PPOConfig(**{field: value})


def test_values_are_zero_at_first_and_learn_the_return(make_envs):
    agent = PPO(
        make_envs(beta=0.0, reward=lambda completions, **_: [3.0] * len(completions)), seed=0, vf_coef=1.0,
        minibatch_episodes=8, learning_rate=1e-2, clip_range_value=None, target_kl=None, warmup_iterations=0,
    )  # fmt: skip
    episodes = collect(agent.env, agent.policy, 16, agent.rng)
    values, bootstrap = agent.values(episodes)
    assert (values == 0).all()
    for _ in range(15):
        agent.update(episodes)
    values, bootstrap = agent.values(episodes)
    assert (values[torch.from_numpy(episodes.mask)] - 3.0).abs().max() < 0.5
    assert (bootstrap == 0).all()  # nothing was cut
    assert agent.logger.name_to_value["train/explained_variance"] <= 1


def test_models_in_double_precision(make_envs):
    model = build_model("gpt2").double()
    agent = PPO(make_envs(model=model), seed=0, episodes_per_update=8, critic="separate").learn(50)
    assert {p.dtype for p in agent.policy.parameters()} == {torch.float64}
    assert len(agent.history) >= 1


def test_tied_weights_are_updated_once(make_envs):
    agent = PPO(make_envs(model=build_model("gpt2")), seed=0)
    inside = [id(p) for group in agent.adam.param_groups for p in group["params"]]
    assert len(inside) == len(set(inside))
    head, embedding = agent.policy.model.get_output_embeddings(), agent.policy.model.get_input_embeddings()
    assert head.weight is embedding.weight
    assert inside.count(id(head.weight)) == 1


def test_a_gradient_that_is_not_finite_stops_the_run_before_the_weights_move(make_envs):
    agent = PPO(make_envs(), seed=0)
    before = {name: t.clone() for name, t in agent.policy.model.state_dict().items()}
    parameter = next(iter(agent.policy.parameters()))
    parameter.grad = torch.full_like(parameter, float("nan"))
    with pytest.raises(FloatingPointError, match="Lower the learning rate"):
        agent.apply_gradients(agent.adam)
    assert all(torch.equal(t, before[name]) for name, t in agent.policy.model.state_dict().items())
    assert parameter.grad is None


# ---------------------------------------------------------------------- signs of life


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_learns_to_write_one_token(tokenizer, kind):
    def share_of_k(prompts, completions, completion_ids, **columns):
        return [float(np.mean(np.array(ids) == 4)) for ids in completion_ids]

    envs = gym.make_vec(
        "textenv/Prompts-v0", num_envs=64, model=build_model(kind), tokenizer=tokenizer, prompts=["a", "b c"],
        reward=share_of_k, max_new_tokens=4, beta=0.01, stop_tokens=[],
    )  # fmt: skip
    agent = PPO(envs, seed=0, episodes_per_update=64, minibatch_episodes=16, learning_rate=4e-3, warmup_iterations=2)
    begin = time.process_time()
    agent.learn(4_000)
    assert agent.history[0]["rollout/task_reward"] < 0.3
    assert agent.history[-1]["rollout/task_reward"] > 0.9
    assert agent.history[-1]["rollout/kl"] > 1.0
    assert time.process_time() - begin < 10
