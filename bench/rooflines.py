"""What bounds each kernel: bytes and operations, its floor on an H200 and on the machines measured, what was reached.

    python -m bench.rooflines            prints the tables
    python -m bench.rooflines --write    puts them into docs/rooflines.md, between the markers there

Bytes are counted where the benchmarks count them (``traffic`` in bench/test_*.py), operations here, and what was
reached is read from bench/results/*/operators.json. Nothing is measured.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from .cases import Case, Operator
from .report import markdown_table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
DOCUMENT = ROOT / "docs" / "rooflines.md"
UNMEASURED = "not yet measured"
MODULES = ("kelu", "layer_norm_2d", "depthwise_conv2d", "linear", "conv_mlp", "register_attention")


@dataclass(frozen=True)
class Chip:
    """Bytes and operations per second. ``matrix``: what a large GEMM reaches; ``fragments``: mma.sync without wgmma."""

    copy: float
    fma: float
    matrix: float
    fragments: float


H200 = Chip(copy=4.3e12, fma=67e12, matrix=790e12, fragments=590e12)
"""The sources are in docs/rooflines.md."""


@dataclass(frozen=True)
class Bound:
    """A kernel on one case. ``moved``: its bytes, of them ``hidden`` while matrix units compute; ``operations`` by
    unit. ``goal``: the time over the floor that it is designed for. ``alone``: the benchmarks time just this."""

    kernel: str
    case: Case
    moved: int
    operations: dict[str, float]
    goal: str
    hidden: int = 0
    count: str = ""
    """Bytes and operations per element of x, in words."""
    alone: bool = True

    def seconds(self, chip: Chip) -> dict[str, float]:
        """By what bounds it: "memory" and each unit."""
        spent = {unit: amount / getattr(chip, unit) for unit, amount in self.operations.items()}
        return {"memory": self.moved / chip.copy} | spent

    def floor(self, chip: Chip) -> float:
        """Bytes that pass outside of matrix products come on top of these."""
        spent = self.seconds(chip)
        if self.hidden:
            return (self.moved - self.hidden) / chip.copy + max(spent["matrix"], self.hidden / chip.copy)
        return max(spent.values())


def operator(name: str) -> Operator:
    """As ``pytest bench`` knows it."""
    return importlib.import_module(f"bench.test_{name}").OPERATOR


def _elementwise(name: str, shape: tuple[int, ...], layout: str, flops: tuple[int, int], goals: tuple[str, str]):
    for which, per_element, goal, tensors in zip(("forward", "backward"), flops, goals, (2, 3)):
        case = Case(name, shape, torch.bfloat16, layout, which, "cuda")
        count = f"{tensors} tensors; {per_element}"
        moved = operator(name).traffic(case)
        yield Bound(f"{name} {which}", case, moved, {"fma": per_element * case.elements}, goal, count=count)


def _depthwise(shape: tuple[int, ...], k: int, units: tuple[str, ...]):
    """dgrad and wgrad move two tensors each, in one kernel three."""
    case = Case("depthwise_conv2d", shape, torch.bfloat16, "channels_last", "forward", "cuda", variant=f"k{k}")
    goals = {"fma": ("1.5", "1.5", "1.5", "1.5"), "fragments": ("1.25", "1.25", "1.4", "1.35")}
    rows = (("forward", 2, 1), ("dgrad", 2, 1), ("wgrad", 2, 1), ("dgrad + wgrad", 3, 2))
    for unit in units:
        # A row of taps and eight neighbouring outputs of sixteen rows are one fragment product of 16 × 8 × 16.
        per_output, name = (2 * k * k, "FMA") if unit == "fma" else (32 * k, "mma.sync")
        for (which, tensors, passes), goal in zip(rows, goals[unit]):
            if (unit, k, which) == ("fragments", 3, "forward"):
                continue  # nine multiply-adds need no tensor cores
            yield Bound(
                f"depthwise {k}×{k} {which}, {name}",
                replace(case, which="backward" if passes == 2 else "forward"),
                tensors * case.bytes + passes * case.channels * k * k * 2,
                {unit: passes * per_output * case.elements},
                goal,
                count=f"{tensors} tensors; {passes * per_output}",
                alone=which in ("forward", "dgrad + wgrad"),
            )


def _linear(variant: str, which: str, activation: int):
    case = Case("linear", (256, 261, 768), torch.bfloat16, "tokens", which, "cuda", variant=variant)
    ratio, wide = (4 if "expand" in variant else 1), case.elements
    inside = operator("linear").traffic(case)
    products = (1 if which == "forward" else 2) * 2 * wide * ratio * case.channels
    operations = {"matrix": products, "fma": activation * ratio * wide}
    count = f"{inside / case.bytes:.3g} tensors; {products // wide} matrix"
    yield Bound(
        f"linear, {variant}, {which}", case, inside, operations, "1.12" if which == "forward" else "1.15", inside, count
    )
    if which == "forward":  # as a kernel of its own behind the vendor's GEMM: z, residual → y
        tensors = (2 + ("residual" in variant)) * ratio
        moved, name = tensors * case.bytes, f"its epilogue alone, {variant}, {which}"
        count = f"{tensors} tensors; {activation * ratio}"
        yield Bound(
            name, replace(case, operator="linear_epilogue"), moved, {"fma": activation * ratio * wide}, "1.1", 0, count
        )


def _conv_mlp(which: str, goal: str):
    case = Case("conv_mlp", (256, 261, 768), torch.bfloat16, "tokens", which, "cuda", registers=5, variant="kelu")
    known = operator("conv_mlp")
    products = (1 if which == "forward" else 2) * 2 * 9 * case.elements * case.channels
    moved, hidden = known.traffic(case), known.hidden(case)
    count = (
        f"{moved / case.bytes:.3g} tensors, {hidden / case.bytes:.3g} inside GEMMs; {products // case.elements} matrix"
    )
    yield Bound(f"conv_mlp {which}", case, moved, {"matrix": products}, goal, hidden, count)


def _attention(which: str, goal: str):
    """Two products of T × T × d forward, five backward, per head and sample."""
    case = Case("register_attention", (256, 261, 3, 8, 96), torch.bfloat16, "tokens", which, "cuda", registers=5)
    batch, tokens, _, heads, d = case.shape
    products = {"forward": 2, "backward": 5}[which] * 2 * batch * heads * tokens * tokens * d
    moved = operator("register_attention").traffic(case)
    y = case.elements // 3
    count = f"{moved * 3 / case.bytes:.3g} tensors of y's size; {products / y:.0f} matrix per element of y"
    yield Bound(f"register_attention {which}", case, moved, {"matrix": products}, goal, 0, count)


IMAGES = (256, 768, 16, 16)
STAGES = ((256, 128, 56, 56), (256, 256, 28, 28), (256, 512, 14, 14), (256, 1024, 7, 7))


def bounds() -> list[Bound]:
    """Every kernel, on the shapes of the goals: bf16, batch 256."""
    return [
        *_elementwise("kelu", IMAGES, "contiguous", (22, 40), ("1.05", "1.05")),
        *_elementwise("kelu", (256, 3072, 16, 16), "contiguous", (22, 40), ("1.05", "1.05")),
        *_elementwise("layer_norm_2d", IMAGES, "channels_last", (8, 14), ("1.08", "1.20")),
        *_elementwise("layer_norm_2d", IMAGES, "contiguous", (8, 14), ("1.15", "1.30")),
        *_depthwise(IMAGES, 3, ("fma", "fragments")),
        *_depthwise(IMAGES, 5, ("fma", "fragments")),
        *_depthwise(IMAGES, 7, ("fma", "fragments")),
        *_depthwise(IMAGES, 9, ("fma", "fragments")),
        *(next(_depthwise(shape, 7, (unit,))) for shape in STAGES for unit in ("fma", "fragments")),
        *_linear("expand-kelu", "forward", 22),
        *_linear("expand-kelu", "backward", 40),
        *_linear("residual-kelu", "forward", 25),
        *_linear("residual-kelu", "backward", 46),
        *_conv_mlp("forward", "1.12"),
        *_conv_mlp("backward", "1.15"),
        *_attention("forward", "1.4 (Triton 2.0)"),
        *_attention("backward", "1.9 (Triton 2.5)"),
    ]


def _µs(seconds: float) -> str:
    return f"{1e6 * seconds:.1f}" if seconds < 99.95e-6 else f"{1e6 * seconds:.0f}"


def measured() -> dict[str, dict]:
    """Committed results by their folder."""
    files = sorted(RESULTS.glob("*/operators.json"))
    return {path.parent.name: json.loads(path.read_text(encoding="utf-8")) for path in files}


def ours(results: dict[str, dict]) -> list[dict]:
    """Our rows, with the machine's name."""
    rows = [(name, b["extra_info"]) for name, content in results.items() for b in content["benchmarks"]]
    return [{"machine": name, "variant": "", **row} for name, row in rows if row["kind"] == "ours"]


def _reached(bound: Bound, rows: list[dict]) -> str:
    """Our committed GPU times over this floor, backend by backend."""
    if not bound.alone:
        return "not timed alone"
    case = bound.case
    key = (case.operator, list(case.shape), case.dtype_name, case.layout, case.which, case.variant)
    names = ("operator", "shape", "dtype", "layout", "pass", "variant")
    found = [r for r in rows if r["device"] == "cuda" and tuple(r[n] for n in names) == key]
    told = [f"{r['median'] / bound.floor(H200):.2f} ({r.get('backend', 'ours')}, {r['machine']})" for r in found]
    return ", ".join(told) or UNMEASURED


def gpu_table(results: dict[str, dict]) -> str:
    """Floors on an H200."""
    cells = [
        [
            "kernel",
            "shape",
            "moved; operations per element",
            "memory µs",
            "arithmetic µs",
            "floor µs",
            "designed for",
            "reached",
        ]
    ]
    for bound in bounds():
        spent = bound.seconds(H200)
        arithmetic = max(seconds for unit, seconds in spent.items() if unit != "memory")
        shape = "×".join(map(str, bound.case.shape)) + (f" {bound.case.layout}" if len(bound.case.shape) == 4 else "")
        times = [_µs(seconds) for seconds in (spent["memory"], arithmetic, bound.floor(H200))]
        cells.append([bound.kernel, shape, bound.count, *times, f"≤ {bound.goal}", _reached(bound, ours(results))])
    return markdown_table(cells)


def cpu_table(name: str, content: dict) -> str:
    """Floors from the copies of the very runs, and what was reached, per problem; what lacks is named."""
    rows = [r for r in ours({name: content}) if r["device"] == "cpu"]
    cells = [["problem", "copy GB/s", *(f"{which}: floor µs, ÷ floor" for which in ("forward", "backward", "both"))]]
    problems: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        key = (row["operator"], row["variant"], tuple(row["shape"]), row["dtype"], row["layout"])
        problems.setdefault(key, {})[row["pass"]] = row
    for (kernel, variant, shape, dtype, layout), passes in problems.items():
        copies = statistics.median(row["copy_bytes_per_second"] for row in passes.values())
        reached = [
            f"{_µs(passes[which]['floor'])}, {passes[which]['time_over_floor']:.2f}" if which in passes else UNMEASURED
            for which in ("forward", "backward", "both")
        ]
        words = [kernel, variant, "×".join(map(str, shape)), dtype, layout]
        cells.append([" ".join(word for word in words if word), f"{copies / 1e9:.0f}", *reached])
    for missing in (m for m in MODULES if m not in {row["operator"] for row in rows}):
        cells.append([missing, "", *[UNMEASURED] * 3])
    return markdown_table(cells)


def sections() -> dict[str, str]:
    """Marker in the document → what stands between it and its end."""
    results = measured()
    by_cpu = {row["machine"] for row in ours(results) if row["device"] == "cpu"}
    machines = [f"### {name}\n\n{cpu_table(name, results[name]).strip()}" for name in results if name in by_cpu]
    return {"gpu": gpu_table(results).strip(), "cpu": "\n\n".join(machines)}


def filled(text: str) -> str:
    """The document with its tables made anew. Raises ValueError where a marker is missing."""
    for name, made in sections().items():
        begin, end = f"<!-- table:{name} -->\n", f"<!-- end:{name} -->"
        if begin not in text or end not in text:
            raise ValueError(f"{DOCUMENT.name} has no {begin.strip()} … {end}")
        before, rest = text.split(begin, 1)
        text = f"{before}{begin}\n{made}\n\n{end}{rest.split(end, 1)[1]}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.rooflines", description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="update docs/rooflines.md")
    if parser.parse_args().write:
        DOCUMENT.write_text(filled(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
        return
    for made in sections().values():
        print(made, end="\n\n")


if __name__ == "__main__":
    main()
