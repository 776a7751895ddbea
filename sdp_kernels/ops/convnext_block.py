"""A ConvNeXt block as one operator."""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..backends import choose
from ..composed import convnext_block as composed
from ..reference.convnext_block import ConvNeXtWeights
from ..reference.philox import drop_path_mask
from ..reference.precision import autocast_dtype
from ._checks import (
    check_eps,
    check_floating,
    check_grid,
    check_layer,
    check_parameter,
    check_rank,
    check_rate,
    check_registers,
    check_rng,
)
from ._contract import define, launch, refuse_double_backward
from .activation import check_activation
from .depthwise_conv2d import check_kernel
from .linear import Branch, branch_fwd, hidden_bwd

SCHEMAS = {}

define(
    "convnext_block",
    SCHEMAS,
    {},
    uses=(
        *("depthwise_conv2d_fwd", "depthwise_conv2d_bwd", "layer_norm_2d_fwd", "layer_norm_2d_bwd"),
        *("linear_epilogue_fwd", "linear_epilogue_bwd"),
    ),
)

_OPTIONAL = {"depthwise_bias", "expand_bias", "project_bias", "layer_scale"}
_CAST = ("depthwise", "expand", "project")


def _check_weights(weights: ConvNeXtWeights, channels: int, x: Tensor) -> None:
    if not isinstance(weights, ConvNeXtWeights):
        raise TypeError(f"weights must be a ConvNeXtWeights, got {type(weights).__name__}")
    check_floating("weights.expand_weight", weights.expand_weight)
    hidden = weights.expand_weight.shape[0]
    check_kernel("weights.depthwise_weight", weights.depthwise_weight, channels)
    shapes = {
        "depthwise_weight": tuple(weights.depthwise_weight.shape),
        "expand_weight": (hidden, channels),
        "expand_bias": (hidden,),
        "project_weight": (channels, hidden),
    }
    for name, value in zip(ConvNeXtWeights._fields, weights, strict=True):
        if value is not None or name not in _OPTIONAL:
            check_parameter(f"weights.{name}", value, shapes.get(name, (channels,)), x)


class _Options(NamedTuple):
    """Everything about one call that is not a tensor."""

    grid: list[int]
    eps: float
    branch: Branch

    def norm(self, x: Tensor, w: ConvNeXtWeights) -> tuple[Tensor, ...]:
        b = self.branch
        return launch(b.backend, "layer_norm_2d_fwd", x, None, w.norm_weight, w.norm_bias, self.eps, b.registers)


class _ConvNeXtBlock(torch.autograd.Function):
    """One node. Of what lies between it keeps the convolution's result with its statistics and the pre-activation,
    C + hidden elements a token beside x, and computes the rest again."""

    @staticmethod
    def forward(ctx, x, mask, o: _Options, *weights):
        w, b = ConvNeXtWeights(*weights), o.branch
        conv = launch(
            b.backend, "depthwise_conv2d_fwd", x.to(w.expand_weight.dtype), w.depthwise_weight, w.depthwise_bias,
            o.grid, b.registers, None, None, None, None,
        )  # fmt: skip
        n, mean, rstd, _ = o.norm(conv, w)
        h, hidden = branch_fwd(n, w.expand_weight, w.expand_bias, None, None, None, b)
        outer = b._replace(activation="none")
        y, _ = branch_fwd(h, w.project_weight, w.project_bias, w.layer_scale, x, mask, outer)
        ctx.save_for_backward(x, conv, hidden, mean, rstd, mask, *weights)
        ctx.options = o
        return y

    @staticmethod
    def backward(ctx, grad):
        refuse_double_backward("convnext_block")
        x, conv, hidden, mean, rstd, mask, *weights = ctx.saved_tensors
        o, w, d = ctx.options, ConvNeXtWeights(*weights), {}
        b = o.branch

        dhidden, d["expand_bias"], d["project_weight"], d["project_bias"], d["layer_scale"] = hidden_bwd(
            grad, hidden, w.project_weight, w.project_bias, w.layer_scale, mask, b
        )
        n = o.norm(conv, w)[0]
        d["expand_weight"] = dhidden.flatten(0, 1).t() @ n.reshape(-1, n.shape[-1])
        dn = dhidden @ w.expand_weight
        del n, dhidden
        dconv, d["norm_weight"], d["norm_bias"] = launch(
            b.backend, "layer_norm_2d_bwd", dn, None, conv, w.norm_weight, mean, rstd, b.registers
        )
        source = x.to(conv.dtype)
        dx, d["depthwise_weight"], d["depthwise_bias"] = launch(
            b.backend, "depthwise_conv2d_bwd", dconv, source, w.depthwise_weight, o.grid, b.registers, *(None,) * 4
        )
        gradients = (
            None if weight is None else d[name].to(weight.dtype) for name, weight in zip(w._fields, w, strict=True)
        )
        return dx + grad, None, None, *gradients


def _fused(x, w: ConvNeXtWeights, grid, registers, activation, eps, drop_path, rng, layer, backend: str) -> Tensor:
    """Casts the convolutions' parameters as autocast wants it, draws the mask, and runs the node."""
    dtype = autocast_dtype(x) or x.dtype
    parts = (
        part.to(dtype) if part is not None and name.startswith(_CAST) else part
        for name, part in zip(w._fields, w, strict=True)
    )
    mask = drop_path_mask(rng, drop_path, layer, x.shape[0]) if drop_path else None
    options = _Options(list(grid), float(eps), Branch(activation, registers, backend))
    return _ConvNeXtBlock.apply(x, mask, options, *parts)


def convnext_block(
    x: Tensor,
    weights: ConvNeXtWeights,
    *,
    grid: tuple[int, int] | None = None,
    registers: int = 0,
    activation: str = "gelu",
    eps: float = 1e-6,
    drop_path: float = 0.0,
    rng: Tensor | None = None,
    layer: int = 0,
    backend: str | None = None,
) -> Tensor:
    """A ConvNeXt block: ``x + DropPath(γ · W₂(act(W₁(LN(DW_k(x))))))``; registers pass by untouched.

    Args:
        x: a picture (B, C, H, W) (best channels_last: it is read as a token buffer), or a token buffer (B, T, C).
        weights: :class:`ConvNeXtWeights`; biases and the layer scale may be None.
        grid: (H, W) of a token buffer, T = registers + H·W; must be None for a picture.
        activation: one of ``ACTIVATIONS``. eps: of the norm. drop_path: rate in [0, 1), per sample.
        rng, layer: source of the drop-path mask, see :func:`make_rng`.
        backend: run this backend or raise; None chooses.

    Returns:
        A tensor of x's shape, dtype and memory format.

    Fused, it is one autograd node that keeps, beside x, C + hidden elements a token (with hidden = 4C and 16 bits that
    is 10·C bytes): the convolution's result and the pre-activation; and the norm's mean and rstd, 8 bytes. The norm,
    the activation and their inputs are computed again. It is not twice differentiable there, and a clear error says so.

    Raises:
        TypeError, ValueError: naming the argument; UnsupportedError: named backend.

    Source of the formula: Liu et al., "A ConvNet for the 2020s" (2022); the block of timm's ConvNeXt.
    """
    check_floating("x", x)
    check_rank("x", x, (3, 4), "(B, T, C) or (B, C, H, W)")
    check_registers(registers, x)
    picture = x.dim() == 4
    if picture and grid is not None:
        raise ValueError(f"grid must be None for a picture (B, C, H, W), got {grid!r}")
    if not picture:
        check_grid(grid, registers, x)
    _check_weights(weights, x.shape[1] if picture else x.shape[2], x)
    check_activation(activation)
    check_eps(eps)
    check_rate("drop_path", drop_path)
    if drop_path:
        check_layer(layer)
    check_rng(rng, drop_path, x)
    limits = {}
    if x.dtype not in (autocast_dtype(x) or x.dtype, torch.float32):
        limits = dict.fromkeys(("cpu", "cuda"), f"adds no {autocast_dtype(x)} branch to a {x.dtype} x")
    chosen = choose("convnext_block", x, backend, limits)
    if chosen in ("composed", "reference"):
        form = (composed if chosen == "composed" else reference.convnext_block).convnext_block
    else:
        form = functools.partial(_fused, backend=chosen)
    if not picture:
        return form(x, weights, grid, registers, activation, eps, drop_path, rng, layer)
    tokens = x.permute(0, 2, 3, 1).flatten(1, 2)
    y = form(tokens, weights, (x.shape[2], x.shape[3]), 0, activation, eps, drop_path, rng, layer)
    y = y.unflatten(1, (x.shape[2], x.shape[3])).permute(0, 3, 1, 2)
    return y.contiguous() if x.is_contiguous() else y
