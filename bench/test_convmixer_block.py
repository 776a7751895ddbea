"""ConvMixer's block: x ← x + BN(GELU(DW(x))), then x ← BN(GELU(PW(x))), with batch statistics as in training.

Ours runs the depthwise convolution, and GELU inside the pointwise layer; the first GELU and both BatchNorms are
PyTorch's in every contender, so the ratio is what these operators gain in this block, not that of a fused block.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sdp_kernels

from .cases import Case, Contender, Function, Operator, compiled, with_passes

NAME = "convmixer_block"


def hidden(case: Case) -> int:
    """The pointwise GEMM: in, out; dgrad and wgrad: in, out and in, in."""
    return {"forward": 2, "backward": 4, "both": 6}[case.which] * case.bytes


def traffic(case: Case) -> int:
    """And besides, in tensors of x's size, since a BatchNorm needs all of its input before the first output.

    Forward: x → convolution; that and x → sum; pointwise → y. Backward: each norm reads (dy, x) twice and writes dx;
    the convolution reads (dy, x, the sum's) and writes dx.
    """
    return hidden(case) + {"forward": 7, "backward": 14, "both": 21}[case.which] * case.bytes


def parameters(case: Case, generator: torch.Generator) -> list[Tensor]:
    """Depthwise (weight, bias), norm (weight, bias), pointwise (weight, bias), norm (weight, bias); x's dtype."""
    c, k = case.channels, int(case.variant.removeprefix("k"))

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=generator) * scale

    made = [normal(c, 1, k, k, scale=1 / k), normal(c), 1 + normal(c, scale=0.2), normal(c, scale=0.2)]
    made += [normal(c, c, scale=c**-0.5), normal(c), 1 + normal(c, scale=0.2), normal(c, scale=0.2)]
    return [nn.Parameter(p.to(case.device, case.dtype)) for p in made]


def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, weight, bias, training=True)


def published(x: Tensor, depthwise, bias, gain1, shift1, pointwise, bias2, gain2, shift2) -> Tensor:
    """As published: two convolutions, each with GELU and BatchNorm behind it."""
    y = F.conv2d(x, depthwise, bias, padding=depthwise.shape[-1] // 2, groups=depthwise.shape[0])
    x = x + norm(F.gelu(y), gain1, shift1)
    return norm(F.gelu(F.conv2d(x, pointwise[:, :, None, None], bias2)), gain2, shift2)


def other_layout(case: Case) -> Function:
    there = torch.contiguous_format if case.layout == "channels_last" else torch.channels_last
    return lambda x, *parameters: published(x.contiguous(memory_format=there), *parameters)


def ours(x: Tensor, depthwise, bias, gain1, shift1, pointwise, bias2, gain2, shift2) -> Tensor:
    x = x + norm(F.gelu(sdp_kernels.depthwise_conv2d(x, depthwise, bias)), gain1, shift1)
    y = sdp_kernels.linear(x.permute(0, 2, 3, 1), pointwise, bias2, activation="gelu")
    return norm(y.permute(0, 3, 1, 2), gain2, shift2)


def gemm(x: Tensor, *parameters: Tensor) -> Tensor:
    return F.linear(x.permute(0, 2, 3, 1), parameters[4]).permute(0, 3, 1, 2)


OPERATOR = Operator(
    name=NAME,
    oracle=lambda x, *parameters, case: published(x, *parameters),
    eager="published",
    traffic=traffic,
    hidden=hidden,
    parameters=parameters,
    gemms="its GEMM alone",
    needs=("depthwise_conv2d", "linear"),
    contenders=(
        Contender("ours", "ours", lambda case: ours, default=True),
        Contender("published", "peer", lambda case: published, default=True),
        Contender("published, compiled", "peer", compiled(lambda case: published), default=True),
        Contender("published, other layout", "peer", other_layout),
        Contender("published, other layout, compiled", "peer", compiled(other_layout)),
        Contender(
            "its GEMM alone",
            "yardstick",
            lambda case: gemm,
            default=True,
            oracle=lambda x, *parameters, case: gemm(x, *parameters),
        ),
    ),
)

HALF, SINGLE = torch.bfloat16, torch.float32
IMAGES = Case(NAME, (8, 384, 16, 16), HALF, "channels_last", variant="k7")
ON_GPU = Case(NAME, (256, 768, 16, 16), HALF, "channels_last", device="cuda", variant="k7")
SHORT = {"cpu": [IMAGES], "cuda": [ON_GPU]}
MORE = {
    "cpu": [
        replace(IMAGES, layout="contiguous"),
        replace(IMAGES, dtype=SINGLE),
        replace(IMAGES, shape=(8, 256, 16, 16), variant="k5"),  # the experiment on CIFAR-10
        replace(IMAGES, shape=(8, 768, 7, 7)),
    ],
    "cuda": [
        replace(ON_GPU, layout="contiguous"),
        replace(ON_GPU, shape=(256, 256, 16, 16), variant="k5"),
        replace(ON_GPU, shape=(64, 768, 32, 32)),
        replace(ON_GPU, shape=(256, 1024, 16, 16), variant="k9"),
    ],
}
CASES = {
    "short": {"cpu": with_passes(*SHORT["cpu"], passes=("both",)), "cuda": with_passes(*SHORT["cuda"])},
    "all": {device: with_passes(*problems, *MORE[device]) for device, problems in SHORT.items()},
}


def test_convmixer_block(contest) -> None:
    contest()
