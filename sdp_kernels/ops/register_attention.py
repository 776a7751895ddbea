"""Attention over register and image tokens with per-head q/k LayerNorm."""

from typing import NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..backends import choose
from ..composed import register_attention as composed
from ..reference.precision import accumulate_dtype, autocast_dtype, cast
from ..reference.register_attention import ATTEND
from ._checks import check_eps, check_layer, check_parameter, check_rate, check_rng, check_scale, check_tensor
from ._contract import define, launch, refuse_double_backward

SCHEMAS = {
    "register_attention_fwd": (
        "(Tensor qkv, Tensor? q_weight, Tensor? q_bias, Tensor? k_weight, Tensor? k_bias, float eps, float scale,"
        " int registers, str attend, float dropout, Tensor? rng, int layer) -> (Tensor y, Tensor lse)"
    ),
    "register_attention_bwd": (
        "(Tensor grad, Tensor qkv, Tensor y, Tensor lse, Tensor? q_weight, Tensor? q_bias, Tensor? k_weight,"
        " Tensor? k_bias, float eps, float scale, int registers, str attend, float dropout, Tensor? rng, int layer)"
        " -> (Tensor dqkv, Tensor dq_weight, Tensor dq_bias, Tensor dk_weight, Tensor dk_bias)"
    ),
}
"""lse (B, h, T) is log Σ exp of the scaled scores that a query may read. The norms' gradients are of accumulator type
and empty without that norm. A kernel that holds whole rows of weights may sum dy·y from them and leave y unread."""


def _fake_fwd(qkv, q_weight, q_bias, k_weight, k_bias, eps, scale, registers, attend, dropout, rng, layer):
    batch, tokens, _, heads, d = qkv.shape
    lse = qkv.new_empty((batch, heads, tokens), dtype=accumulate_dtype(qkv.dtype))
    return qkv.new_empty((batch, tokens, heads * d)), lse


def _fake_bwd(grad, qkv, y, lse, q_weight, q_bias, k_weight, k_bias, *_):
    sizes = (0 if p is None else qkv.shape[4] for p in (q_weight, q_bias, k_weight, k_bias))
    return qkv.new_empty(qkv.shape), *(qkv.new_empty(n, dtype=accumulate_dtype(qkv.dtype)) for n in sizes)


define("register_attention", SCHEMAS, {"register_attention_fwd": _fake_fwd, "register_attention_bwd": _fake_bwd})


class _Options(NamedTuple):
    """Everything about one call that is not a tensor."""

    eps: float
    scale: float
    registers: int
    attend: str
    dropout: float
    layer: int
    backend: str


class _RegisterAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, q_weight, q_bias, k_weight, k_bias, rng, o: _Options):
        norms = (q_weight, q_bias, k_weight, k_bias)
        limits = (o.eps, o.scale, o.registers, o.attend, o.dropout)
        y, lse = launch(o.backend, "register_attention_fwd", qkv, *norms, *limits, rng, o.layer)
        ctx.save_for_backward(qkv, y, lse, *norms, None if rng is None else rng.clone())
        ctx.options = o
        return y

    @staticmethod
    def backward(ctx, grad):
        refuse_double_backward("register_attention", " with torch.nn.attention.sdpa_kernel(SDPBackend.MATH)")
        qkv, y, lse, *norms, rng = ctx.saved_tensors
        o = ctx.options
        limits = (o.eps, o.scale, o.registers, o.attend, o.dropout)
        dqkv, *gradients = launch(o.backend, "register_attention_bwd", grad, qkv, y, lse, *norms, *limits, rng, o.layer)
        gradients = (None if p is None else cast(g, p.dtype) for g, p in zip(gradients, norms, strict=True))
        return dqkv, *gradients, None, None


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

    No (T, T) matrix is kept. Fused, backward keeps qkv, the result, which the projection behind it keeps as well, and
    4 bytes per token and head; the norms, weights and masks are computed again. With 16-bit tokens that is
    6 + 2 + 4/d bytes per element of the result, the reference keeping 10 and more. It is not twice differentiable
    there, and a clear error says so.

    Raises:
        TypeError, ValueError: shapes, dtypes, devices, d, T = 0, norm weights of the wrong length, eps, scale,
        registers, attend, dropout, missing rng; UnsupportedError: named backend.

    Source: Vaswani et al. (2017); q/k LayerNorm as in Dehghani et al., "Scaling ViT to 22 billion parameters" (2023).
    """
    check_tensor("qkv", qkv, (5,), "(B, T, 3, h, d)")
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
    check_scale(scale)
    if isinstance(registers, bool) or not isinstance(registers, int) or not 0 <= registers <= tokens:
        raise ValueError(f"registers must be an int in [0, T = {tokens}], got {registers!r}")
    if attend not in ATTEND:
        raise ValueError(f"attend must be one of {', '.join(ATTEND)}, got {attend!r}")
    check_rate("dropout", dropout)
    if dropout:
        check_layer(layer)
    check_rng(rng, dropout, qkv)
    chosen = choose("register_attention", qkv, backend)
    if registers == 0:
        attend = "all"
    if chosen in ("composed", "reference"):
        form = composed if chosen == "composed" else reference.register_attention
        return form.register_attention(qkv, q_norm, k_norm, eps, scale, registers, attend, dropout, rng, layer)
    qkv = cast(qkv, autocast_dtype(qkv) or qkv.dtype)
    scale = d**-0.5 if scale is None else float(scale)
    options = _Options(float(eps), scale, registers, attend, float(dropout), layer, chosen)
    norms = (*(q_norm or (None, None)), *(k_norm or (None, None)))
    return _RegisterAttention.apply(qkv, *norms, rng if dropout else None, options)
