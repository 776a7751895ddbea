"""The kernels of LayerNorm over the channels, and nothing of their launch (that is layer_norm_2d.py).

A tile is PIXELS × BLOCK, pixels × channels, whatever lies next to each other in memory: strides are arguments, and a
stride of 1 is compiled in. COLUMNS says that pixels are the fast dimension (contiguous pictures), which makes a kernel
of its own of each: threads, loads and reductions run along the pixels there, along the channels otherwise.
EXTENT_BY (1, 2, 4 or 8) divides the fast dimension's length, X_BY and the like all strides of a tensor across it (1
where its fast stride isn't 1): what wide loads rest on. ALIKE: all tensors have x's strides, so offsets are shared.

Where all channels of a tile fit on chip BLOCK spans them, x (and dy) are read once, and GIVEN is false. Above that a
first kernel (`statistics`, `row_means`) walks the channels chunk by chunk; the second has its results GIVEN and works
on each chunk by itself.

Pixels are numbered within a sample, cut by `width` into rows only where those are not evenly spaced (REACH "split").
Of each sample the first `registers` are register rows. Everything computes in ACC and rounds once.
"""

import triton
import triton.language as tl

_SIZES = ["tiles", "pixels", "width", "channels", "registers", "count", "blocks", "per_block", "every"]
_STRIDES = [f"{tensor}_{step}" for tensor in ("x", "r", "g", "s", "y") for step in ("batch", "row")]


def _jit(function):
    """Compile one variant for all sizes and batch strides, so that results can't depend on the batch through them."""
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    return triton.jit(function, do_not_specialize=[name for name in (*_SIZES, *_STRIDES) if name in names])


@triton.jit
def _multiple(value, BY: tl.constexpr):
    """``value``, a multiple of BY, in a form that shows it: tl.multiple_of is lost on a function's argument."""
    if BY > 1:
        return value // BY * BY
    else:
        return value


@triton.jit
def _masks(
    pixel, channel, pixels, channels, registers,
    EXTENT_BY: tl.constexpr, COLUMNS: tl.constexpr, REGISTERS: tl.constexpr,
):  # fmt: skip
    """(which elements of the tile exist, which of its pixels exist and are no register rows)."""
    if COLUMNS:
        pixels = _multiple(pixels, EXTENT_BY)
    else:
        channels = _multiple(channels, EXTENT_BY)
    image = pixel < pixels
    inside = image[:, None] & (channel < channels)[None, :]
    if REGISTERS:
        image = image & (pixel >= registers)
    return inside, image


@triton.jit
def _at(
    ptr, place, strides, PIXELS: tl.constexpr, BY: tl.constexpr, COLUMNS: tl.constexpr, REACH: tl.constexpr
):  # fmt: skip
    """Pointers to a tile's elements in a tensor: the tile's own place is int64, offsets within it int32 if "near"."""
    sample, start, channel, width = place
    batch, row, column, channel_step = strides
    batch = _multiple(batch, BY)
    row = _multiple(row, BY)
    if COLUMNS:
        channel_step = _multiple(channel_step, BY)
    else:
        column = _multiple(column, BY)
    lane = tl.arange(0, PIXELS)
    ptr += sample * batch
    if REACH == "split":
        pixel = start + lane
        along = (pixel // width) * row + (pixel % width) * column
        return ptr + (along[:, None] + (channel.to(tl.int64) * channel_step)[None, :])
    elif REACH == "far":
        ptr += start * column
        return ptr + ((lane.to(tl.int64) * column)[:, None] + (channel.to(tl.int64) * channel_step)[None, :])
    else:
        ptr += start * column
        return ptr + ((lane * column)[:, None] + (channel * channel_step)[None, :])


@_jit
def forward(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, sum_ptr, mean_ptr, rstd_ptr,
    tiles, pixels, width, channels, registers, eps, weight_step, bias_step,
    x_batch, x_row, x_column, x_channel,
    r_batch, r_row, r_column, r_channel,
    y_batch, y_row, y_column, y_channel,
    PIXELS: tl.constexpr, BLOCK: tl.constexpr, GIVEN: tl.constexpr, COLUMNS: tl.constexpr, REACH: tl.constexpr,
    ALIKE: tl.constexpr, REGISTERS: tl.constexpr, EXTENT_BY: tl.constexpr, X_BY: tl.constexpr, R_BY: tl.constexpr,
    Y_BY: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """y, and mean and rstd unless GIVEN. With a residual: sum = x + residual in y's strides, and the norm of that."""
    if ALIKE:
        r_batch, r_row, r_column, r_channel = x_batch, x_row, x_column, x_channel
        y_batch, y_row, y_column, y_channel = x_batch, x_row, x_column, x_channel
    program = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    if GIVEN:
        chunks = tl.cdiv(channels, BLOCK)
        channel += (program % chunks).to(tl.int32) * BLOCK
        program = program // chunks
    sample = program // tiles
    start = (program % tiles) * PIXELS
    pixel = start + tl.arange(0, PIXELS)
    place = (sample, start, channel, width)
    inside, image = _masks(pixel, channel, pixels, channels, registers, EXTENT_BY, COLUMNS, REGISTERS)
    weight = tl.load(weight_ptr + channel.to(tl.int64) * weight_step, channel < channels, other=0.0).to(ACC)
    bias = tl.load(bias_ptr + channel.to(tl.int64) * bias_step, channel < channels, other=0.0).to(ACC)
    x_at = _at(x_ptr, place, (x_batch, x_row, x_column, x_channel), PIXELS, X_BY, COLUMNS, REACH)
    y_at = _at(y_ptr, place, (y_batch, y_row, y_column, y_channel), PIXELS, Y_BY, COLUMNS, REACH)
    x = tl.load(x_at, inside, other=0.0).to(ACC)
    if residual_ptr is not None:
        r_at = _at(residual_ptr, place, (r_batch, r_row, r_column, r_channel), PIXELS, R_BY, COLUMNS, REACH)
        total = (x + tl.load(r_at, inside, other=0.0).to(ACC)).to(sum_ptr.dtype.element_ty)
        sum_at = _at(sum_ptr, place, (y_batch, y_row, y_column, y_channel), PIXELS, Y_BY, COLUMNS, REACH)
        tl.store(sum_at, total, inside)
        x = total.to(ACC)  # as rounded, which is what backward will see
    kept = sample * pixels + pixel
    if GIVEN:
        mean = tl.load(mean_ptr + kept, image, other=0.0)
        rstd = tl.load(rstd_ptr + kept, image, other=0.0)
        centred = x - mean[:, None]
    else:
        mean = tl.sum(x, 1) / channels
        centred = tl.where(inside, x - mean[:, None], 0.0)
        rstd = tl.rsqrt(tl.sum(centred * centred, 1) / channels + eps)
        if REGISTERS:
            mean = tl.where(image, mean, 0.0)
            rstd = tl.where(image, rstd, 0.0)
        tl.store(mean_ptr + kept, mean, pixel < pixels)
        tl.store(rstd_ptr + kept, rstd, pixel < pixels)
    y = centred * rstd[:, None] * weight[None, :] + bias[None, :]
    if REGISTERS:
        y = tl.where(image[:, None], y, 0.0)
    tl.store(y_at, y.to(y_ptr.dtype.element_ty), inside)


@_jit
def statistics(
    x_ptr, residual_ptr, sum_ptr, mean_ptr, rstd_ptr,
    tiles, pixels, width, channels, registers, eps,
    x_batch, x_row, x_column, x_channel,
    r_batch, r_row, r_column, r_channel,
    y_batch, y_row, y_column, y_channel,
    PIXELS: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr, REACH: tl.constexpr, ALIKE: tl.constexpr,
    REGISTERS: tl.constexpr, EXTENT_BY: tl.constexpr, X_BY: tl.constexpr, R_BY: tl.constexpr,
    Y_BY: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """mean and rstd chunk by chunk, merged by Chan's formula (no cancellation); sum = x + residual if there is one."""
    if ALIKE:
        r_batch, r_row, r_column, r_channel = x_batch, x_row, x_column, x_channel
        y_batch, y_row, y_column, y_channel = x_batch, x_row, x_column, x_channel
    program = tl.program_id(0).to(tl.int64)
    sample = program // tiles
    start = (program % tiles) * PIXELS
    pixel = start + tl.arange(0, PIXELS)
    mean = tl.zeros([PIXELS], ACC)
    squares = tl.zeros([PIXELS], ACC)
    image = pixel < pixels
    for first in tl.range(0, channels, BLOCK):
        channel = first + tl.arange(0, BLOCK)
        place = (sample, start, channel, width)
        inside, image = _masks(pixel, channel, pixels, channels, registers, EXTENT_BY, COLUMNS, REGISTERS)
        x_at = _at(x_ptr, place, (x_batch, x_row, x_column, x_channel), PIXELS, X_BY, COLUMNS, REACH)
        x = tl.load(x_at, inside, other=0.0).to(ACC)
        if residual_ptr is not None:
            r_at = _at(residual_ptr, place, (r_batch, r_row, r_column, r_channel), PIXELS, R_BY, COLUMNS, REACH)
            sum_at = _at(sum_ptr, place, (y_batch, y_row, y_column, y_channel), PIXELS, Y_BY, COLUMNS, REACH)
            total = (x + tl.load(r_at, inside, other=0.0).to(ACC)).to(sum_ptr.dtype.element_ty)
            tl.store(sum_at, total, inside)
            x = total.to(ACC)
        here = tl.minimum(channels - first, BLOCK).to(ACC)
        before = tl.zeros([1], ACC) + first
        chunk_mean = tl.sum(x, 1) / here
        centred = tl.where(inside, x - chunk_mean[:, None], 0.0)
        apart = chunk_mean - mean
        share = here / (before + here)
        mean += apart * share
        squares += tl.sum(centred * centred, 1) + apart * apart * before * share
    rstd = tl.rsqrt(squares / channels + eps)
    if REGISTERS:
        mean = tl.where(image, mean, 0.0)
        rstd = tl.where(image, rstd, 0.0)
    tl.store(mean_ptr + sample * pixels + pixel, mean, pixel < pixels)
    tl.store(rstd_ptr + sample * pixels + pixel, rstd, pixel < pixels)


@_jit
def row_means(
    grad_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, means_ptr,
    tiles, pixels, width, channels, registers, count, weight_step,
    g_batch, g_row, g_column, g_channel,
    x_batch, x_row, x_column, x_channel,
    PIXELS: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr, REACH: tl.constexpr, ALIKE: tl.constexpr,
    REGISTERS: tl.constexpr, EXTENT_BY: tl.constexpr, G_BY: tl.constexpr, X_BY: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """means (2, count): at each pixel, over the channels, of dy·weight and of dy·weight·(x − mean)·rstd."""
    if ALIKE:
        g_batch, g_row, g_column, g_channel = x_batch, x_row, x_column, x_channel
    program = tl.program_id(0).to(tl.int64)
    sample = program // tiles
    start = (program % tiles) * PIXELS
    pixel = start + tl.arange(0, PIXELS)
    kept = sample * pixels + pixel
    scaled_sum = tl.zeros([PIXELS], ACC)
    product_sum = tl.zeros([PIXELS], ACC)
    for first in tl.range(0, channels, BLOCK):
        channel = first + tl.arange(0, BLOCK)
        place = (sample, start, channel, width)
        inside, image = _masks(pixel, channel, pixels, channels, registers, EXTENT_BY, COLUMNS, REGISTERS)
        inside = inside & image[:, None]
        mean = tl.load(mean_ptr + kept, image, other=0.0)
        rstd = tl.load(rstd_ptr + kept, image, other=0.0)
        weight = tl.load(weight_ptr + channel.to(tl.int64) * weight_step, channel < channels, other=0.0).to(ACC)
        g_at = _at(grad_ptr, place, (g_batch, g_row, g_column, g_channel), PIXELS, G_BY, COLUMNS, REACH)
        x_at = _at(x_ptr, place, (x_batch, x_row, x_column, x_channel), PIXELS, X_BY, COLUMNS, REACH)
        scaled = tl.load(g_at, inside, other=0.0).to(ACC) * weight[None, :]
        unit = (tl.load(x_at, inside, other=0.0).to(ACC) - mean[:, None]) * rstd[:, None]
        scaled_sum += tl.sum(scaled, 1)
        product_sum += tl.sum(scaled * unit, 1)
    tl.store(means_ptr + kept, scaled_sum / channels, pixel < pixels)
    tl.store(means_ptr + count + kept, product_sum / channels, pixel < pixels)


@_jit
def backward(
    grad_ptr, grad_sum_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, means_ptr, dx_ptr, partial_ptr,
    blocks, per_block, every, tiles, pixels, width, channels, registers, count, weight_step,
    g_batch, g_row, g_column, g_channel,
    s_batch, s_row, s_column, s_channel,
    x_batch, x_row, x_column, x_channel,
    y_batch, y_row, y_column, y_channel,
    PIXELS: tl.constexpr, BLOCK: tl.constexpr, GIVEN: tl.constexpr, AHEAD: tl.constexpr, COLUMNS: tl.constexpr,
    REACH: tl.constexpr, ALIKE: tl.constexpr, REGISTERS: tl.constexpr, EXTENT_BY: tl.constexpr,
    G_BY: tl.constexpr, S_BY: tl.constexpr, X_BY: tl.constexpr, Y_BY: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dx, and this block's row of the partial sums (2, blocks, channels) of dweight and dbias.

    A block goes over its `per_block` tiles, of `every` tile, in order; with AHEAD the next tile's x and dy are on their
    way meanwhile. Register rows are masked out of the loads: no sum contains them, and their dx is grad_sum or 0.
    """
    if ALIKE:
        g_batch, g_row, g_column, g_channel = x_batch, x_row, x_column, x_channel
        s_batch, s_row, s_column, s_channel = x_batch, x_row, x_column, x_channel
        y_batch, y_row, y_column, y_channel = x_batch, x_row, x_column, x_channel
    block = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    if GIVEN:
        chunks = tl.cdiv(channels, BLOCK)
        channel += (block % chunks).to(tl.int32) * BLOCK
        block = block // chunks
    weight = tl.load(weight_ptr + channel.to(tl.int64) * weight_step, channel < channels, other=0.0).to(ACC)
    # Along the channels each thread sums over its own pixels first; along the pixels that would fill the registers.
    if COLUMNS:
        dweight = tl.zeros([BLOCK], ACC)
        dbias = tl.zeros([BLOCK], ACC)
    else:
        dweight = tl.zeros([PIXELS, BLOCK], ACC)
        dbias = tl.zeros([PIXELS, BLOCK], ACC)
    first = block * per_block
    last = tl.minimum(first + per_block, every)
    if AHEAD:
        sample = first // tiles
        start = (first % tiles) * PIXELS
        pixel = start + tl.arange(0, PIXELS)
        place = (sample, start, channel, width)
        inside, image = _masks(pixel, channel, pixels, channels, registers, EXTENT_BY, COLUMNS, REGISTERS)
        g_at = _at(grad_ptr, place, (g_batch, g_row, g_column, g_channel), PIXELS, G_BY, COLUMNS, REACH)
        x_at = _at(x_ptr, place, (x_batch, x_row, x_column, x_channel), PIXELS, X_BY, COLUMNS, REACH)
        next_dy = tl.load(g_at, inside & image[:, None], other=0.0)
        next_x = tl.load(x_at, inside & image[:, None], other=0.0)
    for tile in tl.range(first, last, disable_licm=True):  # hoisted offsets would fill the registers
        if AHEAD:
            dy = next_dy.to(ACC)
            x = next_x.to(ACC)
            sample = (tile + 1) // tiles
            start = ((tile + 1) % tiles) * PIXELS
            pixel = start + tl.arange(0, PIXELS)
            place = (sample, start, channel, width)
            there = tl.where(tile + 1 < last, pixels, 0)
            inside, image = _masks(pixel, channel, there, channels, registers, EXTENT_BY, COLUMNS, REGISTERS)
            g_at = _at(grad_ptr, place, (g_batch, g_row, g_column, g_channel), PIXELS, G_BY, COLUMNS, REACH)
            x_at = _at(x_ptr, place, (x_batch, x_row, x_column, x_channel), PIXELS, X_BY, COLUMNS, REACH)
            next_dy = tl.load(g_at, inside & image[:, None], other=0.0)
            next_x = tl.load(x_at, inside & image[:, None], other=0.0)
        sample = tile // tiles
        start = (tile % tiles) * PIXELS
        pixel = start + tl.arange(0, PIXELS)
        place = (sample, start, channel, width)
        inside, image = _masks(pixel, channel, pixels, channels, registers, EXTENT_BY, COLUMNS, REGISTERS)
        if not AHEAD:
            g_at = _at(grad_ptr, place, (g_batch, g_row, g_column, g_channel), PIXELS, G_BY, COLUMNS, REACH)
            x_at = _at(x_ptr, place, (x_batch, x_row, x_column, x_channel), PIXELS, X_BY, COLUMNS, REACH)
            dy = tl.load(g_at, inside & image[:, None], other=0.0).to(ACC)
            x = tl.load(x_at, inside & image[:, None], other=0.0).to(ACC)
        kept = sample * pixels + pixel
        mean = tl.load(mean_ptr + kept, image, other=0.0)
        rstd = tl.load(rstd_ptr + kept, image, other=0.0)
        unit = (x - mean[:, None]) * rstd[:, None]
        if COLUMNS:
            dweight += tl.sum(dy * unit, 0)
            dbias += tl.sum(dy, 0)
        else:
            dweight += dy * unit
            dbias += dy
        scaled = dy * weight[None, :]
        if GIVEN:
            scaled_mean = tl.load(means_ptr + kept, image, other=0.0)
            product_mean = tl.load(means_ptr + count + kept, image, other=0.0)
        else:
            scaled_mean = tl.sum(scaled, 1) / channels
            product_mean = tl.sum(scaled * unit, 1) / channels
        dx = (scaled - scaled_mean[:, None] - unit * product_mean[:, None]) * rstd[:, None]
        if grad_sum_ptr is not None:
            s_at = _at(grad_sum_ptr, place, (s_batch, s_row, s_column, s_channel), PIXELS, S_BY, COLUMNS, REACH)
            dx += tl.load(s_at, inside, other=0.0).to(ACC)
        y_at = _at(dx_ptr, place, (y_batch, y_row, y_column, y_channel), PIXELS, Y_BY, COLUMNS, REACH)
        tl.store(y_at, dx.to(dx_ptr.dtype.element_ty), inside)
    if not COLUMNS:
        dweight = tl.sum(dweight, 0)
        dbias = tl.sum(dbias, 0)
    at = block * channels + channel
    tl.store(partial_ptr + at, dweight, channel < channels)
    tl.store(partial_ptr + blocks.to(tl.int64) * channels + at, dbias, channel < channels)


@_jit
def add_partials(
    partial_ptr, dweight_ptr, dbias_ptr, blocks, channels, ROWS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr
):
    """Sums of the blocks' partial sums (2, blocks, channels), always in the same order, rounded once."""
    half = tl.program_id(1)
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([ROWS, BLOCK], ACC)
    partial_ptr += half.to(tl.int64) * blocks * channels
    for first in tl.range(0, blocks, ROWS):
        row = first + tl.arange(0, ROWS).to(tl.int64)
        inside = (row < blocks)[:, None] & (channel < channels)[None, :]
        total += tl.load(partial_ptr + row[:, None] * channels + channel[None, :], inside, other=0.0)
    result = tl.sum(total, 0)
    if half == 0:
        tl.store(dweight_ptr + channel, result.to(dweight_ptr.dtype.element_ty), channel < channels)
    else:
        tl.store(dbias_ptr + channel, result.to(dbias_ptr.dtype.element_ty), channel < channels)
