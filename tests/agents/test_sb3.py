"""stable-baselines3's agents on our environments: the adapter is the environment, and the policy is the language model."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.wrappers.vector import RecordEpisodeStatistics
from stable_baselines3 import A2C, DQN, PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecNormalize

import textenv  # noqa: F401  # registers the ids
from agents.sb3 import LMPolicy, TextSpace, TokenEmbedding, as_policy, as_vec_env
from textenv.wrappers import TopKActions, VectorTimeLimit

from ..textenv.letters import BUDGET, ROWS, letters_reward
from ..textenv.reference_env import plain_log_prob
from ..tiny import EOS, VOCAB, char_tokenizer, tiny_model

TREE = "textenv/Tree-v0"
SMALL: dict[str, Any] = {"gamma": 1.0, "n_steps": 8, "seed": 0}


def learner(agent: Any, env: Any, policy: Any = LMPolicy, **kwargs: Any) -> Any:
    """One of stable-baselines3's agents with small rollouts, of one minibatch each."""
    batch = {} if agent is A2C else {"batch_size": 8 * env.num_envs}
    return agent(policy, env, **{**SMALL, **batch, **kwargs})


def tree(num_envs: int = 4, **kwargs: Any) -> Any:
    return gym.make_vec(TREE, num_envs=num_envs, **{"vocab_size": 3, "horizon": 3, **kwargs})


@pytest.fixture
def letters() -> Any:
    """letters(num_envs, **changes): the task of letters, prompts of many lengths."""
    task = {
        "model": tiny_model("gpt2"),
        "tokenizer": char_tokenizer(),
        "prompts": ROWS,
        "reward": letters_reward,
        "max_new_tokens": BUDGET,
    }
    return lambda num_envs=3, **changes: gym.make_vec(
        "textenv/Prompts-v0", num_envs=num_envs, **{"beta": 0.2, **task, **changes}
    )


def walk_away(model: Any, seed: int = 0) -> None:
    """Move every weight a little, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.policy.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator))


# ---------------------------------------------------------------------- the adapter


def test_the_adapter_is_the_native_environment_transition_by_transition(letters: Any) -> None:
    ours, theirs = letters(beta=0.0), as_vec_env(letters(beta=0.0))
    rng = np.random.default_rng(0)
    assert theirs.seed(3) == [3, 4, 5]
    observations, info = ours.reset(seed=3)
    np.testing.assert_array_equal(theirs.reset(), observations)
    assert [lane["prompt_id"] for lane in theirs.reset_infos] == info["prompt_id"].tolist()
    returns, lengths, episodes = np.zeros(3), np.zeros(3, int), 0
    for _ in range(40):
        actions = np.where(rng.random(3) < 0.2, EOS, rng.integers(VOCAB, size=3))
        observations, rewards, terminations, _, info = ours.step(actions)
        seen, paid, dones, infos = theirs.step(actions)
        np.testing.assert_array_equal(seen, observations)
        assert paid.dtype == np.float32
        np.testing.assert_array_equal(paid, rewards.astype(np.float32))
        np.testing.assert_array_equal(dones, terminations)
        returns, lengths = returns + rewards, lengths + 1
        for lane, lane_info in enumerate(infos):
            assert lane_info["TimeLimit.truncated"] is False
            if not dones[lane]:
                assert lane_info.keys() == {"TimeLimit.truncated"}
                continue
            np.testing.assert_array_equal(lane_info["terminal_observation"], info["final_obs"][lane])
            for name in ("task_reward", "finish_reason", "prompt_id", "reward/letters_reward"):
                assert lane_info[name] == info["final_info"][name][lane]
            assert lane_info["episode"]["r"] == returns[lane]
            assert lane_info["episode"]["l"] == lengths[lane]
            assert theirs.reset_infos[lane]["prompt_id"] == info["prompt_id"][lane]
            returns[lane], lengths[lane], episodes = 0, 0, episodes + 1
    assert episodes > 10


def test_an_episode_that_a_wrapper_cuts_is_bootstrapped_from_its_last_state(letters: Any) -> None:
    env = as_vec_env(VectorTimeLimit(letters(beta=0.0), 2))
    env.reset()
    before, *_ = env.step(np.full(3, EOS + 2))
    after, _, dones, infos = env.step(np.array([EOS + 2, EOS + 3, EOS]))
    assert dones.all()
    assert [info["TimeLimit.truncated"] for info in infos] == [True, True, False]
    for lane, token in enumerate((EOS + 2, EOS + 3, EOS)):
        terminal, place = infos[lane]["terminal_observation"], (before[lane] != VOCAB).sum()
        assert terminal[place] == token
        np.testing.assert_array_equal(terminal[:place], before[lane][:place])
        assert infos[lane]["episode"]["l"] == 2
        assert ("task_reward" in infos[lane]) == (token == EOS)
    assert (after[:, 0] != VOCAB).all()

    class Certain(LMPolicy):
        """Values every state at 7."""

        def _build(self, lr_schedule: Any) -> None:
            super()._build(lr_schedule)
            torch.nn.init.constant_(self.value_net.bias, 7.0)

    model = learner(PPO, as_vec_env(VectorTimeLimit(letters(beta=0.0), 1)), Certain)
    watch = Watch()
    watch.init_callback(model)
    model._setup_learn(1, watch)
    watch.on_training_start({}, {})
    model.collect_rollouts(model.env, watch, model.rollout_buffer, 8)
    kinds = {info["TimeLimit.truncated"] for _, info in watch.ended}
    assert True in kinds
    rewards = model.rollout_buffer.rewards
    assert (rewards == 7.0).sum() == sum(info["TimeLimit.truncated"] for _, info in watch.ended)


def test_what_is_returned_is_the_callers(letters: Any) -> None:
    env = as_vec_env(letters(beta=0.0))
    first = env.reset()
    first[:] = 0
    second, *_ = env.step(np.full(3, EOS + 2))
    kept = second.copy()
    env.step(np.full(3, EOS + 2))
    np.testing.assert_array_equal(second, kept)
    assert (second[:, 0] != 0).all()


def test_seeds_and_options_hold_for_the_next_reset_only(letters: Any) -> None:
    env = as_vec_env(letters(beta=0.0))
    env.set_options({"prompt_id": 4})
    env.reset()
    assert [info["prompt_id"] for info in env.reset_infos] == [4, 4, 4]
    env.set_options([{"prompt_id": i} for i in (0, 1, 2)])
    env.reset()
    assert [info["prompt_id"] for info in env.reset_infos] == [0, 1, 2]
    drawn = []
    for seeded in (True, True, False):
        if seeded:
            env.seed(0)
        env.reset()
        drawn.append([env.step(np.full(3, EOS)) and env.reset_infos[lane]["prompt_id"] for lane in range(3)])
    assert drawn[0] == drawn[1]
    env.set_options([{"prompt_id": 0}, {}, {}])
    with pytest.raises(ValueError, match="expected the same options for each"):
        env.reset()


def test_attributes_and_methods_are_those_of_the_environment(letters: Any) -> None:
    envs = RecordEpisodeStatistics(letters(beta=0.0))
    env = as_vec_env(envs)
    env.reset()
    assert env.get_attr("group_size") == [1, 1, 1]
    assert [mask.shape for mask in env.env_method("action_masks")] == [(VOCAB,)] * 3
    assert env.env_method("action_masks", indices=[2])[0].all()
    assert env.has_attr("action_masks")
    assert not env.has_attr("nothing")
    env.set_attr("_warned", True)
    assert envs.unwrapped._warned is True
    assert not hasattr(envs, "_warned")
    with pytest.raises(ValueError, match="The lanes share one environment"):
        env.set_attr("_warned", False, indices=0)
    assert env.env_is_wrapped(RecordEpisodeStatistics) == [True] * 3
    assert env.env_is_wrapped(gym.wrappers.vector.NormalizeReward) == [False] * 3
    assert env.env_is_wrapped(Monitor, indices=0) == [True]
    env.close()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda letters: gym.make(TREE), "got a single one: make it with gymnasium.make_vec"),
        (lambda letters: letters(autoreset_mode="NEXT_STEP"), "got autoreset_mode NEXT_STEP"),
        (lambda letters: gym.make_vec("CartPole-v1", num_envs=2), "Expected a textenv vector environment"),
        (lambda letters: gym.make_vec(TREE, num_envs=1, vectorization_mode="sync"), "without a vectorization_mode"),
    ],
)
def test_what_is_no_such_environment_is_refused(letters: Any, make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        as_vec_env(make(letters))


# ---------------------------------------------------------------------- the policy


def test_it_starts_with_the_references_weights_and_keeps_them(letters: Any) -> None:
    envs = letters(beta=0.1)
    model = learner(PPO, as_vec_env(envs))
    reference = envs.unwrapped.reference.model
    for name, weight in reference.state_dict().items():
        torch.testing.assert_close(model.policy.language_model.state_dict()[name], weight, rtol=0, atol=0)
    assert envs.unwrapped.kl.policy is model.policy
    own = {id(p) for p in model.policy.parameters()}
    assert not own & {id(p) for p in reference.parameters()}
    before = copy.deepcopy(reference.state_dict())
    model.learn(48)
    assert all(torch.equal(weight, before[name]) for name, weight in reference.state_dict().items())
    moved = [not torch.equal(p, before[name]) for name, p in model.policy.language_model.named_parameters()]
    assert sum(moved) > 0.9 * len(moved)


def agents() -> list[Any]:
    contrib = pytest.importorskip("sb3_contrib")
    return [PPO, A2C, contrib.MaskablePPO, contrib.TRPO]


class Watch(BaseCallback):
    """Keeps what a rollout has seen: returns of each lane, and the infos of ended episodes."""

    def _on_training_start(self) -> None:
        self.paid = np.zeros(self.training_env.num_envs)
        self.ended: list[tuple[float, dict[str, Any]]] = []

    def _on_step(self) -> bool:
        self.paid += self.locals["rewards"]
        for lane in np.flatnonzero(self.locals["dones"]):
            self.ended.append((self.paid[lane], self.locals["infos"][lane]))
            self.paid[lane] = 0
        return True


@pytest.mark.parametrize("which", ["PPO", "A2C", "MaskablePPO", "TRPO"])
def test_rewards_sum_to_task_reward_minus_beta_kl_and_ratios_start_at_one(letters: Any, which: str) -> None:
    (agent,) = [each for each in agents() if each.__name__ == which]
    mask = np.ones(VOCAB, bool)
    mask[5] = False
    model = learner(agent, as_vec_env(letters(temperature=0.7, action_mask=mask)))
    walk_away(model)
    watch = Watch()
    model._setup_learn(1, watch)  # a rollout without the update that follows it
    watch.init_callback(model)
    watch.on_training_start({}, {})
    model.collect_rollouts(model.env, watch, model.rollout_buffer, 8)
    assert len(watch.ended) > 3
    assert max(abs(info["kl"]) for _, info in watch.ended) > 0.01
    for paid, info in watch.ended:
        assert paid == pytest.approx(info["task_reward"] - 0.2 * info["kl"], abs=1e-5)
        assert info["episode"]["r"] == pytest.approx(info["task_reward"] - 0.2 * info["kl"], abs=1e-6)
    model.policy.set_training_mode(True)
    for batch in model.rollout_buffer.get():
        masks = {"action_masks": batch.action_masks} if which == "MaskablePPO" else {}
        values, log_prob, entropy = model.policy.evaluate_actions(batch.observations, batch.actions.flatten(), **masks)
        assert (log_prob - batch.old_log_prob).abs().max().item() < 1e-5
        assert (values.flatten() - batch.old_values).abs().max().item() < 1e-5
        distribution = model.policy.get_distribution(batch.observations)
        torch.testing.assert_close(distribution.log_prob(batch.actions.flatten().long()), log_prob)
        torch.testing.assert_close(distribution.entropy(), entropy, atol=1e-4, rtol=1e-4)
        row, token = batch.observations[0].numpy(), int(batch.actions[0])
        said = torch.tensor([row[row < VOCAB].tolist()])
        with torch.no_grad():
            logits = model.policy.language_model(said).logits[0, -1] / 0.7  # by hand: temperature, then the mask
        logits[5] = -torch.inf
        assert logits.log_softmax(-1)[token].item() == pytest.approx(log_prob[0].item(), abs=1e-4)


def test_masks_that_maskable_ppo_passes_are_applied_on_top(letters: Any) -> None:
    envs = letters()
    policy = learner(PPO, as_vec_env(envs)).policy
    observations, _ = envs.reset(seed=0)
    only = np.zeros((3, VOCAB), bool)
    only[:, [6, 7]] = True
    actions, _, log_probs = policy(torch.from_numpy(observations), action_masks=only)
    assert set(actions.tolist()) <= {6, 7}
    pair = policy.language_model(torch.from_numpy(observations[:1][observations[:1] < VOCAB][None])).logits[
        0, -1, [6, 7]
    ]
    assert log_probs[0].item() == pytest.approx(pair.log_softmax(-1)[actions[0] - 6].item(), abs=1e-4)
    np.testing.assert_allclose(policy.log_probs(observations, actions.numpy()), log_probs.numpy(), atol=1e-6)
    choice, _ = policy.predict(observations, deterministic=True, action_masks=only)
    assert set(choice.tolist()) <= {6, 7}


def test_dropout_is_off_also_while_it_learns() -> None:
    noisy = tiny_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5)
    envs = gym.make_vec(
        "textenv/Prompts-v0",
        num_envs=2,
        model=noisy,
        tokenizer=char_tokenizer(),
        prompts=["ab"],
        reward=lambda completions, **_: [0.0] * len(completions),
        beta=0.1,
    )
    policy = learner(PPO, as_vec_env(envs)).policy
    observations = torch.from_numpy(envs.reset(seed=0)[0])
    policy.set_training_mode(True)
    first, second = (policy.evaluate_actions(observations, torch.tensor([5, 6]))[1] for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_the_gradient_of_one_state_is_that_of_the_plain_model(letters: Any) -> None:
    model = learner(PPO, as_vec_env(letters()))
    observation, token = np.array([[3, 4, 5] + [VOCAB] * 7]), 6
    _, log_prob, _ = model.policy.evaluate_actions(torch.from_numpy(observation), torch.tensor([token]))
    log_prob.backward()
    plain = copy.deepcopy(model.env.lanes.reference.model).requires_grad_(True)
    plain(torch.tensor([[3, 4, 5]])).logits[0, -1].log_softmax(-1)[token].backward()
    for ours, theirs in zip(model.policy.language_model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("agent", [PPO, A2C])
def test_one_seed_gives_one_run(agent: Any) -> None:
    weights = []
    for _ in range(2):
        model = learner(agent, as_vec_env(tree())).learn(64)
        weights.append(model.policy.parameters_to_vector())
    np.testing.assert_array_equal(*weights)


# ---------------------------------------------------------------------- save, load, set_env: whose KL is paid


@pytest.mark.parametrize("with_env", [True, False])
def test_a_saved_model_acts_the_same_when_loaded(letters: Any, tmp_path: Path, with_env: bool) -> None:
    envs = letters(temperature=0.7)
    model = learner(PPO, as_vec_env(envs), policy_kwargs={"top_k": 6})
    walk_away(model)
    model.save(tmp_path / "model")
    envs_of_another_run = letters(temperature=0.7)
    loaded = PPO.load(tmp_path / "model", env=as_vec_env(envs_of_another_run) if with_env else None)
    observations, _ = letters().reset(seed=5)
    np.testing.assert_allclose(
        loaded.policy.log_probs_all(observations), model.policy.log_probs_all(observations), atol=1e-6
    )
    assert (loaded.policy.log_probs_all(observations) > -np.inf).sum(axis=1).tolist() == [6, 6, 6]
    np.testing.assert_array_equal(
        loaded.predict(observations, deterministic=True)[0], model.predict(observations, deterministic=True)[0]
    )
    if with_env:  # and it goes on learning, its KL paid
        loaded.learn(48)
        assert envs_of_another_run.unwrapped.kl.policy is loaded.policy
        assert envs.unwrapped.kl.policy is model.policy


def test_a_policy_alone_can_be_saved_and_loaded(letters: Any, tmp_path: Path) -> None:
    model = learner(PPO, as_vec_env(letters(temperature=0.7)))
    walk_away(model)
    model.policy.save(str(tmp_path / "policy.pt"))
    loaded = LMPolicy.load(str(tmp_path / "policy.pt"))
    observations, _ = letters().reset(seed=5)
    np.testing.assert_allclose(loaded.log_probs_all(observations), model.policy.log_probs_all(observations), atol=1e-6)


def test_a_model_that_changes_its_environment_pays_there(letters: Any) -> None:
    first, second = letters(), letters()
    model = learner(PPO, as_vec_env(first))
    model.set_env(as_vec_env(second))
    model.learn(24)
    assert second.unwrapped.kl.policy is model.policy


def test_of_two_models_in_one_environment_the_one_that_acts_pays(letters: Any) -> None:
    envs = letters()
    env = as_vec_env(envs)
    one, two = (learner(PPO, env) for _ in range(2))
    for model in (one, two, one):
        model.learn(24)
        assert envs.unwrapped.kl.policy is model.policy


def test_of_several_models_that_are_asked_the_one_whose_actions_are_taken_pays(letters: Any) -> None:
    envs = letters()
    models = [learner(PPO, as_vec_env(letters())) for _ in range(2)]
    walk_away(models[1])
    env = as_vec_env(envs)
    observations = env.reset()
    for acting in (0, 1, 1, 0):
        torch.manual_seed(3)  # with this seed they draw differently
        choices = [model.predict(observations)[0] for model in models]
        assert (choices[0] != choices[1]).any()
        observations, *_ = env.step(choices[acting])
        assert envs.unwrapped.kl.policy is models[acting].policy


def test_what_the_user_has_attached_stays(letters: Any) -> None:
    envs = letters()
    model = learner(PPO, as_vec_env(envs))
    envs.unwrapped.attach_policy(model.policy, pay=False)
    model.learn(24)
    assert envs.unwrapped.kl.pay is False


def test_evaluate_policy_of_stable_baselines3_gives_the_objective(letters: Any) -> None:
    model = learner(PPO, as_vec_env(letters()))
    walk_away(model)
    unseen = as_vec_env(letters(beta=0.5))
    seen: list[dict[str, Any]] = []
    returns, _ = evaluate_policy(
        model, unseen, n_eval_episodes=9, deterministic=False, return_episode_rewards=True,
        callback=lambda local, _: seen.append(local["info"]),
    )  # fmt: skip
    expected = [info["task_reward"] - 0.5 * info["kl"] for info in seen if "kl" in info]
    assert sorted(returns) == pytest.approx(sorted(expected[: len(returns)]), abs=1e-5)
    assert max(info["kl"] for info in seen if "kl" in info) > 0.01


@pytest.mark.parametrize(
    ("space", "actions", "message"),
    [
        ("plain", 3, "finds its language model through the observation space"),
        ("text", 2, r"expected the action space Discrete\(3\), got Discrete\(2\)"),
    ],
)
def test_spaces_that_do_not_fit_are_refused(space: str, actions: int, message: str) -> None:
    own = as_vec_env(tree()).observation_space
    assert isinstance(own, TextSpace)
    given = own if space == "text" else gym.spaces.Box(0, 3, own.shape, np.int64)
    with pytest.raises(ValueError, match=message):
        LMPolicy(given, gym.spaces.Discrete(actions), lambda _: 1e-3)


def test_normalised_token_ids_are_refused_and_normalised_rewards_are_not() -> None:
    learner(PPO, VecNormalize(as_vec_env(tree()), norm_obs=False)).learn(32)
    model = learner(PPO, VecNormalize(as_vec_env(tree())))
    with pytest.raises(
        ValueError, match=r"LMPolicy reads token ids, got observations of torch\.float32: leave them as they are"
    ):
        model.learn(32)


def test_a_part_of_the_kl_that_nobody_would_pay_is_refused() -> None:
    with pytest.raises(ValueError, match="kl='reference' leaves -beta log pi"):
        learner(PPO, as_vec_env(tree(kl="reference")))


# ---------------------------------------------------------------------- policies of their own


def test_token_embedding_tells_tokens_and_places_apart() -> None:
    space = gym.spaces.Box(0, 5, (3,), np.int64)
    embed = TokenEmbedding(space, embedding_dim=4)
    rows = torch.tensor([[0.0, 5.0, 5.0], [1.0, 5.0, 5.0], [5.0, 1.0, 5.0]])  # floats, as they arrive
    features = embed(rows)
    assert features.shape == (3, 12) == (3, embed.features_dim)
    weight = embed.embedding.weight
    torch.testing.assert_close(features[2], torch.cat([weight[5], weight[1], weight[5]]))


def test_as_policy_gives_the_distribution_that_is_sampled() -> None:
    envs = tree(64)
    model = learner(PPO, as_vec_env(envs), "MlpPolicy", policy_kwargs={"features_extractor_class": TokenEmbedding})
    model.get_env().attach_policy(as_policy(model))
    observations, _ = envs.reset(seed=0)
    expected = as_policy(model).log_probs_all(observations)[0]
    torch.manual_seed(0)
    drawn = np.bincount(np.concatenate([model.predict(observations)[0] for _ in range(60)]), minlength=3) / 3840
    np.testing.assert_allclose(drawn, np.exp(expected), atol=0.03)
    assert as_policy(model).log_probs(observations, np.full(64, 1))[0] == expected[1]
    watch = Watch()
    model.learn(512, callback=watch)
    assert all(r == pytest.approx(i["task_reward"] - 0.5 * i["kl"], abs=1e-5) for r, i in watch.ended)


def test_a_value_based_agent_is_scored_by_its_greedy_choice() -> None:
    envs = tree(kl="reference")
    model = DQN("MlpPolicy", as_vec_env(envs), policy_kwargs={"features_extractor_class": TokenEmbedding}, seed=0)
    said = [0]
    observation = np.array([[1, 3, 3, 3]])
    greedy = envs.unwrapped.task.prompts.token_ids[0][0]
    observation[0, 0] = greedy
    response: list[int] = []
    while len(response) < 3 and (not response or response[-1] != 0):  # what it says, step by step
        token = int(model.predict(observation, deterministic=True)[0][0])
        observation[0, 1 + len(response)] = token
        response.append(token)
    leaves = envs.unwrapped.leaves
    (leaf,) = [i for i, row in enumerate(leaves.tokens) if row[row < 3].tolist() == response]
    evaluation = envs.unwrapped.evaluate(as_policy(model))
    assert evaluation.reward == pytest.approx(leaves.rewards[leaf])
    assert evaluation.kl == pytest.approx(-leaves.log_ref[leaf])
    assert said == [0]


def test_dqn_under_top_k_is_paid_the_references_part() -> None:
    envs = TopKActions(tree(beta=0.4, kl="reference"), 2)
    model = DQN(
        "MlpPolicy",
        as_vec_env(envs),
        policy_kwargs={"features_extractor_class": TokenEmbedding},
        seed=0,
        learning_starts=8,
    )
    assert model.action_space == gym.spaces.Discrete(2)
    watch = Watch()
    model.learn(200, callback=watch)
    assert len(watch.ended) > 20
    for paid, info in watch.ended:
        assert paid == pytest.approx(info["task_reward"] + 0.4 * info["ref_log_prob"], abs=1e-5)


def test_maskable_ppos_own_policy_is_measured_under_the_mask() -> None:
    contrib = pytest.importorskip("sb3_contrib")
    mask = np.array([True, False, True])
    envs = tree(action_mask=mask)
    kwargs = {"policy_kwargs": {"features_extractor_class": TokenEmbedding}}
    model = learner(contrib.MaskablePPO, as_vec_env(envs), "MlpPolicy", **kwargs)
    model.get_env().attach_policy(as_policy(model))
    model.learn(32)
    observations, _ = envs.reset(seed=0)
    assert np.exp(as_policy(model).log_probs_all(observations)).sum(axis=1) == pytest.approx(np.ones(4))
    assert as_policy(model).log_probs_all(observations)[:, 1].max() < -1e6
    twice = learner(contrib.MaskablePPO, as_vec_env(TopKActions(tree(action_mask=mask), 2)), "MlpPolicy", **kwargs)
    with pytest.raises(ValueError, match="under an action_mask and TopKActions together"):
        as_policy(twice).log_probs_all(observations)


def test_nothing_warns_when_everything_is_as_it_should_be(letters: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PPO(LMPolicy, as_vec_env(letters()), gamma=1.0, n_steps=8, batch_size=24).learn(24)


def test_the_reader_of_plain_log_probs_agrees(letters: Any) -> None:
    envs = letters()
    policy = learner(PPO, as_vec_env(envs)).policy
    row = [3, 4, 5]
    observation = np.array([row + [VOCAB] * (envs.single_observation_space.shape[0] - 3)])
    ours = policy.log_probs(observation, np.array([6]))[0]
    assert ours == pytest.approx(plain_log_prob(policy.language_model, row, 6), abs=1e-4)
