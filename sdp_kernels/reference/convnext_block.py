"""A ConvNeXt block in plain PyTorch, on a token buffer."""

from typing import NamedTuple

from torch import Tensor

from .depthwise_conv2d import depthwise_conv2d
from .layer_norm_2d import layer_norm_2d
from .linear import linear


class ConvNeXtWeights(NamedTuple):
    """Parameters of one block of width C: depthwise (C, 1, k, k), expand (hidden, C), project (C, hidden), everything
    else a vector over the output channels. Biases and the layer scale may be None."""

    depthwise_weight: Tensor
    depthwise_bias: Tensor | None
    norm_weight: Tensor
    norm_bias: Tensor
    expand_weight: Tensor
    expand_bias: Tensor | None
    project_weight: Tensor
    project_bias: Tensor | None
    layer_scale: Tensor | None


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
    """x + mask · γ · W₂(act(W₁(LN(DW(x))))) on a token buffer (B, T, C)."""
    h = depthwise_conv2d(x, w.depthwise_weight, w.depthwise_bias, grid, registers)
    h = layer_norm_2d(h, w.norm_weight, w.norm_bias, eps, registers)
    h = linear(h, w.expand_weight, w.expand_bias, activation, registers=registers)
    path = {"drop_path": drop_path, "rng": rng, "layer": layer, "registers": registers}
    return linear(h, w.project_weight, w.project_bias, "none", w.layer_scale, x, **path)
