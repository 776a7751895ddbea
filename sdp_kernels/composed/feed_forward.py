"""``feed_forward`` as LayerNorm and linear layers, each on its own best backend."""

from torch import Tensor

from ..backends import BACKENDS
from ..ops.layer_norm_2d import layer_norm_2d
from ..reference.feed_forward import FeedForwardWeights
from .linear import linear

BACKENDS["composed"].operators.add("feed_forward")


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
    """Same arguments and result as :func:`sdp_kernels.reference.feed_forward.feed_forward`."""
    x, h = layer_norm_2d(x, w.norm_weight, w.norm_bias, eps, with_input=True)
    h = linear(h, w.expand_weight, w.expand_bias, activation, dropout_rate=dropout, rng=rng, layer=layer)
    masks = {"dropout_rate": dropout, "drop_path": drop_path, "rng": rng, "layer": layer + 1}
    return linear(h, w.project_weight, w.project_bias, "none", w.layer_scale, x, **masks)
