"""LayerNorm over the channels, forward and backward, with the residual add before it: geometry and launches.

Moved once each: forward x, y (and residual, sum); backward x, dy, dx (and grad_sum); statistics are 8 bytes per pixel.
Where a tile of all channels does not fit on chip (no entry in the table: contiguous pictures above 4096 channels, 2048
in fp32, 1024 in backward; rows above 8192) x and dy are read twice. Partial sums of dweight and dbias are rows of fp32,
one per block of pixels, written once and added in their order; the number of blocks follows from the shape alone.
"""

import math
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from . import _layer_norm_2d_kernels as kernels
from ._launch import ACCUMULATOR, configuration, launch, register

OPERATOR = "layer_norm_2d"
CHANNEL_CLASSES = (16, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
Strides = tuple[int, int, int, int]


def _strides(x: Tensor) -> Strides:
    """(batch, row, column, channel) of a picture (B, C, H, W) or of a token buffer (B, T, C), which is one row."""
    if x.dim() == 4:
        return x.stride(0), x.stride(2), x.stride(3), x.stride(1)
    return x.stride(0), 0, x.stride(1), x.stride(2)


@dataclass(frozen=True)
class Geometry:
    """What the kernels need to know of shape and strides; ``strides`` one per tensor, the output's first."""

    batch: int
    pixels: int
    """Per sample. Samples that lie evenly spaced behind each other count as one."""
    width: int
    channels: int
    strides: tuple[Strides, ...]
    columns: bool
    split: bool

    @property
    def layout(self) -> str:
        """Along what threads go; "odd" where no load can be wide, which takes many more registers."""
        wide = min(self._divisor(self.strides[0]), math.gcd(8, self.pixels if self.columns else self.channels)) >= 4
        return ("" if wide else "odd ") + ("columns" if self.columns else "rows")

    def constants(self, registers: int, x: Tensor, pixels: int, block: int, **strides: Strides) -> dict:
        """The kernels' constants for tiles of pixels × block; strides by the tensor's letter give its divisor."""
        reach = max(pixels * column + (self.channels + block) * channel for _, _, column, channel in self.strides)
        return {
            "PIXELS": pixels,
            "BLOCK": block,
            "COLUMNS": self.columns,
            "REACH": "split" if self.split else "far" if reach >= 2**31 else "near",
            "ALIKE": len(set(strides.values())) == 1,
            "REGISTERS": registers > 0,
            "ACC": ACCUMULATOR[x.dtype],
            "EXTENT_BY": math.gcd(8, self.pixels if self.columns else self.channels),
            **{f"{name}_BY": self._divisor(value) for name, value in strides.items()},
        }

    def _divisor(self, strides: Strides) -> int:
        batch, row, column, channel = strides
        fast, across = (column, channel) if self.columns else (channel, column)
        return math.gcd(8, across, batch, row if self.split else 0) if fast == 1 else 1


def geometry(tensors: list[Tensor], registers: int) -> Geometry:
    """For tensors of one shape, the output first: its strides decide along what the threads go."""
    like = tensors[0]
    batch, (height, width) = like.shape[0], like.shape[2:] if like.dim() == 4 else (1, like.shape[1])
    channels = like.shape[1] if like.dim() == 4 else like.shape[2]
    strides = [_strides(t) for t in tensors]
    if width == 1:  # a picture of one column is one of one row
        strides, width, height = [(b, 0, row, c) for b, row, _, c in strides], height, 1
    split = height > 1 and any(row != width * column for _, row, column, _ in strides)
    pixels = height * width
    if not split and not registers and all(b == pixels * column or batch == 1 for b, _, column, _ in strides):
        batch, pixels = 1, batch * pixels
    elif not split and not registers and pixels == 1:
        batch, pixels, strides = 1, batch, [(b, 0, b, c) for b, _, _, c in strides]
    columns = channels == 1 or strides[0][2] < strides[0][3]
    return Geometry(batch, pixels, width, channels, tuple(strides), columns, split)


def tile_of_all_channels(x: Tensor, pass_: str, g: Geometry) -> tuple[dict[str, int] | None, int]:
    """The table's first entry that holds all channels, and how many it holds; (None, 0) if they don't fit on chip."""
    for block in CHANNEL_CLASSES:
        if block >= g.channels and (entry := configuration(x, OPERATOR, pass_, g.layout, block)):
            return entry, block
    return None, 0


@register("layer_norm_2d_fwd")
def layer_norm_2d_fwd(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float, registers: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, mean, rstd, sum); see the operator's docstring. ``sum`` is empty without a residual."""
    y = torch.empty_like(x)
    total = x.new_empty(0) if residual is None else torch.empty_like(x)
    per_pixel = (x.shape[0], *x.shape[2:]) if x.dim() == 4 else x.shape[:2]
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    mean, rstd = x.new_empty(per_pixel, dtype=dtype), x.new_empty(per_pixel, dtype=dtype)
    g = geometry([y, x, x if residual is None else residual], registers)
    y_strides, x_strides, r_strides = g.strides
    entry, block = tile_of_all_channels(x, "forward", g)
    given, chunks = entry is None, 1
    if given:
        first = configuration(x, OPERATOR, "statistics", "columns" if g.columns else "rows")
        tiles = triton.cdiv(g.pixels, first["pixels"])
        launch(
            kernels.statistics,
            (g.batch * tiles,),
            *(x, residual, None if residual is None else total, mean, rstd),
            *(tiles, g.pixels, g.width, g.channels, registers, eps),
            *(*x_strides, *r_strides, *y_strides),
            warps=first["warps"],
            **g.constants(registers, x, first["pixels"], first["block"], X=x_strides, R=r_strides, Y=y_strides),
        )
        if residual is not None:  # the sum is there already, and has y's strides
            x, x_strides, residual = total, y_strides, None
        entry = configuration(x, OPERATOR, "normalise", "columns" if g.columns else "rows")
        block = entry["block"]
        chunks = triton.cdiv(g.channels, block)
    tiles = triton.cdiv(g.pixels, entry["pixels"])
    launch(
        kernels.forward,
        (g.batch * tiles * chunks,),
        *(x, residual, weight, bias, y, None if residual is None else total, mean, rstd),
        *(tiles, g.pixels, g.width, g.channels, registers, eps, weight.stride(0), bias.stride(0)),
        *(*x_strides, *r_strides, *y_strides),
        warps=entry["warps"],
        GIVEN=given,
        **g.constants(registers, x, entry["pixels"], block, X=x_strides, R=r_strides, Y=y_strides),
    )
    return y, mean, rstd, total


@register("layer_norm_2d_bwd")
def layer_norm_2d_bwd(
    grad: Tensor, grad_sum: Tensor | None, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, registers: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias); grad and grad_sum of any strides; dx = norm's backward + grad_sum."""
    dx = torch.empty_like(x)
    mean, rstd = mean.contiguous(), rstd.contiguous()
    g = geometry([dx, x, grad, grad if grad_sum is None else grad_sum], registers)
    dx_strides, x_strides, g_strides, s_strides = g.strides
    count = g.batch * g.pixels
    entry, block = tile_of_all_channels(x, "backward", g)
    means, chunks = None, 1
    if entry is None:
        first = configuration(x, OPERATOR, "row_means", "columns" if g.columns else "rows")
        means = mean.new_empty((2, count))
        tiles = triton.cdiv(g.pixels, first["pixels"])
        launch(
            kernels.row_means,
            (g.batch * tiles,),
            *(grad, x, weight, mean, rstd, means),
            *(tiles, g.pixels, g.width, g.channels, registers, count, weight.stride(0)),
            *(*g_strides, *x_strides),
            warps=first["warps"],
            **g.constants(registers, x, first["pixels"], first["block"], G=g_strides, X=x_strides),
        )
        entry = configuration(x, OPERATOR, "apply", "columns" if g.columns else "rows")
        block = entry["block"]
        chunks = triton.cdiv(g.channels, block)
    tiles = triton.cdiv(g.pixels, entry["pixels"])
    every = g.batch * tiles
    per_block = max(1, triton.cdiv(every, entry["blocks"]))
    blocks = triton.cdiv(every, per_block)
    partial = mean.new_empty((2, blocks, g.channels))
    launch(
        kernels.backward,
        (blocks * chunks,),
        *(grad, grad_sum, x, weight, mean, rstd, means, dx, partial),
        *(blocks, per_block, every, tiles, g.pixels, g.width, g.channels, registers, count, weight.stride(0)),
        *(*g_strides, *s_strides, *x_strides, *dx_strides),
        warps=entry["warps"],
        GIVEN=means is not None,
        AHEAD=bool(entry["ahead"]),
        **g.constants(registers, x, entry["pixels"], block, G=g_strides, S=s_strides, X=x_strides, Y=dx_strides),
    )
    dweight, dbias = weight.new_empty(weight.shape), weight.new_empty(weight.shape)
    last = configuration(x, OPERATOR, "add_partials", "narrow" if g.channels <= 1024 else "wide")
    launch(
        kernels.add_partials,
        (triton.cdiv(g.channels, last["block"]), 2),
        *(partial, dweight, dbias, blocks, g.channels),
        warps=last["warps"],
        ROWS=last["rows"],
        BLOCK=last["block"],
        ACC=ACCUMULATOR[x.dtype],
    )
    return dx, dweight, dbias
