"""Tables, charts, comparisons of results: ``python -m bench.report RESULT.json [--out DIR]``, or ``--compare A B``.

A result file is what ``pytest bench --benchmark-json=RESULT.json`` writes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


class ResultError(ValueError):
    """A file is not a result of ``pytest bench``; the message names it and says what is wrong."""


def load(path: str | Path) -> dict:
    """A result file, checked. Raises ResultError."""
    try:
        result = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ResultError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ResultError(f"{path}: is not JSON: {error}") from None
    if not isinstance(result, dict) or not isinstance(result.get("benchmarks"), list):
        raise ResultError(
            f"{path}: has no list of benchmarks; wanted is what pytest bench --benchmark-json=FILE writes"
        )
    if not any("contender" in entry.get("extra_info", {}) for entry in result["benchmarks"]):
        raise ResultError(f"{path}: holds no contender of ours; it comes from another benchmark")
    return result


def rows_of(result: dict) -> list[dict]:
    """One row per contender and case."""
    return [e["extra_info"] | {"case": e["group"]} for e in result["benchmarks"] if "contender" in e["extra_info"]]


def by_case(rows: Iterable[dict]) -> dict[str, list[dict]]:
    """Rows grouped by case, in the order measured."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(case_name(row), []).append(row)
    return groups


def case_name(row: dict) -> str:
    """What is compared, for people."""
    layout = row["layout"] + (f", {row['registers']} registers" if row["registers"] else "")
    shape = "×".join(map(str, row["shape"]))
    device = "" if row["device"] == "cpu" else f" {row['device']}"
    variant = f" {row['variant']}" if row.get("variant") else ""
    return f"{row['operator']}{variant} {shape} {row['dtype']} {layout} {row['pass']}{device}"


def _ours(rows: Iterable[dict]) -> dict | None:
    return next((row for row in rows if row["kind"] == "ours"), None)


def seconds(value: float | None) -> str:
    """A duration with three digits."""
    if value is None:
        return "–"
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= scale or unit == "µs":
            digits = max(0, 2 - len(str(int(value / scale))) + 1)
            return f"{value / scale:.{digits}f} {unit}"
    raise AssertionError("unreachable")


def summary_cells(rows: Iterable[dict]) -> list[list[str]]:
    """Per case: ours, the best peer, their ratio, both errors, time ÷ floor, noise. The first row holds the titles."""
    cells = [["case", "ours", "best peer", "", "ratio", "error", "peer's", "÷ floor", "noise"]]
    for name, group in by_case(rows).items():
        ours = _ours(group)
        if ours is None:
            continue
        peer = next((row for row in group if row["contender"] == ours["best_peer"]), None)
        cells.append(
            [
                name,
                seconds(ours["median"]),
                seconds(peer["median"]) if peer else "–",
                peer["contender"] if peer else "none",
                f"{ours['ratio_to_best_peer']:.2f}×" if peer else "–",
                f"{ours['error']:.0e}",
                f"{peer['error']:.0e}" if peer else "–",
                f"{ours['time_over_floor']:.2f}",
                "–" if ours["noise"] is None else f"{100 * ours['noise']:.1f} %",
            ]
        )
    return cells


def summary_table(rows: Iterable[dict]) -> list[str]:
    """The summary as aligned lines for a terminal."""
    cells = summary_cells(rows)
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    text = (0, 3)
    return [
        "  ".join(c.ljust(w) if i in text else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))).rstrip()
        for row in cells
    ]


def markdown_table(cells: list[list[str]]) -> str:
    """Cells as a Markdown table; a bar in a cell is escaped."""
    lines = ["| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for row in cells]
    return "\n".join([lines[0], "|" + " --- |" * len(cells[0]), *lines[1:]])


def contender_cells(rows: Iterable[dict]) -> list[list[str]]:
    """Every contender of every case, fastest first."""
    cells = [["case", "contender", "median", "× ours", "÷ floor", "GB/s", "error", "kind"]]
    for name, group in by_case(rows).items():
        ours = _ours(group)
        for row in sorted(group, key=lambda row: row["median"]):
            cells.append(
                [
                    name,
                    row["contender"],
                    seconds(row["median"]),
                    f"{row['median'] / ours['median']:.2f}" if ours else "–",
                    f"{row['time_over_floor']:.2f}",
                    f"{row['bytes'] / row['median'] / 1e9:.1f}",
                    f"{row['error']:.1e}",
                    row["kind"],
                ]
            )
    return cells


def environment_line(result: dict) -> str:
    """Where it was measured, in one line."""
    e = result.get("machine_info", {})
    processor, commit = e.get("processor", {}), result.get("commit_info", {})
    name = processor.get("name", "unknown processor") if isinstance(processor, dict) else str(processor)
    gpu = f", {e['gpu']['name']}" if e.get("gpu") else ""
    changed = " with local changes" if commit.get("dirty") else ""
    cache = e.get("last_level_cache_bytes")
    told = (
        f"{cache / 2**20:.0f} MiB last-level cache ({e.get('last_level_cache_source')})" if cache else "cache unknown"
    )
    return (
        f"{name}{gpu}; {e.get('threads', '?')} of {e.get('cores', '?')} cores; {told}; torch {e.get('torch', '?')}, "
        f"triton {e.get('triton', '?')}; {e.get('os', '?')}; commit {(commit.get('id') or 'unknown')[:12]}{changed}; "
        f"load {e.get('load', '?')}"
    )


def markdown(result: dict, charts: Iterable[str] = ()) -> str:
    """The whole report."""
    rows = rows_of(result)
    parts = ["# Benchmark", environment_line(result)]
    parts += ["## Ours against the best peer", markdown_table(summary_cells(rows))]
    parts += [f"![{name}]({name})" for name in charts]
    parts += ["## Every contender", markdown_table(contender_cells(rows))]
    if result.get("not_timed"):
        cells = [[r["case"], r["contender"], r["status"], r["reason"]] for r in result["not_timed"]]
        parts += ["## Not timed", markdown_table([["case", "contender", "status", "reason"], *cells])]
    if absent := [p for p in result.get("peers", []) if p["reason"]]:
        parts += ["## Libraries that could not take part", "\n".join(f"- {p['name']}: {p['reason']}" for p in absent)]
    return "\n\n".join(parts) + "\n"


@dataclass(frozen=True)
class Change:
    """Ours in one case, before and after: ``change`` > 0 is slower; ``noise`` is what the runs cannot tell apart."""

    case: str
    before: float
    after: float
    change: float
    floor_change: float
    noise: float

    @property
    def verdict(self) -> str:
        """Slower or faster only when the time and the time ÷ floor both say so: a slower machine is no news."""
        if min(self.change, self.floor_change) > self.noise:
            return "slower"
        if max(self.change, self.floor_change) < -self.noise:
            return "faster"
        return "same"


LEAST_NOISE = 0.02
"""No two runs are trusted to tell less than this apart, however well their A/A turns agree."""


def typical_noise(rows: Iterable[dict]) -> float:
    """The A/A noise that nine of ten cases stay below; a single case's own figure may be small by luck."""
    found = sorted(row["noise"] for row in rows if row["kind"] == "ours" and row["noise"] is not None)
    if not found:
        return LEAST_NOISE
    return found[min(len(found) - 1, int(0.9 * len(found)))] if len(found) > 1 else found[0]


def compare(before: dict, after: dict) -> tuple[list[Change], list[str]]:
    """Changes of ours case by case, and remarks: cases that only one has, environments that differ."""
    groups = [by_case(rows_of(result)) for result in (before, after)]
    ours = [{case: _ours(rows) for case, rows in g.items() if _ours(rows)} for g in groups]
    typical = max(typical_noise(rows_of(before)), typical_noise(rows_of(after)))
    changes = []
    for case in ours[0]:
        if case not in ours[1]:
            continue
        a, b = ours[0][case], ours[1][case]
        noise = max(LEAST_NOISE, typical, *(row["noise"] or 0.0 for row in (a, b)))
        relative = b["time_over_floor"] / a["time_over_floor"] - 1
        changes.append(Change(case, a["median"], b["median"], b["median"] / a["median"] - 1, relative, noise))
    remarks = [f"only before: {case}" for case in ours[0] if case not in ours[1]]
    remarks += [f"only after: {case}" for case in ours[1] if case not in ours[0]]
    machines = [result.get("machine_info", {}) for result in (before, after)]
    for key in ("processor", "cores", "threads", "torch", "triton", "gpu"):
        if machines[0].get(key) != machines[1].get(key):
            remarks.append(f"{key} differs: {machines[0].get(key)} before, {machines[1].get(key)} after")
    return changes, remarks


def comparison(changes: list[Change], remarks: list[str]) -> str:
    """The comparison as Markdown, with a last line that counts."""
    percent = "{:+.1f} %".format
    cells = [["case", "before", "after", "time", "time ÷ floor", "noise", ""]]
    cells += [
        [c.case, seconds(c.before), seconds(c.after), percent(100 * c.change), percent(100 * c.floor_change)]
        + [f"{100 * c.noise:.1f} %", c.verdict]
        for c in changes
    ]
    counts = {v: sum(c.verdict == v for c in changes) for v in ("slower", "same", "faster")}
    middle = f"; median change {percent(100 * statistics.median(c.change for c in changes))}" if changes else ""
    last = ", ".join(f"{n} {v}" for v, n in counts.items()) + middle
    return "\n\n".join([markdown_table(cells), *remarks, last])


def main(arguments: list[str] | None = None) -> int:
    """0 when all is well, 1 on a regression beyond the noise, 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("result", nargs="?", help="a JSON file of pytest bench --benchmark-json=FILE")
    parser.add_argument("--out", type=Path, help="write report.md and charts (PNG) into this folder")
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"), help="is B slower than A by more than the noise?")
    options = parser.parse_args(arguments)
    if bool(options.result) == bool(options.compare):
        parser.error("wanted is either one RESULT.json or --compare A B")
    try:
        if options.compare:
            changes, remarks = compare(*map(load, options.compare))
            print(comparison(changes, remarks))
            if not changes:
                raise ResultError("the two results have no case in common")
            return int(any(c.verdict == "slower" for c in changes))
        result = load(options.result)
    except ResultError as error:
        print(f"bench.report: {error}", file=sys.stderr)
        return 2
    charts: list[str] = []
    if options.out:
        from .charts import draw  # matplotlib only where pictures are wanted

        try:
            charts = draw(rows_of(result), options.out)
            (options.out / "report.md").write_text(markdown(result, charts), encoding="utf-8")
        except OSError as error:
            print(f"bench.report: --out: {error}", file=sys.stderr)
            return 2
        print(f"report.md and {len(charts)} charts written")
    else:
        print(markdown(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
