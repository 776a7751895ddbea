"""Attention with q/k LayerNorm from packed qkv: norms, products and softmax count for every contender."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import sdp_kernels

from . import peers
from .cases import Case, Contender, Function, Operator, UnusableError, compiled, with_passes

NAME = "register_attention"
EPS = 1e-5


def output(case: Case) -> tuple[int, ...]:
    batch, tokens, _, heads, d = case.shape
    return batch, tokens, heads * d


def traffic(case: Case) -> int:
    """qkv → y; qkv, dy → dqkv. Whatever else a backward pass wants, it can compute again."""
    return {"forward": 4, "backward": 7, "both": 11}[case.which] * case.bytes // 3


def parameters(case: Case, generator: torch.Generator) -> list[Tensor]:
    """Weight and bias of q's norm and weight of k's, in x's dtype, which every contender takes.

    k's bias has no say in the softmax: its gradient is 0, of which no relative error can be told. It is a constant.
    """
    d = case.shape[-1]
    made = [
        1 + 0.2 * torch.randn(d, generator=generator),
        torch.randn(d, generator=generator),
        1 + 0.2 * torch.randn(d, generator=generator),
    ]
    return [nn.Parameter(p.to(case.device, case.dtype)) for p in made]


def normed(qkv: Tensor, q_weight: Tensor, q_bias: Tensor, k_weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v, each (B, T, h, d), as a careful user of PyTorch gets them."""
    q, k, v = qkv.unbind(2)
    shape = q_weight.shape
    zeros = torch.zeros_like(q_bias, requires_grad=False)
    return F.layer_norm(q, shape, q_weight, q_bias, EPS), F.layer_norm(k, shape, k_weight, zeros, EPS), v


def attention(qkv: Tensor, *norms: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in normed(qkv, *norms))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def sdpa(backend: SDPBackend, *devices: str):
    """scaled_dot_product_attention held to one of its implementations."""

    def build(case: Case) -> Function:
        if case.device not in devices:
            raise UnusableError(f"runs on {'/'.join(devices)} only, not on {case.device}")

        def run(qkv: Tensor, *norms: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return attention(qkv, *norms)

        return run

    return build


def flex(case: Case) -> Function:
    """FlexAttention, which has to be compiled; the norms are compiled with it."""
    if case.device == "cpu":
        raise UnusableError("has no backward pass on the CPU")
    from torch.nn.attention.flex_attention import flex_attention

    def run(qkv: Tensor, *norms: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in normed(qkv, *norms))
        return flex_attention(q, k, v).transpose(1, 2).flatten(2)

    return torch.compile(run, fullgraph=True, dynamic=False)


def xformers(case: Case) -> Function:
    function = peers.find("xformers", case.device)
    return lambda qkv, *norms: function(*normed(qkv, *norms)).flatten(2)


def fused(case: Case, backend: str | None = None) -> Function:
    def run(qkv: Tensor, q_weight: Tensor, q_bias: Tensor, k_weight: Tensor) -> Tensor:
        k_norm = (k_weight, torch.zeros_like(q_bias, requires_grad=False))
        return sdp_kernels.register_attention(qkv, (q_weight, q_bias), k_norm, eps=EPS, backend=backend)

    return run


OPERATOR = Operator(
    name=NAME,
    oracle=lambda qkv, *norms, case: attention(qkv, *norms),
    eager="SDPA",
    traffic=traffic,
    parameters=parameters,
    output=output,
    contenders=(
        Contender("ours", "ours", fused, default=True),
        Contender("SDPA", "peer", lambda case: attention, default=True),
        Contender("SDPA, compiled", "peer", compiled(lambda case: lambda *x: attention(*x)), default=True),
        Contender("SDPA, math", "peer", sdpa(SDPBackend.MATH, "cpu", "cuda"), default=True),
        Contender("SDPA, flash", "peer", sdpa(SDPBackend.FLASH_ATTENTION, "cpu", "cuda")),
        Contender("SDPA, efficient", "peer", sdpa(SDPBackend.EFFICIENT_ATTENTION, "cuda")),
        Contender("SDPA, cuDNN", "peer", sdpa(SDPBackend.CUDNN_ATTENTION, "cuda")),
        Contender("FlexAttention", "peer", flex),
        Contender("xformers", "peer", xformers, default=True),
        Contender("reference", "peer", lambda case: fused(case, "reference")),
        Contender("composed", "peer", lambda case: fused(case, "composed")),
    ),
)

HALF, SINGLE = torch.bfloat16, torch.float32
# (tokens, heads, d): ViT-S and ViT-B at 224 pixels without and with registers, SdP-Net XL, the same at 448 pixels.
VIT_S, VIT_B, VIT_B_REGISTERS, XL, XL_448 = (197, 6, 64), (197, 12, 64), (201, 12, 64), (261, 8, 96), (1029, 8, 96)


def problem(batch: int, size: tuple[int, int, int], dtype: torch.dtype, device: str) -> Case:
    tokens, heads, d = size
    return Case(NAME, (batch, tokens, 3, heads, d), dtype, "tokens", device=device)


ON_GPU = [problem(256, size, HALF, "cuda") for size in (VIT_S, VIT_B, VIT_B_REGISTERS, XL)]
SHORT = {"cpu": [problem(4, XL, HALF, "cpu"), problem(8, VIT_S, SINGLE, "cpu")], "cuda": ON_GPU}
MORE = {
    "cpu": [
        problem(4, XL, SINGLE, "cpu"),
        problem(8, VIT_S, HALF, "cpu"),
        *(problem(4, size, dtype, "cpu") for size in (VIT_B, VIT_B_REGISTERS) for dtype in (SINGLE, HALF)),
        *(problem(1, XL_448, dtype, "cpu") for dtype in (SINGLE, HALF)),
        replace(problem(4, XL, HALF, "cpu"), dtype=torch.float16),
    ],
    "cuda": [
        problem(32, XL_448, HALF, "cuda"),
        problem(256, XL, SINGLE, "cuda"),
        problem(256, XL, torch.float16, "cuda"),
    ],
}
SMALL = {"tokens": (2, 17, 3, 2, 8)}  # for the benchmark's own tests
CASES = {
    "short": {
        "cpu": [
            *with_passes(SHORT["cpu"][0], passes=("forward", "both")),
            *with_passes(SHORT["cpu"][1], passes=("both",)),
        ],
        "cuda": with_passes(*SHORT["cuda"]),
    },
    "all": {device: with_passes(*problems, *MORE[device]) for device, problems in SHORT.items()},
}


def test_register_attention(contest) -> None:
    contest()
