"""The runner of all suites: agents x tasks x seeds, in one process, in several, or on a Ray cluster.

A run of one (task, agent, seed) is a cell; a finished cell is one file with one row of JSON, written whole or not at all.
So a run that is killed loses the cells that were running and nothing else, and `--resume` runs what is missing. A failure
is a row too, with its traceback. Rows do not depend on where cells run and in which order: only the entries `time` and `host` and
the seconds of the curve do (`without_time`).

Run: textenv bench SUITE
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cells import Cell, cells
from benchmarks.engines import Engine
from benchmarks.play import current_commit
from benchmarks.progress import progress
from benchmarks.records import MANIFEST, ROWS, ResultsExist, locked, read_row, read_rows, write_json, write_text
from benchmarks.suites import Suite


def run_suite(
    name: str,
    suite: Suite,
    out: Path,
    *,
    engine: Engine | None = None,
    resume: bool = False,
    overwrite: bool = False,
    command: str = "",
    console: Any = None,
) -> list[dict[str, Any]]:
    """Run what is missing, and return the rows of all the suite's cells.

    Args:
        name: Of the suite, for its rows.
        suite: What is run.
        out: Where rows go: `out/rows/*.json`, and all of them in `out/rows.jsonl`.
        engine: Where cells run.
        resume: Keep what is there, and run what is missing or failed.
        overwrite: Run every cell anew; old rows of these cells go first.
        command: What to write in reports as having made this.
        console: A rich console; None prints nothing.

    Raises:
        ResultsExist: There are results, and neither `resume` nor `overwrite`; or they were made under other settings.
    """
    engine = engine or Engine()
    wanted = cells(name, suite)
    folder = out / ROWS
    folder.mkdir(parents=True, exist_ok=True)
    with locked(out):
        for scratch in (*folder.glob(".*"), *out.glob(".*.[0-9]*")):  # of a process that was killed while it wrote
            scratch.unlink()
        there = {cell.file: row for cell in wanted if (row := read_row(folder / cell.file)) is not None}
        claim(name, suite, out, command, there, wanted, resume=resume, overwrite=overwrite)
        if overwrite:
            for file in there:
                (folder / file).unlink()
            there = {}
        todo = [cell for cell in wanted if cell.file not in there or "error" in there[cell.file]]
        commit = current_commit()
        with progress(console, suite, wanted, todo, there, engine) as view:
            for cell, row in engine.run(todo, commit, view.started):
                write_text(folder / cell.file, json.dumps(row) + "\n")
                view.finished(cell, row)
        rows = [json.loads((folder / cell.file).read_text()) for cell in wanted]
        write_text(out / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in read_rows(out)))
    return rows


def claim(
    name: str,
    suite: Suite,
    out: Path,
    command: str,
    there: Mapping[str, dict[str, Any]],
    wanted: Sequence[Cell],
    *,
    resume: bool,
    overwrite: bool,
) -> None:
    """See that this run may write here, and write down what it is."""
    manifest = out / MANIFEST
    before = json.loads(manifest.read_text()) if manifest.exists() else {}
    if before and before["suite"] != name:
        raise ResultsExist(f"{out} holds results of suite {before['suite']!r}, not {name!r}: choose another --out.")
    if there and not (resume or overwrite):
        raise ResultsExist(
            f"{out} holds {len(there)} of these {len(wanted)} results already: go on with --resume, begin anew with --overwrite, or "
            "choose another --out."
        )
    for cell in wanted:
        if not overwrite and cell.file in there and there[cell.file]["config"] != cell.config:
            old = there[cell.file]["config"]
            changed = [key for key in cell.config if old.get(key) != cell.config[key]]
            raise ResultsExist(
                f"{out / ROWS / cell.file} was made with other settings ({', '.join(changed)}): choose another --out, or --overwrite."
            )
    commands = list(dict.fromkeys([*before.get("commands", []), *([command] if command else [])]))
    kept = ("title", "headline", "bounded", "frontier", "columns", "lower_is_better")
    agents = before.get("agents", {}) | {key: {"follows_j": preset.follows_j} for key, preset in suite.agents.items()}
    about = {key: getattr(suite, key) for key in kept}
    about["tasks"] = list(dict.fromkeys([*before.get("tasks", []), *suite.tasks]))
    write_json(manifest, {"suite": name} | about | {"agents": agents, "commands": commands})
