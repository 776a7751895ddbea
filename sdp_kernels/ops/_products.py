"""The three products of a linear layer, and whose GEMM they are: a kernel of ours, PyTorch's, or PyTorch's of fp32."""

import torch
from torch import Tensor
from torch.nn import functional as F

from .._device import multiplied_slowly, type_of_device
from ..backends import BACKENDS
from ..reference.precision import accumulate_dtype, cast, widen
from ._contract import launch


def prefers(backend: str, kernel: str, x: Tensor, weight: Tensor) -> bool:
    """Whether the backend has this optional kernel and takes it for such tensors; else the vendor's GEMM and a pass."""
    prefers = BACKENDS[backend].prefers
    return prefers is not None and prefers(kernel, x, weight)


def through_fp32(x: Tensor) -> bool:
    """Whether the vendor has no GEMM of x's dtype here: then x is widened, and the product rounded once."""
    return type_of_device(x) == "cpu" and multiplied_slowly(x.dtype)


def sums_leave_unrounded(x: Tensor) -> bool:
    """Whether the vendor's GEMM of 16-bit matrices gives fp32: cuBLAS writes it; PyTorch's on the CPU rounds, if it
    has one."""
    on_tensor_cores = type_of_device(x) == "cuda" and x.dtype in (torch.bfloat16, torch.float16)
    return on_tensor_cores or through_fp32(x)


def product(x: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    """x Wᵀ + bias of x (B, T, in), with nothing around it."""
    if prefers(backend, "linear_gemm_fwd", x, weight):
        nothing = ("none", None, None, None, 0, 0.0, None, 0, False)
        return launch(backend, "linear_gemm_fwd", x, weight, bias, *nothing)[0]
    if through_fp32(x):
        with torch.autocast("cpu", enabled=False):  # which would narrow them again
            return product(widen(x), widen(weight), None if bias is None else widen(bias), backend).to(x.dtype)
    return F.linear(x, weight, bias)


def dgrad(d: Tensor, weight: Tensor, backend: str) -> Tensor:
    """d W of d (B, T, out) and weight (out, in)."""
    if prefers(backend, "linear_gemm_dgrad", d, weight):
        return launch(backend, "linear_gemm_dgrad", d, weight)
    if through_fp32(d):
        with torch.autocast("cpu", enabled=False):  # which would narrow them again
            return dgrad(widen(d), widen(weight), backend).to(d.dtype)
    return d @ weight


def wgrad(d: Tensor, x: Tensor, weight: Tensor, backend: str, wide: bool) -> Tensor:
    """dᵀ x over all rows of d (B, T, out) and x (B, T, in), in their dtype or, if ``wide``, in the type of its sums."""
    if prefers(backend, "linear_gemm_wgrad", x, weight):
        return launch(backend, "linear_gemm_wgrad", d, x, wide)
    dtype = accumulate_dtype(d.dtype) if wide else d.dtype
    if through_fp32(d):
        with torch.autocast("cpu", enabled=False):  # which would narrow them again
            return cast(wgrad(widen(d), widen(x), weight, backend, False), dtype)
    columns, rows = d.flatten(0, 1).t(), x.reshape(-1, x.shape[-1])
    if wide and sums_leave_unrounded(d):
        return torch.mm(columns, rows, out_dtype=dtype)
    return cast(columns @ rows, dtype)
