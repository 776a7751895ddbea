"""KeLü's CUDA kernels on CPU tensors, through the emulator."""

from __future__ import annotations

import ctypes

import simt_emulator as emulator
import torch
from torch import Tensor


def kelu(x: Tensor, grad: Tensor | None = None, y: Tensor | None = None) -> Tensor:
    """KeLü of x, or with ``grad`` its gradient, written to ``y`` (of any strides) or to a new tensor like x."""
    outputs = emulator.Outputs()
    y = outputs.out(torch.empty_like(x) if y is None else y)
    tensors = [y, x] if grad is None else [y, x, grad]
    sizes, strides = merged(tensors)
    numbers = [*sizes, *strides[0], *strides[1], *(strides[2] if grad is not None else [0] * len(sizes))]
    emulator.library("kelu", x.dtype).kelu(
        *(emulator.pointer(grad), emulator.pointer(x), emulator.pointer(y), ctypes.c_int64(x.numel()), len(sizes)),
        (ctypes.c_int64 * max(1, len(numbers)))(*numbers),
    )
    outputs.assert_untouched()
    return y


def merged(tensors: list[Tensor]) -> tuple[list[int], list[list[int]]]:
    """Sizes and, per tensor, strides of dimensions merged as far as they go, outermost first, as by host.cuh."""
    dims = [(n, [t.stride(d) for t in tensors]) for d, n in enumerate(tensors[0].shape) if n != 1]
    dims.sort(key=lambda dim: -dim[1][0])
    out: list[tuple[int, list[int]]] = []
    for n, strides in dims:
        if out and all(outer == inner * n for outer, inner in zip(out[-1][1], strides)):
            out[-1] = (out[-1][0] * n, strides)
        else:
            out.append((n, strides))
    return [n for n, _ in out], [[s[k] for _, s in out] for k in range(len(tensors))]
