"""The ConvMLP half of an SdP-Net block as one operator."""

from torch import Tensor

from .. import reference
from ..backends import choose
from ..composed import conv_mlp as composed
from ..reference.conv_mlp import ConvMLPWeights
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
from ._contract import define
from .activation import check_activation
from .depthwise_conv2d import check_kernel

SCHEMAS = {}

define("conv_mlp", SCHEMAS, {})

_OPTIONAL = {"depthwise_bias", "pointwise_bias", "layer_scale1", "expand_bias", "project_bias", "layer_scale2"}


def _check_weights(weights: ConvMLPWeights, channels: int, x: Tensor) -> None:
    if not isinstance(weights, ConvMLPWeights):
        raise TypeError(f"weights must be a ConvMLPWeights, got {type(weights).__name__}")
    check_floating("weights.expand_weight", weights.expand_weight)
    hidden = weights.expand_weight.shape[0]
    check_kernel("weights.depthwise_weight", weights.depthwise_weight, channels)
    shapes = {
        "depthwise_weight": tuple(weights.depthwise_weight.shape),
        "pointwise_weight": (channels, channels),
        "expand_weight": (hidden, channels),
        "expand_bias": (hidden,),
        "project_weight": (channels, hidden),
    }
    for name, value in zip(ConvMLPWeights._fields, weights, strict=True):
        if value is not None or name not in _OPTIONAL:
            check_parameter(f"weights.{name}", value, shapes.get(name, (channels,)), x)


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

    Raises:
        TypeError, ValueError: naming the argument; UnsupportedError: named backend.

    Source of the formula: the SdP-Net project's ConvMLP block.
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
    form = composed if choose("conv_mlp", x, backend) == "composed" else reference.conv_mlp
    if not picture:
        return form.conv_mlp(x, weights, grid, registers, activation, eps, drop_path, rng, layer)
    tokens = x.permute(0, 2, 3, 1).flatten(1, 2)
    y = form.conv_mlp(tokens, weights, (x.shape[2], x.shape[3]), 0, activation, eps, drop_path, rng, layer)
    y = y.unflatten(1, (x.shape[2], x.shape[3])).permute(0, 3, 1, 2)
    return y.contiguous() if x.is_contiguous() else y
