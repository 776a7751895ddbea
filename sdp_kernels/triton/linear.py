"""What `linear` does around its GEMM, one pass each way: geometry and launches.

Moved once each: forward z, y (and residual); backward dy, z, dz (z only where an activation or LayerScale needs it).
Sums over rows are partial sums in fp32, one row per block of rows, written once and added in their order; the blocks
follow from the shape alone.
"""

import math

import torch
import triton
from torch import Tensor

from . import _linear_kernels as kernels
from ._launch import ACCUMULATOR, configuration, launch, register
from ._philox import STREAMS, threshold_and_scale

OPERATOR = "linear"
DROPOUT_STREAM = 0


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def divisor(columns: int, *tensors: Tensor | None) -> int:
    """1, 2, 4 or 8: divides N and the batch and token strides of all tensors; 1 where a column stride is not 1."""
    found = math.gcd(8, columns)
    for t in tensors:
        if t is not None:
            batch, token, column = t.stride()
            found = math.gcd(found, batch, token) if column == 1 or columns == 1 else 1
    return found


def layout(by: int) -> str:
    """ "odd rows" where no load can be wide, which takes many more registers."""
    return "rows" if by >= 4 else "odd rows"


def strides(t: Tensor | None) -> tuple[int, int, int]:
    return (0, 0, 0) if t is None else t.stride()


def dropout_arguments(dropout: float, layer: int) -> tuple[int, float, int]:
    """(threshold, scale, place) as the kernels take them."""
    return *threshold_and_scale(dropout), (layer * STREAMS + DROPOUT_STREAM) % 2**32


def add_up(partial: Tensor, like: Tensor) -> list[Tensor]:
    """Sums over the blocks of partial (n, blocks, N), n = 1 or 2; ``like`` tells the table's width."""
    count, blocks, columns = partial.shape
    sums = [partial.new_empty(columns) for _ in range(count)]
    entry = configuration(like, OPERATOR, "add_partials")
    launch(
        kernels.add_partials,
        (triton.cdiv(columns, entry["block"]), count),
        *(partial, sums[0], sums[-1], blocks, columns),
        warps=entry["warps"],
        ROWS=entry["rows"],
        BLOCK=entry["block"],
        ACC=ACCUMULATOR[like.dtype],
    )
    return sums


@register("linear_epilogue_fwd")
def linear_epilogue_fwd(
    z: Tensor,
    activation: str,
    layer_scale: Tensor | None,
    path_mask: Tensor | None,
    residual: Tensor | None,
    registers: int,
    dropout: float,
    rng: Tensor | None,
    layer: int,
) -> Tensor:
    """residual + mask · γ · dropout(act(z)), contiguous, in the residual's dtype or else z's; any strides."""
    batch, tokens, columns = z.shape
    y = (z if residual is None else residual).new_empty(z.shape)
    by = divisor(columns, z, residual)
    entry = configuration(z, OPERATOR, "forward", layout(by))
    rows = batch * tokens
    launch(
        kernels.forward,
        (triton.cdiv(rows, entry["rows"]) * triton.cdiv(columns, entry["block"]),),
        *(z, layer_scale, path_mask, residual, rng if dropout > 0 else None, y),
        *(rows, tokens, columns, registers, *dropout_arguments(dropout, layer)),
        1 if layer_scale is None else layer_scale.stride(0),
        *(*z.stride(), *strides(residual)),
        warps=entry["warps"],
        ROWS=entry["rows"],
        BLOCK=entry["block"],
        ACTIVATION=activation,
        DROPOUT=dropout > 0,
        BY=by,
        QUADS=columns % 4 == 0,
        ACC=ACCUMULATOR[z.dtype],
    )
    return y


@register("linear_epilogue_bwd")
def linear_epilogue_bwd(
    grad: Tensor,
    z: Tensor,
    activation: str,
    layer_scale: Tensor | None,
    path_mask: Tensor | None,
    registers: int,
    dropout: float,
    rng: Tensor | None,
    layer: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dz, dlayer_scale, dbias); dz contiguous in z's dtype, the sums in fp32 (fp64); any strides."""
    batch, tokens, columns = z.shape
    dz = z.new_empty(z.shape)
    read = z if activation != "none" or layer_scale is not None else None
    by = divisor(columns, grad, read)
    entry = configuration(z, OPERATOR, "backward", layout(by))
    rows, chunks = batch * tokens, triton.cdiv(columns, entry["block"])
    tiles = triton.cdiv(rows, entry["rows"])
    per_block = max(1, triton.cdiv(tiles * chunks, entry["blocks"]))
    blocks = triton.cdiv(tiles, per_block)
    partial = z.new_empty((1 if layer_scale is None else 2, blocks, columns), dtype=wide(z.dtype))
    launch(
        kernels.backward,
        (blocks * chunks,),
        *(grad, read, layer_scale, path_mask, rng if dropout > 0 else None, dz, partial),
        *(rows, tokens, columns, registers, *dropout_arguments(dropout, layer), per_block, blocks),
        1 if layer_scale is None else layer_scale.stride(0),
        *(*grad.stride(), *strides(read)),
        warps=entry["warps"],
        ROWS=entry["rows"],
        BLOCK=entry["block"],
        ACTIVATION=activation,
        DROPOUT=dropout > 0,
        BY=by,
        QUADS=columns % 4 == 0,
        ACC=ACCUMULATOR[z.dtype],
    )
    *dscale, dbias = add_up(partial, z)
    return dz, dscale[0] if dscale else dbias.new_empty(0), dbias
