"""The environment calls the reward once per episode, with everything it asks for, and believes nothing it returns."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

from ..tiny import EOS, char_tokenizer
from .letters import BUDGET, ROWS, random_actions

A, B = 3, 4


class Spy:
    """Keeps every call."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __call__(self, prompts: Any, completions: Any, completion_ids: Any, **columns: Any) -> list[float]:
        self.calls.append({"prompts": prompts, "completions": completions, "completion_ids": completion_ids, **columns})
        return [1.0] * len(completions)


@pytest.mark.parametrize("mode", AutoresetMode)
def test_the_reward_is_called_once_per_episode_and_on_its_end_only(mode: AutoresetMode, make_vec: Any) -> None:
    spy, rng = Spy(), np.random.default_rng(0)
    env = make_vec(3, reward=spy, autoreset_mode=mode)
    env.reset(seed=0)
    for _ in range(30):
        before = len(spy.calls)
        _, rewards, ended, _, _ = env.step(random_actions(rng, 3))
        assert sum(len(call["completions"]) for call in spy.calls[before:]) == ended.sum()
        assert len(spy.calls) - before == int(ended.any())  # those that end together are scored together
        assert rewards.tolist() == ended.astype(float).tolist()
        if mode is AutoresetMode.DISABLED and ended.any():
            env.reset(options={"reset_mask": ended})


def test_what_the_reward_is_given(make_vec: Any) -> None:
    spy = Spy()
    env = make_vec(2, reward=spy)
    env.reset(options={"prompt_id": np.array([2, 1])})
    env.step(np.array([A, B]))
    env.step(np.array([EOS, EOS]))
    (call,) = spy.calls
    assert call["prompts"] == ["dd +e", "c"]
    assert call["completions"] == ["a", "b"]  # text without special tokens
    assert call["completion_ids"] == [[A, EOS], [B, EOS]]  # and every token
    assert call["target"] == ["d", "c"]
    assert call["trainer_state"].global_step == 4


def test_the_prompt_column_alone_is_withheld(make_vec: Any) -> None:
    spy = Spy()
    env = make_vec(1, reward=spy, prompts=[{"prompt": "a", "demonstration": "b", "answer": 7, "notes": [1, 2]}])
    env.reset(seed=0)
    env.step(np.array([EOS]))
    known = {"prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric"}
    assert {name: value for name, value in spy.calls[0].items() if name not in known} == {
        "answer": [7],
        "notes": [[1, 2]],
    }


def test_conversations_reach_the_reward_as_message_lists(make_vec: Any) -> None:
    spy, prompt = Spy(), [{"role": "user", "content": "ab"}]
    env = make_vec(1, reward=spy, tokenizer=char_tokenizer(chat=True), prompts=[{"prompt": prompt}])
    observations, _ = env.reset(seed=0)
    decoded = env.unwrapped.tokenizer.decode(observations[0][observations[0] < env.unwrapped.vocab_size])
    assert decoded == "<unk>+ab a+"  # the template's "u+ab a+"; "u" is not in this alphabet
    env.step(np.array([A]))
    env.step(np.array([EOS]))
    assert spy.calls[0]["prompts"] == [prompt]
    assert spy.calls[0]["completions"] == [[{"role": "assistant", "content": "a"}]]


def test_a_reward_written_with_trls_signature_runs_unchanged(make_vec: Any) -> None:
    def accuracy_reward(completions: list[str], target: list[str], **kwargs: Any) -> list[float | None]:
        return [None if t == "j" else float(t in text) for text, t in zip(completions, target, strict=True)]

    def brevity(completions: list[str], log_metric: Any, **kwargs: Any) -> list[float]:
        log_metric("length", float(len(completions[0])))
        return [-len(text) / 10 for text in completions]

    from rewards import WeightedSum

    env = make_vec(2, reward=WeightedSum({"accuracy": (accuracy_reward, 1.0), "brevity": (brevity, 0.5)}))
    env.reset(options={"prompt_id": np.array([0, 3])})
    env.step(np.array([A, A]))
    _, rewards, *_, info = env.step(np.array([EOS, EOS]))
    final = info["final_info"]
    assert rewards.tolist() == pytest.approx([1.0 - 0.05, -0.05])
    assert final["_reward/accuracy"].tolist() == [True, False]  # None: it does not apply to the second
    assert final["reward/accuracy"][0] == 1.0
    assert final["reward/brevity"].tolist() == pytest.approx([-0.1, -0.1])


def test_without_a_reward_the_task_pays_nothing_and_says_so(make_vec: Any) -> None:
    with pytest.warns(UserWarning, match="No reward= was given"):
        env = make_vec(1, reward=None)
    env.reset(seed=0)
    _, rewards, *_, info = env.step(np.array([EOS]))
    assert rewards.tolist() == info["final_info"]["task_reward"].tolist() == [0.0]


def test_the_task_reward_is_paid_on_the_token_that_stops_and_on_the_one_that_uses_up_the_budget(make_vec: Any) -> None:
    env = make_vec(2, reward=Spy())
    env.reset(seed=0)
    paid = [env.step(np.array([A, A]))[1].tolist()]
    paid += [env.step(np.array([EOS, A]))[1].tolist()]
    paid += [env.step(np.array([A, A]))[1].tolist() for _ in range(BUDGET - 2)]
    assert paid == [[0, 0], [1, 0], *[[0, 0]] * (BUDGET - 3), [0, 1]]


# ---------------------------------------------------------------------- rewards that are wrong


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([float("nan")], "reward 'broken' returned nan for completion 'ab'; expected a finite float"),
        ([float("inf")], "reward 'broken' returned inf for completion 'ab'"),
        ([None], "returned None for completion 'ab'; expected at least one float"),
        ([], "returned 0 values for 1 completions"),
        (1.0, r"returned 1.0 \(float\).*Remedy: return \[value\]"),
        (["good"], r"returned 'good' \(str\) for completion 'ab'"),
    ],
)
def test_a_value_that_is_no_reward_stops_the_run_and_is_never_scored_zero(
    returned: Any, message: str, make_vec: Any
) -> None:
    def broken(completions: list[str], **columns: Any) -> Any:
        return returned

    env = make_vec(1, reward=broken)
    env.reset(seed=0)
    env.step(np.array([A]))
    env.step(np.array([B]))
    with pytest.raises(ValueError, match=message):
        env.step(np.array([EOS]))


def test_a_reward_that_raises_is_named_with_the_completion(make_vec: Any) -> None:
    def divides(completions: list[str], **columns: Any) -> list[float]:
        return [1 / len(text) for text in completions]

    env = make_vec(1, reward=divides)
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"reward 'divides' raised ZeroDivisionError: .*\n.* on completion ''"):
        env.step(np.array([EOS]))


def test_a_parameter_that_no_column_provides_is_an_error_at_construction(make: Any, make_vec: Any) -> None:
    def needs(completions: list[str], targets: list[str]) -> list[float]:
        return [0.0] * len(completions)

    for construct in (make, make_vec):
        with pytest.raises(ValueError, match=r"requires the parameter `targets`.*Did you mean `target`"):
            construct(reward=needs)


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("some/model", r"RewardModel.from_pretrained\('some/model'\)"),
        ([len, len], r"WeightedSum\(\{"),
        (3, "wrap it in a function"),
    ],
)
def test_what_is_no_reward_is_refused_with_the_remedy(reward: Any, message: str, make: Any) -> None:
    with pytest.raises(ValueError, match=message):
        make(reward=reward)


def test_a_column_with_a_name_of_its_own_meaning_is_refused(make: Any) -> None:
    with pytest.raises(ValueError, match="a column `completions`, but that keyword has a meaning of its own"):
        make(prompts=[{"prompt": "a", "completions": "b"}], reward=Spy())


def test_the_reward_gets_copies(make_vec: Any) -> None:
    def vandal(completion_ids: list[list[int]], target: list[str], **columns: Any) -> list[float]:
        completion_ids[0].clear()
        target[:] = ["spoilt"]
        return [0.0]

    rows = [dict(row) for row in ROWS]
    env = make_vec(1, reward=vandal, prompts=rows)
    env.reset(seed=0)
    _, _, _, _, info = env.step(np.array([EOS]))
    assert (info["final_obs"][0] == EOS).any()
    assert rows == ROWS
    assert "spoilt" not in env.unwrapped.task.prompts.columns["target"]


# ---------------------------------------------------------------------- what is shown of them


def test_finish_reasons_reach_rewards_that_name_them(make_vec: Any) -> None:
    from rewards import MissingStop

    env = make_vec(2, reward=MissingStop(lambda completions: [1.0] * len(completions), replace=-1.0))
    env.reset(seed=0)
    for _ in range(BUDGET - 1):
        env.step(np.array([A, A]))
    _, rewards, *_, info = env.step(np.array([A, EOS]))  # one is cut off, the other stops with its last token
    assert rewards.tolist() == [-1, 1]
    assert info["final_info"]["reward/missing_stop"].tolist() == [1, 0]


def test_components_are_rendered_by_name_when_the_episode_has_ended(make: Any, capsys: Any) -> None:
    from rewards import Clipped, Gate, WeightedSum

    def length(completions: list[str]) -> list[float]:
        return [float(len(text)) for text in completions]

    def only_b(completions: list[str]) -> list[float | None]:
        return [1.0 if "b" in text else None for text in completions]

    inner = WeightedSum({"long": (Clipped(length, high=1.5), 2.0), "b": (only_b, 1.0)})
    env = make(reward=Gate(length, inner, name="any"), render_mode="ansi")
    env.reset(seed=0)
    env.step(A)
    assert "[" not in env.render().replace("\x1b[", "")  # nothing to say yet
    env.step(A)
    env.step(EOS)
    assert "[reward 3: any 2, long 1.5]" in env.render()  # what does not apply is left out
    env.reset(seed=0)
    assert "reward" not in env.render()

    human = make(reward=inner, render_mode="human")
    human.reset(seed=0)
    human.step(B)
    human.step(EOS)
    assert "[reward 3: long 1, b 1]" in capsys.readouterr().out


def test_a_reward_that_sleeps_for_ever_stops_the_run_when_it_has_a_limit(make_vec: Any) -> None:
    import threading

    from rewards import TimeLimit

    release = threading.Event()

    def judge(completions: list[str]) -> list[float]:
        release.wait()
        return [0.0] * len(completions)

    env = make_vec(1, reward=TimeLimit(judge, seconds=0.05))
    env.reset(seed=0)
    env.step(np.array([A]))
    with pytest.raises(
        ValueError, match=r"reward 'judge' did not return within its time limit of 0.05 s.*completion 'a'"
    ):
        env.step(np.array([EOS]))
    release.set()


def test_what_a_reward_prints_comes_between_the_steps_and_changes_nothing(make_vec: Any, capsys: Any) -> None:
    def chatty(completions: list[str]) -> list[float]:
        print("scoring", completions)
        return [1.0] * len(completions)

    env = make_vec(1, reward=chatty)
    env.reset(seed=0)
    assert env.step(np.array([EOS]))[1].tolist() == [1.0]
    assert capsys.readouterr().out == "scoring ['']\n"
