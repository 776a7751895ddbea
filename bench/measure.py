"""How a time and an error come about. All contenders of a case are measured together, taking turns in random order.

Inputs rotate: every timed call, whoever makes it, takes the next set, and the sets together exceed twice the last-level
cache, so that nobody finds its input there. A copy of the same tensor takes its turn as well; its rate is the floor.
"Ours" takes two turns per round, which gives the noise of this very measurement (A/A).
"""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from sdpnet.memory import keep_memory

from .cases import Case, Contender, Function, Operator
from .environment import last_level_cache

COPY, AGAIN = "copy", " (again)"
BLOCK = 4
"""Rounds prepared at once: a backward pass needs its graphs made beforehand, and each holds memory."""
SHARE = 0.5
"""Of the free GPU memory that prepared calls may hold; fewer are prepared at once where they would hold more."""
LEAST_ROUNDS, MOST_ROUNDS = 8, 200
PEER_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""A peer is wrong when it computes something else, not when it rounds more often: its error is a column of its own."""


class Inputs:
    """Rotating sets of (x, gradient of y) and one set of parameters for a problem."""

    def __init__(self, operator: Operator, case: Case, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        cache = torch.cuda.get_device_properties(0).L2_cache_size if case.device == "cuda" else last_level_cache()[0]
        self.count = max(4, math.ceil(2 * cache / case.bytes) + 1)
        self.x = [case.random(generator, 2.0).requires_grad_() for _ in range(self.count)]
        self.dy = [case.random(generator, shape=operator.output(case)) for _ in range(self.count)]
        self.parameters = operator.parameters(case, generator)


class CpuClock:
    """Wall clock around a synchronous call, in a process that keeps its memory.

    Else one contender's large temporaries make the C library give pages back, and whoever has the next turn pays for
    fetching them again, which takes longer than the operators themselves.
    """

    def __init__(self) -> None:
        keep_memory()
        self._spans: list[float] = []

    def run(self, call: Callable[[], object]) -> object:
        start = time.perf_counter_ns()
        result = call()
        self._spans.append((time.perf_counter_ns() - start) * 1e-9)
        return result

    def take(self) -> list[float]:
        spans, self._spans = self._spans, []
        return spans


class CudaClock:
    """Events around the call; a sleeping kernel before them keeps the queue full, so that launch gaps are not timed.

    It sleeps for longer than a host takes to launch one operator, which can be some tenths of a millisecond: autograd,
    Python, three Triton kernels of forty arguments each. What is launched after its end would be timed with its gaps.
    """

    SLEEP_CYCLES = 2_000_000
    """1 ms at 2 GHz."""

    def __init__(self) -> None:
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def run(self, call: Callable[[], object]) -> object:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(self.SLEEP_CYCLES)
        start.record()
        result = call()
        end.record()
        self._events.append((start, end))
        return result

    def take(self) -> list[float]:
        torch.cuda.synchronize()
        spans, self._events = [start.elapsed_time(end) * 1e-3 for start, end in self._events], []
        return spans


def timed_call(function: Function, case: Case, inputs: Inputs, index: int) -> Callable[[], object]:
    """The call to be timed on set ``index``. For ``backward`` the forward pass is run here, outside the clock."""
    x, dy, parameters = inputs.x[index], inputs.dy[index], inputs.parameters
    if case.which == "forward":
        return lambda: function(x, *parameters)
    if case.which == "backward":
        y = function(x, *parameters)
        return lambda: gradients(y, (x, *parameters), dy)
    return lambda: gradients(function(x, *parameters), (x, *parameters), dy)


def gradients(y: Tensor | tuple[Tensor, ...], inputs: tuple[Tensor, ...], dy: Tensor) -> tuple[Tensor | None, ...]:
    """Of all inputs; of an operator with several outputs, each is given the gradient dy."""
    dys = dy if isinstance(y, Tensor) else [dy] * len(y)
    return torch.autograd.grad(y, inputs, dys, allow_unused=True)


def interleave(
    prepare: dict[str, Callable[[int], Callable[[], object]]], sets: int, seconds: float, clock: CpuClock | CudaClock
) -> dict[str, list[float]]:
    """Name → seconds of each round. In a round everybody has one turn, in an order drawn anew."""
    names, order, turn = list(prepare), random.Random(0), 0

    def run_together(some: list[str]) -> None:
        nonlocal turn
        calls = []
        for name in some:
            calls.append(prepare[name](turn % sets))
            turn += 1
        for position, call in enumerate(calls):
            calls[position] = None  # frees a backward pass's graph as soon as it has run
            clock.run(call)
            del call

    def block(rounds: int, together: int) -> list[tuple[str, float]]:
        schedule = [name for _ in range(rounds) for name in order.sample(names, len(names))]
        for begin in range(0, len(schedule), together):
            run_together(schedule[begin : begin + together])
        return list(zip(schedule, clock.take()))

    durations: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        block(1, 1)  # warm-up, one by one: nobody knows yet what they hold
        together = _together(prepare, isinstance(clock, CudaClock))
        block(1, together)
        start = time.monotonic()
        while len(durations[names[0]]) < LEAST_ROUNDS or (
            time.monotonic() - start < seconds and len(durations[names[0]]) < MOST_ROUNDS
        ):
            for name, span in block(BLOCK, together):
                durations[name].append(span)
    finally:
        if was_enabled:
            gc.enable()
    return durations


def _together(prepare: dict[str, Callable[[int], Callable[[], object]]], on_gpu: bool) -> int:
    """How many calls may be prepared before the first of them runs."""
    every = BLOCK * len(prepare)
    if not on_gpu:
        return every
    heaviest = 1
    for make in prepare.values():
        before = torch.cuda.memory_allocated()
        call = make(0)
        heaviest = max(heaviest, torch.cuda.memory_allocated() - before)
        del call
    torch.cuda.synchronize()
    unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return max(1, min(every, int(SHARE * (torch.cuda.mem_get_info()[0] + unused) / heaviest)))


def outputs(function: Function, x: Tensor, parameters: Iterable[Tensor], dy: Tensor) -> dict[str, Tensor]:
    """y, dx and the parameters' gradients by name; without those of parameters that the function doesn't use."""
    parameters = list(parameters)
    y = function(x, *parameters)
    found = gradients(y, (x, *parameters), dy)
    names = ("dx", *(f"dparameter{i}" for i in range(len(parameters))))
    y = y if isinstance(y, Tensor) else torch.stack(y)
    return {"y": y.detach(), **{name: g for name, g in zip(names, found) if g is not None}}


def scales(truth: dict[str, Tensor]) -> dict[str, float]:
    """Largest value of each tensor; of one that vanishes but for fp64's rounding, of the largest of its shape.

    (The bias of a LayerNorm of attention's keys has no gradient: softmax ignores a shift of all scores.)
    """
    largest = {name: right.abs().max().item() for name, right in truth.items()}
    noise = 1e-12 * max(largest.values())
    return {
        name: value if value > noise else max(largest[n] for n, t in truth.items() if t.shape == truth[name].shape)
        for name, value in largest.items()
    }


def relative_errors(got: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    """Per tensor: largest difference from the fp64 truth, over :func:`scales`. NaN if anything is."""
    errors, scale = {}, scales(truth)
    if got.keys() != truth.keys():
        raise ValueError(f"has gradients {', '.join(got)}, wanted are {', '.join(truth)}")
    for name, right in truth.items():
        if got[name].shape != right.shape:
            raise ValueError(f"{name} has shape {tuple(got[name].shape)}, wanted is {tuple(right.shape)}")
        errors[name] = (got[name].double() - right).abs().max().item() / max(scale[name], 1e-300)
    return errors


def relevant(errors: dict[str, float], which: str) -> dict[str, float]:
    """The errors of what the pass computes."""
    return {n: e for n, e in errors.items() if which == "both" or (n == "y") == (which == "forward")}


def verdict(kind: str, case: Case, errors: dict[str, float], eager: dict[str, float]) -> str | None:
    """None when right, else what is wrong. Ours is held to twice PyTorch's own error plus a rounding of the result."""
    finfo = torch.finfo(case.dtype)
    summed = torch.finfo(torch.float32).eps * math.sqrt(case.elements / case.channels)
    for name, error in relevant(errors, case.which).items():
        if kind == "ours":
            allowed = 2 * eager[name] + finfo.eps + (summed if name.startswith("dparameter") else 0.0)
        else:
            allowed = max(10 * eager.get(name, 0.0), PEER_TOLERANCE[case.dtype])
        if not error <= allowed:
            return f"{name} is off by {error:.1e} of its largest value, allowed is {allowed:.1e}"
    return None


@dataclass
class Checked:
    """A contender on one problem: its function and errors, or why it has none; ``crash`` is ours, and a bug."""

    contender: Contender
    function: Function | None = None
    errors: dict[str, float] | None = None
    reason: str | None = None
    crash: Exception | None = None


@dataclass
class Measured:
    """Seconds per round of every contender of a case, of the copy, and of ours in its second turns."""

    case: Case
    durations: dict[str, list[float]]

    def median(self, name: str) -> float:
        return statistics.median(self.durations[name])

    def paired_ratio(self, name: str, to: str) -> float:
        """Median over rounds of name's time over ``to``'s in the same round."""
        return statistics.median(a / b for a, b in zip(self.durations[name], self.durations[to]))

    def noise(self, ours: str) -> float | None:
        """How far two medians of the same thing lie apart, relatively; None where ours was not measured."""
        if ours + AGAIN not in self.durations:
            return None
        return abs(self.median(ours) / self.median(ours + AGAIN) - 1)

    @property
    def bandwidth(self) -> float:
        """Bytes per second of the copy, which reads and writes a tensor."""
        return 2 * self.case.bytes / self.median(COPY)


def floor(bandwidth: float, traffic: int, hidden: int = 0, gemms: float = 0.0) -> float:
    """Seconds for ``traffic`` bytes, ``hidden`` of which move while matrix products compute for ``gemms`` seconds."""
    return (traffic - hidden) / bandwidth + max(gemms, hidden / bandwidth)
