"""How results are judged: against fp64, relative to the error that PyTorch itself makes in the same dtype.

    err(kernel vs fp64) ≤ k · err(PyTorch, same dtype vs fp64) + floor

in the largest element, the relative L2 norm and the direction (1 − cosine); and the errors must not lean to one side.
The floor is a few units of the dtype; for weight gradients it grows with √rows, the length of the sum.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
NARROW = (torch.float32, torch.bfloat16, torch.float16)


def _accumulates_in(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def unit_of_sums(dtype: torch.dtype) -> float:
    """eps of the type in which ``dtype`` is accumulated."""
    return torch.finfo(_accumulates_in(dtype)).eps


def floor_of(dtype: torch.dtype, rows: int = 1) -> float:
    """Error in relation to the values that a sum of that length may have however PyTorch does."""
    return 2 * torch.finfo(dtype).eps + math.sqrt(rows) * unit_of_sums(dtype)


def assert_as_exact(
    name: str, got: Tensor, exact: Tensor, peer: Tensor, *, k: float = 2.0, rows: int = 1, slack: float = 0.0
) -> None:
    """``got`` is as near to ``exact`` (fp64) as the rule of this module asks, ``peer`` being PyTorch's result.

    ``rows`` is the length of the sums behind an element. ``slack`` is an absolute error that conditioning explains.
    """
    assert got.shape == exact.shape, f"{name}: shape {tuple(got.shape)}, wanted {tuple(exact.shape)}"
    assert torch.isfinite(got).all(), f"{name}: not finite"
    dtype = got.dtype
    exact = exact.detach().double().flatten()
    wide, peer = got.detach().double().flatten(), peer.detach().double().flatten()
    count = exact.numel()
    if count == 0:
        return
    floor = floor_of(dtype, rows)
    size, norm, total = exact.abs().max().item(), exact.norm().item(), exact.abs().sum().item()

    def check(what: str, error: float, peers: float, floor: float) -> None:
        assert error <= k * peers + floor, (
            f"{name}: {what} {error:.3e}, wanted ≤ {k} · {peers:.3e} (PyTorch's) + {floor:.3e} ({dtype})"
        )

    check("largest error", (wide - exact).abs().max().item(), (peer - exact).abs().max().item(), floor * size + slack)
    check("L2 error", (wide - exact).norm().item(), (peer - exact).norm().item(), floor * norm + slack * count**0.5)
    if norm > 10 * ((peer - exact).norm() + slack * count**0.5):  # else the direction of what is all but zero is noise
        away = [1 - torch.dot(v / v.norm(), exact / norm).item() for v in (wide, peer)]
        check("1 − cosine", away[0], abs(away[1]), floor**2 + (slack * count**0.5 / norm) ** 2 + 1e-14)
        # Rounding to nearest errs to both sides; truncation, say, would lean by about half a unit.
        sign = exact.sign()
        lean = [abs(torch.dot(v - exact, sign).item()) for v in (wide, peer)]
        check("signed bias", *lean, (floor / 16 + 4 * floor / math.sqrt(count)) * total + slack * count)


def differentiate(function, inputs: list[Tensor], grads: list[Tensor] | None = None):
    """(outputs, gradients) of ``function`` at ``inputs``, whose strides are kept; ``grads`` default to ones."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    outputs = out if isinstance(out, tuple) else (out,)
    if grads is None:
        grads = [torch.ones_like(y) for y in outputs]
    grads = [g.to(y.dtype) for g, y in zip(grads, outputs, strict=True)]
    gradients = torch.autograd.grad(outputs, leaves, grads)
    return tuple(y.detach() for y in outputs), gradients
