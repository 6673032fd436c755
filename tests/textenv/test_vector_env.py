"""Lanes are environments: whatever happens beside them, each lives the life of a single one."""

from __future__ import annotations

import pickle
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from ..tiny import EOS, VOCAB
from .letters import BUDGET, ROWS, WIDTH, PlainPolicy, random_actions
from .reference_env import ReferenceEnv

A, B, C = 3, 4, 5  # letters' ids


def assert_same(ours: Any, theirs: Any, where: str = "") -> None:
    """Equal structure, types and values; floats to 1e-4, because batches of another shape round differently."""
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), where
        for name in theirs:
            assert_same(ours[name], theirs[name], f"{where}[{name!r}]")
    elif isinstance(theirs, tuple):
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert_same(a, b, f"{where}[{i}]")
    elif isinstance(theirs, np.ndarray):
        assert ours.dtype == theirs.dtype, where
        assert ours.shape == theirs.shape, where
        if theirs.dtype == object:
            for lane, (a, b) in enumerate(zip(ours, theirs, strict=True)):
                assert_same(a, b, f"{where}[{lane}]")
        else:
            np.testing.assert_allclose(ours, theirs, atol=1e-4, err_msg=where)
    else:
        assert ours == theirs, where


# ---------------------------------------------------------------------- lanes equal single environments


@pytest.mark.parametrize("with_policy", [False, True], ids=["task reward alone", "with the KL penalty"])
@pytest.mark.parametrize("mode", AutoresetMode)
def test_lanes_equal_single_environments_and_the_reference(
    mode: AutoresetMode, with_policy: bool, make: Any, make_vec: Any, task_kwargs: Any, other_model: Any
) -> None:
    lanes, settings = 3, {"beta": 0.3 if with_policy else 0.0, "temperature": 0.7}
    plain = {**task_kwargs, **settings, "policy": other_model if with_policy else None}
    ours = make_vec(lanes, autoreset_mode=mode, **settings)
    singles = SyncVectorEnv([lambda: make(**settings)] * lanes, autoreset_mode=mode)
    written_again = SyncVectorEnv([lambda: ReferenceEnv(**plain)] * lanes, autoreset_mode=mode)
    if with_policy:
        for env in (ours, *singles.envs):
            env.unwrapped.attach_policy(PlainPolicy(other_model, settings["temperature"]))
    everyone = ours, singles, written_again
    rng = np.random.default_rng(0)
    first, *others = [env.reset(seed=11) for env in everyone]
    for other in others:
        assert_same(first, other)
    ends = 0
    for step in range(24):
        actions = random_actions(rng, lanes)
        first, *others = [env.step(actions) for env in everyone]
        for other in others:
            for name, a, b in zip(("obs", "reward", "terminated", "truncated", "info"), first, other, strict=True):
                assert_same(a, b, f"step {step}: {name}")
        ends += int(first[2].sum())
        if mode is AutoresetMode.DISABLED and first[2].any():
            first, *others = [env.reset(options={"reset_mask": first[2].copy()}) for env in everyone]
            for other in others:
                assert_same(first, other, f"reset after step {step}")
    assert ends >= 3 * lanes


def test_a_whole_episode_worked_by_hand(make_vec: Any) -> None:
    # Prompt 0 is "ab=" with target "a": saying "a", "b", stop scores 1 - 2/8 on the third transition, and nothing before.
    env = make_vec(1, autoreset_mode="DISABLED")
    observations, info = env.reset(options={"prompt_id": 0})
    prompt, pad = [3, 4, 15], [VOCAB]
    assert observations.tolist() == [prompt + pad * 7]
    assert info["prompt_id"].tolist() == [0]
    for response, reward, end in [([A], 0.0, False), ([A, B], 0.0, False), ([A, B, EOS], 0.75, True)]:
        observations, rewards, terminations, truncations, info = env.step(np.array(response[-1:]))
        assert observations.tolist() == [prompt + response + pad * (7 - len(response))]
        assert (rewards.tolist(), terminations.tolist(), truncations.tolist()) == ([reward], [end], [False])
    assert info["finish_reason"].tolist() == ["stop"]
    assert info["task_reward"].tolist() == [0.75]
    assert info["reward/letters_reward"].tolist() == [0.75]


def test_the_budget_terminates_and_pays_on_its_last_token(make_vec: Any) -> None:
    env = make_vec(1, autoreset_mode="DISABLED")
    env.reset(options={"prompt_id": 0})
    outcomes = [env.step(np.array([A])) for _ in range(BUDGET)]
    assert [step[1].item() for step in outcomes] == [0, 0, 0, 0, 5 - 5 / 8]
    assert [step[2].item() for step in outcomes] == [False] * 4 + [True]
    assert not any(step[3].item() for step in outcomes)
    assert outcomes[-1][4]["finish_reason"].tolist() == ["length"]


def test_a_stop_token_on_the_last_place_counts_as_a_stop(make_vec: Any) -> None:
    env = make_vec(1)
    env.reset(seed=0)
    for token in [A] * (BUDGET - 1) + [EOS]:
        *_, info = env.step(np.array([token]))
    assert info["final_info"]["finish_reason"].tolist() == ["stop"]


@pytest.mark.parametrize("mode", AutoresetMode)
def test_no_transition_crosses_an_episode_border(mode: AutoresetMode, make_vec: Any) -> None:
    env, rng = make_vec(3, autoreset_mode=mode), np.random.default_rng(1)
    prompts = [env.unwrapped.tokenizer(row["prompt"])["input_ids"] for row in ROWS]
    before, info = env.reset(seed=0)
    prompt_id, ended = info["prompt_id"], np.zeros(3, bool)
    for _ in range(60):
        if mode is AutoresetMode.DISABLED and ended.any():
            before, info = env.reset(options={"reset_mask": ended})
            prompt_id, ended = np.where(ended, info["prompt_id"], prompt_id), np.zeros(3, bool)
        actions = random_actions(rng, 3)
        after, rewards, terminations, _, info = env.step(actions)
        for lane in range(3):
            started = prompts[info["prompt_id"][lane]] if "prompt_id" in info else None
            if (
                mode is AutoresetMode.NEXT_STEP and ended[lane]
            ):  # the transition between two episodes: nothing but a prompt
                assert after[lane][after[lane] != VOCAB].tolist() == started
                assert (rewards[lane], terminations[lane]) == (0.0, False)
                continue
            arrived = info["final_obs"][lane] if mode is AutoresetMode.SAME_STEP and terminations[lane] else after[lane]
            n = int((before[lane] != VOCAB).sum())
            assert arrived[:n].tolist() == before[lane][:n].tolist()
            assert arrived[n] == actions[lane]
            assert (arrived[n + 1 :] == VOCAB).all()
            if mode is AutoresetMode.SAME_STEP and terminations[lane]:
                assert info["final_info"]["prompt_id"][lane] == prompt_id[lane]
                assert after[lane][after[lane] != VOCAB].tolist() == started
        starts = info.get("_prompt_id", np.zeros(3, bool)) & (
            terminations if mode is AutoresetMode.SAME_STEP else ended
        )
        prompt_id = np.where(starts, info.get("prompt_id", prompt_id), prompt_id)
        before, ended = after, terminations


def test_lanes_refill_at_once_without_waiting_for_each_other(make_vec: Any) -> None:
    env = make_vec(2)
    env.reset(seed=0)
    observations, _, terminations, _, info = env.step(np.array([EOS, A]))
    assert terminations.tolist() == [True, False]
    assert info["_prompt_id"].tolist() == [True, False]
    assert (observations[0] != VOCAB).sum() == len(ROWS[info["prompt_id"][0]]["prompt"])


# ---------------------------------------------------------------------- seeds and prompts


def test_one_seed_gives_lane_i_the_generator_of_seed_plus_i(make_vec: Any) -> None:
    many, single = make_vec(4), make_vec(1)
    _, info = many.reset(seed=100)
    assert info["prompt_id"].tolist() == [single.reset(seed=100 + i)[1]["prompt_id"].item() for i in range(4)]


def test_a_list_of_seeds_is_taken_lane_by_lane(make_vec: Any) -> None:
    env, single = make_vec(3), make_vec(1)
    seeds = [7, 3, 7]
    _, info = env.reset(seed=seeds)
    assert info["prompt_id"].tolist() == [single.reset(seed=seed)[1]["prompt_id"].item() for seed in seeds]


def test_the_same_seed_gives_the_same_run_and_another_seed_another(make_vec: Any) -> None:
    def run(seed: int) -> list[Any]:
        env, rng = make_vec(4), np.random.default_rng(0)
        env.reset(seed=seed)
        return [env.step(random_actions(rng, 4))[0].tolist() for _ in range(20)]

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_nothing_but_the_lanes_own_generators_is_drawn_from(make_vec: Any) -> None:
    env = make_vec(4)
    env.reset(seed=0)
    before = np.random.get_state()[1].copy()  # noqa: NPY002  # that the global generator rests is what is tested
    for _ in range(2 * BUDGET):
        env.step(np.full(4, A))
    assert (np.random.get_state()[1] == before).all()  # noqa: NPY002


def test_prompt_id_chooses_the_prompt(make: Any, make_vec: Any) -> None:
    _, info = make_vec(3).reset(options={"prompt_id": np.array([4, 0, 2])})
    assert info["prompt_id"].tolist() == [4, 0, 2]
    _, info = make_vec(3).reset(options={"prompt_id": 1})
    assert info["prompt_id"].tolist() == [1, 1, 1]
    observation, info = make().reset(options={"prompt_id": 2})
    assert info["prompt_id"] == 2
    assert (observation != VOCAB).sum() == len(ROWS[2]["prompt"])


def test_reset_mask_leaves_the_other_lanes_alone(make_vec: Any) -> None:
    env = make_vec(3, autoreset_mode="DISABLED")
    env.reset(seed=0)
    before, *_ = env.step(np.array([A, B, C]))
    mask = np.array([False, True, False])
    options = {"reset_mask": mask}
    after, info = env.reset(options=options)
    assert options["reset_mask"] is mask  # wrappers read it after the environment
    assert (after[[0, 2]] == before[[0, 2]]).all()
    assert (after[1] != before[1]).any()
    assert info["_prompt_id"].tolist() == mask.tolist()
    after, *_ = env.step(np.array([B, B, B]))
    assert (after[[0, 2]] != VOCAB).sum() == (before[[0, 2]] != VOCAB).sum() + 2


# ---------------------------------------------------------------------- groups


def episodes_by_lane(env: Any, steps: int, seed: int = 0) -> list[list[tuple[int, int]]]:
    """(prompt_id, group_id) of each lane's episodes in order, while episodes end at random."""
    n, mode, rng = env.num_envs, env.metadata["autoreset_mode"], np.random.default_rng(seed)
    seen: list[list[tuple[int, int]]] = [[] for _ in range(n)]

    def note(info: dict[str, Any], lanes: np.ndarray) -> None:
        for lane in np.flatnonzero(lanes):
            seen[lane].append((int(info["prompt_id"][lane]), int(info["group_id"][lane])))

    _, info = env.reset(seed=seed)
    note(info, np.ones(n, bool))
    ended = np.zeros(n, bool)
    for _ in range(steps):
        *_, terminations, _, info = env.step(random_actions(rng, n, stop=0.4))
        note(info, terminations if mode is AutoresetMode.SAME_STEP else ended)
        ended = terminations & (mode is AutoresetMode.NEXT_STEP)
        if mode is AutoresetMode.DISABLED and terminations.any():
            _, info = env.reset(options={"reset_mask": terminations})
            note(info, terminations)
    return seen


@pytest.mark.parametrize("mode", AutoresetMode)
@pytest.mark.parametrize(("lanes", "group_size"), [(4, 2), (4, 4), (6, 3)])
def test_neighbouring_lanes_share_the_prompts_of_their_kth_episodes(
    lanes: int, group_size: int, mode: AutoresetMode, make_vec: Any
) -> None:
    seen = episodes_by_lane(make_vec(lanes, group_size=group_size, autoreset_mode=mode), steps=60)
    groups = [seen[first : first + group_size] for first in range(0, lanes, group_size)]
    for group in groups:
        for kth in zip(*group, strict=False):
            assert len(set(kth)) == 1
        ids = [group_id for _, group_id in group[0]]
        assert len(set(ids)) == len(ids)
        assert len({prompt for prompt, _ in group[0]}) > 1
    if len(groups) > 1:
        assert groups[0][0] != groups[1][0]
        assert not {g for _, g in groups[0][0]} & {g for _, g in groups[1][0]}


@pytest.mark.parametrize("mode", AutoresetMode)
@pytest.mark.parametrize(("lanes", "group_size"), [(2, 4), (1, 3)])
def test_with_fewer_lanes_than_the_group_a_lane_repeats_its_prompt(
    lanes: int, group_size: int, mode: AutoresetMode, make_vec: Any
) -> None:
    seen = episodes_by_lane(make_vec(lanes, group_size=group_size, autoreset_mode=mode), steps=60)
    repeats = group_size // lanes
    for lane in seen:
        runs = [lane[k : k + repeats] for k in range(0, len(lane) - repeats, repeats)]
        assert len(runs) > 3
        assert all(len(set(run)) == 1 for run in runs)
        assert len({run[0][1] for run in runs}) == len(runs)
    assert all(len(set(kth)) == 1 for kth in zip(*seen, strict=False))


def test_a_single_environment_repeats_its_prompt_over_resets(make: Any) -> None:
    env = make(group_size=3)
    infos = [env.reset(seed=5)[1], *(env.reset()[1] for _ in range(8))]
    runs = [infos[k : k + 3] for k in (0, 3, 6)]
    assert all(len({info["group_id"] for info in run}) == len({info["prompt_id"] for info in run}) == 1 for run in runs)
    assert len({run[0]["group_id"] for run in runs}) == 3


def test_a_full_reset_realigns_lanes_that_were_apart(make_vec: Any) -> None:
    env = make_vec(2, group_size=2)
    env.reset(seed=0)
    env.step(np.array([EOS, A]))  # lane 0 is one episode ahead
    _, info = env.reset()
    assert len(set(info["prompt_id"].tolist())) == len(set(info["group_id"].tolist())) == 1


def test_the_first_lane_of_a_group_draws_what_it_would_draw_alone(make_vec: Any) -> None:
    grouped = episodes_by_lane(make_vec(2, group_size=2), steps=30)[0]
    alone = make_vec(1)
    prompts = [alone.reset(seed=0)[1]["prompt_id"].item()]
    prompts += [alone.step(np.array([EOS]))[4]["prompt_id"].item() for _ in grouped[1:]]
    assert [prompt for prompt, _ in grouped] == prompts


def test_without_groups_no_group_id_is_reported(make_vec: Any) -> None:
    assert "group_id" not in make_vec(2).reset(seed=0)[1]


# ---------------------------------------------------------------------- state


def run_on(env: Any, rng: np.random.Generator, steps: int) -> list[Any]:
    return [pickle.dumps(env.step(random_actions(rng, env.num_envs))) for _ in range(steps)]


@pytest.mark.parametrize("group_size", [1, 4])
def test_a_state_brings_everything_back_exactly(group_size: int, make_vec: Any, other_model: Any) -> None:
    env = make_vec(4, group_size=group_size, beta=0.2)
    env.unwrapped.attach_policy(PlainPolicy(other_model))
    env.reset(seed=3)
    run_on(env, np.random.default_rng(0), 7)
    state = pickle.loads(pickle.dumps(env.unwrapped.get_state()))
    # A cache may round differently by how it came about: both runs start without one.
    env.unwrapped.reference.invalidate()
    expected = run_on(env, np.random.default_rng(1), 30)
    env.unwrapped.set_state(state)
    env.unwrapped.reference.invalidate()
    assert run_on(env, np.random.default_rng(1), 30) == expected


def test_a_state_can_be_taken_to_another_process(make_vec: Any) -> None:
    env, elsewhere = make_vec(3), make_vec(3)
    env.reset(seed=3)
    run_on(env, np.random.default_rng(0), 7)
    elsewhere.unwrapped.set_state(env.unwrapped.get_state())
    assert run_on(elsewhere, np.random.default_rng(1), 30) == run_on(env, np.random.default_rng(1), 30)


def test_a_state_is_not_changed_by_what_happens_after_it(make_vec: Any) -> None:
    env = make_vec(3)
    env.reset(seed=3)
    state = env.unwrapped.get_state()
    before = pickle.dumps(state)
    run_on(env, np.random.default_rng(0), 20)
    env.unwrapped.set_state(state)
    run_on(env, np.random.default_rng(0), 20)
    assert pickle.dumps(state) == before


def test_the_adaptive_coefficient_is_part_of_the_state(make_vec: Any, other_model: Any) -> None:
    from textenv import AdaptiveKL

    env = make_vec(2, beta=AdaptiveKL(0.1, target=0.01, horizon=10, episodes_per_update=4))
    env.unwrapped.attach_policy(PlainPolicy(other_model))
    env.reset(seed=0)
    run_on(env, np.random.default_rng(0), 3)
    state, beta = env.unwrapped.get_state(), env.unwrapped.kl.beta
    run_on(env, np.random.default_rng(0), 20)
    assert env.unwrapped.kl.beta != beta
    env.unwrapped.set_state(state)
    assert env.unwrapped.kl.beta == beta


def test_the_count_of_steps_that_the_reward_is_told_is_part_of_the_state(make_vec: Any) -> None:
    env = make_vec(1, reward=lambda completions, trainer_state, **columns: [float(trainer_state.global_step)])
    env.reset(seed=0)
    env.step(np.array([A]))
    state = env.unwrapped.get_state()
    first = env.step(np.array([EOS]))[1]
    env.unwrapped.set_state(state)
    assert env.step(np.array([EOS]))[1] == first == 2


def test_tree_search_sees_each_branch_as_if_it_were_the_only_one(make: Any, other_model: Any) -> None:
    def reached(*actions: int) -> tuple[Any, ...]:
        env = make(beta=0.5)
        env.unwrapped.attach_policy(PlainPolicy(other_model))
        env.reset(seed=4)
        for action in actions:
            outcome = env.step(action)
        return outcome

    env = make(beta=0.5)
    env.unwrapped.attach_policy(PlainPolicy(other_model))
    env.reset(seed=4)
    root = env.unwrapped.get_state()
    for first in (A, B):
        env.unwrapped.set_state(root)
        env.step(first)
        branch = env.unwrapped.get_state()
        for second in (C, EOS, A):
            env.unwrapped.set_state(branch)
            observation, reward, terminated, truncated, info = env.unwrapped.step(second)
            expected = reached(first, second)
            assert observation.tolist() == expected[0].tolist()
            assert reward == pytest.approx(expected[1], abs=1e-5)
            assert (terminated, truncated, info.keys()) == (*expected[2:4], expected[4].keys())


def test_set_state_restores_the_generator_of_the_single_environment(make: Any) -> None:
    env = make()
    env.reset(seed=0)
    state = env.unwrapped.get_state()
    prompts = [env.reset()[1]["prompt_id"] for _ in range(12)]
    env.unwrapped.set_state(state)
    assert [env.reset()[1]["prompt_id"] for _ in range(12)] == prompts


@pytest.mark.parametrize("other", [{"num_envs": 2}, {"max_new_tokens": 3}, {"group_size": 3}])
def test_a_state_of_another_environment_is_refused_and_changes_nothing(other: dict[str, Any], make_vec: Any) -> None:
    env, another = make_vec(3), make_vec(**{"num_envs": 3, **other})
    env.reset(seed=0)
    another.reset(seed=9)
    state, before = another.unwrapped.get_state(), pickle.dumps(env.unwrapped.get_state())
    with pytest.raises(ValueError, match="another environment"):
        env.unwrapped.set_state(state)
    assert pickle.dumps(env.unwrapped.get_state()) == before


# ---------------------------------------------------------------------- what is returned is the caller's


@pytest.mark.parametrize("mode", AutoresetMode)
def test_what_is_returned_may_be_written_to(mode: AutoresetMode, make_vec: Any) -> None:
    kept, spoilt = make_vec(3, autoreset_mode=mode), make_vec(3, autoreset_mode=mode)
    rng = np.random.default_rng(0)

    def spoil(value: Any) -> None:
        if isinstance(value, dict):
            for item in value.values():
                spoil(item)
        elif isinstance(value, np.ndarray) and value.dtype == object:
            for item in value:
                spoil(item)
        elif isinstance(value, np.ndarray):
            value[...] = 1

    for env in (kept, spoilt):
        outcome = env.reset(seed=0)
    for _ in range(30):
        spoil(outcome)
        actions = random_actions(rng, 3)
        expected, outcome = kept.step(actions), spoilt.step(actions)
        assert pickle.dumps(outcome) == pickle.dumps(expected)
        if mode is AutoresetMode.DISABLED and expected[2].any():
            kept.reset(options={"reset_mask": expected[2]})
            spoilt.reset(options={"reset_mask": expected[2]})


def test_observations_do_not_share_memory(make_vec: Any) -> None:
    env = make_vec(3)
    rng = np.random.default_rng(0)
    arrays = [env.reset(seed=0)[0]]
    for _ in range(10):
        observations, *_, info = env.step(random_actions(rng, 3))
        arrays += [observations, *(final for final in info.get("final_obs", []) if final is not None)]
    assert not any(np.shares_memory(a, b) for i, a in enumerate(arrays) for b in arrays[:i])


# ---------------------------------------------------------------------- Gymnasium's own wrappers on top


@pytest.mark.parametrize("mode", AutoresetMode)
def test_record_episode_statistics_reports_returns_and_lengths(mode: AutoresetMode, make_vec: Any) -> None:
    env = gym.wrappers.vector.RecordEpisodeStatistics(make_vec(3, autoreset_mode=mode))
    rng, returns, lengths, episodes = np.random.default_rng(0), np.zeros(3), np.zeros(3, int), 0
    env.reset(seed=0)
    waiting = np.zeros(3, bool)
    for _ in range(50):
        _, rewards, terminations, _, info = env.step(random_actions(rng, 3))
        returns, lengths = returns + rewards, lengths + ~waiting
        for lane in np.flatnonzero(terminations):
            assert info["episode"]["r"][lane] == pytest.approx(returns[lane])
            assert info["episode"]["l"][lane] == lengths[lane]
            episodes += 1
        returns[terminations] = lengths[terminations] = 0
        waiting = terminations if mode is AutoresetMode.NEXT_STEP else np.zeros(3, bool)
        if mode is AutoresetMode.DISABLED and terminations.any():
            env.reset(options={"reset_mask": terminations})
    assert episodes > 10


@pytest.mark.parametrize("mode", [AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP])
def test_other_vector_wrappers_work_on_top(mode: AutoresetMode, make_vec: Any) -> None:
    wrappers = gym.wrappers.vector
    env = wrappers.NormalizeReward(make_vec(3, autoreset_mode=mode), gamma=1.0)
    env = wrappers.ClipReward(env, -1.0, 1.0)
    env = wrappers.TransformAction(env, lambda actions: actions)
    env = wrappers.DictInfoToList(env)
    rng = np.random.default_rng(0)
    env.reset(seed=0)
    ends = 0
    for _ in range(30):
        observations, rewards, terminations, _, infos = env.step(random_actions(rng, 3))
        assert observations.shape == (3, WIDTH)
        assert (np.abs(rewards) <= 1).all()
        assert isinstance(infos, list)
        ends += int(terminations.sum())
    assert ends > 5
    assert env.unwrapped.num_envs == 3


def test_the_mode_is_declared_in_the_metadata(make_vec: Any) -> None:
    assert make_vec(2).metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
    for mode in AutoresetMode:
        for spelling in (mode, mode.value, mode.name):
            assert make_vec(2, autoreset_mode=spelling).metadata["autoreset_mode"] is mode


@pytest.mark.parametrize("mode", AutoresetMode)
def test_disabling_one_environment_leaves_the_class_alone(mode: AutoresetMode, make_vec: Any) -> None:
    make_vec(2, autoreset_mode=mode)
    assert make_vec(2).metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
