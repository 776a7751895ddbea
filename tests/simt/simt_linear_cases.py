"""Cases of what stands around linear's GEMM, for the emulator: every kernel, every way of access, and what is exact."""

from __future__ import annotations

from dataclasses import dataclass

import simt_emulator as emulator
import torch
from simt_linear import epilogue_bwd, epilogue_fwd
from torch import Tensor

from sdp_kernels.ops.activation import ACTIVATIONS
from sdp_kernels.reference.activations import FUNCTIONS
from sdp_kernels.reference.philox import DROPOUT, keep_mask

SEED, STEP, FIRST_SAMPLE, LAYER, RATE = -(2**61) + 12345, 2**31 + 7, 2**32 - 1, 3, 0.3
"""first_sample counts modulo 2³²: the second sample of a batch has number 0."""


@dataclass(frozen=True)
class EpilogueCase:
    """``scale``: "wide" (accumulator's type) or "narrow" (z's). ``outer``: dtype of residual, y and dy likewise."""

    shape: tuple[int, int, int]
    activation: str = "kelu"
    scale: str | None = None
    residual: bool = False
    outer: str = "narrow"
    registers: int = 0
    mask: bool = False
    dropout: float = 0.0
    layout: str = "contiguous"
    other: str | None = None
    """Layout of residual and grad; None: like z."""
    shift: int = 0
    """Elements that z and grad are off an alignment of 16 bytes."""
    multiprocessors: int = 132

    def __str__(self) -> str:
        words = ["x".join(map(str, self.shape)), self.activation, self.layout]
        words += [f"{self.scale}-scale"] if self.scale else []
        words += [f"{name}" for name in ("residual", "mask") if getattr(self, name)]
        words += ["wide"] if self.outer == "wide" else []
        numbers = {"registers": 0, "dropout": 0.0, "other": None, "shift": 0, "multiprocessors": 132}
        words += [f"{n}={getattr(self, n)}" for n, default in numbers.items() if getattr(self, n) != default]
        return "-".join(words)


def laid_out(values: Tensor, layout: str) -> Tensor:
    """(B, T, N) with other strides."""
    if layout == "contiguous":
        return values.contiguous()
    if layout == "transposed":  # tokens next to each other
        return values.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "sliced":  # a part of something larger, every second column
        base = values.new_full([*(n + 1 for n in values.shape[:-1]), 2 * values.shape[-1] + 1], float("nan"))
        return base[1:, 1:, 1::2].copy_(values)
    if layout == "pitched":  # rows and samples with gaps of whole packs
        base = values.new_full((values.shape[0], values.shape[1] + 2, values.shape[2] + 16), float("nan"))
        return base[:, 1:-1, : values.shape[2]].copy_(values)
    if layout == "expanded":  # the same for every token
        return values[:, :1].contiguous().expand(values.shape)
    raise ValueError(layout)


@dataclass
class Inputs:
    z: Tensor
    grad: Tensor
    residual: Tensor | None
    scale: Tensor | None
    mask: Tensor | None
    rng: Tensor | None
    dead: Tensor
    """(B, T) bool: registers and dropped samples, whose rows of z and grad are NaN."""


def inputs_of(case: EpilogueCase, dtype: torch.dtype) -> Inputs:
    """Guarded tensors that hold the same values, those of bfloat16, in every dtype."""
    wide, other = emulator.wide_dtype(dtype), case.other or case.layout
    outer = wide if case.outer == "wide" else dtype

    def normal(seed: int, *shape: int) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16().float()

    batch, tokens, columns = case.shape
    mask = None
    if case.mask:
        mask = emulator.guarded(torch.tensor([1.25, 0.0, 2.5][:batch])).view
    dropped = torch.zeros(batch, 1, dtype=torch.bool) if mask is None else mask[:, None] == 0
    dead = (torch.arange(tokens) < case.registers)[None] | dropped

    def tensor(seed: int, dtype: torch.dtype, layout: str, poisoned: bool, shift: int) -> Tensor:
        values = normal(seed, *case.shape).mul(2).to(dtype)
        if poisoned and layout != "expanded":
            values[dead] = float("nan")
        return emulator.guarded(laid_out(values, layout), shift=shift).view

    z = tensor(1, dtype, case.layout, True, case.shift)
    grad = tensor(2, outer, other, True, case.shift)
    residual = tensor(3, outer, other, False, 0) if case.residual else None
    scale = None
    if case.scale:
        scale = emulator.guarded(normal(4, columns).to(wide if case.scale == "wide" else dtype)).view
    rng = torch.tensor([SEED, STEP, FIRST_SAMPLE]) if case.dropout else None
    return Inputs(z, grad, residual, scale, mask, rng, dead)


@dataclass
class Exact:
    """In fp64, and what the terms of each may amount to."""

    y: Tensor
    dz: Tensor
    dscale: Tensor
    dbias: Tensor
    y_size: Tensor
    sums_size: tuple[Tensor, Tensor]


def exact(case: EpilogueCase, i: Inputs) -> Exact:
    """By the definition in fp64; where a row is dead, neither z nor grad count."""
    batch, tokens, columns = case.shape
    alive = ~i.dead[:, :, None].expand(case.shape)
    z = torch.where(alive, i.z.double(), 0.0).requires_grad_()
    grad = torch.where(alive, i.grad.double(), 0.0)
    scale = (torch.ones(columns) if i.scale is None else i.scale).double().requires_grad_()
    factor = alive.double()
    if i.mask is not None:
        factor = factor * i.mask.double()[:, None, None]
    if i.rng is not None:
        kept = keep_mask(i.rng, LAYER, DROPOUT, batch, tokens * columns, case.dropout, torch.float32)
        factor = factor * kept.view(case.shape).double()
    branch = FUNCTIONS[case.activation](z) * factor * scale
    y = branch if i.residual is None else branch + i.residual.double()
    dz, dscale = torch.autograd.grad(branch, (z, scale), grad)
    size = branch.detach().abs() + (0 if i.residual is None else i.residual.double().abs())
    terms = (grad * branch / scale).detach().abs().sum((0, 1)), dz.abs().sum((0, 1))
    return Exact(y.detach(), dz, dscale, dz.sum((0, 1)), size, terms)


def run(case: EpilogueCase, dtype: torch.dtype) -> tuple[dict[str, Tensor], list, Inputs]:
    """Both passes: {"y", "dz", "dscale", "dbias"}, what was told, and the inputs."""
    i = inputs_of(case, dtype)
    common = {"registers": case.registers, "dropout": case.dropout, "rng": i.rng, "layer": LAYER}
    common["multiprocessors"] = case.multiprocessors
    y, told = epilogue_fwd(i.z, case.activation, i.scale, i.mask, i.residual, **common)
    dz, dscale, dbias, told_bwd = epilogue_bwd(i.grad, i.z, case.activation, i.scale, i.mask, **common)
    return {"y": y, "dz": dz, "dscale": dscale, "dbias": dbias}, [told, told_bwd], i


def assert_right(case: EpilogueCase, dtype: torch.dtype, got: dict[str, Tensor], i: Inputs) -> None:
    """One rounding of the result, and a few of the accumulator's for each term that it is made of."""
    right, unit = exact(case, i), torch.finfo(emulator.wide_dtype(dtype)).eps
    for name, size in (("y", right.y_size), ("dz", right.dz.abs())):
        wanted, finfo = getattr(right, name), torch.finfo(got[name].dtype)
        allowed = 0.51 * finfo.eps * wanted.abs() + finfo.tiny + 8 * unit * (size + size.max())
        assert got[name].shape == wanted.shape
        assert ((got[name].double() - wanted).abs() <= allowed).all(), name
    assert (got["dz"][i.dead] == 0).all()
    if i.residual is not None:
        assert torch.equal(got["y"][i.dead], i.residual[i.dead])
    for name, terms in zip(("dscale", "dbias") if case.scale else ("", "dbias"), right.sums_size):
        if name:
            error = (got[name].double() - getattr(right, name)).abs()
            assert (error <= 32 * unit * (terms + terms.max())).all(), name


RESIDUAL = {"scale": "wide", "residual": True}
CASES = [
    EpilogueCase((2, 9, 64)),
    EpilogueCase((2, 9, 64), "gelu", **RESIDUAL, registers=2, mask=True),
    EpilogueCase((2, 9, 64), "none", **RESIDUAL, registers=1, dropout=RATE),
    EpilogueCase((2, 9, 64), "none", residual=True, outer="wide", mask=True, registers=9),
    EpilogueCase((2, 5, 64), "kelu", scale="narrow", residual=True, outer="wide", dropout=RATE),
    EpilogueCase((3, 7, 136), "kelu", **RESIDUAL, mask=True, dropout=RATE, layout="pitched"),
    EpilogueCase((2, 5, 264), "gelu", residual=True, dropout=RATE, outer="wide", layout="pitched", other="contiguous"),
    EpilogueCase((2, 3, 768), "kelu", registers=1, dropout=RATE),
    *(EpilogueCase((2, 4, 32), name, **RESIDUAL, registers=1, mask=True) for name in ACTIVATIONS[3:]),
    *(EpilogueCase((2, 4, 33), name, scale="narrow", residual=True, dropout=RATE) for name in ACTIVATIONS),
    EpilogueCase((2, 4, 32), "tanh", residual=True, outer="wide", registers=1),
    EpilogueCase((2, 9, 64), "kelu", **RESIDUAL, layout="transposed"),
    EpilogueCase((2, 9, 64), "gelu", **RESIDUAL, layout="sliced", outer="wide", mask=True),
    EpilogueCase((2, 9, 64), "gelu", **RESIDUAL, other="transposed", dropout=RATE),
    EpilogueCase((2, 9, 64), "kelu", other="expanded", registers=3),
    EpilogueCase((2, 9, 64), "none", scale="wide", shift=1),
    EpilogueCase((1, 1, 1), "gelu", **RESIDUAL),
    EpilogueCase((3, 5, 1), "none", dropout=RATE),
    EpilogueCase((2, 40, 7), "selu", scale="narrow", residual=True, registers=3, dropout=RATE),
]
# Blocks that go round over their rows.
LONG_CASES = [
    EpilogueCase((3, 150, 64), "kelu", **RESIDUAL, mask=True, registers=5, multiprocessors=1),
    EpilogueCase((3, 131, 24), "gelu", scale="wide", dropout=RATE, multiprocessors=1),
    EpilogueCase((2, 333, 19), "tanh", scale="narrow", multiprocessors=1),
    EpilogueCase((2, 150, 520), "none", residual=True, multiprocessors=1),
    EpilogueCase((3, 53, 1032), "kelu", **RESIDUAL, mask=True, registers=5, dropout=RATE, multiprocessors=1),
]

BARRIER_CASES = [*CASES[:8], *LONG_CASES]


def outputs(case: EpilogueCase, dtype: torch.dtype) -> list[Tensor]:
    """Of both passes."""
    return list(run(case, dtype)[0].values())


def sanitizer_calls(dtype: torch.dtype) -> list[str]:
    calls = []
    for number, case in enumerate([*CASES, *LONG_CASES]):
        i, order = inputs_of(case, dtype), emulator.ORDERS[number % len(emulator.ORDERS)]
        settings = [case.registers, ACTIVATIONS.index(case.activation), int(case.scale == "wide"), LAYER]
        settings += [case.multiprocessors, order, int(case.scale is not None), int(case.mask)]
        settings += [int(case.dropout * 1000), int(case.outer == "wide"), *case.shape]
        for backward, other in ((0, i.residual), (1, i.grad)):
            tensors = [n for t in (i.z, other) for n in ((0,) * 4 if t is None else (emulator.span(t), *t.stride()))]
            calls.append("linear " + " ".join(map(str, [backward, *settings, *tensors])))
    return calls
