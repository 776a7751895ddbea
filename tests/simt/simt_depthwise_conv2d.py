"""Depthwise convolution's CUDA kernels on CPU tensors, through the emulator."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field

import simt_emulator as emulator
import torch
from torch import Tensor

ACCESSES = ("channels", "columns", "channel packs", "row packs", "plane packs")
KERNELS = ("fma", "mma")
H200 = (True, 132)
"""Whether there are tensor cores, and multiprocessors."""


@dataclass
class Told(emulator.Outputs):
    """What a launch decided, and its guarded outputs."""

    numbers: ctypes.Array = field(default_factory=lambda: (ctypes.c_int64 * 8)())

    @property
    def kernel(self) -> str:
        return KERNELS[self.numbers[0]]

    @property
    def accesses(self) -> list[str]:
        """Of x, of y or dx, of grad."""
        return [ACCESSES[n] for n in self.numbers[1:4]]

    @property
    def images(self) -> int:
        """Of a tile."""
        return self.numbers[4]

    @property
    def splits(self) -> int:
        """Blocks that share the tiles of their channels."""
        return self.numbers[5]

    @property
    def tiles(self) -> tuple[int, int]:
        """Of an image: rows and columns of tiles."""
        return self.numbers[6], self.numbers[7]


def sizes(x: Tensor, grid: tuple[int, int] | None) -> tuple[int, int, int, int]:
    """B, C, H, W."""
    return tuple(x.shape) if x.dim() == 4 else (x.shape[0], x.shape[2], *grid)


def strides(t: Tensor, grid: tuple[int, int] | None) -> tuple[int, int, int, int]:
    """Of B, C, H, W."""
    s = t.stride()
    return s if t.dim() == 4 else (s[0], s[2], grid[1] * s[1], s[1])


def before(t: Tensor, registers: int) -> int:
    """Elements before the first pixel."""
    return 0 if t.dim() == 4 else registers * t.stride(1)


def numbers(x, weight, bias, grid, registers, norm, options) -> list[int]:
    """As struct Numbers of depthwise_conv2d.cpp."""
    wide = [int(p.dtype == emulator.wide_dtype(x.dtype)) for p in norm[2:]] if norm else [0, 0]
    kernel = (weight.shape[-1], weight.stride(0), weight.stride(2), weight.stride(3))
    rest = (0 if bias is None else bias.stride(0), norm[0].stride(0) if norm else 0, *wide, *map(int, options))
    return [*sizes(x, grid), registers, *kernel, *rest]


def _array(values: list[int]) -> ctypes.Array:
    return (ctypes.c_int64 * len(values))(*values)


def _views(grid, registers, *tensors: Tensor) -> ctypes.Array:
    rows = [(t.data_ptr() + before(t, registers) * t.itemsize, *strides(t, grid)) for t in tensors]
    return _array([n for row in rows for n in row])


def _norm(norm, x: Tensor, registers: int) -> ctypes.Array:
    if norm is None:
        return (ctypes.c_void_p * 4)()
    skipped = 0 if x.dim() == 4 else registers
    statistics = [s.data_ptr() + skipped * s.itemsize for s in norm[:2]]
    return (ctypes.c_void_p * 4)(*statistics, *(p.data_ptr() for p in norm[2:]))


def depthwise_fwd(x, weight, bias=None, grid=None, registers=0, norm=None, options=H200) -> tuple[Tensor, Told]:
    """(y, told) as ``depthwise_conv2d_fwd`` gives it; ``options`` as H200's."""
    told = Told()
    y = told.out(torch.empty_like(x))
    emulator.library("depthwise_conv2d", x.dtype).depthwise_conv2d_fwd(
        _array(numbers(x, weight, bias, grid, registers, norm, options)),
        *(_views(grid, registers, x, y), emulator.pointer(weight), emulator.pointer(bias)),
        *(_norm(norm, x, registers), told.numbers),
    )
    told.assert_untouched()
    return y, told


def depthwise_bwd(
    grad, x, weight, grid=None, registers=0, norm=None, options=H200
) -> tuple[Tensor, Tensor, Tensor, Told]:
    """(dx, dweight, dbias, told) as ``depthwise_conv2d_bwd`` gives them."""
    told = Told()
    dx = told.out(torch.empty_like(x))
    sums = (weight.new_empty(n, dtype=emulator.wide_dtype(x.dtype)) for n in (weight.shape, weight.shape[0]))
    dweight, dbias = map(told.out, sums)
    emulator.library("depthwise_conv2d", x.dtype).depthwise_conv2d_bwd(
        _array(numbers(x, weight, None, grid, registers, norm, options)),
        *(_views(grid, registers, x, dx, grad), emulator.pointer(weight), _norm(norm, x, registers)),
        *(emulator.pointer(dweight), emulator.pointer(dbias), told.numbers),
    )
    told.assert_untouched()
    return dx, dweight, dbias, told
