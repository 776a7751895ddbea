"""LayerNorm's Triton launches, one per entry of the table."""

from __future__ import annotations

import torch

from sdp_kernels.triton import layer_norm_2d

MODULES = (layer_norm_2d,)
NARROW = ("add_partials", "odd-", "rows/16/16bit", "backward/columns/16/16bit")
"""Partial sums are few; odd strides allow no wide loads; twelve channels of 16 bits are 24 bytes; a tile of 32 pixels
on 128 threads gives each less than 16 bytes."""


def call(parts: list[str]):
    pass_, layout = parts[0], parts[1].removeprefix("odd ")
    dtype = torch.bfloat16 if parts[-1] == "16bit" else torch.float32
    pixels = 15 if parts[1] == "odd columns" else 16
    if pass_ in ("forward", "backward"):
        channels, which = int(parts[2]) * 3 // 4 - (parts[1] == "odd rows"), 0
    elif pass_ == "add_partials":
        channels, which = (768, 1) if parts[1] == "narrow" else (1536, 1)
    else:
        channels, which = 16384, 1 if pass_ in ("normalise", "apply") else 0
    x = torch.empty(2, channels, pixels, pixels, dtype=dtype)
    if layout == "rows":
        x = x.contiguous(memory_format=torch.channels_last)
    weight, statistics = torch.empty(channels), torch.empty(2, pixels, pixels)
    if pass_ in ("forward", "statistics", "normalise"):
        return (lambda: layer_norm_2d.layer_norm_2d_fwd(x, x, weight, weight, 1e-6, 0)), which
    return (lambda: layer_norm_2d.layer_norm_2d_bwd(x, x, x, weight, statistics, statistics, 0)), which


def _both(x: torch.Tensor, registers: int = 0, residual: bool = False):
    weight = torch.empty(x.shape[1] if x.dim() == 4 else x.shape[2])
    statistics = torch.empty((x.shape[0], *x.shape[2:]) if x.dim() == 4 else x.shape[:2])
    more = x if residual else None

    def both():
        layer_norm_2d.layer_norm_2d_fwd(x, more, weight, weight, 1e-6, registers)
        layer_norm_2d.layer_norm_2d_bwd(x, more, x, weight, statistics, statistics, registers)

    return both


def variants():
    bf16 = torch.bfloat16
    rows = torch.empty(2, 17, 17, 96, dtype=bf16)[:, :16, 1:].permute(0, 3, 1, 2)
    far = torch.empty_strided((2, 64, 16, 16), (2**36, 2**30, 16, 1), dtype=bf16, device="meta")
    return {
        "fp16": _both(torch.empty(2, 768, 16, 16, dtype=torch.float16)),
        "token buffer": _both(torch.empty(2, 261, 768, dtype=bf16), 5, True),
        "14 x 14": _both(torch.empty(2, 384, 14, 14, dtype=bf16)),
        "7 x 7": _both(torch.empty(2, 1024, 7, 7, dtype=bf16), residual=True),
        "image rows of tokens": _both(rows),
        "far": _both(far),
    }


WIDE_VARIANTS = ("fp16", "token buffer")
"""Of these the first launch loads 16 bytes at a time."""
SPILLING_VARIANTS = ("far",)
"""Strides of more than 2³¹ elements: rare, and allowed to spill."""
