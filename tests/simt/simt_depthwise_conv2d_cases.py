"""Depthwise convolution's cases for the emulator: both kernels, every way of access, and what is exact."""

from __future__ import annotations

from dataclasses import dataclass

import simt_depthwise_conv2d as kernels
import simt_emulator as emulator
import torch
from simt_layer_norm_2d_cases import laid_out, normal
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class ConvCase:
    sizes: tuple[int, int, int, int]
    """B, C, H, W."""
    k: int = 7
    layout: str = "contiguous"
    other: str | None = None
    """Layout of grad; None: like x."""
    tokens: bool = False
    """A buffer (B, T, C) instead of a picture."""
    registers: int = 0
    norm: bool = False
    bias: bool = True
    strided_parameters: bool = False
    fma: bool = False
    """Without tensor cores."""
    processors: int = 132
    shift: int = 0
    """Elements that x is off an alignment of 16 bytes."""

    def __str__(self) -> str:
        words = ["x".join(map(str, self.sizes)), f"k{self.k}", self.layout]
        words += [f"other={self.other}"] if self.other else []
        words += [f"tokens{self.registers}"] if self.tokens else []
        words += [name for name in ("norm", "strided_parameters", "fma") if getattr(self, name)]
        words += [] if self.bias else ["nobias"]
        words += [f"processors={self.processors}"] if self.processors != 132 else []
        words += [f"shift={self.shift}"] if self.shift else []
        return "-".join(words)

    @property
    def options(self) -> tuple[bool, int]:
        return not self.fma, self.processors

    @property
    def grid(self) -> tuple[int, int] | None:
        return self.sizes[2:] if self.tokens else None


@dataclass
class Inputs:
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    norm: tuple[Tensor, Tensor, Tensor, Tensor] | None
    grad: Tensor


def inputs_of(case: ConvCase, dtype: torch.dtype) -> Inputs:
    """Guarded; register rows of x, grad and the statistics are NaN, since nothing may depend on them."""
    b, c, h, w = case.sizes
    shape = (b, case.registers + h * w, c) if case.tokens else case.sizes

    def tensor(seed: int, layout: str) -> Tensor:
        values = normal(*shape, seed=seed).to(dtype)
        values[:, : case.registers] = float("nan")
        return emulator.guarded(laid_out(values, layout), shift=case.shift if seed == 1 else 0).view

    def parameter(seed: int, *shape: int, dtype: torch.dtype = dtype) -> Tensor:
        values = normal(*shape, seed=seed).to(dtype)
        if case.strided_parameters:
            values = values.transpose(0, -1).contiguous().transpose(0, -1) if len(shape) > 1 else values.repeat(2)[::2]
            values.copy_(normal(*shape, seed=seed))
        return emulator.guarded(values).view

    wide = emulator.wide_dtype(dtype)
    norm = None
    if case.norm:
        pixels = shape[:2] if case.tokens else (b, h, w)
        mean, rstd = normal(*pixels, seed=6).to(wide), (1 + normal(*pixels, seed=7).abs()).to(wide)
        mean[:, : case.registers] = rstd[:, : case.registers] = float("nan")
        norm = (
            *(emulator.guarded(s).view for s in (mean, rstd)),
            normal(c, seed=8).to(wide),
            normal(c, seed=9).to(dtype),
        )
    return Inputs(
        tensor(1, case.layout),
        parameter(3, c, 1, case.k, case.k),
        parameter(4, c) if case.bias else None,
        norm,
        tensor(2, case.other or case.layout),
    )


def run(case: ConvCase, dtype: torch.dtype) -> tuple[dict[str, Tensor], kernels.Told, kernels.Told]:
    """Both passes of the kernels, all outputs by name."""
    i = inputs_of(case, dtype)
    options = (case.grid, case.registers, i.norm, case.options)
    y, told = kernels.depthwise_fwd(i.x, i.weight, i.bias, *options)
    dx, dweight, dbias, told_bwd = kernels.depthwise_bwd(i.grad, i.x, i.weight, *options)
    return {"y": y, "dx": dx, "dweight": dweight, "dbias": dbias}, told, told_bwd


def picture(t: Tensor, case: ConvCase) -> Tensor:
    """(B, C, H, W) in fp64, of a picture or a buffer."""
    t = t.double()
    return t[:, case.registers :].unflatten(1, case.grid).permute(0, 3, 1, 2) if case.tokens else t


def exact(case: ConvCase, dtype: torch.dtype) -> dict[str, tuple[Tensor, Tensor]]:
    """What ``run`` should give, in fp64 from the inputs as rounded to ``dtype``; and its terms' magnitudes, summed."""
    i = inputs_of(case, dtype)
    c, k = case.sizes[1], case.k
    x, grad, weight = picture(i.x, case), picture(i.grad, case), i.weight.double()
    if i.norm is not None:
        mean, rstd = (
            (s[:, case.registers :].unflatten(1, case.grid) if case.tokens else s).double() for s in i.norm[:2]
        )
        gamma, beta = (p.double()[:, None, None] for p in i.norm[2:])
        x = ((x - mean[:, None]) * rstd[:, None] * gamma + beta).to(dtype).double()

    def convolved(x, weight, bias):
        return F.conv2d(x, weight, bias, padding=k // 2, groups=c)

    def correlated(x, grad):
        b, _, h, w = grad.shape
        one = F.conv2d(x.reshape(1, b * c, h, w), grad.reshape(b * c, 1, h, w), padding=k // 2, groups=b * c)
        return one.view(b, c, k, k).sum(0)[:, None]

    out = {}
    for magnitude in (False, True):
        a, g, w = (t.abs() if magnitude else t for t in (x, grad, weight))
        bias = None if i.bias is None else i.bias.double().abs() if magnitude else i.bias.double()
        values = {"y": convolved(a, w, bias), "dx": convolved(g, w.flip(-1, -2), None)}
        if case.tokens:
            values = {n: F.pad(t.flatten(2).mT, (0, 0, case.registers, 0)) for n, t in values.items()}
        values |= {"dweight": correlated(a, g), "dbias": g.sum((0, 2, 3))}
        out = {n: (t, None) for n, t in values.items()} if not out else {n: (out[n][0], t) for n, t in values.items()}
    return out


def assert_right(case: ConvCase, dtype: torch.dtype, got: dict[str, Tensor]) -> None:
    """Each output within one rounding to its dtype (weight gradients leave in that of their sums) plus what fp32
    accumulation may lose of the terms' magnitudes."""
    wanted = exact(case, dtype)
    assert got.keys() == wanted.keys()
    accumulator = torch.finfo(emulator.wide_dtype(dtype)).eps
    pixels = case.sizes[0] * case.sizes[2] * case.sizes[3]
    for name, value in got.items():
        target, magnitude = wanted[name]
        sums = name in ("dweight", "dbias")
        assert value.shape == target.shape, name
        assert value.dtype == (emulator.wide_dtype(dtype) if sums else dtype), name
        if target.numel() == 0:
            continue
        terms = max(pixels, 1) if sums else case.k**2
        loose = 2 * accumulator * terms**0.5
        if case.norm and name in ("y", "dweight"):  # what is normalised may be rounded to the neighbour
            loose += torch.finfo(dtype).eps * terms**-0.5 * 8 + 8 * accumulator
        of = torch.finfo(value.dtype)
        wrong = (value.double() - target).abs() - (0.505 * of.eps * target.abs() + loose * magnitude + of.tiny)
        assert not wrong.isnan().any() and wrong.max() <= 0, f"{name}: {wrong.max().item():.3e} more off than allowed"


# Each kernel, kernel size, way of access and option, small: also what fiber orders and sanitizers are tried on.
CASES = [
    ConvCase((2, 24, 9, 10), 7, "channels_last", norm=True),
    ConvCase((3, 40, 8, 8), 7, norm=True),
    ConvCase((3, 33, 7, 7), 7),
    ConvCase((2, 24, 14, 14), 5, other="channels_last"),
    ConvCase((2, 20, 5, 6), 3, "channels_last", other="contiguous", norm=True),
    ConvCase((2, 17, 4, 12), 9, "sliced", other="expanded", strided_parameters=True),
    ConvCase((2, 16, 6, 5), 9, "transposed", bias=False),
    ConvCase((3, 16, 4, 5), 7, tokens=True, registers=3, norm=True),
    ConvCase((2, 20, 3, 3), 5, "pitched", other="transposed", tokens=True, registers=1),
    ConvCase((1, 3, 1, 1), 9),
    ConvCase((2, 8, 1, 19), 7, "channels_last", shift=1),
    ConvCase((2, 16, 19, 1), 7, shift=3),
    ConvCase((1, 5, 60, 72), 7, norm=True),
    ConvCase((1, 16, 70, 20), 5, "channels_last", other="contiguous"),
    ConvCase((1, 16, 56, 56), 7),
    ConvCase((1, 33, 28, 28), 7, norm=True),
    ConvCase((9, 16, 7, 7), 3, other="sliced"),
]
CASES += [ConvCase(**{**case.__dict__, "fma": True}) for case in CASES if case.k > 3]

# More tiles than blocks, so that blocks go round while memory of the tile before may still be in use.
LONG_CASES = [
    ConvCase((33, 72, 8, 8), 3, "channels_last", processors=1),
    ConvCase((25, 72, 7, 8), 5, norm=True, processors=1),
    ConvCase((9, 40, 8, 8), 5, "channels_last", norm=True, fma=True, processors=1),
    ConvCase((3, 24, 56, 40), 7, processors=1),
    ConvCase((11, 24, 40, 30), 7, tokens=True, registers=2, processors=1),
]

BARRIER_CASES = [*CASES[:2], *LONG_CASES]


def outputs(case: ConvCase, dtype: torch.dtype) -> list[Tensor]:
    return list(run(case, dtype)[0].values())


def sanitizer_calls(dtype: torch.dtype) -> list[str]:
    calls = []
    for number, case in enumerate(CASES):
        i, order = inputs_of(case, dtype), emulator.ORDERS[number % len(emulator.ORDERS)]
        out = torch.empty_like(i.x)
        for backward, tensors in ((0, (i.x, out)), (1, (i.x, out, i.grad))):
            words = [backward, order, int(case.norm), int(case.bias)]
            words += kernels.numbers(i.x, i.weight, i.bias, case.grid, case.registers, i.norm, case.options)
            for t in tensors:
                words += [emulator.span(t), kernels.before(t, case.registers), *kernels.strides(t, case.grid)]
            calls.append("depthwise_conv2d " + " ".join(map(str, words + [0] * 6 * (3 - len(tensors)))))
    return calls
