"""Parameter groups, AdamW, the learning rate as a function of the step, and the guard against non-finite steps."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def scaled_lr(base_lr: float, batch_size: int) -> float:
    """The linear rule of the recipe: base_lr · batch / 512."""
    return base_lr * batch_size / 512


def learning_rate(
    step: int, *, peak: float, floor: float, warmup_steps: int, cycle_steps: int, cycle_growth: float = 1.0
) -> float:
    """The rate of step 0, 1, 2 …: linear warm-up, then cosine annealing with warm restarts (Loshchilov, Hutter 2017).

    Warm-up: peak · (step + 1) / (warmup_steps + 1), so that no step is wasted at 0 and the first cosine step is at
    the peak. Then cycle i has cycle_steps · cycle_growthⁱ steps (rounded), and at place t of its T steps
    floor + (peak − floor) · (1 + cos(π·t/T)) / 2. A pure function: to resume is to ask for another step.
    """
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    t, length, cycle = step - warmup_steps, cycle_steps, 0
    while t >= length:
        t -= length
        cycle += 1
        length = max(1, round(cycle_steps * cycle_growth**cycle))
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * t / length))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups: decayed weights, and those the model names in no_weight_decay(). Frozen parameters are left out."""
    spared = set(model.no_weight_decay())
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    unknown = spared - {name for name, _ in model.named_parameters()}
    if unknown:
        raise ValueError(f"no_weight_decay() names parameters the model does not have: {sorted(unknown)}")
    decayed = [(name, p) for name, p in named if name not in spared]
    rest = [(name, p) for name, p in named if name in spared]
    return [
        {"params": [p for _, p in pairs], "names": [name for name, _ in pairs], "weight_decay": decay}
        for pairs, decay in ((decayed, weight_decay), (rest, 0.0))
    ]


def build_optimizer(
    model: nn.Module, *, weight_decay: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
) -> torch.optim.AdamW:
    """AdamW (decoupled decay) as one fused kernel; its rate is set before every step. On a GPU it can be captured."""
    groups = parameter_groups(model, weight_decay)
    devices = {p.device.type for group in groups for p in group["params"]}
    fused = "meta" not in devices  # torch has no fused one there
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=eps, fused=fused, capturable=devices == {"cuda"})


class FiniteGuard:
    """Remembers, on the device, the first step whose loss or gradient norm was not finite.

    The optimizer skips that step and every one after it, so weights, averages and moments stay those of the last good
    step, however late the host looks (``check``): there is no synchronisation inside a step.
    """

    def __init__(self, device: torch.device) -> None:
        self.tripped = torch.zeros((), device=device)  # 0. or 1., float because the fused AdamW wants it so
        self.step = torch.full((), -1, dtype=torch.int64, device=device)

    def update(self, step: int, loss: Tensor, grad_norm: Tensor) -> None:
        bad = ~(torch.isfinite(loss) & torch.isfinite(grad_norm))
        self.step.copy_(torch.where(bad & (self.step < 0), step, self.step))
        self.tripped.copy_(torch.maximum(self.tripped, bad.to(self.tripped.dtype)))

    def first_bad_step(self) -> int | None:
        """The step, or None while all is well. Waits for the device."""
        step = int(self.step)
        return None if step < 0 else step
