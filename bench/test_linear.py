"""A linear layer with what stands around it: bound by its GEMM, whose time alone is the floor."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sdp_kernels

from .baselines import ACTIVATIONS
from .cases import Case, Contender, Function, Operator, compiled, with_passes

NAME = "linear"
VARIANTS = {  # activation, output features over input features, LayerScale and residual
    "expand-kelu": ("kelu", 4, False),
    "expand-gelu": ("gelu", 4, False),
    "residual-kelu": ("kelu", 1, True),
    "residual-gelu": ("gelu", 1, True),
}


def output(case: Case) -> tuple[int, ...]:
    return (*case.shape[:-1], VARIANTS[case.variant][1] * case.channels)


def traffic(case: Case) -> int:
    """x, W → y and the pre-activation that backward needs; dy, pre-activation, x, W → dx, dW. Inside the GEMMs, all."""
    ratio = VARIANTS[case.variant][1]
    weight = ratio * case.channels**2 * torch.finfo(case.dtype).bits // 8
    forward = (1 + 2 * ratio) * case.bytes + weight
    backward = (2 + 2 * ratio) * case.bytes + 2 * weight
    return {"forward": forward, "backward": backward, "both": forward + backward}[case.which]


def parameters(case: Case, generator: torch.Generator) -> list[Tensor]:
    """weight and bias in x's dtype, and LayerScale where there is one."""
    _, ratio, residual = VARIANTS[case.variant]
    outputs = ratio * case.channels
    made = [torch.randn(outputs, case.channels, generator=generator) / case.channels**0.5]
    made += [torch.randn(outputs, generator=generator)]
    made += [0.5 + 0.1 * torch.randn(outputs, generator=generator)] if residual else []
    return [nn.Parameter(p.to(case.device, case.dtype)) for p in made]


def plain(case: Case) -> Function:
    """F.linear and the rest behind it; the residual is x itself, as in a ConvMLP."""
    name, _, residual = VARIANTS[case.variant]
    activation = ACTIVATIONS[name]
    if residual:
        return lambda x, weight, bias, scale: x + scale * activation(F.linear(x, weight, bias))
    return lambda x, weight, bias: activation(F.linear(x, weight, bias))


def fused(case: Case, backend: str | None = None) -> Function:
    name, _, residual = VARIANTS[case.variant]

    def run(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None = None) -> Tensor:
        around = {"layer_scale": scale, "residual": x} if residual else {}
        return sdp_kernels.linear(x, weight, bias, activation=name, backend=backend, **around)

    return run


OPERATOR = Operator(
    name=NAME,
    oracle=lambda x, *parameters, case: plain(case)(x, *parameters),
    eager="F.linear",
    traffic=traffic,
    hidden=traffic,
    parameters=parameters,
    output=output,
    gemms="its GEMM alone",
    contenders=(
        Contender("ours", "ours", fused, default=True),
        Contender("F.linear", "peer", plain, default=True),
        Contender("F.linear, compiled", "peer", compiled(plain), default=True),
        Contender("reference", "peer", lambda case: fused(case, "reference")),
        Contender(
            "its GEMM alone",
            "yardstick",
            lambda case: lambda x, weight, *others: F.linear(x, weight),
            default=True,
            oracle=lambda x, weight, *others, case: F.linear(x, weight),
        ),
    ),
)

HALF, SINGLE = torch.bfloat16, torch.float32
TOKENS = Case(NAME, (8, 261, 384), HALF, "tokens", variant="expand-kelu")
ON_GPU = Case(NAME, (256, 261, 768), HALF, "tokens", device="cuda", variant="expand-kelu")
SHORT = {
    "cpu": [TOKENS, replace(TOKENS, variant="residual-kelu")],
    "cuda": [replace(ON_GPU, variant=variant) for variant in VARIANTS],
}
MORE = {
    "cpu": [
        *(replace(TOKENS, variant=variant) for variant in ("expand-gelu", "residual-gelu")),
        *(replace(TOKENS, dtype=SINGLE, variant=variant) for variant in ("expand-kelu", "residual-kelu")),
        replace(TOKENS, shape=(8, 49, 768)),
        replace(TOKENS, dtype=torch.float16, shape=(1, 261, 384)),  # for which most processors have no GEMM
        replace(TOKENS, shape=(2, 64, 64)),  # so small that the cost of a call shows
    ],
    "cuda": [replace(ON_GPU, shape=(256, 49, 1024), variant=variant) for variant in ("expand-gelu", "residual-gelu")],
}
CASES = {
    "short": {"cpu": with_passes(*SHORT["cpu"], passes=("both",)), "cuda": with_passes(*SHORT["cuda"])},
    "all": {device: with_passes(*problems, *MORE[device]) for device, problems in SHORT.items()},
}


def test_linear(contest) -> None:
    contest()
