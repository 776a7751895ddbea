"""Depthwise k×k convolution on a picture or on the image rows of a token buffer."""

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import reference
from ..backends import choose
from ..reference.depthwise_conv2d import Norm
from ..reference.precision import accumulate_dtype, autocast_dtype, cast
from ._checks import check_floating, check_grid, check_parameter, check_registers, check_same_dtype, check_tensor
from ._contract import define, differentiate_reference, differentiating_twice, launch

SCHEMAS = {
    "depthwise_conv2d_fwd": (
        "(Tensor x, Tensor weight, Tensor? bias, SymInt[] grid, int registers,"
        " Tensor? mean, Tensor? rstd, Tensor? norm_weight, Tensor? norm_bias) -> Tensor"
    ),
    "depthwise_conv2d_bwd": (
        "(Tensor grad, Tensor x, Tensor weight, SymInt[] grid, int registers,"
        " Tensor? mean, Tensor? rstd, Tensor? norm_weight, Tensor? norm_bias)"
        " -> (Tensor dx, Tensor dweight, Tensor dbias)"
    ),
}
"""``grid`` is empty for a picture. With a norm, ``dx`` is the gradient of the normalised input. ``dweight``
and ``dbias`` are in the type of their sums."""

KERNEL_SIZES = (3, 5, 7, 9)


def _fake_fwd(x, weight, bias, grid, registers, mean, rstd, norm_weight, norm_bias):
    return torch.empty_like(x)


def _fake_bwd(grad, x, weight, grid_, registers, mean, rstd, norm_weight, norm_bias):
    sums = (weight.new_empty(size, dtype=accumulate_dtype(x.dtype)) for size in (weight.shape, weight.shape[:1]))
    return torch.empty_like(x), *sums


define("depthwise_conv2d", SCHEMAS, {"depthwise_conv2d_fwd": _fake_fwd, "depthwise_conv2d_bwd": _fake_bwd})


def _through_the_norm(dn: Tensor, x: Tensor, norm: Norm, registers: int) -> tuple[Tensor, ...]:
    """Gradients of x and the four parts of ``(x − mean) · rstd · weight + bias`` given its own; 0 for register rows."""
    mean, rstd, weight, _ = norm
    if x.dim() == 4:
        dn, x = dn.movedim(1, -1), x.movedim(1, -1)
    else:
        dn, x, mean, rstd = (t[:, registers:] for t in (dn, x, mean, rstd))
    dn, centred = dn.to(mean.dtype), x.to(mean.dtype) - mean[..., None]
    slope = dn * weight.to(dn.dtype)
    wide = slope * rstd[..., None]
    dx, dmean, drstd = wide.to(x.dtype), -wide.sum(-1), (slope * centred).sum(-1)
    pixels = tuple(range(x.dim() - 1))
    dweight, dbias = (dn * centred * rstd[..., None]).sum(pixels), dn.sum(pixels)
    if x.dim() == 4:
        dx = dx.movedim(-1, 1)
    elif registers:
        dx, dmean, drstd = F.pad(dx, (0, 0, registers, 0)), F.pad(dmean, (registers, 0)), F.pad(drstd, (registers, 0))
    return dx, dmean, drstd, dweight.to(weight.dtype), dbias.to(norm.bias.dtype)


class _DepthwiseConv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, grid, registers: int, backend: str, *norm):
        filters = cast(weight, x.dtype)
        ctx.save_for_backward(x, weight, filters, bias, *norm)
        ctx.grid, ctx.registers, ctx.backend = grid, registers, backend
        shift = cast(bias, x.dtype)
        return launch(backend, "depthwise_conv2d_fwd", x, filters, shift, grid, registers, *norm)

    @staticmethod
    def backward(ctx, grad):
        x, weight, filters, bias, *norm = ctx.saved_tensors
        normed = norm[0] is not None
        if differentiating_twice():

            def form(x, weight, bias, *norm):
                weight, bias = cast(weight, x.dtype), cast(bias, x.dtype)
                folded = Norm(*norm) if normed else None
                return reference.depthwise_conv2d.depthwise_conv2d(
                    x, weight, bias, tuple(ctx.grid) or None, ctx.registers, folded
                )

            dx, dw, db, *dnorm = differentiate_reference(form, (x, weight, bias, *norm), grad)
            return dx, dw, db, None, None, None, *dnorm
        dx, dw, db = launch(ctx.backend, "depthwise_conv2d_bwd", grad, x, filters, ctx.grid, ctx.registers, *norm)
        dnorm = (None,) * 4
        if normed:
            dx, *dnorm = _through_the_norm(dx, x, Norm(*norm), ctx.registers)
        db = None if bias is None else cast(db, bias.dtype)
        return dx, cast(dw, weight.dtype), db, None, None, None, *dnorm


def check_kernel(name: str, weight: Tensor, channels: int) -> None:
    """(C, 1, k, k) with k one of KERNEL_SIZES."""
    check_floating(name, weight)
    k = weight.shape[-1] if weight.dim() == 4 else 0
    if weight.dim() != 4 or weight.shape[1] != 1 or weight.shape[2] != k or k not in KERNEL_SIZES:
        raise ValueError(
            f"{name} must be (C, 1, k, k) with k in {KERNEL_SIZES}, stride 1, dilation 1; got {tuple(weight.shape)}"
        )
    if weight.shape[0] != channels:
        raise ValueError(f"{name} must have x's {channels} channels, got {weight.shape[0]}: {tuple(weight.shape)}")


def depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    grid: tuple[int, int] | None = None,
    registers: int = 0,
    norm: Norm | None = None,
    backend: str | None = None,
) -> Tensor:
    """Each channel convolved with its own k×k filter: stride 1, dilation 1, zero padding k // 2 ("same").

    Args:
        x: a picture (B, C, H, W), contiguous or channels_last; or a token buffer (B, T, C) whose rows from
            ``registers`` on are the H·W image tokens, row-major.
        weight: (C, 1, k, k) as in ``nn.Conv2d(C, C, k, groups=C)``, k ∈ {3, 5, 7, 9}; x's dtype (any under autocast).
        bias: (C,) or None.
        grid: (H, W) of a token buffer, T = registers + H·W; must be None for a picture.
        registers: rows at the front of each sample that are not convolved; written as 0.
        norm: LayerNorm statistics and affine parameters to apply while loading x (``Norm(mean, rstd, weight, bias)``).
        backend: run this backend or raise; None chooses.

    Returns:
        A tensor of x's shape; x's dtype, or the autocast dtype under autocast.

    Raises:
        TypeError, ValueError: rank, shapes, dtypes, devices, an even or unsupported kernel, grid, registers;
        UnsupportedError: named backend.

    The CUDA backend multiplies bfloat16 and float16 on tensor cores (not the 3×3 forward pass): there a value that is
    not finite spoils all 8 columns of each block of outputs whose 16 columns of inputs contain it, not just k of them;
    rows, channels and images stay apart. The CPU backend multiplies bfloat16 in pairs of neighbours where the processor
    does (AVX512_BF16): subnormal values then count as 0, and an infinite one gives NaN where F.conv2d may give
    infinity, in no other outputs than those that see it.

    Backward keeps x and weight (and the norm's parts) and recomputes what was normalised. Twice differentiable in eager
    mode. Source: Chollet, "Xception" (2017); the k×k forms as in ConvNeXt and ConvMixer.
    """
    check_tensor("x", x, (3, 4), "(B, C, H, W) or (B, T, C)")
    channels = x.shape[1] if x.dim() == 4 else x.shape[2]
    check_kernel("weight", weight, channels)
    check_parameter("weight", weight, weight.shape, x)
    check_same_dtype("weight", weight, x)
    if bias is not None:
        check_parameter("bias", bias, (channels,), x)
        check_same_dtype("bias", bias, x)
    check_registers(registers, x)
    if x.dim() == 3:
        check_grid(grid, registers, x)
    elif grid is not None:
        raise ValueError(f"grid must be None for a picture (B, C, H, W), got {grid!r}")
    if norm is not None:
        if not (isinstance(norm, tuple) and len(norm) == 4):
            raise TypeError(f"norm must be Norm(mean, rstd, weight, bias), got {type(norm).__name__}")
        norm = Norm(*norm)
        statistics = (x.shape[0], *x.shape[2:]) if x.dim() == 4 else tuple(x.shape[:2])
        for name, value, shape in zip(
            Norm._fields, norm, (statistics, statistics, (channels,), (channels,)), strict=True
        ):
            check_parameter(f"norm.{name}", value, shape, x)
        wide = accumulate_dtype(x.dtype)
        norm = norm._replace(mean=norm.mean.to(wide).contiguous(), rstd=norm.rstd.to(wide).contiguous())
    x = cast(x, autocast_dtype(x) or x.dtype)
    chosen = choose("depthwise_conv2d", x, backend)
    if chosen == "reference":
        weight, bias = cast(weight, x.dtype), cast(bias, x.dtype)
        return reference.depthwise_conv2d.depthwise_conv2d(x, weight, bias, grid, registers, norm)
    return _DepthwiseConv2d.apply(
        x, weight, bias, list(grid or ()), registers, chosen, *(norm if norm is not None else (None,) * 4)
    )
