"""Tensors of every memory layout that an operator may meet."""

from __future__ import annotations

import torch
from torch import Tensor


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> Tensor:
    """Normal values that every dtype of the tests holds exactly, so that fp64 sees the same input as bf16 and fp16."""
    values = (torch.randn(shape, generator=seeded(seed), dtype=torch.float64) * scale).to(torch.bfloat16)
    return values.to(torch.float16).to(dtype)


def _in_buffer(x: Tensor, dim: int) -> Tensor:
    """A copy of x that lies inside a larger buffer of NaN, from index 1 of ``dim`` on."""
    shape = list(x.shape)
    shape[dim] += 3
    buffer = torch.full(shape, float("nan"), dtype=x.dtype)
    view = buffer.narrow(dim, 1, x.shape[dim])
    view.copy_(x)
    return view


def _strided(x: Tensor) -> Tensor:
    """A copy of x with gaps of one element (NaN) along its last dimension."""
    buffer = torch.full((*x.shape[:-1], 2 * x.shape[-1]), float("nan"), dtype=x.dtype)
    buffer[..., ::2] = x
    return buffer[..., ::2]


def _permuted(x: Tensor, order: tuple[int, ...]) -> Tensor:
    """A copy of x whose memory runs through the dimensions in ``order``."""
    inverse = [order.index(d) for d in range(x.dim())]
    return x.permute(order).contiguous().permute(inverse)


def _batch_last(x: Tensor) -> Tensor:
    return _permuted(x, (*range(1, x.dim()), 0))


VECTOR = {
    "contiguous": lambda x: x.contiguous().clone(),
    "gaps": _strided,
    "slice of the last dimension": lambda x: _in_buffer(x, x.dim() - 1),
}
ANY = {
    **VECTOR,
    "slice of dimension 1": lambda x: _in_buffer(x, 1),
    "batch last": _batch_last,
    "swapped": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
}
PICTURE = {
    **ANY,
    "channels_last": lambda x: x.clone(memory_format=torch.channels_last),
    "columns of channels_last": lambda x: _in_buffer(x.permute(0, 2, 3, 1).contiguous(), 2).permute(0, 3, 1, 2),
    "channels of channels_last": lambda x: _in_buffer(x.permute(0, 2, 3, 1).contiguous(), 3).permute(0, 3, 1, 2),
    "image rows of tokens": lambda x: (
        _in_buffer(x.flatten(2).transpose(1, 2).contiguous(), 1).unflatten(1, tuple(x.shape[2:])).permute(0, 3, 1, 2)
    ),
}


def layouts(x: Tensor) -> dict[str, Tensor]:
    """Copies of x by name of their layout."""
    makers = VECTOR if x.dim() == 1 else PICTURE if x.dim() == 4 else ANY
    return {name: make(x) for name, make in makers.items()}


def hostile(grad: Tensor) -> dict[str, Tensor]:
    """Gradients as autograd may hand them to a backward pass, by name; "expanded" has other values than ``grad``."""
    first = grad[(slice(None), *[slice(0, 1)] * (grad.dim() - 1))]
    return {
        "expanded from one element": grad.flatten()[:1].reshape([1] * grad.dim()).expand_as(grad),
        "expanded from one per sample": first.expand_as(grad),
        **layouts(grad),
    }
