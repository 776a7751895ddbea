"""KeLü's Triton launches, one per entry of the table."""

from __future__ import annotations

import torch

from sdp_kernels.triton import kelu

MODULES = (kelu,)
NARROW = ("/line/", "/narrow/", "/square/")
"""Strides that allow no wide loads."""


def call(parts: list[str]):
    pass_, layout, width = parts
    dtype = torch.bfloat16 if width == "16bit" else torch.float32
    x = torch.empty(64, 48, 64, dtype=dtype)
    x = {
        "dense": x,
        "line": torch.empty(1000, 2, dtype=dtype)[:, 0],
        "square": x[:, :, :56],
        "narrow": torch.empty(64, 9, dtype=dtype)[:, :7],
    }[layout]
    grad = torch.empty(x.shape, dtype=dtype)
    return (lambda: kelu.kelu_fwd(x)) if pass_ == "forward" else (lambda: kelu.kelu_bwd(grad, x)), 0


def variants():
    x = torch.empty(4096, dtype=torch.float16)
    return {"fp16": lambda: (kelu.kelu_fwd(x), kelu.kelu_bwd(x, x))}


WIDE_VARIANTS = ("fp16",)
"""Of these the first launch loads 16 bytes at a time."""
SPILLING_VARIANTS = ()
