"""LayerNorm's CUDA kernels on CPU tensors, through the emulator."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field

import simt_emulator as emulator
import torch
from torch import Tensor

FAMILIES = ("teams", "blocks", "columns")


@dataclass
class Told(emulator.Outputs):
    """What a launch decided, and its guarded outputs."""

    numbers: ctypes.Array = field(default_factory=lambda: (ctypes.c_int64 * 5)())

    @property
    def family(self) -> str:
        return FAMILIES[self.numbers[0]]

    @property
    def packed(self) -> bool:
        """16-byte accesses."""
        return self.numbers[1] == 1

    @property
    def half_packed(self) -> bool:
        """8-byte accesses."""
        return self.numbers[1] == 2

    @property
    def on_chip(self) -> bool:
        return bool(self.numbers[2])

    @property
    def sums_on_chip(self) -> bool:
        return bool(self.numbers[3])

    @property
    def tile_pixels(self) -> int:
        return self.numbers[4]


def layer_norm_fwd(
    x, residual, weight, bias, eps=1e-6, registers=0, limits=emulator.H200
) -> tuple[Tensor, Tensor, Tensor, Tensor, Told]:
    """(y, mean, rstd, sum, told) as ``layer_norm_2d_fwd`` gives them."""
    told = Told()
    y = told.out(torch.empty_like(x))
    total = None if residual is None else told.out(torch.empty_like(x))
    shape = (x.shape[0], *x.shape[2:]) if x.dim() == 4 else x.shape[:2]
    mean, rstd = (told.out(torch.empty(shape, dtype=emulator.wide_dtype(x.dtype))) for _ in range(2))
    wide = [int(p.dtype == emulator.wide_dtype(x.dtype)) for p in (weight, bias)]
    emulator.library("layer_norm_2d", x.dtype).layer_norm_2d_fwd(
        *(emulator.sizes(x), emulator.views(x, residual, y, total), ctypes.c_int64(registers), ctypes.c_double(eps)),
        *(emulator.pointer(weight), emulator.pointer(bias), *wide, emulator.pointer(mean), emulator.pointer(rstd)),
        *((ctypes.c_int64 * 3)(*limits), told.numbers),
    )
    told.assert_untouched()
    return y, mean, rstd, total, told


def layer_norm_bwd(
    grad, grad_sum, x, weight, mean, rstd, registers=0, limits=emulator.H200
) -> tuple[Tensor, Tensor, Tensor, Told]:
    """(dx, dweight, dbias, told) as ``layer_norm_2d_bwd`` gives them."""
    told = Told()
    dx, dweight, dbias = told.out(torch.empty_like(x)), told.out(weight), told.out(weight)
    wide = int(weight.dtype == emulator.wide_dtype(x.dtype))
    emulator.library("layer_norm_2d", x.dtype).layer_norm_2d_bwd(
        *(emulator.sizes(x), emulator.views(x, grad, grad_sum, dx), ctypes.c_int64(registers)),
        *(
            emulator.pointer(weight),
            wide,
            emulator.pointer(mean),
            emulator.pointer(rstd),
        ),
        *(emulator.pointer(dweight), emulator.pointer(dbias), (ctypes.c_int64 * 3)(*limits), told.numbers),
    )
    told.assert_untouched()
    return dx, dweight, dbias, told
