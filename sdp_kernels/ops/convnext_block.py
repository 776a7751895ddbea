"""A ConvNeXt block as one operator."""

from typing import NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..composed import convnext_block as composed
from ..reference.convnext_block import ConvNeXtWeights
from ..reference.philox import drop_path_mask
from ..reference.precision import autocast_dtype, cast
from ._block import Forms, cast_parts, check_kind, check_parts, dtypes_of, gradients_of, on_tokens
from ._contract import define, launch, refuse_double_backward
from ._products import dgrad, wgrad
from .depthwise_conv2d import check_kernel
from .linear import Branch, branch_fwd, hidden_bwd, hidden_fwd

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
    hidden = check_kind(weights, ConvNeXtWeights)
    check_kernel("weights.depthwise_weight", weights.depthwise_weight, channels)
    shapes = {
        "depthwise_weight": tuple(weights.depthwise_weight.shape),
        "expand_weight": (hidden, channels),
        "expand_bias": (hidden,),
        "project_weight": (channels, hidden),
    }
    check_parts(weights, _OPTIONAL, shapes, _CAST, channels, x)


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
        b, weights = o.branch, ConvNeXtWeights(*weights)
        w = cast_parts(weights, _CAST, b.autocast)
        conv = launch(
            b.backend, "depthwise_conv2d_fwd", cast(x, w.expand_weight.dtype), w.depthwise_weight, w.depthwise_bias,
            o.grid, b.registers, None, None, None, None,
        )  # fmt: skip
        n, mean, rstd, _ = o.norm(conv, w)
        h, hidden = hidden_fwd(n, w.expand_weight, w.expand_bias, b)
        outer = b._replace(activation="none")
        y, _ = branch_fwd(h, w.project_weight, w.project_bias, w.layer_scale, x, mask, outer)
        ctx.save_for_backward(x, conv, hidden, mean, rstd, mask, *w)
        ctx.options, ctx.dtypes = o, dtypes_of(weights)
        return y

    @staticmethod
    def backward(ctx, grad):
        refuse_double_backward("convnext_block")
        x, conv, hidden, mean, rstd, mask, *weights = ctx.saved_tensors
        o, w, wants = ctx.options, ConvNeXtWeights(*weights), ConvNeXtWeights(*ctx.needs_input_grad[3:])
        b, d = o.branch, {"expand_weight": None}

        dhidden, d["expand_bias"], d["project_weight"], d["project_bias"], d["layer_scale"] = hidden_bwd(
            grad, hidden, w.project_weight, w.project_bias, w.layer_scale, mask, b,
            wants.project_weight or wants.layer_scale,
        )  # fmt: skip
        if wants.expand_weight:
            n = o.norm(conv, w)[0]
            d["expand_weight"] = wgrad(dhidden, n, w.expand_weight, b.backend, b.autocast is not None)
            del n
        dn = dgrad(dhidden, w.expand_weight, b.backend)
        del dhidden
        dconv, d["norm_weight"], d["norm_bias"] = launch(
            b.backend, "layer_norm_2d_bwd", dn, None, conv, w.norm_weight, mean, rstd, b.registers
        )
        source = cast(x, conv.dtype)
        dx, d["depthwise_weight"], d["depthwise_bias"] = launch(
            b.backend, "depthwise_conv2d_bwd", dconv, source, w.depthwise_weight, o.grid, b.registers, *(None,) * 4
        )
        return dx + grad, None, None, *gradients_of(ctx.dtypes, d)


def _fused(x, w: ConvNeXtWeights, grid, registers, activation, eps, drop_path, rng, layer, backend: str) -> Tensor:
    """Draws the mask and runs the node."""
    mask = drop_path_mask(rng, drop_path, layer, x.shape[0]) if drop_path else None
    branch = Branch(activation, registers, backend, autocast=autocast_dtype(x))
    return _ConvNeXtBlock.apply(x, mask, _Options(list(grid), float(eps), branch), *w)


_FORMS = Forms(composed, reference.convnext_block, _fused)


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
    return on_tokens(
        "convnext_block", _FORMS, _check_weights,
        x, weights, grid, registers, activation, eps, drop_path, rng, layer, backend,
    )  # fmt: skip
