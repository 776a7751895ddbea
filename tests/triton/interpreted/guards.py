"""Guard bands: tensors inside larger buffers of NaN, whose surroundings must be the same afterwards.

A kernel that reads outside gets NaN into its results, one that writes outside changes a band; outputs and scratch, made
by ``torch.empty_like`` and ``new_empty`` in the kernels' host code, are NaN until written.
"""

from __future__ import annotations

import torch
from torch import Tensor

BAND = 4096
"""Elements on either side: more than the widest block reaches over, and a multiple of the alignment."""


class Guards:
    """A context in which allocations are guarded; :meth:`inside` guards an input. Checked at the end."""

    def __init__(self, monkeypatch):
        self._monkeypatch = monkeypatch
        self._buffers: list[tuple[Tensor, Tensor]] = []
        self.allocations = 0

    def _allocate(self, shape, strides, dtype: torch.dtype) -> Tensor:
        extent = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if all(shape) else 0
        buffer = torch.full((extent + 2 * BAND,), float("nan"), dtype=dtype)
        view = buffer.as_strided(shape, strides, BAND)
        within = torch.zeros(buffer.shape, dtype=torch.bool)
        within.as_strided(shape, strides, BAND).fill_(True)
        self._buffers.append((buffer, within))
        return view

    def inside(self, x: Tensor | None) -> Tensor | None:
        """A copy of x with the same strides inside a buffer of NaN; its gaps are NaN too."""
        if x is None:
            return None
        view = self._allocate(tuple(x.shape), x.stride(), x.dtype)
        view.copy_(x)
        return view

    def __enter__(self) -> Guards:
        empty_like, new_empty = torch.empty_like, Tensor.new_empty

        def guarded_empty_like(x, **options):
            plain = empty_like(x, **options)
            self.allocations += 1
            return self._allocate(tuple(plain.shape), plain.stride(), plain.dtype)

        def guarded_new_empty(x, size, **options):
            plain = new_empty(x, size, **options)
            if plain.numel() == 0:
                return plain
            self.allocations += 1
            return self._allocate(tuple(plain.shape), plain.stride(), plain.dtype)

        self._monkeypatch.setattr(torch, "empty_like", guarded_empty_like)
        self._monkeypatch.setattr(Tensor, "new_empty", guarded_new_empty)
        return self

    def __exit__(self, *error) -> None:
        self._monkeypatch.undo()
        if error[0] is None:
            self.check()

    def check(self) -> None:
        """Nothing but NaN around any of the tensors."""
        for buffer, within in self._buffers:
            assert torch.isnan(buffer[~within]).all(), "a kernel wrote outside its tensor"
