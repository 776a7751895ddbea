"""The CPU's own GEMMs: values at awkward sizes, any strides, what they don't depend on, who is asked instead."""

from __future__ import annotations

import pytest
import torch
from _cases import conv_mlp_shapes, convnext_shapes, feed_forward_shapes
from _layouts import hostile, normal
from torch import Tensor
from torch.nn import functional as F

import sdp_kernels as sk
from sdp_kernels.backends import BACKENDS

OPS = torch.ops.sdp_kernels_cpp
BF16, FP32 = torch.bfloat16, torch.float32
SHAPES = [(1, 1, 2, 2), (1, 7, 6, 4), (2, 9, 34, 18), (2, 50, 64, 48), (3, 11, 66, 50), (1, 5, 98, 130), (0, 5, 8, 8)]
"""(B, T, in, out): rows around a tile's 8, columns around a vector's 16 and a panel's 48, sums around 32."""
ODD = [(1, 1, 1, 1), (2, 9, 33, 17), (1, 5, 97, 131)]
"""For dtypes that are not multiplied in pairs."""
LONG = (2, 3500, 6, 10)
"""More rows than a weight gradient sums at once."""
DTYPES = sorted(BACKENDS["cpu"].multiplies, key=str)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_case = pytest.mark.parametrize(
    ("dtype", "shape"), [(d, shape) for d in DTYPES for shape in SHAPES + (ODD if d == FP32 else [])], ids=str
)


def assert_rounded(got: Tensor, exact: Tensor) -> None:
    """Within one rounding to got's dtype, and fp32 sums', of the largest value."""
    assert got.shape == exact.shape
    if exact.numel():
        allowed = torch.finfo(got.dtype).eps * 0.51 + (1e-5 if got.dtype == BF16 else 2e-6)
        assert (got.double() - exact).abs().max() <= allowed * exact.abs().max()


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None, **epilogue) -> tuple[Tensor, Tensor]:
    o = {"activation": "none", "layer_scale": None, "path_mask": None, "residual": None, "registers": 0, "keep": True}
    o |= epilogue
    return OPS.linear_gemm_fwd(
        x, weight, bias, o["activation"], o["layer_scale"], o["path_mask"], o["residual"], o["registers"], 0.0, None, 0,
        o["keep"],
    )  # fmt: skip


def made(dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    return [normal(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate(shapes)]


@every_case
def test_products_are_rounded_once(dtype, shape):
    batch, tokens, inputs, outputs = shape
    x, weight, bias, d = made(dtype, (*shape[:3],), (outputs, inputs), (outputs,), (batch, tokens, outputs))
    wanted = F.linear(x.double(), weight.double(), bias.double())
    y, z = product(x, weight, bias)
    assert_rounded(y, wanted)
    assert z.numel() == 0
    y, z = product(x, weight, bias, activation="gelu")
    assert_rounded(z, wanted)
    assert_rounded(y, F.gelu(z.double()))
    assert_rounded(OPS.linear_gemm_dgrad(d, weight), d.double() @ weight.double())
    wanted = d.double().flatten(0, 1).t() @ x.double().flatten(0, 1)
    for wide in (False, True):
        assert_rounded(dweight := OPS.linear_gemm_wgrad(d, x, wide), wanted)
        assert dweight.dtype == (FP32 if wide else dtype)


@every_dtype
def test_long_sums_are_as_exact_as_pytorchs(dtype):
    """Of rows, which are summed in parts, and of columns, which are one chain."""
    for tokens, inputs in ((3500, 64), (64, 3000)):
        x, d, weight = made(dtype, (2, tokens, inputs), (2, tokens, 48), (48, inputs))
        rows, columns = x.flatten(0, 1), d.flatten(0, 1).t()
        pairs = [(product(x, weight)[0], F.linear(x, weight), F.linear(x.double(), weight.double()))]
        pairs.append((OPS.linear_gemm_wgrad(d, x, False), columns @ rows, columns.double() @ rows.double()))
        for got, theirs, exact in pairs:
            error = (got.double() - exact).abs().max()
            assert error <= 2 * (theirs.double() - exact).abs().max() + torch.finfo(dtype).eps * exact.abs().max()


@every_case
@pytest.mark.parametrize("wide_residual", [False, True], ids=["residual", "fp32 residual"])
def test_epilogue_is_the_pass_behind_the_product(dtype, shape, wide_residual):
    """The pass itself is tested with the operator; here it finds its rows, and drops what it must."""
    batch, tokens, inputs, outputs = shape
    x, weight, scale = made(dtype, (*shape[:3],), (outputs, inputs), (outputs,))
    residual = normal(batch, tokens, outputs, seed=3, dtype=FP32 if wide_residual else dtype)
    mask = torch.arange(batch, dtype=FP32)
    rest = (scale, mask, residual, min(1, tokens - 1))
    z = product(x, weight)[0]
    wanted = OPS.linear_epilogue_fwd(z, "kelu", *rest, 0.0, None, 0)
    names = dict(zip(("layer_scale", "path_mask", "residual", "registers"), rest))
    for keep in (True, False):
        y, kept = product(x, weight, activation="kelu", keep=keep, **names)
        assert torch.equal(y, wanted)
        assert torch.equal(kept, z) if keep else kept.numel() == 0


@every_case
def test_backward_through_the_activation(dtype, shape):
    batch, tokens, inputs, outputs = shape
    registers = min(2, tokens - 1)
    d, weight, z = made(dtype, (batch, tokens, outputs), (outputs, inputs), (*shape[:3],))
    z[:, :registers] = float("nan")
    d[:, :registers] = float("nan")
    dz, h, dbias = OPS.linear_gemm_bwd(d, weight, z, "gelu", registers)
    image = z[:, registers:].double().requires_grad_()
    value = F.gelu(image)
    (slope,) = torch.autograd.grad(value.sum(), image)
    exact = (d[:, registers:].double() @ weight.double()) * slope
    assert_rounded(dz[:, registers:], exact)
    assert_rounded(h[:, registers:], value.detach())
    assert_rounded(dbias, exact.sum((0, 1)))
    assert not dz[:, :registers].any() and not h[:, :registers].any()


@every_dtype
def test_inputs_of_any_strides(dtype):
    x, weight, d = made(dtype, (2, 9, 34), (18, 34), (2, 9, 18))
    for odd_x, odd_d in zip(hostile(x).values(), hostile(d).values()):
        assert torch.equal(product(odd_x, weight.t().contiguous().t())[0], product(odd_x.contiguous(), weight)[0])
        assert torch.equal(OPS.linear_gemm_dgrad(odd_d, weight), OPS.linear_gemm_dgrad(odd_d.contiguous(), weight))
        wanted = OPS.linear_gemm_wgrad(odd_d.contiguous(), odd_x.contiguous(), False)
        assert torch.equal(OPS.linear_gemm_wgrad(odd_d, odd_x, False), wanted)


@every_dtype
def test_a_row_depends_on_itself_alone(dtype):
    x, weight, d = made(dtype, (3, 37, 70), (52, 70), (3, 37, 52))
    y, dx = product(x, weight)[0], OPS.linear_gemm_dgrad(d, weight)
    for part in (x[:1, :1], x[1:2, 5:30], x[2:]):
        rows = part.storage_offset() // x.shape[2]
        got = product(part, weight)[0].flatten(0, 1)
        assert torch.equal(got, y.flatten(0, 1)[rows : rows + len(got)])
    assert torch.equal(OPS.linear_gemm_dgrad(d[1:2], weight), dx[1:2])
    x[0, 3] = float("nan")
    again = product(x, weight)[0]
    assert again[0, 3].isnan().all()
    assert torch.equal(again.flatten(0, 1)[4:], y.flatten(0, 1)[4:])


@every_dtype
def test_weight_gradients_are_the_same_at_any_thread_count(dtype):
    for shape in (LONG, (2, 400, 150, 200)):
        batch, tokens, inputs, outputs = shape
        d, x, weight, z = made(
            dtype, (batch, tokens, outputs), (batch, tokens, inputs), (outputs, inputs), (batch, tokens, inputs)
        )
        found, before = [], torch.get_num_threads()
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                found.append([OPS.linear_gemm_wgrad(d, x, False), OPS.linear_gemm_wgrad(d, x, True)])
                found[-1].extend(OPS.linear_gemm_bwd(d, weight, z, "kelu", 0))
        finally:
            torch.set_num_threads(before)
        for others in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], others))


@every_dtype
def test_fakes_and_schemas(dtype):
    x, weight, d = made(dtype, (2, 9, 34), (18, 34), (2, 9, 18))
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(OPS.linear_gemm_dgrad.default, (d, weight), test_utils=checks)
    for wide in (False, True):
        torch.library.opcheck(OPS.linear_gemm_wgrad.default, (d, x, wide), test_utils=checks)
    torch.library.opcheck(OPS.linear_gemm_bwd.default, (d, weight, x, "gelu", 1), test_utils=checks)
    for residual in (None, normal(2, 9, 18, dtype=FP32)):
        rest = (None, "gelu", None, None, residual, 1, 0.0, None, 0, True)
        torch.library.opcheck(OPS.linear_gemm_fwd.default, (x, weight, *rest), test_utils=checks)


@every_dtype
def test_the_plain_product_is_twice_differentiable(dtype):
    x, weight, bias = (t.requires_grad_() for t in made(dtype, (2, 9, 34), (18, 34), (18,)))
    seen = []
    for form in (sk.linear, F.linear):
        first = torch.autograd.grad(form(x, weight, bias).float().square().sum(), (x, weight, bias), create_graph=True)
        seen.append(torch.autograd.grad(sum(g.float().square().sum() for g in first), (x, weight, bias)))
    tolerance = 5e-2 if dtype == BF16 else 1e-5
    for got, wanted in zip(*seen):
        torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance * float(wanted.detach().abs().max()))
    with pytest.raises(RuntimeError, match="not twice differentiable"):
        torch.autograd.grad(sk.linear(x, weight, activation="relu").sum(), x, create_graph=True)


BLOCKS = {
    "conv_mlp": (conv_mlp_shapes, lambda x, *w: sk.conv_mlp(x, sk.ConvMLPWeights(*w), grid=(2, 4), activation="none")),
    "convnext_block": (
        convnext_shapes,
        lambda x, *w: sk.convnext_block(x, sk.ConvNeXtWeights(*w), grid=(2, 4), activation="none"),
    ),
    "feed_forward": (
        feed_forward_shapes,
        lambda x, *w: sk.feed_forward(x, sk.FeedForwardWeights(*w), activation="none"),
    ),
}


@every_dtype
@pytest.mark.parametrize(("shapes", "block"), BLOCKS.values(), ids=BLOCKS)
def test_blocks_without_an_activation(shapes, block, dtype):
    """Between two layers the first one's result is then all that backward needs, and there is no pre-activation."""
    x, *weights = (t.requires_grad_() for t in made(dtype, (2, 8, 16), *shapes(16, 32)))
    seen = []
    for backend in (None, "reference"):
        with sk.use_backend(backend):
            y = block(x, *weights)
            seen.append((y, *torch.autograd.grad(y.float().square().sum(), (x, *weights))))
    tolerance = 6e-2 if dtype == BF16 else 1e-5
    for got, wanted in zip(*seen):
        torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance * float(wanted.detach().abs().max()))


def test_what_it_cannot_do_is_the_vendors(monkeypatch):
    """An odd number of pairs, and other dtypes: the operator asks PyTorch; the kernel itself says so."""
    cpu = BACKENDS["cpu"]
    even, odd = made(BF16, (4, 6), (5, 7))
    monkeypatch.setattr(cpu, "multiplies", frozenset({BF16, FP32}))
    assert cpu.prefers("linear_gemm_fwd", even, even) and not cpu.prefers("linear_gemm_fwd", odd, odd)
    assert cpu.prefers("linear_gemm_dgrad", even, even) and not cpu.prefers("linear_gemm_dgrad", odd, odd)
    assert cpu.prefers("linear_gemm_wgrad", odd, odd) and cpu.prefers("linear_gemm_fwd", odd.float(), odd.float())
    assert not cpu.prefers("linear_gemm_fwd", even.half(), even.half())
    x = normal(2, 3, 7, seed=1, dtype=BF16)
    assert_rounded(sk.linear(x, odd, activation="relu"), F.relu(F.linear(x.double(), odd.double())))
    if BF16 in DTYPES:
        with pytest.raises(RuntimeError, match="even number"):
            product(x, odd)
    with pytest.raises(RuntimeError, match="not for this dtype"):
        product(x.half(), odd.half())
    monkeypatch.setattr(cpu, "multiplies", frozenset())
    assert not cpu.prefers("linear_gemm_fwd", even, even)
    assert cpu.prefers("linear_gemm_bwd", even, even)


@every_dtype
def test_factors_that_do_not_fit_are_refused(dtype):
    """Before anything is read that is not there."""
    x, d, weight = made(dtype, (2, 3, 6), (2, 3, 4), (4, 6))
    other = weight.to(FP32 if dtype == BF16 else BF16)
    for w in (weight[:2, :2].contiguous(), other):
        with pytest.raises(RuntimeError, match="linear's own GEMM"):
            product(x, w)
        with pytest.raises(RuntimeError, match="linear's own GEMM"):
            OPS.linear_gemm_dgrad(d, w)
        with pytest.raises(RuntimeError, match="linear's own GEMM"):
            OPS.linear_gemm_bwd(d, w, x, "gelu", 0)
    for badly in (d.to(other.dtype), d[:, :2]):
        with pytest.raises(RuntimeError, match="linear"):
            OPS.linear_gemm_wgrad(badly, x, False)
    for badly in (x[..., :4], x[:, :2]):
        with pytest.raises(RuntimeError, match="z must be as d·weight"):
            OPS.linear_gemm_bwd(d, weight, badly.contiguous(), "gelu", 0)


def test_plain_linear_under_autocast_uses_it(monkeypatch):
    called = []
    monkeypatch.setattr(BACKENDS["cpu"], "prefers", lambda kernel, x, weight: called.append((kernel, x.dtype)) or False)
    x, weight = made(FP32, (2, 3, 4), (6, 4))
    with torch.autocast("cpu", BF16):
        y = sk.linear(x, weight)
    assert called == [("linear_gemm_fwd", BF16)]
    assert y.dtype == BF16
