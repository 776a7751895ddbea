"""The kernels under AddressSanitizer and UBSan: no access outside of a tensor or of the shared memory asked for."""

from __future__ import annotations

import subprocess

import pytest
import simt_emulator as emulator
import torch
from simt_norm_cases import CASES, LONG_CASES, inputs_of
from test_simt_machine import SANITIZE

pytestmark = pytest.mark.proof("emulator")


def _span(t: torch.Tensor | None) -> list[int]:
    if t is None:
        return [0] * 5
    s = t.stride()
    strides = s if t.dim() == 4 else (s[0], s[2], 0, s[1])
    return [1 + sum((n - 1) * k for n, k in zip(t.shape, t.stride())), *strides]


def norm_calls(case, order: int) -> list[str]:
    i = inputs_of(case, torch.bfloat16)
    b, c, h, w = case.shape if len(case.shape) == 4 else (case.shape[0], case.shape[2], 1, case.shape[1])
    empty = torch.empty_like(i.x)
    calls = []
    for backward in (0, 1):
        views = (
            [i.x, i.grad, i.grad_sum, empty] if backward else [i.x, i.residual, empty, empty if case.residual else None]
        )
        numbers = [backward, case.registers, int(not case.narrow_parameters), *case.limits, order, b, c, h, w]
        calls.append("norm " + " ".join(map(str, numbers + [n for v in views for n in _span(v)])))
    return calls


def kelu_calls() -> list[str]:
    calls = []
    for n in (1, 7, 8, 4096, 8192 + 13, 20_001):
        for backward in (0, 1):
            calls.append(f"kelu {backward} {n} 1 {n} 1 1 1 {n} {n} {n}")
    # y (5, 7) dense, x every second column, grad the same for each row
    calls.append("kelu 1 35 2 5 7 7 1 14 2 0 1 35 69 7")
    calls.append("kelu 0 35 2 5 7 7 1 14 2 0 0 35 69 0")
    return calls


@pytest.mark.parametrize("dtype", ["float", "__nv_bfloat16"])
def test_kernels(dtype):
    program = emulator.compile_source("sanitize.cpp", "-O1", *SANITIZE, shared=False, define=f"SIMT_TYPE={dtype}")
    calls = kelu_calls()
    for number, case in enumerate([*CASES, *LONG_CASES[:-2]]):
        calls += norm_calls(case, emulator.ORDERS[number % len(emulator.ORDERS)])
    done = subprocess.run([str(program)], input="\n".join(calls), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout == f"{len(calls)} calls\n"
