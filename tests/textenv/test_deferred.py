"""The deferred lane is the step lane with its sums done later; and it is fair to long responses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from gymnasium.error import ResetNeeded
from gymnasium.vector import AutoresetMode

from textenv import AdaptiveKL, Episodes, FixedKL, LanguageModel

from ..tiny import EOS, VOCAB
from .letters import BUDGET, WIDTH, letters_reward, random_actions
from .reference_env import plain_log_prob

A, B = 3, 4
BETA = 0.3


@pytest.fixture
def policy(other_model: Any) -> LanguageModel:
    return LanguageModel(other_model, WIDTH)


def deferred(env: Any, episodes: int, seed: int = 0, stop: float = 0.2) -> Episodes:
    """B episodes of random actions, through the deferred lane."""
    rng = np.random.default_rng(seed)
    with env.unwrapped.deferred(episodes=episodes) as ledger:
        env.reset(seed=seed)
        while not ledger.done:
            env.step(random_actions(rng, env.num_envs, stop))
    return ledger.episodes


def stepwise(env: Any, episodes: int, seed: int = 0) -> list[dict[str, Any]]:
    """The same episodes in the same order, read off what `step` returns."""
    rng, n = np.random.default_rng(seed), env.num_envs
    same_step = env.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
    started: list[dict[str, Any]] = []
    busy: dict[int, dict[str, Any]] = {}

    def start(lanes: Any, observations: np.ndarray, info: dict[str, Any]) -> None:
        for lane in lanes:
            busy[lane] = {
                "lane": lane,
                "order": len(started),
                "prompt_id": info["prompt_id"][lane],
                "group_id": info["group_id"][lane] if "group_id" in info else -1,
                "prompt_length": (observations[lane] != VOCAB).sum(),
                "rewards": [],
            }
            started.append(busy[lane])

    start(range(n), *env.reset(seed=seed))
    ended = np.zeros(n, bool)
    while sum("tokens" in episode for episode in started[:episodes]) < episodes:
        observations, rewards, terminations, _, info = env.step(random_actions(rng, n))
        for lane in range(n):
            if same_step or not ended[lane]:
                busy[lane]["rewards"].append(rewards[lane])
        final = info.get("final_info") if same_step else info
        for lane in np.flatnonzero(terminations):
            row = info["final_obs"][lane] if same_step else observations[lane]
            tokens = row[row != VOCAB]
            busy[lane] |= {"tokens": tokens, "response_length": len(tokens) - busy[lane]["prompt_length"]}
            busy[lane] |= {name: final[name][lane] for name in ("finish_reason", "kl", "task_reward")}
        start(np.flatnonzero(terminations if same_step else ended), observations, info)
        ended = terminations
    return started[:episodes]


@pytest.mark.parametrize("mode", ["SAME_STEP", "NEXT_STEP"])
@pytest.mark.parametrize(("lanes", "episodes", "group_size"), [(4, 13, 1), (4, 4, 1), (4, 3, 1), (4, 12, 2), (2, 8, 4)])
def test_the_two_lanes_agree_field_by_field(
    lanes: int, episodes: int, group_size: int, mode: str, make_vec: Any, policy: Any
) -> None:
    def make() -> Any:
        env = make_vec(lanes, beta=BETA, group_size=group_size, autoreset_mode=mode)
        env.unwrapped.attach_policy(policy)
        return env

    settled, stepped = deferred(make(), episodes), stepwise(make(), episodes)
    assert len(settled) == len(stepped) == episodes
    for ours, theirs in zip(settled, stepped, strict=True):
        for name in ("lane", "order", "prompt_id", "group_id", "prompt_length", "response_length", "finish_reason"):
            assert getattr(ours, name) == theirs[name], name
        assert ours.tokens.tolist() == theirs["tokens"].tolist()
        assert ours.task_reward == pytest.approx(theirs["task_reward"], abs=1e-6)
        assert ours.kl == pytest.approx(theirs["kl"], abs=1e-3)
        np.testing.assert_allclose(ours.rewards, theirs["rewards"], atol=1e-4)


def test_every_field_agrees_with_plain_transformers(
    make_vec: Any, policy: Any, model: Any, other_model: Any, tokenizer: Any
) -> None:
    env = make_vec(3, beta=BETA)
    env.unwrapped.attach_policy(policy)
    rows = env.unwrapped.task.prompts
    for episode in deferred(env, 10):
        tokens, m = episode.tokens.tolist(), episode.prompt_length
        assert tokens[:m] == rows.token_ids[episode.prompt_id].tolist()
        at = range(m, m + episode.response_length)
        log_probs = [plain_log_prob(other_model, tokens[:t], tokens[t]) for t in at]
        ref_log_probs = [plain_log_prob(model, tokens[:t], tokens[t]) for t in at]
        np.testing.assert_allclose(episode.log_probs, log_probs, atol=1e-4)
        np.testing.assert_allclose(episode.ref_log_probs, ref_log_probs, atol=1e-4)
        text = tokenizer.decode(tokens[m:], skip_special_tokens=True)
        (score,) = letters_reward([text], [rows.columns["target"][episode.prompt_id]])
        assert episode.task_reward == score
        expected = -BETA * (np.array(log_probs) - ref_log_probs)
        expected[-1] += score
        np.testing.assert_allclose(episode.rewards, expected, atol=1e-4)
        assert episode.kl == pytest.approx(sum(log_probs) - sum(ref_log_probs), abs=1e-3)
        assert sum(episode.rewards) == pytest.approx(episode.task_reward - BETA * episode.kl, abs=1e-6)
        stopped = tokens[-1] == EOS
        assert episode.finish_reason == ("stop" if stopped else "length")
        assert stopped or episode.response_length == BUDGET


def test_without_a_policy_log_probs_are_unknown_and_the_task_reward_is_paid(make_vec: Any) -> None:
    for episode in deferred(make_vec(2), 5):
        assert np.isnan(episode.log_probs).all()
        assert np.isnan(episode.kl)
        assert episode.rewards.tolist() == [0.0] * (episode.response_length - 1) + [episode.task_reward]


def test_kl_reference_is_paid_here_too(make_vec: Any, model: Any) -> None:
    for episode in deferred(make_vec(2, beta=BETA, kl="reference"), 5):
        tokens, m = episode.tokens.tolist(), episode.prompt_length
        expected = [BETA * plain_log_prob(model, tokens[:t], tokens[t]) for t in range(m, len(tokens))]
        expected[-1] += episode.task_reward
        np.testing.assert_allclose(episode.rewards, expected, atol=1e-4)


def test_pay_false_reports_the_kl_and_pays_the_task_reward_alone(make_vec: Any, policy: Any) -> None:
    env = make_vec(2, beta=BETA)
    env.unwrapped.attach_policy(policy, pay=False)
    for episode in deferred(env, 5):
        assert episode.kl != 0
        assert sum(episode.rewards) == episode.task_reward


def test_beta_is_fixed_for_an_episode_when_it_starts_here_too(make_vec: Any, policy: Any) -> None:
    env = make_vec(1, beta=FixedKL(0.1))
    env.unwrapped.attach_policy(policy)
    with env.unwrapped.deferred(episodes=2) as ledger:
        env.reset(seed=0)
        env.unwrapped.kl.controller.beta = 5.0
        while not ledger.done:
            env.step(np.array([EOS]))
    for episode, beta in zip(ledger.episodes, (0.1, 5.0), strict=True):
        assert sum(episode.rewards) == pytest.approx(episode.task_reward - beta * episode.kl, abs=1e-6)


def test_the_controller_hears_of_every_episode_once(make_vec: Any, policy: Any) -> None:
    env = make_vec(3, beta=AdaptiveKL(0.1, episodes_per_update=1000))
    env.unwrapped.attach_policy(policy)
    assert env.unwrapped.kl.controller.pending == pytest.approx(deferred(env, 10).kl.tolist())


# ---------------------------------------------------------------------- fairness


def test_the_mean_over_started_episodes_is_unbiased_and_over_finished_ones_it_is_not(make_vec: Any) -> None:
    # A response stops at each token with p = 0.3 (or at the budget of 12), and is paid its length.
    p, budget, lanes, episodes, repetitions = 0.3, 12, 16, 24, 60
    expected = sum((1 - p) ** t for t in range(budget))
    env = make_vec(
        lanes, max_new_tokens=budget, reward=lambda completion_ids, **columns: [float(len(c)) for c in completion_ids]
    )
    rng = np.random.default_rng(0)

    def actions() -> np.ndarray:
        return np.where(rng.random(lanes) < p, EOS, A)

    def started_first() -> float:
        with env.unwrapped.deferred(episodes=episodes) as ledger:
            env.reset()
            while not ledger.done:
                env.step(actions())
        return float(ledger.episodes.task_reward.mean())

    def finished_first() -> float:
        lengths: list[float] = []
        env.reset()
        while len(lengths) < episodes:
            *_, ended, _, info = env.step(actions())
            lengths += info["final_info"]["task_reward"][ended].tolist() if ended.any() else []
        return float(np.mean(lengths[:episodes]))

    env.reset(seed=0)
    fair, biased = (np.array([run() for _ in range(repetitions)]) for run in (started_first, finished_first))
    standard_error = fair.std(ddof=1) / np.sqrt(repetitions)
    assert abs(fair.mean() - expected) < 3 * standard_error
    assert biased.mean() < expected - 5 * standard_error


@pytest.mark.parametrize(("lanes", "episodes"), [(4, 1), (4, 3), (4, 4), (4, 5), (3, 20)])
def test_exactly_b_episodes_are_started_and_all_are_finished(lanes: int, episodes: int, make_vec: Any) -> None:
    env, starts = make_vec(lanes), 0
    rng = np.random.default_rng(0)
    with env.unwrapped.deferred(episodes=episodes) as ledger:
        _, info = env.reset(seed=0)
        starts += int(info["_prompt_id"].sum())
        while not ledger.done:
            *_, info = env.step(random_actions(rng, lanes))
            starts += int(info.get("_prompt_id", np.zeros(lanes)).sum())
    assert starts == len(ledger.episodes) == episodes
    assert ledger.episodes.order.tolist() == list(range(episodes))
    assert (ledger.episodes.response_length > 0).all()


def test_fewer_episodes_than_lanes_in_an_environment_that_was_never_reset(make_vec: Any, policy: Any) -> None:
    env = make_vec(4, beta=BETA)
    env.unwrapped.attach_policy(policy)
    with env.unwrapped.deferred(episodes=2) as ledger:
        observations, _ = env.reset(seed=0)
        while not ledger.done:
            actions = policy.log_probs_all(observations).argmax(axis=1)  # agents ask about all lanes, idle ones too
            observations, *_ = env.step(actions)
    assert ledger.episodes.lane.tolist() == [0, 1]
    assert np.isfinite(ledger.episodes.kl).all()


def test_an_idle_lane_keeps_its_last_observation_and_its_action_is_ignored(make_vec: Any, policy: Any) -> None:
    env = make_vec(2, beta=BETA)
    env.unwrapped.attach_policy(policy)
    with env.unwrapped.deferred(episodes=2) as ledger:
        env.reset(seed=0)
        observations, *_ = env.step(np.array([EOS, A]))
        last = observations[0].copy()
        assert ledger.index.tolist() == [-1, 1]  # which episode each lane is busy with
        for action in (VOCAB + 5, -1, B, EOS):
            if not ledger.done:
                observations, _, terminations, _, _ = env.step(np.array([action, A]))
                assert observations[0].tolist() == last.tolist()
                assert not terminations[0]
    assert ledger.episodes.response_length.tolist() == [1, BUDGET]


# ---------------------------------------------------------------------- inside the block


def test_rewards_are_nan_until_they_are_settled(make_vec: Any) -> None:
    env = make_vec(2)
    with env.unwrapped.deferred(episodes=2) as ledger:
        env.reset(seed=0)
        _, rewards, _, _, info = env.step(np.array([EOS, EOS]))
        assert np.isnan(rewards).all()
        assert info["final_info"]["finish_reason"].tolist() == ["stop", "stop"]
        assert "task_reward" not in info["final_info"]
        with pytest.raises(RuntimeError, match=r"settled when the .* block ends"):
            _ = ledger.episodes
    assert np.isfinite(ledger.episodes.rewards).all()


def test_the_reward_sees_all_episodes_in_one_batch_in_order_of_start(make_vec: Any) -> None:
    batches: list[list[list[int]]] = []

    def spy(completion_ids: list[list[int]], **columns: Any) -> list[float]:
        batches.append(completion_ids)
        return [0.0] * len(completion_ids)

    episodes = deferred(make_vec(3, reward=spy), 11)
    assert batches == [[episode.tokens[episode.prompt_length :].tolist() for episode in episodes]]


def test_a_reset_just_before_the_block_gives_its_first_episodes(make_vec: Any) -> None:
    env = make_vec(2)
    env.reset(options={"prompt_id": np.array([3, 1])})
    with env.unwrapped.deferred(episodes=2) as ledger:
        while not ledger.done:
            env.step(np.array([EOS, EOS]))
    assert ledger.episodes.prompt_id.tolist() == [3, 1]


def test_an_episode_half_done_is_not_carried_into_the_block(make_vec: Any) -> None:
    env = make_vec(2)
    env.reset(seed=0)
    env.step(np.array([A, A]))
    with pytest.raises(ResetNeeded, match=r"call reset\(\) before step"), env.unwrapped.deferred(episodes=2):
        env.step(np.array([A, A]))


def test_a_reset_inside_the_block_starts_all_over(make_vec: Any) -> None:
    env = make_vec(2)
    with env.unwrapped.deferred(episodes=3) as ledger:
        env.reset(seed=1)
        env.step(np.array([EOS, A]))
        env.reset(seed=0)
        rng = np.random.default_rng(0)
        while not ledger.done:
            env.step(random_actions(rng, 2))
    expected = deferred(make_vec(2), 3)
    assert ledger.episodes.tokens.tolist() == expected.tokens.tolist()


def test_after_the_block_nothing_is_carried_over(make_vec: Any) -> None:
    env = make_vec(2)
    deferred(env, 3)
    with pytest.raises(ResetNeeded):
        env.step(np.array([A, A]))
    env.reset(seed=0)
    _, rewards, *_ = env.step(np.array([A, A]))
    assert np.isfinite(rewards).all()


def test_an_exception_in_the_block_skips_settlement_and_leaves_a_usable_environment(make_vec: Any) -> None:
    calls: list[int] = []

    def spy(completions: list[str], **columns: Any) -> list[float]:
        calls.append(len(completions))
        return [0.0] * len(completions)

    def interrupted() -> None:
        with ledger:
            env.reset(seed=0)
            env.step(np.array([EOS, A]))
            raise KeyboardInterrupt

    env = make_vec(2, reward=spy)
    ledger = env.unwrapped.deferred(episodes=2)
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert calls == []
    with pytest.raises(RuntimeError, match="settled when"):
        _ = ledger.episodes
    with pytest.raises(ResetNeeded):  # the episode that was under way is over
        env.step(np.array([A, A]))
    assert len(deferred(env, 4)) == 4
    assert calls == [4]


def test_leaving_the_block_early_is_an_error(make_vec: Any) -> None:
    def leave_early() -> None:
        with env.unwrapped.deferred(episodes=4):
            env.reset(seed=0)
            env.step(np.array([EOS, A]))

    env = make_vec(2)
    with pytest.raises(RuntimeError, match=r"left with 1 of 4 episodes finished: step until ledger.done"):
        leave_early()


def test_a_failing_reward_at_settlement_leaves_a_usable_environment(make_vec: Any) -> None:
    env = make_vec(2, reward=lambda completions, **columns: [float("nan")] * len(completions))
    with pytest.raises(ValueError, match="returned nan"):
        deferred(env, 2)
    env.reset(seed=0)
    env.step(np.array([A, A]))


def test_blocks_do_not_nest(make_vec: Any) -> None:
    env = make_vec(2)
    with pytest.raises(RuntimeError, match="do not nest"), env.unwrapped.deferred(2), env.unwrapped.deferred(2):
        pass
    assert len(deferred(env, 2)) == 2


def test_without_autoreset_there_is_no_block(make_vec: Any) -> None:
    with pytest.raises(ValueError, match="autoreset_mode='SAME_STEP' or 'NEXT_STEP'"):
        deferred(make_vec(2, autoreset_mode="DISABLED"), 2)


def test_lanes_cannot_be_reset_one_by_one_inside_a_block(make_vec: Any) -> None:
    env = make_vec(2)
    env.reset(seed=0)
    with pytest.raises(ValueError, match="reset all of them, or none"), env.unwrapped.deferred(episodes=2):
        env.reset(options={"reset_mask": np.array([True, False])})


@pytest.mark.parametrize("call", ["get_state", "set_state"])
def test_there_is_no_state_inside_a_block(call: str, make_vec: Any) -> None:
    env = make_vec(2)
    env.reset(seed=0)
    state = env.unwrapped.get_state()
    with pytest.raises(RuntimeError, match="inside a deferred block"), env.unwrapped.deferred(episodes=2):
        getattr(env.unwrapped, call)(*([state] if call == "set_state" else []))


@pytest.mark.parametrize("episodes", [0, -1, 2.5, True, "4"])
def test_the_number_of_episodes_must_be_a_positive_integer(episodes: Any, make_vec: Any) -> None:
    with pytest.raises(ValueError, match=r"deferred\(episodes=...\) to be a positive integer"):
        make_vec(2).unwrapped.deferred(episodes=episodes)


# ---------------------------------------------------------------------- the columns


def test_columns_are_padded_and_rows_are_not(make_vec: Any, policy: Any) -> None:
    env = make_vec(3, beta=BETA)
    env.unwrapped.attach_policy(policy)
    episodes = deferred(env, 7)
    assert episodes.tokens.shape == (7, WIDTH)
    assert episodes.rewards.shape == episodes.log_probs.shape == episodes.mask.shape == (7, BUDGET)
    assert episodes.mask.sum(axis=1).tolist() == episodes.response_length.tolist()
    for name in ("rewards", "log_probs", "ref_log_probs"):
        assert (getattr(episodes, name)[~episodes.mask] == 0).all()
    for i, episode in enumerate(episodes):
        n = episode.prompt_length + episode.response_length
        assert len(episode.tokens) == n
        assert (episodes.tokens[i, n:] == VOCAB).all()
        assert len(episode.rewards) == len(episode.log_probs) == len(episode.ref_log_probs) == episode.response_length


def test_reward_components_are_kept_with_nan_where_one_does_not_apply(make_vec: Any) -> None:
    from rewards import WeightedSum

    def brief(completions: list[str]) -> list[float]:
        return [-len(text) / 8 for text in completions]

    def only_ab(prompts: list[str], completions: list[str]) -> list[float | None]:
        return [1.0 if prompt == "ab=" else None for prompt in prompts]

    env = make_vec(3, reward=WeightedSum({"brief": (brief, 2.0), "ab": (only_ab, 0.5)}))
    episodes = deferred(env, 30)
    is_ab = episodes.prompt_id == 0
    assert is_ab.any()
    assert not is_ab.all()
    assert (np.isnan(episodes.components["ab"]) == ~is_ab).all()
    np.testing.assert_allclose(episodes.task_reward, 2 * episodes.components["brief"] + 0.5 * is_ab)


def test_batches_are_concatenated_and_numbered_anew(make_vec: Any) -> None:
    env = make_vec(2)
    parts = [deferred(env, 3, seed=seed) for seed in (0, 1)]
    whole = Episodes.concatenate(parts)
    assert whole.order.tolist() == list(range(6))
    assert whole.tokens.tolist() == [*parts[0].tokens.tolist(), *parts[1].tokens.tolist()]
    assert whole.components["letters_reward"].tolist() == whole.task_reward.tolist()


def test_completions_are_what_the_reward_saw(make_vec: Any) -> None:
    seen: list[str] = []

    def spy(completions: list[str], **columns: Any) -> list[float]:
        seen.extend(completions)
        return [0.0] * len(completions)

    env = make_vec(2, reward=spy)
    assert env.unwrapped.completions(deferred(env, 6)) == seen
