"""The kernels around linear's GEMM, and what they share with the GEMMs of ours (that is _linear_gemm.py).

Rows are numbered through the whole batch; a row is a sample and a token in it, and the first `registers` tokens are
register rows. Tensors (B, T, N) come with three strides each; BY (1, 2, 4 or 8) divides those of all of them and N, and
is what wide loads rest on. Everything computes in ACC and rounds once.
"""

import triton
import triton.language as tl

from ._activations import activate, activation_slope
from ._philox import factors

_SIZES = ["rows", "tokens", "columns", "registers", "threshold", "scale", "place", "per_block", "blocks"]
_STRIDES = [f"{tensor}_{step}" for tensor in "zrg" for step in ("batch", "token")]


def jit(function):
    """Compile one variant for all sizes and batch strides, so that results can't depend on the batch through them."""
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    return triton.jit(function, do_not_specialize=[name for name in (*_SIZES, *_STRIDES) if name in names])


@triton.jit
def multiple(value, BY: tl.constexpr):
    """``value``, a multiple of BY, in a form that shows it: tl.multiple_of is lost on a function's argument."""
    if BY > 1:
        return value // BY * BY
    else:
        return value


@triton.jit
def place_of(start, rows, tokens, ROWS: tl.constexpr):
    """(row, sample, token, which exist) of the rows from ``start`` (int64) on; divides by ``tokens`` in 32 bits."""
    lane = tl.arange(0, ROWS)
    ahead = (start % tokens).to(tl.int32) + lane
    return start + lane, start // tokens + ahead // tokens, ahead % tokens, start + lane < rows


@triton.jit
def kept_of(sample, token, exists, registers, mask_ptr, ACC: tl.constexpr):
    """Per row what its branch is multiplied by: the sample's drop-path factor, and 0 for register rows."""
    image = exists & (token >= registers)
    if mask_ptr is None:
        return tl.where(image, 1.0, 0.0).to(ACC)
    else:
        return tl.load(mask_ptr + sample, image, other=0.0).to(ACC)


@triton.jit
def offsets(sample, token, column, batch, step, across, BY: tl.constexpr):
    """[rows, columns] offsets (int64) into a tensor (B, T, N)."""
    along = sample * multiple(batch, BY) + token * multiple(step, BY).to(tl.int64)
    return along[:, None] + (column.to(tl.int64) * across)[None, :]


@triton.jit
def branch(
    z, kept, rng_ptr, place, sample, token, first, columns, threshold, drop_scale, layer_scale_ptr, layer_scale_step,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, ACTIVATION: tl.constexpr, DROPOUT: tl.constexpr, QUADS: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """mask · γ · dropout(act(z)) of a tile; 0 in rows whose factor ``kept`` is 0, whatever z holds there."""
    value = activate(z, ACTIVATION, ACC) * kept[:, None]
    if DROPOUT:
        value *= factors(rng_ptr, place, sample, token, first, columns, threshold, drop_scale, ROWS, COLUMNS, QUADS).to(
            ACC
        )
    if layer_scale_ptr is not None:
        column = first + tl.arange(0, COLUMNS)
        at = layer_scale_ptr + column.to(tl.int64) * layer_scale_step
        value *= tl.load(at, column < columns, other=0.0).to(ACC)[None, :]
    return tl.where((kept != 0)[:, None], value, 0.0)


@jit
def forward(
    z_ptr, layer_scale_ptr, mask_ptr, residual_ptr, rng_ptr, y_ptr,
    rows, tokens, columns, registers, threshold, scale, place, layer_scale_step,
    z_batch, z_token, z_column, r_batch, r_token, r_column,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, ACTIVATION: tl.constexpr, DROPOUT: tl.constexpr, BY: tl.constexpr,
    QUADS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """y = residual + mask · γ · dropout(act(z)); y is contiguous."""
    chunks = tl.cdiv(columns, BLOCK)
    program = tl.program_id(0)
    first = (program % chunks) * BLOCK
    columns = multiple(columns, BY)
    column = first + tl.arange(0, BLOCK)
    row, sample, token, exists = place_of((program // chunks).to(tl.int64) * ROWS, rows, tokens, ROWS)
    kept = kept_of(sample, token, exists, registers, mask_ptr, ACC)
    inside = exists[:, None] & (column < columns)[None, :]
    at = offsets(sample, token, column, z_batch, z_token, z_column, BY)
    z = tl.load(z_ptr + at, inside & (kept != 0)[:, None], other=0.0).to(ACC)
    y = branch(
        z, kept, rng_ptr, place, sample, token, first, columns, threshold, scale, layer_scale_ptr, layer_scale_step,
        ROWS, BLOCK, ACTIVATION, DROPOUT, QUADS, ACC,
    )  # fmt: skip
    if residual_ptr is not None:
        at = offsets(sample, token, column, r_batch, r_token, r_column, BY)
        y += tl.load(residual_ptr + at, inside, other=0.0).to(ACC)
    y_at = (row * columns)[:, None] + column[None, :]
    tl.store(y_ptr + y_at, y.to(y_ptr.dtype.element_ty), inside)


@jit
def backward(
    grad_ptr, z_ptr, layer_scale_ptr, mask_ptr, rng_ptr, dz_ptr, partial_ptr,
    rows, tokens, columns, registers, threshold, scale, place, per_block, blocks, layer_scale_step,
    g_batch, g_token, g_column, z_batch, z_token, z_column,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, ACTIVATION: tl.constexpr, DROPOUT: tl.constexpr, BY: tl.constexpr,
    QUADS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dz, contiguous, and this block's row of the partial sums (2, blocks, N) of dγ and dbias; (1, blocks, N) of dbias
    where there is no γ. A block is `per_block` tiles of rows, added in their order."""
    chunks = tl.cdiv(columns, BLOCK)
    program = tl.program_id(0)
    first = (program % chunks) * BLOCK
    block = (program // chunks).to(tl.int64)
    columns = multiple(columns, BY)
    column = first + tl.arange(0, BLOCK)
    dbias = tl.zeros([ROWS, BLOCK], ACC)
    dscale = tl.zeros([ROWS, BLOCK], ACC)
    if layer_scale_ptr is not None:
        scale_at = layer_scale_ptr + column.to(tl.int64) * layer_scale_step
        layer_scale = tl.load(scale_at, column < columns, other=0.0).to(ACC)
    for tile in tl.range(0, tl.minimum(per_block, tl.cdiv(rows, ROWS) - block * per_block)):
        row, sample, token, exists = place_of((block * per_block + tile) * ROWS, rows, tokens, ROWS)
        kept = kept_of(sample, token, exists, registers, mask_ptr, ACC)
        inside = exists[:, None] & (column < columns)[None, :]
        wanted = inside & (kept != 0)[:, None]
        at = offsets(sample, token, column, g_batch, g_token, g_column, BY)
        d = tl.load(grad_ptr + at, wanted, other=0.0).to(ACC) * kept[:, None]
        if DROPOUT:
            d *= factors(rng_ptr, place, sample, token, first, columns, threshold, scale, ROWS, BLOCK, QUADS).to(ACC)
        if z_ptr is not None:
            at = offsets(sample, token, column, z_batch, z_token, z_column, BY)
            z = tl.load(z_ptr + at, wanted, other=0.0).to(ACC)
        if layer_scale_ptr is not None:
            dscale += d * activate(z, ACTIVATION, ACC)
            d *= layer_scale[None, :]
        if ACTIVATION != "none":
            d *= activation_slope(z, ACTIVATION, ACC)
        d = tl.where(wanted, d, 0.0)
        dbias += d
        dz_at = (row * columns)[:, None] + column[None, :]
        tl.store(dz_ptr + dz_at, d.to(dz_ptr.dtype.element_ty), inside)
    partial_ptr += block * columns
    if layer_scale_ptr is not None:
        tl.store(partial_ptr + column, tl.sum(dscale, 0), column < columns)
        partial_ptr += blocks.to(tl.int64) * columns
    tl.store(partial_ptr + column, tl.sum(dbias, 0), column < columns)


@jit
def add_partials(
    partial_ptr, first_ptr, second_ptr, blocks, columns, ROWS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr
):
    """Sums over the blocks of partial sums (1 or 2, blocks, N), always in the same order."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([ROWS, BLOCK], ACC)
    partial_ptr += tl.program_id(1).to(tl.int64) * blocks * columns
    for begin in tl.range(0, blocks, ROWS):
        row = begin + tl.arange(0, ROWS).to(tl.int64)
        inside = (row < blocks)[:, None] & (column < columns)[None, :]
        total += tl.load(partial_ptr + row[:, None] * columns + column[None, :], inside, other=0.0)
    if tl.program_id(1) == 0:
        tl.store(first_ptr + column, tl.sum(total, 0), column < columns)
    else:
        tl.store(second_ptr + column, tl.sum(total, 0), column < columns)
