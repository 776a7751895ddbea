"""Register attention's CUDA kernels on CPU tensors, through the emulator."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import simt_emulator as emulator
import torch
from torch import Tensor

OPERATOR = "register_attention"


@dataclass
class Told:
    """What a launch decided."""

    chunk: int
    """Rows of the other side that are on chip at a time."""
    rounds: int
    """How often a block's warps take new rows."""
    parts: int
    """Blocks of a head (and role)."""
    wgmma: int
    """Whether it multiplies with warpgroups."""


def _arguments(qkv: Tensor, norms, eps, scale, registers, attend, dropout, layer):
    batch, tokens, _, heads, d = qkv.shape
    reads = [int(attend in ("all", "registers_to_registers")), int(attend in ("all", "image_to_image"))]
    sizes = (ctypes.c_int64 * 8)(batch, tokens, heads, d, registers, *reads, layer)
    numbers = (ctypes.c_double * 3)(eps, scale, dropout)
    wide = emulator.wide_dtype(qkv.dtype)
    pointers = []
    for p in norms:
        pointers += [0, 0] if p is None else [p.data_ptr(), int(p.dtype == wide)]
    return sizes, numbers, (ctypes.c_int64 * 8)(*pointers)


def forward(
    qkv: Tensor,
    norms=(None,) * 4,
    *,
    eps=1e-5,
    scale=None,
    registers=0,
    attend="all",
    dropout=0.0,
    rng=None,
    layer=0,
    limits=emulator.H200,
    fma=False,
) -> tuple[Tensor, Tensor, Told]:
    """(y, lse, told) as ``register_attention_fwd`` gives them."""
    assert qkv.is_contiguous()
    outputs = emulator.Outputs()
    batch, tokens, _, heads, d = qkv.shape
    y = outputs.out(torch.empty(batch, tokens, heads * d, dtype=qkv.dtype))
    lse = outputs.out(torch.empty(batch, heads, tokens, dtype=emulator.wide_dtype(qkv.dtype)))
    scale = d**-0.5 if scale is None else scale
    told = (ctypes.c_int64 * 4)()
    emulator.library(OPERATOR, qkv.dtype).register_attention_fwd(
        *_arguments(qkv, norms, eps, scale, registers, attend, dropout, layer),
        *(emulator.pointer(qkv), emulator.pointer(y), emulator.pointer(lse), emulator.pointer(rng)),
        *((ctypes.c_int64 * 3)(*limits), int(fma), told),
    )
    outputs.assert_untouched()
    return y, lse, Told(*told)


def backward(
    grad: Tensor,
    qkv: Tensor,
    y: Tensor,
    lse: Tensor,
    norms=(None,) * 4,
    *,
    eps=1e-5,
    scale=None,
    registers=0,
    attend="all",
    dropout=0.0,
    rng=None,
    layer=0,
    limits=emulator.H200,
    fma=False,
    wgmma=False,
) -> tuple[Tensor, list[Tensor | None], Told]:
    """(dqkv, gradients of q weight, q bias, k weight, k bias, told); None for the gradient of what is None."""
    assert all(t.is_contiguous() for t in (grad, qkv, y, lse))
    outputs = emulator.Outputs()
    dqkv = outputs.out(torch.empty_like(qkv))
    d = qkv.shape[-1]
    wide = emulator.wide_dtype(qkv.dtype)
    gradients = [None if p is None else outputs.out(torch.empty(d, dtype=wide)) for p in norms]
    scale = d**-0.5 if scale is None else scale
    told = (ctypes.c_int64 * 4)()
    emulator.library(OPERATOR, qkv.dtype).register_attention_bwd(
        *_arguments(qkv, norms, eps, scale, registers, attend, dropout, layer),
        *(emulator.pointer(t) for t in (grad, qkv, y, lse, dqkv)),
        (ctypes.c_int64 * 4)(*(0 if g is None else g.data_ptr() for g in gradients)),
        *(emulator.pointer(rng), (ctypes.c_int64 * 3)(*limits), 2 if wgmma else int(fma), told),
    )
    outputs.assert_untouched()
    return dqkv, gradients, Told(*told)
