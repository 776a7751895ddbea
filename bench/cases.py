"""What is measured: a case is operator × shape × dtype × layout × pass × device; contenders compete within one case."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

PASSES = ("forward", "backward", "both")
LAYOUTS = ("contiguous", "channels_last", "tokens")

Function = Callable[..., Tensor]
"""An operator as a contender runs it: (x, *parameters) → y."""


class UnusableError(Exception):
    """A contender cannot take part in a case; the message is the reason that the report gives."""


@dataclass(frozen=True)
class Case:
    """One comparison. ``backward`` is the gradient alone, ``both`` forward and gradient in one go."""

    operator: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    which: str = "both"
    device: str = "cpu"
    registers: int = 0

    def __post_init__(self) -> None:
        if self.which not in PASSES:
            raise ValueError(f"which must be one of {', '.join(PASSES)}, got {self.which!r}")
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {self.layout!r}")

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def name(self) -> str:
        """Unique among cases, readable, and fit for pytest's -k."""
        registers = f"-registers{self.registers}" if self.registers else ""
        size = "x".join(map(str, self.shape))
        return f"{self.operator}-{size}-{self.dtype_name}-{self.layout}{registers}-{self.device}-{self.which}"

    @property
    def problem(self) -> Case:
        """What the three passes share: the tensors, the compiled functions and the errors."""
        return replace(self, which="both")

    @property
    def channels(self) -> int:
        return self.shape[-1] if self.layout == "tokens" else self.shape[1]

    @property
    def elements(self) -> int:
        return torch.Size(self.shape).numel()

    def random(self, generator: torch.Generator, scale: float = 1.0) -> Tensor:
        """A normal tensor of the case's shape, dtype and memory layout, on its device."""
        made = torch.randn(self.shape, generator=generator, dtype=torch.float32).mul_(scale).to(self.dtype)
        if self.layout == "channels_last":
            made = made.contiguous(memory_format=torch.channels_last)
        return made.to(self.device)


@dataclass(frozen=True)
class Contender:
    """One way to compute an operator.

    ``kind``: "ours" is judged; a "peer" computes the same function and counts for the ratio; a "yardstick" computes
    another one and is timed for orientation only. ``build(case)`` returns the function or raises
    :class:`UnusableError`. ``default``: in the short selection too. ``layouts``: what it is made for. ``oracle``: its
    own truth where that is not the operator's.
    """

    name: str
    kind: str
    build: Callable[[Case], Function]
    default: bool = False
    layouts: tuple[str, ...] = LAYOUTS
    oracle: Function | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("ours", "peer", "yardstick"):
            raise ValueError(f"kind must be ours, peer or yardstick, got {self.kind!r}")


@dataclass(frozen=True)
class Operator:
    """Everything that the harness needs to know about an operator.

    ``oracle(x, *parameters, case)`` in fp64 is the truth, differentiated by autograd. ``eager`` names the contender
    whose error sets the tolerance. ``parameters(case, generator)`` makes the learnable tensors; ``traffic(case)``
    counts the bytes that the case's pass cannot avoid moving.
    """

    name: str
    oracle: Callable[..., Tensor]
    eager: str
    contenders: tuple[Contender, ...]
    traffic: Callable[[Case], int]
    parameters: Callable[[Case, torch.Generator], list[Tensor]] = field(default=lambda case, generator: [])


def with_passes(*problems: Case) -> list[Case]:
    """Each problem in its three passes, side by side, so that what was compiled for one serves the others."""
    return [replace(problem, which=which) for problem in problems for which in PASSES]


def compiled(function: Callable[[Case], Function]) -> Callable[[Case], Function]:
    """``build`` of a contender under torch.compile, specialised to the shape as a training run would have it."""

    def build(case: Case) -> Function:
        return torch.compile(function(case), fullgraph=True, dynamic=False)

    return build
