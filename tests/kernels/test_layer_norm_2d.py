"""LayerNorm2d: accuracy over channel counts and layouts, statistics, residual add, determinism."""

from __future__ import annotations

import _plain as plain
import pytest
import torch
from _cases import backend_params, on_backends_of
from _layouts import layouts, normal
from _numerics import DTYPES, NARROW, assert_as_exact, differentiate, unit_of_sums
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import sdp_kernels as sk

pytestmark = pytest.mark.levels
on_kernels = pytest.mark.parametrize(
    "backend", [p for p in backend_params("layer_norm_2d") if p.values != ("reference",)]
)


def parameters(channels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return (normal(channels, seed=7) * 0.5 + 1).bfloat16().to(dtype), normal(channels, seed=8, dtype=dtype)


def check(backend, x, weight, bias, residual=None, registers=0, eps=1e-6):
    """Outputs and gradients against fp64, PyTorch's own LayerNorm in x's dtype being the peer."""
    inputs = [x, weight, bias] + ([] if residual is None else [residual])

    def ours(x, weight, bias, residual=None):
        return sk.layer_norm_2d(x, weight, bias, eps, residual=residual, registers=registers, backend=backend)

    def same(x, weight, bias, residual=None):
        total = x if residual is None else x + residual
        y = plain.layer_norm_2d(total, weight, bias, eps, registers)
        return y if residual is None else (total, y)

    grads = [normal(*x.shape, seed=20 + i) for i in range(1 if residual is None else 2)]
    outputs, gradients = differentiate(ours, inputs, grads)
    exact, exact_gradients = differentiate(same, [t.double() for t in inputs], grads)
    peer, peer_gradients = differentiate(same, inputs, grads)
    assert all(y.dtype == x.dtype for y in outputs)
    # x is known to eps · |x| only, which the division by the standard deviation magnifies.
    total = (x if residual is None else x + residual).detach().double()
    channel_dim = 1 if x.dim() == 4 else 2
    rstd = (total.var(channel_dim, correction=0) + eps).rsqrt().max().item()
    unit_error = 8 * unit_of_sums(x.dtype) * total.abs().max().item() * rstd
    w, g = weight.abs().max().item(), max(g.abs().max().item() for g in grads)
    pixels = x.numel() // weight.numel()
    for i, values in enumerate(zip(outputs, exact, peer, strict=True)):
        assert_as_exact(f"output {i}", *values, rows=weight.numel(), slack=w * unit_error)
    slacks = [w * g * rstd * max(unit_error, 8 * unit_of_sums(x.dtype)), g * pixels**0.5 * unit_error, 0.0]
    for i, values in enumerate(zip(gradients, exact_gradients, peer_gradients, strict=True)):
        rows = pixels if i in (1, 2) else weight.numel()
        assert_as_exact(f"gradient of input {i}", *values, rows=rows, slack=slacks[i % 3])


@pytest.mark.parametrize("channels", [1, 2, 3, 7, 8, 16, 17, 33, 96, 250])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@on_backends_of("layer_norm_2d")
def test_channels_and_pictures(backend, dtype, channels):
    for height, width in ((1, 1), (7, 7), (5, 13)):
        x = normal(2, channels, height, width, dtype=dtype)
        for memory_format in (torch.contiguous_format, torch.channels_last):
            check(backend, x.contiguous(memory_format=memory_format), *parameters(channels, dtype))


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "tokens"])
@pytest.mark.parametrize("backend", backend_params("layer_norm_2d"))
def test_many_channels(backend, dtype, layout):
    channels = 8192
    x = normal(1, channels, 3, 2, dtype=dtype)
    x = x.flatten(2).transpose(1, 2).contiguous() if layout == "tokens" else x
    x = x.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else x
    check(backend, x, *parameters(channels, dtype))


@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 9), st.integers(1, 9)),
    layout=st.sampled_from(
        ["contiguous", "channels_last", "gaps", "slice of dimension 1", "batch last", "image rows of tokens", "swapped"]
    ),
    dtype=st.sampled_from(DTYPES),
    residual_layout=st.sampled_from([None, "contiguous", "channels_last", "gaps"]),
)
@pytest.mark.parametrize("backend", backend_params("layer_norm_2d"))
def test_any_picture(backend, sizes, layout, dtype, residual_layout):
    x = layouts(normal(*sizes, dtype=dtype))[layout]
    residual = None if residual_layout is None else layouts(normal(*sizes, seed=3, dtype=dtype))[residual_layout]
    check(backend, x, *parameters(sizes[1], dtype), residual)


@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 12), st.integers(1, 40)),
    layout=st.sampled_from(["contiguous", "gaps", "slice of dimension 1", "swapped", "batch last"]),
    dtype=st.sampled_from(DTYPES),
    registers=st.integers(0, 12),
    residual=st.booleans(),
)
@pytest.mark.parametrize("backend", backend_params("layer_norm_2d"))
def test_any_token_buffer(backend, sizes, layout, dtype, registers, residual):
    x = layouts(normal(*sizes, dtype=dtype))[layout]
    residual = normal(*sizes, seed=3, dtype=dtype) if residual else None
    check(backend, x, *parameters(sizes[2], dtype), residual, registers=min(registers, sizes[1]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@on_backends_of("layer_norm_2d")
def test_single_precision_parameters(backend, dtype):
    weight, bias = parameters(24, torch.float32)
    check(backend, normal(2, 24, 4, 5, dtype=dtype), weight, bias)
    check(backend, normal(2, 9, 24, dtype=dtype), weight, bias, registers=2)
    x = normal(2, 9, 24, dtype=dtype)
    _, (dx, dweight, dbias) = differentiate(lambda *t: sk.layer_norm_2d(*t, backend=backend), [x, weight, bias])
    assert (dx.dtype, dweight.dtype, dbias.dtype) == (dtype, torch.float32, torch.float32)


@pytest.mark.parametrize("shape", [(2, 64, 6, 6), (2, 36, 64)], ids=["picture", "tokens"])
@on_backends_of("layer_norm_2d")
def test_large_mean_costs_no_variance(backend, shape):
    """The variance is that of the centred values; E[x²] − E[x]² would be lost at a mean of 1000."""
    x = normal(*shape, dtype=torch.float32) + 1000
    check(backend, x, *parameters(64, torch.float32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@on_backends_of("layer_norm_2d")
def test_constant_channels_give_the_bias(backend, dtype):
    weight, bias = parameters(12, dtype)
    x = torch.full((2, 12, 3, 3), 0.5, dtype=dtype)
    grad = normal(*x.shape, dtype=dtype)
    (y,), gradients = differentiate(lambda *t: sk.layer_norm_2d(*t, 1e-3, backend=backend), [x, weight, bias], [grad])
    assert torch.equal(y, bias.view(-1, 1, 1).expand_as(y))
    assert all(g.isfinite().all() for g in gradients) and not gradients[1].any()


@pytest.mark.parametrize("eps", [1e-12, 1e-5, 0.1, 10])
@on_backends_of("layer_norm_2d")
def test_eps_is_used(backend, eps):
    check(backend, normal(2, 6, 3, 3, dtype=torch.float32), *parameters(6, torch.float32), eps=eps)
    check(backend, normal(2, 9, 6, dtype=torch.float32), *parameters(6, torch.float32), registers=1, eps=eps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@on_backends_of("layer_norm_2d")
def test_sum_is_the_rounded_sum_and_what_is_normalised(backend, dtype):
    weight, bias = parameters(10, dtype)
    for x, residual, registers in (
        (normal(2, 10, 4, 5, dtype=dtype), normal(2, 10, 4, 5, seed=1, dtype=dtype), 0),
        (normal(2, 7, 10, dtype=dtype), normal(2, 7, 10, seed=1, dtype=dtype), 3),
    ):
        total, y = sk.layer_norm_2d(x, weight, bias, residual=residual, registers=registers, backend=backend)
        assert torch.equal(total, x + residual)
        assert torch.equal(y, sk.layer_norm_2d(total, weight, bias, registers=registers, backend=backend))


@on_backends_of("layer_norm_2d")
def test_one_output_of_two_used(backend):
    """Only the sum, or only the norm, has a gradient."""
    inputs = [normal(2, 10, 4, 5), *parameters(10, torch.float64), normal(2, 10, 4, 5, seed=1)]
    for used in (0, 1):
        leaves = [t.clone().requires_grad_() for t in inputs]
        x, weight, bias, residual = leaves
        out = sk.layer_norm_2d(x, weight, bias, residual=residual, backend=backend)
        got = torch.autograd.grad((out[used] ** 3).sum(), leaves, allow_unused=True)
        total = x + residual
        same = (total, plain.layer_norm_2d(total, weight, bias, 1e-6))
        wanted = torch.autograd.grad((same[used] ** 3).sum(), leaves, allow_unused=True)
        for a, b, leaf in zip(got, wanted, leaves, strict=True):
            a, b = (torch.zeros_like(leaf) if g is None else g for g in (a, b))
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


def outputs_and_gradients(backend, x, dtype, residual, registers=0):
    channels = x.shape[1] if x.dim() == 4 else x.shape[2]
    grads = [
        torch.stack([normal(*x.shape[1:], seed=30 + i + int(s), dtype=dtype) for s in range(len(x))]) for i in range(2)
    ]

    def ours(x, weight, bias, residual):
        return sk.layer_norm_2d(x, weight, bias, residual=residual, registers=registers, backend=backend)

    return differentiate(ours, [x, *parameters(channels, dtype), residual], grads)


SHAPES = {"contiguous": (6, 24, 9, 11), "channels_last": (6, 24, 9, 11), "tokens": (6, 99, 24), "1x1": (70, 24, 1, 1)}


def samples(layout, dtype, seed=0):
    shape = SHAPES[layout]
    x = torch.stack([normal(*shape[1:], seed=seed + s, dtype=dtype) for s in range(shape[0])])
    return x.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else x


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", SHAPES)
@on_kernels
def test_threads_and_repeats_give_the_same_bits(backend, layout, dtype):
    """All of dweight's and dbias's bits too; with 2 threads the work really is split (over 16,384 elements)."""
    x = samples(layout, dtype).repeat(6, *[1] * (len(SHAPES[layout]) - 1))
    residual = x.flip(0)
    results = []
    for threads in (1, 2, 1, 2):
        torch.set_num_threads(threads)
        results.append(sum(outputs_and_gradients(backend, x, dtype, residual), ()))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", SHAPES)
@on_kernels
def test_sample_does_not_see_its_batch(backend, layout, dtype):
    """Outputs and dx of a sample are the same bits alone, in a batch, and elsewhere in a batch."""
    x, residual = samples(layout, dtype), samples(layout, dtype, seed=500)
    weight, bias = parameters(24, dtype)
    grads = [samples(layout, dtype, seed=600), samples(layout, dtype, seed=700)]

    def at(index):
        def ours(x, residual):
            return sk.layer_norm_2d(x, weight, bias, residual=residual, backend=backend)

        return sum(differentiate(ours, [x[index], residual[index]], [g[index] for g in grads]), ())

    whole, turned, alone = at(slice(None)), at(torch.arange(len(x)).flip(0)), at(slice(2, 3))
    for a, b, c in zip(whole, turned, alone, strict=True):
        assert torch.equal(a, b.flip(0)) and torch.equal(a[2:3], c)


@on_backends_of("layer_norm_2d")
def test_autocast_computes_in_fp32_and_keeps_the_dtype(backend):
    weight, bias = parameters(12, torch.float32)
    for dtype in DTYPES:
        x = normal(2, 12, 3, 4, dtype=dtype)
        plain_run = differentiate(lambda *t: sk.layer_norm_2d(*t, backend=backend), [x, weight, bias])
        with torch.autocast("cpu", torch.bfloat16):
            outputs, gradients = differentiate(lambda *t: sk.layer_norm_2d(*t, backend=backend), [x, weight, bias])
        assert outputs[0].dtype == dtype and gradients[1].dtype == torch.float32
        assert all(torch.equal(a, b) for a, b in zip((*outputs, *gradients), sum(plain_run, ()), strict=True))


def test_module():
    x = normal(2, 6, 3, 4, dtype=torch.float32)
    module = sk.LayerNorm2d(6, eps=1e-3, registers=2)
    assert torch.equal(module.weight, torch.ones(6)) and torch.equal(module.bias, torch.zeros(6))
    assert torch.equal(module(x), sk.layer_norm_2d(x, module.weight, module.bias, 1e-3))
    tokens = normal(2, 5, 6, dtype=torch.float32)
    assert torch.equal(module(tokens), sk.layer_norm_2d(tokens, module.weight, module.bias, 1e-3, registers=2))
    assert not module(tokens)[:, :2].any()


@on_backends_of("layer_norm_2d")
@pytest.mark.parametrize("shape", [(2, 7, 5), (2, 5, 3, 4)], ids=["tokens", "picture"])
def test_with_input_joins_the_gradients(backend, shape):
    """The same numbers as x beside the norm, both gradients of x in one; the second derivative too."""
    x, grads = normal(*shape), [normal(*shape, seed=i) for i in (3, 4)]
    weight, bias = normal(5, seed=1), normal(5, seed=2)

    def together(x, *p):
        return sk.layer_norm_2d(x, *p, 1e-6, with_input=True, backend=backend)

    def apart(x, *p):
        return x, sk.layer_norm_2d(x, *p, 1e-6, backend=backend)

    got, wanted = (differentiate(f, [x, weight, bias], grads) for f in (together, apart))
    assert torch.equal(got[0][0], x)
    for a, b in zip(sum(got, ()), sum(wanted, ()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
    leaves = [t.requires_grad_() for t in (x[:1].clone(), weight, bias)]
    assert torch.autograd.gradgradcheck(together, leaves, fast_mode=True)
    with pytest.raises(ValueError, match="with_input"):
        sk.layer_norm_2d(x, weight, bias, residual=x, with_input=True, backend=backend)
