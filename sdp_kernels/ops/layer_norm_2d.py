"""LayerNorm over the channels of a picture at each pixel, or over the last dimension of a token buffer."""

import torch
from torch import Tensor

from .. import reference
from ..backends import choose
from ..reference.precision import accumulate_dtype
from ._checks import (
    check_eps,
    check_parameter,
    check_registers,
    check_residual,
    check_tensor,
)
from ._contract import define, differentiating_twice, launch, other_than

SCHEMAS = {
    "layer_norm_2d_fwd": (
        "(Tensor x, Tensor? residual, Tensor weight, Tensor bias, float eps, int registers)"
        " -> (Tensor y, Tensor mean, Tensor rstd, Tensor sum)"
    ),
    "layer_norm_2d_bwd": (
        "(Tensor grad, Tensor? grad_sum, Tensor x, Tensor weight, Tensor mean, Tensor rstd, int registers)"
        " -> (Tensor dx, Tensor dweight, Tensor dbias)"
    ),
}


def _statistics_shape(x: Tensor) -> tuple[int, ...]:
    return (x.shape[0], x.shape[2], x.shape[3]) if x.dim() == 4 else (x.shape[0], x.shape[1])


def _fake_fwd(x, residual, weight, bias, eps, registers):
    statistics = [x.new_empty(_statistics_shape(x), dtype=accumulate_dtype(x.dtype)) for _ in range(2)]
    total = x.new_empty(0) if residual is None else torch.empty_like(x)
    return torch.empty_like(x), *statistics, total


def _fake_bwd(grad, grad_sum, x, weight, mean, rstd, registers):
    return torch.empty_like(x), weight.new_empty(weight.shape), weight.new_empty(weight.shape)


define("layer_norm_2d", SCHEMAS, {"layer_norm_2d_fwd": _fake_fwd, "layer_norm_2d_bwd": _fake_bwd})


class _LayerNorm2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps: float, registers: int, backend: str):
        y, mean, rstd, _ = launch(backend, "layer_norm_2d_fwd", x, None, weight, bias, eps, registers)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.eps, ctx.registers, ctx.backend = eps, registers, backend
        return y

    @staticmethod
    def backward(ctx, grad):
        x, weight, mean, rstd = ctx.saved_tensors
        if differentiating_twice():
            gradients = reference.layer_norm_2d.layer_norm_2d_bwd(grad, x, weight, ctx.eps, ctx.registers)
        else:
            gradients = launch(ctx.backend, "layer_norm_2d_bwd", grad, None, x, weight, mean, rstd, ctx.registers)
        return *gradients, None, None, None


class _LayerNorm2dBeside(torch.autograd.Function):
    """The norm and x itself, whose gradient joins in the norm's backward pass."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps: float, registers: int, backend: str):
        y, mean, rstd, _ = launch(backend, "layer_norm_2d_fwd", x, None, weight, bias, eps, registers)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.eps, ctx.registers, ctx.backend = eps, registers, backend
        return x.view_as(x), y

    @staticmethod
    def backward(ctx, grad_x, grad):
        return *_backward_of_both(ctx, grad_x, grad), None, None, None


def _backward_of_both(ctx, grad_sum, grad) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias) where what was normalised is an output as well."""
    x, weight, mean, rstd = ctx.saved_tensors
    if differentiating_twice():
        dx, dw, db = reference.layer_norm_2d.layer_norm_2d_bwd(grad, x, weight, ctx.eps, ctx.registers)
        return dx + grad_sum, dw, db
    return launch(ctx.backend, "layer_norm_2d_bwd", grad, grad_sum, x, weight, mean, rstd, ctx.registers)


class _AddLayerNorm2d(torch.autograd.Function):
    """Residual add, then norm. Keeps the sum, which is an output anyway, instead of the two addends."""

    @staticmethod
    def forward(ctx, x, residual, weight, bias, eps: float, registers: int, backend: str):
        y, mean, rstd, total = launch(backend, "layer_norm_2d_fwd", x, residual, weight, bias, eps, registers)
        ctx.save_for_backward(total, weight, mean, rstd)
        ctx.eps, ctx.registers, ctx.backend = eps, registers, backend
        return total, y

    @staticmethod
    def backward(ctx, grad_sum, grad):
        dx, dw, db = _backward_of_both(ctx, grad_sum, grad)
        return dx, dx, dw, db, None, None, None


def layer_norm_2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-6,
    *,
    residual: Tensor | None = None,
    with_input: bool = False,
    registers: int = 0,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """LayerNorm over C: ``(x − mean) / √(var + eps) · weight + bias`` with the biased variance over the channels.

    Args:
        x: a picture (B, C, H, W) of any strides (contiguous and channels_last are fast), normalised over C at every
            pixel; or a token buffer (B, T, C), normalised over its last dimension.
        weight, bias: (C,) in x's dtype or float32.
        eps: positive, added to the variance.
        residual: of x's shape and dtype; added first, and the sum (rounded to x's dtype) is returned as well.
        with_input: return x as well, for the residual branch around the norm: what goes back through it is added in
            the norm's backward pass, not in one of its own.
        registers: rows at the front of each sample of a token buffer that are written as 0 and take no part in
            dweight and dbias (residual rows are added all the same).
        backend: run this backend or raise; None chooses.

    Returns:
        y of x's shape and dtype, in x's memory layout where x is dense; with ``residual`` the pair (sum, y), with
        ``with_input`` the pair (x, y).

    Statistics are fp32 (fp64 for float64). Backward keeps x (or the sum) and mean and rstd, 8 bytes per pixel.
    Twice differentiable in eager mode. Computes in fp32 under autocast; the result has x's dtype.

    Raises:
        TypeError, ValueError: rank, shapes, dtypes, devices, eps ≤ 0, registers; UnsupportedError: named backend.

    Source: Ba et al., "Layer Normalization" (2016), applied per pixel as in ConvNeXt.
    """
    check_tensor("x", x, (3, 4), "(B, C, H, W) or (B, T, C)")
    channels = x.shape[1] if x.dim() == 4 else x.shape[2]
    if channels < 1:
        raise ValueError(f"x must have at least one channel, got shape {tuple(x.shape)}")
    check_parameter("weight", weight, (channels,), x)
    check_parameter("bias", bias, (channels,), x)
    check_eps(eps)
    check_registers(registers, x)
    if residual is not None:
        check_residual(residual, x.shape, x)
        if residual.dtype != x.dtype:
            raise TypeError(f"residual must be {x.dtype} like x, got {residual.dtype}")
        if with_input:
            raise ValueError("with_input must be False when there is a residual, whose sum with x is returned")
    chosen = choose("layer_norm_2d", x, backend)
    if chosen == "reference":
        if residual is None:
            y = reference.layer_norm_2d.layer_norm_2d(x, weight, bias, eps, registers)
            return (x, y) if with_input else y
        total = x + residual
        return total, reference.layer_norm_2d.layer_norm_2d(total, weight, bias, eps, registers)
    if residual is None:
        form = _LayerNorm2dBeside if with_input else _LayerNorm2d
        return form.apply(x, weight, bias, float(eps), registers, chosen)
    return _AddLayerNorm2d.apply(x, other_than(x, residual), weight, bias, float(eps), registers, chosen)
