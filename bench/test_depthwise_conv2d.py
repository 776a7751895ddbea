"""Depthwise k×k convolution: one read and one write per pass on paper, and far from that in PyTorch."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sdp_kernels

from .cases import Case, Contender, Function, Operator, compiled, with_passes

NAME = "depthwise_conv2d"


def kernel(case: Case) -> int:
    """Of the variant, e.g. 7 of "k7"."""
    return int(case.variant.removeprefix("k"))


def traffic(case: Case) -> int:
    """x → y; x, dy → dx; and the filters: read, read and written."""
    tensors, filters = {"forward": (2, 1), "backward": (3, 2), "both": (5, 3)}[case.which]
    return tensors * case.bytes + filters * case.channels * kernel(case) ** 2 * torch.finfo(case.dtype).bits // 8


def parameters(case: Case, generator: torch.Generator) -> list[Tensor]:
    """Filters and bias, x's dtype."""
    k = kernel(case)
    made = [
        torch.randn(case.channels, 1, k, k, generator=generator) / k,
        torch.randn(case.channels, generator=generator),
    ]
    return [nn.Parameter(p.to(case.device, case.dtype)) for p in made]


def convolution(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=weight.shape[0])


def plain(case: Case) -> Function:
    """In the layout that x comes in."""
    return convolution


def converted(case: Case) -> Function:
    """In the other layout: x is converted, y stays there."""
    there = torch.contiguous_format if case.layout == "channels_last" else torch.channels_last
    return lambda x, weight, bias: convolution(x.contiguous(memory_format=there), weight, bias)


def fused(case: Case, backend: str | None = None) -> Function:
    return lambda x, weight, bias: sdp_kernels.depthwise_conv2d(x, weight, bias, backend=backend)


OPERATOR = Operator(
    name=NAME,
    oracle=lambda x, weight, bias, case: convolution(x, weight, bias),
    eager="F.conv2d",
    traffic=traffic,
    parameters=parameters,
    contenders=(
        Contender("ours", "ours", fused, default=True),
        Contender("F.conv2d", "peer", plain, default=True),
        Contender("F.conv2d, other layout", "peer", converted, default=True),
        Contender("F.conv2d, compiled", "peer", compiled(plain), default=True),
        Contender("F.conv2d, other layout, compiled", "peer", compiled(converted)),
    ),
)

HALF, SINGLE = torch.bfloat16, torch.float32
IMAGES = Case(NAME, (8, 384, 16, 16), HALF, "channels_last", variant="k7")
ON_GPU = Case(NAME, (256, 768, 16, 16), HALF, "channels_last", device="cuda", variant="k7")
STAGES = ((256, 128, 56, 56), (256, 256, 28, 28), (256, 512, 14, 14), (256, 1024, 7, 7))
SHORT = {
    "cpu": [IMAGES, replace(IMAGES, dtype=SINGLE), replace(IMAGES, layout="contiguous")],
    "cuda": [ON_GPU, replace(ON_GPU, layout="contiguous")],
}
MORE = {
    "cpu": [
        replace(IMAGES, dtype=SINGLE, layout="contiguous"),
        replace(IMAGES, dtype=torch.float16),
        *(replace(IMAGES, variant=variant) for variant in ("k3", "k5", "k9")),
        *(replace(IMAGES, shape=(8, 768, 7, 7), layout=layout) for layout in ("channels_last", "contiguous")),
        replace(IMAGES, shape=(2, 64, 8, 8), dtype=SINGLE),  # so small that the cost of a call shows
    ],
    "cuda": [
        replace(ON_GPU, dtype=SINGLE),
        *(replace(ON_GPU, variant=variant) for variant in ("k3", "k5", "k9")),
        *(replace(ON_GPU, shape=shape, layout=n) for shape in STAGES for n in ("channels_last", "contiguous")),
    ],
}
CASES = {
    "short": {
        "cpu": [
            *with_passes(IMAGES, passes=("forward", "both")),
            *with_passes(*SHORT["cpu"][1:], passes=("both",)),
        ],
        "cuda": with_passes(*SHORT["cuda"]),
    },
    "all": {device: with_passes(*problems, *MORE[device]) for device, problems in SHORT.items()},
}


def test_depthwise_conv2d(contest) -> None:
    contest()
