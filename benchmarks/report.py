"""What a directory of rows says, as documents: `report.html` needs no other file, `report.md` its `pictures`."""

from __future__ import annotations

import base64
import html
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.pictures import Picture, draw_curves, draw_frontier, draw_profile
from benchmarks.records import write_text
from benchmarks.results import Results, read_results
from benchmarks.tables import Figures, safe, tables


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
    lines = [f"# {results.manifest['title']}", "", lead(results), ""]
    for picture in pictures[:1]:
        lines += markdown_picture(picture)
    for part in parts:
        lines.append(part.markdown(f"Made by {results.made_by}."))
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
