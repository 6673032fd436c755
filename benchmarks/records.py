"""A directory of results: rows, and files that are written whole or not at all, whenever the process is stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.cells import IDENTITY

ROWS, MANIFEST = "rows", "suite.json"


class ResultsExist(ValueError):
    """A directory holds results that the run would touch, or another run is writing there."""


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """One run at a time in a directory; the system lets go of it when the process ends, however that is."""
    import fcntl  # POSIX only; reading results needs it not

    with (out / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ResultsExist(f"Another run is writing to {out}: wait for it, or choose another --out.") from None
        yield


def write_text(path: Path, text: str) -> None:
    """Write a file."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")  # processes may write beside each other
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, path)


def write_json(path: Path, value: Any) -> None:
    """The same, as JSON."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def read_row(path: Path) -> dict[str, Any] | None:
    """A row; None where there is none, or none that can be read."""
    try:
        row = json.loads(path.read_text())
        return row if {*IDENTITY, "config"} <= set(row) else None
    except (OSError, ValueError, TypeError):
        return None


def read_rows(out: Path) -> list[dict[str, Any]]:
    """All rows of a directory, seed by seed."""
    files = (path for path in sorted((out / ROWS).glob("*.json")))
    rows = [row for path in files if (row := read_row(path)) is not None]
    return sorted(rows, key=lambda row: (row["seed"], row["agent"], row["task"]))
