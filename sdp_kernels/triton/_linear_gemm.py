"""linear's GEMMs with their epilogue: geometry and launches.

Forward moves x, y, the residual and (where backward needs it) z once each beside the weight; backward dy, z, dz. Which
shapes run them instead of the vendor's GEMM is decided by the table ("linear/form/…").
"""

import functools

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..backends import BACKENDS
from . import _linear_gemm_kernels as kernels
from . import linear as epilogue
from ._launch import ACCUMULATOR, configuration, launch, listed, register

ELEMENT = {
    torch.float64: triton.language.float64,
    torch.float32: triton.language.float32,
    torch.bfloat16: triton.language.bfloat16,
    torch.float16: triton.language.float16,
}


@functools.cache
def _multiprocessors(index: int | None) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def multiprocessors(x: Tensor) -> int:
    """Of x's device; 4 where there is none (interpreter). Results don't depend on it."""
    return _multiprocessors(x.device.index) if x.device.type == "cuda" else 4


def rows_of(x: Tensor) -> Tensor:
    """x (B, T, N) as (B · T, N): a view where its strides allow."""
    return x.reshape(-1, x.shape[2])


def rows_in(x: Tensor | None) -> Tensor | None:
    """The same, but x itself where that would be a copy."""
    return x if x is None or x.stride(0) != x.shape[1] * x.stride(1) else rows_of(x)


def precision(dtype: torch.dtype) -> str:
    """fp32 is multiplied as fp32, unless PyTorch was told that TF32 will do."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def describable(*tensors: Tensor | None) -> bool:
    """Whether TMA can move them: rows of consecutive elements, everything 16-byte aligned."""

    def is_so(t: Tensor) -> bool:
        aligned = t.data_ptr() % 16 == 0 and t.stride(0) * t.dtype.itemsize % 16 == 0
        return t.dim() == 2 and t.stride(1) == 1 and aligned and t.numel() > 0

    return all(t is None or is_so(t) for t in tensors)


def chosen(like: Tensor, kernel: str, *tensors: Tensor | None) -> tuple[dict, bool]:
    """The table's entry, and whether it is one for descriptors."""
    if describable(*tensors) and (entry := configuration(like, epilogue.OPERATOR, kernel, "descriptors")):
        return entry, True
    return configuration(like, epilogue.OPERATOR, kernel, "pointers"), False


def constants(entry: dict, descriptors: bool, x: Tensor) -> dict:
    return {
        "warps": entry["warps"],
        "ROWS": entry["rows"],
        "COLUMNS": entry["columns"],
        "DEPTH": entry["depth"],
        "STAGES": entry["stages"],
        "GROUP": entry["group"],
        "PARTS": entry["parts"],
        "DESCRIPTORS": descriptors,
        "PRECISION": precision(x.dtype),
        "ACC": ACCUMULATOR[x.dtype],
    }


def programs(entry: dict, descriptors: bool, rows: int, columns: int, x: Tensor) -> tuple[int]:
    tiles = triton.cdiv(rows, entry["rows"]) * triton.cdiv(columns, entry["columns"])
    return (min(tiles, multiprocessors(x)) if descriptors else tiles,)


def described(t: Tensor | None, descriptors: bool, *block: int) -> TensorDescriptor | Tensor | None:
    """t itself, or its descriptor, with rows of a (B, T, N) counted through."""
    if t is None or not descriptors:
        return t
    t = t if t.dim() == 2 else rows_of(t)
    return TensorDescriptor(t, list(t.shape), list(t.stride()), list(block))


def form(weight: Tensor) -> str:
    """Class of a weight (out, in)."""
    out, depth = weight.shape
    return "expand" if out >= 2 * depth else "project" if depth >= 2 * out else "square"


def _chosen(device: torch.device, itemsize: int, pass_: str, weights: str) -> bool:
    entry = listed(device, itemsize, epilogue.OPERATOR, "form", pass_, weights)
    return entry is not None and entry["gemm"] == 1


_chosen._dynamo_marked_constant = True  # torch.compiler.assume_constant_result, whose import takes a second


def prefers(kernel: str, x: Tensor, weight: Tensor) -> bool:
    """Whether the table says that this kernel was measured faster, for such weights on this GPU, than the vendor's GEMM
    and a pass behind it. Of the plain products there are none."""
    return kernel in ("linear_gemm_fwd", "linear_gemm_bwd") and _chosen(
        x.device, x.dtype.itemsize, "forward" if kernel == "linear_gemm_fwd" else "backward", form(weight)
    )


BACKENDS["triton"].prefers = prefers


@register("linear_gemm_fwd")
def linear_gemm_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    layer_scale: Tensor | None,
    path_mask: Tensor | None,
    residual: Tensor | None,
    registers: int,
    dropout: float,
    rng: Tensor | None,
    layer: int,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """(y, z): z = x Wᵀ + bias, y = residual + mask · γ · dropout(act(z)); z is empty unless kept for an activation."""
    batch, tokens, _ = x.shape
    columns, depth = weight.shape
    x2 = rows_of(x)
    y = (x if residual is None else residual).new_empty((batch, tokens, columns))
    keep = keep and activation != "none"
    z = x.new_empty(y.shape if keep else 0)
    y2, z2 = rows_of(y), rows_of(z) if keep else None
    entry, descriptors = chosen(x, "gemm_forward", x2, weight, rows_in(residual), y2, z2)
    tile = entry["rows"], entry["columns"] // entry["parts"]
    by = 1 if x2.stride(1) != 1 or weight.stride(1) != 1 else epilogue.divisor(columns, residual)
    by = functools.reduce(epilogue.math.gcd, (depth, x2.stride(0), weight.stride(0)), by) if by > 1 else 1
    launch(
        kernels.gemm_forward,
        programs(entry, descriptors, batch * tokens, columns, x),
        described(x2, descriptors, tile[0], entry["depth"]),
        described(weight, descriptors, entry["columns"], entry["depth"]),
        *(bias, layer_scale, path_mask),
        *(described(residual, descriptors, *tile), rng if dropout > 0 else None),
        *(described(y2, descriptors, *tile), described(z2, descriptors, *tile)),
        *(batch * tokens, tokens, columns, depth, registers, *epilogue.dropout_arguments(dropout, layer)),
        *(1 if p is None else p.stride(0) for p in (bias, layer_scale)),
        *(*x2.stride(), *weight.stride(), *epilogue.strides(residual)),
        ACTIVATION=activation,
        DROPOUT=dropout > 0,
        BY=by,
        QUADS=columns % 4 == 0,
        NARROW=ELEMENT[x.dtype],
        **constants(entry, descriptors, x),
    )
    return y, z


@register("linear_gemm_bwd")
def linear_gemm_bwd(
    d: Tensor, weight: Tensor, z: Tensor, activation: str, registers: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(dz, h, dbias): dz = (d W) ⊙ act′(z), h = act(z), dbias = Σ dz; register rows are 0."""
    batch, tokens, depth = d.shape
    columns = weight.shape[1]
    d2 = rows_of(d)
    dz, h = z.new_empty(z.shape), z.new_empty(z.shape)
    dz2, h2 = rows_of(dz), rows_of(h)
    entry, descriptors = chosen(d, "gemm_backward", d2, weight, rows_in(z), dz2, h2)
    tile = entry["rows"], entry["columns"] // entry["parts"]
    by = 1 if d2.stride(1) != 1 or weight.stride(1) != 1 else epilogue.divisor(columns, z)
    by = functools.reduce(epilogue.math.gcd, (depth, d2.stride(0), weight.stride(0)), by) if by > 1 else 1
    partial = d.new_empty((1, triton.cdiv(batch * tokens, tile[0]), columns), dtype=epilogue.wide(d.dtype))
    launch(
        kernels.gemm_backward,
        programs(entry, descriptors, batch * tokens, columns, d),
        described(d2, descriptors, tile[0], entry["depth"]),
        described(weight, descriptors, entry["depth"], entry["columns"]),
        *(
            described(z, descriptors, *tile),
            described(dz2, descriptors, *tile),
            described(h2, descriptors, *tile),
            partial,
        ),
        *(batch * tokens, tokens, columns, depth, registers),
        *(*d2.stride(), weight.stride(1), weight.stride(0), *z.stride()),
        ACTIVATION=activation,
        BY=by,
        **constants(entry, descriptors, d),
    )
    (dbias,) = epilogue.add_up(partial, d)
    return dz, h, dbias
