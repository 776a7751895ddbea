"""KeLü's launches at shapes that matter."""

from __future__ import annotations

import ctypes
import math
import re

from resources_cuda import case_name, dry

WIDE, WIDE_COUNT = re.compile(r"kelu_dense"), 6


def _launched(shape: tuple[int, ...], dtype: str, backward: bool):
    def launched(limits):
        n, pointer = math.prod(shape), ctypes.c_void_p(4096)
        strides = (ctypes.c_int64 * 4)(n, 1, 1, 1)
        grad = pointer if backward else None
        return dry("kelu", dtype, lambda library: library.kelu(grad, pointer, pointer, ctypes.c_int64(n), 1, strides))

    return launched


CASES = {
    case_name(which, (256, 3072, 16, 16), "dense", dtype): _launched((256, 3072, 16, 16), dtype, which == "bwd")
    for dtype in ("bf16", "fp32")
    for which in ("fwd", "bwd")
}
