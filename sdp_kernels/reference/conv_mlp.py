"""The ConvMLP half of an SdP-Net block in plain PyTorch (MODELS: both branches, LayerScale, drop-path)."""

from typing import NamedTuple

from torch import Tensor

from .depthwise_conv2d import depthwise_conv2d
from .layer_norm_2d import layer_norm_2d
from .linear import linear


class ConvMLPWeights(NamedTuple):
    """Parameters of one ConvMLP of width C: pointwise (C, C), expand (hidden, C), project (C, hidden), depthwise
    (C, 1, k, k), everything else a vector over the output channels. Biases and layer scales may be None."""

    norm1_weight: Tensor
    norm1_bias: Tensor
    depthwise_weight: Tensor
    depthwise_bias: Tensor | None
    pointwise_weight: Tensor
    pointwise_bias: Tensor | None
    layer_scale1: Tensor | None
    norm2_weight: Tensor
    norm2_bias: Tensor
    expand_weight: Tensor
    expand_bias: Tensor | None
    project_weight: Tensor
    project_bias: Tensor | None
    layer_scale2: Tensor | None


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
    """x ← x + mask·γ₁·act(PW(DW(LN(x)))), then x ← x + mask·γ₂·W₃(act(W₂(LN(x)))), on a token buffer (B, T, C)."""
    path = {"drop_path": drop_path, "rng": rng, "layer": layer, "registers": registers}
    h = layer_norm_2d(x, w.norm1_weight, w.norm1_bias, eps, registers)
    h = depthwise_conv2d(h, w.depthwise_weight, w.depthwise_bias, grid, registers)
    x = linear(h, w.pointwise_weight, w.pointwise_bias, activation, w.layer_scale1, x, **path, branch=0)
    h = layer_norm_2d(x, w.norm2_weight, w.norm2_bias, eps, registers)
    h = linear(h, w.expand_weight, w.expand_bias, activation, registers=registers)
    return linear(h, w.project_weight, w.project_bias, "none", w.layer_scale2, x, **path, branch=1)
