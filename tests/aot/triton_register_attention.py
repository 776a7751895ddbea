"""register_attention's Triton launches, one per entry of the table."""

from __future__ import annotations

import torch

from sdp_kernels.triton import register_attention

MODULES = (register_attention,)
NARROW = ("add_partials",)
"""Partial sums are few."""
TENSOR_CORES = (
    "forward/d96/16bit",
    "forward/d128/16bit",
    "d64/16bit",
    "_short/d96/16bit",
    "d128/16bit/sm_90",
    "d96/16bit/sm_90",
)
"""sm_100's and sm_80's backward at 96 and 128 columns: as the table of resources says."""
HEADS = {"d64": 64, "d96": 96, "d128": 128}


def _case(
    d: int,
    dtype: torch.dtype = torch.bfloat16,
    tokens: int = 261,
    dropout: float = 0.0,
    norms: bool = True,
    attend: str = "image_to_image",
):
    """(forward, backward) as functions of no argument."""
    qkv, y = torch.empty(2, tokens, 3, 4, d, dtype=dtype), torch.empty(2, tokens, 4 * d, dtype=dtype)
    parameters = [torch.empty(d) if norms else None] * 4
    lse, rng = torch.empty(2, 4, tokens), torch.empty(3, dtype=torch.int64)
    limits = (1e-5, d**-0.5, 5, attend, dropout, rng, 1)
    return (
        lambda: register_attention.register_attention_fwd(qkv, *parameters, *limits),
        lambda: register_attention.register_attention_bwd(y, qkv, y, lse, *parameters, *limits),
    )


def call(parts: list[str]):
    """At 577 tokens no entry for few tokens is taken; the models' 261 and 197 are those of the short kernels."""
    dtype = torch.bfloat16 if parts[-1] == "16bit" else torch.float32
    tokens = {"forward_short": 261, "backward_short": 197}.get(parts[0], 577)
    forward, backward = _case(HEADS.get(parts[1], 64), dtype, tokens)
    which = {"backward_keys": 1, "add_partials": 2}.get(parts[0], 0)
    return (forward if parts[0].startswith("forward") else backward), which


def variants():
    cases = {
        "fp16": _case(64, torch.float16),
        "200 tokens, d = 40": _case(40, tokens=200),
        "201 tokens, both limits": _case(64, tokens=201, attend="separate"),
        "no limits, d = 96": _case(96, attend="all"),
        "without norms, 197 tokens": _case(64, tokens=197, norms=False),
        "without norms, d = 96": _case(96, norms=False),
        "1025 tokens": _case(64, tokens=1025),
        "dropout": _case(64, dropout=0.1),
        "dropout, d = 96": _case(96, dropout=0.1),
        "dropout of 264 tokens": _case(64, tokens=264, dropout=0.1),
    }
    return {f"{name}, {pass_}": call for name, both in cases.items() for pass_, call in zip(("fwd", "bwd"), both)}


WIDE_VARIANTS = ("fp16, fwd", "fp16, bwd", "201 tokens, both limits, bwd", "1025 tokens, fwd")
"""Of these the first launch loads 16 bytes at a time."""
SPILLING_VARIANTS = ()
