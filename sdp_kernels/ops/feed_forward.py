"""A transformer's feed-forward branch as one operator."""

from typing import NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..composed import feed_forward as composed
from ..reference.feed_forward import FeedForwardWeights
from ..reference.philox import drop_path_mask
from ..reference.precision import autocast_dtype, cast
from ._block import Forms, cast_parts, check_kind, check_parts, chosen_form, dtypes_of, gradients_of
from ._checks import check_eps, check_layer, check_rate, check_rng, check_tensor
from ._contract import define, launch, refuse_double_backward
from ._products import dgrad, wgrad
from .activation import check_activation
from .linear import Branch, branch_bwd, branch_fwd, hidden_bwd, hidden_fwd

SCHEMAS = {}

define(
    "feed_forward",
    SCHEMAS,
    {},
    uses=("layer_norm_2d_fwd", "layer_norm_2d_bwd", "linear_epilogue_fwd", "linear_epilogue_bwd"),
)

_OPTIONAL = {"expand_bias", "project_bias", "layer_scale"}
_CAST = ("expand", "project")


def _check_weights(weights: FeedForwardWeights, x: Tensor) -> None:
    channels, hidden = x.shape[2], check_kind(weights, FeedForwardWeights)
    shapes = {
        "expand_weight": (hidden, channels),
        "expand_bias": (hidden,),
        "project_weight": (channels, hidden),
    }
    check_parts(weights, _OPTIONAL, shapes, _CAST, channels, x)


class _Options(NamedTuple):
    """Everything about one call that is not a tensor: of the first linear layer, and of the second."""

    eps: float
    inner: Branch
    outer: Branch

    def norm(self, x: Tensor, w: FeedForwardWeights) -> tuple[Tensor, ...]:
        return launch(self.inner.backend, "layer_norm_2d_fwd", x, None, w.norm_weight, w.norm_bias, self.eps, 0)


class _FeedForward(torch.autograd.Function):
    """One node. Of what lies between it keeps the pre-activation and the norm's statistics."""

    @staticmethod
    def forward(ctx, x, mask, rng, o: _Options, *weights):
        weights = FeedForwardWeights(*weights)
        w = cast_parts(weights, _CAST, o.inner.autocast)
        n, mean, rstd, _ = o.norm(x, w)
        n = cast(n, w.expand_weight.dtype)
        h, hidden = hidden_fwd(n, w.expand_weight, w.expand_bias, o.inner, rng)
        y, _ = branch_fwd(h, w.project_weight, w.project_bias, w.layer_scale, x, mask, o.outer, rng)
        ctx.save_for_backward(x, hidden, mean, rstd, mask, None if rng is None else rng.clone(), *w)
        ctx.options, ctx.dtypes = o, dtypes_of(weights)
        return y

    @staticmethod
    def backward(ctx, grad):
        refuse_double_backward("feed_forward")
        x, hidden, mean, rstd, mask, rng, *weights = ctx.saved_tensors
        o, w, wants = ctx.options, FeedForwardWeights(*weights), FeedForwardWeights(*ctx.needs_input_grad[4:])
        d = {"expand_weight": None}
        project = (w.project_weight, w.project_bias, w.layer_scale, mask)
        wants_project = wants.project_weight or wants.layer_scale
        if rng is None:
            dhidden, d["expand_bias"], d["project_weight"], d["project_bias"], d["layer_scale"] = hidden_bwd(
                grad, hidden, *project, o.inner, wants_project
            )
        else:
            inner, masks = o.inner, (0, o.inner.dropout, rng, o.inner.layer)
            plain = inner.activation == "none"
            h = hidden if plain else launch(
                inner.backend, "linear_epilogue_fwd", hidden, inner.activation, None, None, None, *masks
            )  # fmt: skip
            dh, d["project_weight"], d["project_bias"], d["layer_scale"] = branch_bwd(
                grad, h, None, *project, o.outer, rng, wants_dw=wants_project
            )
            del h
            dhidden, _, d["expand_bias"] = launch(
                inner.backend, "linear_epilogue_bwd", dh, hidden, inner.activation, None, None, *masks
            )
            del dh
        if wants.expand_weight:
            n = cast(o.norm(x, w)[0], hidden.dtype)
            d["expand_weight"] = wgrad(dhidden, n, w.expand_weight, o.inner.backend, o.inner.autocast is not None)
            del n
        dn = dgrad(dhidden, w.expand_weight, o.inner.backend)
        del dhidden
        dx, d["norm_weight"], d["norm_bias"] = launch(
            o.inner.backend, "layer_norm_2d_bwd", cast(dn, x.dtype), grad, x, w.norm_weight, mean, rstd, 0
        )
        return dx, None, None, None, *gradients_of(ctx.dtypes, d)


def _fused(x, w: FeedForwardWeights, activation, eps, dropout, drop_path, rng, layer, backend: str) -> Tensor:
    """Draws the drop-path mask and runs the node."""
    mask = drop_path_mask(rng, drop_path, layer + 1, x.shape[0]) if drop_path else None
    inner = Branch(activation, 0, backend, float(dropout), layer, autocast=autocast_dtype(x))
    options = _Options(float(eps), inner, inner._replace(activation="none", layer=layer + 1))
    return _FeedForward.apply(x, mask, rng if dropout else None, options, *w)


_FORMS = Forms(composed, reference.feed_forward, _fused)


def feed_forward(
    x: Tensor,
    weights: FeedForwardWeights,
    *,
    activation: str = "gelu",
    eps: float = 1e-5,
    dropout: float = 0.0,
    drop_path: float = 0.0,
    rng: Tensor | None = None,
    layer: int = 0,
    backend: str | None = None,
) -> Tensor:
    """A transformer's second half: ``x + DropPath(γ · drop(W₂(drop(act(W₁(LN(x)))))))`` on all tokens.

    Args:
        x: token buffer (B, T, C) of any strides.
        weights: :class:`FeedForwardWeights`; biases and the layer scale may be None.
        activation: one of ``ACTIVATIONS``. eps: of the norm.
        dropout: rate in [0, 1) after each of the two linear layers; drop_path: rate in [0, 1), per sample.
        rng, layer: source of the masks, see :func:`make_rng`: ``layer`` draws the first dropout, ``layer + 1`` the
            second and the drop-path.
        backend: run this backend or raise; None chooses.

    Returns:
        A tensor of x's shape and dtype.

    Fused, it is one autograd node that keeps, beside x, the pre-activation (hidden elements a token) and the norm's
    mean and rstd, 8 bytes a token; the norm, the activation and their inputs are computed again, and the residual's
    gradient joins in the norm's backward pass. It is not twice differentiable there, and a clear error says so.

    Raises:
        TypeError, ValueError: naming the argument; UnsupportedError: named backend.

    Source of the formula: Vaswani et al. (2017), with the norm in front as in Xiong et al., "On layer normalization in
    the transformer architecture" (2020).
    """
    check_tensor("x", x, (3,), "(B, T, C)")
    _check_weights(weights, x)
    check_activation(activation)
    check_eps(eps)
    check_rate("dropout", dropout)
    check_rate("drop_path", drop_path)
    if dropout or drop_path:
        check_layer(layer)
    check_rng(rng, max(dropout, drop_path), x)
    form = chosen_form("feed_forward", _FORMS, x, backend)
    return form(x, weights, activation, eps, dropout, drop_path, rng, layer)
