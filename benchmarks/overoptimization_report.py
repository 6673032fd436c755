"""Tables and picture of the experiment on over-optimisation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.overoptimization import (
    ENSEMBLES,
    NOISE,
    SIZES,
    Form,
    Plan,
    Proxy,
    fall,
    fit_quality,
    rl_form,
)


def reinforced(rows: Mapping[str, Mapping[str, Any]], proxy: Proxy) -> dict[str, Any]:
    """The runs of PPO against a proxy, together: curves of shape (S, E), fall and fit."""
    by_n = rows[proxy.name]
    found: list[Mapping[str, Any]] = []
    for seed in count():
        if (row := rows.get(f"ppo-{proxy.name}-{seed}")) is None:
            break
        found.append(row)
    points = min(len(row["curve"]) for row in found)
    curves = [aligned(row["curve"], points) for row in found]
    gold = np.asarray([[point["gold_by_prompt"] for point in curve] for curve in curves])
    kl, score = (np.asarray([[point[key] for point in curve] for curve in curves]) for key in ("kl", "proxy"))
    means = gold.mean(axis=2)
    before = means[:, 0].mean()
    return {
        "kl": kl,
        "gold": means,
        "promised": before + by_n["slope"] * (score - by_n["proxy_before"]),
        "fall": fall(gold),
        "fit": fit_quality(np.sqrt(np.maximum(kl, 0)).ravel(), (means - before).ravel(), rl_form),
    }


def aligned(curve: Sequence[Mapping[str, Any]], points: int) -> list[Mapping[str, Any]]:
    """So many points of a curve, evenly spaced in tokens as nearly as may be, the first and the last among them."""
    tokens = np.asarray([point["tokens"] for point in curve])
    return [curve[int(np.abs(tokens - at).argmin())] for at in np.linspace(0, tokens[-1], points)]


def tables(rows: Mapping[str, Mapping[str, Any]], plan: Plan) -> str:
    """All figures, in Markdown."""
    lines = [
        "| proxy | parameters | pairs | accuracy, 95% interval | gold, n = 1 | at its peak | at n | "
        f"gold, n = {plan.samples} | promised there | fall, 95% interval | a | b | R² | R² out of sample | error there |",
        "|" + "---|" * 15,
    ]
    for name in [*(proxy.name for proxy in plan.proxies), *(f"ensemble-{how}" for how in ENSEMBLES)]:
        row = rows[name]
        curve, fitted = row["curve"], row["fit"]
        best = max(curve, key=lambda point: point["gold"])
        learnt = "| | |"
        if "accuracy" in row:
            low, high = row["accuracy_interval"]
            learnt = f"{row['parameters']:,} | {row['pairs']:,} | {row['accuracy']:.1%} ({low:.1%} to {high:.1%}) |"
        lines.append(
            f"| {name} | {learnt} {curve[0]['gold']:.3f} | {best['gold']:.3f} | {best['n']:.0f} | {curve[-1]['gold']:.3f} | "
            f"{curve[-1]['promised']:.2f} | {interval(row['fall'])} | {coefficients(fitted)} |"
        )
    lines += [
        "",
        "| PPO against | gold before | at its peak | at KL | gold at the end | promised there | KL at the end | "
        "fall, 95% interval | by seed | a | b | R² | R² out of sample | error there |",
        "|" + "---|" * 14,
    ]
    for proxy in plan.reinforced:
        runs = reinforced(rows, proxy)
        gold, kl, promised = (np.mean(runs[key], axis=0) for key in ("gold", "kl", "promised"))
        best = int(gold.argmax())
        seeds = ", ".join(f"{value:+.3f}" for value in runs["fall"]["by_seed"])
        lines.append(
            f"| {proxy.name} | {gold[0]:.3f} | {gold[best]:.3f} | {kl[best]:.1f} | {gold[-1]:.3f} | {promised[-1]:.2f} | "
            f"{kl[-1]:.1f} | {interval(runs['fall'])} | {seeds} | {coefficients(runs['fit'])} |"
        )
    return "\n".join(lines) + "\n"


def interval(found: Mapping[str, Any]) -> str:
    """An estimate between its limits."""
    return f"{found['fall']:+.3f} ({found['low']:+.3f} to {found['high']:+.3f})"


def coefficients(fitted: Mapping[str, float]) -> str:
    """Five cells."""
    return (
        f"{fitted['a']:.3f} | {fitted['b']:.3f} | {fitted['r2']:.3f} | {fitted['r2_out_of_sample']:.2f} | "
        f"{fitted['error_out_of_sample']:.3f}"
    )


COLOURS = ("#9cc5d3", "#5fa3b8", "#1f6f8b", "#0b3a4a")
RED, GREEN, ORANGE = "#d1495b", "#3a7d44", "#e08e45"


def draw(rows: Mapping[str, Mapping[str, Any]], plan: Plan, path: Path) -> None:
    """Gold (solid) and what the proxy promises (dashed) against sqrt(KL)."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(13, 7.4), constrained_layout=True, sharey=True)
    for axis, size in zip(axes[0], SIZES, strict=True):
        for rankings, colour in zip(plan.rankings, COLOURS, strict=True):
            best_of_n_line(axis, rows[Proxy(size=size, rankings=rankings).name], colour, f"{rankings:,} rankings")
        parameters = rows[Proxy(size=size, rankings=plan.rankings[0]).name]["parameters"]
        axis.set_title(f"best-of-n, {size} proxy ({parameters:,} parameters)", fontsize=10.5)

    noise, ensemble, ppo = axes[1]
    named = plan.named
    for rankings, colour in zip(plan.rankings[1:], COLOURS[1:], strict=True):
        clean = Proxy(size=named.size, rankings=rankings)
        best_of_n_line(noise, rows[clean.name], colour, f"{rankings:,} rankings", promised=False)
        noisy = rows[replace(clean, noise=NOISE).name]
        best_of_n_line(noise, noisy, colour, f"... {NOISE:.0%} wrong", promised=False, style=(0, (1, 1)))
    noise.set_title(f"best-of-n, {named.size} proxy: labels", fontsize=10.5)
    for i, member in enumerate(plan.ensemble):
        best_of_n_line(ensemble, rows[member.name], "#b8b8b8", "" if i else "each member", promised=False)
    best_of_n_line(ensemble, rows["ensemble-mean"], GREEN, f"mean of {plan.members}")
    best_of_n_line(ensemble, rows["ensemble-worst"], ORANGE, f"worst of {plan.members}")
    ensemble.set_title(f"best-of-n, ensemble of {named.name}", fontsize=10.5)
    for proxy, colour in zip(plan.reinforced, (RED, COLOURS[-1]), strict=True):
        runs = reinforced(rows, proxy)
        for seed, (kl, gold, promised) in enumerate(zip(runs["kl"], runs["gold"], runs["promised"], strict=True)):
            d = np.sqrt(np.maximum(kl, 0))
            ppo.plot(d, gold, color=colour, lw=1, marker=".", ms=3.5, label="" if seed else proxy.name)
            ppo.plot(d, promised, color=colour, lw=0.8, ls=(0, (4, 2)))
        fitted = Form(runs["fit"]["a"], runs["fit"]["b"])
        x = np.linspace(0, np.sqrt(max(0.0, runs["kl"].max())), 100)  # estimates, which may be negative
        ppo.plot(x, runs["gold"][:, 0].mean() + fitted(x, rl_form), color=colour, lw=4, alpha=0.25)
    ppo.set_title(f"PPO without a KL penalty, {plan.seeds} seeds; thick: d (a - b log d)", fontsize=10.5)
    for axis in axes.flat:
        axis.axhline(rows[named.name]["curve"][0]["gold"], color="grey", lw=0.6, ls=":")
        axis.set(xlabel="sqrt(KL), nats" if axis is ppo else "sqrt(KL bound), nats", xlim=(0, None), ylim=(0, 1.3))
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8.5, loc="upper left")
    for axis in axes[:, 0]:
        axis.set_ylabel("gold score; dashed: promised by the proxy")
    scratch = path.with_name(f".{path.name}.part.png")
    figure.savefig(scratch, dpi=130)
    plt.close(figure)
    scratch.replace(path)


def best_of_n_line(
    axis: Any, row: Mapping[str, Any], colour: str, label: str, promised: bool = True, style: Any = "-"
) -> None:
    """Gold against sqrt(KL bound), a band of two standard errors over prompts, and what the proxy promises."""
    d, gold, error, promise = (
        np.asarray([point[key] for point in row["curve"]]) for key in ("kl_bound", "gold", "gold_error", "promised")
    )
    d = np.sqrt(d)
    axis.plot(d, gold, color=colour, lw=1.8, ls=style, label=label)
    axis.fill_between(d, gold - 2 * error, gold + 2 * error, color=colour, alpha=0.1, lw=0)
    if promised:
        axis.plot(d, promise, color=colour, lw=1, ls=(0, (4, 2)))
