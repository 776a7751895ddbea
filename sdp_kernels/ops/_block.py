"""What operators that are one autograd node of several kernels share: their weights, their choice, their layouts."""

import functools
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ..backends import choose
from ..reference.precision import autocast_dtype, cast
from ._checks import (
    check_eps,
    check_grid,
    check_layer,
    check_parameter,
    check_rate,
    check_registers,
    check_rng,
    check_same_dtype,
    check_tensor,
)
from .activation import check_activation

Weights = TypeVar("Weights", bound=tuple)
"""A NamedTuple of parameters."""


def check_kind(weights: tuple, kind: type) -> int:
    """``weights`` is a ``kind`` with an expand_weight (hidden, C); the hidden width."""
    if not isinstance(weights, kind):
        raise TypeError(f"weights must be a {kind.__name__}, got {type(weights).__name__}")
    check_tensor("weights.expand_weight", weights.expand_weight, (2,), "(hidden, C)")
    return weights.expand_weight.shape[0]


def check_parts(
    weights: tuple,
    optional: set[str],
    shapes: dict[str, tuple[int, ...]],
    prefixes: tuple[str, ...],
    channels: int,
    x: Tensor,
) -> None:
    """Each part of its shape, (C,) where ``shapes`` has none, those of convolutions and linear layers, which begin with
    the prefixes, in the dtype of their products; None only for the optional ones."""
    vector = (channels,)
    for name, value in zip(weights._fields, weights, strict=True):
        if value is not None or name not in optional:
            check_parameter(f"weights.{name}", value, shapes.get(name, vector), x)
            if name.startswith(prefixes):
                check_same_dtype(f"weights.{name}", value, x)


def cast_parts(weights: Weights, prefixes: tuple[str, ...], dtype: torch.dtype | None) -> Weights:
    """The parts, those of convolutions and linear layers in the dtype that autocast wants, if it wants one.

    Inside the node, so that no gradient is rounded to that dtype on its way out.
    """
    if dtype is None:
        return weights
    parts = zip(weights._fields, weights, strict=True)
    return type(weights)(*(cast(p, dtype) if name.startswith(prefixes) else p for name, p in parts))


def dtypes_of(weights: Weights) -> Weights:
    """Of the parts, as they are named; None for those that are not there."""
    return type(weights)(*(None if part is None else part.dtype for part in weights))


def gradients_of(dtypes: tuple, found: dict[str, Tensor | None]) -> Iterator[Tensor | None]:
    """By the parts' order and in their dtypes; None for those that are not there or not wanted."""
    for name, dtype in zip(dtypes._fields, dtypes, strict=True):
        gradient = None if dtype is None else found[name]
        yield None if gradient is None else cast(gradient, dtype)


class Forms(NamedTuple):
    """The operator in its three forms: modules with a function of its name, and the node, which takes ``backend``."""

    composed: ModuleType
    reference: ModuleType
    fused: Callable[..., Tensor]


def chosen_form(operator: str, forms: Forms, x: Tensor, backend: str | None) -> Callable[..., Tensor]:
    """The function that runs the operator on x."""
    limits = {}
    if x.dtype not in (autocast_dtype(x) or x.dtype, torch.float32):
        limits = dict.fromkeys(("cpu", "cuda"), f"adds no {autocast_dtype(x)} branch to a {x.dtype} x")
    chosen = choose(operator, x, backend, limits)
    if chosen in ("composed", "reference"):
        return getattr(getattr(forms, chosen), operator)
    return functools.partial(forms.fused, backend=chosen)


def on_tokens(
    operator: str,
    forms: Forms,
    check_weights: Callable[[tuple, int, Tensor], None],
    x: Tensor,
    weights: tuple,
    grid: tuple[int, int] | None,
    registers: int,
    activation: str,
    eps: float,
    drop_path: float,
    rng: Tensor | None,
    layer: int,
    backend: str | None,
) -> Tensor:
    """Check the arguments of a block on image tokens and run it; a picture is read as a token buffer.

    y has x's shape, dtype and memory format.
    """
    check_tensor("x", x, (3, 4), "(B, T, C) or (B, C, H, W)")
    check_registers(registers, x)
    picture = x.dim() == 4
    if picture and grid is not None:
        raise ValueError(f"grid must be None for a picture (B, C, H, W), got {grid!r}")
    if not picture:
        check_grid(grid, registers, x)
    check_weights(weights, x.shape[1] if picture else x.shape[2], x)
    check_activation(activation)
    check_eps(eps)
    check_rate("drop_path", drop_path)
    if drop_path:
        check_layer(layer)
    check_rng(rng, drop_path, x)
    form = chosen_form(operator, forms, x, backend)
    if not picture:
        return form(x, weights, grid, registers, activation, eps, drop_path, rng, layer)
    tokens = x.permute(0, 2, 3, 1).flatten(1, 2)
    y = form(tokens, weights, (x.shape[2], x.shape[3]), 0, activation, eps, drop_path, rng, layer)
    y = y.unflatten(1, (x.shape[2], x.shape[3])).permute(0, 3, 1, 2)
    return y.contiguous() if x.is_contiguous() else y
