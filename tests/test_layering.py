"""Imports point one way: rewards <- textenv <- agents <- benchmarks. Each package can be read without those after it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

LAYERS = ("rewards", "textenv", "agents", "benchmarks")
ROOT = Path(__file__).parents[1]
EXCEPTION = "textenv/cli/"  # the one program starts everything


def imported(source: str) -> Iterator[str]:
    """Top-level packages that a module imports, wherever in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield str(node.module).split(".")[0]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
            yield from (str(arg.value).split(".")[0] for arg in node.args if isinstance(arg, ast.Constant))


def modules() -> list[str]:
    files = [path.relative_to(ROOT) for layer in LAYERS for path in sorted((ROOT / layer).rglob("*.py"))]
    return [path.as_posix() for path in files if not path.as_posix().startswith(EXCEPTION)]


@pytest.mark.parametrize("module", modules())
def test_a_module_imports_nothing_from_the_layers_above_it(module: str) -> None:
    own = LAYERS.index(module.split("/")[0])
    above = set(imported((ROOT / module).read_text(encoding="utf-8"))) & set(LAYERS[own + 1 :])
    assert not above


def test_no_module_of_the_packages_imports_the_tests() -> None:
    assert not [module for module in modules() if "tests" in imported((ROOT / module).read_text(encoding="utf-8"))]


def test_the_reader_above_sees_every_kind_of_import() -> None:
    source = "import agents.ppo\ndef f():\n    from textenv import env\n    importlib.import_module('benchmarks.run')\n"
    assert list(imported(source)) == ["agents", "textenv", "benchmarks"]
