"""What the package promises by name, and what importing it costs."""

from __future__ import annotations

import subprocess
import sys

import pytest

import textenv


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize("name", textenv.__all__)
def test_every_public_name_imports(name: str) -> None:
    assert getattr(textenv, name).__doc__
    assert name in dir(textenv)


def test_the_list_of_public_names_is_complete() -> None:
    lazy = set(textenv._LAZY)
    assert lazy == set(textenv.__all__)
    assert len(textenv.__all__) == len(lazy)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'textenv' has no attribute 'TextWorld'"):
        _ = textenv.TextWorld


def test_importing_registers_the_ids_and_leaves_the_heavy_modules_alone() -> None:
    code = """
import sys, gymnasium, textenv
heavy = {"torch", "transformers", "stable_baselines3", "matplotlib", "datasets"} & sys.modules.keys()
print(sorted(heavy), "textenv/Prompts-v0" in gymnasium.registry)
"""
    assert run(code) == "[] True"


def test_gymnasium_can_do_the_import_itself() -> None:
    code = """
import gymnasium
try:
    gymnasium.make("textenv:textenv/Prompts-v1")
except gymnasium.error.VersionNotFound as error:
    print(error)
"""
    assert "versioned environments: [ `v0` ]" in run(code)  # so the id was registered by then
