"""The speed benchmark at its smallest: that it runs, that both sides do the same work, and that what it says is what it measured."""

from __future__ import annotations

import copy
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from agents import PPO
from agents.rollout import collect
from benchmarks import speed, speed_peers
from benchmarks.speed import Bench, SpeedArguments, growth_curve, make_envs, parts, prefix_rows, run_speed
from benchmarks.speed_measure import Run, Side, check_same_work, fastest, interleave, peak_memory
from benchmarks.speed_report import AIMS, Aim, Curve, Row, compare
from benchmarks.speed_work import (
    EOS,
    PROMPT_TOKENS,
    SHAPES,
    SIZES,
    Shape,
    build_model,
    build_prompts,
    build_tokenizer,
    model_config,
    stop_probability,
    variety,
)
from rewards import RewardModel
from textenv.cli.arguments import UsageError

TINY = SHAPES["tiny"]
GPT2 = Shape(
    name="tiny-gpt2",
    vocab_size=64,
    hidden_size=16,
    intermediate_size=24,
    layers=1,
    heads=2,
    architecture="gpt2",
)


@pytest.fixture(autouse=True)
def _quick_collection() -> Iterator[None]:
    """A stopwatch collects garbage before it starts: not that of the whole test run."""
    gc.freeze()
    yield
    gc.unfreeze()


# ---------------------------------------------------------------------- the work


def test_stop_probability_gives_the_mean_length_under_the_cap() -> None:
    assert stop_probability(1.5, 2) == pytest.approx(0.5, abs=1e-6)  # 1 p + 2 (1 - p) = 1.5
    assert stop_probability(10, 10_000) == pytest.approx(0.1, abs=1e-4)  # no cap: 1 / p
    lengths = np.minimum(np.random.default_rng(0).geometric(stop_probability(64 / 3, 64), 200_000), 64)
    assert lengths.mean() == pytest.approx(64 / 3, rel=0.01)


@pytest.mark.parametrize("shape", [TINY, GPT2], ids=lambda shape: shape.name)
def test_the_models_stop_as_often_as_they_should(shape: Shape) -> None:
    rows = torch.randint(4, 64, (64, 20), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        stops = build_model(shape, 3.0, 9)(input_ids=rows).logits[:, 8:].softmax(-1)[..., EOS]
        never = build_model(shape, None, 9)(input_ids=rows).logits[:, 8:].softmax(-1)[..., EOS]
    assert stops.mean() == pytest.approx(stop_probability(3.0, 9), rel=0.1)
    assert never.max() < 1e-8


def test_the_shapes_are_what_their_names_say() -> None:
    with torch.device("meta"):
        models = {name: AutoModelForCausalLM.from_config(model_config(shape)) for name, shape in SHAPES.items()}
    sizes = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items() if name != "tiny"}
    assert {name: round(size / 1e6) for name, size in sizes.items()} == {"1M/1k": 1, "15M/32k": 15, "124M/50k": 124}


def test_prompts_have_the_lengths_they_should() -> None:
    tokenizer = build_tokenizer(64)
    lengths = [len(tokenizer(text)["input_ids"]) for text in build_prompts(64, 100)]
    assert (min(lengths), max(lengths)) == PROMPT_TOKENS == (8, 16)
    assert {len(tokenizer(text)["input_ids"]) for text in build_prompts(64, 9, (12, 12))} == {12}


# ---------------------------------------------------------------------- measuring


def test_sides_take_turns_and_the_order_alternates() -> None:
    calls: list[str] = []

    def side(name: str, tokens: int) -> Side:
        return Side(name, lambda: calls.append(name) or tokens, lambda: None)  # type: ignore[func-returns-value]

    runs = interleave([side("a", 3), side("b", 5)], 3)
    assert calls == ["a", "b", "b", "a", "a", "b"]
    assert [run.tokens for run in runs["a"]] == [3, 3, 3]
    assert [run.tokens for run in runs["b"]] == [5, 5, 5]


def test_the_choice_with_the_fastest_of_three_runs_is_taken() -> None:
    naps = {"steady": iter((0.2, 0.2, 0.2)), "slow at first": iter((0.4, 0.3, 0.0))}
    probes = {name: lambda name=name: time.sleep(next(naps[name])) for name in naps}
    assert fastest(probes, lambda name: 1) == "slow at first"


def test_a_row_is_the_median_of_the_rounds() -> None:
    sides = [Side("textenv", lambda: 0, lambda: 0, threads=2), Side("generate", lambda: 0, lambda: 0)]
    runs = {
        "textenv": [Run(100, 1.0, 2.0), Run(100, 2.0, 2.0), Run(100, 4.0, 2.0)],  # 100, 50, 25 tokens/s
        "generate": [Run(100, 4.0, 4.0), Run(100, 4.0, 4.0), Run(100, 4.0, 4.0)],  # 25 each
    }
    row = compare("rollout-1M-64-self/deferred", sides, runs, "textenv", "generate")
    assert (row.ratio, row.low, row.high, row.cpu_ratio) == (2.0, 1.0, 4.0, 2.0)
    assert row.aim == Aim(3)
    assert not row.aim.met(row.ratio)
    assert row.sides["textenv"]["rate"] == 50
    assert row.sides["textenv"]["threads"] == 2
    assert compare("floor-1M", sides, runs, "textenv", "generate", cost=True).ratio == 0.5  # half the cost
    assert Aim(0.6, at_most=True).met(0.6)
    assert not Aim(0.6, at_most=True).met(0.61)


def test_less_work_than_the_peer_is_an_error() -> None:
    check_same_work({"a": [Run(480, 1, 1)], "b": [Run(480, 1, 1)]}, budget=48, episodes=10, stops=False)
    with pytest.raises(RuntimeError, match="not done the same work"):
        check_same_work({"a": [Run(480, 1, 1)], "b": [Run(479, 1, 1)]}, budget=48, episodes=10, stops=False)
    # 100 episodes: means of 20 and 21 are chance, of 5 and 60 are not.
    check_same_work({"a": [Run(2000, 1, 1)], "b": [Run(2100, 1, 1)]}, budget=64, episodes=100, stops=True)
    with pytest.raises(RuntimeError, match="not done the same work"):
        check_same_work({"a": [Run(500, 1, 1)], "b": [Run(6000, 1, 1)]}, budget=64, episodes=100, stops=True)


def test_peak_memory_counts_what_is_freed_again() -> None:
    with peak_memory() as peak:
        block = np.ones(8_000_000)  # 64 MB
        del block
    assert 60e6 < peak[0] < 80e6


# ---------------------------------------------------------------------- the peers


def test_generate_counts_tokens_up_to_the_stop() -> None:
    class Fixed:
        """Writes w5 w6 </s> and padding, then w5 w6 w7 w8."""

        def generate(self, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
            assert input_ids.shape == (2, 3)
            return torch.cat([input_ids, torch.tensor([[5, 6, EOS, 0], [5, 6, 7, 8]])], dim=1)

    assert speed_peers.generate(Fixed(), build_tokenizer(64), ["w4 w4", "w4", "w4", "w4 w5"], 2, 4) == 2 * (3 + 4)


@pytest.mark.parametrize("micro_batch", [5, 100])
def test_prefix_rows_take_the_same_step_as_whole_responses(micro_batch: int) -> None:
    """One step of plain gradient descent from the same weights, by our update and by the peer's: the same work."""
    model, tokenizer = build_model(TINY, 3.0, 6), build_tokenizer(64)
    envs = make_envs(model, tokenizer, build_prompts(64, 8), lanes=8, budget=6, reward=variety, beta=0.05)
    agent = PPO(
        envs,
        seed=0,
        episodes_per_update=8,
        minibatch_episodes=8,
        epochs=1,
        target_kl=None,
        learning_rate=0.5,
        warmup_iterations=0,
    )
    with torch.no_grad():
        agent.critic.head.weight.normal_(generator=torch.Generator().manual_seed(1))
    data = collect(envs, agent.policy, 8, agent.rng)
    rows = prefix_rows(agent, data)
    assert len(rows) == data.response_length.sum()
    policy, head = copy.deepcopy(agent.policy.model), copy.deepcopy(agent.critic.head)
    sgd = torch.optim.SGD([*policy.parameters(), *head.parameters()], lr=0.5)
    count = speed_peers.prefix_row_update(policy, head, sgd, rows, [np.arange(len(rows))], micro_batch)
    assert count == len(rows)

    before = copy.deepcopy(agent.policy.model.state_dict())
    agent.adam = torch.optim.SGD([*agent.policy.parameters(), *agent.critic.parameters()], lr=0.5)  # type: ignore[assignment]
    agent.update(data)
    moved = 0.0
    for name, value in agent.policy.model.state_dict().items():
        torch.testing.assert_close(policy.state_dict()[name], value, atol=2e-5, rtol=1e-3)
        moved = max(moved, float((value - before[name]).abs().max()))
    assert moved > 1e-3
    torch.testing.assert_close(head.weight, agent.critic.head.weight, atol=2e-5, rtol=1e-3)


def test_the_bare_iteration_decodes_every_token_and_gives_each_a_gradient() -> None:
    model, tokenizer = build_model(TINY, None, 5), build_tokenizer(64)
    policy, reward_model = copy.deepcopy(model), RewardModel.from_language_model(model, tokenizer).model
    seen: dict[str, list[tuple[int, ...]]] = {"policy": [], "reference": [], "reward model": []}
    for name, module in (("policy", policy), ("reference", model), ("reward model", reward_model)):
        module.register_forward_pre_hook(
            lambda _, __, given, name=name: seen[name].append(tuple(given["input_ids"].shape)), with_kwargs=True
        )
    prompts = torch.full((4, 7), 5)
    assert speed_peers.bare_iteration(policy, model, reward_model, prompts, 5, minibatch=2, epochs=2) == 4 * 5
    assert seen["policy"] == [
        (4, 7),
        *[(4, 1)] * 4,
        *[(2, 11)] * 4,
    ]  # prompt, four of five tokens, two epochs in two parts
    assert seen["reference"] == [(4, 11)]
    assert seen["reward model"] == [(4, 12)]


# ---------------------------------------------------------------------- all of it


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread, one round."""
    monkeypatch.setattr(speed, "cores", lambda: 1)


def test_the_parts_without_peers_run_and_are_reported(
    small: None, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    only = ("rollout", "lanes", "update", "floor", "env", "growth")
    report = run_speed(SpeedArguments(only=only, size="smoke", repeats=1, out=tmp_path))
    stored = json.loads((tmp_path / "speed.json").read_text())
    assert stored == json.loads(json.dumps(report))
    assert [row["name"] for row in stored["rows"]] == [
        "rollout-tiny-4-self/deferred",
        "rollout-tiny-4-self/step",
        "rollout-tiny-4-fixed/deferred",
        "rollout-tiny-4-fixed/step",
        "lanes-tiny-self",
        "lanes-tiny-fixed",
        "update-tiny/prefix rows",
        "update-tiny/stable-baselines3",
        "floor-tiny",
    ]
    fixed = stored["rows"][2]
    assert fixed["sides"]["deferred"]["tokens"] == fixed["sides"]["generate"]["tokens"] == [4 * 9]
    assert fixed["ratio"] == pytest.approx(
        fixed["sides"]["generate"]["seconds"][0] / fixed["sides"]["deferred"]["seconds"][0]
    )
    curves = {curve["name"]: curve for curve in stored["curves"]}
    assert list(curves) == ["step lane", "deferred lane", "lanes", "vocabulary", "length", "parameters"]
    assert curves["step lane"]["x"] == [1, 4]
    assert set(stored["machine"]["versions"]) >= {"python", "torch", "transformers", "gymnasium"}
    table = (tmp_path / "table.md").read_text()
    assert table.startswith(
        "`textenv bench speed --only rollout lanes update floor env growth --size smoke --repeats 1`"
    )
    ours = fixed["sides"]["deferred"]["rate"]
    assert f"| rollout-tiny-4-fixed/deferred | {ours:,.0f} |" in table
    assert "16 episodes in 4 lanes with a cap of 9" in table
    assert "rollout-tiny-4-fixed" in capsys.readouterr().out


IN_A_CLEAN_PROCESS = """
import torch
from benchmarks import speed

def multiply():
    torch.set_num_threads(2)
    assert (torch.ones(512, 512) @ torch.ones(512, 512) == 512).all()

if __name__ == "__main__":
    process = speed.clean_processes().Process(target=multiply)
    process.start()
    process.join(timeout=60)
    status = process.exitcode
    process.kill()
    raise SystemExit(status != 0)
"""


def test_parts_run_in_processes_that_can_start_threads(tmp_path: Any) -> None:
    """Had torch's threads been started by an import, what is forked after that would wait for ever. (These tests have one thread.)"""
    script = tmp_path / "script.py"
    script.write_text(IN_A_CLEAN_PROCESS)
    environment = os.environ | {"OMP_NUM_THREADS": "2", "PYTHONPATH": str(Path(speed.__file__).parents[1])}
    subprocess.run([sys.executable, script], env=environment, check=True, timeout=150)


def test_an_iteration_of_trl_and_of_ours(small: None, tmp_path: Any) -> None:
    pytest.importorskip("trl")
    bench = Bench(SIZES["smoke"], tmp_path)
    [part] = [part for part in parts(bench.size) if part.name == "GRPO-tiny-fixed"]
    [row] = part.run(bench)
    assert isinstance(row, Row)
    assert row.sides["textenv"]["tokens"] == row.sides["TRL"]["tokens"] == [8 * 6] * 2


def test_without_trl_its_parts_are_skipped_and_say_so(
    small: None, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed, "find_spec", lambda name: None)
    report = run_speed(SpeedArguments(only=("RLOO", "memory"), size="smoke", out=tmp_path))
    assert set(report["skipped"]) == {"RLOO-tiny-fixed", "RLOO-tiny-self", "memory-tiny"}
    assert "pip install 'textenv[peers]'" in (tmp_path / "table.md").read_text()


def test_every_aim_belongs_to_a_part() -> None:
    names = {part.name for part in parts(SIZES["full"])}
    assert {name.partition("/")[0] for name in AIMS} <= names


def test_a_wrong_part_is_answered_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="Did you mean"):
        SpeedArguments(only=("rolout-15M-64-self",))
    with pytest.raises(UsageError, match="--only to be some of"):
        SpeedArguments(only=("",))  # an empty shell variable is not half an hour's work
    with pytest.raises(UsageError, match="repeats"):
        SpeedArguments(repeats=0)


def test_figures_that_cannot_be_kept_are_refused_before_anything_is_measured(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="Not a directory"):
        run_speed(SpeedArguments(only=("env",), size="smoke", out=tmp_path / "file" / "speed"))


def test_a_cost_that_grows_faster_than_linear_is_explained() -> None:
    assert growth_curve("vocabulary", (1, 2, 4), (1, 2, 4), (1.0, 2.0, 4.0)) == Curve(
        name="vocabulary", x=(1, 2, 4), y=(1.0, 2.0, 4.0), exponent=pytest.approx(1.0)
    )
    curve = growth_curve("length", (16, 32), (16, 32), (1.0, 2.0))  # twice as long, and each token costs twice as much
    assert curve.exponent == pytest.approx(2.0)
    assert "attends" in curve.notes
