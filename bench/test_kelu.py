"""KeLü: memory-bound, one read and one write per pass (two reads in the backward pass)."""

from __future__ import annotations

import torch
from torch.nn import functional as F

import sdp_kernels

from .baselines import kelu_masks, kelu_where
from .cases import Case, Contender, Operator, compiled, with_passes


def traffic(case: Case) -> int:
    """x → y; x, dy → dx."""
    tensors = {"forward": 2, "backward": 3, "both": 5}[case.which]
    return tensors * case.elements * torch.finfo(case.dtype).bits // 8


OPERATOR = Operator(
    name="kelu",
    oracle=lambda x, case: kelu_where(x),
    eager="where",
    traffic=traffic,
    contenders=(
        Contender("ours", "ours", lambda case: sdp_kernels.kelu, default=True),
        Contender("reference", "peer", lambda case: lambda x: sdp_kernels.kelu(x, backend="reference"), default=True),
        Contender("where", "peer", lambda case: kelu_where, default=True),
        Contender("where, compiled", "peer", compiled(lambda case: kelu_where), default=True),
        Contender("masks (original)", "peer", lambda case: kelu_masks, default=True),
        Contender("masks (original), compiled", "peer", compiled(lambda case: kelu_masks)),
        Contender("gelu", "yardstick", lambda case: F.gelu, default=True, oracle=lambda x, case: F.gelu(x)),
        Contender(
            "gelu, compiled", "yardstick", compiled(lambda case: lambda x: F.gelu(x)), oracle=lambda x, case: F.gelu(x)
        ),
    ),
)

SHORT = {
    "cpu": [
        Case("kelu", (8, 384, 16, 16), torch.float32),
        Case("kelu", (8, 384, 16, 16), torch.bfloat16),
        Case("kelu", (8, 384, 16, 16), torch.bfloat16, "channels_last"),
    ],
    "cuda": [Case("kelu", (256, 768, 16, 16), dtype, device="cuda") for dtype in (torch.float32, torch.bfloat16)],
}
MORE = {
    "cpu": [
        Case("kelu", (8, 384, 16, 16), torch.float32, "channels_last"),
        Case("kelu", (8, 384, 16, 16), torch.float16),
        Case("kelu", (8, 261, 384), torch.float32, "tokens"),
        Case("kelu", (8, 261, 384), torch.bfloat16, "tokens"),
        Case("kelu", (2, 64, 8, 8), torch.float32),  # so small that the cost of a call shows
    ],
    "cuda": [
        Case("kelu", (256, 768, 16, 16), torch.bfloat16, "channels_last", device="cuda"),
        Case("kelu", (256, 3072, 16, 16), torch.bfloat16, device="cuda"),
    ],
}
CASES = {
    "short": {device: with_passes(*problems) for device, problems in SHORT.items()},
    "all": {device: with_passes(*problems, *MORE[device]) for device, problems in SHORT.items()},
}


def test_kelu(contest) -> None:
    contest()
