"""Launches around linear's GEMM at shapes that matter: token buffers (B, T, N), residual branches and hidden layers."""

from __future__ import annotations

import ctypes
import re

from resources_cuda import case_name, dry

WIDE, WIDE_COUNT = re.compile(r"linear_epilogue_rows_\w+<.*yes>"), 2 * 5 * 4
KINDS = {"none": 0, "kelu": 1, "gelu": 2, "tanh": 5}


def _launched(shape: tuple[int, int, int], dtype: str, activation: str, branch: bool, wide: bool, backward: bool):
    """``branch``: with γ, a drop-path mask and a residual, which is fp32 if ``wide``."""

    def launched(limits):
        pointer, told = ctypes.c_void_p(4096), (ctypes.c_int64 * 3)()
        strides = (4096, shape[1] * shape[2], shape[2], 1)
        other = strides if branch or backward else (0,) * 4
        tensors = (ctypes.c_int64 * 8)(*strides, *other)
        numbers = (ctypes.c_int64 * 5)(5 if branch else 0, KINDS[activation], 1, 0, 132)
        around = (pointer, pointer) if branch else (None, None)
        common = ((ctypes.c_int64 * 3)(*shape), tensors, numbers, *around, ctypes.c_double(0), None)
        if backward:
            arguments = (*common, pointer, pointer, pointer, int(wide), told)
            return dry("linear", dtype, lambda library: library.linear_epilogue_bwd(*arguments))
        return dry("linear", dtype, lambda library: library.linear_epilogue_fwd(*common, pointer, int(wide), told))

    return launched


def _cases():
    hidden, tokens = (256, 261, 3072), (256, 261, 768)
    forms = [(hidden, "bf16", name, False, False) for name in ("kelu", "gelu", "tanh")]
    forms += [(tokens, "bf16", name, True, wide) for name in ("kelu", "none") for wide in (False, True)]
    forms += [((256, 261, c), "bf16", "kelu", True, False) for c in (128, 256, 384, 512, 1024)]
    forms += [(hidden, "fp32", "kelu", False, True), (tokens, "fp32", "kelu", True, True)]
    for shape, dtype, activation, branch, wide in forms:
        form = activation + (" branch" if branch else "") + (" fp32 residual" if wide and dtype != "fp32" else "")
        for which in ("fwd", "bwd"):
            yield (
                case_name(which, shape, form, dtype),
                _launched(shape, dtype, activation, branch, wide, which == "bwd"),
            )


CASES = dict(_cases())
