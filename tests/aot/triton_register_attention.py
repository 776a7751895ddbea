"""register_attention's Triton launches, one per entry of the table."""

from __future__ import annotations

import torch

from sdp_kernels.triton import register_attention

MODULES = (register_attention,)
NARROW = ("add_partials",)
"""Partial sums are few."""
TENSOR_CORES = ("forward/d64/16bit", "forward/d96/16bit", "forward/d128/16bit", "d64/16bit")
HEADS = {"d64": 64, "d96": 96, "d128": 128}


def _case(d: int, dtype: torch.dtype = torch.bfloat16, tokens: int = 261, dropout: float = 0.0, norms: bool = True):
    """(forward, backward) as functions of no argument."""
    qkv, y = torch.empty(2, tokens, 3, 4, d, dtype=dtype), torch.empty(2, tokens, 4 * d, dtype=dtype)
    parameters = [torch.empty(d) if norms else None] * 4
    lse, rng = torch.empty(2, 4, tokens), torch.empty(3, dtype=torch.int64)
    limits = (1e-5, d**-0.5, 5, "image_to_image", dropout, rng, 1)
    return (
        lambda: register_attention.register_attention_fwd(qkv, *parameters, *limits),
        lambda: register_attention.register_attention_bwd(y, qkv, y, lse, *parameters, *limits),
    )


def call(parts: list[str]):
    dtype = torch.bfloat16 if parts[-1] == "16bit" else torch.float32
    forward, backward = _case(HEADS.get(parts[1], 64), dtype)
    which = {"forward": 0, "backward_queries": 0, "add_partials": 1, "backward_keys": 2}[parts[0]]
    return (forward if parts[0] == "forward" else backward), which


def variants():
    cases = {
        "fp16": _case(64, torch.float16),
        "without norms": _case(64, norms=False),
        "without norms, d = 96": _case(96, norms=False),
        "1025 tokens": _case(64, tokens=1025),
        "d = 40": _case(40),
        "dropout": _case(64, dropout=0.1),
        "dropout, d = 96": _case(96, dropout=0.1),
        "dropout of 264 tokens": _case(64, tokens=264, dropout=0.1),
    }
    return {f"{name}, {pass_}": call for name, both in cases.items() for pass_, call in zip(("fwd", "bwd"), both)}


WIDE_VARIANTS = ("fp16, fwd", "fp16, bwd", "1025 tokens, fwd")
"""Of these the first launch loads 16 bytes at a time."""
SPILLING_VARIANTS = ()
