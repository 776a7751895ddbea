"""The CUDA kernels around linear's GEMM on CPU tensors, through the emulator."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field

import simt_emulator as emulator
import torch
from torch import Tensor

from sdp_kernels.ops.activation import ACTIVATIONS


@dataclass
class Told(emulator.Outputs):
    """What a launch decided, and its guarded outputs."""

    numbers: ctypes.Array = field(default_factory=lambda: (ctypes.c_int64 * 3)())

    @property
    def packed(self) -> bool:
        """16-byte accesses."""
        return bool(self.numbers[0])

    @property
    def lanes(self) -> int:
        return self.numbers[1]

    @property
    def chunks(self) -> int:
        return self.numbers[2]


def _views(*tensors: Tensor | None) -> ctypes.Array:
    numbers = [n for t in tensors for n in ((0,) * 4 if t is None else (t.data_ptr(), *t.stride()))]
    return (ctypes.c_int64 * len(numbers))(*numbers)


def _common(z, other, activation, layer_scale, path_mask, registers, dropout, rng, layer, multiprocessors):
    assert path_mask is None or (path_mask.dtype == torch.float32 and path_mask.is_contiguous())
    wide = layer_scale is not None and layer_scale.dtype == emulator.wide_dtype(z.dtype)
    numbers = (registers, ACTIVATIONS.index(activation), int(wide), layer, multiprocessors)
    return (
        *((ctypes.c_int64 * 3)(*z.shape), _views(z, other), (ctypes.c_int64 * 5)(*numbers)),
        *(emulator.pointer(layer_scale), emulator.pointer(path_mask), ctypes.c_double(dropout), emulator.pointer(rng)),
    )


def epilogue_fwd(
    z: Tensor, activation="none", layer_scale=None, path_mask=None, residual=None, registers=0, dropout=0.0, rng=None,
    layer=0, multiprocessors=132, shift=0,
) -> tuple[Tensor, Told]:  # fmt: skip
    """(y, told) as ``linear_epilogue_fwd`` gives it; ``shift``: of y from an alignment of 16 bytes."""
    told = Told()
    dtype = z.dtype if residual is None else residual.dtype
    y = told.out(torch.empty(z.shape, dtype=dtype), shift)
    common = _common(z, residual, activation, layer_scale, path_mask, registers, dropout, rng, layer, multiprocessors)
    emulator.library("linear", z.dtype).linear_epilogue_fwd(
        *common, emulator.pointer(y), int(dtype == emulator.wide_dtype(z.dtype)), told.numbers
    )
    told.assert_untouched()
    return y, told


def epilogue_bwd(
    grad: Tensor, z: Tensor, activation="none", layer_scale=None, path_mask=None, registers=0, dropout=0.0, rng=None,
    layer=0, multiprocessors=132,
) -> tuple[Tensor, Tensor, Tensor, Told]:  # fmt: skip
    """(dz, dlayer_scale, dbias, told) as ``linear_epilogue_bwd`` gives them."""
    told, wide = Told(), emulator.wide_dtype(z.dtype)
    dz = told.out(torch.empty(z.shape, dtype=z.dtype))
    dscale = told.out(torch.empty(0 if layer_scale is None else z.shape[2], dtype=wide))
    dbias = told.out(torch.empty(z.shape[2], dtype=wide))
    common = _common(z, grad, activation, layer_scale, path_mask, registers, dropout, rng, layer, multiprocessors)
    emulator.library("linear", z.dtype).linear_epilogue_bwd(
        *(*common, emulator.pointer(dz), emulator.pointer(dscale), emulator.pointer(dbias)),
        *(int(grad.dtype == wide), told.numbers),
    )
    told.assert_untouched()
    return dz, dscale, dbias, told
