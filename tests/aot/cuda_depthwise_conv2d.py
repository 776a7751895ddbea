"""Depthwise convolution's launches at shapes that matter: a ViT-like grid, ConvNeXt-B's stages, token buffers."""

from __future__ import annotations

import ctypes
import re

from resources_cuda import case_name, dry, views

WIDE = re.compile(r"depthwise_(fma|mma)_")
WIDE_COUNT = 3 * 4 * 2 + 2 * (3 + 4)
TENSOR_CORES = re.compile(r"depthwise_mma_")
TENSOR_CORES_COUNT = 2 * (3 + 4)

GRID = (256, 768, 16, 16)
STAGES = ((256, 128, 56, 56), (256, 256, 28, 28), (256, 512, 14, 14), (256, 1024, 7, 7))
LAYOUTS = ("channels_last", "contiguous")
# layout, (B, C, H, W), kernel size, dtype
SHAPES = [
    *((layout, GRID, k, "bf16") for layout in (*LAYOUTS, "tokens") for k in (3, 5, 7, 9)),
    *((layout, GRID, 7, dtype) for layout in LAYOUTS for dtype in ("fp16", "fp32")),
    *((layout, shape, 7, "bf16") for layout in LAYOUTS for shape in STAGES),
    *((layout, shape, 7, "fp32") for layout in LAYOUTS for shape in STAGES),
]
REGISTERS = 5


def _launched(layout: str, shape: tuple[int, ...], kernel: int, dtype: str, backward: bool):
    def launched(limits):
        _, channels, height, width = shape
        registers = REGISTERS if layout == "tokens" else 0
        pointer, none, told = ctypes.c_void_p(4096), (ctypes.c_void_p * 4)(), (ctypes.c_int64 * 8)()
        if layout == "tokens":  # rows of channels, a picture with a longer step from image to image
            step = (registers + height * width) * channels
            tensors = (ctypes.c_int64 * 15)(*(4096, step, 1, width * channels, channels) * 3)
        else:
            tensors = views(shape, layout, [True] * 3)
        weight = (kernel * kernel, kernel, 1)
        numbers = (ctypes.c_int64 * 15)(*shape, registers, kernel, *weight, 1, 0, 1, 1, 1, 132)
        if backward:
            arguments = (numbers, tensors, pointer, none, pointer, pointer, told)
            return dry("depthwise_conv2d", dtype, lambda library: library.depthwise_conv2d_bwd(*arguments))
        arguments = (numbers, tensors, pointer, pointer, none, told)
        return dry("depthwise_conv2d", dtype, lambda library: library.depthwise_conv2d_fwd(*arguments))

    return launched


CASES = {
    case_name(f"{which} {k}x{k}", shape, layout, dtype): _launched(layout, shape, k, dtype, which == "bwd")
    for layout, shape, k, dtype in SHAPES
    for which in ("fwd", "bwd")
}
