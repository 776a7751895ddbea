"""linear's Triton launches, one per entry of the table."""

from __future__ import annotations

import torch

from sdp_kernels.triton import _linear_gemm, linear

MODULES = (linear, _linear_gemm)
NARROW = ("add_partials", "odd-", "descriptors", "form/")
"""Partial sums are few; odd strides allow no wide loads; TMA loads through descriptors."""
TENSOR_CORES = tuple(
    f"gemm_{pass_}/{way}/16bit" for pass_ in ("forward", "backward") for way in ("descriptors", "pointers")
)
TENSOR_CORES += ("form/",)
SHAPES = {"expand": (768, 3072), "project": (3072, 768), "square": (768, 768)}


def _inputs(columns: int, dtype: torch.dtype):
    z = torch.empty(2, 261, columns, dtype=dtype)
    return z, torch.empty(columns), torch.empty(2), torch.empty(3, dtype=torch.int64)


def _gemm(pass_: str, form: str, dtype: torch.dtype, rows_apart: bool = False, activation: str = "gelu", dropout=0.0):
    """What a ConvMLP block asks of a weight of that form; rows apart are no descriptor's."""
    depth, columns = SHAPES[form]
    x, buffer = torch.empty(2, 261, depth, dtype=dtype), torch.empty(2, 262, columns, dtype=dtype)
    weight, bias = torch.empty(columns, depth, dtype=dtype), torch.empty(columns, dtype=dtype)
    far = buffer[:, 1:] if rows_apart else buffer[:1].view(-1)[: 261 * columns].view(1, 261, columns).repeat(2, 1, 1)
    if pass_ == "backward":
        before = torch.empty(depth, columns, dtype=dtype)
        return lambda: _linear_gemm.linear_gemm_bwd(x, before, far, activation, 5)
    outer = (torch.empty(columns), torch.empty(2), far) if rows_apart or form != "expand" else (None, None, None)
    activation = "none" if form == "project" and activation == "gelu" else activation
    rng = torch.empty(3, dtype=torch.int64)
    return lambda: _linear_gemm.linear_gemm_fwd(x, weight, bias, activation, *outer, 5, dropout, rng, 1, True)


def call(parts: list[str]):
    dtype = torch.bfloat16 if parts[-1] == "16bit" else torch.float32
    if parts[0] == "form":
        return _gemm(parts[1], parts[2], dtype), 0
    if parts[0].startswith("gemm"):
        return _gemm(parts[0].removeprefix("gemm_"), "square", dtype, parts[1] == "pointers"), 0
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
        **{f"gemm {name}": _gemm("forward", "square", torch.bfloat16, False, name) for name in activations},
        **{f"gemm backward {name}": _gemm("backward", "expand", torch.bfloat16, False, name) for name in activations},
        "gemm fp16": _gemm("forward", "expand", torch.float16),
        "gemm dropout": _gemm("forward", "square", torch.bfloat16, dropout=0.3),
    }


WIDE_VARIANTS = ("gelu", "kelu", "fp16", "dropout", "bf16 in fp32")
"""Of these the first launch loads 16 bytes at a time."""
SPILLING_VARIANTS = ()
