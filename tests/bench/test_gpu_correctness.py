"""bench.gpu's correctness part finds what is planted: wrong numbers, unwritten memory, changing bits."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest
import torch

from bench.gpu import blocks, drive, grid, large, machine, warpgroups
from bench.gpu.judge import judge, same_bits
from bench.gpu.part import Failure, Setting, Unavailable
from bench.gpu.parts import correctness
from bench.gpu.problem import GRADIENTS, LAYOUTS, Problem, Surroundings
from bench.gpu.subjects import EVERYTHING, SUBJECTS, choice_of_gemm, gradients_for, solvable
from sdp_kernels.backends import BACKENDS

REHEARSAL = Setting(rehearsal=True)
ROOT = Path(__file__).resolve().parents[2]
KELU = Problem("kelu", (3, 8, 4, 4))


def subject(monkeypatch, change, operator="kelu"):
    """Plants ``change(outputs)`` behind the operator's own outputs."""
    right = SUBJECTS[operator]

    def ours(problem, backend, *inputs):
        return change(right.ours(problem, "reference", *inputs))

    for known in (SUBJECTS, EVERYTHING):
        monkeypatch.setitem(known, operator, dataclasses.replace(right, ours=ours))


def run(kind, problem=KELU):
    return correctness.run(REHEARSAL, kind, problem.json(), "reference")


KINDS = ("values", "equal bits", "compile", "graph", "large", "far")


@pytest.mark.parametrize("kind", KINDS)
def test_the_right_operator_passes(kind):
    problem = dataclasses.replace(KELU, shape=(2, 8, 4, 4)) if kind == "far" else KELU
    assert run(kind, problem)["kind"] == kind


def test_a_wrong_factor_is_found(monkeypatch):
    subject(monkeypatch, lambda outputs: tuple(y * 1.0001 for y in outputs))
    with pytest.raises(Failure, match="output 0: error"):
        run("values")
    with pytest.raises(Failure, match="y of samples 0"):
        run("large", dataclasses.replace(KELU, shape=(34, 8, 4, 4), dtype="float32"))
    with pytest.raises(Failure, match="f is off by"):
        run("rounding", Problem("kelu", (1,), "float16"))


def test_a_wrong_gradient_is_found(monkeypatch):
    subject(monkeypatch, lambda outputs: tuple(y + (y - y.detach()) * 1e-3 for y in outputs))
    with pytest.raises(Failure, match="gradient 0: error"):
        run("values")


def test_unwritten_memory_is_found(monkeypatch):
    def unwritten(outputs):
        y = torch.empty_like(outputs[0])
        y[..., :-1] = outputs[0][..., :-1]
        return (y,)

    subject(monkeypatch, unwritten)
    with pytest.raises(Failure, match="not finite"):
        run("values")
    assert torch.are_deterministic_algorithms_enabled() is False


def test_our_own_gemm_is_forced_where_a_problem_wants_it_and_only_there(monkeypatch):
    problem = dataclasses.replace(KELU, own_gemm=True)
    triton = BACKENDS["triton"]
    monkeypatch.setattr(triton, "prefers", lambda kernel, x, weight: False)
    with choice_of_gemm(KELU, "triton"):
        assert not triton.prefers("linear_gemm_fwd", None, None)
    with pytest.raises(ZeroDivisionError), choice_of_gemm(problem, "triton"):
        assert triton.prefers("linear_gemm_fwd", None, None) and triton.prefers("linear_gemm_bwd", None, None)
        _ = 1 / 0
    assert not triton.prefers("linear_gemm_fwd", None, None)
    assert solvable([KELU, problem], "cuda") == [KELU] and solvable([KELU, problem], "triton") == [KELU, problem]
    for found in (grid.problems("linear"), blocks.problems("feed_forward"), large.problems("linear", Setting())):
        assert {p.own_gemm for p in found} == {False, True}


def test_warpgroups_are_asked_for_where_a_problem_wants_them_and_only_there(monkeypatch):
    variable, problem = "SDP_KERNELS_CUDA_ATTENTION", dataclasses.replace(KELU, warpgroups=True)
    for before in (None, "mma"):
        monkeypatch.delenv(variable, raising=False) if before is None else monkeypatch.setenv(variable, before)
        with choice_of_gemm(KELU, "cuda"):
            assert os.environ.get(variable) == before
        with pytest.raises(ZeroDivisionError), choice_of_gemm(problem, "cuda"):
            assert os.environ[variable] == "wgmma"
            _ = 1 / 0
        assert os.environ.get(variable) == before
    for there, wanted in ((True, [KELU, problem]), (False, [KELU])):
        monkeypatch.setattr(warpgroups, "there", lambda there=there: there)
        assert solvable([KELU, problem], "cuda") == wanted and solvable([KELU, problem], "triton") == [KELU]
    half = [{p.warpgroups for p in grid.problems("register_attention", (dtype,))} for dtype in ("float32", "bfloat16")]
    assert half == [{False}, {False, True}] and "warpgroups" in problem.name


def test_a_write_beside_an_input_and_a_read_from_there_are_found(monkeypatch):
    kept = []

    def careless(problem, backend, *inputs):
        x = inputs[0].detach()
        around = x.as_strided((x.numel() + 2,), (1,), x.storage_offset() - 1)
        kept.append(around)
        if len(kept) == 1:
            around[0] = 7.0
        return SUBJECTS["kelu"].plain(problem, *inputs)

    def reads_too_far(problem, backend, *inputs):
        x = inputs[0].detach()
        behind = x.as_strided(x.shape, x.stride(), x.storage_offset() + x.numel())
        return tuple(y + 0 * behind for y in SUBJECTS["kelu"].plain(problem, *inputs))

    right = SUBJECTS["kelu"]
    monkeypatch.setitem(EVERYTHING, "kelu", dataclasses.replace(right, ours=careless))
    with pytest.raises(Failure, match="memory around or in input 0 was written"):
        run("values")
    monkeypatch.setitem(EVERYTHING, "kelu", dataclasses.replace(right, ours=reads_too_far))
    with pytest.raises(Failure, match="not finite"):
        run("values")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_surroundings_keep_values_strides_and_alignment(layout):
    shape = (2, 12, 5) if layout == "tokens" else (2, 3, 4, 5)
    original = LAYOUTS[layout](torch.randn(shape))
    surroundings = Surroundings(original)
    copy = surroundings.tensor
    assert torch.equal(copy, original) and copy.stride() == original.stride() and surroundings.untouched()
    assert copy.data_ptr() % 16 == original.data_ptr() % 16
    copy.as_strided((1,), (1,), copy.storage_offset() - 1).zero_()
    assert not surroundings.untouched()
    expanded = torch.zeros(1).expand(4)
    assert Surroundings(expanded).tensor is expanded and Surroundings(torch.empty(0)).untouched()


def test_changing_bits_are_found(monkeypatch):
    calls = iter(range(100))
    subject(monkeypatch, lambda outputs: tuple(y + 1e-6 * (next(calls) == 1) for y in outputs))
    with pytest.raises(Failure, match="run to run"):
        run("equal bits")


def test_bits_that_depend_on_the_batch_are_found(monkeypatch):
    subject(monkeypatch, lambda outputs: tuple(y + 1e-6 * (y.shape[0] == 3) for y in outputs))
    with pytest.raises(Failure, match="samples 0 to 1 alone"):
        run("equal bits")


def test_a_graph_that_does_not_follow_its_input_is_found(monkeypatch):
    results = []

    def captured(setting, step):
        results.append(step())
        return (lambda: None), results[0]

    monkeypatch.setattr(machine, "captured", captured)
    with pytest.raises(Failure, match="eager and replayed"):
        run("graph")


def test_wrapped_offsets_are_found(monkeypatch):
    border = machine.LARGE[True]

    def wrapped(outputs):
        y = outputs[0]
        if y.numel() > border:
            y = y.clone()
            y.view(-1)[border:] = 0
        return (y,)

    subject(monkeypatch, wrapped)
    with pytest.raises(Failure, match="alone and in the batch"):
        run("large", dataclasses.replace(KELU, shape=(34, 8, 4, 4)))


def test_too_little_memory_is_a_reason(monkeypatch):
    monkeypatch.setattr(machine, "free_memory", lambda setting: 1000)
    with pytest.raises(Unavailable, match="GiB of GPU memory"):
        run("large")


def test_the_judge_asks_for_finite_values_of_the_right_shape():
    exact = torch.randn(100, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    got = exact.float()
    assert judge("y", got, exact, got)["error"] < 1e-7
    for broken, said in ((got[:99], "shape"), (got / 0, "not finite"), (got * 1.001, "error")):
        with pytest.raises(Failure, match=said):
            judge("y", broken, exact, got)
    assert judge("y", got * 1.001, exact, got * 1.002)["error"] > 1e-4  # no worse than PyTorch
    with pytest.raises(Failure, match="1 of 100"):
        same_bits("y", got, torch.cat([got[:99], got[99:] + 1]))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_keep_values_and_change_strides(layout):
    shape = (2, 12, 5) if layout == "tokens" else (2, 3, 4, 5)
    x = torch.randn(shape)
    laid = LAYOUTS[layout](x)
    assert torch.equal(laid, x)
    assert (laid.stride() == x.stride()) == (layout in ("contiguous", "tokens"))


def test_gradients_come_in_the_asked_layout():
    x = torch.randn(3, 4, 5)
    assert {name: lay(x).stride() for name, lay in GRADIENTS.items()} == {
        "like y": (20, 5, 1),
        "expanded": (0, 0, 0),
        "expanded per sample": (20, 0, 0),
        "swapped": (20, 1, 4),
        "gaps": (40, 10, 2),
    }
    assert gradients_for(Problem("kelu", (0, 4), grad="expanded"), "cpu")[0].shape == (0, 4)


def test_the_grid_has_what_it_promises():
    for operator in SUBJECTS:
        problems = grid.problems(operator)
        assert len(set(problems)) == len(problems)
        assert {p.dtype for p in problems} == {"float32", "bfloat16", "float16"}
        assert any(0 in p.shape for p in problems) and any(p.grad == "expanded" for p in problems)
        if operator != "register_attention":  # which has no pictures
            assert any(p.shape[2:] == (7, 7) for p in problems) and any(p.shape[2:] == (1, 1) for p in problems)
    norms = grid.problems("layer_norm_2d")
    assert {p.channels for p in norms} >= {1, 3, 768, 2049, 8192}
    assert any(p.registers == p.shape[1] for p in norms) and any(p.residual for p in norms)


def test_every_operator_with_a_gpu_kernel_is_tested():
    written = {path.stem for path in (ROOT / "csrc" / "cuda").glob("*.cu")} - {"library"}
    written |= {path.stem for path in (ROOT / "sdp_kernels" / "triton").glob("[a-z]*.py")}
    assert written and written <= set(SUBJECTS), "an entry in bench/gpu/subjects.py is missing"
    assert all(drive.problems(operator) for operator in SUBJECTS)
