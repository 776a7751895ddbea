"""Linear layer with its epilogues in plain PyTorch: bias, activation, dropout, LayerScale, drop-path, residual."""

from torch import Tensor
from torch.nn import functional as F

from .activations import FUNCTIONS
from .philox import drop_path_mask, dropout
from .precision import widen


def finish(
    y: Tensor,
    layer_scale: Tensor | None,
    residual: Tensor | None,
    registers: int,
    dropout_rate: float,
    drop_path: float,
    rng: Tensor | None,
    layer: int,
    branch: int,
) -> Tensor:
    """Everything after the activation: ``residual + mask · γ · dropout(y)``; register rows are the residual's, or 0."""
    dtype = y.dtype if residual is None else residual.dtype
    if dropout_rate > 0:
        y = dropout(y, dropout_rate, rng, layer)
    if layer_scale is not None or drop_path > 0 or dtype != y.dtype:
        y = widen(y)  # so that the product and the sum are rounded once
    if layer_scale is not None:
        y = y * layer_scale
    if drop_path > 0:
        mask = drop_path_mask(rng, drop_path, layer, y.shape[0], branch)
        y = y * mask.to(y.dtype).view(-1, *[1] * (y.dim() - 1))
    if registers:
        y = F.pad(y[:, registers:], (0, 0, registers, 0))
    return (y if residual is None else residual + y).to(dtype)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    layer_scale: Tensor | None = None,
    residual: Tensor | None = None,
    registers: int = 0,
    dropout_rate: float = 0.0,
    drop_path: float = 0.0,
    rng: Tensor | None = None,
    layer: int = 0,
    branch: int = 0,
) -> Tensor:
    """``residual + mask · γ · dropout(act(x Wᵀ + b))``; ``branch`` numbers the drop-path masks of a layer."""
    y = FUNCTIONS[activation](F.linear(x, weight, bias))
    return finish(y, layer_scale, residual, registers, dropout_rate, drop_path, rng, layer, branch)
