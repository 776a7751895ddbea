"""Exponential moving average of the weights, in fp32."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class EMA:
    """A second model whose weights follow the live ones: e ← e + (1 − dₙ)·(w − e).

    dₙ = min(decay, (1 + n)/(10 + n)) at update n = 0, 1, 2 …: early averages are short, so the random start is soon
    forgotten. After n updates, with Dᵢ = dᵢ·dᵢ₊₁·…·dₙ₋₁ (Dₙ = 1): e = D₀·e₀ + Σᵢ (1 − dᵢ)·Dᵢ₊₁·wᵢ.
    Buffers are copied. Kept in fp32 (fp64 for fp64 weights). The number of updates is the number of steps, so a resumed
    run needs no counter of its own. Like an optimizer it holds on to the tensors that the model has now: looking for
    them anew takes longer, in a small model, than averaging them.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay: got {decay}, wanted a number in [0, 1)")
        self.decay = decay
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        for p in self.module.parameters():
            if p.is_floating_point() and p.dtype != torch.float64:
                p.data = p.data.float()
        self._live, self._averages = list(model.parameters()), list(self.module.parameters())
        self._buffers = list(zip(self.module.buffers(), model.buffers(), strict=True))

    def decay_at(self, n: int) -> float:
        return min(self.decay, (1 + n) / (10 + n))

    @torch.no_grad()
    def update(self, n: int, keep: Tensor | None = None) -> None:
        """Update number n (from 0). keep: scalar tensor, 1 to leave the average as it is (a step that did not
        happen), else 0.
        """
        live = [p.to(a.dtype) for p, a in zip(self._live, self._averages, strict=True)]
        weight = 1.0 - self.decay_at(n)
        if keep is None:
            torch._foreach_lerp_(self._averages, live, weight)
        else:
            torch._foreach_lerp_(self._averages, live, [(1.0 - keep) * weight] * len(live))
        for mine, theirs in self._buffers:
            mine.copy_(theirs)
