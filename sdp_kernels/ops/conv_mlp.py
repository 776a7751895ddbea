"""The ConvMLP half of an SdP-Net block as one operator."""

from typing import NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..composed import conv_mlp as composed
from ..reference.conv_mlp import ConvMLPWeights
from ..reference.philox import drop_path_mask
from ..reference.precision import autocast_dtype, cast
from ._block import Forms, cast_parts, check_kind, check_parts, dtypes_of, gradients_of, on_tokens
from ._contract import define, launch, refuse_double_backward
from ._products import dgrad, wgrad
from .depthwise_conv2d import check_kernel
from .linear import Branch, branch_bwd, branch_fwd, hidden_bwd, hidden_fwd

SCHEMAS = {}

define(
    "conv_mlp",
    SCHEMAS,
    {},
    uses=(
        *("layer_norm_2d_fwd", "layer_norm_2d_bwd", "depthwise_conv2d_fwd", "depthwise_conv2d_bwd"),
        *("linear_epilogue_fwd", "linear_epilogue_bwd"),
    ),
)

_OPTIONAL = {"depthwise_bias", "pointwise_bias", "layer_scale1", "expand_bias", "project_bias", "layer_scale2"}
_CAST = ("depthwise", "pointwise", "expand", "project")


def _check_weights(weights: ConvMLPWeights, channels: int, x: Tensor) -> None:
    hidden = check_kind(weights, ConvMLPWeights)
    check_kernel("weights.depthwise_weight", weights.depthwise_weight, channels)
    shapes = {
        "depthwise_weight": tuple(weights.depthwise_weight.shape),
        "pointwise_weight": (channels, channels),
        "expand_weight": (hidden, channels),
        "expand_bias": (hidden,),
        "project_weight": (channels, hidden),
    }
    check_parts(weights, _OPTIONAL, shapes, _CAST, channels, x)


class _Options(NamedTuple):
    """Everything about one call that is not a tensor."""

    grid: list[int]
    eps: float
    inner: Branch

    def norm(self, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        b = self.inner
        return launch(b.backend, "layer_norm_2d_fwd", x, None, weight, bias, self.eps, b.registers)


class _ConvMLP(torch.autograd.Function):
    """Both branches as one node. Of what lies between it keeps the convolution's result, both pre-activations and the
    first branch's result, 3C + hidden elements a token beside x, and computes the rest again."""

    @staticmethod
    def forward(ctx, x, mask1, mask2, o: _Options, *weights):
        inner, weights = o.inner, ConvMLPWeights(*weights)
        w = cast_parts(weights, _CAST, inner.autocast)
        n, mean1, rstd1, _ = o.norm(x, w.norm1_weight, w.norm1_bias)
        conv = launch(
            inner.backend, "depthwise_conv2d_fwd", cast(n, w.pointwise_weight.dtype), w.depthwise_weight,
            w.depthwise_bias, o.grid, inner.registers, None, None, None, None,
        )  # fmt: skip
        x1, z = branch_fwd(conv, w.pointwise_weight, w.pointwise_bias, w.layer_scale1, x, mask1, inner)
        n, mean2, rstd2, _ = o.norm(x1, w.norm2_weight, w.norm2_bias)
        h, hidden = hidden_fwd(cast(n, conv.dtype), w.expand_weight, w.expand_bias, inner)
        outer = inner._replace(activation="none")
        y, _ = branch_fwd(h, w.project_weight, w.project_bias, w.layer_scale2, x1, mask2, outer)
        ctx.save_for_backward(x, conv, z, x1, hidden, mean1, rstd1, mean2, rstd2, mask1, mask2, *w)
        ctx.options, ctx.dtypes = o, dtypes_of(weights)
        return y

    @staticmethod
    def backward(ctx, grad):
        refuse_double_backward("conv_mlp")
        x, conv, z, x1, hidden, mean1, rstd1, mean2, rstd2, mask1, mask2, *weights = ctx.saved_tensors
        o, w, wants = ctx.options, ConvMLPWeights(*weights), ConvMLPWeights(*ctx.needs_input_grad[4:])
        inner, d = o.inner, {"expand_weight": None}

        dhidden, d["expand_bias"], d["project_weight"], d["project_bias"], d["layer_scale2"] = hidden_bwd(
            grad, hidden, w.project_weight, w.project_bias, w.layer_scale2, mask2, inner,
            wants.project_weight or wants.layer_scale2,
        )  # fmt: skip
        if wants.expand_weight:
            n = cast(o.norm(x1, w.norm2_weight, w.norm2_bias)[0], conv.dtype)
            d["expand_weight"] = wgrad(dhidden, n, w.expand_weight, inner.backend, inner.autocast is not None)
            del n
        dn = dgrad(dhidden, w.expand_weight, inner.backend)
        del dhidden
        dx1, d["norm2_weight"], d["norm2_bias"] = launch(
            inner.backend, "layer_norm_2d_bwd",
            cast(dn, x.dtype), grad, x1, w.norm2_weight, mean2, rstd2, inner.registers,
        )  # fmt: skip
        dconv, d["pointwise_weight"], d["pointwise_bias"], d["layer_scale1"] = branch_bwd(
            dx1, conv, z, w.pointwise_weight, w.pointwise_bias, w.layer_scale1, mask1, inner,
            wants_dw=wants.pointwise_weight or wants.layer_scale1,
        )  # fmt: skip
        if x.dtype == conv.dtype:  # normalised again as the convolution's backward loads it
            source, norm = x, (mean1, rstd1, w.norm1_weight, w.norm1_bias)
        else:
            source, norm = cast(o.norm(x, w.norm1_weight, w.norm1_bias)[0], conv.dtype), (None,) * 4
        dn, d["depthwise_weight"], d["depthwise_bias"] = launch(
            inner.backend, "depthwise_conv2d_bwd", dconv, source, w.depthwise_weight, o.grid, inner.registers, *norm
        )
        dx, d["norm1_weight"], d["norm1_bias"] = launch(
            inner.backend, "layer_norm_2d_bwd",
            cast(dn, x.dtype), dx1, x, w.norm1_weight, mean1, rstd1, inner.registers,
        )  # fmt: skip
        return dx, None, None, None, *gradients_of(ctx.dtypes, d)


def _fused(x, w: ConvMLPWeights, grid, registers, activation, eps, drop_path, rng, layer, backend: str) -> Tensor:
    """Draws the masks and runs the node."""
    masks = (drop_path_mask(rng, drop_path, layer, x.shape[0], i) if drop_path else None for i in (0, 1))
    inner = Branch(activation, registers, backend, autocast=autocast_dtype(x))
    return _ConvMLP.apply(x, *masks, _Options(list(grid), float(eps), inner), *w)


_FORMS = Forms(composed, reference.conv_mlp, _fused)


def conv_mlp(
    x: Tensor,
    weights: ConvMLPWeights,
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
    """Both residual branches of SdP-Net's ConvMLP, on image tokens only; registers pass by untouched.

    ``x ← x + DropPath(γ₁ · act(PW₁(DW_k(LN(x)))))``, then ``x ← x + DropPath(γ₂ · PW₃(act(PW₂(LN(x)))))``.

    Args:
        x: token buffer (B, T, C), or a picture (B, C, H, W) (best channels_last: it is read as a token buffer).
        weights: :class:`ConvMLPWeights`; biases and layer scales may be None.
        grid: (H, W) of a token buffer, T = registers + H·W; must be None for a picture.
        activation: one of ``ACTIVATIONS``. eps: of both norms. drop_path: rate in [0, 1), per sample and branch.
        rng, layer: source of the drop-path masks, see :func:`make_rng`.
        backend: run this backend or raise; None chooses.

    Returns:
        A tensor of x's shape and dtype.

    Fused, it is one autograd node that keeps, beside x, 3C + hidden elements a token: the convolution's result, the two
    pre-activations and the first branch's result; the norms, the activations and their inputs are computed again. It
    is not twice differentiable there, and a clear error says so.

    Raises:
        TypeError, ValueError: naming the argument; UnsupportedError: named backend.

    Source of the formula: the SdP-Net project's ConvMLP block.
    """
    return on_tokens(
        "conv_mlp", _FORMS, _check_weights,
        x, weights, grid, registers, activation, eps, drop_path, rng, layer, backend,
    )  # fmt: skip
