"""The precision rule every reference follows: compute in at least fp32, round once at the end."""

import torch


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 stays fp64; everything else is computed in fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def widen(x: torch.Tensor) -> torch.Tensor:
    """``x`` in its accumulation dtype; no copy for fp32 and fp64."""
    return x.to(accumulate_dtype(x.dtype))
