"""LayerNorm over the channels of a picture, in both memory layouts, and over the last dimension of a token buffer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import sdp_kernels

from . import peers
from .baselines import layer_norm_moments, layer_norm_permuted, layer_norm_tokens
from .cases import LAYOUTS, Case, Contender, Function, Operator, UnusableError, compiled, with_passes

EPS = 1e-6
RESIDUAL = "residual"
"""Variant: the norm of x + residual; the sum is an output too and has its own gradient, as in a pre-norm block."""
PICTURES = ("contiguous", "channels_last")


def traffic(case: Case) -> int:
    """x → y; x, dy → dx; and the parameters. Statistics are not counted: a kernel may recompute them.

    With a residual: x, residual → sum, y; sum, dy → dx, the sum's gradient being dy once more.
    """
    tensors, vectors = {"forward": (2, 2), "backward": (3, 3), "both": (5, 5)}[case.which]
    tensors += 2 if case.variant == RESIDUAL and case.which != "backward" else 0
    return (tensors * case.elements + vectors * case.channels) * torch.finfo(case.dtype).bits // 8


def parameters(case: Case, generator: torch.Generator) -> list[Tensor]:
    """weight and bias in x's dtype, which every contender takes, and the residual, which does not rotate."""
    made = [1 + 0.2 * torch.randn(case.channels, generator=generator), torch.randn(case.channels, generator=generator)]
    found = [nn.Parameter(p.to(case.device, case.dtype)) for p in made]
    return found + ([nn.Parameter(case.random(generator))] if case.variant == RESIDUAL else [])


def after_add(build: Callable[[Case], Function]) -> Callable[[Case], Function]:
    """A norm's ``build`` that adds the residual first, as two operations, where the case has one."""

    def with_add(case: Case) -> Function:
        norm = build(case)

        def add_and_norm(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
            total = x + residual
            return total, norm(total, weight, bias)

        return add_and_norm if case.variant == RESIDUAL else norm

    return with_add


def oracle(x: Tensor, *parameters: Tensor, case: Case) -> Tensor | tuple[Tensor, Tensor]:
    return after_add(plain)(case)(x, *parameters)


def plain(case: Case) -> Function:
    """PyTorch's own kernel, on a permuted view for pictures."""
    if case.layout == "tokens":
        return lambda x, weight, bias: layer_norm_tokens(x, weight, bias, EPS, case.registers)
    return lambda x, weight, bias: layer_norm_permuted(x, weight, bias, EPS)


def original(case: Case) -> Function:
    return lambda x, weight, bias: layer_norm_moments(x, weight, bias, EPS)


def fused(case: Case, backend: str | None = None) -> Function:
    return lambda x, weight, bias, residual=None: sdp_kernels.layer_norm_2d(
        x, weight, bias, EPS, residual=residual, registers=case.registers, backend=backend
    )


def rows_of(function: Function) -> Function:
    """A picture through an operator that wants contiguous (rows, C), as one has to call it."""

    def on_picture(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        rows = x.permute(0, 2, 3, 1).contiguous()
        return function(rows.view(-1, rows.shape[-1]), weight, bias).view(rows.shape).permute(0, 3, 1, 2)

    return on_picture


def library(adapter: str) -> Contender:
    """A contender from another library; whether it is there, and for which case, its adapter says."""

    def build(case: Case) -> Function:
        function = peers.layer_norm(adapter, case, EPS)
        if adapter == "timm":
            return function
        if case.registers:
            raise UnusableError("has no notion of register rows")
        return function if case.layout == "tokens" else rows_of(function)

    return Contender(
        adapter, "peer", after_add(build), default=True, layouts=PICTURES if adapter == "timm" else LAYOUTS
    )


OPERATOR = Operator(
    name="layer_norm_2d",
    oracle=oracle,
    eager="F.layer_norm",
    traffic=traffic,
    parameters=parameters,
    contenders=(
        Contender("ours", "ours", fused, default=True),
        Contender("reference", "peer", lambda case: fused(case, "reference"), default=True),
        Contender("F.layer_norm", "peer", after_add(plain), default=True),
        Contender("F.layer_norm, compiled", "peer", compiled(after_add(plain)), default=True),
        Contender("moments (original)", "peer", after_add(original), default=True, layouts=PICTURES),
        Contender("moments (original), compiled", "peer", compiled(after_add(original)), layouts=PICTURES),
        *(library(name) for name in peers.LAYER_NORMS),
    ),
)


def _problems(shape: tuple[int, ...], tokens: tuple[int, ...], dtypes: list[torch.dtype], device: str) -> list[Case]:
    pictures = [
        Case("layer_norm_2d", shape, dtype, layout, device=device)
        for layout in ("contiguous", "channels_last")
        for dtype in dtypes
    ]
    return pictures + [Case("layer_norm_2d", tokens, dtype, "tokens", device=device) for dtype in dtypes]


BOTH = [torch.float32, torch.bfloat16]
SHORT = {
    "cpu": _problems((8, 384, 16, 16), (8, 261, 384), BOTH, "cpu"),
    "cuda": _problems((256, 768, 16, 16), (256, 261, 768), BOTH, "cuda"),
}
MORE = {
    "cpu": [
        *_problems((8, 384, 16, 16), (8, 261, 384), [torch.float16], "cpu"),
        *_problems((8, 768, 7, 7), (8, 49, 768), BOTH, "cpu"),
        Case("layer_norm_2d", (8, 261, 384), torch.float32, "tokens", registers=5),
        Case("layer_norm_2d", (8, 261, 384), torch.bfloat16, "tokens", registers=5),
        Case("layer_norm_2d", (8, 384, 16, 16), torch.float32, "channels_last", variant=RESIDUAL),
        Case("layer_norm_2d", (8, 384, 16, 16), torch.bfloat16, "channels_last", variant=RESIDUAL),
        Case("layer_norm_2d", (8, 261, 384), torch.float32, "tokens", registers=5, variant=RESIDUAL),
        *_problems((16, 384, 32, 32), (16, 1029, 384), BOTH, "cpu"),  # larger than most last-level caches
        Case("layer_norm_2d", (2, 64, 8, 8), torch.float32),  # so small that the cost of a call shows
    ],
    "cuda": [
        *_problems((256, 384, 7, 7), (256, 49, 384), BOTH, "cuda"),
        Case("layer_norm_2d", (256, 261, 768), torch.bfloat16, "tokens", device="cuda", registers=5),
        Case("layer_norm_2d", (256, 261, 768), torch.bfloat16, "tokens", device="cuda", registers=5, variant=RESIDUAL),
    ],
}
CASES = {
    "short": {device: with_passes(*problems) for device, problems in SHORT.items()},
    "all": {device: with_passes(*problems, *MORE[device]) for device, problems in SHORT.items()},
}


def test_layer_norm_2d(contest) -> None:
    contest()
