"""The activations inside `linear`'s kernels, over their whole range."""

from __future__ import annotations

import _plain as plain
import pytest
import torch
from _cases import backend_params

import sdp_kernels as sk
from sdp_kernels.backends import BACKENDS

WITH_KERNELS = [p for p in backend_params("linear") if BACKENDS[p.values[-1]].namespace is not None]


def found_and_exact(x: torch.Tensor, activation: str, backend: str):
    """("value" or "slope", the kernels', in fp64) of x (N, 1): a linear layer that multiplies by one."""
    exact_x = x.double().requires_grad_()
    exact = plain.ACTIVATIONS[activation](exact_x)
    (exact_slope,) = torch.autograd.grad(exact.sum(), exact_x)
    leaf = x.clone().requires_grad_()
    y = sk.linear(leaf, torch.ones(1, 1, dtype=x.dtype), activation=activation, backend=backend)
    (slope,) = torch.autograd.grad(y.sum(), leaf)
    return ("value", y.detach(), exact.detach()), ("slope", slope, exact_slope)


@pytest.mark.levels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", sk.ACTIVATIONS)
@pytest.mark.parametrize("backend", WITH_KERNELS)
def test_value_and_slope_are_rounded_once(backend, activation, dtype):
    """Within 2.5e-7 of what is 1 or below, where that is fp32's own rounding, else within 0.51 units of the dtype."""
    x = torch.cat([torch.linspace(-12, 12, 4000), torch.tensor([-100.0, -40.0, 40.0, 100.0])]).to(dtype)[:, None]
    for name, got, right in found_and_exact(x, activation, backend):
        unit = torch.exp2(torch.floor(torch.log2(right.abs().clamp_min(1e-30)))) * torch.finfo(dtype).eps
        error, allowed = (got.double() - right).abs(), 0.51 * unit + 2.5e-7 * right.abs().clamp_min(1)
        worst = (error / allowed).argmax()
        assert (error <= allowed).all(), f"{name} at {x[worst].item()}: {got[worst].item()}, not {right[worst].item()}"


def in_units(x: torch.Tensor) -> torch.Tensor:
    """Position among the 16-bit numbers; +0 and −0 share one."""
    bits = x.view(torch.int16).int()
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)


@pytest.mark.levels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", ["gelu", "kelu"])
@pytest.mark.parametrize("backend", WITH_KERNELS)
def test_one_unit_on_every_16_bit_number(backend, activation, dtype):
    """Up to 5 in size, where neither x nor the result is subnormal, but at −3.5, where fp64 misses KeLü's 0."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    x = x[(x.abs() <= 5) & (x.abs() >= 4 * torch.finfo(dtype).tiny) & (x != -3.5)][:, None]
    for name, got, right in found_and_exact(x, activation, backend):
        off = (in_units(got) - in_units(right.to(dtype))).abs()
        off[right.abs() < torch.finfo(dtype).tiny] = 0
        assert off.max() <= 1, f"{name}: {off.max()} units at {x[off.argmax()].item()}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", WITH_KERNELS)
def test_tails_keep_their_digits(backend, dtype):
    """1 + erf(x/√2) has lost them all at −6; GELU's kernels never add what cancels."""
    x = torch.linspace(-9 if dtype == torch.bfloat16 else -3.5, -2, 1001).to(dtype)[:, None]
    exact = x.double() * torch.special.erfc(-x.double() * 0.5**0.5) / 2
    assert (exact.abs() > torch.finfo(dtype).tiny).all()
    y = sk.linear(x, torch.ones(1, 1, dtype=dtype), activation="gelu", backend=backend)
    torch.testing.assert_close(y.double(), exact, rtol=0.51 * torch.finfo(dtype).eps, atol=0)
