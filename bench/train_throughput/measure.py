"""One model per form, checked against each other, then a step each in turn, in random order."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

import sdp_kernels
from sdpnet.ema import EMA
from sdpnet.loss import classification_loss
from sdpnet.models import create_model
from sdpnet.optim import FiniteGuard, build_optimizer
from sdpnet.train import train_step

from ..measure import CpuClock, CudaClock
from . import flops, forms, profile
from .presets import Preset

LR, CLIP = 1e-4, 5.0
TOLERANCE = 0.05
"""Largest difference of bf16 logits from fp32's over their largest value: a form beyond it computes something else."""


@dataclass
class Result:
    """One form's figures; ``reason`` says why there are none."""

    form: str
    seconds: list[float] = field(default_factory=list)
    memory: int | None = None
    """Bytes a step holds at most beyond weights, moments and averages."""
    flops: int | None = None
    error: float | None = None
    shares: dict[str, float] = field(default_factory=dict)
    loss: float | None = None
    reason: str | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


class Trainee:
    """A form with its optimizer, average and data: ``step()`` is one training step."""

    def __init__(self, form: str, preset: Preset, activation: str, batch: int, device: str) -> None:
        torch.manual_seed(0)
        model = create_model(preset.model, activation=activation, **preset.options).to(device).train()
        self.batch, self.device, self.base = batch, device, model
        self.model = forms.build(form, model)
        target = getattr(self.model, "_orig_mod", self.model)
        self.ema = EMA(target, 0.999)
        self.optimizer = build_optimizer(target, weight_decay=0.05)
        self.guard = FiniteGuard(torch.device(device))
        generator = torch.Generator().manual_seed(1)
        c = model.config
        size = c.image_size if isinstance(c.image_size, tuple) else (c.image_size, c.image_size)
        self.images = torch.randn(batch, c.in_channels, *size, generator=generator).to(device)
        self.targets = torch.randint(c.num_classes, (batch,), generator=generator).to(device)
        self.rng = sdp_kernels.make_rng(0, 0, 0, device=torch.device(device))
        self.steps = 0

    def step(self) -> Tensor:
        """Forward, loss, backward, clipping, AdamW, average; its loss."""
        parts = [(self.images, self.targets, self.rng)]
        loss_of = lambda logits, targets: classification_loss(logits, targets, smoothing=0.1)  # noqa: E731
        self.steps += 1
        return train_step(
            self.model, self.optimizer, self.ema, self.guard, parts, loss_of,
            step=self.steps, lr=LR, clip=CLIP, bf16=True,
        )  # fmt: skip

    def release(self) -> None:
        """Frees the gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def logits(self, bf16: bool) -> Tensor:
        with torch.autocast(self.device, torch.bfloat16, enabled=bf16):
            return self.model(self.images, self.rng).float()


def run(
    preset: Preset, activation: str, *, batch: int, device: str, seconds: float, wanted: tuple[str, ...],
    say: Callable[[str], None],
) -> list[Result]:  # fmt: skip
    """Figures of every wanted form. ``seconds``: how long all of them together take turns."""
    trainees: dict[str, Trainee] = {}
    results = {name: Result(name) for name in wanted}
    truth = None
    for name in wanted:
        start = time.monotonic()
        if truth is None:
            truth = Trainee("eager", preset, activation, batch, device).logits(bf16=False)
        trainee = Trainee(name, preset, activation, batch, device)
        try:
            error = ((trainee.logits(bf16=True) - truth).abs().max() / truth.abs().max()).item()
            if error <= TOLERANCE:
                for _ in range(2):
                    results[name].loss = trainee.step().item()
        except (ImportError, RuntimeError) as problem:  # no compiler here or one that refuses; too little memory
            results[name].reason = f"{type(problem).__name__}: {str(problem).splitlines()[0][:200]}"
            say(f"{name}: left out: {results[name].reason}")
            trainee.release()
            continue
        if not error <= TOLERANCE:
            raise ValueError(f"{name}: its logits are off by {error:.1e} of the largest, allowed is {TOLERANCE:.0e}")
        results[name].error = error
        say(f"{name}: ready after {time.monotonic() - start:.0f} s, logits' error {error:.1e}")
        trainees[name] = trainee
    _take_turns(trainees, results, device, seconds)
    for name, trainee in trainees.items():
        results[name].memory = profile.peak_memory(trainee.step, trainee.release, device)
        results[name].shares = _shares(trainee, device, say)
        if "compiled" not in name:
            results[name].flops = flops.count(trainee.step)
    try:
        _check_flops(results, trainees, batch)
    except ValueError as problem:
        if device != "cuda":
            raise
        say(str(problem))  # a vendor's kernel that nobody has counted yet; the times are right all the same
        for result in results.values():
            result.flops = None
    return list(results.values())


def _shares(trainee: Trainee, device: str, say: Callable[[str], None]) -> dict[str, float]:
    """None where the GPU's profiler can't work: it needs more rights than a measurement does."""
    try:
        return profile.shares(trainee.step, device)
    except RuntimeError as problem:
        say(f"no shares: {problem}")
        return {}


def _take_turns(trainees: dict[str, Trainee], results: dict[str, Result], device: str, seconds: float) -> None:
    clock, order = CudaClock() if device == "cuda" else CpuClock(), random.Random(0)
    began, rounds = time.monotonic(), 0
    gc.collect()
    while rounds < 5 or time.monotonic() - began < seconds:
        for name in order.sample(list(trainees), len(trainees)):
            clock.run(trainees[name].step)
            results[name].seconds += clock.take()
        rounds += 1


def _check_flops(results: dict[str, Result], trainees: dict[str, Trainee], batch: int) -> None:
    """Eager forms count the same; fused counts that and the register rows of its GEMMs; compiled forms inherit."""
    counted: dict[str, set[int]] = defaultdict(set)
    for name, result in results.items():
        if result.flops is not None:
            surplus = flops.register_rows(trainees[name].base, batch) if name == "fused" else 0
            counted["model"].add(result.flops - surplus)
    if len(counted["model"]) > 1:
        told = {name: r.flops for name, r in results.items() if r.flops is not None}
        raise ValueError(f"the forms' FLOPs differ by more than the register rows: {told}")
    for result in results.values():
        if result.reason is None and counted["model"]:
            result.flops = next(iter(counted["model"]))
