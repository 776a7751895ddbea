"""KeLü's CUDA kernels in the emulator."""

from __future__ import annotations

import pytest
import simt_emulator as emulator
import simt_kelu as kernels
import torch

pytestmark = pytest.mark.proof("emulator")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
A = 3.5


def value(x):
    """f in fp64, by the definition."""
    inside = x / 2 * (1 + x / A + torch.sin(torch.pi * x / A) / torch.pi)
    return torch.where(x < -A, 0.0, torch.where(x > A, x, inside))


def slope(x):
    """f′ in fp64."""
    u = torch.pi * x / A
    inside = (1 + 2 * x / A + torch.sin(u) / torch.pi + x / A * torch.cos(u)) / 2
    return torch.where(x < -A, 0.0, torch.where(x > A, 1.0, inside))


def error_in_ulps(got, wanted):
    """Distance in units in the last place of got's dtype at the wanted value."""
    info = torch.finfo(got.dtype)
    digits = torch.floor(torch.log2(wanted.abs().clamp_min(info.tiny)))
    return ((got.double() - wanted).abs() / (info.eps * torch.exp2(digits))).max().item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_every_16_bit_number(dtype):
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    x = x[torch.isfinite(x)]
    one = torch.ones_like(x)
    # Near −3.5 f is next to nothing, and fp64 by the definition has lost its digits: left out.
    wanted, wanted_slope = value(x.double()), slope(x.double())
    normal = wanted.abs() > 1e-10
    assert error_in_ulps(kernels.kelu(x)[normal], wanted[normal]) <= 1
    normal = wanted_slope.abs() > 1e-10
    assert error_in_ulps(kernels.kelu(x, one)[normal], wanted_slope[normal]) <= 1


def test_single_precision():
    x = torch.linspace(-4, 4, 100_001)
    assert (kernels.kelu(x).double() - value(x.double())).abs().max() <= 2e-7
    assert (kernels.kelu(x, torch.ones_like(x)).double() - slope(x.double())).abs().max() <= 2e-7


@dtypes
@pytest.mark.parametrize("count", [1, 3, 8, 1023, 4096, 8192, 8193, 20_000])
def test_any_length_and_alignment(count, dtype):
    generator = torch.Generator().manual_seed(count)
    values, grads = (torch.randn(count, generator=generator).mul(2).to(dtype) for _ in range(2))
    aligned = kernels.kelu(emulator.guarded(values).view), kernels.kelu(values, emulator.guarded(grads).view)
    shifted = emulator.guarded(values, shift=1).view, emulator.guarded(grads, shift=1).view
    assert torch.equal(kernels.kelu(shifted[0]), aligned[0])
    assert torch.equal(kernels.kelu(shifted[0], shifted[1]), aligned[1])
    wanted = value(values.double())
    assert (aligned[0].double() - wanted).abs().max() <= 0.51 * torch.finfo(dtype).eps * wanted.abs().max() + 2e-7


@dtypes
def test_any_strides(dtype):
    base = torch.randn(3, 6, 5, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    grad = torch.randn(1, 6, 1, 1, generator=torch.Generator().manual_seed(1)).to(dtype)
    for x in (base[:, ::2, :, 1::3], base.transpose(1, 3), base[1:, :, 2], base.expand(2, 3, 6, 5, 8)):
        wanted = kernels.kelu(x.contiguous())
        assert torch.equal(kernels.kelu(emulator.guarded(x).view), wanted)
    x, down = base.transpose(1, 2), grad.expand(base.shape).transpose(1, 2)
    wanted = kernels.kelu(x.contiguous(), down.contiguous())
    for out in (torch.empty_like(x), torch.empty(x.shape, dtype=dtype), base.new_empty(3, 5, 6, 16)[..., ::2]):
        for more in (down, down.contiguous()):
            assert torch.equal(kernels.kelu(x, more, out), wanted)


@pytest.mark.parametrize("order", emulator.ORDERS)
def test_same_in_every_order(order):
    x = torch.linspace(-4, 4, 9001).bfloat16()
    emulator.schedule("kelu", x.dtype)
    wanted = kernels.kelu(x), kernels.kelu(x[::2], x[::2])
    emulator.schedule("kelu", x.dtype, order, 99)
    got = kernels.kelu(x), kernels.kelu(x[::2], x[::2])
    emulator.schedule("kelu", x.dtype)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted))


def test_not_a_number_passes_through():
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0])
    y, dx = kernels.kelu(x), kernels.kelu(x, torch.ones(4))
    assert y[0].isnan() and dx[0].isnan()
    assert y[1:].tolist() == [float("inf"), 0.0, 0.0] and dx[1:3].tolist() == [1.0, 0.0]
    assert abs(dx[3].item() - 0.5) <= 2e-7


def test_offsets_beyond_31_bits():
    far = 2**31
    base = torch.empty(far + 4096, dtype=torch.bfloat16)
    x = base.as_strided((2, 100), (far, 1)).copy_(torch.randn(2, 100))
    assert torch.equal(kernels.kelu(x), kernels.kelu(x.clone()))


class _Emulated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return kernels.kelu(x)

    @staticmethod
    def backward(ctx, grad):
        return kernels.kelu(ctx.saved_tensors[0], grad)


def test_gradcheck():
    x = torch.linspace(-4.1, 4.1, 60, dtype=torch.float64).view(3, 20)
    for view in (x, x[:, ::3], x.t()):
        assert torch.autograd.gradcheck(_Emulated.apply, [view.detach().clone().requires_grad_()])
