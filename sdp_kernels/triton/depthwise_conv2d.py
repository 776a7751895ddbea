"""Depthwise k×k convolution, forward and backward: geometry and launches.

Forward moves x and y once; normalising on load adds 8 bytes per pixel. Backward is one kernel that reads dy and x once
where the table says "fused" (k = 3 and 5, contiguous pictures up to k = 7), or where the registers don't hold both, one
for dx and one for dweight and dbias. The taps are copied to (k², C) in the accumulator's type first, for loads along
the channels. Partial sums of dweight and dbias are rows of that type, one per part of the strips, written once and
added in their order. The number of strips and parts follows from the shape alone; no sum behind y or dx depends on it.
"""

import math
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from . import _depthwise_conv2d_kernels as kernels
from ._launch import ACCUMULATOR, configuration, launch, register

OPERATOR = "depthwise_conv2d"
FEWEST_ROWS = 8
"""A strip of fewer rows would mostly read what its neighbours read as well."""
Strides = tuple[int, int, int, int]


def _strides(x: Tensor, width: int) -> Strides:
    """(batch, row, column, channel) of a picture (B, C, H, W), or of a token buffer's image rows."""
    if x.dim() == 4:
        return x.stride(0), x.stride(2), x.stride(3), x.stride(1)
    return x.stride(0), width * x.stride(1), x.stride(1), x.stride(2)


@dataclass(frozen=True)
class Geometry:
    """What the kernels need to know of shape and strides; ``strides`` one per tensor, the output's first."""

    batch: int
    height: int
    width: int
    channels: int
    tokens: int
    """Pixels of a sample, register rows among them."""
    strides: tuple[Strides, ...]
    columns: bool

    def entry(self, x: Tensor, kernel: str, k: int, normed: bool) -> dict[str, int]:
        """The table's, for threads along the columns or the channels; a norm takes registers where lanes have two."""
        layout = "columns" if self.columns else "normed rows" if normed else "rows"
        return configuration(x, OPERATOR, kernel, layout, f"k{k}")

    def cut(self, entry: dict[str, int]) -> "Cut":
        """The tiles, blocks and strips for an entry of the table."""
        out, lanes = entry["outputs"], entry["groups"] * entry["block"]
        across, channels = (triton.next_power_of_2(max(1, n)) for n in (-(-self.width // out), self.channels))
        groups = min(entry["groups"], across)
        block = min(lanes // groups, channels)
        groups = min(lanes // block, across)
        tiles, blocks = triton.cdiv(self.width, out * groups), triton.cdiv(self.channels, block)
        strips = triton.cdiv(entry["programs"], max(1, self.batch * tiles * blocks))
        strips = max(1, min(strips, triton.cdiv(self.height, FEWEST_ROWS)))
        rows = max(1, triton.cdiv(self.height, strips))
        return Cut(out, groups, block, triton.cdiv(self.height, rows), tiles, blocks, rows)

    def sizes(self, cut: "Cut", registers: int) -> tuple[int, ...]:
        """The kernels' arguments from ``strips`` to ``tokens``."""
        return (
            *(cut.strips, cut.tiles, cut.blocks, cut.rows),
            *(self.height, self.width, self.channels, registers, self.tokens),
        )

    def constants(self, cut: "Cut", k: int, registers: int, x: Tensor, **strides: Strides) -> dict:
        """The kernels' constants; strides by the tensor's letter give its divisor."""
        return {
            "K": k,
            "OUT": cut.out,
            "GROUPS": cut.groups,
            "BLOCK": cut.block,
            "COLUMNS": self.columns,
            "REGISTERS": registers > 0,
            "FULL": self.width % (cut.out * cut.groups) == 0,
            "EVEN": self.channels % cut.block == 0,
            "BY": math.gcd(8, self.channels),
            **{f"{name}_BY": 1 if self.columns else _divisor(value) for name, value in strides.items()},
            "ACC": ACCUMULATOR[x.dtype],
        }


@dataclass(frozen=True)
class Cut:
    """How the work is cut: lanes of ``out`` columns in ``groups`` × ``block`` (channels), and how many of each."""

    out: int
    groups: int
    block: int
    strips: int
    tiles: int
    blocks: int
    rows: int


def _divisor(strides: Strides) -> int:
    """Of all strides but the channels', up to 8; 1 where channels don't lie next to each other."""
    batch, row, column, channel = strides
    return math.gcd(8, batch, row, column) if channel == 1 else 1


def geometry(tensors: list[Tensor], grid: list[int], registers: int) -> Geometry:
    """For tensors of one shape, the output first: its strides decide along what the threads go."""
    like = tensors[0]
    height, width = (like.shape[2], like.shape[3]) if like.dim() == 4 else grid
    channels = like.shape[1] if like.dim() == 4 else like.shape[2]
    strides = tuple(_strides(t, width) for t in tensors)
    columns = channels == 1 or strides[0][2] < strides[0][3]
    return Geometry(like.shape[0], height, width, channels, registers + height * width, strides, columns)


def _filters(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The taps as (k², C), so that neighbouring channels' lie next to each other."""
    channels, taps = weight.shape[0], weight.shape[-1] ** 2
    return weight.new_empty((taps, channels), dtype=dtype).copy_(weight.reshape(channels, taps).T)


def _convolve(
    x: Tensor, y: Tensor, filters: Tensor, bias: Tensor | None, g: Geometry, strides: tuple[Strides, Strides],
    k: int, registers: int, norm: tuple, flip: bool,
) -> None:  # fmt: skip
    """y = x, normalised if there is a norm, convolved with the filters, or with the turned filters, + bias."""
    entry = g.entry(x, "convolve", k, norm[0] is not None)
    cut = g.cut(entry)
    launch(
        kernels.convolve,
        (g.batch * cut.strips * cut.tiles * cut.blocks,),
        *(x, filters, bias, *norm, y),
        *g.sizes(cut, registers),
        *(0 if t is None else t.stride(0) for t in (bias, *norm[2:])),
        *(*strides[0], *strides[1]),
        warps=entry["warps"],
        FLIP=flip,
        **g.constants(cut, k, registers, x, X=strides[0], Y=strides[1]),
    )


def _kept(*statistics: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if t is None else t.contiguous() for t in statistics)


@register("depthwise_conv2d_fwd")
def depthwise_conv2d_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, grid: list[int], registers: int,
    mean: Tensor | None, rstd: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None,
) -> Tensor:  # fmt: skip
    """y; see the operator's docstring."""
    y = torch.empty_like(x)
    g = geometry([y, x], grid, registers)
    filters = _filters(weight, torch.float64 if x.dtype == torch.float64 else torch.float32)
    norm = (*_kept(mean, rstd), norm_weight, norm_bias)
    _convolve(x, y, filters, bias, g, g.strides[::-1], weight.shape[-1], registers, norm, flip=False)
    return y


@register("depthwise_conv2d_bwd")
def depthwise_conv2d_bwd(
    grad: Tensor, x: Tensor, weight: Tensor, grid: list[int], registers: int,
    mean: Tensor | None, rstd: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dx, dweight, dbias), the last two in the type of their sums; grad of any strides. With a norm, dx is the
    gradient of the normalised input."""
    dx = torch.empty_like(x)
    g = geometry([dx, x, grad], grid, registers)
    dx_strides, x_strides, g_strides = g.strides
    k = weight.shape[-1]
    filters = _filters(weight, torch.float64 if x.dtype == torch.float64 else torch.float32)
    norm = (*_kept(mean, rstd), norm_weight, norm_bias)
    entry = g.entry(x, "backward", k, mean is not None)
    if not entry["fused"]:
        _convolve(grad, dx, filters, None, g, (g_strides, dx_strides), k, registers, (None,) * 4, flip=True)
    cut = g.cut(entry)
    every = g.batch * cut.strips * cut.tiles
    per_part = max(1, triton.cdiv(every, max(1, entry["programs"] // max(1, cut.blocks))))
    parts = max(1, triton.cdiv(every, per_part))
    partial = filters.new_empty((parts, k * k + 1, g.channels))
    launch(
        kernels.backward,
        (parts * cut.blocks,),
        *(grad, x, filters, *norm, dx if entry["fused"] else None, partial),
        *(per_part, every, *g.sizes(cut, registers)),
        *(0 if t is None else t.stride(0) for t in norm[2:]),
        *(*g_strides, *x_strides, *dx_strides),
        warps=entry["warps"],
        **g.constants(cut, k, registers, x, G=g_strides, X=x_strides, Y=dx_strides),
    )
    dweight, dbias = filters.new_empty(weight.shape), filters.new_empty(weight.shape[:1])
    last = configuration(x, OPERATOR, "add_partials")
    launch(
        kernels.add_partials,
        (triton.cdiv((k * k + 1) * g.channels, last["block"]),),
        *(partial, dweight, dbias, parts, g.channels),
        warps=last["warps"],
        TAPS=k * k,
        ROWS=last["rows"],
        BLOCK=last["block"],
        BY=math.gcd(8, g.channels),
        ACC=ACCUMULATOR[x.dtype],
    )
    return dx, dweight, dbias
