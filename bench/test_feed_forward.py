"""A transformer's second half on a token buffer: a LayerNorm and an MLP of two GEMMs on one residual branch.

With biases, without LayerScale and without dropout, as in the model of the speed figures.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sdp_kernels

from .baselines import ACTIVATIONS
from .cases import GEMMS, Case, Contender, Function, Operator, compiled, gemms_alone, with_passes

NAME, EPS, RATIO = "feed_forward", 1e-5, 4


def hidden(case: Case) -> int:
    """What the GEMMs move while they compute, in tensors of x's size.

    Forward 9 + 6: in, out, pre-activation, residual. Backward, dgrad and wgrad: 9 + 5 and 5 + 5.
    """
    return {"forward": 15, "backward": 24, "both": 39}[case.which] * case.bytes


def traffic(case: Case) -> int:
    """And besides, in tensors of x's size: the norm, x → n; dn, x, the residual's → dx."""
    return hidden(case) + {"forward": 2, "backward": 4, "both": 6}[case.which] * case.bytes


def parameters(case: Case, generator: torch.Generator) -> list[Tensor]:
    """norm, expand, project (weight, bias) each; x's dtype."""
    c, h = case.channels, RATIO * case.channels

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=generator) * scale

    made = [1 + normal(c, scale=0.2), normal(c, scale=0.2)]
    made += [normal(h, c, scale=c**-0.5), normal(h), normal(c, h, scale=h**-0.5), normal(c)]
    return [nn.Parameter(p.to(case.device, case.dtype)) for p in made]


def plain(case: Case) -> Function:
    activation = ACTIVATIONS[case.variant]

    def run(x: Tensor, gain, shift, expand, bias1, project, bias2) -> Tensor:
        h = activation(F.linear(F.layer_norm(x, gain.shape, gain, shift, EPS), expand, bias1))
        return x + F.linear(h, project, bias2)

    return run


def fused(case: Case, backend: str | None = None) -> Function:
    def run(x: Tensor, *weights: Tensor) -> Tensor:
        named = sdp_kernels.FeedForwardWeights(*weights, None)
        return sdp_kernels.feed_forward(x, named, activation=case.variant, eps=EPS, backend=backend)

    return run


def gemms(x: Tensor, *weights: Tensor) -> Tensor:
    """The two products in a row, each with its dgrad and wgrad."""
    return F.linear(F.linear(x, weights[2]), weights[4])


OPERATOR = Operator(
    name=NAME,
    oracle=lambda x, *weights, case: plain(case)(x, *weights),
    eager="plain",
    traffic=traffic,
    hidden=hidden,
    parameters=parameters,
    gemms=GEMMS,
    contenders=(
        Contender("ours", "ours", fused, default=True),
        Contender("plain", "peer", plain, default=True),
        Contender("plain, compiled", "peer", compiled(plain), default=True),
        Contender("reference", "peer", lambda case: fused(case, "reference")),
        gemms_alone(gemms),
    ),
)

HALF, SINGLE = torch.bfloat16, torch.float32
TOKENS = Case(NAME, (8, 261, 384), HALF, "tokens", variant="gelu")
ON_GPU = replace(TOKENS, shape=(256, 261, 768), device="cuda")
SHORT = {"cpu": [TOKENS], "cuda": [ON_GPU, replace(ON_GPU, variant="kelu")]}
MORE = {
    "cpu": [
        replace(TOKENS, variant="kelu"),
        replace(TOKENS, dtype=SINGLE),
        replace(TOKENS, shape=(2, 64, 64)),  # so small that the cost of a call shows
    ],
    "cuda": [replace(ON_GPU, shape=(256, 197, 384))],
}
CASES = {
    "short": {"cpu": with_passes(*SHORT["cpu"], passes=("both",)), "cuda": with_passes(*SHORT["cuda"])},
    "all": {device: with_passes(*problems, *MORE[device]) for device, problems in SHORT.items()},
}


def test_feed_forward(contest) -> None:
    contest()
