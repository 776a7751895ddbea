"""``convnext_block`` as depthwise convolution, LayerNorm and linear layers, each on its own best backend."""

from torch import Tensor

from ..backends import BACKENDS
from ..ops.depthwise_conv2d import depthwise_conv2d
from ..ops.layer_norm_2d import layer_norm_2d
from ..reference.convnext_block import ConvNeXtWeights
from .linear import linear

BACKENDS["composed"].operators.add("convnext_block")


def convnext_block(
    x: Tensor,
    w: ConvNeXtWeights,
    grid: tuple[int, int],
    registers: int = 0,
    activation: str = "gelu",
    eps: float = 1e-6,
    drop_path: float = 0.0,
    rng: Tensor | None = None,
    layer: int = 0,
) -> Tensor:
    """Same arguments and result as :func:`sdp_kernels.reference.convnext_block.convnext_block`."""
    h = depthwise_conv2d(x, w.depthwise_weight, w.depthwise_bias, grid=grid, registers=registers)
    h = layer_norm_2d(h, w.norm_weight, w.norm_bias, eps, registers=registers)
    h = linear(h, w.expand_weight, w.expand_bias, activation, registers=registers)
    path = {"drop_path": drop_path, "rng": rng, "layer": layer, "registers": registers}
    return linear(h, w.project_weight, w.project_bias, "none", w.layer_scale, x, **path)
