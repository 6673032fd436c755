"""Final answers, sums, JSON, and programs that try what programs try."""

import gzip
import json
import random
import socket
import sys
import time
from pathlib import Path

import pytest

from rewards import FinalAnswer, PassesTests, RewardError, arithmetic, check_reward, verify
from rewards import valid_json as valid


def isolates() -> bool:
    return verify._can_isolate()


needs_isolation = pytest.mark.skipif(
    not sys.platform.startswith("linux") or not isolates(), reason="no unprivileged network namespace here"
)
CHAT = [{"role": "assistant", "content": "It makes 72."}]


# ------------------------------------------------------------------------------------------------------ numbers


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("6 * 12 = 72\n#### 72", 72),
        ("#### 71 \nwell, 72", 71),
        ("#### 5 boxes, that is 12", 5),
        ("#### $1,200.00", 1200),
        ("#### -3", -3),
        ("#### \u22123.50", -3.5),
        (r"so \boxed{1{,}2}", 1),
        (r"first \boxed{3}, no, \boxed{42}. Done in 2 steps", 42),
        ("The answer is 12. I used 3 steps.\nBye 5", 12),
        ("there are 12 apples and 1,000,000 pears.", 1_000_000),
        ("17", 17),
        (".5", 0.5),
        ("x2 and v1.3 are names", None),
        ("no number", None),
        ("", None),
    ],
)
def test_final_number(text, number):
    assert verify.final_number(text) == number


def test_final_answer():
    reward = FinalAnswer()
    completions = ["... #### 72", "72.0", CHAT, "73", "none"]
    assert reward(completions=completions, answer=["#### 72"] * 5) == [1, 1, 1, 0, 0]
    assert reward(completions=["72", "#### 72"], answer=[72, 72]) == [1, 1]
    assert FinalAnswer(strict=True)(completions=["72", "#### 72", "72 ####"], answer=[72] * 3) == [0, 1, 0]
    assert reward(completions=["1"], answer=[None]) == [None]
    with pytest.raises(RewardError, match="`answer` holds 'many'; expected a number"):
        reward(completions=["1"], answer=["many"])


@pytest.mark.parametrize("part", ["train", "test"])
def test_every_gold_solution_of_gsm8k_is_right_and_those_of_other_questions_are_not(part, textenv_data):
    with gzip.open(textenv_data / f"gsm8k_{part}.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    solutions = [row["answer"] for row in rows]
    finals = [row["final"] for row in rows]
    for reward in (FinalAnswer(), FinalAnswer(strict=True)):
        assert reward(completions=solutions, answer=finals) == [1.0] * len(rows)
    others = random.Random(0).sample(solutions, len(solutions))
    # By chance some questions have the same final answer: compare with texts, which know nothing of numbers.
    same = [
        other.rpartition("#### ")[2] == own.rpartition("#### ")[2] for other, own in zip(others, solutions, strict=True)
    ]
    assert FinalAnswer()(completions=others, answer=solutions) == same
    assert sum(same) < 0.02 * len(rows)


def test_arithmetic():
    prompts = [
        "27+58=",
        "What is 3 * (4 - 1)?",
        "1. Compute 7 - 10.",
        "2\u00d73=",
        "1/4+1/4=",
        [{"role": "user", "content": "1+1"}],
    ]
    assert arithmetic(prompts=prompts, completions=["85", " 9 apples", "-3", "6", "0.5", CHAT]) == [1, 1, 1, 1, 1, 0]
    assert arithmetic(prompts=["27+58="] * 4, completions=["86", "", "it is 85", "850"]) == [0, 0, 0, 0]
    with pytest.raises(RewardError, match="'Hello' has no expression"):
        arithmetic(prompts=["Hello"], completions=["1"])
    with pytest.raises(RewardError, match="has no expression"):
        arithmetic(prompts=["1/0="], completions=["1"])


def test_json():
    good = ['{"a": [1, 2.5e3, null]}', ' "text"\n', "1" * 5000]
    bad = ["{'a': 1}", "NaN", "[Infinity]", "", '{"a": 1} and more', "[" * 100_000]
    assert valid(completions=[*good, *bad]) == [1] * len(good) + [0] * len(bad)


# ------------------------------------------------------------------------------------------------------ programs


@pytest.fixture(scope="module")
def run():
    """Scores of programs under three tests of `add`."""
    tests = ["assert add(1, 2) == 3", "assert add(0, 0) == 0", "assert add(-1, 1) == 0"]

    def score(*programs, tests=tests, **settings):
        reward = PassesTests(**{"seconds": 10.0, "allow_network": not isolates(), **settings})
        return reward(prompts=[""] * len(programs), completions=list(programs), tests=[tests] * len(programs))

    return score


def test_programs(run):
    right, wrong = "def add(a, b):\n    return a + b", "def add(a, b):\n    return a - b"
    fenced = f"Of course!\n```python\nprint('an example')\n```\nor rather\n```python\n{right}\n```\nHave fun."
    noisy = f"print('x' * 10**6)\n{right}"
    programs = [right, wrong, fenced, noisy, "def add(a, b", "", "raise KeyboardInterrupt"]
    assert run(*programs) == [1, 0, 1, 1, 0, 0, 0]
    assert run(right, wrong, partial=True) == [1, 1 / 3]  # 0 - 0 is 0 + 0


def test_columns_and_prompts(run):
    reward = PassesTests(with_prompt=True, allow_network=not isolates())
    head, body = "def double(x):\n", "    return 2 * x\n"
    assert reward(prompts=[head, head], completions=[body, body], tests=["assert double(2) == 4", None]) == [1, None]
    with pytest.raises(RewardError, match="`tests` holds 3; expected Python source"):
        reward(prompts=["a"], completions=["a"], tests=[3])
    with pytest.raises(RewardError, match=r"with_prompt=True.* got no prompts"):
        reward(completions=[body], tests=["assert double(2) == 4"])
    alone = PassesTests(allow_network=not isolates())
    assert alone(completions=[head + body], tests=["assert double(2) == 4"]) == [1]


@pytest.mark.parametrize("leave", ["import sys; sys.exit(0)", "import os; os._exit(0)", "exit()"])
def test_leaving_early_passes_nothing(run, leave):
    assert run(leave, f"def add(a, b):\n    {leave}", partial=True) == [0, 0]


def test_claiming_success_passes_nothing(run):
    claim = "import os, sys\nfor fd in range(3):\n    os.write(fd, b'0\\n1\\n2\\ntoken 0\\n')\nprint('OK')"
    assert run(claim, partial=True) == [0]


def test_time_is_limited_and_what_was_passed_before_counts(run):
    started = time.monotonic()
    late = "def add(a, b):\n    while a: pass\n    return a + b"
    assert run(
        "while True: pass", late, tests=["assert add(0, 1) == 1", "assert add(1, 2) == 3"], seconds=2.0, partial=True
    ) == [0, 0.5]
    assert time.monotonic() - started < 20


def test_memory_and_files_are_limited(run):
    small, large = 10 * 2**20, 2**30
    big = "def add(a, b):\n    bytearray({})\n    return a + b"
    file = "with open('file', 'wb') as f: f.write(bytes({}))\ndef add(a, b): return a + b"
    assert run(big.format(small), big.format(large), file.format(small), file.format(large // 16), memory_mb=256) == [
        1,
        0,
        1,
        0,
    ]


@needs_isolation
def test_programs_have_no_network_unless_they_are_allowed_to():
    with socket.create_server(("127.0.0.1", 0)) as server:
        program = f"import socket\nsocket.create_connection(('127.0.0.1', {server.getsockname()[1]}), timeout=5)"
        arguments = {"prompts": [""], "completions": [program], "tests": ["pass"]}
        assert PassesTests(seconds=20)(**arguments) == [0]
        assert PassesTests(seconds=20, allow_network=True)(**arguments) == [1]


@needs_isolation
def test_no_process_is_left_behind(tmp_path):
    mark = tmp_path / "mark"
    child = f"import time; time.sleep(3); open({str(mark)!r}, 'w')"
    program = f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {child!r}], start_new_session=True)"
    assert PassesTests(seconds=20)(prompts=[""], completions=[program], tests=["pass"]) == [1]
    assert not any(str(mark).encode() in command_line(process) for process in Path("/proc").glob("[0-9]*"))


def command_line(process: Path) -> bytes:
    try:
        return (process / "cmdline").read_bytes()
    except OSError:  # it has ended meanwhile
        return b""


def test_where_programs_cannot_be_kept_off_the_network_they_are_refused(monkeypatch):
    monkeypatch.setattr(verify, "_can_isolate", lambda: False)
    with pytest.raises(RewardError, match=r"cannot keep programs off the network.*pass allow_network=True"):
        PassesTests()
    assert PassesTests(allow_network=True) is not None
    with pytest.raises(RewardError, match="seconds=0; expected a positive number"):
        PassesTests(seconds=0, allow_network=True)


@pytest.mark.parametrize("reward", [FinalAnswer(), arithmetic, valid])
def test_they_pass_the_checker(reward):
    examples = [{"prompt": "1+1=", "completion": text, "answer": "2"} for text in ("2", "", "{}", "it is 2" * 100)]
    assert check_reward(reward, examples) is not None
