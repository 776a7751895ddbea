"""Which kind of device a tensor is on, and what PyTorch cannot do well on this processor: asked in every call."""

import torch
from torch import Tensor

_CPU = torch.device("cpu")


def type_of_device(x: Tensor) -> str:
    """``x.device.type``, which writes a new string at each call: that costs more than all else here."""
    if x.is_cuda:
        return "cuda"
    return "cpu" if x.device == _CPU else x.device.type


def _without_gemm() -> frozenset[torch.dtype]:
    checks = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    library = torch.ops.mkldnn  # empty in builds without it
    return frozenset(
        dtype for dtype, name in checks.items() if not (hasattr(library, name) and getattr(library, name)())
    )


_MULTIPLIED_SLOWLY = _without_gemm()


def multiplied_slowly(dtype: torch.dtype) -> bool:
    """Whether PyTorch has no GEMM library for this 16-bit type on this processor: float16 on most, bfloat16 on those
    without AVX-512. Its own loops take 5 to 50 times as long as fp32."""
    return dtype in _MULTIPLIED_SLOWLY
