"""KeLü in plain PyTorch (formula: docs/numerics.md)."""

import math

import torch
from torch import Tensor

from .precision import widen

A = 3.5
"""Half-width a of the transition: 0 below −a, the identity above a."""


def kelu(x: Tensor) -> Tensor:
    """``x/2 · (1 + x/a + sin(πx/a)/π)`` inside [−a, a], 0 below, x above; any shape and floating dtype."""
    wide = widen(x)
    inside = wide.clamp(-A, A)  # keeps sin and its derivative finite for infinite x
    bent = 0.5 * inside * (1 + inside / A + torch.sin(math.pi / A * inside) / math.pi)
    # At ±a exactly the outer pieces answer: clamp's own derivative there differs between versions of torch.
    return torch.where(wide >= A, wide, bent * (wide > -A)).to(x.dtype)


def kelu_bwd(grad: Tensor, x: Tensor) -> Tensor:
    """``grad · f′(x)``, itself differentiable: this is what a second derivative goes through."""
    wide = widen(x)
    inside = wide.clamp(-A, A)
    phase = math.pi / A * inside
    slope = 0.5 * (1 + 2 * inside / A + torch.sin(phase) / math.pi + inside / A * torch.cos(phase))
    return (widen(grad) * slope).to(x.dtype)
