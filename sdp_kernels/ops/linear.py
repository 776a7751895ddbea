"""Linear layer with its epilogues: bias, activation, dropout, LayerScale, drop-path, residual."""

from torch import Tensor

from .. import reference
from ..backends import choose
from ..composed import linear as composed
from ._checks import (
    check_floating,
    check_layer,
    check_parameter,
    check_rank,
    check_rate,
    check_registers,
    check_residual,
    check_rng,
    check_same_dtype,
)
from ._contract import define
from .activation import check_activation

SCHEMAS = {}

define("linear", SCHEMAS, {})


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "none",
    layer_scale: Tensor | None = None,
    residual: Tensor | None = None,
    registers: int = 0,
    dropout: float = 0.0,
    drop_path: float = 0.0,
    rng: Tensor | None = None,
    layer: int = 0,
    backend: str | None = None,
) -> Tensor:
    """``residual + drop_path_mask · layer_scale · dropout(act(x Wᵀ + b))``; without ``residual`` the second term alone.

    Args:
        x: (…, in); (B, …, in) when something is dropped, (B, T, in) with ``registers``, whose rows must then be finite
            in x (the operators here write 0): they meet a gradient of 0 in dweight.
        weight: (out, in) as in ``nn.Linear``; bias, layer_scale: (out,) or None. x's dtype (any under autocast);
            layer_scale may be float32.
        activation: one of ``ACTIVATIONS``.
        residual: (…, out); the output takes its dtype. registers: rows at the front of each sample that pass the
            residual through, or are written as 0 without one.
        dropout, drop_path: rates in [0, 1), per element and per sample; the masks are Philox draws from ``rng``
            (:func:`make_rng`) and ``layer``, the number of this call site.
        backend: run this backend or raise; None chooses.

    Returns:
        (…, out) in the residual's dtype, else x's dtype, else (under autocast) the autocast dtype.

    Raises:
        TypeError, ValueError: rank, shapes, dtypes, devices, unknown activation, rates, registers, missing rng;
        UnsupportedError: named backend.
    """
    check_floating("x", x)
    check_floating("weight", weight)
    if weight.dim() != 2:
        raise ValueError(f"weight must be (out, in), got {tuple(weight.shape)}")
    if x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x must be (…, {weight.shape[1]}) for weight {tuple(weight.shape)}, got {tuple(x.shape)}")
    outputs = (weight.shape[0],)
    check_parameter("weight", weight, tuple(weight.shape), x)
    check_same_dtype("weight", weight, x)
    if bias is not None:
        check_parameter("bias", bias, outputs, x)
        check_same_dtype("bias", bias, x)
    if layer_scale is not None:
        check_parameter("layer_scale", layer_scale, outputs, x)
    check_activation(activation)
    check_residual(residual, (*x.shape[:-1], *outputs), x)
    check_registers(registers, x)
    check_rate("dropout", dropout)
    check_rate("drop_path", drop_path)
    if dropout or drop_path:
        check_layer(layer)
        check_rank("x", x, tuple(range(2, 9)), "(B, …, in) when something is dropped")
    check_rng(rng, max(dropout, drop_path), x)
    form = composed if choose("linear", x, backend) == "composed" else reference.linear
    return form.linear(x, weight, bias, activation, layer_scale, residual, registers, dropout, drop_path, rng, layer)
