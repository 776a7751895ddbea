"""Attention over register and image tokens with per-head q/k LayerNorm, in plain PyTorch."""

import torch
from torch import Tensor
from torch.nn import functional as F

from .philox import ATTENTION
from .philox import dropout as philox_dropout
from .precision import autocast_dtype, widen

ATTEND = ("all", "image_to_image", "registers_to_registers", "separate")
"""Which tokens a query may read. ``all``: every token. ``image_to_image``: image tokens read image tokens only,
registers read all. ``registers_to_registers``: registers read registers only, image tokens read all. ``separate``: both
limits."""


def attention_mask(attend: str, tokens: int, registers: int, device: torch.device) -> Tensor | None:
    """(T, T) bool, True where the row's query may read the column's key; None for ``all``."""
    if attend == "all" or registers == 0:
        return None
    register = torch.arange(tokens, device=device) < registers
    query, key = register[:, None], register[None, :]
    return {
        "image_to_image": query | ~key,
        "registers_to_registers": ~query | key,
        "separate": query == key,
    }[attend]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    registers: int,
    attend: str,
    dropout: float,
    rng: Tensor | None,
    layer: int,
) -> Tensor:
    """q, k, v (B, T, h, d) → (B, T, h·d): softmax(q · kᵀ · scale) · v over what each query may read."""
    mask = attention_mask(attend, q.shape[1], registers, q.device)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if dropout == 0:
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    else:
        # Scores and weights stay in fp32; a meta tensor has no autocast to switch off, but needs a device's name here.
        device = "cpu" if q.device.type == "meta" else q.device.type
        with torch.autocast(device, enabled=False):
            scores = widen(q) @ widen(k).transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
            scores = scores if mask is None else scores.masked_fill(~mask, float("-inf"))
            weights = philox_dropout(scores.softmax(-1), dropout, rng, layer, ATTENTION)
            y = (weights @ widen(v)).to(v.dtype)
    return y.transpose(1, 2).flatten(2)


def register_attention(
    qkv: Tensor,
    q_norm: tuple[Tensor, Tensor] | None = None,
    k_norm: tuple[Tensor, Tensor] | None = None,
    eps: float = 1e-5,
    scale: float | None = None,
    registers: int = 0,
    attend: str = "all",
    dropout: float = 0.0,
    rng: Tensor | None = None,
    layer: int = 0,
) -> Tensor:
    """qkv (B, T, 3, h, d) → (B, T, h·d): softmax(LN_q(q) · LN_k(k)ᵀ · scale) · v, scale 1/√d unless given."""
    qkv = qkv.to(autocast_dtype(qkv) or qkv.dtype)
    q, k, v = qkv.unbind(2)
    if q_norm is not None:
        q = F.layer_norm(widen(q), q.shape[-1:], *(p.to(widen(q).dtype) for p in q_norm), eps).to(q.dtype)
    if k_norm is not None:
        k = F.layer_norm(widen(k), k.shape[-1:], *(p.to(widen(k).dtype) for p in k_norm), eps).to(k.dtype)
    return attention(q, k, v, scale, registers, attend, dropout, rng, layer)
