"""Depthwise k×k convolution in plain PyTorch, on a picture or on the image rows of a token buffer."""

from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F

from .precision import widen


class Norm(NamedTuple):
    """LayerNorm to apply while loading: statistics (B, H, W) or (B, T) in fp32, weight and bias (C,)."""

    mean: Tensor
    rstd: Tensor
    weight: Tensor
    bias: Tensor


def normalise(x: Tensor, norm: Norm) -> Tensor:
    """``(x − mean) · rstd · weight + bias`` with x's channels last; rounded to x's dtype."""
    wide = (widen(x) - norm.mean[..., None]) * norm.rstd[..., None]
    return (wide * norm.weight.to(wide.dtype) + norm.bias.to(wide.dtype)).to(x.dtype)


def depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    grid: tuple[int, int] | None = None,
    registers: int = 0,
    norm: Norm | None = None,
) -> Tensor:
    """Stride 1, zero padding k // 2. x (B, C, H, W), or (B, T, C) with its register rows written as 0 in the output."""
    kernel = weight.shape[-1]
    if x.dim() == 4:
        picture = x if norm is None else normalise(x.permute(0, 2, 3, 1), norm).permute(0, 3, 1, 2)
        return F.conv2d(picture, weight, bias, padding=kernel // 2, groups=x.shape[1])
    tokens = x[:, registers:]
    if norm is not None:
        tokens = normalise(tokens, norm._replace(mean=norm.mean[:, registers:], rstd=norm.rstd[:, registers:]))
    picture = tokens.unflatten(1, grid).permute(0, 3, 1, 2)
    y = F.conv2d(picture, weight, bias, padding=kernel // 2, groups=x.shape[2]).permute(0, 2, 3, 1).flatten(1, 2)
    return F.pad(y, (0, 0, registers, 0)) if registers else y
