"""The figures as a table, as JSON, and as bars."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import matplotlib

from ..environment import describe
from .flops import peak_rate
from .measure import Result
from .presets import GOAL_MS, GOALS

SHARE_COLOURS = matplotlib.colormaps["tab10"].colors


def record(preset: str, activation: str, batch: int, device: str, results: list[Result]) -> dict:
    """All figures of one comparison, with where they were measured."""
    environment = describe()
    rate = peak_rate((environment["gpu"] or {}).get("name")) if device == "cuda" else None
    rows = []
    for result in results:
        row = asdict(result)
        if result.seconds:
            row |= {"median": result.median, "images_per_second": batch / result.median}
            row["flops_per_second"] = result.flops / result.median if result.flops else None
            row["mfu"] = row["flops_per_second"] / rate if rate and result.flops else None
        rows.append(row)
    told = {"preset": preset, "activation": activation, "batch": batch, "device": device}
    return told | {"environment": environment, "forms": rows, "goals": goals(preset, activation, rows)}


def goals(preset: str, activation: str, rows: list[dict]) -> list[dict]:
    """The best fused step against each form that has a goal: ratio, wanted, reached."""
    medians = {row["form"]: row["median"] for row in rows if row.get("median")}
    fused = [medians[name] for name in medians if name.startswith("fused")]
    found = []
    for form, wanted in GOALS.get(preset, {}).get(activation, {}).items():
        if fused and form in medians:
            ratio = medians[form] / min(fused)
            found.append({"against": form, "ratio": ratio, "wanted": wanted, "reached": ratio >= wanted})
    if "fused" in medians and "fused, compiled" in medians:
        ratio = medians["fused"] / medians["fused, compiled"]
        found.append({"against": "fused, by compiling it", "ratio": ratio, "wanted": 0.97, "reached": ratio >= 0.97})
    return found


def lines(told: dict) -> list[str]:
    """The table for a terminal."""
    gpu = (told["environment"]["gpu"] or {}).get("name")
    place = gpu if told["device"] == "cuda" else told["environment"]["processor"]["name"]
    out = [f"{told['preset']}, {told['activation']}, batch {told['batch']}, bf16, {place}"]
    out.append(
        f"{'form':<16} {'img/s':>8} {'ms/step':>9} {'memory':>10} {'MFU':>6} {'GFLOP/s':>9} {'error':>8}  most of it"
    )
    for row in told["forms"]:
        if not row.get("median"):
            out.append(f"{row['form']:<16} left out: {row['reason']}")
            continue
        top = sorted(row["shares"].items(), key=lambda item: -item[1])[:3]
        mfu = "n/a" if row["mfu"] is None else f"{100 * row['mfu']:.1f}%"
        rate = "n/a" if row["flops_per_second"] is None else f"{row['flops_per_second'] / 1e9:.0f}"
        out.append(
            f"{row['form']:<16} {row['images_per_second']:>8.1f} {1e3 * row['median']:>9.1f}"
            f" {row['memory'] / 2**20:>6.0f} MiB {mfu:>6} {rate:>9} {row['error']:>8.1e}"
            f"  {', '.join(f'{name} {100 * share:.0f} %' for name, share in top)}"
        )
    for goal in told["goals"]:
        verdict = "reached" if goal["reached"] else "not reached"
        out.append(f"{goal['ratio']:.2f} × as fast as {goal['against']} (goal {goal['wanted']}): {verdict}")
    chip, wanted = GOAL_MS.get(told["preset"], {}).get(told["activation"], ("", 0.0))
    fused = [row["median"] for row in told["forms"] if row["form"].startswith("fused") and row.get("median")]
    if gpu and chip in gpu and fused:
        out.append(f"{1e3 * min(fused):.1f} ms per step (goal {wanted} on {chip})")
    return out


def draw(told: dict, path: Path) -> None:
    """Bars of ms per step, cut into the shares of the operators."""
    from matplotlib.figure import Figure  # no pyplot: no window system, no global state

    rows = [row for row in told["forms"] if row.get("median")]
    groups = list(dict.fromkeys(name for row in rows for name in row["shares"]))
    colours = dict(zip(groups, SHARE_COLOURS))
    with matplotlib.rc_context({"font.size": 9}):
        figure = Figure(figsize=(9, 0.55 * len(rows) + 1.6), layout="constrained")
        axes = figure.add_subplot()
        for position, row in enumerate(reversed(rows)):
            left = 0.0
            for name in groups:
                width = 1e3 * row["median"] * row["shares"].get(name, 0.0)
                axes.barh(position, width, left=left, color=colours[name])
                left += width
            axes.text(
                left, position, f" {1e3 * row['median']:.0f} ms, {row['images_per_second']:.1f} img/s", va="center"
            )
        axes.set_yticks(range(len(rows)), [row["form"] for row in reversed(rows)])
        axes.set_xlim(0, 1.25e3 * max(row["median"] for row in rows))
        axes.set_xlabel("ms per training step (shorter is better)")
        axes.spines[["top", "right"]].set_visible(False)
        handles = [matplotlib.patches.Patch(color=colours[name], label=name) for name in groups]
        figure.legend(handles=handles, loc="outside lower center", ncols=5, fontsize=8, frameon=False)
        axes.set_title(lines(told)[0])
        figure.savefig(path, dpi=120)
