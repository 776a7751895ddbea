"""The CPU's own bf16 GEMMs: values at awkward sizes, any strides, what they don't depend on, who is asked instead."""

from __future__ import annotations

import pytest
import torch
from _layouts import hostile, normal
from torch import Tensor
from torch.nn import functional as F

import sdp_kernels as sk
from sdp_kernels.backends import BACKENDS

OPS = torch.ops.sdp_kernels_cpp
BF16 = torch.bfloat16
SHAPES = [(1, 1, 2, 2), (1, 7, 6, 4), (2, 9, 34, 18), (2, 50, 64, 48), (3, 11, 66, 50), (1, 5, 98, 130), (0, 5, 8, 8)]
"""(B, T, in, out): rows around a tile's 8, columns around a vector's 16 and a panel's 48, sums around 32."""
LONG = (2, 3500, 6, 10)
"""More rows than a weight gradient sums at once."""


def bf16(*shape: int, seed: int) -> Tensor:
    return normal(*shape, seed=seed, dtype=BF16)


def assert_rounded(got: Tensor, exact: Tensor, roundings: int = 1) -> None:
    """Within so many roundings to got's dtype, and fp32 sums', of the largest value."""
    assert got.shape == exact.shape
    if exact.numel():
        scale = exact.abs().max()
        allowed = roundings * torch.finfo(got.dtype).eps * 0.51 + 1e-5
        assert (got.double() - exact).abs().max() <= allowed * scale


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None, **epilogue) -> tuple[Tensor, Tensor]:
    o = {"activation": "none", "layer_scale": None, "path_mask": None, "residual": None, "registers": 0, "keep": True}
    o |= epilogue
    return OPS.linear_gemm_fwd(
        x, weight, bias, o["activation"], o["layer_scale"], o["path_mask"], o["residual"], o["registers"], 0.0, None, 0,
        o["keep"],
    )  # fmt: skip


@pytest.mark.parametrize("shape", [*SHAPES, LONG], ids=str)
def test_products_are_rounded_once(shape):
    batch, tokens, inputs, outputs = shape
    x, weight = bf16(batch, tokens, inputs, seed=0), bf16(outputs, inputs, seed=1)
    bias, d = bf16(outputs, seed=2), bf16(batch, tokens, outputs, seed=3)
    wanted = F.linear(x.double(), weight.double(), bias.double())
    y, z = product(x, weight, bias)
    assert_rounded(y, wanted)
    assert z.numel() == 0
    y, z = product(x, weight, bias, activation="gelu")
    assert_rounded(z, wanted)
    assert_rounded(y, F.gelu(z.double()))
    assert_rounded(OPS.linear_gemm_dgrad(d, weight), d.double() @ weight.double())
    assert_rounded(OPS.linear_gemm_wgrad(d, x), d.double().flatten(0, 1).t() @ x.double().flatten(0, 1))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("residual_dtype", [BF16, torch.float32], ids=str)
def test_epilogue_is_the_pass_behind_the_vendors_gemm(shape, residual_dtype):
    """The pass itself is tested with the operator; here it finds its rows, and drops what it must."""
    batch, tokens, inputs, outputs = shape
    x, weight, scale = bf16(batch, tokens, inputs, seed=0), bf16(outputs, inputs, seed=1), bf16(outputs, seed=2)
    residual = normal(batch, tokens, outputs, seed=3, dtype=residual_dtype)
    mask = torch.arange(batch, dtype=torch.float32)
    rest = (scale, mask, residual, min(1, tokens - 1))
    z = product(x, weight)[0]
    wanted = OPS.linear_epilogue_fwd(z, "kelu", *rest, 0.0, None, 0)
    names = dict(zip(("layer_scale", "path_mask", "residual", "registers"), rest))
    for keep in (True, False):
        y, kept = product(x, weight, activation="kelu", keep=keep, **names)
        assert torch.equal(y, wanted)
        assert torch.equal(kept, z) if keep else kept.numel() == 0


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_backward_through_the_activation(shape):
    batch, tokens, inputs, outputs = shape
    registers = min(2, tokens - 1)
    d, weight, z = (
        bf16(batch, tokens, outputs, seed=0),
        bf16(outputs, inputs, seed=1),
        bf16(batch, tokens, inputs, seed=2),
    )
    z[:, :registers] = float("nan")
    d[:, :registers] = float("nan")
    dz, h, dbias = OPS.linear_gemm_bwd(d, weight, z, "gelu", registers)
    image = z[:, registers:].double().requires_grad_()
    value = F.gelu(image)
    (slope,) = torch.autograd.grad(value.sum(), image)
    assert_rounded(dz[:, registers:], (d[:, registers:].double() @ weight.double()) * slope, roundings=2)
    assert_rounded(h[:, registers:], value.detach())
    assert not dz[:, :registers].any() and not h[:, :registers].any()
    torch.testing.assert_close(dbias, dz.float().sum((0, 1)), rtol=2e-2, atol=2e-2 * tokens**0.5)


def test_inputs_of_any_strides():
    x, weight, d = bf16(2, 9, 34, seed=0), bf16(18, 34, seed=1), bf16(2, 9, 18, seed=2)
    for odd_x, odd_d in zip(hostile(x).values(), hostile(d).values()):
        assert torch.equal(product(odd_x, weight.t().contiguous().t())[0], product(odd_x.contiguous(), weight)[0])
        assert torch.equal(OPS.linear_gemm_dgrad(odd_d, weight), OPS.linear_gemm_dgrad(odd_d.contiguous(), weight))
        wanted = OPS.linear_gemm_wgrad(odd_d.contiguous(), odd_x.contiguous())
        assert torch.equal(OPS.linear_gemm_wgrad(odd_d, odd_x), wanted)


def test_a_row_depends_on_itself_alone():
    x, weight, d = bf16(3, 37, 70, seed=0), bf16(52, 70, seed=1), bf16(3, 37, 52, seed=2)
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


def test_weight_gradients_are_the_same_at_any_thread_count():
    for shape in (LONG, (2, 400, 150, 200)):
        batch, tokens, inputs, outputs = shape
        d, x = bf16(batch, tokens, outputs, seed=0), bf16(batch, tokens, inputs, seed=1)
        weight, z = bf16(outputs, inputs, seed=2), bf16(batch, tokens, inputs, seed=3)
        found, before = [], torch.get_num_threads()
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                found.append([OPS.linear_gemm_wgrad(d, x), *OPS.linear_gemm_bwd(d, weight, z, "kelu", 0)])
        finally:
            torch.set_num_threads(before)
        for others in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], others))


def test_fakes_and_schemas():
    x, weight, d = bf16(2, 9, 34, seed=0), bf16(18, 34, seed=1), bf16(2, 9, 18, seed=2)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(OPS.linear_gemm_dgrad.default, (d, weight), test_utils=checks)
    torch.library.opcheck(OPS.linear_gemm_wgrad.default, (d, x), test_utils=checks)
    torch.library.opcheck(OPS.linear_gemm_bwd.default, (d, weight, x, "gelu", 1), test_utils=checks)
    for residual in (None, normal(2, 9, 18, dtype=torch.float32)):
        rest = (None, "gelu", None, None, residual, 1, 0.0, None, 0, True)
        torch.library.opcheck(OPS.linear_gemm_fwd.default, (x, weight, *rest), test_utils=checks)


def test_what_it_cannot_do_is_the_vendors(monkeypatch):
    """An odd number of products, and other dtypes: the operator asks PyTorch; the kernel itself says so."""
    prefers = BACKENDS["cpu"].prefers
    even, odd = bf16(4, 6, seed=0), bf16(5, 7, seed=0)
    assert prefers("linear_gemm_fwd", even, even) and not prefers("linear_gemm_fwd", odd, odd)
    assert prefers("linear_gemm_dgrad", even, even) and not prefers("linear_gemm_dgrad", odd, odd)
    assert prefers("linear_gemm_wgrad", odd, odd) and not prefers("linear_gemm_wgrad", odd.float(), odd.float())
    x = bf16(2, 3, 7, seed=1)
    assert_rounded(sk.linear(x, odd, activation="relu"), F.relu(F.linear(x.double(), odd.double())))
    with pytest.raises(RuntimeError, match="even number"):
        product(x, odd)
    with pytest.raises(RuntimeError, match="bfloat16"):
        product(x.float(), odd.float())
    monkeypatch.setattr(BACKENDS["cpu"], "multiplies_bf16", False)
    assert not prefers("linear_gemm_fwd", even, even)
    assert prefers("linear_gemm_bwd", even, even)


def test_plain_linear_under_autocast_uses_it(monkeypatch):
    called = []
    monkeypatch.setattr(BACKENDS["cpu"], "prefers", lambda kernel, x, weight: called.append((kernel, x.dtype)) or False)
    x, weight = normal(2, 3, 4, dtype=torch.float32), normal(6, 4, seed=1, dtype=torch.float32)
    with torch.autocast("cpu", BF16):
        y = sk.linear(x, weight)
    assert called == [("linear_gemm_fwd", BF16)]
    assert y.dtype == BF16
