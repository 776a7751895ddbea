"""From pixels to the token buffer: patches, positions, registers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sdp_kernels

from .config import SdPNetConfig
from .layers import INIT_STD, Dense, Part


class AxialPosition(nn.Module):
    """One learned vector per row plus one per column, (H, C) and (W, C)."""

    def __init__(self, config: SdPNetConfig) -> None:
        super().__init__()
        rows, columns = config.grid
        self.rows = nn.Parameter(torch.empty(rows, config.dim).normal_(std=INIT_STD))
        self.columns = nn.Parameter(torch.empty(columns, config.dim).normal_(std=INIT_STD))

    def forward(self, grid: tuple[int, int]) -> Tensor:
        """(H·W, C) for any grid; tables are interpolated linearly when it is not the native one."""
        rows, columns = (_stretch(table, n) for table, n in zip((self.rows, self.columns), grid, strict=True))
        return (rows[:, None] + columns[None, :]).flatten(0, 1)


def _stretch(table: Tensor, length: int) -> Tensor:
    if table.shape[0] == length:
        return table
    return F.interpolate(table.t()[None], size=length, mode="linear", align_corners=False)[0].t()


class NeighbourhoodPosition(nn.Module):
    """A field C×(H+k)×(W+k), cropped to (H+k−1)×(W+k−1) and average-pooled k×k at stride 1: neighbours share terms."""

    def __init__(self, config: SdPNetConfig) -> None:
        super().__init__()
        self.kernel, self.grid = config.position_kernel, config.grid
        field = torch.empty(config.dim, *(side + self.kernel for side in config.grid)).normal_(std=INIT_STD)
        if config.position_trainable:
            self.field = nn.Parameter(field)
        else:
            self.register_buffer("field", field)

    def forward(self, grid: tuple[int, int]) -> Tensor:
        """(H·W, C) for any grid; the pooled field is interpolated bilinearly when it is not the native one."""
        field = F.avg_pool2d(self.field[None, :, :-1, :-1], self.kernel, stride=1)
        if grid != self.grid:
            field = F.interpolate(field, size=grid, mode="bilinear", align_corners=False)
        return field[0].flatten(1).t()


class Embedding(Part):
    """Images (B, in_channels, H·p, W·p) → token buffer (B, R + H·W, C), contiguous, registers first.

    Patch conv (p×p, stride p, no bias; computed as one matrix product) + position, activation on the image tokens.
    """

    def __init__(self, config: SdPNetConfig) -> None:
        super().__init__()
        self.patch_size, self.in_channels = config.patch_size, config.in_channels
        self.activation, self.residual_dtype = config.embedding_activation, config.residual_dtype
        height, width = config.patch_size
        self.patch = Dense(config.in_channels * height * width, config.dim, bias=False)
        kind = AxialPosition if config.position == "axial" else NeighbourhoodPosition
        self.position = kind(config)
        self.registers = None
        if config.registers:
            self.registers = nn.Parameter(torch.empty(config.registers, config.dim).normal_(std=INIT_STD))

    def grid(self, images: Tensor) -> tuple[int, int]:
        """Rows and columns of patches; ValueError or TypeError when the images don't fit the model."""
        if images.dim() != 4 or images.shape[1] != self.in_channels:
            raise ValueError(f"images must be (B, {self.in_channels}, H, W), got shape {tuple(images.shape)}")
        if not images.dtype.is_floating_point:
            raise TypeError(f"images must be of a floating dtype (normalised pixels), got {images.dtype}")
        for side, pixels, patch in zip(("height", "width"), images.shape[2:], self.patch_size, strict=True):
            if pixels % patch or pixels == 0:
                raise ValueError(f"images: {side} must be a multiple of patch_size {patch}, got {pixels}")
        return images.shape[2] // self.patch_size[0], images.shape[3] // self.patch_size[1]

    def token_dtype(self, device: str) -> torch.dtype:
        """The parameters' dtype; under autocast (it leaves fp64 alone) autocast's, or fp32 by ``residual_dtype``."""
        autocast = autocast_dtype(device)
        if autocast is None or self.patch.weight.dtype == torch.float64:
            return self.patch.weight.dtype
        return torch.float32 if self.residual_dtype == "float32" else autocast

    def forward(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        (h, w), (p, q) = grid, self.patch_size
        patches = (
            images.unflatten(3, (w, q))
            .unflatten(2, (h, p))
            .permute(0, 2, 4, 1, 3, 5)
            .reshape(images.shape[0], h * w, self.in_channels * p * q)
        )
        tokens = self.patch(patches) + self.position(grid)
        if self.activation != "none":
            tokens = sdp_kernels.activation(tokens, self.activation, backend=self.backend)
        dtype = self.token_dtype(images.device.type)
        if self.registers is None:
            return tokens.to(dtype)
        registers = self.registers.to(dtype).expand(images.shape[0], -1, -1)
        return torch.cat((registers, tokens.to(dtype)), dim=1)


def autocast_dtype(device: str) -> torch.dtype | None:
    """The dtype that autocast casts to on this device now, or None."""
    if device == "meta" or not torch.is_autocast_enabled(device):  # PyTorch refuses to be asked about meta tensors
        return None
    return torch.get_autocast_dtype(device)
