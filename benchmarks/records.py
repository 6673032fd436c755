"""Files that are written whole or not at all, whenever the process is stopped."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    """Write a file."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")  # processes may write beside each other
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, path)


def write_json(path: Path, value: Any) -> None:
    """The same, as JSON."""
    write_text(path, json.dumps(value, indent=1) + "\n")
