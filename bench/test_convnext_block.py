"""ConvNeXt's block: a depthwise convolution, a LayerNorm and an MLP of two GEMMs on one residual branch."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sdp_kernels

from . import peers
from .baselines import ACTIVATIONS, convnext_block
from .cases import GEMMS, Case, Contender, Function, Operator, compiled, gemms_alone, with_passes

NAME, EPS, KERNEL, RATIO = "convnext_block", 1e-6, 7, 4


def hidden(case: Case) -> int:
    """What the GEMMs move while they compute, in tensors of x's size.

    Forward 9 + 6: in, out, pre-activation, residual. Backward, dgrad and wgrad: 9 + 5 and 5 + 5.
    """
    return {"forward": 15, "backward": 24, "both": 39}[case.which] * case.bytes


def traffic(case: Case) -> int:
    """And besides, in tensors of x's size. Forward: x → convolution → norm. Backward: for the norm (dn, x → dx), for
    the convolution (dy, x, the residual's → dx)."""
    return hidden(case) + {"forward": 4, "backward": 7, "both": 11}[case.which] * case.bytes


def parameters(case: Case, generator: torch.Generator) -> list[Tensor]:
    """depthwise, norm, expand, project (weight, bias) each, and the layer scale; x's dtype."""
    c, h = case.channels, RATIO * case.channels

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=generator) * scale

    made = [normal(c, 1, KERNEL, KERNEL, scale=1 / KERNEL), normal(c), 1 + normal(c, scale=0.2), normal(c, scale=0.2)]
    made += [normal(h, c, scale=c**-0.5), normal(h), normal(c, h, scale=h**-0.5), normal(c)]
    made += [0.5 + normal(c, scale=0.1)]  # published: 1e-6 at the start, with which no error would show
    return [nn.Parameter(p.to(case.device, case.dtype)) for p in made]


def plain(case: Case) -> Function:
    return lambda x, *weights: convnext_block(x, weights, ACTIVATIONS[case.variant], EPS)


def fused(case: Case, backend: str | None = None) -> Function:
    def run(x: Tensor, *weights: Tensor) -> Tensor:
        named = sdp_kernels.ConvNeXtWeights(*weights)
        return sdp_kernels.convnext_block(x, named, activation=case.variant, eps=EPS, backend=backend)

    return run


def gemms(x: Tensor, *weights: Tensor) -> Tensor:
    """The two products in a row on contiguous (rows, C), each with its dgrad and wgrad; y and dy come as x does."""
    return F.linear(F.linear(x.permute(0, 2, 3, 1), weights[4]), weights[6]).permute(0, 3, 1, 2)


OPERATOR = Operator(
    name=NAME,
    oracle=lambda x, *weights, case: plain(case)(x, *weights),
    eager="channels last",
    traffic=traffic,
    hidden=hidden,
    parameters=parameters,
    gemms=GEMMS,
    contenders=(
        Contender("ours", "ours", fused, default=True),
        Contender("channels last", "peer", plain, default=True),
        Contender("channels last, compiled", "peer", compiled(plain), default=True),
        Contender("timm", "peer", lambda case: peers.convnext_block(case, EPS), default=True),
        Contender("timm, 1×1 convolutions", "peer", lambda case: peers.convnext_block(case, EPS, True)),
        Contender("reference", "peer", lambda case: fused(case, "reference")),
        gemms_alone(gemms),
    ),
)

HALF, SINGLE = torch.bfloat16, torch.float32
IMAGES = Case(NAME, (8, 384, 16, 16), HALF, "channels_last", variant="gelu")
ON_GPU = replace(IMAGES, shape=(256, 512, 14, 14), device="cuda")
SHORT = {"cpu": [IMAGES], "cuda": [ON_GPU]}
MORE = {
    "cpu": [
        replace(IMAGES, variant="kelu"),
        replace(IMAGES, layout="contiguous"),
        replace(IMAGES, dtype=SINGLE),
        replace(IMAGES, shape=(8, 768, 7, 7)),
        replace(IMAGES, shape=(2, 64, 8, 8)),  # so small that the cost of a call shows
    ],
    "cuda": [  # the other stages of ConvNeXt-B
        *(replace(ON_GPU, shape=shape) for shape in ((256, 128, 56, 56), (256, 256, 28, 28), (256, 1024, 7, 7))),
        replace(ON_GPU, layout="contiguous"),
    ],
}
CASES = {
    "short": {"cpu": with_passes(*SHORT["cpu"], passes=("both",)), "cuda": with_passes(*SHORT["cuda"])},
    "all": {device: with_passes(*problems, *MORE[device]) for device, problems in SHORT.items()},
}


def test_convnext_block(contest) -> None:
    contest()
