"""A transformer's feed-forward branch in plain PyTorch, on a token buffer."""

from typing import NamedTuple

from torch import Tensor

from .layer_norm_2d import layer_norm_2d
from .linear import linear


class FeedForwardWeights(NamedTuple):
    """Parameters of one branch of width C: expand (hidden, C), project (C, hidden), everything else a vector over the
    output channels. Biases and the layer scale may be None."""

    norm_weight: Tensor
    norm_bias: Tensor
    expand_weight: Tensor
    expand_bias: Tensor | None
    project_weight: Tensor
    project_bias: Tensor | None
    layer_scale: Tensor | None


def feed_forward(
    x: Tensor,
    w: FeedForwardWeights,
    activation: str = "gelu",
    eps: float = 1e-5,
    dropout: float = 0.0,
    drop_path: float = 0.0,
    rng: Tensor | None = None,
    layer: int = 0,
) -> Tensor:
    """x + mask · γ · drop(W₂(drop(act(W₁(LN(x)))))) on a token buffer (B, T, C); the inner masks are ``layer``'s, the
    outer ones ``layer + 1``'s."""
    h = layer_norm_2d(x, w.norm_weight, w.norm_bias, eps)
    h = linear(h, w.expand_weight, w.expand_bias, activation, dropout_rate=dropout, rng=rng, layer=layer)
    masks = {"dropout_rate": dropout, "drop_path": drop_path, "rng": rng, "layer": layer + 1}
    return linear(h, w.project_weight, w.project_bias, "none", w.layer_scale, x, **masks)
