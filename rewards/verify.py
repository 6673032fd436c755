"""Rewards that are checked, not judged: sums, final answers, JSON, programs and their tests.

For mathematics in LaTeX, `trl.rewards.accuracy_reward` works here unchanged.
"""

from __future__ import annotations

import ast
import functools
import json
import math
import operator
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

from rewards.base import Completion, RewardError, completion_text, shorten

MINUS, TIMES = "\u2212", "\u00d7"  # as they are typeset
_NUMBER = re.compile(r"(?<![\w.])[-+\u2212]?\s?[$€£]?\s?((?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)")
_EXPRESSION = re.compile(r"[\d.()+\-*/\u00d7 \t]*\d[\d.()+\-*/\u00d7 \t]*")
_OPERATORS: dict[type[ast.AST], Callable[..., Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}


def arithmetic(prompts: Sequence[Completion], completions: Sequence[Completion], **columns: Any) -> list[float]:
    """1 if the completion begins with the value of the sum that the prompt asks for, else 0.

    The sum is the last expression of numbers, ``+ - * /`` and brackets in the prompt. No column of answers is needed.

    Args:
        prompts: B prompts, such as ``"27+58="`` or ``"What is 3 * (4 - 1)?"``.
        completions: B completions.
        **columns: Ignored.

    Returns:
        B values, each 0 or 1.

    Raises:
        RewardError: A prompt has no such expression.

    Example:
        >>> arithmetic(prompts=["27+58=", "1/4 + 1/4 ="], completions=["85", " 0.50."])
        [1.0, 1.0]
    """
    rewards = []
    for prompt, completion in zip(prompts, completions, strict=True):
        text = completion_text(prompt if isinstance(prompt, str) else prompt[-1:])
        answer = _NUMBER.match(completion_text(completion).strip())
        rewards.append(float(answer is not None and _number(answer) == _value(text)))
    return rewards


@dataclass(frozen=True)
class FinalAnswer:
    r"""1 if the final answer of a worked solution is the right number, else 0 (as GSM8K, https://arxiv.org/abs/2110.14168).

    The final answer is the number behind the last ``####``, else in the last ``\boxed{}``, else behind the last "answer is",
    else the last number of all. Commas, currency signs and trailing zeros make no difference: ``$1,200.00`` is ``1200``.

    Args:
        strict: Whether only what stands behind ``####`` counts.

    Example:
        >>> FinalAnswer()(completions=["3 boxes of 24 make 72.", "#### 71"], answer=["... #### 72", 72])
        [1.0, 0.0]
    """

    strict: bool = False

    def __call__(self, completions: Sequence[Completion], answer: Sequence[Any], **columns: Any) -> list[float | None]:
        """Score B completions against the column ``answer``: numbers, solutions that end in one, or None where there is none."""
        rewards: list[float | None] = []
        for completion, expected in zip(completions, answer, strict=True):
            if expected is None:
                rewards.append(None)
                continue
            right = final_number(str(expected))
            if right is None:
                raise RewardError(
                    f"the column `answer` holds {shorten(repr(expected))}; expected a number in it, or None"
                )
            rewards.append(float(final_number(completion_text(completion), self.strict) == right))
        return rewards


def final_number(text: str, strict: bool = False) -> Fraction | None:
    """The final answer of a worked solution; see :class:`FinalAnswer`.

    Args:
        text: The solution.
        strict: Whether only what stands behind ``####`` counts.

    Returns:
        The number, exactly; None if there is none.
    """
    places = (("####", "\n"), (r"\boxed{", "}"), ("answer is", "\n"))
    for before, after in places[:1] if strict else places:
        _, found, rest = text.rpartition(before)
        if found and (number := _NUMBER.search(rest.partition(after)[0])):
            return _number(number)
    numbers = [] if strict else list(_NUMBER.finditer(text))
    return _number(numbers[-1]) if numbers else None


def valid_json(completions: Sequence[Completion], **columns: Any) -> list[float]:
    """1 if the completion is JSON (white space around it aside), else 0.

    As RFC 8259 has it: without Python's ``NaN`` and ``Infinity``. What is nested too deep to be read counts as 0.

    Args:
        completions: B completions.
        **columns: Ignored.

    Returns:
        B values, each 0 or 1.

    Example:
        >>> valid_json(completions=['{"a": [1, 2]}', "{'a': 1}"])
        [1.0, 0.0]
    """
    return [float(_is_json(completion_text(completion))) for completion in completions]


@dataclass(frozen=True)
class PassesTests:
    """1 if a Python program passes its tests, else 0; or the share of the tests that it passes.

    The program is the last fenced code block of the completion, or the whole completion if it has none. The tests are the
    column ``tests``: Python source such as ``"assert add(1, 2) == 3"``, or a list of such, run after the program in its names.

    Each program runs in a process of its own, with bounded time, memory and file size, in an empty directory, without its
    output being seen. On Linux it gets a network namespace of its own, that is no network, and leaves no process behind. Where
    the kernel does not allow that, programs are refused unless ``allow_network=True``. Leaving early (``sys.exit``) passes no
    test. This stops accidents and lazy cheating. It is no prison: a program can read what you can read, so run models that
    you do not trust in a container.

    Args:
        seconds: Wall-clock time for a program and its tests.
        memory_mb: Address space of a process, in MB of 2**20 bytes.
        partial: Whether to pay the share of the tests that pass.
        with_prompt: Whether the program is the prompt and then the completion (as in HumanEval).
        allow_network: Whether to run programs that could reach the network.
        workers: Programs that run at the same time; by default as many as there are CPUs.

    Raises:
        RewardError: Limits that are not positive, or no way to keep programs off the network.

    Example:
        >>> PassesTests()(completions=["def add(a, b): return a + b"], tests=["assert add(1, 2) == 3"])
        [1.0]
    """

    seconds: float = 5.0
    memory_mb: int = 512
    partial: bool = False
    with_prompt: bool = False
    allow_network: bool = False
    workers: int | None = None

    def __post_init__(self) -> None:
        for name in ("seconds", "memory_mb", "workers"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise RewardError(f"PassesTests got {name}={value}; expected a positive number")
        if os.name != "posix":
            raise RewardError(
                f"PassesTests bounds programs by POSIX limits, which {sys.platform} lacks; expected Linux or macOS"
            )
        if not self.allow_network and not _can_isolate():
            raise RewardError(
                "PassesTests cannot keep programs off the network: this system does not allow an unprivileged network "
                "namespace. Remedy: allow it (sysctl kernel.unprivileged_userns_clone=1, or the container's security profile), or "
                "pass allow_network=True to run programs that can reach the network"
            )

    def __call__(
        self,
        completions: Sequence[Completion],
        tests: Sequence[Any],
        prompts: Sequence[Completion] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """Score B completions against the column ``tests``; None where there are none."""
        programs = [program(completion_text(completion)) for completion in completions]
        if self.with_prompt:
            if prompts is None:
                raise RewardError("PassesTests(with_prompt=True) got no prompts; expected one for each completion")
            programs = [completion_text(prompt) + rest for prompt, rest in zip(prompts, programs, strict=True)]
        with ThreadPoolExecutor(self.workers or os.cpu_count()) as pool:
            return list(pool.map(self._score, programs, map(_checked_tests, tests)))

    def _score(self, source: str, tests: list[str]) -> float | None:
        if not tests:
            return None
        passed = len(self._passed(source, tests))
        return passed / len(tests) if self.partial else float(passed == len(tests))

    def _passed(self, source: str, tests: list[str]) -> set[int]:
        """Which tests a program passes."""
        token = secrets.token_hex(16)
        job = {"program": source, "tests": tests, "token": token, "network": self.allow_network}
        job |= {"memory": self.memory_mb << 20, "seconds": math.ceil(self.seconds)}
        with tempfile.TemporaryDirectory(prefix="textenv-") as directory:
            output, _ = _run(job, directory, self.seconds)
        lines = [line.split(" ") for line in output.decode(errors="replace").splitlines()]
        return {int(line[1]) for line in lines if line[0] == token and len(line) == 2}


def program(text: str) -> str:
    """The Python program in a completion: its last fenced code block, or all of it if there is none.

    Args:
        text: The completion.

    Returns:
        Source code.
    """
    blocks = re.findall(r"^```[^\n`]*\n(.*?)(?:^```|\Z)", text, re.DOTALL | re.MULTILINE)
    return str(blocks[-1]) if blocks else text


def _run(job: dict[str, Any], directory: str, seconds: float) -> tuple[bytes, int]:
    """Run a job of the sandbox: its output, and its exit status."""
    process = subprocess.Popen(
        [sys.executable, "-I", str(Path(__file__).with_name("sandbox.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=directory,
        env={"PATH": os.defpath, "HOME": directory, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(json.dumps(job).encode(), timeout=seconds)
    except subprocess.TimeoutExpired:
        _kill_group(process)
        output, _ = process.communicate()
    except BaseException:  # Ctrl-C
        _kill_group(process)
        raise
    _kill_group(process)  # what it has left behind, where there is no namespace that ends with it
    return output, process.returncode


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError, PermissionError):  # it is gone; on macOS a group of zombies gives the latter
        os.killpg(process.pid, signal.SIGKILL)


@functools.cache
def _can_isolate() -> bool:
    """Whether the kernel gives a process a network of its own, without privileges."""
    job = {"program": "", "tests": ["pass"], "token": "ok", "network": False, "memory": 1 << 30, "seconds": 10}
    output, _ = _run(job, tempfile.gettempdir(), 30.0)
    return output == b"ok 0\n"


def _checked_tests(tests: Any) -> list[str]:
    if tests is None:
        return []
    if isinstance(tests, str):
        return [tests]
    if not isinstance(tests, (list, tuple)) or not all(isinstance(test, str) for test in tests):
        raise RewardError(
            f"the column `tests` holds {shorten(repr(tests))}; expected Python source, a list of it, or None"
        )
    return list(tests)


def _is_json(text: str) -> bool:
    def refuse(constant: str) -> None:
        raise ValueError(constant)

    try:
        json.loads(text, parse_constant=refuse, parse_int=len)  # Python refuses integers of more than 4,300 digits
    except (ValueError, RecursionError):
        return False
    return True


def _number(match: re.Match[str]) -> Fraction:
    value = Fraction(Decimal(match[1].replace(",", "")))
    return -value if match[0][0] in ("-", MINUS) else value


def _value(prompt: str) -> Fraction:
    """The value of the last expression in a prompt."""
    found = [text for text in _EXPRESSION.findall(prompt) if re.search(r"\d", text)]
    for text in reversed(found):
        try:
            return _evaluate(ast.parse(text.replace(TIMES, "*").strip(), mode="eval").body)
        except (SyntaxError, ValueError, ZeroDivisionError):
            continue  # a list number, a full stop
    raise RewardError(
        f"the prompt {shorten(prompt)!r} has no expression of numbers, + - * / and brackets; expected one, such as '27+58='"
    )


def _evaluate(node: ast.AST) -> Fraction:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return Fraction(str(node.value))
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_evaluate(node.left), _evaluate(node.right))
    if isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_evaluate(node.operand))
    raise ValueError(ast.dump(node))
