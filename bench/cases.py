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
    """One comparison. ``backward`` is the gradient alone, ``both`` forward and gradient in one go.

    ``variant``: what else the operator wants to know, e.g. its activation or kernel size, as its file defines it.
    """

    operator: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    which: str = "both"
    device: str = "cpu"
    registers: int = 0
    variant: str = ""

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
        variant = f"-{self.variant}" if self.variant else ""
        return f"{self.operator}{variant}-{size}-{self.dtype_name}-{self.layout}{registers}-{self.device}-{self.which}"

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

    @property
    def bytes(self) -> int:
        """Of a tensor of the case's shape and dtype."""
        return self.elements * torch.finfo(self.dtype).bits // 8

    def random(self, generator: torch.Generator, scale: float = 1.0, shape: tuple[int, ...] | None = None) -> Tensor:
        """A normal tensor of the case's shape (or another), dtype and memory layout, on its device."""
        made = torch.randn(shape or self.shape, generator=generator, dtype=torch.float32).mul_(scale).to(self.dtype)
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

    ``oracle(x, *parameters, case=case)`` in fp64 is the truth, differentiated by autograd. ``eager`` is the contender
    whose error sets the tolerance. ``parameters(case, generator)`` makes the learnable tensors; ``traffic(case)``
    counts the bytes that the case's pass cannot avoid moving; ``output(case)`` is the shape of y.

    ``gemms`` names the contender that is the operator's matrix products and nothing else; its time is part of the
    floor, and hides the ``hidden(case)`` bytes of the traffic that matrix products move while they compute.
    ``needs``: the operators of sdp_kernels that have to be fused kernels for "ours" to mean something; default: name.
    """

    name: str
    oracle: Callable[..., Tensor]
    eager: str
    contenders: tuple[Contender, ...]
    traffic: Callable[[Case], int]
    parameters: Callable[[Case, torch.Generator], list[Tensor]] = field(default=lambda case, generator: [])
    output: Callable[[Case], tuple[int, ...]] = field(default=lambda case: case.shape)
    gemms: str | None = None
    hidden: Callable[[Case], int] = field(default=lambda case: 0)
    needs: tuple[str, ...] = ()

    @property
    def kernels(self) -> tuple[str, ...]:
        """Operators of sdp_kernels that "ours" runs."""
        return self.needs or (self.name,)

    def contender(self, name: str) -> Contender:
        """The contender of that name."""
        return next(c for c in self.contenders if c.name == name)


def with_passes(*problems: Case, passes: tuple[str, ...] = PASSES) -> list[Case]:
    """Each problem in its three passes, side by side, so that what was compiled for one serves the others."""
    return [replace(problem, which=which) for problem in problems for which in passes]


GEMMS = "its GEMMs alone"


def gemms_alone(gemms: Function, name: str = GEMMS) -> Contender:
    """The yardstick of an operator around matrix products: these in a row, right by their own truth."""
    oracle = lambda x, *parameters, case: gemms(x, *parameters)  # noqa: E731
    return Contender(name, "yardstick", lambda case: gemms, default=True, oracle=oracle)


def compiled(function: Callable[[Case], Function]) -> Callable[[Case], Function]:
    """``build`` of a contender under torch.compile, specialised to the shape as a training run would have it."""

    def build(case: Case) -> Function:
        return torch.compile(function(case), fullgraph=True, dynamic=False)

    return build
