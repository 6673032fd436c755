"""The KL penalty inside `step`: what is paid, what is reported, and by whose probabilities."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

from textenv import AdaptiveKL, Behaviour, FixedKL, KLPenalty, LanguageModel

from ..tiny import EOS, VOCAB, tiny_model
from .letters import WIDTH, random_actions
from .reference_env import plain_log_prob

A, B = 3, 4
BETA = 0.3


@pytest.fixture
def policy(other_model: Any) -> LanguageModel:
    """A policy that is not the reference, with a cache."""
    return LanguageModel(other_model, WIDTH)


def play(env: Any, episodes: int, seed: int = 0) -> list[dict[str, Any]]:
    """The first episodes to end, at random, in any autoreset mode: tokens, prompt length, rewards and the info at the end."""
    mode, rng, out = env.metadata["autoreset_mode"], np.random.default_rng(seed), []
    observations, _ = env.reset(seed=seed)
    n = env.num_envs
    prompt, rewards = (observations != VOCAB).sum(axis=1), [[] for _ in range(n)]
    waiting = np.zeros(n, bool)
    while len(out) < episodes:
        observations, paid, ended, _, info = env.step(random_actions(rng, n))
        same_step = mode is AutoresetMode.SAME_STEP
        final = info.get("final_info", {}) if same_step else info
        for lane in range(n):
            if waiting[lane]:
                assert paid[lane] == 0.0
                prompt[lane] = (observations[lane] != VOCAB).sum()
                continue
            rewards[lane].append(paid[lane])
            if ended[lane]:
                row = info["final_obs"][lane] if same_step else observations[lane]
                values = {k: v[lane] for k, v in final.items() if f"_{k}" in final and final[f"_{k}"][lane]}
                out.append(
                    {
                        "tokens": row[row != VOCAB].tolist(),
                        "prompt": prompt[lane],
                        "rewards": rewards[lane],
                        "info": values,
                    }
                )
                rewards[lane] = []
                if same_step:
                    prompt[lane] = (observations[lane] != VOCAB).sum()
        waiting = ended if mode is AutoresetMode.NEXT_STEP else np.zeros(n, bool)
        if mode is AutoresetMode.DISABLED and ended.any():
            observations, _ = env.reset(options={"reset_mask": ended})
            prompt[ended] = (observations[ended] != VOCAB).sum(axis=1)
    return out


def plain_log_ratios(episode: dict[str, Any], policy: Any, reference: Any, temperature: float = 1.0) -> list[float]:
    tokens, m = episode["tokens"], episode["prompt"]
    return [
        plain_log_prob(policy, tokens[:t], tokens[t], temperature)
        - plain_log_prob(reference, tokens[:t], tokens[t], temperature)
        for t in range(m, len(tokens))
    ]


# ---------------------------------------------------------------------- what is paid


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("mode", AutoresetMode)
def test_each_transition_pays_its_log_ratio_and_the_last_the_task_reward_too(
    mode: AutoresetMode, temperature: float, make_vec: Any, model: Any, other_model: Any
) -> None:
    env = make_vec(3, beta=BETA, autoreset_mode=mode, temperature=temperature)
    env.unwrapped.attach_policy(LanguageModel(other_model, WIDTH, Behaviour(temperature=temperature)))
    for episode in play(env, 10):
        ratios = plain_log_ratios(episode, other_model, model, temperature)
        expected = -BETA * np.array(ratios)
        expected[-1] += episode["info"]["task_reward"]
        np.testing.assert_allclose(episode["rewards"], expected, atol=1e-4)
        assert episode["info"]["kl"] == pytest.approx(sum(ratios), abs=1e-3)


def test_the_rewards_of_an_episode_sum_to_task_reward_minus_beta_times_kl(make_vec: Any, policy: Any) -> None:
    env = make_vec(4, beta=BETA)
    env.unwrapped.attach_policy(policy)
    episodes = play(env, 40)
    for episode in episodes:
        assert sum(episode["rewards"]) == pytest.approx(
            episode["info"]["task_reward"] - BETA * episode["info"]["kl"], abs=1e-6
        )
    assert np.std([episode["info"]["kl"] for episode in episodes]) > 0.1


def test_the_kl_is_exactly_zero_while_the_policy_is_the_reference(make_vec: Any, model: Any) -> None:
    env = make_vec(4, beta=BETA, temperature=0.7)
    env.unwrapped.attach_policy(env.unwrapped.reference.clone())
    assert all(episode["info"]["kl"] == 0.0 for episode in play(env, 20))


def test_at_beta_zero_the_kl_is_reported_and_not_paid(make_vec: Any, policy: Any) -> None:
    env = make_vec(2, beta=0.0)
    env.unwrapped.attach_policy(policy)
    for episode in play(env, 8):
        assert episode["info"]["kl"] != 0
        assert episode["rewards"] == [0.0] * (len(episode["rewards"]) - 1) + [episode["info"]["task_reward"]]


def test_with_pay_false_the_kl_is_reported_and_not_paid(make_vec: Any, policy: Any) -> None:
    env = make_vec(2, beta=BETA)
    env.unwrapped.attach_policy(policy, pay=False)
    for episode in play(env, 8):
        assert episode["info"]["kl"] != 0
        assert episode["rewards"] == [0.0] * (len(episode["rewards"]) - 1) + [episode["info"]["task_reward"]]


def test_without_a_policy_no_kl_is_reported(make_vec: Any) -> None:
    assert all(not {"kl", "ref_log_prob"} & episode["info"].keys() for episode in play(make_vec(2), 6))


def test_kl_reference_pays_beta_log_pi_ref_and_needs_no_policy(make_vec: Any, model: Any) -> None:
    for episode in play(make_vec(2, beta=BETA, kl="reference"), 8):
        tokens, m = episode["tokens"], episode["prompt"]
        log_ref = [plain_log_prob(model, tokens[:t], tokens[t]) for t in range(m, len(tokens))]
        expected = BETA * np.array(log_ref)
        expected[-1] += episode["info"]["task_reward"]
        np.testing.assert_allclose(episode["rewards"], expected, atol=1e-4)
        assert episode["info"]["ref_log_prob"] == pytest.approx(sum(log_ref), abs=1e-3)
        assert "kl" not in episode["info"]


def test_kl_reference_and_an_agent_that_adds_the_rest_make_up_the_whole_penalty(
    make_vec: Any, model: Any, other_model: Any
) -> None:
    for episode in play(make_vec(2, beta=BETA, kl="reference"), 6):
        tokens, m = episode["tokens"], episode["prompt"]
        log_pi = sum(plain_log_prob(other_model, tokens[:t], tokens[t]) for t in range(m, len(tokens)))
        kl = sum(plain_log_ratios(episode, other_model, model))
        assert sum(episode["rewards"]) - BETA * log_pi == pytest.approx(
            episode["info"]["task_reward"] - BETA * kl, abs=1e-3
        )


# ---------------------------------------------------------------------- beta


def test_beta_is_fixed_for_an_episode_when_it_starts(make_vec: Any, policy: Any) -> None:
    env = make_vec(2, beta=FixedKL(0.1))
    env.unwrapped.attach_policy(policy)
    env.reset(seed=0)
    env.step(np.array([A, A]))
    env.unwrapped.kl.controller.beta = 5.0
    paid = {}
    for name, action in (("old", A), ("end", EOS), ("new", A)):
        before = env.unwrapped.get_state()["arrays"]["_tokens"]
        ratio = policy.log_probs(before, np.full(2, action)) - env.unwrapped.reference.log_probs(
            before, np.full(2, action)
        )
        _, rewards, *_, info = env.step(np.full(2, action))
        paid[name] = (rewards - info.get("final_info", {}).get("task_reward", 0.0)) / -ratio
    np.testing.assert_allclose(paid["old"], 0.1, rtol=1e-4)
    np.testing.assert_allclose(paid["end"], 0.1, rtol=1e-4)
    np.testing.assert_allclose(paid["new"], 5.0, rtol=1e-4)


def test_512_episodes_of_twice_the_target_move_beta_by_one_percent() -> None:
    # clip(2 - 1, -0.2, 0.2) * 512 / 10,000 = 0.01024
    controller = AdaptiveKL(beta=0.1, target=6.0, horizon=10_000, episodes_per_update=512)
    controller.observe(np.full(512, 12.0))
    assert controller.beta == pytest.approx(0.1 * 1.01024, rel=1e-12)


@pytest.mark.parametrize(("kl", "factor"), [(0.0, 1 - 0.2 * 0.1), (5.5, 1 - 0.5 / 6 * 0.1), (6.0, 1.0), (6.6, 1.01)])
def test_below_the_target_beta_falls_and_above_it_rises(kl: float, factor: float) -> None:
    controller = AdaptiveKL(beta=2.0, target=6.0, horizon=1000, episodes_per_update=100)
    controller.observe(np.full(100, kl))
    assert controller.beta == pytest.approx(2.0 * factor)


def test_how_episodes_arrive_does_not_matter_to_the_controller() -> None:
    kls = np.random.default_rng(0).normal(8, 3, size=300)
    at_once, one_by_one = AdaptiveKL(episodes_per_update=64), AdaptiveKL(episodes_per_update=64)
    at_once.observe(kls)
    for kl in kls:
        one_by_one.observe(np.array([kl]))
    assert at_once.beta == one_by_one.beta != 0.1


def test_the_environment_tells_the_controller_each_episodes_kl(make_vec: Any, policy: Any) -> None:
    env = make_vec(3, beta=AdaptiveKL(0.1, episodes_per_update=1000))
    env.unwrapped.attach_policy(policy)
    kls = [episode["info"]["kl"] for episode in play(env, 12)]
    assert env.unwrapped.kl.controller.pending == pytest.approx(kls)


# ---------------------------------------------------------------------- the ignored action of NEXT_STEP


def test_the_ignored_action_of_next_step_pays_nothing_and_counts_no_token(make_vec: Any, policy: Any) -> None:
    counted: list[int] = []

    def counting(completions: list[str], trainer_state: Any, **columns: Any) -> list[float]:
        counted.append(trainer_state.global_step)
        return [1.0] * len(completions)

    env = make_vec(1, beta=BETA, autoreset_mode="NEXT_STEP", reward=counting)
    env.unwrapped.attach_policy(policy)
    env.reset(seed=0)
    env.step(np.array([EOS]))
    observations, rewards, terminations, _, info = env.step(np.array([A]))
    assert (rewards.tolist(), terminations.tolist()) == ([0.0], [False])
    assert A not in observations[0][(observations[0] != VOCAB).sum() :]
    assert "prompt_id" in info
    env.step(np.array([B]))
    *_, info = env.step(np.array([EOS]))
    assert counted == [1, 3]
    ratio = 0.0
    tokens = env.unwrapped.get_state()["arrays"]["_tokens"][0]
    tokens = tokens[tokens != VOCAB]
    for t in (-2, -1):
        row = np.full((1, WIDTH), VOCAB)
        row[0, : len(tokens) + t] = tokens[:t]
        ratio += (policy.log_probs(row, tokens[[t]]) - env.unwrapped.reference.log_probs(row, tokens[[t]])).item()
    assert info["kl"][0] == pytest.approx(ratio, abs=1e-4)


def test_the_ignored_action_may_be_anything(make_vec: Any, policy: Any) -> None:
    env = make_vec(2, autoreset_mode="NEXT_STEP", action_mask=np.arange(VOCAB) < 9)
    env.unwrapped.attach_policy(policy)
    env.reset(seed=0)
    env.step(np.array([EOS, A]))
    env.step(np.array([-1, A]))
    env.step(np.array([A, EOS]))
    env.step(np.array([A, VOCAB + 7]))


# ---------------------------------------------------------------------- one distribution


def test_the_action_mask_applies_to_policy_and_reference_alike(make_vec: Any, model: Any, other_model: Any) -> None:
    allowed = np.arange(VOCAB) < 6
    env = make_vec(2, beta=BETA, action_mask=allowed)
    env.unwrapped.attach_policy(LanguageModel(other_model, WIDTH, env.unwrapped.behaviour))
    observations, _ = env.reset(seed=0)
    assert (env.unwrapped.action_masks() == allowed).all()
    _, rewards, *_ = env.step(np.array([A, B]))

    def masked(network: Any, row: np.ndarray, action: int) -> float:
        log_p = np.array([plain_log_prob(network, row[row != VOCAB].tolist(), token) for token in range(6)])
        return float(log_p[action] - np.log(np.exp(log_p).sum()))

    expected = [
        -BETA * (masked(other_model, row, a) - masked(model, row, a))
        for row, a in zip(observations, (A, B), strict=True)
    ]
    np.testing.assert_allclose(rewards, expected, atol=1e-4)


def test_action_masks_are_new_arrays_that_follow_the_observation(make_vec: Any) -> None:
    def not_twice(observations: np.ndarray) -> np.ndarray:
        last = (observations != VOCAB).sum(axis=1) - 1
        return np.arange(VOCAB) != observations[np.arange(len(observations)), last][:, None]

    env = make_vec(2, action_mask=not_twice)
    env.reset(seed=0)
    env.step(np.array([A, B]))
    masks = env.unwrapped.action_masks()
    assert np.argwhere(~masks).tolist() == [[0, A], [1, B]]
    masks[:] = False
    assert env.unwrapped.action_masks().any()


# ---------------------------------------------------------------------- policies: attaching, and what they may do wrong


def test_a_penalty_without_a_policy_warns_once_and_pays_the_task_reward(make_vec: Any) -> None:
    env = make_vec(2, beta=BETA)
    env.reset(seed=0)
    with pytest.warns(UserWarning, match=r"beta=0.3.*is off: no policy is attached.*attach_policy\(policy\)"):
        _, rewards, *_ = env.step(np.array([A, A]))
    assert rewards.tolist() == [0.0, 0.0]
    env.step(np.array([A, A]))  # a second warning would be an error here


@pytest.mark.parametrize("kwargs", [{"beta": 0.0}, {"beta": BETA, "kl": "reference"}])
def test_no_warning_where_nothing_is_missing(kwargs: dict[str, Any], make_vec: Any) -> None:
    env = make_vec(1, **kwargs)
    env.reset(seed=0)
    env.step(np.array([A]))


def test_attaching_takes_effect_at_once_and_can_be_repeated(make_vec: Any, policy: Any, model: Any) -> None:
    env = make_vec(1, beta=BETA)
    env.unwrapped.attach_policy(policy)
    env.unwrapped.attach_policy(LanguageModel(model, WIDTH))
    (episode,) = play(env, 1)
    assert episode["info"]["kl"] == pytest.approx(0.0, abs=1e-6)


def test_the_single_environment_takes_a_policy_too(make: Any, policy: Any, model: Any, other_model: Any) -> None:
    env = make(beta=BETA)
    env.unwrapped.attach_policy(policy)
    observation, _ = env.reset(seed=0)
    _, reward, *_ = env.step(A)
    tokens = observation[observation != VOCAB].tolist()
    expected = -BETA * (plain_log_prob(other_model, tokens, A) - plain_log_prob(model, tokens, A))
    assert reward == pytest.approx(expected, abs=1e-4)


def test_a_weight_update_of_the_policy_is_followed(make_vec: Any, model: Any) -> None:
    trained = tiny_model("gpt2", seed=1)
    env = make_vec(1, beta=BETA)
    env.unwrapped.attach_policy(LanguageModel(trained, WIDTH))
    observations, _ = env.reset(seed=0)
    env.step(np.array([A]))
    for p in trained.parameters():
        p.data.mul_(0.7)
    _, rewards, *_ = env.step(np.array([B]))
    tokens = [*observations[0][observations[0] != VOCAB].tolist(), A]
    expected = -BETA * (plain_log_prob(trained, tokens, B) - plain_log_prob(model, tokens, B))
    assert rewards[0] == pytest.approx(expected, abs=1e-4)


class Returns:
    """A policy that returns whatever it was given."""

    def __init__(self, *values: Any) -> None:
        self.values = values

    def log_probs(self, observations: np.ndarray, actions: np.ndarray) -> Any:
        return np.array(self.values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([-1.0], r"one log-probability per lane, shape \(2,\), got \(1,\)"),
        ([-1.0, np.nan], "finite log-probabilities from Returns.log_probs, got nan for token 3 of lane 1"),
        ([-np.inf, -1.0], "got -inf for token 3 of lane 0.*attach the one that draws the actions"),
    ],
)
def test_a_policy_that_returns_nonsense_is_stopped(values: list[float], message: str, make_vec: Any) -> None:
    env = make_vec(2, beta=BETA)
    env.unwrapped.attach_policy(Returns(*values))
    env.reset(seed=0)
    with pytest.raises(ValueError, match=message):
        env.step(np.array([A, A]))


def test_a_policy_may_write_into_what_it_is_given(make_vec: Any, policy: Any) -> None:
    class Vandal:
        def log_probs(self, observations: np.ndarray, actions: np.ndarray) -> np.ndarray:
            values = policy.log_probs(observations, actions)
            observations[:] = 0
            return values

    env, spoilt = make_vec(2, beta=BETA), make_vec(2, beta=BETA)
    env.unwrapped.attach_policy(policy)
    spoilt.unwrapped.attach_policy(Vandal())
    assert [episode["tokens"] for episode in play(spoilt, 6)] == [episode["tokens"] for episode in play(env, 6)]


def test_what_is_no_policy_cannot_be_attached(make_vec: Any) -> None:
    with pytest.raises(ValueError, match=r"a policy with log_probs\(observations: .*got function"):
        make_vec(1).unwrapped.attach_policy(lambda observations, actions: 0.0)


@pytest.mark.parametrize("kind", ["k2", "k3", "full"])
def test_estimators_that_give_a_wrong_gradient_are_refused_with_the_reason(kind: str, make_vec: Any) -> None:
    with pytest.raises(ValueError, match=rf"kl='{kind}' cannot be paid in the reward: only k1.*kl='policy'"):
        make_vec(1, kl=kind)


@pytest.mark.parametrize(
    ("beta", "message"),
    [
        (-0.1, "finite beta >= 0 .*got -0.1"),
        (float("nan"), "finite beta >= 0 .*got nan"),
        (float("inf"), "finite beta >= 0 .*got inf"),
        ("0.1", "a number, FixedKL or AdaptiveKL, got '0.1'"),
        (True, "a number, FixedKL or AdaptiveKL, got True"),
        (None, "a number, FixedKL or AdaptiveKL, got None"),
    ],
)
def test_a_wrong_beta_is_refused(beta: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KLPenalty(beta)


@pytest.mark.parametrize("settings", [{"target": 0}, {"horizon": 0}, {"episodes_per_update": 0}, {"beta": -1.0}])
def test_a_controller_that_cannot_work_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="Expected"):
        AdaptiveKL(**settings)


def test_the_penalty_survives_gymnasiums_wrappers(make: Any, policy: Any) -> None:
    env = gym.wrappers.TimeLimit(gym.wrappers.RecordEpisodeStatistics(make(beta=BETA)), 3)
    env.unwrapped.attach_policy(policy)
    env.reset(seed=0)
    rewards = [env.step(A) for _ in range(3)]
    assert all(step[1] != 0 for step in rewards)
    assert (rewards[-1][2], rewards[-1][3]) == (False, True)  # cut by the wrapper: truncated, and no task reward
    assert "task_reward" not in rewards[-1][4]
