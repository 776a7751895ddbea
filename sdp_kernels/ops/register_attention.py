"""Attention over register and image tokens with per-head q/k LayerNorm."""

import math

from torch import Tensor

from .. import reference
from ..backends import choose
from ..reference.register_attention import ATTEND
from ._checks import check_eps, check_floating, check_layer, check_parameter, check_rank, check_rate, check_rng
from ._contract import define

SCHEMAS = {}

define("register_attention", SCHEMAS, {})


def register_attention(
    qkv: Tensor,
    q_norm: tuple[Tensor, Tensor] | None = None,
    k_norm: tuple[Tensor, Tensor] | None = None,
    *,
    eps: float = 1e-5,
    scale: float | None = None,
    registers: int = 0,
    attend: str = "all",
    dropout: float = 0.0,
    rng: Tensor | None = None,
    layer: int = 0,
    backend: str | None = None,
) -> Tensor:
    """``softmax(LN_q(q) · LN_k(k)ᵀ · scale) · v`` per head over all T = registers + H·W tokens.

    Args:
        qkv: packed (B, T, 3, h, d) as one GEMM writes it; d a multiple of 8 up to 128, T ≥ 1.
        q_norm, k_norm: (weight, bias), each (d,), of the per-head LayerNorm; None leaves q or k as it is.
        eps: of these norms. scale: of the scores; None means 1/√d.
        registers: how many of the first tokens are registers; attend: which tokens a query may read, one of
            ``ATTEND``: "all"; "image_to_image" (image tokens read image tokens only); "registers_to_registers"
            (registers read registers only); "separate" (both limits).
        dropout: rate in [0, 1) on the attention weights, drawn from ``rng`` and ``layer`` (:func:`make_rng`).
        backend: run this backend or raise; None chooses.

    Returns:
        (B, T, h·d) in qkv's dtype (the autocast dtype under autocast), heads side by side.

    Raises:
        TypeError, ValueError: shapes, dtypes, devices, d, T = 0, norm weights of the wrong length, eps, scale,
        registers, attend, dropout, missing rng; UnsupportedError: named backend.

    Source: Vaswani et al. (2017); q/k LayerNorm as in Dehghani et al., "Scaling ViT to 22 billion parameters" (2023).
    """
    check_floating("qkv", qkv)
    check_rank("qkv", qkv, (5,), "(B, T, 3, h, d)")
    _, tokens, three, heads, d = qkv.shape
    if three != 3 or heads < 1 or tokens < 1:
        raise ValueError(f"qkv must be (B, T, 3, h, d) with T, h ≥ 1, got {tuple(qkv.shape)}")
    if d % 8 or not 8 <= d <= 128:
        raise ValueError(f"qkv's head dimension d must be a multiple of 8 in [8, 128], got {d}: {tuple(qkv.shape)}")
    for name, norm in (("q_norm", q_norm), ("k_norm", k_norm)):
        if norm is None:
            continue
        if not (isinstance(norm, (tuple, list)) and len(norm) == 2):
            raise TypeError(f"{name} must be (weight, bias) or None, got {type(norm).__name__}")
        for part, value in zip(("weight", "bias"), norm, strict=True):
            check_parameter(f"{name} {part}", value, (d,), qkv)
    check_eps(eps)
    if scale is not None and not (isinstance(scale, (int, float)) and math.isfinite(scale)):
        raise ValueError(f"scale must be a finite number or None, got {scale!r}")
    if isinstance(registers, bool) or not isinstance(registers, int) or not 0 <= registers <= tokens:
        raise ValueError(f"registers must be an int in [0, T = {tokens}], got {registers!r}")
    if attend not in ATTEND:
        raise ValueError(f"attend must be one of {', '.join(ATTEND)}, got {attend!r}")
    check_rate("dropout", dropout)
    if dropout:
        check_layer(layer)
    check_rng(rng, dropout, qkv)
    choose("register_attention", qkv, backend)
    return reference.register_attention.register_attention(
        qkv, q_norm, k_norm, eps, scale, registers, attend, dropout, rng, layer
    )
