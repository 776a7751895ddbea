"""LayerNorm cases for the emulator: every family of kernels, every way of access, and what is exact."""

from __future__ import annotations

from dataclasses import dataclass

import simt_emulator as emulator
import simt_layer_norm_2d as kernels
import torch
from torch import Tensor


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Values of bfloat16, so that every dtype holds them exactly."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16().float()


def laid_out(values: Tensor, layout: str) -> Tensor:
    """The same values with other strides."""
    if layout == "contiguous":
        return values.contiguous()
    if layout == "channels_last":
        return values.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":  # picture: H and W swapped; tokens: C before T
        return values.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "sliced":  # a part of something larger, in every dimension
        base = values.new_full([n + 1 for n in values.shape[:-1]] + [2 * values.shape[-1] + 1], float("nan"))
        part = base[tuple(slice(1, None) for _ in values.shape[:-1])][..., 1::2]
        return part.copy_(values)
    if layout == "pitched":  # tokens, or channels_last: rows of channels with a gap of whole packs
        last = values if values.dim() == 3 else values.permute(0, 2, 3, 1)
        base = values.new_full((*last.shape[:-1], last.shape[-1] + 16), float("nan"))
        part = base[..., : last.shape[-1]].copy_(last)
        return part if values.dim() == 3 else part.permute(0, 3, 1, 2)
    if layout == "expanded":  # the same for every pixel
        one = values[:, :, :1, :1] if values.dim() == 4 else values[:, :1]
        return one.contiguous().expand(values.shape)
    raise ValueError(layout)


@dataclass(frozen=True)
class NormCase:
    shape: tuple[int, ...]
    layout: str = "contiguous"
    other: str | None = None
    """Layout of residual, grad and grad_sum; None: like x."""
    residual: bool = False
    registers: int = 0
    narrow_parameters: bool = False
    """weight in x's dtype instead of the accumulator's (bias is always the accumulator's)."""
    limits: tuple[int, int, int] = emulator.H200
    shift: int = 0
    """Elements that x is off an alignment of 16 bytes."""

    def __str__(self) -> str:
        words = ["x".join(map(str, self.shape)), self.layout]
        words += [f"other={self.other}"] if self.other else []
        words += ["residual"] if self.residual else []
        words += [f"registers={self.registers}"] if self.registers else []
        words += ["narrow"] if self.narrow_parameters else []
        words += [f"limits={self.limits[0]},{self.limits[2]}"] if self.limits != emulator.H200 else []
        words += [f"shift={self.shift}"] if self.shift else []
        return "-".join(words)


@dataclass
class Inputs:
    x: Tensor
    residual: Tensor | None
    weight: Tensor
    bias: Tensor
    grad: Tensor
    grad_sum: Tensor | None


def inputs_of(case: NormCase, dtype: torch.dtype) -> Inputs:
    """Guarded; register rows of x and grad are NaN, since nothing may depend on them."""
    channels = case.shape[1] if len(case.shape) == 4 else case.shape[2]
    other = case.other or case.layout

    def tensor(seed: int, layout: str, poisoned: bool = False) -> Tensor:
        values = normal(*case.shape, seed=seed).to(dtype)
        if poisoned and case.registers and layout != "expanded":
            values[:, : case.registers] = float("nan")
        return emulator.guarded(laid_out(values, layout), shift=case.shift if seed == 1 else 0).view

    def parameter(seed: int, dtype: torch.dtype) -> Tensor:
        return emulator.guarded(normal(channels, seed=seed).to(dtype)).view

    wide = emulator.wide_dtype(dtype)
    return Inputs(
        tensor(1, case.layout, not case.residual),
        tensor(2, other) if case.residual else None,
        parameter(3, dtype if case.narrow_parameters else wide),
        parameter(4, wide),
        tensor(5, other, True),
        tensor(6, other) if case.residual else None,
    )


def run(case: NormCase, dtype: torch.dtype) -> tuple[dict[str, Tensor], kernels.Told, kernels.Told]:
    """Both passes of the kernels, all outputs by name."""
    i = inputs_of(case, dtype)
    y, mean, rstd, total, told = kernels.layer_norm_fwd(
        i.x, i.residual, i.weight, i.bias, 1e-5, case.registers, case.limits
    )
    x = i.x if total is None else total
    dx, dweight, dbias, told_bwd = kernels.layer_norm_bwd(
        i.grad, i.grad_sum, x, i.weight, mean, rstd, case.registers, case.limits
    )
    out = {"y": y, "mean": mean, "rstd": rstd, "dx": dx, "dweight": dweight, "dbias": dbias}
    return out | ({} if total is None else {"sum": total}), told, told_bwd


def exact(case: NormCase, dtype: torch.dtype) -> dict[str, Tensor]:
    """What ``run`` should give, in fp64 by the formula and its derivative, from the inputs as rounded to ``dtype``."""
    i = inputs_of(case, dtype)
    out = {}
    x = i.x.double()
    if i.residual is not None:
        out["sum"] = (i.x + i.residual).double()
        x = out["sum"]
    grad, weight, bias = i.grad.double(), i.weight.double(), i.bias.double()
    if x.dim() == 4:
        x, grad = x.permute(0, 2, 3, 1), grad.permute(0, 2, 3, 1)
    image = torch.ones(x.shape[:-1], dtype=torch.bool)
    image[:, : case.registers] = case.registers == 0
    x, grad = (torch.where(image[..., None], t, 0.0) for t in (x, grad))
    mean = x.mean(-1, keepdim=True)
    rstd = ((x - mean).square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    unit, scaled = (x - mean) * rstd, grad * weight
    y = unit * weight + bias
    dx = rstd * (scaled - scaled.mean(-1, keepdim=True) - unit * (scaled * unit).mean(-1, keepdim=True))
    out |= {"y": y * image[..., None], "dx": dx * image[..., None]}
    out |= {"mean": mean[..., 0] * image, "rstd": rstd[..., 0] * image}
    if len(case.shape) == 4:
        out["y"], out["dx"] = out["y"].permute(0, 3, 1, 2), out["dx"].permute(0, 3, 1, 2)
    if i.grad_sum is not None:
        out["dx"] = out["dx"] + i.grad_sum.double()
    pixels = tuple(range(x.dim() - 1))
    return out | {"dweight": (grad * unit).sum(pixels), "dbias": grad.sum(pixels)}


def assert_right(case: NormCase, dtype: torch.dtype, got: dict[str, Tensor]) -> None:
    """Each output within one rounding to its dtype plus what fp32 accumulation may lose."""
    wanted = exact(case, dtype)
    assert got.keys() == wanted.keys()
    channels = case.shape[1] if len(case.shape) == 4 else case.shape[2]
    rows = torch.Size(case.shape).numel() // channels
    accumulator = torch.finfo(emulator.wide_dtype(dtype)).eps
    for name, value in got.items():
        target = wanted[name]
        assert value.shape == target.shape, name
        if target.numel() == 0:
            continue
        terms = max(rows, 1) if name in ("dweight", "dbias") else channels
        loose = 8 * accumulator * terms**0.5 * max(target.abs().max().item(), 1.0 if name != "sum" else 0.0)
        wrong = (value.double() - target).abs() - (0.505 * torch.finfo(value.dtype).eps * target.abs() + loose)
        assert wrong.max() <= 0, f"{name}: {(value.double() - target).abs().max():.3e} off where {loose:.3e} is loose"
        assert torch.isfinite(value).all(), name


SMALL_CHIP = (30_000, 61_440, 132)
"""A device whose shared memory is so small that short columns take the paths of long ones."""

# Each family, way of access and option, small: also what fiber orders, sanitizers and barriers are tried on.
CASES = [
    NormCase((2, 24, 3, 4), "channels_last", residual=True),
    NormCase((2, 24, 3, 4), "channels_last", other="contiguous"),
    NormCase((2, 27, 3, 3), "channels_last", residual=True, narrow_parameters=True),
    NormCase((3, 9, 64), registers=2, residual=True),
    NormCase((3, 9, 40), registers=4, layout="pitched", other="sliced", narrow_parameters=True),
    NormCase((2, 7, 768), registers=1, residual=True, narrow_parameters=True),
    NormCase((1, 5, 1000), other="expanded", residual=True),
    NormCase((2, 4, 1032), registers=1, residual=True),
    NormCase((1, 3, 2500), "sliced"),
    NormCase((2, 40, 4, 4), residual=True),
    NormCase((3, 20, 4, 4), "sliced", residual=True, narrow_parameters=True),
    NormCase((2, 33, 7, 7), residual=True),
    NormCase((2, 36, 6, 6), residual=True),
    NormCase((3, 20, 2, 2), other="sliced"),
    NormCase((2, 16, 5, 3), "transposed", other="channels_last"),
    NormCase((2, 6, 130), "transposed", registers=2, residual=True),
    NormCase((2, 40, 4, 4), other="expanded", narrow_parameters=True),
    NormCase((2, 300, 8, 8), limits=SMALL_CHIP, residual=True),
    NormCase((2, 1500, 4, 4), limits=SMALL_CHIP, residual=True),
    NormCase((2, 1030, 5, 3), limits=SMALL_CHIP, residual=True),
    NormCase((2, 24, 4, 4), "channels_last", shift=1),
    NormCase((2, 24, 4, 4), shift=3),
]

# More tiles than blocks in backward, so that blocks go round while memory of the tile before may still be in use.
ONE_PROCESSOR = (30_000, 61_440, 1)
LONG_CASES = [
    NormCase((2, 900, 3), registers=1, limits=ONE_PROCESSOR),
    NormCase((1, 50, 768), residual=True, limits=ONE_PROCESSOR),
    NormCase((1, 9, 8192), limits=ONE_PROCESSOR),
    NormCase((2, 20, 31, 31), residual=True, limits=ONE_PROCESSOR),
    NormCase((1, 140, 11, 11), limits=ONE_PROCESSOR),
    NormCase((3, 140, 8, 8), residual=True, limits=ONE_PROCESSOR),
    NormCase((4, 120, 6, 6), residual=True, limits=ONE_PROCESSOR),
    NormCase((1, 1500, 15, 15), limits=ONE_PROCESSOR),
    NormCase((1, 1500, 12, 16), limits=ONE_PROCESSOR),
    NormCase((1, 1200, 768)),
    NormCase((1, 96, 96, 96)),
]

BARRIER_CASES = [*CASES, *LONG_CASES[:-2]]


def outputs(case: NormCase, dtype: torch.dtype) -> list[Tensor]:
    """Of both passes; register rows of the sum may be NaN, of any bits."""
    return [t.nan_to_num(7.0) for t in run(case, dtype)[0].values()]


def sanitizer_calls(dtype: torch.dtype) -> list[str]:
    calls = []
    for number, case in enumerate(BARRIER_CASES):
        i, order = inputs_of(case, dtype), emulator.ORDERS[number % len(emulator.ORDERS)]
        empty = torch.empty_like(i.x)
        forward = (i.x, i.residual, empty, empty if case.residual else None)
        for backward, tensors in ((0, forward), (1, (i.x, i.grad, i.grad_sum, empty))):
            settings = [backward, case.registers, int(not case.narrow_parameters), *case.limits, order]
            numbers = [*settings, *emulator.sizes(i.x), *emulator.spans(*tensors)]
            calls.append("layer_norm_2d " + " ".join(map(str, numbers)))
    return calls
