"""The precision rule every reference follows: compute in at least fp32, round once at the end."""

import torch

from .._device import type_of_device


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 stays fp64; everything else is computed in fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    """The dtype autocast casts x to here; None without autocast, for fp64, and for meta tensors, which have none.

    Not torch.amp.is_autocast_available: Dynamo of torch 2.11 cannot trace it.
    """
    device = type_of_device(x)
    if x.dtype == torch.float64 or device == "meta":
        return None
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def cast(x: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """``x.to(dtype)``, None for None; at once where there is nothing to do, which ``to`` takes a microsecond to find
    out."""
    return x if x is None or x.dtype == dtype else x.to(dtype)


def widen(x: torch.Tensor) -> torch.Tensor:
    """``x`` in its accumulation dtype; no copy for fp32 and fp64."""
    return x.to(accumulate_dtype(x.dtype))
