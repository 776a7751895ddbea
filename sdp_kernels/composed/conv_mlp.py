"""``conv_mlp`` as LayerNorm, depthwise convolution and linear layers, each on its own best backend."""

from torch import Tensor

from ..backends import BACKENDS
from ..ops.depthwise_conv2d import depthwise_conv2d
from ..ops.layer_norm_2d import layer_norm_2d
from ..reference.conv_mlp import ConvMLPWeights
from .linear import linear

BACKENDS["composed"].operators.add("conv_mlp")


def conv_mlp(
    x: Tensor,
    w: ConvMLPWeights,
    grid: tuple[int, int],
    registers: int = 0,
    activation: str = "gelu",
    eps: float = 1e-6,
    drop_path: float = 0.0,
    rng: Tensor | None = None,
    layer: int = 0,
) -> Tensor:
    """Same arguments and result as :func:`sdp_kernels.reference.conv_mlp.conv_mlp`."""
    path = {"drop_path": drop_path, "rng": rng, "layer": layer, "registers": registers}
    h = layer_norm_2d(x, w.norm1_weight, w.norm1_bias, eps, registers=registers)
    h = depthwise_conv2d(h, w.depthwise_weight, w.depthwise_bias, grid=grid, registers=registers)
    x = linear(h, w.pointwise_weight, w.pointwise_bias, activation, w.layer_scale1, x, **path, branch=0)
    h = layer_norm_2d(x, w.norm2_weight, w.norm2_bias, eps, registers=registers)
    h = linear(h, w.expand_weight, w.expand_bias, activation, registers=registers)
    return linear(h, w.project_weight, w.project_bias, "none", w.layer_scale2, x, **path, branch=1)
