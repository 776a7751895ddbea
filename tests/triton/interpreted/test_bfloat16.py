"""The correction of the interpreter itself, and which Triton this is."""

from __future__ import annotations

import os

import bfloat16
import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder


def test_the_wanted_triton_interprets():
    wanted = os.environ.get("SDP_EXPECTED_TRITON")
    assert not wanted or triton.__version__ == wanted
    assert InterpreterBuilder.rounds_bfloat16


def test_widening_is_exact_for_every_bfloat16():
    bits = np.arange(2**16, dtype=np.uint16)
    got = torch.from_numpy(bfloat16.widened(bits))
    want = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).float()
    assert torch.equal(got.view(torch.int32), want.view(torch.int32))


def test_rounding_is_pytorchs():
    """Each bf16 and what lies between it and the next: ties, their neighbours, subnormals, infinities, NaN."""
    high = np.arange(2**16, dtype=np.uint32)[:, None] << 16
    values = (high + np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=np.uint32)).ravel().view(np.float32)
    want = torch.from_numpy(values).to(torch.bfloat16)
    got = torch.from_numpy(bfloat16.rounded(values).view(np.int16)).view(torch.bfloat16)
    number = ~want.isnan()
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got[number].view(torch.int16), want[number].view(torch.int16))


@triton.jit
def _widen_and_round(x_ptr, y_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    x = tl.load(x_ptr + at).to(tl.float32)
    tl.store(y_ptr + at, (x * 1.01).to(y_ptr.dtype.element_ty))


@triton.jit
def _careless(x_ptr, y_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    x = tl.load(x_ptr + at)
    tl.store(y_ptr + at, x * x)


def test_a_kernel_rounds_as_pytorch():
    x = torch.linspace(-9, 9, 256).to(torch.bfloat16)
    y = torch.empty_like(x)
    _widen_and_round[(1,)](x, y, 256)
    assert torch.equal(y, (x.float() * 1.01).to(torch.bfloat16))


def test_arithmetic_on_bfloat16_is_refused():
    x = torch.ones(16, dtype=torch.bfloat16)
    with pytest.raises(Exception, match="widen it right after the load"):
        _careless[(1,)](x, torch.empty_like(x), 16)


@triton.jit
def _multiply(x_ptr, y_ptr, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    x = tl.load(x_ptr + at)
    tl.store(y_ptr + at, tl.dot(x, x))


def test_a_matrix_product_of_bfloat16_is_one_of_numbers():
    x, y = torch.linspace(-3, 3, 256).view(16, 16).to(torch.bfloat16), torch.empty(16, 16)
    _multiply[(1,)](x, y, 16)
    torch.testing.assert_close(y, x.float() @ x.float())
