"""The kernels of the depthwise convolution, and nothing of their launch (that is depthwise_conv2d.py).

A program sweeps down a picture, row by row, in a tile of GROUPS × BLOCK lanes. A lane has one channel and OUT
neighbouring columns; COLUMNS says that groups lie next to each other in memory (contiguous pictures), else channels do
(channels last, token buffers), and the lanes next to each other are those. A row is read once, OUT + K − 1 columns of
it by each lane (what neighbours share comes from L1), and added to all K output rows that it reaches: K·OUT sums and K²
taps in registers, no shared memory, no barrier. The next row is asked for before the current one is used.

Every output is the same sum in the same order, kernel row by kernel row, whatever tile, strip or batch it lies in. Rows
and columns outside the picture are not read; as columns of a row they count as 0. Everything computes in ACC and rounds
once; a norm's output is not rounded in between. The taps come as (K², C) in ACC.

FULL: tiles fill the width, EVEN: blocks fill the channels. X_BY and the like divide all strides of a tensor but its
channels', which is 1 (else they are 1): what loads wider than one element rest on.
"""

import triton
import triton.language as tl

from . import _depthwise_conv2d_rows as of

_SIZES = ["strips", "tiles", "blocks", "parts", "per_part", "every"]
_SIZES += ["rows", "height", "width", "channels", "registers", "tokens"]
_STRIDES = [f"{tensor}_{step}" for tensor in "xgy" for step in ("batch", "row")]


def _jit(function):
    """Compile one variant for all sizes and batch strides, so that results can't depend on the batch through them."""
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    return triton.jit(function, do_not_specialize=[name for name in (*_SIZES, *_STRIDES) if name in names])


@_jit
def convolve(
    x_ptr, filter_ptr, bias_ptr, mean_ptr, rstd_ptr, norm_weight_ptr, norm_bias_ptr, y_ptr,
    strips, tiles, blocks, rows, height, width, channels, registers, tokens,
    bias_step, norm_weight_step, norm_bias_step,
    x_batch, x_row, x_column, x_channel,
    y_batch, y_row, y_column, y_channel,
    K: tl.constexpr, FLIP: tl.constexpr, OUT: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr, REGISTERS: tl.constexpr, FULL: tl.constexpr, EVEN: tl.constexpr,
    BY: tl.constexpr, X_BY: tl.constexpr, Y_BY: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """y = x convolved + bias, on one strip of rows; with FLIP the filter is turned, which makes it dx of dy."""
    P: tl.constexpr = K // 2
    WIDE: tl.constexpr = OUT + K - 1
    program = tl.program_id(0)
    channel, group = of.lanes(program % blocks, GROUPS, BLOCK, COLUMNS)
    sample, first, last, column, beginning = of.item_at(
        program // blocks, strips, tiles, rows, height, group, GROUPS, OUT
    )
    inside = of.has_channel(channel, channels, EVEN, BY)
    x = of.place_of(x_ptr, sample, registers, channel, column, (x_batch, x_row, x_column, x_channel), X_BY)
    y = of.place_of(y_ptr, sample, registers, channel, column, (y_batch, y_row, y_column, y_channel), Y_BY)
    statistics, norm = of.norm_of(
        mean_ptr, rstd_ptr, norm_weight_ptr, norm_bias_ptr, norm_weight_step, norm_bias_step,
        sample * tokens + registers, column, channel, inside, width, ACC,
    )  # fmt: skip
    taps = of.taps_of(filter_ptr, channels, channel, inside, K, FLIP)
    start = of.parameter(bias_ptr, bias_step, channel, inside, ACC)
    if REGISTERS:  # noqa: SIM102  one is a constant, the other a value
        if beginning:
            of.clear(y, registers, column, group, inside, GROUPS)
    begin = tl.maximum(first - P, 0)
    end = tl.minimum(last + P, height)
    ring = of.repeated(start, (K - 1) * OUT)
    asked = of.ask(x, statistics, begin, column, inside, width, -P, WIDE, OUT, FULL, EVEN)
    values = of.settled(of.answer(asked, norm, column, inside, width, -P, WIDE, OUT, FULL, ACC), WIDE)
    for row in tl.range(begin, end):
        following = tl.minimum(row + 1, end - 1)
        asked = of.ask(x, statistics, following, column, inside, width, -P, WIDE, OUT, FULL, EVEN)
        sums = of.scatter(ring, start, values, taps, K, OUT)
        of.write(y, row - P, sums, column, inside, of.between(row - P, first, last, width), 0, OUT, EVEN)
        ring = of.slice_of(sums, OUT, (K - 1) * OUT)
        values = of.answer(asked, norm, column, inside, width, -P, WIDE, OUT, FULL, ACC)  # waits for what was asked
    for j in tl.static_range(P):
        row = end - P + j
        of.write(y, row, ring, column, inside, of.between(row, first, last, width), j * OUT, OUT, EVEN)


@_jit
def backward(
    grad_ptr, x_ptr, filter_ptr, mean_ptr, rstd_ptr, norm_weight_ptr, norm_bias_ptr, dx_ptr, partial_ptr,
    per_part, every, strips, tiles, blocks, rows, height, width, channels, registers, tokens,
    norm_weight_step, norm_bias_step,
    g_batch, g_row, g_column, g_channel,
    x_batch, x_row, x_column, x_channel,
    y_batch, y_row, y_column, y_channel,
    K: tl.constexpr, OUT: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
    REGISTERS: tl.constexpr, FULL: tl.constexpr, EVEN: tl.constexpr,
    BY: tl.constexpr, G_BY: tl.constexpr, X_BY: tl.constexpr, Y_BY: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Partial sums of dweight and dbias (parts, K² + 1, C) over some strips, and with ``dx_ptr`` dx on these as well.

    Sweeps down dy, whose rows are read once: a row, with its neighbours left and right, meets the K rows of x around
    it, which are kept in registers, and adds to the K rows of dx around it.
    """
    P: tl.constexpr = K // 2
    WIDE: tl.constexpr = OUT + K - 1
    part = tl.program_id(0) // blocks
    channel, group = of.lanes(tl.program_id(0) % blocks, GROUPS, BLOCK, COLUMNS)
    inside = of.has_channel(channel, channels, EVEN, BY)
    zero = tl.zeros_like(channel).to(ACC)
    dweight = of.repeated(zero, K * K)
    dbias = zero
    if dx_ptr is not None:
        taps = of.taps_of(filter_ptr, channels, channel, inside, K, True)
    for item in tl.range(part * per_part, tl.minimum((part + 1) * per_part, every)):
        sample, first, last, column, beginning = of.item_at(item, strips, tiles, rows, height, group, GROUPS, OUT)
        dy = of.place_of(grad_ptr, sample, registers, channel, column, (g_batch, g_row, g_column, g_channel), G_BY)
        x = of.place_of(x_ptr, sample, registers, channel, column, (x_batch, x_row, x_column, x_channel), X_BY)
        statistics, norm = of.norm_of(
            mean_ptr, rstd_ptr, norm_weight_ptr, norm_bias_ptr, norm_weight_step, norm_bias_step,
            sample * tokens + registers, column, channel, inside, width, ACC,
        )  # fmt: skip
        begin = tl.maximum(first - P, 0)
        end = tl.minimum(last + P, height)
        if dx_ptr is not None:
            dx = of.place_of(dx_ptr, sample, registers, channel, column, (y_batch, y_row, y_column, y_channel), Y_BY)
            ring = of.repeated(zero, (K - 1) * OUT)
            if REGISTERS:  # noqa: SIM102
                if beginning:
                    of.clear(dx, registers, column, group, inside, GROUPS)
        around = ()
        for j in tl.static_range(K - 1):
            row = begin - P + j
            there = of.between(row, first, last, width)
            asked = of.ask(x, statistics, row, column, inside, there, 0, OUT, OUT, False, EVEN)
            around = around + of.answer(asked, norm, column, inside, there, 0, OUT, OUT, False, ACC)
        asked = of.read(dy, begin, column, inside, width, -P, WIDE, OUT, FULL, EVEN)
        values = of.settled(of.answer(asked, (), column, inside, width, -P, WIDE, OUT, FULL, ACC), WIDE)
        for row in tl.range(begin, end):
            there = of.between(row + P, first, last, width)
            below = of.ask(x, statistics, row + P, column, inside, there, 0, OUT, OUT, False, EVEN)
            following = tl.minimum(row + 1, end - 1)
            asked = of.read(dy, following, column, inside, width, -P, WIDE, OUT, FULL, EVEN)
            if dx_ptr is not None:
                sums = of.scatter(ring, zero, values, taps, K, OUT)
                of.write(dx, row - P, sums, column, inside, of.between(row - P, first, last, width), 0, OUT, EVEN)
                ring = of.slice_of(sums, OUT, (K - 1) * OUT)
            around = around + of.answer(below, norm, column, inside, there, 0, OUT, OUT, False, ACC)
            dweight = of.correlate(dweight, around, values, K, OUT)
            around = of.slice_of(around, OUT, (K - 1) * OUT)
            here = zero
            for o in tl.static_range(OUT):
                here += values[P + o]
            dbias += tl.where((row >= first) & (row < last), here, 0.0)
            values = of.answer(asked, (), column, inside, width, -P, WIDE, OUT, FULL, ACC)
        if dx_ptr is not None:
            for j in tl.static_range(P):
                row = end - P + j
                of.write(dx, row, ring, column, inside, of.between(row, first, last, width), j * OUT, OUT, EVEN)
    first = tl.program_id(0) % blocks * BLOCK
    channel = tl.arange(0, BLOCK)
    at = partial_ptr + (part.to(tl.int64) * (K * K + 1) * channels + first) + channel
    for t in tl.static_range(K * K):
        tl.store(at + t * channels, of.over_groups(dweight[t], GROUPS, BLOCK, COLUMNS), first + channel < channels)
    tl.store(at + K * K * channels, of.over_groups(dbias, GROUPS, BLOCK, COLUMNS), first + channel < channels)


@_jit
def add_partials(
    partial_ptr, dweight_ptr, dbias_ptr, parts, channels,
    TAPS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, BY: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Sums of the parts' partial sums (parts, TAPS + 1, C), always in the same order, rounded once."""
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    channels = of.multiple(channels, BY)
    lanes = (TAPS + 1) * channels
    total = tl.zeros([ROWS, BLOCK], ACC)
    for first in tl.range(0, parts, ROWS):
        row = first + tl.arange(0, ROWS).to(tl.int64)
        inside = (row < parts)[:, None] & (lane < lanes)[None, :]
        total += tl.load(partial_ptr + row[:, None] * lanes + lane[None, :], inside, other=0.0)
    result = tl.sum(total, 0)
    tap = lane // channels
    channel = lane % channels
    tl.store(dweight_ptr + (channel * TAPS + tap), result.to(dweight_ptr.dtype.element_ty), tap < TAPS)
    tl.store(dbias_ptr + channel, result.to(dbias_ptr.dtype.element_ty), tap == TAPS)
