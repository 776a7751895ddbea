"""What the kernels of the depthwise convolution are made of: lanes, places, rows as they are read, used and written.

A place is (pointers to the lanes' first columns in the image's row 0, row stride, column stride), in int64. FULL: tiles
fill the width, EVEN: blocks fill the channels; then no lane needs a mask for that. Tuples stand for registers: a row is
OUT + K − 1 values for each lane, a ring K − 1 rows of OUT sums.
"""

import triton
import triton.language as tl


@triton.jit
def wide(value):
    """A number of any kind, also a constant, as an int64."""
    return tl.full([], 0, tl.int64) + value


@triton.jit
def multiple(value, BY: tl.constexpr):
    """``value``, a multiple of BY, in a form that shows it: tl.multiple_of is lost on a function's argument."""
    if BY > 1:
        return value // BY * BY
    else:
        return value


@triton.jit
def lanes(block, GROUPS: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr):
    """(channel, group) of each lane, in one dimension: of two, Triton 3.6 and 3.9 may take either for the faster."""
    lane = tl.arange(0, GROUPS * BLOCK)
    if COLUMNS:
        return block * BLOCK + lane // GROUPS, lane % GROUPS
    else:
        return block * BLOCK + lane % BLOCK, lane // BLOCK


@triton.jit
def item_at(item, strips, tiles, rows, height, group, GROUPS: tl.constexpr, OUT: tl.constexpr):
    """(sample, its first row and the one behind its last, column of each lane, whether it is the sample's first)."""
    column = ((item % tiles) * GROUPS + group) * OUT
    first = (item // tiles % strips) * rows
    sample = (item // (tiles * strips)).to(tl.int64)
    return sample, first, tl.minimum(first + rows, height), column, item % (tiles * strips) == 0


@triton.jit
def has_channel(channel, channels, EVEN: tl.constexpr, BY: tl.constexpr):
    """Which lanes of the tile have one."""
    if EVEN:
        return tl.full(channel.shape, 1, tl.int1)
    else:
        return channel < multiple(channels, BY)


@triton.jit
def place_of(ptr, sample, registers, channel, column, strides, BY: tl.constexpr):
    batch, row, column_step, channel_step = strides
    column_step = wide(multiple(column_step, BY))
    ptr += sample * multiple(batch, BY) + registers * column_step
    at = ptr + (column * column_step + channel.to(tl.int64) * channel_step)
    return at, wide(multiple(row, BY)), column_step


@triton.jit
def exists(column, inside, width, D: tl.constexpr, OUT: tl.constexpr, FULL: tl.constexpr, EVEN: tl.constexpr):
    """Which lanes have a column D from their first; ``inside``: which have a channel; ``width`` 0: none in this row."""
    if D < 0:
        mask = column >= -D
        if not FULL:
            mask = mask & (column < width - D)
        if not EVEN:
            mask = mask & inside
    elif FULL and D < OUT:
        mask = inside
    else:
        mask = column < width - D
        if not EVEN:
            mask = mask & inside
    return mask


@triton.jit
def read(
    place, row, column, inside, width,
    FIRST: tl.constexpr, COUNT: tl.constexpr, OUT: tl.constexpr, FULL: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """That row's columns FIRST to FIRST + COUNT of each lane, as they are; 0 where there is none."""
    at, row_step, column_step = place
    at += row * row_step
    values = ()
    for d in tl.static_range(FIRST, FIRST + COUNT):
        mask = exists(column, inside, width, d, OUT, FULL, EVEN)
        values = values + (tl.load(at + d * column_step, mask, other=0.0),)
    return values


@triton.jit
def ask(
    place, statistics, row, column, inside, width,
    FIRST: tl.constexpr, COUNT: tl.constexpr, OUT: tl.constexpr, FULL: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """What ``answer`` takes: a row, and with a norm its pixels' means and rstds."""
    asked = read(place, row, column, inside, width, FIRST, COUNT, OUT, FULL, EVEN)
    if len(statistics) > 0:
        for i in tl.static_range(2):
            asked = asked + read(statistics[i], row, column, inside, width, FIRST, COUNT, OUT, FULL, True)
    return asked


@triton.jit
def answer(
    asked, norm, column, inside, width,
    FIRST: tl.constexpr, COUNT: tl.constexpr, OUT: tl.constexpr, FULL: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The row widened, and normalised where it exists: what is outside the picture stays 0."""
    values = ()
    for e in tl.static_range(COUNT):
        value = asked[e].to(ACC)
        if len(norm) > 0:
            value = (value - asked[COUNT + e]) * asked[2 * COUNT + e] * norm[0] + norm[1]
            value = tl.where(exists(column, inside, width, FIRST + e, OUT, FULL, True), value, 0.0)
        values = values + (value,)
    return values


@triton.jit
def settled(values, COUNT: tl.constexpr):
    """The same values, before a loop that ends with ``answer``. Were they a conversion here too, LLVM would carry them
    through the loop as they were read, and pack and unpack them on the way: 30 instructions a row at K = 7."""
    same = ()
    for e in tl.static_range(COUNT):
        same = same + (values[e] + 0.0,)
    return same


@triton.jit
def parameter(ptr, step, channel, inside, ACC: tl.constexpr):
    """A parameter of each lane's channel; 0 if there is none."""
    if ptr is None:
        return tl.zeros_like(channel).to(ACC)
    else:
        return tl.load(ptr + channel.to(tl.int64) * step, inside, other=0.0).to(ACC)


@triton.jit
def norm_of(
    mean_ptr, rstd_ptr, weight_ptr, bias_ptr, weight_step, bias_step, first, column, channel, inside, width,
    ACC: tl.constexpr,
):  # fmt: skip
    """(places of mean and rstd, (weight, bias) of each lane), both empty without a norm; ``first``: of the pixels."""
    if mean_ptr is None:
        return (), ()
    else:
        weight = parameter(weight_ptr, weight_step, channel, inside, ACC)
        bias = parameter(bias_ptr, bias_step, channel, inside, ACC)
        pixel, width = first + column, wide(width)
        return ((mean_ptr + pixel, width, 1), (rstd_ptr + pixel, width, 1)), (weight, bias)


@triton.jit
def taps_of(filter_ptr, channels, channel, inside, K: tl.constexpr, FLIP: tl.constexpr):
    """The K² taps of each lane's channel, the last one first with FLIP."""
    taps = ()
    for t in tl.static_range(K * K):
        at = filter_ptr + (K * K - 1 - t if FLIP else t) * channels
        taps = taps + (tl.load(at + channel, inside, other=0.0),)
    return taps


@triton.jit
def repeated(value, COUNT: tl.constexpr):
    """``value`` COUNT times."""
    values = ()
    for _ in tl.static_range(COUNT):
        values = values + (value,)
    return values


@triton.jit
def slice_of(values, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """COUNT values from FIRST on."""
    part = ()
    for i in tl.static_range(FIRST, FIRST + COUNT):
        part = part + (values[i],)
    return part


@triton.jit
def scatter(ring, start, row, taps, K: tl.constexpr, OUT: tl.constexpr):
    """The sums of K output rows, the last of them just begun, with what a row adds to each."""
    sums = ()
    for j in tl.static_range(K):
        for o in tl.static_range(OUT):
            if j < K - 1:
                total = ring[j * OUT + o]
            else:
                total = start
            for i in tl.static_range(K):
                total = tl.fma(row[o + i], taps[(K - 1 - j) * K + i], total)
            sums = sums + (total,)
    return sums


@triton.jit
def between(row, first, last, width):
    """``width`` in these rows, 0 in others."""
    return tl.where((row >= first) & (row < last), width, 0)


@triton.jit
def write(place, row, sums, column, inside, width, FIRST: tl.constexpr, OUT: tl.constexpr, EVEN: tl.constexpr):
    """OUT sums from FIRST on, rounded, into that row; ``width`` 0: not at all."""
    at, row_step, column_step = place
    at += row * row_step
    for o in tl.static_range(OUT):
        mask = exists(column, inside, width, o, OUT, False, EVEN)
        tl.store(at + o * column_step, sums[FIRST + o].to(at.dtype.element_ty), mask)


@triton.jit
def clear(place, registers, column, group, inside, GROUPS: tl.constexpr):
    """0 into the register rows, which lie in front of the image's."""
    at, _, column_step = place
    for first in tl.range(0, registers, GROUPS):
        row = first + group
        nothing = tl.zeros_like(inside).to(at.dtype.element_ty)
        tl.store(at + (row - registers - column) * column_step, nothing, inside & (row < registers))


@triton.jit
def correlate(dweight, x, dy, K: tl.constexpr, OUT: tl.constexpr):
    """The taps' gradients and what a row of dy adds to them, x being the K rows around it."""
    sums = ()
    for j in tl.static_range(K):
        for i in tl.static_range(K):
            total = dweight[j * K + i]
            for o in tl.static_range(OUT):
                total = tl.fma(x[j * OUT + o], dy[o + K - 1 - i], total)
            sums = sums + (total,)
    return sums


@triton.jit
def over_groups(values, GROUPS: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr):
    """Their sum over the groups, one for each channel of the block."""
    if COLUMNS:
        return tl.sum(tl.reshape(values, [BLOCK, GROUPS]), 1)
    else:
        return tl.sum(tl.reshape(values, [GROUPS, BLOCK]), 0)
