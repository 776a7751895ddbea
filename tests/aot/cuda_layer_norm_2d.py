"""LayerNorm's launches at shapes that matter: pictures (B, C, H, W) and token buffers (B, T, C)."""

from __future__ import annotations

import ctypes
import re

from resources_cuda import case_name, dry, views

# Packed rows, columns of packs.
WIDE = re.compile(r"layer_norm_(teams|block)_\w+<.*yes>|layer_norm_columns_\w+<(fp32, 4|\w+, 8),")
WIDE_COUNT = 3 * (2 * 4 + 2 + 2 * 2)

SHAPES = [
    *((layout, (256, 768, 16, 16), dtype) for layout in ("channels_last", "contiguous") for dtype in ("bf16", "fp32")),
    *(
        (layout, shape, "bf16")
        for layout in ("channels_last", "contiguous")
        for shape in ((256, 96, 56, 56), (256, 192, 28, 28), (256, 384, 14, 14), (256, 768, 7, 7), (256, 1536, 8, 8))
    ),
    *(("tokens", (256, 261, c), "bf16") for c in (384, 512, 768, 1024, 2048, 4096, 8192)),
    ("contiguous", (64, 8192, 8, 8), "bf16"),
]


def _launched(layout: str, shape: tuple[int, ...], dtype: str, backward: bool):
    def launched(limits):
        pointer, told = ctypes.c_void_p(4096), (ctypes.c_int64 * 5)()
        sizes = (ctypes.c_int64 * 4)(*(shape if len(shape) == 4 else (shape[0], shape[2], 1, shape[1])))
        registers, eps = ctypes.c_int64(5 if layout == "tokens" else 0), ctypes.c_double(1e-6)
        statistics = (pointer, pointer)
        if backward:
            tensors, gradients = views(shape, layout, [True] * 4), (pointer, pointer)
            arguments = (sizes, tensors, registers, pointer, 1, *statistics, *gradients, limits, told)
            return dry("layer_norm_2d", dtype, lambda library: library.layer_norm_2d_bwd(*arguments))
        tensors = views(shape, layout, [True, False, True, False])
        arguments = (sizes, tensors, registers, eps, pointer, pointer, 1, 1, *statistics, limits, told)
        return dry("layer_norm_2d", dtype, lambda library: library.layer_norm_2d_fwd(*arguments))

    return launched


CASES = {
    case_name(which, shape, layout, dtype): _launched(layout, shape, dtype, which == "bwd")
    for layout, shape, dtype in SHAPES
    for which in ("fwd", "bwd")
}
