"""Right or wrong, against fp64 and relative to the error that PyTorch itself makes in the same dtype:

    err(kernel vs fp64) ≤ 2 · err(PyTorch, same dtype, vs fp64) + floor

in the largest element and in the relative L2 norm; the floor is two units of the dtype and √rows of the accumulator's.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .part import Failure

CHUNK = 2**26
JUDGED = ("error", "torch_error", "allowed", "l2", "torch_l2", "allowed_l2")


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _measures(got: Tensor, exact: Tensor) -> tuple[float, float]:
    """(largest difference, L2 norm of the difference), a piece at a time: fp64 copies of large tensors are larger."""
    got, exact = got.detach().reshape(-1), exact.detach().reshape(-1)
    largest, squares = 0.0, 0.0
    for g, e in zip(got.split(CHUNK), exact.split(CHUNK)):
        apart = (g.double() - e.double()).abs()
        largest = max(largest, apart.max().item()) if not apart.isnan().any() else math.nan
        squares += apart.square().sum().item()
        if math.isnan(largest):
            return math.nan, math.nan
    return largest, math.sqrt(squares)


def judge(name: str, got: Tensor, exact: Tensor, peer: Tensor, rows: int = 1, slack: float = 0.0) -> dict[str, float]:
    """The errors, each over the truth's size, and what is allowed.

    ``rows``: length of the sums behind an element; ``slack``: absolute error that conditioning explains.
    Raises Failure where got has another shape, is not finite, or is off.
    """
    if got.shape != exact.shape:
        raise Failure(f"{name} has shape {tuple(got.shape)}, wanted is {tuple(exact.shape)}")
    if got.numel() == 0:
        return dict.fromkeys(JUDGED, 0.0)
    size = exact.abs().max().double().item() or 1.0
    norm = exact.double().norm().item() or 1.0
    floor = 2 * torch.finfo(got.dtype).eps + math.sqrt(rows) * torch.finfo(accumulator(got.dtype)).eps
    (largest, l2), (torch_largest, torch_l2) = _measures(got, exact), _measures(peer, exact)
    if not math.isfinite(largest):
        raise Failure(f"{name} is not finite everywhere")
    found = {
        "error": largest / size,
        "torch_error": torch_largest / size,
        "allowed": 2 * torch_largest / size + floor + slack / size,
        "l2": l2 / norm,
        "torch_l2": torch_l2 / norm,
        "allowed_l2": 2 * torch_l2 / norm + floor + slack * math.sqrt(got.numel()) / norm,
    }
    for what, allowed in (("error", "allowed"), ("l2", "allowed_l2")):
        if not found[what] <= found[allowed]:
            raise Failure(f"{name}: {what} {found[what]:.2e}, allowed is {found[allowed]:.2e}", {"off": {name: found}})
    return found


def same_bits(name: str, a: Tensor, b: Tensor) -> None:
    """Raise Failure unless the two are equal to the bit (NaN beside NaN is not)."""
    if a.shape != b.shape or not torch.equal(a, b):
        count = (a != b).sum().item() if a.shape == b.shape else "all"
        raise Failure(f"{name} differs: {count} of {a.numel()} elements")
