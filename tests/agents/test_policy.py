"""The trainable parts: one distribution everywhere, and critics of three kinds."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from agents import GRPO, PPO, RLOO
from agents.policy import Critic, unpack
from agents.rollout import collect

from .world import build_model, plain_logits, same_tensors


@pytest.fixture
def agent(make_envs):
    return PPO(make_envs(), seed=0)


@pytest.fixture
def episodes(agent):
    return collect(agent.env, agent.policy, 12, agent.rng)


def test_unpack_hand_worked():
    out = unpack(torch.tensor([1.0, 2.0, 3.0, 4.0]), np.array([1, 3]))
    assert out.tolist() == [[1.0, 0.0, 0.0], [2.0, 3.0, 4.0]]


@pytest.mark.parametrize("rows", [np.arange(12), np.array([5]), np.array([7, 0, 7, 3])])
def test_evaluate_is_a_plain_forward_pass(agent, episodes, rows):
    log_probs, entropy, hidden = agent.policy.evaluate(episodes, rows)
    assert log_probs.shape == entropy.shape == (len(rows), episodes.response_length[rows].max())
    assert len(hidden) == episodes.response_length[rows].sum()
    for i, row in enumerate(rows):
        episode = episodes[int(row)]
        n = episode.response_length
        log_p = plain_logits(agent.policy.model, episode.tokens, episode.prompt_length).log_softmax(-1)
        response = torch.from_numpy(episode.tokens[episode.prompt_length :])
        torch.testing.assert_close(log_probs[i, :n], log_p[torch.arange(n), response], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(entropy[i, :n], -(log_p.exp() * log_p).sum(-1), atol=1e-5, rtol=1e-4)
        assert (log_probs[i, n:] == 0).all()
        assert (entropy[i, n:] == 0).all()


def test_entropy_is_differentiable_on_request(agent, episodes):
    rows = np.arange(4)
    assert not agent.policy.evaluate(episodes, rows)[1].requires_grad
    entropy = agent.policy.evaluate(episodes, rows, entropy_gradient=True)[1]
    weight = agent.policy.model.get_output_embeddings().weight
    (ours,) = torch.autograd.grad(entropy.sum(), weight)
    total = torch.zeros(())
    for row in rows:
        log_p = plain_logits(agent.policy.model, episodes[row].tokens, episodes[row].prompt_length).log_softmax(-1)
        total = total - (log_p.exp() * log_p).sum()
    torch.testing.assert_close(ours, torch.autograd.grad(total, weight)[0], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("critic", ["head", "separate"])
def test_passes_that_are_computed_twice_give_the_same_values_and_gradients(make_envs, episodes, critic):
    def gradients(tokens_per_pass):
        agent = PPO(make_envs(), seed=0, tokens_per_pass=tokens_per_pass, critic=critic)
        rows, seen = np.arange(12), []
        forward = agent.policy.lm.response_hidden
        agent.policy.lm.response_hidden = lambda *part: seen.append(len(part[0])) or forward(*part)
        log_probs, entropy, hidden = agent.policy.evaluate(episodes, rows, entropy_gradient=True)
        values = agent.critic(hidden, episodes, rows)
        torch.nn.init.ones_(agent.critic.head.weight)
        (log_probs**2 + entropy + agent.critic(hidden, episodes, rows)).sum().backward()
        parts = [*agent.policy.parameters(), *agent.critic.parameters()]
        return seen, [log_probs.detach(), entropy.detach(), values.detach(), *(p.grad for p in parts)]

    (whole, expected), (passes, ours) = gradients(None), gradients(20)
    assert whole == [12]
    half = passes[: len(passes) // 2]
    assert len(half) > 2
    assert sum(half) == 12  # each once forward, and once more for its gradient
    assert sorted(passes[len(half) :]) == sorted(half)
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


SUMS = {
    "RLOO": (RLOO, {}),
    "RLOO, KL in the loss": (RLOO, {"kl_placement": "loss"}),
    "GRPO: completions weigh alike": (GRPO, {"variant": "grpo"}),
    "GRPO: tokens weigh alike": (GRPO, {"variant": "dapo", "kl_placement": "loss", "dynamic_sampling": False}),
    "GRPO: a fixed divisor": (GRPO, {"variant": "dr_grpo"}),
}


@pytest.mark.parametrize(("kind", "settings"), SUMS.values(), ids=SUMS)
def test_gradients_of_passes_add_up_to_the_minibatchs(make_envs, kind, settings):
    def outcome(tokens_per_pass):
        agent = kind(
            make_envs(group_size=4), seed=0, minibatch_episodes=12, tokens_per_pass=tokens_per_pass, **settings
        )
        episodes, gradients, passes = collect(agent.env, agent.policy, 12, agent.rng), [], []
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():  # else ratios are 1, and a KL in the loss has no gradient
            for p in agent.policy.parameters():
                p += 0.05 * torch.randn(p.shape, generator=generator)
        agent.policy.invalidate()
        apply, evaluate = agent.apply_gradients, agent.policy.evaluate

        def watched(adam):
            gradients.extend(p.grad.clone() for p in agent.policy.parameters())
            return apply(adam)

        agent.apply_gradients = watched
        agent.policy.evaluate = lambda episodes, rows: passes.append(len(rows)) or evaluate(episodes, rows)
        agent.update(episodes)
        return passes, gradients, agent.accounts["gradient_tokens"], dict(agent.logger.name_to_value)

    (whole, expected, tokens, figures), (passes, ours, same_tokens, others) = outcome(None), outcome(20)
    assert whole == [12]
    assert len(passes) > 2
    assert sum(passes) == 12
    assert same_tokens == tokens
    assert figures["train/grad_norm"] > 1e-3
    assert figures["train/approx_kl"] > 1e-3
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-3)
    assert others == pytest.approx(figures, rel=1e-3, abs=1e-5)


def test_passes_hold_few_logits_and_keep_completions_of_a_prompt_together(agent, episodes, monkeypatch):
    prompt, response = np.array([2, 2, 2, 2, 3, 3]), np.array([4, 4, 4, 4, 4, 1])
    rows = replace(episodes, prompt_length=prompt, response_length=response)
    monkeypatch.setattr("textenv.lm.LOGITS_PER_PASS", 14 * agent.policy.lm.vocab_size)  # 14 tokens: two rows of 6 or 7
    passes = [part.tolist() for part in agent.policy.passes(rows, np.array([3, 1, 5, 0, 4, 2]))]
    assert passes == [[4, 0], [1, 2], [3, 5]]
    agent.policy.tokens_per_pass = 1
    assert len(list(agent.policy.passes(rows, np.arange(6)))) == 6


def test_entropy_under_a_mask_has_a_finite_gradient(make_envs):
    agent = PPO(make_envs(action_mask=np.arange(10) % 2 == 0), seed=0, top_k=3)
    episodes = collect(agent.env, agent.policy, 8, agent.rng)
    entropy = agent.policy.evaluate(episodes, np.arange(8), entropy_gradient=True)[1]
    assert entropy.max() <= np.log(3) + 1e-5
    entropy.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in agent.policy.parameters() if p.grad is not None)


def test_kept_log_probs_are_forgotten_when_weights_change(agent):
    observations, _ = agent.env.reset()
    actions, kept = agent.policy.act(observations, np.random.default_rng(0))
    assert (agent.policy.log_probs(observations, actions) == kept).all()
    with torch.no_grad():
        agent.policy.model.get_output_embeddings().weight.mul_(2.0)
    fresh = agent.policy.log_probs(observations, actions)
    assert np.abs(fresh - kept).max() > 0.1
    table = agent.policy.log_probs_all(observations)
    np.testing.assert_allclose(fresh, table[np.arange(len(actions)), actions], atol=1e-6)


def test_log_probs_of_any_batch_without_effect_on_later_calls(agent):
    observations, _ = agent.env.reset()
    actions, kept = agent.policy.act(observations, np.random.default_rng(0))
    few = agent.policy.log_probs(observations[2:5], actions[2:5])
    np.testing.assert_allclose(few, kept[2:5], atol=1e-5)
    np.testing.assert_allclose(agent.policy.log_probs(observations, actions), kept, atol=1e-6)


# ---------------------------------------------------------------------- critics


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_separate_critic_shares_nothing_with_the_policy(make_envs, kind):
    agent = PPO(make_envs(model=build_model(kind)), seed=0, critic="separate", episodes_per_update=8)
    policy = {p.data_ptr() for p in agent.policy.parameters()}
    assert not policy & {p.data_ptr() for p in agent.critic.parameters()}
    before = {name: t.clone() for name, t in agent.critic.state_dict().items()}
    agent.learn(50)
    after = agent.critic.state_dict()
    assert not torch.equal(before["head.bias"], after["head.bias"])
    assert not same_tensors(before, after)


def test_values_from_states_at_hand_equal_values_computed_anew(agent, episodes):
    torch.nn.init.normal_(agent.critic.head.weight)
    rows = np.array([4, 1, 9])
    _, _, hidden = agent.policy.evaluate(episodes, rows)
    torch.testing.assert_close(
        agent.critic(hidden, episodes, rows), agent.critic.values(agent.policy, episodes, rows), atol=1e-5, rtol=1e-4
    )


@pytest.fixture
def reward_model(model, tokenizer):
    from rewards import RewardModel

    built = RewardModel.from_language_model(build_model(seed=3), tokenizer, seed=1)
    built.offset = 0.25
    return built


def test_a_critic_from_a_reward_model_starts_with_its_scores(make_envs, tmp_path, reward_model):
    reward_model.save_pretrained(tmp_path / "reward")
    agent = PPO(make_envs(), seed=0, critic=str(tmp_path / "reward"), episodes_per_update=8)
    episodes = collect(agent.env, agent.policy, 6, agent.rng)
    values, _ = agent.values(episodes)
    final = agent.critic.final_values(agent.policy, episodes, np.arange(6))
    for i, episode in enumerate(episodes):
        m, tokens = episode.prompt_length, episode.tokens.tolist()
        scores = reward_model.score([tokens[:end] for end in range(m, len(tokens))])  # the state before each token
        np.testing.assert_allclose(values[i, : len(scores)].numpy(), scores, atol=1e-4)
        assert final[i].item() == pytest.approx(reward_model.score([tokens])[0], abs=1e-4)
    agent.learn(50)
    agent.save(tmp_path / "agent")
    again = PPO.load(tmp_path / "agent", make_envs())
    assert same_tensors(again.critic.state_dict(), agent.critic.state_dict())
    assert len(agent.critic.state_dict()) > 5


def test_a_loaded_reward_model_is_copied(agent, reward_model):
    before = {name: t.clone() for name, t in reward_model.model.state_dict().items()}
    critic = Critic(agent.policy, reward_model)
    with torch.no_grad():
        for parameter in critic.parameters():
            parameter.zero_()
    assert same_tensors(reward_model.model.state_dict(), before)


def test_an_unknown_critic_is_an_error(make_envs):
    with pytest.raises(ValueError, match=r"'head', 'separate' or the directory.*Did you mean `separate`\?"):
        PPO(make_envs(), critic="seperate")


def test_a_reward_model_of_another_vocabulary_is_refused_as_critic(make_envs, reward_model):
    agent = PPO(make_envs(model=build_model(vocab_size=20)), seed=0)
    with pytest.raises(ValueError, match="knows 10 tokens, the policy 20"):
        Critic(agent.policy, reward_model)


def test_idle_lanes_change_nothing_for_busy_ones(agent):
    observations, _ = agent.env.reset(seed=3)
    everyone, kept = agent.policy.act(observations, np.random.default_rng(0))
    busy = np.arange(len(observations)) % 3 == 0
    actions, log_probs = agent.policy.act(observations, np.random.default_rng(0), busy=busy)
    assert (actions[busy] == everyone[busy]).all()
    assert (actions[~busy] == 0).all()
    np.testing.assert_allclose(log_probs[busy], kept[busy], atol=1e-6)
    assert np.isnan(log_probs[~busy]).all()
