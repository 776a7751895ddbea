"""The depthwise convolution's Triton launches, one per entry of the table."""

from __future__ import annotations

import torch

from sdp_kernels.triton import depthwise_conv2d as conv

MODULES = (conv,)
NARROW = ("convolve", "backward")
"""A lane takes one or two neighbouring channels, whose sums and taps fill the registers: loads of 2 to 8 bytes."""


def _parameters(channels: int, k: int, dtype: torch.dtype):
    return torch.empty(channels, 1, k, k, dtype=dtype), torch.empty(channels, dtype=dtype)


def _norm(x: torch.Tensor, normed: bool) -> tuple:
    if not normed:
        return (None,) * 4
    statistics = torch.empty((x.shape[0], *x.shape[2:]) if x.dim() == 4 else x.shape[:2])
    channels = torch.empty(x.shape[1] if x.dim() == 4 else x.shape[2])
    return statistics, statistics, channels, channels


def call(parts: list[str]):
    dtype = torch.bfloat16 if parts[-1] == "16bit" else torch.float32
    if parts[0] == "add_partials":
        x, k, normed, which = torch.empty(2, 768, 16, 16, dtype=dtype), 7, False, -1
    else:
        layout, k = parts[1].removeprefix("normed "), int(parts[2].removeprefix("k"))
        x, normed = torch.empty(2, 768, 16, 16, dtype=dtype), parts[1].startswith("normed")
        x = x.contiguous(memory_format=torch.channels_last) if layout == "rows" else x
        which = -2
    weight, bias = _parameters(768, k, dtype)
    if parts[0] == "convolve":
        return (lambda: conv.depthwise_conv2d_fwd(x, weight, bias, [], 0, *_norm(x, normed))), 0
    return (lambda: conv.depthwise_conv2d_bwd(x, x, weight, [], 0, *_norm(x, normed))), which


def _both(x: torch.Tensor, k: int = 7, grid=(), registers: int = 0, normed: bool = False):
    weight, bias = _parameters(x.shape[1] if x.dim() == 4 else x.shape[2], k, x.dtype)
    norm = _norm(x, normed)

    def both():
        conv.depthwise_conv2d_fwd(x, weight, bias, list(grid), registers, *norm)
        conv.depthwise_conv2d_bwd(x, x, weight, list(grid), registers, *norm)

    return both


def variants():
    bf16 = torch.bfloat16
    last = torch.channels_last
    far = torch.empty_strided((2, 64, 16, 16), (2**36, 2**30, 16, 1), dtype=bf16, device="meta")
    return {
        "fp16": _both(torch.empty(2, 768, 16, 16, dtype=torch.float16).to(memory_format=last), 5),
        "token buffer": _both(torch.empty(2, 261, 768, dtype=bf16), 7, (16, 16), 5),
        "normed token buffer": _both(torch.empty(2, 201, 384, dtype=bf16), 7, (14, 14), 5, True),
        "normed picture": _both(torch.empty(2, 384, 14, 14, dtype=bf16), 7, normed=True),
        "7 x 7": _both(torch.empty(2, 1024, 7, 7, dtype=bf16).to(memory_format=last), 7),
        "odd sizes": _both(torch.empty(2, 77, 15, 17, dtype=bf16).to(memory_format=last), 5),
        "far": _both(far, 3),
    }


WIDE_VARIANTS = ()
SPILLING_VARIANTS = ("odd sizes",)
"""An odd number of channels: no load is of two, and their addresses take a few registers too many."""
