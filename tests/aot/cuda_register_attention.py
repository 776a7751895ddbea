"""Register attention's launches at shapes that matter: ViT-S and -B, SdP-Net XL, and a sequence that doesn't fit."""

from __future__ import annotations

import ctypes
import re

from resources_cuda import case_name, dry

# All that run on tensor cores, and those alone: four widths of a head in two dtypes and passes, and three of backward.
TENSOR_CORES = re.compile(r"register_attention_(mma|wgmma)_(fwd|bwd)<")
TENSOR_CORES_COUNT = 2 * 2 * 4 + 2 * 3
WIDE = re.compile(r"register_attention_mma_(fwd|bwd)<")
WIDE_COUNT = 2 * 2 * 4
# For 48 rows of the other side, 16 of what is summed at a time: S and dP in both roles, then dV, dK and dQ. Both roles
# wait for S, for dP, and at the end.
WARPGROUPS = {
    f"register_attention_wgmma_bwd<{dtype}, {d}>": (4 * d // 16 + 3 * 3, 2 * 3)
    for dtype in ("bf16", "fp16")
    for d in (32, 64, 96)
}

# (B, T, 3, heads, d)
SHAPES = [
    *((256, tokens, 3, heads, 64) for tokens in (197, 201, 261, 1029) for heads in (6, 12)),
    *((256, tokens, 3, 8, 96) for tokens in (197, 201, 261, 1029)),
    (256, 261, 3, 8, 128),
    (256, 261, 3, 12, 32),
]


def _launched(shape: tuple[int, ...], dtype: str, backward: bool, form: int = 0):
    def launched(limits):
        batch, tokens, _, heads, d = shape
        pointer, told = ctypes.c_void_p(4096), (ctypes.c_int64 * 4)()
        sizes = (ctypes.c_int64 * 8)(batch, tokens, heads, d, 5, 1, 1, 0)
        numbers, norms = (ctypes.c_double * 3)(1e-5, d**-0.5, 0.0), (ctypes.c_int64 * 8)(*(4096, 1) * 4)
        if backward:
            gradients = (ctypes.c_int64 * 4)(*(4096,) * 4)
            arguments = (sizes, numbers, norms, *(pointer,) * 5, gradients, None, limits, form, told)
            return dry("register_attention", dtype, lambda library: library.register_attention_bwd(*arguments))
        arguments = (sizes, numbers, norms, pointer, pointer, pointer, None, limits, 0, told)
        return dry("register_attention", dtype, lambda library: library.register_attention_fwd(*arguments))

    return launched


CASES = {
    case_name(which, shape, "packed", dtype): _launched(shape, dtype, which == "bwd")
    for shape, dtype in (*((shape, "bf16") for shape in SHAPES), ((256, 261, 3, 8, 96), "fp32"))
    for which in ("fwd", "bwd")
}
FOR_WARPGROUPS = [shape for shape in SHAPES if shape[1] < 1029 and shape[4] <= 96]
CASES |= {case_name("bwd wgmma", s, "packed", "bf16"): _launched(s, "bf16", True, form=2) for s in FOR_WARPGROUPS}
ONLY = {case: "sm_90" for case in CASES if "wgmma" in case}
