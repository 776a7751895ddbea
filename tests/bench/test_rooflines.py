"""docs/rooflines.md holds what bench/rooflines.py computes, and that agrees with what was computed by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bench import rooflines
from bench.cases import Case
from bench.gpu.goals import GOALS


def test_the_document_is_up_to_date():
    text = rooflines.DOCUMENT.read_text(encoding="utf-8")
    assert rooflines.filled(text) == text, "`python -m bench.rooflines --write` brings docs/rooflines.md up to date"


def test_a_document_without_a_marker_is_refused():
    text = rooflines.DOCUMENT.read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="table:cpu"):
        rooflines.filled(text.replace("<!-- table:cpu -->", ""))
    with pytest.raises(ValueError, match="end:gpu"):
        rooflines.filled(text.replace("<!-- end:gpu -->", ""))


def test_memory_floors_are_those_of_the_goals():
    """Which bench.gpu judges by, worked out on paper; around matrix products the whole floor."""

    def judged(b: rooflines.Bound) -> float:
        return b.floor(rooflines.H200) if b.hidden else b.seconds(rooflines.H200)["memory"]

    known = {
        (b.case.operator, b.case.shape, b.case.layout, b.case.which, b.case.variant): judged(b)
        for b in rooflines.bounds()
        if b.alone
    }
    goals = {(g.operator, g.shape, g.layout, g.which, g.variant): g for g in GOALS}
    common = goals.keys() & known.keys()
    assert len(common) >= 14
    for key in common:
        assert known[key] * 1e6 == pytest.approx(goals[key].paper, rel=0.01), key
        fitting = [b for b in rooflines.bounds() if b.alone and b.case.which == key[3] and b.case.variant == key[4]]
        fitting = [b for b in fitting if (b.case.operator, b.case.shape, b.case.layout) == key[:3]]
        assert any(float(b.goal.split()[0]) == goals[key].bound for b in fitting), key


WHERE = {"here": "cpu", "there": "cuda"}


def test_a_gpus_results_are_no_rows_of_the_cpus_tables(monkeypatch):
    row = {"operator": "kelu", "shape": [256, 768, 16, 16], "dtype": "bfloat16", "layout": "contiguous", "kind": "ours"}
    row |= {"pass": "forward", "median": 50e-6, "floor": 47e-6, "time_over_floor": 1.06, "copy_bytes_per_second": 4e12}
    made = {name: {"benchmarks": [{"extra_info": row | {"device": device}}]} for name, device in WHERE.items()}
    monkeypatch.setattr(rooflines, "measured", lambda: made)
    found = rooflines.sections()
    assert "### here" in found["cpu"] and "there" not in found["cpu"]
    assert "(ours, there)" in found["gpu"] and "here" not in found["gpu"].replace("there", "")


def test_floors_by_hand():
    by_name = {(b.kernel, b.case.shape[-1]): b for b in rooflines.bounds()}
    floor = lambda *key: 1e6 * by_name[key].floor(rooflines.H200)  # noqa: E731
    elements = 256 * 768 * 256
    assert floor("depthwise 7×7 forward, FMA", 16) == pytest.approx(1e6 * elements * 98 / 67e12)
    assert floor("depthwise 7×7 forward, mma.sync", 16) == pytest.approx(1e6 * (4 * elements + 768 * 98) / 4.3e12)
    assert floor("depthwise 7×7 dgrad + wgrad, FMA", 16) == pytest.approx(1e6 * elements * 196 / 67e12)
    assert floor("depthwise 3×3 dgrad + wgrad, FMA", 16) == pytest.approx(1e6 * 6 * elements / 4.3e12, rel=1e-3)
    rows = 256 * 261
    assert floor("linear, expand-kelu, forward", 768) == pytest.approx(1e6 * 2 * rows * 768 * 3072 / 790e12)
    outside = 4 * rows * 768 * 2 / 4.3e12
    assert floor("conv_mlp forward", 768) == pytest.approx(1e6 * (2 * 9 * rows * 768**2 / 790e12 + outside))
    assert floor("register_attention forward", 96) == pytest.approx(1e6 * 4 * 2 * rows * 768 / 4.3e12)
    assert floor("register_attention backward", 96) == pytest.approx(1e6 * 10 * rows * 261 * 768 / 790e12)


def test_bytes_that_matrix_products_hide_count_where_they_take_longer():
    case = Case("linear", (1, 1, 8), torch.bfloat16, "tokens", device="cuda")
    bound = rooflines.Bound("x", case, moved=100, operations={"matrix": 10.0}, goal="1", hidden=80)
    chip = rooflines.Chip(copy=1.0, fma=1.0, matrix=1.0, fragments=1.0)
    assert bound.floor(chip) == 20 + 80 and replace(bound, operations={"matrix": 90.0}).floor(chip) == 20 + 90


def test_a_committed_gpu_result_is_shown_and_nothing_else():
    case = next(b.case for b in rooflines.bounds() if b.kernel == "kelu forward")
    row = {
        "operator": "kelu",
        "shape": list(case.shape),
        "dtype": "bfloat16",
        "layout": "contiguous",
        "pass": "forward",
    }
    row |= {"device": "cuda", "kind": "ours", "median": 93.65e-6, "backend": "triton"}
    peer = row | {"kind": "peer", "median": 1.0}
    results = {"h200": {"benchmarks": [{"extra_info": r} for r in (row, peer)]}}
    lines = [line for line in rooflines.gpu_table(results).splitlines() if rooflines.UNMEASURED not in line]
    measured = [line for line in lines if "2.00 (triton, h200)" in line]
    assert len(measured) == 1 and "kelu forward | 256×768×16×16" in measured[0]
    assert all("(" not in line.rpartition("|")[0].rpartition("|")[2] for line in lines if line not in measured)


def test_cpu_rows_are_grouped_by_problem_and_what_lacks_is_named():
    row = {"operator": "kelu", "shape": [2, 3], "dtype": "float32", "layout": "contiguous", "device": "cpu"}
    row |= {"kind": "ours", "copy_bytes_per_second": 5e9}
    passes = [row | {"pass": which, "floor": 1e-6, "time_over_floor": 1.5} for which in ("forward", "both")]
    lines = rooflines.cpu_table("here", {"benchmarks": [{"extra_info": r} for r in passes]}).splitlines()
    assert lines[2] == "| kelu 2×3 float32 contiguous | 5 | 1.0, 1.50 | not yet measured | 1.0, 1.50 |"
    assert len(lines) == 2 + len(rooflines.MODULES) and all(rooflines.UNMEASURED in line for line in lines[3:])
