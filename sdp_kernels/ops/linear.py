"""Linear layer with its epilogues: bias, activation, dropout, LayerScale, drop-path, residual."""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import reference
from .._device import type_of_device
from ..backends import choose
from ..composed import linear as composed
from ..reference.philox import drop_path_mask
from ..reference.precision import accumulate_dtype, autocast_dtype, cast
from ._checks import (
    check_floating,
    check_layer,
    check_parameter,
    check_rank,
    check_rate,
    check_registers,
    check_residual,
    check_rng,
    check_same_dtype,
)
from ._contract import (
    define,
    differentiate_reference,
    differentiating_twice,
    launch,
    other_than,
    refuse_double_backward,
)
from ._products import dgrad, prefers, product, sums_leave_unrounded, through_fp32, wgrad
from .activation import check_activation

SCHEMAS = {
    "linear_epilogue_fwd": (
        "(Tensor z, str activation, Tensor? layer_scale, Tensor? path_mask, Tensor? residual, int registers,"
        " float dropout, Tensor? rng, int layer) -> Tensor"
    ),
    "linear_epilogue_bwd": (
        "(Tensor grad, Tensor z, str activation, Tensor? layer_scale, Tensor? path_mask, int registers,"
        " float dropout, Tensor? rng, int layer) -> (Tensor dz, Tensor dlayer_scale, Tensor dbias)"
    ),
    "linear_gemm_fwd": (
        "(Tensor x, Tensor weight, Tensor? bias, str activation, Tensor? layer_scale, Tensor? path_mask,"
        " Tensor? residual, int registers, float dropout, Tensor? rng, int layer, bool keep) -> (Tensor y, Tensor z)"
    ),
    "linear_gemm_bwd": (
        "(Tensor d, Tensor weight, Tensor z, str activation, int registers) -> (Tensor dz, Tensor h, Tensor dbias)"
    ),
    "linear_gemm_dgrad": "(Tensor d, Tensor weight) -> Tensor",
    "linear_gemm_wgrad": "(Tensor d, Tensor x, bool wide) -> Tensor",
}
"""The epilogues are the one pass around the vendor library's GEMM; z is (B, T, out), and without activation and
layer_scale backward reads only its shape and dtype. A backend may have GEMMs with the same in their own epilogue:
forward, z empty unless kept for an activation; and backward from d (B, T, N) through the weight (N, M) of a layer and
the activation before it: dz = (d W) ⊙ act′(z), h = act(z), dbias = Σ dz, of M columns, register rows 0. And the plain
products: d W, and dᵀ x over all rows, if ``wide`` in the type of its sums."""


def _fake_fwd(z, activation, layer_scale, path_mask, residual, registers, dropout, rng, layer):
    return (z if residual is None else residual).new_empty(z.shape)


def _fake_bwd(grad, z, activation, layer_scale, path_mask, registers, dropout, rng, layer):
    wide = accumulate_dtype(z.dtype)
    scales = 0 if layer_scale is None else z.shape[2]
    return z.new_empty(z.shape), z.new_empty(scales, dtype=wide), z.new_empty(z.shape[2], dtype=wide)


def _fake_gemm_fwd(
    x, weight, bias, activation, layer_scale, path_mask, residual, registers, dropout, rng, layer, keep
):  # fmt: skip
    shape = (*x.shape[:2], weight.shape[0])
    kept = x.new_empty(shape if keep and activation != "none" else (0,))
    return (x if residual is None else residual).new_empty(shape), kept


def _fake_gemm_bwd(d, weight, z, activation, registers):
    return z.new_empty(z.shape), z.new_empty(z.shape), z.new_empty(z.shape[2], dtype=accumulate_dtype(z.dtype))


def _fake_gemm_dgrad(d, weight):
    return d.new_empty((*d.shape[:2], weight.shape[1]))


def _fake_gemm_wgrad(d, x, wide):
    return d.new_empty((d.shape[2], x.shape[2]), dtype=accumulate_dtype(d.dtype) if wide else d.dtype)


define(
    "linear",
    SCHEMAS,
    {
        "linear_epilogue_fwd": _fake_fwd,
        "linear_epilogue_bwd": _fake_bwd,
        "linear_gemm_fwd": _fake_gemm_fwd,
        "linear_gemm_bwd": _fake_gemm_bwd,
        "linear_gemm_dgrad": _fake_gemm_dgrad,
        "linear_gemm_wgrad": _fake_gemm_wgrad,
    },
    optional=("linear_gemm_fwd", "linear_gemm_bwd", "linear_gemm_dgrad", "linear_gemm_wgrad"),
)


class Branch(NamedTuple):
    """What one linear layer with an activation's or a residual's epilogue does, without its tensors."""

    activation: str
    registers: int
    backend: str
    dropout: float = 0.0
    layer: int = 0
    keep: bool = True
    """Backward will want z."""
    epilogue: bool = True
    """False where nothing stands around the GEMM."""
    autocast: torch.dtype | None = None
    """What autocast casts the weights to; their gradients then leave in the type of their sums, if the GEMM can."""


def branch_fwd(x, weight, bias, layer_scale, residual, path_mask, b: Branch, rng=None) -> tuple[Tensor, Tensor]:
    """(y, z): z = x Wᵀ + bias, and y = residual + mask · γ · dropout(act(z)). x (B, T, in). Without an activation
    nobody wants z, and it may be empty."""
    masks = (path_mask, residual, b.registers, b.dropout, rng, b.layer)
    if prefers(b.backend, "linear_gemm_fwd", x, weight):
        return launch(b.backend, "linear_gemm_fwd", x, weight, bias, b.activation, layer_scale, *masks, b.keep)
    z = product(x, weight, bias, b.backend)
    if not b.epilogue:
        return z, z
    return launch(b.backend, "linear_epilogue_fwd", z, b.activation, layer_scale, *masks), z


def hidden_fwd(x, weight, bias, b: Branch, rng=None) -> tuple[Tensor, Tensor]:
    """(h, z) of a layer before another, for :func:`hidden_bwd`: without an activation z is h, and kept once."""
    h, z = branch_fwd(x, weight, bias, None, None, None, b, rng)
    return h, h if b.activation == "none" else z


def branch_bwd(
    grad, x, z, weight, bias, layer_scale, path_mask, b: Branch, rng=None, wants_dx: bool = True, wants_dw: bool = True
) -> tuple[Tensor | None, ...]:
    """(dx, dweight, dbias, dlayer_scale) of :func:`branch_fwd` from y's gradient; dx None unless wanted, and dweight,
    with a dlayer_scale that is made of it, None unless one of the two is.

    z may be None where there is no activation: with d = mask · dropout · dy and G = dᵀx, dW = γ ⊙ G and
    dγ = rowsum(W ⊙ G) + bias ⊙ Σd, so that nothing but x is kept.
    """
    masks = (path_mask, b.registers, b.dropout, rng, b.layer)
    if b.activation != "none":
        dz, dscale, dbias = launch(b.backend, "linear_epilogue_bwd", grad, z, b.activation, layer_scale, *masks)
        dx = dgrad(dz, weight, b.backend) if wants_dx else None
        dweight = wgrad(dz, x, weight, b.backend, b.autocast is not None) if wants_dw else None
        return dx, dweight, dbias, None if layer_scale is None else dscale
    d, total = _masked(grad, x, masks, b, bias is not None or layer_scale is not None)
    dx = dgrad(d, _scaled(weight, layer_scale), b.backend) if wants_dx else None
    return dx, *_parameters_bwd(d, total, x, weight, bias, layer_scale, b, wants_dw)


def hidden_bwd(
    grad, z, weight, bias, layer_scale, path_mask, b: Branch, wants_dw: bool = True
) -> tuple[Tensor | None, ...]:
    """(dz, Σ dz, dweight, dbias, dlayer_scale) of y = mask · γ · (act(z) Wᵀ + bias) from y's gradient: backward through
    a linear layer and the activation before it (b's), whose result is computed again. wants_dw as there."""
    masks = (path_mask, b.registers, 0.0, None, 0)
    if prefers(b.backend, "linear_gemm_bwd", z, weight):
        d, total = _masked(grad, z, masks, b, bias is not None or layer_scale is not None)
        scaled = _scaled(weight, layer_scale)
        dz, h, dbefore = launch(b.backend, "linear_gemm_bwd", d, scaled, z, b.activation, b.registers)
        return dz, dbefore, *_parameters_bwd(d, total, h, weight, bias, layer_scale, b, wants_dw)
    plain = (None, None, b.registers, 0.0, None, 0)
    h = launch(b.backend, "linear_epilogue_fwd", z, b.activation, None, *plain)
    outer = b._replace(activation="none")
    dh, *gradients = branch_bwd(grad, h, None, weight, bias, layer_scale, path_mask, outer, wants_dw=wants_dw)
    del h
    dz, _, dbefore = launch(b.backend, "linear_epilogue_bwd", dh, z, b.activation, None, *plain[1:])
    return dz, dbefore, *gradients


def _masked(grad: Tensor, x: Tensor, masks: tuple, b: Branch, sums: bool) -> tuple[Tensor, Tensor | None]:
    """(d, Σd): d = mask · dropout · dy in x's dtype. Without ``sums`` nobody wants Σd, and it may be None."""
    path_mask, registers, dropout, *_ = masks
    if not (sums or registers or dropout) and path_mask is None and grad.dtype == x.dtype:
        return grad, None
    if not b.epilogue and type_of_device(grad) == "cuda":  # sums alone: the pass would write dy again
        return grad, grad.sum((0, 1), dtype=accumulate_dtype(grad.dtype))
    like = grad if grad.dtype == x.dtype else grad.new_empty(grad.shape, dtype=x.dtype)
    d, _, total = launch(b.backend, "linear_epilogue_bwd", grad, like, "none", None, *masks)
    return d, total


def _scaled(weight: Tensor, layer_scale: Tensor | None) -> Tensor:
    """γ W, rounded once."""
    if layer_scale is None:
        return weight
    return (layer_scale.to(accumulate_dtype(weight.dtype))[:, None] * weight).to(weight.dtype)


def _parameters_bwd(d, total, x, weight, bias, layer_scale, b: Branch, wants_dw: bool) -> tuple[Tensor | None, ...]:
    """(dweight, dbias, dlayer_scale) of mask · γ · (x Wᵀ + bias) from d and Σd."""
    wide = b.autocast is not None
    dweight = wgrad(d, x, weight, b.backend, wide or layer_scale is not None) if wants_dw else None
    if layer_scale is None:
        return dweight, total, None
    scale = layer_scale.to(total.dtype)
    if dweight is None:
        return None, scale * total, None
    dscale = (weight * dweight).sum(1)
    if bias is not None:
        dscale = dscale + bias * total
    dweight = scale[:, None] * dweight
    return dweight if wide else cast(dweight, weight.dtype), scale * total, dscale


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, layer_scale, residual, path_mask, rng, branch: Branch):
        w, b = cast(weight, x.dtype), cast(bias, x.dtype)
        y, z = branch_fwd(x, w, b, layer_scale, residual, path_mask, branch, rng)
        z = None if branch.activation == "none" else z
        plain = (None, None) if branch.epilogue else (weight, bias)  # which is twice differentiable
        kept = (x, z, w, b, layer_scale, path_mask, None if rng is None else rng.clone())
        ctx.save_for_backward(*kept, *plain)
        ctx.branch, ctx.residual = branch, residual is not None
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        return y

    @staticmethod
    def backward(ctx, grad):
        x, z, w, b, layer_scale, path_mask, rng, *plain = ctx.saved_tensors
        if differentiating_twice() and not ctx.branch.epilogue:

            def form(x, weight, bias):
                return F.linear(x, cast(weight, x.dtype), cast(bias, x.dtype))

            return *differentiate_reference(form, (x, *plain), grad), *(None,) * 5
        refuse_double_backward("linear")
        wants_dx, wants_dw, _, wants_dscale, *_ = ctx.needs_input_grad
        dx, dw, db, dscale = branch_bwd(
            grad, x, z, w, b, layer_scale, path_mask, ctx.branch, rng, wants_dx, wants_dw or wants_dscale
        )
        dw, db = cast(dw, ctx.dtypes[0]), None if b is None else cast(db, ctx.dtypes[1])
        dscale = None if dscale is None else cast(dscale, layer_scale.dtype)
        return dx, dw, db, dscale, grad if ctx.residual else None, None, None, None


def _fused(x, weight, bias, layer_scale, residual, path_mask, rng, branch: Branch) -> Tensor:
    """Brings any rank to (B, T, in)."""
    shape = (*x.shape[:-1], weight.shape[0])
    if x.dim() != 3:
        batch = x.shape[0] if x.dim() > 1 else 1
        x = x.reshape(batch, math.prod(x.shape[1:-1]), x.shape[-1])
        residual = None if residual is None else residual.reshape(*x.shape[:-1], weight.shape[0])
    return _Linear.apply(x, weight, bias, layer_scale, residual, path_mask, rng, branch).view(shape)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "none",
    layer_scale: Tensor | None = None,
    residual: Tensor | None = None,
    registers: int = 0,
    dropout: float = 0.0,
    drop_path: float = 0.0,
    rng: Tensor | None = None,
    layer: int = 0,
    backend: str | None = None,
) -> Tensor:
    """``residual + drop_path_mask · layer_scale · dropout(act(x Wᵀ + b))``; without ``residual`` the second term alone.

    Args:
        x: (…, in); (B, …, in) when something is dropped, (B, T, in) with ``registers``, whose rows must then be finite
            in x (the operators here write 0): they meet a gradient of 0 in dweight.
        weight: (out, in) as in ``nn.Linear``; bias, layer_scale: (out,) or None. x's dtype (any under autocast);
            layer_scale may be float32.
        activation: one of ``ACTIVATIONS``.
        residual: (…, out); the output takes its dtype. registers: rows at the front of each sample that pass the
            residual through, or are written as 0 without one.
        dropout, drop_path: rates in [0, 1), per element and per sample; the masks are Philox draws from ``rng``
            (:func:`make_rng`) and ``layer``, the number of this call site.
        backend: run this backend or raise; None chooses.

    Returns:
        (…, out) in the residual's dtype, else x's dtype, else (under autocast) the autocast dtype.

    Fused, backward keeps x and, with an activation, the pre-activation (out elements a row). The plain product is twice
    differentiable in eager mode; with anything around it, it is not where it is fused, and a clear error says so.

    Raises:
        TypeError, ValueError: rank, shapes, dtypes, devices, unknown activation, rates, registers, missing rng;
        UnsupportedError: named backend.
    """
    check_floating("x", x)
    check_floating("weight", weight)
    if weight.dim() != 2:
        raise ValueError(f"weight must be (out, in), got {tuple(weight.shape)}")
    if x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x must be (…, {weight.shape[1]}) for weight {tuple(weight.shape)}, got {tuple(x.shape)}")
    outputs = (weight.shape[0],)
    check_parameter("weight", weight, tuple(weight.shape), x)
    check_same_dtype("weight", weight, x)
    if bias is not None:
        check_parameter("bias", bias, outputs, x)
        check_same_dtype("bias", bias, x)
    if layer_scale is not None:
        check_parameter("layer_scale", layer_scale, outputs, x)
    check_activation(activation)
    check_residual(residual, (*x.shape[:-1], *outputs), x)
    check_registers(registers, x)
    check_rate("dropout", dropout)
    check_rate("drop_path", drop_path)
    if dropout or drop_path:
        check_layer(layer)
        check_rank("x", x, tuple(range(2, 9)), "(B, …, in) when something is dropped")
    check_rng(rng, max(dropout, drop_path), x)
    limits = {}
    if residual is not None and residual.dtype not in (autocast_dtype(x) or x.dtype, torch.float32):
        limits = dict.fromkeys(("cpu", "cuda"), f"adds no {residual.dtype} residual to {x.dtype}")
    chosen = choose("linear", x, backend, limits)
    if chosen not in ("composed", "reference"):
        x = cast(x, autocast_dtype(x) or x.dtype)
        adds = layer_scale is not None or residual is not None or registers > 0
        epilogue = activation != "none" or adds or dropout > 0 or drop_path > 0
        ours = prefers(chosen, "linear_gemm_fwd", x, weight) or through_fp32(x)
        wanted = torch.is_grad_enabled() and weight.requires_grad and weight.dtype != x.dtype
        exacter = wanted and sums_leave_unrounded(x)
        if not (epilogue or ours or exacter):
            chosen = "composed"
    if chosen not in ("composed", "reference"):
        path_mask = drop_path_mask(rng, drop_path, layer, x.shape[0]) if drop_path else None
        keep, autocast = torch.is_grad_enabled(), autocast_dtype(x)
        branch = Branch(activation, registers, chosen, float(dropout), layer, keep, epilogue, autocast)
        residual = other_than(x, residual)
        return _fused(x, weight, bias, layer_scale, residual, path_mask, rng if dropout else None, branch)
    # Left: no kernel here, or nothing around the vendor's GEMM that ours would do better.
    form = reference.linear if chosen == "reference" else composed
    return form.linear(x, weight, bias, activation, layer_scale, residual, registers, dropout, drop_path, rng, layer)
