"""Dropout whose mask is a pure function of where it is used: seed, layer, step, sample and position."""

import torch
from torch import Tensor

from ..reference import philox
from ._checks import check_floating, check_layer, check_rate, check_rng


def make_rng(seed: int, step: int = 0, first_sample: int = 0, device: torch.device | str | None = None) -> Tensor:
    """int64 tensor (seed, step, first_sample) that operators draw their masks from.

    Seed and step live on the device, so a training step neither recompiles nor freezes them in a captured graph: write
    the next step's numbers into the same tensor. ``first_sample`` is the index, within the step, of the batch's first
    sample: micro-batches that count on draw what one big batch draws.

    Raises:
        TypeError: not ints. ValueError: seed outside int64, step or first_sample outside [0, 2³²).
    """
    for name, value in (("seed", seed), ("step", step), ("first_sample", first_sample)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed must fit in 64 bits, got {seed}")
    for name, value in (("step", step), ("first_sample", first_sample)):
        if not 0 <= value < 2**32:
            raise ValueError(f"{name} must be in [0, 2**32), got {value}")
    rng = torch.empty(3, dtype=torch.int64, device=device)
    for place, value in zip(rng, (seed, step, first_sample)):
        place.fill_(value)  # by a kernel: a copy from the host waits for all that a GPU still has to do
    return rng


def dropout(x: Tensor, p: float, *, rng: Tensor | None = None, layer: int = 0) -> Tensor:
    """Zero each element with probability ``p`` and scale the others by 1 / (1 − p).

    Args:
        x: (B, …), floating. p: in [0, 1). rng: from :func:`make_rng`, on x's device; needed when p > 0.
        layer: number of the call site; different sites draw different masks.

    Returns:
        A tensor of x's shape and dtype. Source of the mask: Philox4x32-10, see :mod:`sdp_kernels.reference.philox`.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    check_floating("x", x)
    check_rate("p", p)
    check_layer(layer)
    check_rng(rng, p, x)
    if p == 0:
        return x
    if x.dim() == 0:
        raise ValueError("x must have a batch dimension, got a 0-dimensional tensor")
    return philox.dropout(x, p, rng, layer)
