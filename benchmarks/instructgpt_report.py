"""The demo's report: one HTML file with its pictures inside, for phones and wide screens; and runs side by side in Markdown.

Run: python -m benchmarks.instructgpt_report runs/demo runs/demo-1 runs/demo-2
"""

from __future__ import annotations

import base64
import html
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.pictures import png, pyplot
from benchmarks.tables import Figures

COLOURS = {"base": "#9aa5b1", "few_shot": "#c9a227", "sft": "#4f6d7a", "ppo": "#1f6f8b", "ppo_ptx": "#d1495b"}
NAMES = {
    "base": "base",
    "few_shot": "base, few-shot",
    "sft": "SFT",
    "ppo": "PPO",
    "ppo_ptx": "PPO-ptx",
    "ceiling": "ideal answers",
}
COLUMNS: list[tuple[str, str, str]] = [
    ("gold", "gold score", ".3f"),
    ("reward_model", "reward model", ".2f"),
    ("helpful", "helpful", ".0%"),
    ("truthful", "truthful", ".0%"),
    ("harmless", "harmless", ".0%"),
    ("false_facts", "false facts", ".0%"),
    ("rude", "rude", ".1%"),
    ("constraints_met", "constraints met", ".0%"),
    ("asks_when_unclear", "asks when unclear", ".0%"),
    ("refuses_harm", "refuses harm", ".0%"),
    ("over_refusal", "over-refusal", ".1%"),
    ("words", "words", ".1f"),
    ("kl", "KL, nats", "z.1f"),
    ("neutral_loss", "neutral loss", ".3f"),
    ("gold_unseen_wording", "gold, unseen wording", ".3f"),
    ("held_out_labelers_win_rate", "labelers prefer it to SFT", ".0%"),
]


REWARD_COLUMNS: list[tuple[str, str, str]] = [
    ("accuracy_held_out_labelers", "agreement with held-out labelers", ".1%"),
    ("accuracy_noiseless_labeler", "a labeler without noise", ".1%"),
    ("share_of_noiseless", "share of that", ".1%"),
    ("share_among_fine_tuned", "share among the fine-tuned model's answers", ".1%"),
    ("accuracy_length_alone", "length alone", ".1%"),
    ("labelers_agree", "labelers with each other", ".1%"),
    ("calibration_error", "calibration error", ".3f"),
]
POLICIES = ("base", "few_shot", "sft", "ppo", "ppo_ptx")


def write_report(summary: dict[str, Any], out: Path) -> None:
    """Write `report.html`, and its first picture as `wins.png`, from a run's figures and histories."""
    judged = summary["stages"]["judged"]
    rows = judged["rows"]
    best = rows["ppo_ptx"]
    low, high = best["net_win_interval"]
    seconds = sum(stage["seconds"] for stage in summary["stages"].values())
    histories = {name: json.loads((out / f"{name}.json").read_text()) for name in ("ppo", "ppo_ptx")}
    lead = (
        f"On {judged['prompts']} requests that no stage had seen, PPO-ptx beat the fine-tuned model {best['wins']} times, "
        f"tied {best['ties']} times and lost {best['losses']} times (net {best['net_win_rate']:+.1%} of requests, 95% interval "
        f"{low:+.1%} to {high:+.1%}), at a KL of {best['kl']:.1f} nats per answer. Its gold score is {best['gold']:.3f}; the fine-tuned "
        f"model's is {rows['sft']['gold']:.3f}, that of ideal answers {rows['ceiling']['gold']:.3f}. The whole recipe took "
        f"{seconds / 60:.1f} minutes."
    )
    page = PAGE.format(
        lead=html.escape(lead),
        wins=picture(draw_wins(rows)),
        scores=picture(draw_scores(rows)),
        reward=picture(draw_curve(histories, "rollout/task_reward", "reward model's score")),
        kl=picture(draw_curve(histories, "rollout/kl", "KL to SFT, nats per answer")),
        table=table(rows),
        stages=stages(summary["stages"]),
        samples="".join(sample(s) for s in judged["samples"][:16]),
        settings=html.escape(json.dumps(summary["settings"], default=str)),
        command=html.escape(f"textenv demo --seed {summary['settings']['seed']} --size {summary['settings']['size']}"),
    )
    (out / "report.html").write_text(page, encoding="utf-8")
    draw_wins(rows).savefig(out / "wins.png", dpi=160)


def table(rows: dict[str, Any]) -> str:
    """One row per policy."""
    head = "<th>policy</th><th>wins / ties / losses against SFT</th>" + "".join(
        f"<th>{title}</th>" for _, title, _ in COLUMNS
    )
    body = ""
    for name, label in NAMES.items():
        row = rows[name]
        versus = (
            "-" if name == "sft" else f"{row['wins']}&thinsp;/&thinsp;{row['ties']}&thinsp;/&thinsp;{row['losses']}"
        )
        cells = "".join(f"<td>{shown(row.get(key), form) or '-'}</td>" for key, _, form in COLUMNS)
        body += f"<tr class='{name}'><th>{label}</th><td>{versus}</td>{cells}</tr>"
    return f"<div class='scroll'><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def side_by_side(summaries: Sequence[dict[str, Any]]) -> list[Figures]:
    """Runs of several seeds: against the fine-tuned model, what the gold standard says, the reward model, time."""
    versus, judged, reward, time = [], [], [], []
    for summary in summaries:
        seed, done = str(summary["settings"]["seed"]), summary["stages"]
        for name in POLICIES:
            row = done["judged"]["rows"][name]
            low, high = row["net_win_interval"]
            net = f"{row['net_win_rate']:+z.1%} ({low:+.1%} to {high:+.1%})"
            against = ["", ""] if name == "sft" else [f"{row['wins']} / {row['ties']} / {row['losses']}", net]
            versus.append([seed, NAMES[name], *against])
            judged.append([seed, NAMES[name], *(shown(row.get(key), form) for key, _, form in COLUMNS)])
        reward.append([seed, *(shown(done["reward"][key], form) for key, _, form in REWARD_COLUMNS)])
        seconds = [stage["seconds"] for stage in done.values()]
        time.append([seed, *(f"{s:.0f}" for s in seconds), f"{sum(seconds) / 60:.1f}"])
    return [
        Figures(
            "Against the fine-tuned model", ["seed", "policy", "wins / ties / losses", "net, 95% interval"], versus
        ),
        Figures("What the gold standard says", ["seed", "policy", *(title for _, title, _ in COLUMNS)], judged),
        Figures("The reward model", ["seed", *(title for _, title, _ in REWARD_COLUMNS)], reward),
        Figures("Time, seconds per stage", ["seed", *summaries[0]["stages"], "minutes in all"], time),
    ]


def shown(value: float | None, form: str) -> str:
    """A figure, or nothing where there is none."""
    return format(value, form) if value is not None and value == value else ""


def stages(done: dict[str, Any]) -> str:
    """What each stage took and said."""
    body = ""
    for name, figures in done.items():
        said = ", ".join(
            f"{key.replace('_', ' ')} {format(value, '.1%' if key.startswith(('accuracy', 'share', 'labelers')) else ',.3g')}"
            if isinstance(value, float)
            else f"{key.replace('_', ' ')} {value:,}"
            for key, value in figures.items()
            if isinstance(value, int | float) and key != "seconds"
        )
        body += f"<tr><th>{name}</th><td>{figures['seconds']:.0f} s</td><td class='text'>{html.escape(said)}</td></tr>"
    return f"<div class='scroll stages'><table><thead><tr><th>stage</th><th>time</th><th>figures</th></tr></thead><tbody>{body}</tbody></table></div>"


def sample(item: dict[str, Any]) -> str:
    """One request and everybody's answer, with its gold score."""
    answers = "".join(
        f"<dt style='color:{COLOURS[name]}'>{NAMES[name]} <span>{item['gold'][name]:.2f}</span></dt>"
        f"<dd>{html.escape(item[name]).replace('&lt;turn&gt;', '<br>') or '<i>nothing</i>'}</dd>"
        for name in POLICIES
    )
    return f"<article><h3>{html.escape(item['prompt'])}</h3><dl>{answers}</dl></article>"


def draw_wins(rows: dict[str, Any]) -> Any:
    """Wins, ties and losses against SFT."""
    plt = pyplot()
    names = ["base", "few_shot", "ppo", "ppo_ptx"]
    figure, axis = plt.subplots(figsize=(6, 2.6), constrained_layout=True)
    total = [rows[n]["wins"] + rows[n]["ties"] + rows[n]["losses"] for n in names]
    left = [0.0] * len(names)
    for key, colour in (("wins", "#2a9d8f"), ("ties", "#d9dee3"), ("losses", "#e07a5f")):
        share = [rows[n][key] / t for n, t in zip(names, total, strict=True)]
        axis.barh([NAMES[n] for n in names], share, left=left, color=colour, label=key)
        for i, (start, width) in enumerate(zip(left, share, strict=True)):
            if width > 0.06:
                axis.text(start + width / 2, i, f"{width:.0%}", ha="center", va="center", fontsize=9)
        left = [a + b for a, b in zip(left, share, strict=True)]
    axis.set(xlim=(0, 1), xticks=[], title="against SFT, judged by the gold standard")
    axis.legend(ncols=3, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.02))
    axis.spines[:].set_visible(False)
    return figure


def draw_scores(rows: dict[str, Any]) -> Any:
    """The four criteria, by policy."""
    plt = pyplot()
    criteria = ("helpful", "truthful", "harmless", "concise")
    figure, axis = plt.subplots(figsize=(6, 2.9), constrained_layout=True)
    for k, name in enumerate(COLOURS):
        places = [i + (k - 2) * 0.16 for i in range(len(criteria))]
        axis.bar(places, [rows[name][c] for c in criteria], width=0.15, color=COLOURS[name], label=NAMES[name])
    axis.set(xticks=range(len(criteria)), xticklabels=criteria, ylim=(0, 1.02), title="what the gold standard says")
    axis.legend(ncols=5, frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.12), columnspacing=1)
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def draw_curve(histories: dict[str, list[dict[str, float]]], key: str, title: str) -> Any:
    """A figure of training against tokens."""
    figure, axis = pyplot().subplots(figsize=(6, 2.9), constrained_layout=True)
    for name, history in histories.items():
        tokens = [row["time/timesteps"] / 1000 for row in history]
        axis.plot(tokens, [row[key] for row in history], color=COLOURS[name], label=NAMES[name])
    axis.set(title=title, xlabel="thousand tokens")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    return figure


def picture(figure: Any) -> str:
    """A figure as an <img> that needs no file."""
    return f"<img alt='' src='data:image/png;base64,{base64.b64encode(png(figure)).decode()}'>"


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>InstructGPT in miniature</title>
<style>
body {{ font: 16px/1.55 system-ui, sans-serif; color: #16324a; max-width: 68rem; margin: 0 auto; padding: 1rem; }}
h1 {{ font-size: 1.7rem; margin: .5rem 0; }} h2 {{ margin: 2.2rem 0 .6rem; font-size: 1.25rem; }} h3 {{ margin: 0 0 .4rem; font-size: 1rem; }}
.lead {{ font-size: 1.08rem; background: #eef4f7; padding: .9rem 1.1rem; border-radius: .5rem; }}
.pictures {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1rem; }}
img {{ width: 100%; height: auto; }}
.scroll {{ overflow-x: auto; }} table {{ border-collapse: collapse; font-size: .86rem; }}
th, td {{ padding: .35rem .6rem; text-align: right; border-bottom: 1px solid #dde5ea; }} th:first-child, td.text {{ text-align: left; white-space: nowrap; }}
td {{ white-space: nowrap; }} td.text {{ white-space: normal; min-width: 16rem; }} .stages th:last-child {{ text-align: left; }} thead th {{ vertical-align: bottom; font-weight: 600; }} tr.ppo_ptx {{ background: #fdf3ee; }} tr.ceiling {{ color: #708090; font-style: italic; }}
tbody th:first-child {{ position: sticky; left: 0; background: #fff; }} tr.ppo_ptx th:first-child {{ background: #fdf3ee; }}
.samples {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: .8rem; }}
article {{ border: 1px solid #dde5ea; border-radius: .5rem; padding: .7rem .9rem; }}
dl {{ margin: 0; font-size: .88rem; }} dt {{ font-weight: 600; margin-top: .3rem; }} dt span {{ color: #708090; font-weight: 400; }} dd {{ margin: 0; overflow-wrap: anywhere; }}
code {{ background: #f1f4f6; padding: .1rem .3rem; border-radius: .2rem; overflow-wrap: anywhere; }} footer {{ margin: 2rem 0; color: #708090; font-size: .85rem; }}
</style></head><body>
<h1>InstructGPT in miniature</h1>
<p class="lead">{lead}</p>
<div class="pictures"><div>{wins}</div><div>{scores}</div></div>
<h2>Every figure</h2>
{table}
<p>Gold score, in [0, 1]: a program that checks instruction, constraints, truth, harm and length; no stage of training has seen it.
False facts: share of answers with a false one, among those that state any. Asks when unclear, refuses harm: on the requests that
call for it. Over-refusal: on those that do not. Neutral loss: nats per token on text without lies or rudeness (the alignment
tax). Ideal answers: the ceiling.</p>
<h2>Learning</h2>
<div class="pictures"><div>{reward}</div><div>{kl}</div></div>
<h2>Stage by stage</h2>
{stages}
<h2>The same requests, every policy</h2>
<p>With the gold score of each answer.</p>
<div class="samples">{samples}</div>
<footer>Made by <code>{command}</code>. Settings: <code>{settings}</code></footer>
</body></html>
"""

if __name__ == "__main__":
    if not sys.argv[1:]:
        sys.exit("usage: python -m benchmarks.instructgpt_report RUN [RUN ...]   (directories of textenv demo)")
    for figures in side_by_side([json.loads((Path(run) / "summary.json").read_text()) for run in sys.argv[1:]]):
        print(figures.markdown())
