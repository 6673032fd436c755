"""What a directory of rows says: leaderboard, frontier, curves, performance profile, samples; and how two of them compare.

Everything is read from the rows. Report and pictures go beside them: `report.html` needs no other file, `report.md` its
`pictures`.
"""

from __future__ import annotations

import base64
import html
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import trim_mean

from benchmarks import stats
from benchmarks.metrics import OF_THE_TASK, direction
from benchmarks.records import write_text
from benchmarks.run import MANIFEST, read_rows
from benchmarks.stats import Interval, stratified_bootstrap

FLOATS = NDArray[np.float64]
ENOUGH_SEEDS = 10
"""From here on a bootstrap's interval may be taken at its word."""
FAR = 6.0
"""Agents whose KL is so many times the median of all are named, not drawn, beside a frontier."""
COLOURS = (
    "#1f6f8b", "#d1495b", "#3a7d44", "#e08e45", "#6a4c93", "#8c564b", "#c2559d", "#5b8c5a", "#2ec4b6", "#a3721c", "#4d4d4d",
    "#9b2226", "#7a8b99",
)  # fmt: skip


# ---------------------------------------------------------------------- results


@dataclass(frozen=True, eq=False)
class Results:
    """The rows of a directory."""

    directory: Path
    manifest: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]

    @cached_property
    def agents(self) -> list[str]:
        """Those that have rows, in the suite's order."""
        present = {row["agent"] for row in self.rows}
        known = [agent for agent in self.manifest["agents"] if agent in present]
        return known + sorted(present - set(known))

    @cached_property
    def tasks(self) -> list[str]:
        """Likewise."""
        present = {row["task"] for row in self.rows}
        known = [task for task in self.manifest["tasks"] if task in present]
        return known + sorted(present - set(known))

    @property
    def headline(self) -> str:
        """What agents are ranked by."""
        return str(self.manifest["headline"])

    @cached_property
    def good(self) -> list[Mapping[str, Any]]:
        """Rows of runs that did not fail."""
        return [row for row in self.rows if "error" not in row]

    def of(self, agent: str, task: str | None = None) -> list[Mapping[str, Any]]:
        """An agent's rows of runs that did not fail."""
        return [row for row in self.good if row["agent"] == agent and task in (None, row["task"])]

    def values(self, agent: str, metric: str, task: str | None = None) -> FLOATS:
        """A metric over an agent's runs, where it is known. Shape: (n,)."""
        found = [row["metrics"].get(metric) for row in self.of(agent, task)]
        return np.asarray([value for value in found if value is not None], np.float64)

    def table(self, agent: str, metric: str, tasks: Sequence[str] | None = None) -> tuple[list[int], FLOATS]:
        """Seeds with a figure on every task, and the figures. Shape: (R, M)."""
        tasks = self.tasks if tasks is None else tasks
        known = {(row["seed"], row["task"]): row["metrics"].get(metric) for row in self.of(agent)}
        seeds = sorted({seed for seed, _ in known})
        complete = [seed for seed in seeds if all(known.get((seed, task)) is not None for task in tasks)]
        return complete, np.asarray([[known[seed, task] for task in tasks] for seed in complete], np.float64)

    def label(self, agent: str) -> str:
        """Its name, with a star if it tends to something else than the optimum of J."""
        return agent + ("" if self.manifest["agents"].get(agent, {}).get("follows_j", True) else " *")

    def failed(self, agent: str) -> int:
        """Runs without figures."""
        return sum(row["agent"] == agent and "error" in row for row in self.rows)

    @cached_property
    def made_by(self) -> str:
        """The command and the commit behind every figure."""
        commands = (
            " and ".join(f"`{command}`" for command in self.manifest.get("commands", [])) or "rows in this directory"
        )
        commits = list(dict.fromkeys((row.get("commit") or "unknown")[:12] + "+changes" * str(row.get("commit")).endswith("+changes")
                       for row in self.rows))  # fmt: skip
        return f"{commands}, commit {', '.join(commits)}"


def read_results(directory: Path) -> Results:
    """The rows of a directory.

    Raises:
        ValueError: There are none.
    """
    manifest, rows = directory / MANIFEST, read_rows(directory)
    if not manifest.is_file() or not rows:
        raise ValueError(f"No results in {directory}: expected what `textenv bench SUITE --out {directory}` writes.")
    return Results(directory, json.loads(manifest.read_text()), rows)


# ---------------------------------------------------------------------- tables


@dataclass(frozen=True)
class Figures:
    """A table: for the screen, for Markdown and for HTML."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


def leaderboard(directory: Path) -> list[Figures]:
    """The tables of a directory's results, the best agent first."""
    return tables(read_results(directory))


def tables(results: Results) -> list[Figures]:
    """Leaderboard; by task, or metric by metric; and everybody against the first."""
    order = ranking(results)
    several = [by_task(results, order)] if len(results.tasks) > 1 else []
    return [ranks(results, order), *several, by_metric(results, order), *versus_first(results, order)]


def ranking(results: Results) -> list[str]:
    """Agents by the IQM of the headline metric; those without a complete seed last."""

    def key(agent: str) -> float:
        _, scores = results.table(agent, results.headline)
        return float(stats.iqm(scores)) if len(scores) else -np.inf

    sign = direction(results.headline, results.manifest["lower_is_better"]) or 1
    return sorted(results.agents, key=lambda agent: -sign * key(agent) if np.isfinite(key(agent)) else np.inf)


def ranks(results: Results, order: Sequence[str]) -> Figures:
    """The headline metric with its interval, and what is missing to 1."""
    bounded = results.manifest.get("bounded")
    header = ["agent", "IQM", "95% interval", "median", *(["gap"] if bounded else []), "seeds", "tokens", "CPU min"]
    lines, fewest = [], ENOUGH_SEEDS
    for agent in order:
        seeds, scores = results.table(agent, results.headline)
        cells = [named(results, agent)]
        if len(seeds):
            fewest = min(fewest, len(seeds))
            interval = stratified_bootstrap(stats.iqm, scores)
            limits = span(interval) if len(seeds) > 1 else "-"
            cells += [number(interval.estimate), limits, number(stats.median(scores))]
        else:
            cells += ["-"] * 3
        if bounded:
            _, scores = results.table(agent, bounded)
            cells.append(number(stats.optimality_gap(scores)) if len(scores) else "-")
        mine = results.of(agent)
        tokens = [t for row in mine if (t := row["accounts"].get("timesteps")) is not None]
        minutes = sum(row["time"]["cpu_seconds"] for row in results.rows if row["agent"] == agent) / 60
        lines.append([*cells, str(len(seeds)), f"{np.mean(tokens):,.0f}" if tokens else "-", f"{minutes:.1f}"])
    note = f"{results.headline}: IQM is the mean without the lowest and highest quarter of all runs; median that over tasks of the mean"
    note += f"; gap what is missing to 1, in {bounded}. " if bounded else ". "
    note += coverage_note(fewest, len(results.tasks))
    return Figures(f"Leaderboard: {results.headline}", header, lines, note)


def coverage_note(seeds: int, tasks: int) -> str:
    """What intervals are about; with few seeds, how much they really cover."""
    text = "Intervals are a stratified bootstrap's, over seeds."
    if seeds == 1:
        return "Of one seed there is no interval."
    if seeds < ENOUGH_SEEDS:
        real = stats.coverage(seeds, tasks)
        text += (
            f" With {seeds} seed{'s' * (seeds > 1)} on {tasks} task{'s' * (tasks > 1)} an interval that claims 95% really covers "
            f"{real:.0%} (simulated on normal scores)."
        )
    return text


def by_task(results: Results, order: Sequence[str]) -> Figures:
    """Median and lower quartile of the headline metric, task by task."""
    lines = []
    for agent in order:
        cells = [named(results, agent)]
        for task in (*results.tasks, None):
            values = results.values(agent, results.headline, task)
            cells.append(f"{number(np.median(values))} / {number(np.quantile(values, 0.25))}" if len(values) else "-")
        lines.append(cells)
    note = "Median / lower quartile over seeds."
    if any(not results.manifest["agents"].get(agent, {}).get("follows_j", True) for agent in order):
        note += " *: tends to another policy than the optimum of E[r] - beta KL, see docs/agents."
    return Figures(f"{results.headline.capitalize()}, task by task", ["agent", *results.tasks, "all"], lines, note)


def by_metric(results: Results, order: Sequence[str]) -> Figures:
    """Further metrics: means over all runs, with Student's interval."""
    columns = [name for name in results.manifest["columns"] if any(len(results.values(agent, name)) for agent in order)]
    lines = []
    for agent in order:
        cells = [named(results, agent)]
        for name in columns:
            values = results.values(agent, name)
            interval = stats.mean_interval(values) if len(values) else None
            bound = "≤" if name == "kl" and best_of_n(results, agent) else ""
            cells.append("-" if interval is None else bound + plus_minus(interval))
        lines.append(cells)
    note = "Mean over all runs ± half of Student's 95% interval."
    if any("≤" in cell for line in lines for cell in line):
        note += " ≤: a bound, log n - (n - 1) / n."
    return Figures("Metric by metric", ["agent", *columns], lines, note)


def best_of_n(results: Results, agent: str) -> bool:
    """Whether the KL in an agent's rows is a bound."""
    rows = results.of(agent)
    return bool(rows) and rows[0]["config"]["agent_class"] == "BestOfN" and not rows[0]["frontier"]


def versus_first(results: Results, order: Sequence[str]) -> list[Figures]:
    """How sure it is that the first is better than the others."""
    first, lines = order[0], []
    sign = direction(results.headline, results.manifest["lower_is_better"]) or 1
    seeds, best = results.table(first, results.headline)
    for agent in order[1:]:
        theirs, scores = results.table(agent, results.headline)
        common = sorted(set(seeds) & set(theirs))
        if len(common) < 2:
            continue
        chance = stratified_bootstrap(stats.probability_of_improvement, sign * best, sign * scores, repetitions=2_000)
        rows = [seeds.index(seed) for seed in common], [theirs.index(seed) for seed in common]
        difference = stats.paired_difference(best[rows[0]], scores[rows[1]])
        lines.append(
            [
                results.label(agent),
                number(chance.estimate),
                span(chance),
                f"{difference.estimate:+.3f}",
                span(difference),
            ]
        )
    if not lines:
        return []
    header = ["against", f"P({first} better)", "95% interval", "paired difference", "95% interval "]
    note = (
        f"P: how often a run of {first} beats a run of the other on the same task (Mann-Whitney; bootstrap interval). Paired difference of "
        f"{results.headline} on equal seeds, with Student's interval."
    )
    return [Figures(f"{first} against the others", header, lines, note)]


def named(results: Results, agent: str) -> str:
    """Its name, and how many of its runs failed."""
    return results.label(agent) + (f" ({results.failed(agent)} failed)" if results.failed(agent) else "")


def number(value: Any) -> str:
    """Three decimals."""
    return f"{float(value):.3f}"


def span(interval: Interval) -> str:
    """Its limits."""
    return f"{number(interval.low)} to {number(interval.high)}" if np.isfinite(interval.low) else "-"


def plus_minus(interval: Interval) -> str:
    """Estimate and half the interval."""
    digits = 3 if abs(interval.estimate) < 100 else 1
    half = (interval.high - interval.low) / 2
    return f"{interval.estimate:.{digits}f}" + (f" ± {half:.{digits}f}" if np.isfinite(half) else "")


def print_tables(figures: Sequence[Figures], console: Any) -> None:
    """On the screen: the leaderboard, and the tasks one by one or metric by metric."""
    from rich.markup import escape
    from rich.table import Table

    for part in figures[:2]:
        table = Table(title=escape(part.title), caption=escape(part.note), box=None, padding=(0, 1, 0, 0))
        for i, name in enumerate(part.header):
            table.add_column(escape(name), justify="right" if i else "left", no_wrap=i == 0)
        for row in part.rows:
            narrow = [re.sub(r"(?<!\d)0\.(?=.*/)", ".", cell) for cell in row[1:]]  # within 80 columns
            table.add_row(*[escape(cell.replace(" / ", "/").replace(" to ", "..")) for cell in (row[0], *narrow)])
        console.print(table)
        console.print()


# ---------------------------------------------------------------------- the report


@dataclass(frozen=True)
class Picture:
    """A figure with its caption."""

    name: str
    title: str
    caption: str
    png: bytes


def write_report(directory: Path) -> list[Path]:
    """Write `report.html`, `report.md` and `pictures/`; returns the two documents."""
    results = read_results(directory)
    pictures = [picture for draw in (draw_frontier, draw_curves, draw_profile) for picture in draw(results)]
    folder = directory / "pictures"
    folder.mkdir(exist_ok=True)
    for picture in pictures:
        scratch = folder / f".{picture.name}.{os.getpid()}"
        scratch.write_bytes(picture.png)
        os.replace(scratch, folder / f"{picture.name}.png")
    paths = [directory / "report.html", directory / "report.md"]
    parts = tables(results)
    write_text(paths[0], as_html(results, parts, pictures))
    write_text(paths[1], as_markdown(results, parts, pictures))
    return paths


def lead(results: Results) -> str:
    """What was run, in a few words."""
    seeds = sorted({row["seed"] for row in results.rows})
    failures = sum("error" in row for row in results.rows)
    made = ", ".join(f"{name} {value}" for name, value in results.rows[0]["versions"].items())
    return (
        f"{len(results.agents)} agents on {len(results.tasks)} task{'s' * (len(results.tasks) > 1)} ({', '.join(results.tasks)}), "
        f"{len(seeds)} seed{'s' * (len(seeds) > 1)}, {len(results.rows)} runs, {failures} of them failed. Made by {results.made_by}. With {made}."
    )


def as_markdown(results: Results, parts: Sequence[Figures], pictures: Sequence[Picture]) -> str:
    """The report for a repository."""

    def safe(cell: str) -> str:
        return cell.replace("|", "\\|").replace("*", "\\*").replace("\n", " ")

    lines = [f"# {results.manifest['title']}", "", lead(results), ""]
    for picture in pictures[:1]:
        lines += markdown_picture(picture)
    for part in parts:
        lines += [
            f"## {part.title}",
            "",
            "| " + " | ".join(map(safe, part.header)) + " |",
            "|" + "---|" * len(part.header),
        ]
        lines += ["| " + " | ".join(map(safe, row)) + " |" for row in part.rows]
        lines += ["", f"{safe(part.note)} Made by {results.made_by}.", ""]
    for picture in pictures[1:]:
        lines += markdown_picture(picture)
    examples = sample_groups(results)
    if examples:
        lines += [
            "## Answers to the same prompts",
            "",
            f"Seed {examples[0][2]}, with their rewards. Made by {results.made_by}.",
            "",
        ]
        for prompt, answers, _ in examples:
            lines += [f"**{safe(prompt)}**", ""]
            lines += [f"- {safe(agent)} ({reward:.2f}): {safe(text) or '(nothing)'}" for agent, text, reward in answers]
            lines.append("")
    for row in failures(results):
        lines += [f"Failed: {row['agent']}, {row['task']}, seed {row['seed']}: {safe(row['error'])}", ""]
    return "\n".join(lines)


def markdown_picture(picture: Picture) -> list[str]:
    """A picture with its caption."""
    return [f"## {picture.title}", "", f"![{picture.title}](pictures/{picture.name}.png)", "", picture.caption, ""]


def as_html(results: Results, parts: Sequence[Figures], pictures: Sequence[Picture]) -> str:
    """The report as one file."""

    def text(words: str) -> str:
        pieces = html.escape(words).split("`")  # every second piece is code
        return "".join(f"<code>{piece}</code>" if i % 2 else piece for i, piece in enumerate(pieces))

    def figure(picture: Picture) -> str:
        data = base64.b64encode(picture.png).decode()
        narrow = "class='one' " * (picture.name == "profile")
        image = f"<img {narrow}alt='{html.escape(picture.title)}' src='data:image/png;base64,{data}'>"
        return f"<h2>{html.escape(picture.title)}</h2><figure><div class='scroll'>{image}</div><figcaption>{text(picture.caption)}</figcaption></figure>"

    def table(part: Figures) -> str:
        head = "".join(f"<th>{html.escape(name)}</th>" for name in part.header)
        body = "".join(
            "<tr>"
            + "".join(f"<{'td' if i else 'th'}>{html.escape(c)}</{'td' if i else 'th'}>" for i, c in enumerate(row))
            + "</tr>"
            for row in part.rows
        )
        return (
            f"<h2>{html.escape(part.title)}</h2><div class='scroll'><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
            f"<p class='note'>{text(part.note)} Made by {text(results.made_by)}.</p>"
        )

    examples = sample_groups(results)
    shown = "".join(
        f"<article><h3>{html.escape(prompt)}</h3><dl>"
        + "".join(
            f"<dt>{html.escape(a)} <span>{r:.2f}</span></dt><dd>{html.escape(t) or '<i>nothing</i>'}</dd>"
            for a, t, r in answers
        )
        + "</dl></article>"
        for prompt, answers, _ in examples
    )
    if shown:
        shown = (
            f"<h2>Answers to the same prompts</h2><p class='note'>Seed {examples[0][2]}, with their rewards. Made by {text(results.made_by)}.</p>"
            f"<div class='samples'>{shown}</div>"
        )
    broken = "".join(
        f"<details><summary>{html.escape(row['agent'])}, {html.escape(row['task'])}, seed {row['seed']}: {html.escape(row['error'])}</summary>"
        f"<pre>{html.escape(row['traceback'])}</pre></details>"
        for row in failures(results)
    )
    return PAGE.format(
        title=html.escape(results.manifest["title"]),
        lead=text(lead(results)),
        first="".join(map(figure, pictures[:1])),
        tables="".join(map(table, parts)),
        pictures="".join(map(figure, pictures[1:])),
        samples=shown,
        failures=f"<h2>Runs that failed</h2>{broken}" if broken else "",
    )


def failures(results: Results) -> list[Mapping[str, Any]]:
    """Rows of failures."""
    return [row for row in results.rows if "error" in row]


def sample_groups(results: Results) -> list[tuple[str, list[tuple[str, str, float]], int]]:
    """Per prompt every agent's answer with its reward, at the first seed: (prompt, [(agent, answer, reward)], seed)."""
    rows = [row for row in results.good if row["samples"]]
    if not rows:
        return []
    seed = min(row["seed"] for row in rows)
    groups: list[tuple[str, list[tuple[str, str, float]], int]] = []
    for task in results.tasks:
        mine = {row["agent"]: row["samples"] for row in rows if row["task"] == task and row["seed"] == seed}
        agents = [agent for agent in results.agents if agent in mine]
        for i in range(max((len(mine[agent]) for agent in agents), default=0)):
            having = [agent for agent in agents if i < len(mine[agent])]
            answers = [(agent, mine[agent][i]["answer"], mine[agent][i]["reward"] or 0.0) for agent in having]
            if not any(prompt == str(mine[having[0]][i]["prompt"]) for prompt, _, _ in groups):
                groups.append((str(mine[having[0]][i]["prompt"]), answers, seed))
    return groups


# ---------------------------------------------------------------------- pictures


def draw_frontier(results: Results) -> list[Picture]:
    """Reward against KL: the headline."""
    known = any(row["frontier"] for row in results.good)
    panels = [(task, metric) for task in results.tasks for metric in results.manifest["frontier"]
              if any(len(results.values(agent, metric, task)) for agent in results.agents)]  # fmt: skip
    if not panels:
        return []
    plt = pyplot()
    figure, axes = grid(plt, len(panels))
    far: dict[str, float] = {}
    for axis, (task, metric) in zip(axes, panels, strict=True):
        exact = any(row["frontier"] for row in results.good if row["task"] == task)
        points: dict[str, tuple[Interval, Interval]] = {}
        for agent in results.agents:
            x, y = frontier_points(results, agent, task, metric, exact)
            if len(x):
                points[agent] = (
                    (quartiles(x), quartiles(y)) if exact else (stats.mean_interval(x), stats.mean_interval(y))
                )
        middle = np.median([x.estimate for x, _ in points.values() if x.estimate > 1e-6] or [np.inf])
        here = {agent: point for agent, point in points.items() if point[0].estimate <= FAR * max(middle, 1e-9)}
        far |= {agent: point[0].estimate for agent, point in points.items() if agent not in here}
        if exact:
            line = shared_frontier(results, task)
            axis.plot(*line, color="#222222", lw=1.1, zorder=1, label="no policy lies above")
            axis.fill_between(line[0], line[1], 10, color="#222222", alpha=0.05, lw=0)
        for sweep in dict.fromkeys(agent.split(" beta=")[0] for agent in here):
            chain = [agent for agent in here if agent.split(" beta=")[0] == sweep]
            if len(chain) > 1:
                chain.sort(key=lambda agent: here[agent][0].estimate)
                axis.plot(*zip(*[(here[a][0].estimate, here[a][1].estimate) for a in chain], strict=True),
                          color=colour_of(results, chain[0]), lw=1, alpha=0.7)  # fmt: skip
        for agent, point in here.items():
            kl_bar, bar = map(error_bar, point)
            axis.errorbar(
                point[0].estimate, point[1].estimate, xerr=kl_bar, yerr=bar, fmt="o", ms=5, lw=0.9,
                color=colour_of(results, agent), label=agent.split(" beta=")[0],
            )  # fmt: skip
            if " beta=" in agent:
                where = point[0].estimate, point[1].estimate
                axis.annotate(agent.split(" beta=")[1], where, xytext=(4, 4), textcoords="offset points", fontsize=7)
        axis.set_title(
            f"{task}: {metric}" if len(results.tasks) > 1 or len(panels) > 1 else task, loc="left", fontweight="bold"
        )
        if exact:
            axis.set(xlabel="KL / KL of the optimum", ylabel="reward gained / reward the optimum gains")
            top = max([1.0, *(y.estimate for _, y in here.values())])
            bottom = min([0.0, *(y.estimate for _, y in here.values())])
            right = max([1.0, *(x.estimate for x, _ in here.values())])
            axis.set(xlim=(-0.04 * right, 1.12 * right), ylim=(bottom - 0.07, 1.15 * top))
        else:
            axis.set(xlabel="KL to the reference, nats per answer", ylabel=metric)
        axis.spines[["top", "right"]].set_visible(False)
    shared_legend(figure, axes)
    caption = (
        "Reward against what it costs in KL; up and left is better. "
        + ("Medians and quartiles over seeds, each task scaled so that its reference lies at (0, 0) and its optimum at (1, 1); "
           "the line is the median over tasks of the exact frontier (every run lies below its own task's). " if known else "Means with Student's 95% intervals over seeds. ")
        + "".join(f"{agent} lies outside, at {value:.3g}. " for agent, value in far.items())
        + ("The KL of BestOfN is a bound. " if any(best_of_n(results, agent) for agent in results.agents) else "")
        + f"Made by {results.made_by}."
    )  # fmt: skip
    return [Picture("frontier", "Reward against KL", caption, png(figure))]


def frontier_points(results: Results, agent: str, task: str, metric: str, exact: bool) -> tuple[FLOATS, FLOATS]:
    """KL and reward of each run, scaled by the optimum where it is known. Shapes: (n,), (n,)."""
    found = []
    for row in results.of(agent, task):
        m = row["metrics"]
        if m.get("kl") is None or m.get(metric) is None:
            continue
        if exact:  # all agents of a seed by one optimum, whatever their beta
            of = next(r["metrics"] for r in results.good if (r["task"], r["seed"]) == (task, row["seed"]))
            room = of["optimum_reward"] - of["reward_reference"]
            found.append((m["kl"] / of["optimum_kl"], (m["reward"] - of["reward_reference"]) / room))
        else:
            found.append((m["kl"], m[metric]))
    columns = np.asarray(found, np.float64).reshape(-1, 2).T
    return columns[0], columns[1]


def error_bar(interval: Interval) -> list[list[float]] | None:
    """What matplotlib takes; None without limits."""
    if not np.isfinite(interval.low):
        return None
    return [[max(0.0, interval.estimate - interval.low)], [max(0.0, interval.high - interval.estimate)]]


def shared_frontier(results: Results, task: str) -> tuple[FLOATS, FLOATS]:
    """Median over a task's seeds of the exact front, scaled as the points are. Shapes: (K,), (K,)."""
    x = np.linspace(0, 3, 121)
    curves = []
    for seed in sorted({row["seed"] for row in results.good if row["task"] == task and row["frontier"]}):
        row = next(r for r in results.good if r["task"] == task and r["seed"] == seed and r["frontier"])
        m, front = row["metrics"], row["frontier"]
        room = m["optimum_reward"] - m["reward_reference"]
        kl = np.asarray([0.0, *front["kl"]]) / m["optimum_kl"]
        reward = (np.asarray([m["reward_reference"], *front["reward"]]) - m["reward_reference"]) / room
        curves.append(np.interp(x, kl, reward))
    return x, np.median(curves, axis=0)


def quartiles(values: FLOATS) -> Interval:
    """Median between the quartiles."""
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    return Interval(middle, low, high)


def draw_curves(results: Results) -> list[Picture]:
    """How agents learn: against tokens and against seconds."""
    found = [name for row in results.good for name in row["curve"]]
    metrics = ["score"] if "score" in found else [name for name in ("reward", "kl") if name in found]
    pictures = []
    for x, title in (("tokens", "tokens"), ("seconds", "wall-clock")):
        panels = [(task, metric) for task in results.tasks for metric in metrics
                  if any(x in row["curve"] and metric in row["curve"] for row in results.good if row["task"] == task)]  # fmt: skip
        if not panels:
            continue
        plt = pyplot()
        figure, axes = grid(plt, len(panels))
        for axis, (task, metric) in zip(axes, panels, strict=True):
            ends = {}
            log = metric == "score"
            for agent in results.agents:
                curves = [
                    row["curve"] for row in results.of(agent, task) if x in row["curve"] and metric in row["curve"]
                ]
                if not curves:
                    continue
                where, band = curve_band(curves, x, metric, log)
                style: Any = "-" if results.manifest["agents"].get(agent, {}).get("follows_j", True) else (0, (4, 1.5))
                colour = colour_of(results, agent)
                low, middle, high = (height(v) if log else v for v in (band.low, band.estimate, band.high))
                axis.plot(where, middle, color=colour, lw=1.4, ls=style)
                axis.fill_between(where, low, high, color=colour, alpha=0.1, lw=0)
                ends[agent] = (float(where[-1]), float(middle[-1]))
            if log:
                axis.set_xscale("log")
                ticks = [0, 0.5, 0.9, 0.97, 0.99, 0.999]
                axis.set_yticks(height(np.asarray(ticks)), [f"{tick:g}" for tick in ticks])
                axis.set_ylim(height(np.asarray(-1.0)) - 0.02, height(np.asarray(1.0)) + 0.12)
            axis.set_title(f"{task}: {metric}" if len(metrics) > 1 else task, loc="left", fontweight="bold")
            axis.set(xlabel=f"{x}", ylabel="exact score (1: optimum)" if log else metric)
            axis.spines[["top", "right"]].set_visible(False)
            label_ends(axis, ends, {agent: colour_of(results, agent) for agent in ends}, log)
        caption = (
            f"Against {title}: interquartile mean over seeds, with its pointwise 95% interval. "
            + ("Evaluations are not counted. Agents without training have no curve" if x == "seconds" else "Agents without training have no curve")
            + (", but for BestOfN: tokens per answer, n growing" if "score" in metrics and x == "tokens" else "")
            + ". " + ("Dashed: tends to something else than the optimum. " if "score" in metrics else "")
            + f"Made by {results.made_by}."
        )  # fmt: skip
        pictures.append(Picture(f"curves-{x}", f"Learning, against {title}", caption, png(figure)))
    return pictures


def curve_band(curves: Sequence[Mapping[str, Any]], x: str, metric: str, log: bool) -> tuple[FLOATS, Interval]:
    """IQM over runs with its interval, at 40 places that all runs reach. Shapes: (K,), 3 x (K,)."""
    runs = []
    for curve in curves:
        pairs = [(a, b) for a, b in zip(curve[x], curve[metric], strict=True) if a is not None and b is not None]
        runs.append(np.asarray(pairs, np.float64).reshape(-1, 2))
    runs = [run for run in runs if len(run)]
    first, last = max(run[0, 0] for run in runs), min(run[-1, 0] for run in runs)
    last = max(first, last)
    where = np.geomspace(first, last, 40) if log and first > 0 else np.linspace(first, last, 40)
    values = np.stack([np.interp(where, run[:, 0], run[:, 1]) for run in runs])

    def over_runs(scores: FLOATS) -> FLOATS:
        return np.asarray(trim_mean(scores, 0.25, axis=-2))

    return where, stratified_bootstrap(over_runs, values, repetitions=1_000)


def draw_profile(results: Results) -> list[Picture]:
    """Share of runs above each score."""
    bounded = results.manifest.get("bounded")
    if not bounded or not any(len(results.table(agent, bounded)[0]) for agent in results.agents):
        return []
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(7.4, 4.4), constrained_layout=True)
    everything = np.concatenate([results.table(agent, bounded)[1].ravel() for agent in results.agents])
    log = bounded == "score"
    left = float(np.clip(everything.min(), -0.2, 1)) if log else float(everything.min())
    right = 1.0 if log else float(everything.max())
    margin = 0.03 * max(right - left, 1e-3)
    thresholds = (
        1 - np.geomspace(1 - left + 1e-9, 1e-3, 160) if log else np.linspace(left - margin, right + margin, 160)
    )
    ends = {}
    for agent in results.agents:
        _, scores = results.table(agent, bounded)
        if not len(scores):
            continue
        band = stratified_bootstrap(lambda s: stats.performance_profile(s, thresholds), scores, repetitions=1_000)
        x = height(thresholds) if log else thresholds
        axis.plot(x, band.estimate, color=colour_of(results, agent), lw=1.5, label=agent)
        axis.fill_between(x, band.low, band.high, color=colour_of(results, agent), alpha=0.08, lw=0)
        ends[agent] = 0
    if log:
        ticks = [0, 0.5, 0.9, 0.97, 0.99, 0.999]
        axis.set_xticks(height(np.asarray(ticks)), [f"{tick:g}" for tick in ticks])
    axis.set(xlabel=f"{bounded}, threshold", ylabel="share of runs above it", ylim=(-0.02, 1.04))
    axis.spines[["top", "right"]].set_visible(False)
    shared_legend(figure, [axis])
    caption = f"Performance profile: the share of runs (seeds x tasks) whose {bounded} is above each threshold, with its pointwise 95% interval. Made by {results.made_by}."
    return [Picture("profile", "Performance profile", caption, png(figure))]


LEAST_GAP = 1e-3
"""Scores nearer to 1 than this are drawn at it."""


def height(score: Any) -> FLOATS:
    """Where a score is drawn: -log10 of what is missing to 1, which makes 0.9, 0.99 and 0.999 equally far apart."""
    return -np.log10(np.clip(1 - np.asarray(score, np.float64), LEAST_GAP, 2.0))


def label_ends(axis: Any, ends: Mapping[str, tuple[float, float]], colours: Mapping[str, str], log: bool) -> None:
    """Names at the right of a panel, in the order of the curves' ends and clear of each other."""
    if not ends:
        return
    low, high = axis.get_ylim()
    left, right = axis.get_xlim()
    arrow = {"arrowstyle": "-", "lw": 0.5, "alpha": 0.6, "relpos": (0, 0.5), "shrinkA": 0, "shrinkB": 1}
    font: dict[str, Any] = {"fontsize": 7.5, "va": "center", "annotation_clip": False}
    early = right / 20 if log else left + (right - left) / 10
    for name in [name for name in ends if ends[name][0] < early]:  # it ends in the midst of the panel
        axis.annotate(name, ends[name], xytext=(4, 0), textcoords="offset points", color=colours[name], **font)
    order = sorted((name for name in ends if ends[name][0] >= early), key=lambda name: ends[name][1])
    places = np.asarray([ends[name][1] for name in order])
    step = (high - low) / 19
    for _ in range(500):  # neighbours that overlap push each other away
        overlap = np.clip(step - np.diff(places), 0, None) / 2
        places[:-1] -= overlap
        places[1:] += overlap
    for name, place in zip(order, places, strict=True):
        at = right * 1.1 if log else right + 0.03 * (right - left)
        axis.annotate(
            name, ends[name], xytext=(at, place), textcoords="data", color=colours[name], **font,
            arrowprops=arrow | {"color": colours[name]},
        )  # fmt: skip


def colour_of(results: Results, agent: str) -> str:
    """The agent's colour, the same in all pictures; a sweep's agents share one."""
    families = list(dict.fromkeys(name.split(" beta=")[0] for name in results.agents))
    return COLOURS[families.index(agent.split(" beta=")[0]) % len(COLOURS)]


def grid(plt: Any, count: int) -> tuple[Any, list[Any]]:
    """A figure with so many panels, two in a row."""
    columns = min(2, count)
    lines = -(-count // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(6.2 * columns, 4.4 * lines), constrained_layout=True, squeeze=False
    )
    for axis in axes.flat[count:]:
        axis.set_visible(False)
    return figure, list(axes.flat[:count])


def shared_legend(figure: Any, axes: Sequence[Any]) -> None:
    """One legend for all panels, below them."""
    entries: dict[str, Any] = {}
    for axis in axes:
        handles, labels = axis.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    figure.legend(
        list(entries.values()),
        list(entries),
        loc="outside lower center",
        ncols=min(5 if len(axes) > 1 else 4, len(entries)),
        frameon=False,
        fontsize=8,
    )


def pyplot() -> Any:
    """Matplotlib without a screen."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def png(figure: Any) -> bytes:
    """A figure as a PNG."""
    import io

    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=150)
    pyplot().close(figure)
    return data.getvalue()


# ---------------------------------------------------------------------- two results


@dataclass(frozen=True)
class Difference:
    """One metric of one agent, before and after."""

    agent: str
    metric: str
    before: float
    after: float
    difference: Interval
    verdict: str
    seeds: int
    headline: bool


@dataclass(frozen=True)
class Comparison:
    """What has changed, and where nothing could be compared."""

    differences: Sequence[Difference]
    alone: Sequence[str]
    """Agents of one side only."""
    confidence: float
    """Of the intervals."""


def compare_results(before: str, after: str, confidence: float = 0.95) -> Comparison:
    """Paired differences on equal seeds and tasks, agent by agent and metric by metric.

    Args:
        before: A directory of results; with `:AGENT` behind it, one agent of it.
        after: Another; differences are after - before.
        confidence: Of the intervals.

    Raises:
        ValueError: Nothing in common, or results of different tasks under the same names.
    """
    (old, old_agent), (new, new_agent) = map(parse_side, (before, after))
    if (old_agent is None) != (new_agent is None):
        raise ValueError("Expected two directories, or DIR:AGENT twice.")
    couples = [(str(old_agent), str(new_agent))] if old_agent else [(a, a) for a in new.agents if a in old.agents]
    tasks = [task for task in new.tasks if task in old.tasks]
    if not couples or not tasks:
        raise ValueError(
            f"Expected agents and tasks in common; {before} has {old.agents} on {old.tasks}, {after} {new.agents} on {new.tasks}."
        )
    found = []
    for a, b in couples:
        for row in new.of(b):
            other = next((r for r in old.of(a) if (r["task"], r["seed"]) == (row["task"], row["seed"])), row)
            seeds = [r["config"]["env_settings"].get("seed_of_task") for r in (other, row)]
            if seeds[0] != seeds[1]:
                raise ValueError(
                    f"{row['task']} of seed {row['seed']} is not the same task in both: seed_of_task {seeds[0]} and {seeds[1]}."
                )
        for metric in metrics_of(new, b):
            sides = old.table(a, metric, tasks), new.table(b, metric, tasks)
            common = sorted(set(sides[0][0]) & set(sides[1][0]))
            if not common or metric in OF_THE_TASK or metric.endswith(("_low", "_high")):
                continue
            x, y = (values[[seeds.index(seed) for seed in common]] for seeds, values in sides)
            difference = stats.paired_difference(y, x, confidence)
            sign = direction(metric, new.manifest["lower_is_better"])
            found.append(
                Difference(
                    agent=b if a == b else f"{b} against {a}",
                    metric=metric,
                    before=float(x.mean()),
                    after=float(y.mean()),
                    difference=difference,
                    verdict=stats.verdict(difference, sign) if sign else "",
                    seeds=len(common),
                    headline=metric == new.headline,
                )
            )
    if not found:
        raise ValueError(f"{before} and {after} have no finished run of the same agent, task and seed in common.")
    alone = [] if old_agent else sorted(set(old.agents) ^ set(new.agents))
    return Comparison(found, alone, confidence)


def metrics_of(results: Results, agent: str) -> list[str]:
    """Metrics that an agent's rows have, the headline first."""
    names = dict.fromkeys(name for row in results.of(agent) for name in row["metrics"])
    return sorted(names, key=lambda name: name != results.headline)


def parse_side(spec: str) -> tuple[Results, str | None]:
    """`DIR` or `DIR:AGENT`."""
    from textenv.prompts import did_you_mean

    if Path(spec).is_dir() or ":" not in spec:
        return read_results(Path(spec)), None
    where, _, agent = spec.partition(":")
    results = read_results(Path(where))
    if agent not in results.agents:
        raise ValueError(
            f"{where} has no agent {agent!r}; it has {', '.join(results.agents)}.{did_you_mean(agent, results.agents)}"
        )
    return results, agent


def print_comparison(comparison: Comparison, console: Any) -> bool:
    """Print it; returns whether the headline metric of any agent is worse."""
    from rich.markup import escape
    from rich.table import Table

    colours = {"better": "green", "worse": "red"}
    names = list(dict.fromkeys(d.agent for d in comparison.differences))
    for agent in names:
        table = Table(title=escape(agent), title_justify="left", box=None, padding=(0, 2, 0, 0))
        for i, name in enumerate(
            ("metric", "before", "after", "difference", f"{comparison.confidence:.0%} interval", "seeds", "verdict")
        ):
            table.add_column(name, justify="right" if 0 < i < 6 else "left", no_wrap=True)
        for d in (d for d in comparison.differences if d.agent == agent):
            style = colours.get(d.verdict)
            told = f"[{style}]{d.verdict}[/{style}]" if style else d.verdict
            limits = span(d.difference).replace(" to ", "..")
            table.add_row(
                ("[bold]" if d.headline else "") + escape(d.metric), number(d.before), number(d.after),
                f"{d.difference.estimate:+.3f}", limits, str(d.seeds), told,
            )  # fmt: skip
        console.print(table)
        console.print()
    if comparison.alone:
        console.print(f"On one side only: {', '.join(comparison.alone)}.", highlight=False)
    headline = [d for d in comparison.differences if d.headline]
    worse = [d.agent for d in headline if d.verdict == "worse"]
    counts = {word: sum(d.verdict == word for d in headline) for word in ("better", "worse", "undecided")}
    name = headline[0].metric if headline else "headline"
    console.print(
        f"{name} (headline): " + ", ".join(f"{n} {word}" for word, n in counts.items() if n) + ".", highlight=False
    )
    return bool(worse)


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.55 system-ui, sans-serif; color: #16324a; max-width: 72rem; margin: 0 auto; padding: 1rem; }}
h1 {{ font-size: 1.6rem; line-height: 1.25; margin: .5rem 0; }} h2 {{ margin: 2.2rem 0 .6rem; font-size: 1.25rem; }} h3 {{ margin: 0 0 .4rem; font-size: 1rem; }}
.lead {{ background: #eef4f7; padding: .9rem 1.1rem; border-radius: .5rem; }}
.note, figcaption {{ color: #51687a; font-size: .88rem; margin: .5rem 0 0; }} figure {{ margin: 0; }}
img {{ width: 100%; min-width: 34rem; height: auto; }} img.one {{ min-width: 0; max-width: 46rem; }}
.scroll {{ overflow-x: auto; }} table {{ border-collapse: collapse; font-size: .88rem; }}
th, td {{ padding: .35rem .7rem; text-align: right; border-bottom: 1px solid #dde5ea; white-space: nowrap; }} thead th {{ vertical-align: bottom; }}
th:first-child {{ text-align: left; }} tbody th {{ position: sticky; left: 0; background: #fff; font-weight: 600; }}
.samples {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr)); gap: .8rem; }}
article {{ border: 1px solid #dde5ea; border-radius: .5rem; padding: .7rem .9rem; }}
dl {{ margin: 0; font-size: .88rem; }} dt {{ font-weight: 600; margin-top: .3rem; }} dt span {{ color: #708090; font-weight: 400; }} dd {{ margin: 0; overflow-wrap: anywhere; }}
code {{ background: #f1f4f6; padding: .1rem .3rem; border-radius: .2rem; overflow-wrap: anywhere; }} pre {{ overflow-x: auto; font-size: .8rem; }}
</style></head><body>
<h1>{title}</h1>
<p class="lead">{lead}</p>
{first}
{tables}
{pictures}
{samples}
{failures}
</body></html>
"""
