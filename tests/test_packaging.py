"""What is installed is what is written: the wheel in an empty environment, the layout, the lock file."""

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ["textenv", "rewards", "agents", "benchmarks"]


@pytest.fixture(scope="module")
def wheel_python(tmp_path_factory):
    """The interpreter of an environment that holds the wheel and sees the dependencies, but not this checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    for name in listed.stdout.split("\n"):
        if name and (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(source)]
    subprocess.run([*pip, *build], check=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], check=True)
    python = folder / "venv" / "bin" / "python"
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*pip, "--python", str(python), "install", "--no-deps", str(wheel)], check=True)
    site = subprocess.run(
        [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True, text=True
    )
    # A .pth line adds the dependencies, but not what their own .pth files would: the editable install stays unseen.
    (Path(site.stdout.strip()) / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def test_the_wheel_imports_without_the_checkout(wheel_python, tmp_path):
    code = (
        f"import importlib, pathlib\nfor name in {PACKAGES}:\n"
        "    p = pathlib.Path(importlib.import_module(name).__file__)\n"
        "    print(p, (p.parent / 'py.typed').exists())"
    )
    ran = subprocess.run([str(wheel_python), "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    found = [line.split() for line in ran.stdout.splitlines()]
    assert len(found) == len(PACKAGES)
    for location, typed in found:
        assert "site-packages" in location
        assert str(ROOT) not in location
        assert typed == "True"


def test_an_environment_is_made_from_the_wheel_alone_and_listed_by_its_program(wheel_python, tmp_path):
    code = (
        "import gymnasium, textenv; gymnasium.make('textenv/Arithmetic-v0').reset(seed=0)\n"
        "from textenv.cli import main; main(['envs'])"
    )
    ran = subprocess.run([str(wheel_python), "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr


def test_tests_and_examples_stay_out_of_the_wheel(wheel_python):
    names = {path.name for path in (wheel_python.parent.parent / "lib").glob("*/site-packages/*") if path.is_dir()}
    assert set(PACKAGES) <= names
    assert not names & {"tests", "examples", "docs", "runs"}


def test_the_lock_pins_every_dependency():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    locked = {
        line.split("==")[0].lower().replace("_", "-")
        for line in (ROOT / "requirements.lock").read_text().splitlines()
        if "==" in line
    }
    wanted = project["dependencies"] + project["optional-dependencies"]["dev"]
    names = {requirement.split(">")[0].split("=")[0].strip().lower() for requirement in wanted}
    assert names <= locked
