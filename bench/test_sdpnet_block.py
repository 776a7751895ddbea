"""A whole block of SdP-Net: two ConvMLPs and the encoder, on one token buffer, where plain PyTorch cuts and joins.

The floor knows the ten GEMMs and the bytes; attention's own products are not in it.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.func import functional_call

from sdpnet.models import layers

from . import baselines, test_conv_mlp, test_encoder
from .baselines import ACTIVATIONS
from .cases import GEMMS, Case, Contender, Function, Operator, compiled, gemms_alone, with_passes

NAME, CONVS = "sdpnet_block", 2
CONV_NAMES = (
    "norm1.weight", "norm1.bias", "depthwise.weight", "pointwise.weight",
    "norm2.weight", "norm2.bias", "expand.weight", "project.weight",
)  # fmt: skip
NAMES = (
    *(f"convs.{i}.{name}" for i in range(CONVS) for name in CONV_NAMES),
    *(f"encoder.{name}" for name in test_encoder.NAMES),
)
"""The parameters' names in sdpnet.models.layers.Block."""


def _together(count):
    return lambda case: CONVS * getattr(test_conv_mlp, count)(case) + getattr(test_encoder, count)(case)


def parameters(case: Case, generator: torch.Generator) -> list[Tensor]:
    """As NAMES says; x's dtype."""
    convs = [test_conv_mlp.parameters(case, generator) for _ in range(CONVS)]
    return [*(p for conv in convs for p in conv), *test_encoder.parameters(case, generator)]


def _parts(weights: tuple[Tensor, ...]) -> tuple[list[tuple[Tensor, ...]], tuple[Tensor, ...]]:
    each = len(CONV_NAMES)
    return [weights[i * each : (i + 1) * each] for i in range(CONVS)], weights[CONVS * each :]


def _form(conv: Function, encoder: Function):
    def build(case: Case) -> Function:
        activation, heads = ACTIVATIONS[case.variant], test_encoder.heads(case.channels)

        def on_picture(x: Tensor, *weights: Tensor) -> Tensor:
            for one in _parts(weights)[0]:
                x = conv(x, one, activation, test_conv_mlp.EPS)
            return x

        on_tokens = baselines.on_tokens(on_picture, test_conv_mlp.grid(case), case.registers)
        return lambda x, *weights: encoder(
            on_tokens(x, *weights), _parts(weights)[1], heads, activation, test_encoder.EPS
        )

    return build


plain = _form(baselines.conv_mlp, baselines.encoder)
original = _form(baselines.conv_mlp_original, baselines.encoder_original)


def fused(case: Case, backend: str | None = None) -> Function:
    config = test_encoder.config(case).replace(conv_blocks=CONVS, conv_eps=test_conv_mlp.EPS)
    with torch.device("meta"):
        module = layers.Block(config, 0.0, iter(range(100)))
    for part in module.modules():
        part.backend = backend
    grid = test_conv_mlp.grid(case)
    return lambda x, *weights: functional_call(module, dict(zip(NAMES, weights, strict=True)), (x, grid, None))


def gemms(x: Tensor, *weights: Tensor) -> Tensor:
    """All products in a row, each with its dgrad and wgrad."""
    convs, encoder = _parts(weights)
    for one in convs:
        x = test_conv_mlp.gemms(x, *one)
    return test_encoder.gemms(x, *encoder)


OPERATOR = Operator(
    name=NAME,
    oracle=lambda x, *weights, case: plain(case)(x, *weights),
    eager="plain",
    traffic=_together("traffic"),
    hidden=_together("hidden"),
    parameters=parameters,
    gemms=GEMMS,
    needs=("layer_norm_2d", "linear", "conv_mlp", "register_attention"),
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

TOKENS = Case(NAME, (8, 261, 384), torch.bfloat16, "tokens", registers=5, variant="kelu")
ON_GPU = replace(TOKENS, shape=(256, 261, 768), device="cuda", variant="gelu")
SHORT = {"cpu": [TOKENS], "cuda": [ON_GPU]}
MORE = {
    "cpu": [replace(TOKENS, variant="gelu"), replace(TOKENS, dtype=torch.float32)],
    "cuda": [replace(ON_GPU, variant="kelu")],
}
CASES = {
    "short": {"cpu": with_passes(*SHORT["cpu"], passes=("both",)), "cuda": with_passes(*SHORT["cuda"])},
    "all": {device: with_passes(*problems, *MORE[device]) for device, problems in SHORT.items()},
}


def test_sdpnet_block(contest) -> None:
    contest()
