"""KeLü's Triton kernels against fp64."""

from __future__ import annotations

import _plain as plain
import cases
import numpy as np
import pytest
import torch
import triton.language as tl
from _layouts import hostile, layouts, normal
from _numerics import assert_as_exact, differentiate
from triton.runtime.interpreter import InterpreterBuilder

import sdp_kernels as sk
from sdp_kernels.triton import _launch, kelu

OPS = cases.OPS
TABLE = _launch.table_for(90)
FLOATING = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def exact(x, grad):
    (y,), (dx,) = differentiate(plain.kelu, [x.double()], [grad.double()])
    return y, dx


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_values_over_the_whole_range(dtype):
    """In fp32 within 2e-7 on [−4, 4]; in 16 bits within one unit of the last place, for every number."""
    if dtype.itemsize == 2:
        x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        x = x[torch.isfinite(x)]
    else:
        x = torch.linspace(-4, 4, 100_003, dtype=dtype)
    one = torch.ones_like(x)
    y, slope = exact(x, one)
    for got, want in ((OPS.kelu_fwd(x), y), (OPS.kelu_bwd(one, x), slope)):
        if dtype.itemsize == 2:
            near = want.to(dtype)
            unit = (torch.nextafter(near.abs(), torch.tensor(float("inf"), dtype=dtype)) - near.abs()).double()
            unit = torch.where(torch.isfinite(unit), unit, 0)
            assert (
                (got.double() - want).abs() <= unit + 1e-16
            ).all()  # π is rounded in fp64 too: f(−3.5) is not 0 there
        else:
            assert (got.double() - want).abs().max() <= (2e-7 if dtype == torch.float32 else 1e-14)


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_special_values(dtype):
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 3.5, -3.5, 0.0, 1e4, -1e4], dtype=dtype)
    y, slope = OPS.kelu_fwd(x), OPS.kelu_bwd(torch.ones_like(x), x)
    assert y[0].isnan() and slope[0].isnan()
    assert y[1:].tolist() == [float("inf"), 0, 3.5, 0, 0, x[6].item(), 0]
    assert slope[1:].tolist() == pytest.approx([1, 0, 1, 0, 0.5, 1, 0], abs=1e-7)


@pytest.mark.parametrize("dtype", FLOATING[1:], ids=str)
@pytest.mark.parametrize("elements", [1, 7, 4096, 8192, 8193, 20_001])
def test_lengths_inside_guard_bands(elements, dtype, guarded):
    x, grad = normal(elements, seed=1, dtype=dtype, scale=2), normal(elements, seed=2, dtype=dtype)
    y, dx = OPS.kelu_fwd(guarded.inside(x)), OPS.kelu_bwd(guarded.inside(grad), guarded.inside(x))
    assert guarded.allocations == 2
    want, want_dx = exact(x, grad)
    assert_as_exact("y", y, want, plain.kelu(x))
    assert_as_exact("dx", dx, want_dx, exact(x.float(), grad.float())[1].to(dtype))


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 35, 2, 3), (2, 3, 67)], ids=str)
def test_any_strides_inside_guard_bands(shape, guarded):
    """Every layout of x, with every kind of gradient or one of them each, and outputs as PyTorch would lay them out."""
    x, grad = normal(*shape, seed=1, scale=2), normal(*shape, seed=2)
    kinds = list(hostile(grad).items())
    for i, (name, odd) in enumerate(layouts(x).items()):
        y = OPS.kelu_fwd(guarded.inside(odd))
        assert y.stride() == torch.empty_like(odd).stride(), name
        torch.testing.assert_close(y, exact(x, grad)[0], rtol=1e-13, atol=1e-14, msg=lambda t, n=name: f"{n}: {t}")
        for kind, g in kinds if shape == (2, 3, 4, 5) else [kinds[i % len(kinds)]]:
            dx = OPS.kelu_bwd(g if 0 in g.stride() else guarded.inside(g), guarded.inside(odd))
            assert dx.stride() == y.stride()
            torch.testing.assert_close(
                dx, exact(x, g)[1], rtol=1e-13, atol=1e-14, msg=lambda t, n=name, k=kind: f"{n}, grad {k}: {t}"
            )


def test_more_dimensions_than_the_kernel_takes():
    x = normal(2, 3, 2, 3, 2, 2, 4, seed=1)[:, :2, :, ::2, :, ::2, ::3]
    torch.testing.assert_close(OPS.kelu_fwd(x), plain.kelu(x), rtol=1e-13, atol=1e-14)
    grad = normal(4, 2, 2, 2, 2, 2, 3, seed=2)[::2, :, :, :, :, ::2, ::2].permute(0, 1, 2, 3, 4, 5, 6)
    torch.testing.assert_close(OPS.kelu_bwd(grad, x), exact(x, grad)[1], rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("shape", ["line", "square", "narrow"])
def test_each_strided_configuration_is_reached(shape, monkeypatch):
    asked = []
    monkeypatch.setattr(kelu, "configuration", lambda x, *key: asked.append(key[2]) or _launch.configuration(x, *key))
    x = {"line": (50, 2), "square": (20, 50, 40), "narrow": (300, 7)}[shape]
    x = normal(*x, seed=1)
    x = x[:, 0] if shape == "line" else x[..., :33] if shape == "square" else x[:, :5]
    torch.testing.assert_close(OPS.kelu_fwd(x), plain.kelu(x), rtol=1e-13, atol=1e-14)
    assert asked == [shape]


def test_offsets_beyond_32_bits():
    """Strides of 2³⁰ and more in x and in the gradient; memory that nobody touches costs nothing."""
    big = torch.empty(2**32 + 64, dtype=torch.float16)
    x, grad = big.as_strided((5, 3), (2**30, 2)), big.as_strided((5, 3), (2**30, 3), 16)
    values = normal(2, 5, 3, seed=1, dtype=torch.float16)
    x.copy_(values[0])
    grad.copy_(values[1])
    y, dx = exact(*values)
    assert torch.equal(OPS.kelu_fwd(x), y.half())
    torch.testing.assert_close(OPS.kelu_bwd(grad, x), dx.half(), rtol=2e-3, atol=1e-6)


def test_more_than_31_bits_of_elements(monkeypatch):
    """The last program of a dense tensor of 2³¹ + 5 elements, of which the others would take hours here."""
    elements, block = 2**31 + 5, TABLE["kelu/forward/dense/16bit"]["block"]
    x, y = torch.empty(elements, dtype=torch.float16), torch.empty(elements, dtype=torch.float16)
    x[-5:] = torch.linspace(-2, 2, 5)
    program_id = InterpreterBuilder.create_get_program_id

    def last(self, axis):
        handle = program_id(self, axis)
        handle.data = handle.data + np.int32(elements // block)
        return handle

    monkeypatch.setattr(InterpreterBuilder, "create_get_program_id", last)
    kelu.dense[(1,)](None, x, y, elements, BLOCK=block, ACC=tl.float32)
    assert torch.equal(y[-5:], plain.kelu(x[-5:].double()).half())


@pytest.mark.parametrize("shape", [(0,), (0, 3, 4), (3, 0)], ids=str)
def test_nothing(shape):
    x = torch.empty(shape)
    assert OPS.kelu_fwd(x).shape == OPS.kelu_bwd(x, x).shape == x.shape


def test_gradcheck():
    x = normal(2, 3, 4, seed=1, scale=2).requires_grad_()
    call = lambda x: sk.kelu(x, backend="triton")  # noqa: E731
    assert torch.autograd.gradcheck(call, [x])
    assert torch.autograd.gradgradcheck(call, [x])
    assert torch.autograd.gradcheck(call, [x.detach().transpose(0, 2).requires_grad_()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_results_do_not_depend_on_the_batch(dtype):
    x, grad = normal(5, 37, 11, seed=1, dtype=dtype), normal(5, 37, 11, seed=2, dtype=dtype)
    y, dx = OPS.kelu_fwd(x), OPS.kelu_bwd(grad, x)
    for b in range(5):
        assert torch.equal(OPS.kelu_fwd(x[b : b + 1]), y[b : b + 1])
        assert torch.equal(OPS.kelu_bwd(grad[b : b + 1], x[b : b + 1]), dx[b : b + 1])
