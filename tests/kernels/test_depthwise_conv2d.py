"""Depthwise convolution: kernel sizes and grids, token buffers, normalise on load."""

from __future__ import annotations

import _plain as plain
import pytest
import torch
from _cases import on_backends_of
from _layouts import normal
from _numerics import DTYPES, NARROW, assert_as_exact, differentiate
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import sdp_kernels as sk
from sdp_kernels.ops.depthwise_conv2d import KERNEL_SIZES

CLOSE = {"rtol": 1e-11, "atol": 1e-11}
pytestmark = on_backends_of("depthwise_conv2d")


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (7, 7), (9, 4)], ids=str)
@pytest.mark.parametrize("k", KERNEL_SIZES)
def test_kernel_sizes_also_larger_than_the_picture(backend, k, size):
    inputs = [normal(2, 3, *size), normal(3, 1, k, k, seed=1), normal(3, seed=2)]
    grads = [normal(2, 3, *size, seed=3)]
    got = differentiate(lambda *t: sk.depthwise_conv2d(*t, backend=backend), inputs, grads)
    wanted = differentiate(plain.depthwise_conv2d, inputs, grads)
    for a, b in zip(sum(got, ()), sum(wanted, ()), strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


@pytest.mark.parametrize("k", KERNEL_SIZES)
def test_same_as_a_grouped_convolution(backend, k):
    conv = nn.Conv2d(5, 5, k, padding=k // 2, groups=5).double()
    x = normal(2, 5, 6, 8)
    y = sk.depthwise_conv2d(x, conv.weight, conv.bias, backend=backend)
    torch.testing.assert_close(y, conv(x), **CLOSE)


@pytest.mark.parametrize("registers", [0, 1, 3])
def test_token_buffer_is_the_picture_behind_the_registers(backend, registers):
    """Rows of the grid are rows of the picture: a transposed grid would differ."""
    height, width = 3, 5
    tokens, weight, bias = normal(2, registers + 15, 4), normal(4, 1, 3, 3, seed=1), normal(4, seed=2)
    y = sk.depthwise_conv2d(tokens, weight, bias, grid=(height, width), registers=registers, backend=backend)
    picture = tokens[:, registers:].transpose(1, 2).reshape(2, 4, height, width)
    wanted = sk.depthwise_conv2d(picture, weight, bias, backend=backend).flatten(2).transpose(1, 2)
    torch.testing.assert_close(y[:, registers:], wanted, **CLOSE)
    assert y.shape == tokens.shape and not y[:, :registers].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_normalise_on_load_is_the_norm_before(backend, dtype):
    x, weight = normal(2, 8, 6, dtype=dtype), normal(6, 1, 3, 3, seed=1, dtype=dtype)
    gamma, beta = normal(6, seed=2, dtype=torch.float32), normal(6, seed=3, dtype=torch.float32)
    mean = x[:, 2:].double().mean(-1)
    rstd = (x[:, 2:].double().var(-1, correction=0) + 1e-6).rsqrt()
    statistics = [nn.functional.pad(s, (2, 0)).to(torch.promote_types(dtype, torch.float32)) for s in (mean, rstd)]
    y = sk.depthwise_conv2d(
        x, weight, grid=(2, 3), registers=2, norm=sk.Norm(*statistics, gamma, beta), backend=backend
    )
    normed = sk.layer_norm_2d(x, gamma, beta, registers=2)
    wanted = sk.depthwise_conv2d(normed, weight, grid=(2, 3), registers=2, backend=backend)
    tolerance = 1e-6 if dtype == torch.float64 else 0.05
    torch.testing.assert_close(y, wanted, rtol=tolerance, atol=tolerance)
    picture = x[:, 2:].transpose(1, 2).reshape(2, 6, 2, 3)
    norm = sk.Norm(*(s[:, 2:].reshape(2, 2, 3) for s in statistics), gamma, beta)
    y_picture = sk.depthwise_conv2d(picture, weight, norm=norm, backend=backend)
    torch.testing.assert_close(y_picture.flatten(2).transpose(1, 2), y[:, 2:], rtol=1e-12, atol=1e-12)


def test_statistics_of_any_strides(backend):
    x, weight, ones = normal(2, 6, 3), normal(3, 1, 3, 3, seed=1), torch.ones(3)
    mean, rstd = torch.linspace(0, 1, 6).expand(2, 6), torch.linspace(1, 2, 12).view(6, 2).T
    got, wanted = (
        sk.depthwise_conv2d(x, weight, grid=(2, 3), norm=sk.Norm(m, r, ones, ones), backend=backend)
        for m, r in ((mean, rstd), (mean.contiguous(), rstd.contiguous()))
    )
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics_in_single_precision_or_xs_dtype(backend, dtype):
    x, weight = normal(2, 6, 3, dtype=dtype), normal(3, 1, 3, 3, seed=1, dtype=dtype)
    mean, rstd, gamma, beta = normal(2, 6, seed=2), normal(2, 6, seed=3).abs(), normal(3, seed=4), normal(3, seed=5)
    wanted = plain.depthwise_conv2d(
        (x.double() - mean[..., None]) * rstd[..., None] * gamma + beta, weight.double(), None, (2, 3)
    )
    for kept_in in (torch.float32, dtype):
        norm = sk.Norm(*(t.to(kept_in) for t in (mean, rstd, gamma, beta)))
        y = sk.depthwise_conv2d(x, weight, grid=(2, 3), norm=norm, backend=backend)
        tolerance = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(y.double(), wanted, rtol=tolerance, atol=tolerance * wanted.abs().max().item())


def test_norm_is_not_applied_to_the_padding(backend):
    """Outside the picture there are zeros, not normalised zeros."""
    x, weight = normal(1, 4, 2), torch.ones(2, 1, 3, 3, dtype=torch.float64)
    norm = sk.Norm(torch.full((1, 4), 5.0), torch.full((1, 4), 2.0), torch.ones(2), torch.full((2,), 7.0))
    y = sk.depthwise_conv2d(x, weight, grid=(2, 2), norm=norm, backend=backend)
    wanted = ((x - 5) * 2 + 7).sum(1, keepdim=True).expand_as(x)  # every output sees all four tokens once
    torch.testing.assert_close(y, wanted, **CLOSE)


@given(
    sizes=st.tuples(st.integers(0, 2), st.integers(1, 5), st.integers(1, 8), st.integers(1, 8)),
    k=st.sampled_from(KERNEL_SIZES),
    channels_last=st.booleans(),
    bias=st.booleans(),
)
def test_any_picture(backend, sizes, k, channels_last, bias):
    x = normal(*sizes)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    inputs = [x, normal(sizes[1], 1, k, k, seed=1), *([normal(sizes[1], seed=2)] if bias else [])]

    def same(x, weight, bias=None):
        return plain.depthwise_conv2d(x, weight, bias)

    def ours(x, weight, bias=None):
        return sk.depthwise_conv2d(x, weight, bias, backend=backend)

    for a, b in zip(sum(differentiate(ours, inputs), ()), sum(differentiate(same, inputs), ()), strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


# Whole and broken vectors of columns and of channels; the last goes through in several strips.
PICTURES = [(2, 32, 4, 16), (1, 37, 7, 7), (2, 20, 5, 14), (1, 16, 3, 17), (1, 18, 2, 5), (1, 16, 40, 66)]


def grouped(x, weight, bias):
    return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=len(weight))


@pytest.mark.levels
@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("size", PICTURES, ids=str)
@pytest.mark.parametrize("k", KERNEL_SIZES)
def test_as_exact_as_a_grouped_convolution(backend, k, size, layout, dtype):
    channels = size[1]
    inputs = [normal(*size, dtype=dtype).contiguous(memory_format=layout)]
    inputs += [normal(channels, 1, k, k, seed=1, dtype=dtype), normal(channels, seed=2, dtype=dtype)]
    grads = [normal(*size, seed=3, dtype=dtype).contiguous(memory_format=layout)]
    results = [
        sum(differentiate(function, tensors, grads), ())
        for function, tensors in (
            (lambda *t: sk.depthwise_conv2d(*t, backend=backend), inputs),
            (grouped, [t.double() for t in inputs]),
            (grouped, inputs),
        )
    ]
    pixels = size[0] * size[2] * size[3]
    for name, got, exact, peer in zip(("y", "dx", "dweight", "dbias"), *results, strict=True):
        assert_as_exact(name, got, exact, peer, rows=pixels if name.startswith("dw") or name == "dbias" else k * k)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_and_places_in_the_batch_give_the_same_bits(backend, dtype):
    """dweight and dbias at any number of threads, y and dx of a sample wherever it stands."""
    x, grad = normal(6, 24, 9, 11, dtype=dtype), normal(6, 24, 9, 11, seed=3, dtype=dtype)
    weight, bias = normal(24, 1, 7, 7, seed=1, dtype=dtype), normal(24, seed=2, dtype=dtype)

    def run(index):
        return sum(
            differentiate(lambda *t: sk.depthwise_conv2d(*t, backend=backend), [x[index], weight, bias], [grad[index]]),
            (),
        )

    results = []
    for threads in (1, 2, 1):
        torch.set_num_threads(threads)
        results.append(run(slice(None)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))
    turned, alone = run(torch.arange(6).flip(0)), run(slice(2, 3))
    for a, b, c in zip(results[0][:2], turned, alone):
        assert torch.equal(a, b.flip(0)) and torch.equal(a[2:3], c)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", KERNEL_SIZES)
def test_what_is_not_finite_stays_within_the_window(backend, k, dtype, value):
    """Also where products are taken in pairs: the outputs that see the value, and no other."""
    x, weight = normal(1, 3, 11, 17, dtype=dtype), normal(3, 1, k, k, seed=1, dtype=dtype)
    wanted = torch.zeros(1, 3, 11, 17, dtype=torch.bool)
    for row, column in ((4, 6), (0, 16)):
        x[0, 1, row, column] = value
        top, left = max(row - k // 2, 0), max(column - k // 2, 0)
        wanted[0, 1, top : row + k // 2 + 1, left : column + k // 2 + 1] = True
    weight[weight == 0] = 1
    for memory_format in (torch.contiguous_format, torch.channels_last):
        leaf = normal(1, 3, 11, 17, seed=2, dtype=dtype).contiguous(memory_format=memory_format).requires_grad_()
        grad = x.contiguous(memory_format=memory_format)
        y = sk.depthwise_conv2d(grad, weight, backend=backend)
        assert torch.equal(~torch.isfinite(y), wanted)
        (dx,) = torch.autograd.grad(sk.depthwise_conv2d(leaf, weight, backend=backend), leaf, grad)
        assert torch.equal(~torch.isfinite(dx), wanted)


def test_subnormal_bfloat16_counts_as_itself_or_as_zero(backend):
    """Which of the two depends on the processor; normal values beside it are not touched."""
    tiny = torch.finfo(torch.bfloat16).tiny
    x = torch.full((1, 2, 5, 6), tiny / 8, dtype=torch.bfloat16)
    x[0, 0, 2, 3] = 1.0
    y = sk.depthwise_conv2d(x, torch.ones(2, 1, 3, 3, dtype=torch.bfloat16), backend=backend)
    wanted = F.conv2d(x.double(), torch.ones(2, 1, 3, 3, dtype=torch.float64), padding=1, groups=2)
    assert ((y.double() - wanted).abs() <= 9 * tiny / 8).all() and (y[0, 0, 1:4, 2:5] == 1).all()


def test_module(backend):
    module = sk.DepthwiseConv2d(6, 5, backend=backend)
    assert module.weight.shape == (6, 1, 5, 5) and not module.bias.any()
    x = normal(2, 6, 4, 4, dtype=torch.float32)
    assert torch.equal(module(x), sk.depthwise_conv2d(x, module.weight, module.bias, backend=backend))
    tokens = normal(2, 9, 6, dtype=torch.float32)
    wanted = sk.depthwise_conv2d(tokens, module.weight, module.bias, grid=(2, 4), registers=1, backend=backend)
    assert torch.equal(module(tokens, grid=(2, 4), registers=1), wanted)
    assert sk.DepthwiseConv2d(6, bias=False).bias is None
