"""linear's Triton launches, one per entry of the table."""

from __future__ import annotations

import torch

from sdp_kernels.triton import linear

MODULES = (linear,)
NARROW = ("add_partials", "odd-")
"""Partial sums are few; odd strides allow no wide loads."""


def _inputs(columns: int, dtype: torch.dtype):
    z = torch.empty(2, 261, columns, dtype=dtype)
    return z, torch.empty(columns), torch.empty(2), torch.empty(3, dtype=torch.int64)


def call(parts: list[str]):
    dtype = torch.bfloat16 if parts[-1] == "16bit" else torch.float32
    z, scale, mask, _ = _inputs(767 if parts[1] == "odd rows" else 768, dtype)
    if parts[0] == "forward":
        return (lambda: linear.linear_epilogue_fwd(z, "gelu", scale, mask, z, 5, 0.0, None, 1)), 0
    return (lambda: linear.linear_epilogue_bwd(z, z, "gelu", scale, mask, 5, 0.0, None, 1)), parts[0] == "add_partials"


def _both(activation: str, columns: int = 768, dtype=torch.bfloat16, scale=True, dropout=0.0, residual=None):
    z, layer_scale, mask, rng = _inputs(columns, dtype)
    layer_scale = layer_scale if scale else None
    residual = None if residual is None else z.to(residual)
    grad = z if residual is None else residual

    def both():
        linear.linear_epilogue_fwd(z, activation, layer_scale, mask, residual, 5, dropout, rng, 1)
        linear.linear_epilogue_bwd(grad, z, activation, layer_scale, mask, 5, dropout, rng, 1)

    return both


def variants():
    activations = ("none", "kelu", "gelu", "fast_gelu", "relu", "tanh", "sigmoid", "leaky_relu", "selu")
    return {
        **{name: _both(name, residual=torch.bfloat16) for name in activations},
        "fp16": _both("gelu", dtype=torch.float16),
        "without scale": _both("gelu", scale=False),
        "bf16 in fp32": _both("kelu", residual=torch.float32),
        "dropout": _both("gelu", dropout=0.3, residual=torch.bfloat16),
        "dropout of odd rows": _both("gelu", 767, dropout=0.3),
        "dropout fp32": _both("gelu", dtype=torch.float32, dropout=0.3),
    }


WIDE_VARIANTS = ("gelu", "kelu", "fp16", "dropout", "bf16 in fp32")
"""Of these the first launch loads 16 bytes at a time."""
SPILLING_VARIANTS = ()
