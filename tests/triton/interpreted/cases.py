"""Inputs, the kernels as raw operators, and the exact result, for the tests of the interpreter."""

from __future__ import annotations

import _plain as plain
import torch
from _layouts import normal
from _numerics import assert_as_exact, differentiate
from torch import Tensor

OPS = torch.ops.sdp_kernels_triton
FORMATS = {"rows": torch.channels_last, "columns": torch.contiguous_format}


def picture(batch, channels, height, width, layout="columns", dtype=torch.float32, seed=0) -> Tensor:
    x = torch.stack([normal(channels, height, width, seed=seed + 31 * b, dtype=dtype) for b in range(batch)])
    return x.contiguous(memory_format=FORMATS[layout])


def parameters(channels: int, dtype=torch.float32) -> tuple[Tensor, Tensor]:
    return 1 + normal(channels, seed=91, dtype=dtype, scale=0.5), normal(channels, seed=92, dtype=dtype)


def norm(x, weight, bias, residual=None, grad=None, grad_sum=None, registers=0, eps=1e-6, only="both"):
    """(y, mean, rstd, sum, dx, dweight, dbias) of the kernels; with ``only`` one pass, the rest is None."""
    if only == "backward":
        total = None if residual is None else x + residual
        wide = (x if residual is None else total).float()
        mean, rstd = wide.mean(1), (wide.var(1, correction=0) + eps).rsqrt()
        y = None
    else:
        y, mean, rstd, total = OPS.layer_norm_2d_fwd(x, residual, weight, bias, eps, registers)
    if only == "forward":
        return y, mean, rstd, total, None, None, None
    kept = x if residual is None else total
    return y, mean, rstd, total, *OPS.layer_norm_2d_bwd(grad, grad_sum, kept, weight, mean, rstd, registers)


def plain_norm(x, weight, bias, grad, grad_sum, registers, eps=1e-6) -> tuple[Tensor, ...]:
    """(y, dx, dweight, dbias) of the norm alone in plain PyTorch, in the inputs' dtype; dx with grad_sum added."""
    call = lambda x, weight, bias: plain.layer_norm_2d(x, weight, bias, eps, registers)  # noqa: E731
    (y,), (dx, dweight, dbias) = differentiate(call, [x, weight, bias], [grad])
    return y, dx if grad_sum is None else dx + grad_sum, dweight, dbias


def assert_norm(got, x, weight, bias, residual=None, grad=None, grad_sum=None, registers=0, eps=1e-6) -> None:
    """All results of :func:`norm` against fp64, by the rule of _numerics; the sum to the bit, and the rest from it."""
    y, mean, rstd, total, dx, dweight, dbias = got
    if residual is not None:
        assert torch.equal(total, x + residual)
        x = total
    arguments = (x, weight, bias, grad, grad_sum)
    exact = plain_norm(*(None if t is None else t.double() for t in arguments), registers, eps)
    peer = plain_norm(*(None if t is None else t.to(x.dtype) for t in arguments), registers, eps)
    rows = x.numel() // weight.numel()
    for i, (name, value) in enumerate({"y": y, "dx": dx, "dweight": dweight, "dbias": dbias}.items()):
        if value is not None:
            assert_as_exact(name, value, exact[i], peer[i], rows=rows if i >= 2 else 1)
    wide = x.double().movedim(1, -1) if x.dim() == 4 else x.double()
    image = slice(registers, None) if x.dim() == 3 else slice(None)
    want_mean, want_rstd = wide.mean(-1), (wide.var(-1, correction=0) + eps).rsqrt()
    loose = {"rtol": 1e-12, "atol": 1e-13} if x.dtype == torch.float64 else {"rtol": 2e-5, "atol": 2e-6}
    torch.testing.assert_close(mean[:, image].double(), want_mean[:, image], **loose)
    torch.testing.assert_close(rstd[:, image].double(), want_rstd[:, image], **loose)
    assert not mean[:, :registers].any() and not rstd[:, :registers].any()
