"""Bar charts of a result: one PNG per operator and device, time ÷ floor of every contender in every case."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import matplotlib

from .report import by_case, case_name

COLOURS = {"ours": "#d1495b", "peer": "#30638e", "yardstick": "#b8b8b8"}
LONGEST = 12.0
"""Bars end here, with the figure beside them: one slow contender must not make the others invisible."""


def draw(rows: Iterable[dict], folder: Path) -> list[str]:
    """Write the charts into ``folder`` (made if missing) and return their file names."""
    folder.mkdir(parents=True, exist_ok=True)
    groups: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        groups.setdefault((row["operator"], row["device"]), []).append(row)
    names = []
    for (operator, device), members in groups.items():
        names.append(f"{operator}-{device}.png")
        _draw(operator, members, folder / names[-1])
    return names


def _draw(operator: str, rows: list[dict], path: Path) -> None:
    with matplotlib.rc_context({"font.size": 8}):
        from matplotlib.figure import Figure  # no pyplot: no window system, no global state

        cases = by_case(rows)
        columns = min(3, len(cases))
        lines = -(-len(cases) // columns)
        tallest = max(map(len, cases.values()))
        figure = Figure(figsize=(4.6 * columns, lines * (0.6 + 0.2 * tallest)), layout="constrained")
        for position, members in enumerate(cases.values()):
            axes = figure.add_subplot(lines, columns, position + 1)
            members = sorted(members, key=lambda row: row["time_over_floor"], reverse=True)
            values = [row["time_over_floor"] for row in members]
            axes.barh(
                [row["contender"] for row in members],
                [min(v, LONGEST) for v in values],
                color=[COLOURS[row["kind"]] for row in members],
            )
            for index, value in enumerate(values):
                axes.text(min(value, LONGEST), index, f" {value:.1f}", va="center")
            axes.axvline(1, color="black", linewidth=0.8, linestyle=":")
            axes.set_xlim(0, 1.15 * min(max(values), LONGEST))
            axes.set_title(case_name(members[0]).removeprefix(operator).strip())
            axes.spines[["top", "right"]].set_visible(False)
        figure.suptitle(
            f"{operator}: time ÷ floor, from what was measured of memory and matrix products (shorter is better)"
        )
        figure.savefig(path, dpi=110)
