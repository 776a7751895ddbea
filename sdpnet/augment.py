"""Augmentation of whole batches with parameters of each sample's own, on any device.

All that is random comes in as ``draws`` (B, DRAWS), uniform numbers that are a pure function of (seed, epoch,
position): a sample is augmented the same in whatever batch, on whatever device and after whatever restart it is met.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def normalize(images: Tensor, value_max: float, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(images / value_max − mean) / std, float32.

    images (B, C, H, W) of any dtype; mean, std: one value per channel.
    """
    images = images.to(torch.float32)
    shape = (1, len(mean), 1, 1)
    # (x / m − µ) / σ as x·a + b. The constants are made on the host: no synchronisation, and nothing to read back.
    a = torch.tensor([1 / (value_max * s) for s in std]).reshape(shape).to(images.device, non_blocking=True)
    b = (
        torch.tensor([-m / s for m, s in zip(mean, std, strict=True)])
        .reshape(shape)
        .to(images.device, non_blocking=True)
    )
    return images * a + b


def affine_matrices(
    draws: Tensor,
    *,
    shift: float = 0.0,
    rotate: float = 0.0,
    scale: float = 0.0,
    shear: float = 0.0,
    flip: bool = False,
) -> Tensor:
    """Per-sample inverse maps (output cell → input cell), float32 (B, 2, 3), in affine_grid's units (half a side = 1).

    draws (B, ≥ 14): columns 8 … 13 are read. shift: largest shift as a fraction of the side; rotate: largest angle in
    degrees; scale: sizes from 1/(1 + scale) to 1 + scale, log-uniform; shear: largest shear of x along y; flip:
    mirror every other sample.
    """
    s = 2 * draws[:, 8:14] - 1
    zoom = torch.exp(s[:, 2] * -math.log1p(scale))
    angle = s[:, 3] * math.radians(rotate)
    cos, sin, slant = zoom * angle.cos(), zoom * angle.sin(), s[:, 4] * shear
    mirror = torch.where(s[:, 5] < 0, -1.0, 1.0) if flip else torch.ones_like(zoom)
    rows = [cos * mirror, slant * cos - sin, 2 * shift * s[:, 0], sin * mirror, slant * sin + cos, 2 * shift * s[:, 1]]
    return torch.stack(rows, dim=1).reshape(-1, 2, 3)


def affine(images: Tensor, matrices: Tensor) -> Tensor:
    """Moves every image by its own matrix: one bilinear gather, 0 outside.

    images (B, C, H, W) → float32 of the same shape.
    """
    images = images.to(torch.float32)
    grid = F.affine_grid(matrices, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def augment(images: Tensor, draws: Tensor, **amounts: float) -> Tensor:
    """Shift, rotate, scale, shear, flip (keywords of affine_matrices) by one gather; all amounts zero leaves the
    images alone.
    """
    if not any(amounts.values()):
        return images
    return affine(images, affine_matrices(draws, **amounts))
