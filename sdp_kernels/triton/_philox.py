"""Philox4x32-10 (Salmon et al., 2011) on uint32, word for word what sdp_kernels/reference/philox.py draws."""

import triton
import triton.language as tl

STREAMS = 4
"""Of a layer; a mask's last counter is layer · 4 + stream."""


def threshold_and_scale(rate: float) -> tuple[int, float]:
    """What a kernel needs of a dropout rate: words below the first are dropped, what is kept is multiplied by the
    second; (0, 1) where nothing is dropped."""
    return min(round(rate * 2**32), 2**32 - 1), 1 / (1 - rate)


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """The four words of each counter (c0, c1, c2, c3), all uint32, under the key (k0, k1)."""
    for _ in tl.static_range(10):
        high0 = tl.umulhi(c0, 0xD2511F53)
        high1 = tl.umulhi(c2, 0xCD9E8D57)
        low0 = c0 * 0xD2511F53
        low1 = c2 * 0xCD9E8D57
        c0 = high1 ^ c1 ^ k0
        c1 = low1
        c2 = high0 ^ c3 ^ k1
        c3 = low0
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def factors(
    rng_ptr, place, sample, row, first, length, threshold, scale,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, QUADS: tl.constexpr,
):  # fmt: skip
    """0 or ``scale`` (fp32) for [ROWS, COLUMNS] elements: columns from ``first`` on of the rows ``row`` of samples
    ``sample`` (each a vector or a scalar), a row being ``length`` elements of its sample.

    QUADS: length and first are multiples of 4, so that one draw serves four elements side by side.
    """
    seed = tl.load(rng_ptr)
    k0 = seed.to(tl.uint32)
    k1 = (seed >> 32).to(tl.uint32)
    step = tl.load(rng_ptr + 1).to(tl.uint32)
    sample = (tl.load(rng_ptr + 2) + sample).to(tl.uint32)
    nothing = tl.zeros([ROWS, COLUMNS // 4 if QUADS else COLUMNS], tl.uint32)
    c1 = sample[:, None] + nothing
    c2 = step + nothing
    c3 = place.to(tl.uint32) + nothing
    threshold = threshold.to(tl.uint32)
    if QUADS:
        quad = (first // 4 + tl.arange(0, COLUMNS // 4)).to(tl.uint32)
        c0 = row.to(tl.uint32)[:, None] * (length // 4).to(tl.uint32) + quad[None, :]
        w0, w1, w2, w3 = philox(c0, c1, c2, c3, k0, k1)
        pairs = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [..., 2 · (word // 2) + …]: words in order when flattened
        word = tl.reshape(pairs, [ROWS, COLUMNS])
    else:
        position = row.to(tl.int64)[:, None] * length + (first + tl.arange(0, COLUMNS))[None, :]
        c0 = (position // 4).to(tl.uint32)
        w0, w1, w2, w3 = philox(c0, c1, c2, c3, k0, k1)
        which = (position % 4).to(tl.int32)
        word = tl.where(which < 2, tl.where(which == 0, w0, w1), tl.where(which == 2, w2, w3))
    return tl.where(word >= threshold, scale, 0.0)
