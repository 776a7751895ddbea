"""LayerNorm over the channels of a picture, or over the last dimension of a token buffer, in plain PyTorch."""

import torch
from torch import Tensor
from torch.nn import functional as F

from .precision import widen


def layer_norm_2d(x: Tensor, weight: Tensor, bias: Tensor, eps: float, registers: int = 0) -> Tensor:
    """x (B, C, H, W) normalised over C, or (B, T, C) over C with the first ``registers`` rows written as 0."""
    wide = widen(x)
    affine = weight.to(wide.dtype), bias.to(wide.dtype)
    if x.dim() == 4:
        y = F.layer_norm(wide.permute(0, 2, 3, 1), weight.shape, *affine, eps).to(x.dtype).permute(0, 3, 1, 2)
        return y.contiguous() if x.is_contiguous() else y
    y = F.layer_norm(wide[:, registers:], weight.shape, *affine, eps).to(x.dtype)
    return F.pad(y, (0, 0, registers, 0)) if registers else y


def layer_norm_2d_bwd(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float, registers: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias), themselves differentiable: this is what a second derivative goes through."""
    channels = 1 if x.dim() == 4 else 2
    others = [d for d in range(x.dim()) if d != channels]
    shape = [-1 if d == channels else 1 for d in range(x.dim())]
    wide, dy = widen(x), widen(grad)
    if registers:  # selected, not multiplied: what register rows hold may be NaN
        image = (torch.arange(x.shape[1], device=x.device) >= registers)[:, None]
        wide, dy = (torch.where(image, t, t.new_zeros(())) for t in (wide, dy))
    centred = wide - wide.mean(channels, keepdim=True)
    rstd = torch.rsqrt(centred.square().mean(channels, keepdim=True) + eps)
    unit = centred * rstd
    scaled = dy * weight.to(wide.dtype).view(shape)
    dx = rstd * (scaled - scaled.mean(channels, keepdim=True) - unit * (scaled * unit).mean(channels, keepdim=True))
    return dx.to(x.dtype), (dy * unit).sum(others).to(weight.dtype), dy.sum(others).to(weight.dtype)
