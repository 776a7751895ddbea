"""Depthwise k×k convolution on a picture or on the image rows of a token buffer."""

from torch import Tensor

from .. import reference
from ..backends import choose
from ..reference.depthwise_conv2d import Norm
from ._checks import check_floating, check_grid, check_parameter, check_rank, check_registers, check_same_dtype
from ._contract import define

SCHEMAS = {}

KERNEL_SIZES = (3, 5, 7, 9)

define("depthwise_conv2d", SCHEMAS, {})


def check_kernel(name: str, weight: Tensor, channels: int) -> None:
    """(C, 1, k, k) with k one of KERNEL_SIZES."""
    check_floating(name, weight)
    k = weight.shape[-1]
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
    """
    check_floating("x", x)
    check_rank("x", x, (3, 4), "(B, C, H, W) or (B, T, C)")
    channels = x.shape[1] if x.dim() == 4 else x.shape[2]
    check_kernel("weight", weight, channels)
    check_parameter("weight", weight, tuple(weight.shape), x)
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
    choose("depthwise_conv2d", x, backend)
    return reference.depthwise_conv2d.depthwise_conv2d(x, weight, bias, grid, registers, norm)
