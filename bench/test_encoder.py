"""SdP-Net's transformer encoder on tokens: four GEMMs, attention with q/k LayerNorm, and what ought to cost little.

Without dropout and LayerScale. The floor knows the four GEMMs and the bytes; attention's own products are not in it.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from sdpnet.models import SdPNetConfig, layers

from . import baselines
from .baselines import ACTIVATIONS
from .cases import GEMMS, Case, Contender, Function, Operator, compiled, gemms_alone, with_passes

NAME, EPS, HEAD = "encoder", 1e-5, 64
NAMES = (
    "norm1.weight", "norm1.bias", "qkv.weight", "q_norm.weight", "q_norm.bias", "k_norm.weight", "k_norm.bias",
    "out.weight", "norm2.weight", "norm2.bias", "up.weight", "up.bias", "down.weight", "down.bias",
)  # fmt: skip
"""The parameters' names in sdpnet.models.layers.Encoder, in the order of bench.baselines.encoder."""


def heads(channels: int) -> int:
    """Of 64 channels, or of all there are."""
    return max(1, channels // HEAD)


def hidden(case: Case) -> int:
    """What the GEMMs move while they compute, in tensors of x's size.

    Forward, in, out, pre-activation and residual: qkv 1 + 3, out 2 + 1, up 1 + 4, down 5 + 1. Backward, dgrad and
    wgrad: 8, 4, 10 and 10, and the pre-activations again.
    """
    return {"forward": 18, "backward": 36, "both": 54}[case.which] * case.bytes


def traffic(case: Case) -> int:
    """And besides. Forward: both norms x → n, attention qkv → y. Backward: each norm (dn, x, the residual's → dx),
    attention (dy, y, qkv → dqkv)."""
    return hidden(case) + {"forward": 8, "backward": 16, "both": 24}[case.which] * case.bytes


def parameters(case: Case, generator: torch.Generator) -> list[Tensor]:
    """As NAMES says; x's dtype."""
    c, d = case.channels, case.channels // heads(case.channels)
    shapes = {"qkv.weight": (3 * c, c), "out.weight": (c, c), "up.weight": (4 * c, c), "down.weight": (c, 4 * c)}
    widths = {"q_norm": d, "k_norm": d, "up": 4 * c}
    made = []
    for name in NAMES:
        part, kind = name.split(".")
        shape = shapes.get(name, (widths.get(part, c),))
        value = torch.randn(shape, generator=generator) * (shape[1] ** -0.5 if len(shape) == 2 else 0.2)
        made.append(1 + value if "norm" in part and kind == "weight" else value)
    return [nn.Parameter(p.to(case.device, case.dtype)) for p in made]


def _form(block: Function):
    def build(case: Case) -> Function:
        return lambda x, *weights: block(x, weights, heads(case.channels), ACTIVATIONS[case.variant], EPS)

    return build


plain, original = _form(baselines.encoder), _form(baselines.encoder_original)


def config(case: Case) -> SdPNetConfig:
    """The model's options around a block like the case's."""
    return SdPNetConfig(
        dim=case.channels, heads=heads(case.channels), activation=case.variant, registers=case.registers, dropout=0.0,
        token_eps=EPS, head="mean",  # which needs no registers
    )  # fmt: skip


def fused(case: Case, backend: str | None = None) -> Function:
    with torch.device("meta"):
        module = layers.Encoder(config(case), 0.0, iter(range(100)))
    for part in module.modules():
        part.backend = backend
    return lambda x, *weights: functional_call(module, dict(zip(NAMES, weights, strict=True)), (x, None))


def gemms(x: Tensor, *weights: Tensor) -> Tensor:
    """The four products in a row, each with its dgrad and wgrad; of q, k and v only v goes on."""
    c = x.shape[-1]
    y = F.linear(F.linear(x, weights[2])[..., 2 * c :].contiguous(), weights[7])
    return F.linear(F.linear(y, weights[10]), weights[12])


OPERATOR = Operator(
    name=NAME,
    oracle=lambda x, *weights, case: plain(case)(x, *weights),
    eager="plain",
    traffic=traffic,
    hidden=hidden,
    parameters=parameters,
    gemms=GEMMS,
    needs=("layer_norm_2d", "linear", "register_attention"),
    contenders=(
        Contender("ours", "ours", fused, default=True),
        Contender("plain", "peer", plain, default=True),
        Contender("plain, compiled", "peer", compiled(plain), default=True),
        Contender("original", "peer", original),
        Contender("original, compiled", "peer", compiled(original)),
        Contender("reference", "peer", lambda case: fused(case, "reference")),
        gemms_alone(gemms),
    ),
)

TOKENS = Case(NAME, (8, 261, 384), torch.bfloat16, "tokens", registers=5, variant="gelu")
ON_GPU = replace(TOKENS, shape=(256, 261, 768), device="cuda")
SHORT = {"cpu": [TOKENS], "cuda": [ON_GPU]}
MORE = {
    "cpu": [
        replace(TOKENS, variant="kelu"),
        replace(TOKENS, dtype=torch.float32),
        replace(TOKENS, shape=(2, 21, 64)),  # so small that the cost of a call shows
    ],
    "cuda": [
        replace(ON_GPU, shape=shape, registers=0) for shape in ((256, 197, 384), (256, 197, 768), (64, 1029, 768))
    ],
}
CASES = {
    "short": {"cpu": with_passes(*SHORT["cpu"], passes=("both",)), "cuda": with_passes(*SHORT["cuda"])},
    "all": {device: with_passes(*problems, *MORE[device]) for device, problems in SHORT.items()},
}


def test_encoder(contest) -> None:
    contest()
