"""SdP-Net's ConvMLP, both residual branches: three GEMMs, and around them what ought to cost next to nothing.

Without biases and LayerScale, as in the original and in the model of the speed figures.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sdp_kernels

from . import baselines
from .baselines import ACTIVATIONS
from .cases import GEMMS, Case, Contender, Function, Operator, compiled, gemms_alone, with_passes

NAME, EPS, KERNEL, RATIO = "conv_mlp", 1e-6, 7, 4
PICTURES = ("contiguous", "channels_last")


def grid(case: Case) -> tuple[int, int] | None:
    """Of a token buffer: as square as it can be."""
    if case.layout != "tokens":
        return None
    image = case.shape[1] - case.registers
    height = max(h for h in range(1, int(image**0.5) + 1) if image % h == 0)
    return height, image // height


def hidden(case: Case) -> int:
    """What the GEMMs move while they compute, in tensors of x's size.

    Forward 4 + 9 + 6: in, out, pre-activations, residuals. Backward, dgrad and wgrad: 3 + 2, 5 + 5 and 9 + 5.
    """
    return {"forward": 19, "backward": 29, "both": 48}[case.which] * case.bytes


def traffic(case: Case) -> int:
    """And besides, in tensors of x's size. Forward: x → convolution, x₁ → norm. Backward: for each of the two norms
    (dn, x, the residual's → dx), for the convolution (dy, x → dn)."""
    return hidden(case) + {"forward": 4, "backward": 11, "both": 15}[case.which] * case.bytes


def parameters(case: Case, generator: torch.Generator) -> list[Tensor]:
    """norm1 (weight, bias), depthwise, pointwise, norm2 (weight, bias), expand, project; x's dtype."""
    c, h = case.channels, RATIO * case.channels

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=generator) * scale

    def norm() -> list[Tensor]:
        return [1 + normal(c, scale=0.2), normal(c, scale=0.2)]

    made = [*norm(), normal(c, 1, KERNEL, KERNEL, scale=1 / KERNEL), normal(c, c, scale=c**-0.5)]
    made += [*norm(), normal(h, c, scale=c**-0.5), normal(c, h, scale=h**-0.5)]
    return [nn.Parameter(p.to(case.device, case.dtype)) for p in made]


def _form(block: Function):
    def build(case: Case) -> Function:
        def on_picture(x: Tensor, *weights: Tensor) -> Tensor:
            return block(x, weights, ACTIVATIONS[case.variant], EPS)

        return baselines.on_tokens(on_picture, grid(case), case.registers) if case.layout == "tokens" else on_picture

    return build


plain, original = _form(baselines.conv_mlp), _form(baselines.conv_mlp_original)


def fused(case: Case, backend: str | None = None) -> Function:
    options = {"grid": grid(case), "registers": case.registers, "activation": case.variant, "eps": EPS}

    def run(x: Tensor, *weights: Tensor) -> Tensor:
        gain1, shift1, depthwise, pointwise, gain2, shift2, expand, project = weights
        named = sdp_kernels.ConvMLPWeights(
            gain1, shift1, depthwise, None, pointwise, None, None, gain2, shift2, expand, None, project, None, None
        )
        return sdp_kernels.conv_mlp(x, named, backend=backend, **options)

    return run


def gemms(x: Tensor, *weights: Tensor) -> Tensor:
    """The three products in a row on contiguous (rows, C), each with its dgrad and wgrad; y and dy come as x does."""
    rows = x if x.dim() == 3 else x.permute(0, 2, 3, 1)
    y = F.linear(F.linear(F.linear(rows, weights[3]), weights[6]), weights[7])
    return y if x.dim() == 3 else y.permute(0, 3, 1, 2)


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
        Contender("original", "peer", original),
        Contender("original, compiled", "peer", compiled(original), default=True),
        Contender("reference", "peer", lambda case: fused(case, "reference")),
        gemms_alone(gemms),
    ),
)

HALF, SINGLE = torch.bfloat16, torch.float32
IMAGES = Case(NAME, (8, 384, 16, 16), HALF, "channels_last", variant="kelu")
ON_GPU = Case(NAME, (256, 768, 16, 16), HALF, "channels_last", device="cuda", variant="kelu")
SHORT = {
    "cpu": [IMAGES, replace(IMAGES, dtype=SINGLE)],
    "cuda": [ON_GPU, replace(ON_GPU, variant="gelu")],
}
MORE = {
    "cpu": [
        replace(IMAGES, variant="gelu"),
        replace(IMAGES, layout="contiguous"),
        replace(IMAGES, shape=(8, 261, 384), layout="tokens", registers=5),
        replace(IMAGES, shape=(8, 768, 7, 7)),
        replace(IMAGES, shape=(2, 64, 8, 8)),  # so small that the cost of a call shows
    ],
    "cuda": [
        replace(ON_GPU, shape=(256, 261, 768), layout="tokens", registers=5),
        *(replace(ON_GPU, shape=shape) for shape in ((256, 256, 28, 28), (256, 1024, 7, 7))),
    ],
}
CASES = {
    "short": {"cpu": with_passes(*SHORT["cpu"], passes=("both",)), "cuda": with_passes(*SHORT["cuda"])},
    "all": {device: with_passes(*problems, *MORE[device]) for device, problems in SHORT.items()},
}


def test_conv_mlp(contest) -> None:
    contest()
