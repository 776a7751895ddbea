"""linear's GEMMs with what surrounds them in their epilogue; the epilogue's functions are those of _linear_kernels.py.

A program takes tiles of ROWS × COLUMNS outputs, GROUP tiles of rows below each other before the next tile of columns,
which keeps what they share in the L2 cache; it adds up DEPTH products at a time in ACC, STAGES loads under way. With
DESCRIPTORS x, the weight and the results are tensor descriptors (TMA), and programs are as many as fit on the device,
each taking every so-manieth tile; else they are pointers. A tile's sums don't depend on where it stands.
"""

import triton
import triton.language as tl

from ._activations import activate, activation_slope
from ._linear_kernels import branch, jit, kept_of, multiple, offsets, place_of


@triton.jit
def _tile_of(tile, row_tiles, column_tiles, GROUP: tl.constexpr):
    """(which tile of rows, which of columns)."""
    group = tile // (GROUP * column_tiles)
    height = tl.minimum(row_tiles - group * GROUP, GROUP)
    within = tile % (GROUP * column_tiles)
    return group * GROUP + within % height, within // height


@triton.jit
def _products(
    x, weight, start, first, rows, columns, depth, x_row, x_depth, w_column, w_depth,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr, TRANSPOSED: tl.constexpr,
    DESCRIPTORS: tl.constexpr, BY: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """[ROWS, COLUMNS] sums over the depth, of x's rows from ``start`` on and the weight's columns from ``first`` on.
    TRANSPOSED: the weight's descriptor is (columns, depth), else (depth, columns)."""
    total = tl.zeros([ROWS, COLUMNS], ACC)
    if DESCRIPTORS:
        for begin in tl.range(0, depth, DEPTH, num_stages=STAGES):
            a = x.load([start, begin])
            if TRANSPOSED:
                total = tl.dot(a, weight.load([first, begin]).T, total, input_precision=PRECISION, out_dtype=ACC)
            else:
                total = tl.dot(a, weight.load([begin, first]), total, input_precision=PRECISION, out_dtype=ACC)
    else:
        row = start + tl.arange(0, ROWS)
        column = first + tl.arange(0, COLUMNS)
        along = tl.arange(0, DEPTH)
        depth = multiple(depth, BY)
        columns = multiple(columns, BY)
        w_column = multiple(w_column, BY) if TRANSPOSED else w_column
        w_depth = w_depth if TRANSPOSED else multiple(w_depth, BY)
        x += (row.to(tl.int64) * multiple(x_row, BY))[:, None] + (along * x_depth)[None, :]
        weight += (column.to(tl.int64) * w_column)[None, :] + (along.to(tl.int64) * w_depth)[:, None]
        for begin in tl.range(0, depth, DEPTH, num_stages=STAGES):
            there = along < depth - begin
            a = tl.load(x, (row < rows)[:, None] & there[None, :], other=0.0)
            b = tl.load(weight, there[:, None] & (column < columns)[None, :], other=0.0)
            total = tl.dot(a, b, total, input_precision=PRECISION, out_dtype=ACC)
            x += DEPTH * x_depth
            weight += DEPTH * w_depth
    return total


@triton.jit
def _halves(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Columns 0 to COLUMNS / 2 of a tile, and the others."""
    return tl.split(tl.permute(tl.reshape(tile, [ROWS, 2, COLUMNS // 2]), [0, 2, 1]))


@triton.jit
def _load(source, start, first, place, steps, inside, COLUMNS: tl.constexpr, DESCRIPTORS: tl.constexpr,
          BY: tl.constexpr):  # fmt: skip
    """A tile of (B, T, N), or of the descriptor of (rows, N)."""
    if DESCRIPTORS:
        return source.load([start, first])
    else:
        _, sample, token, _ = place
        batch, step, across = steps
        at = offsets(sample, token, first + tl.arange(0, COLUMNS), batch, step, across, BY)
        return tl.load(source + at, inside, other=0.0)


@triton.jit
def _store(out, value, start, first, columns, row, inside, COLUMNS: tl.constexpr, DESCRIPTORS: tl.constexpr):
    """A tile into (rows, N), rounded."""
    if DESCRIPTORS:
        out.store([start, first], value.to(out.dtype))
    else:
        at = (row * columns)[:, None] + (first + tl.arange(0, COLUMNS))[None, :]
        tl.store(out + at, value.to(out.dtype.element_ty), inside)


@triton.jit
def _finish_forward(
    total, bias_ptr, layer_scale_ptr, mask_ptr, residual, rng_ptr, y, z, start, first, rows, tokens, columns, registers,
    threshold, scale, place, bias_step, layer_scale_step, steps,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DESCRIPTORS: tl.constexpr, ACTIVATION: tl.constexpr,
    DROPOUT: tl.constexpr, BY: tl.constexpr, QUADS: tl.constexpr, NARROW: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """From the products of a tile to y and z."""
    columns = multiple(columns, BY)
    column = first + tl.arange(0, COLUMNS)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + column.to(tl.int64) * bias_step, column < columns, other=0.0)
        total += bias.to(ACC)[None, :]
    where = place_of(start.to(tl.int64), rows, tokens, ROWS)
    row, sample, token, exists = where
    inside = exists[:, None] & (column < columns)[None, :]
    if ACTIVATION != "none":
        total = total.to(NARROW)
        if z is not None:
            _store(z, total, start, first, columns, row, inside, COLUMNS, DESCRIPTORS)
        total = total.to(ACC)
    kept = kept_of(sample, token, exists, registers, mask_ptr, ACC)
    result = branch(
        total, kept, rng_ptr, place, sample, token, first, columns, threshold, scale, layer_scale_ptr, layer_scale_step,
        ROWS, COLUMNS, ACTIVATION, DROPOUT, QUADS, ACC,
    )  # fmt: skip
    if residual is not None:
        result += _load(residual, start, first, where, steps, inside, COLUMNS, DESCRIPTORS, BY).to(ACC)
    _store(y, result, start, first, columns, row, inside, COLUMNS, DESCRIPTORS)


@jit
def gemm_forward(
    x, weight, bias_ptr, layer_scale_ptr, mask_ptr, residual, rng_ptr, y, z,
    rows, tokens, columns, depth, registers, threshold, scale, place, bias_step, layer_scale_step,
    x_row, x_depth, w_column, w_depth, r_batch, r_token, r_column,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr, GROUP: tl.constexpr,
    PARTS: tl.constexpr, DESCRIPTORS: tl.constexpr, ACTIVATION: tl.constexpr, DROPOUT: tl.constexpr, BY: tl.constexpr,
    QUADS: tl.constexpr, PRECISION: tl.constexpr, NARROW: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """y = residual + mask · γ · dropout(act(z)) with z = x Wᵀ + bias, which is written unless None. Of z as rounded
    to NARROW where there is an activation, so that backward sees what forward saw."""
    row_tiles = tl.cdiv(rows, ROWS)
    column_tiles = tl.cdiv(columns, COLUMNS)
    steps = (r_batch, r_token, r_column)
    mine = tl.cdiv(row_tiles * column_tiles - tl.program_id(0), tl.num_programs(0))
    for turn in tl.range(0, mine, flatten=DESCRIPTORS):
        tile = tl.program_id(0) + turn * tl.num_programs(0)
        which_rows, which_columns = _tile_of(tile, row_tiles, column_tiles, GROUP)
        start = which_rows * ROWS
        first = which_columns * COLUMNS
        total = _products(
            x, weight, start, first, rows, columns, depth, x_row, x_depth, w_column, w_depth,
            ROWS, COLUMNS, DEPTH, STAGES, True, DESCRIPTORS, BY, PRECISION, ACC,
        )  # fmt: skip
        if PARTS == 1:
            _finish_forward(
                total, bias_ptr, layer_scale_ptr, mask_ptr, residual, rng_ptr, y, z, start, first, rows, tokens,
                columns, registers, threshold, scale, place, bias_step, layer_scale_step, steps,
                ROWS, COLUMNS, DESCRIPTORS, ACTIVATION, DROPOUT, BY, QUADS, NARROW, ACC,
            )  # fmt: skip
        else:
            left, right = _halves(total, ROWS, COLUMNS)
            for part in tl.static_range(PARTS):
                _finish_forward(
                    right if part else left, bias_ptr, layer_scale_ptr, mask_ptr, residual, rng_ptr, y, z, start,
                    first + part * (COLUMNS // PARTS), rows, tokens, columns, registers, threshold, scale, place,
                    bias_step, layer_scale_step, steps,
                    ROWS, COLUMNS // PARTS, DESCRIPTORS, ACTIVATION, DROPOUT, BY, QUADS, NARROW, ACC,
                )  # fmt: skip


@triton.jit
def _finish_backward(
    total, z, dz, h, partial_ptr, start, first, rows, tokens, columns, registers, steps,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DESCRIPTORS: tl.constexpr, ACTIVATION: tl.constexpr, BY: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """From the products of a tile to dz, h and the tile's sums of dz."""
    columns = multiple(columns, BY)
    column = first + tl.arange(0, COLUMNS)
    where = place_of(start.to(tl.int64), rows, tokens, ROWS)
    row, _, token, exists = where
    inside = exists[:, None] & (column < columns)[None, :]
    image = inside & (token >= registers)[:, None]
    before = tl.where(image, _load(z, start, first, where, steps, image, COLUMNS, DESCRIPTORS, BY).to(ACC), 0.0)
    value = tl.where(image, activate(before, ACTIVATION, ACC), 0.0)
    _store(h, value, start, first, columns, row, inside, COLUMNS, DESCRIPTORS)
    result = tl.where(image, total * activation_slope(before, ACTIVATION, ACC), 0.0)
    _store(dz, result, start, first, columns, row, inside, COLUMNS, DESCRIPTORS)
    tl.store(partial_ptr + column, tl.sum(result, 0), column < columns)


@jit
def gemm_backward(
    d, weight, z, dz, h, partial_ptr,
    rows, tokens, columns, depth, registers,
    x_row, x_depth, w_column, w_depth, z_batch, z_token, z_column,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr, GROUP: tl.constexpr,
    PARTS: tl.constexpr, DESCRIPTORS: tl.constexpr, ACTIVATION: tl.constexpr, BY: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dz = (d W) ⊙ act′(z), h = act(z), and each tile of rows' partial sums (tiles, N) of dz. Register rows of dz and
    h are 0."""
    row_tiles = tl.cdiv(rows, ROWS)
    column_tiles = tl.cdiv(columns, COLUMNS)
    steps = (z_batch, z_token, z_column)
    mine = tl.cdiv(row_tiles * column_tiles - tl.program_id(0), tl.num_programs(0))
    for turn in tl.range(0, mine, flatten=DESCRIPTORS):
        tile = tl.program_id(0) + turn * tl.num_programs(0)
        which_rows, which_columns = _tile_of(tile, row_tiles, column_tiles, GROUP)
        start = which_rows * ROWS
        first = which_columns * COLUMNS
        total = _products(
            d, weight, start, first, rows, columns, depth, x_row, x_depth, w_column, w_depth,
            ROWS, COLUMNS, DEPTH, STAGES, False, DESCRIPTORS, BY, PRECISION, ACC,
        )  # fmt: skip
        sums = partial_ptr + which_rows.to(tl.int64) * columns
        if PARTS == 1:
            _finish_backward(
                total, z, dz, h, sums, start, first, rows, tokens, columns, registers, steps,
                ROWS, COLUMNS, DESCRIPTORS, ACTIVATION, BY, ACC,
            )  # fmt: skip
        else:
            left, right = _halves(total, ROWS, COLUMNS)
            for part in tl.static_range(PARTS):
                _finish_backward(
                    right if part else left, z, dz, h, sums, start, first + part * (COLUMNS // PARTS), rows, tokens,
                    columns, registers, steps, ROWS, COLUMNS // PARTS, DESCRIPTORS, ACTIVATION, BY, ACC,
                )  # fmt: skip
