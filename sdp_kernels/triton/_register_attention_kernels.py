"""The kernels of attention over register and image tokens, and nothing of their launch (that is register_attention.py).

A head's d columns are a tile of LOW and, unless that is 0, one of HIGH columns beside it, both powers of two: d = 96 as
64 + 32. A program has a block of one head's queries (or keys) and goes over blocks of all keys (queries) in order: no
atomics, and a row's sums depend on nothing but its own sample. q and k are normalised as they are loaded, rounded as
the reference rounds them; weights and sums are in ACC. BY divides all strides but the columns', which wide loads need.
"""

import triton
import triton.language as tl

from ._linear_kernels import multiple
from ._philox import factors

_SIZES = ["tokens", "heads", "registers", "eps", "threshold", "drop_scale", "place", "programs"]
_STRIDES = [f"{tensor}_{step}" for tensor in "xgy" for step in ("batch", "token", "which", "head")]
LOG2E = tl.constexpr(1.4426950408889634)


def _jit(function):
    """Compile one variant for all sizes and strides, so that results can't depend on the batch through them."""
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    return triton.jit(function, do_not_specialize=[name for name in (*_SIZES, *_STRIDES) if name in names])


@triton.jit
def _parts(ptr, across, exists, D: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr):
    """Two tiles of the rows that start at the pointers ``ptr``: columns 0 to LOW and LOW to LOW + HIGH."""
    column = tl.arange(0, LOW)
    low = tl.load(ptr[:, None] + (column * across)[None, :], exists[:, None] & (column < D)[None, :], other=0.0)
    high = low
    if HIGH > 0:
        column = LOW + tl.arange(0, HIGH)
        high = tl.load(ptr[:, None] + (column * across)[None, :], exists[:, None] & (column < D)[None, :], other=0.0)
    return low, high


@triton.jit
def _parameter(ptr, step, D: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, ACC: tl.constexpr):
    """The two parts of a norm's weight or bias, [1, columns]."""
    column = tl.arange(0, LOW)
    low = tl.load(ptr + column * step, column < D, other=0.0).to(ACC)[None, :]
    high = low
    if HIGH > 0:
        column = LOW + tl.arange(0, HIGH)
        high = tl.load(ptr + column * step, column < D, other=0.0).to(ACC)[None, :]
    return low, high


@triton.jit
def _row_sums(low, high, HIGH: tl.constexpr):
    total = tl.sum(low, 1)
    if HIGH > 0:
        total += tl.sum(high, 1)
    return total


@triton.jit
def _standardise(low, high, eps, D: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr):
    """(x − mean) · rstd in both parts, 0 beyond D, and rstd."""
    mean = _row_sums(low, high, HIGH) / D
    low = tl.where((tl.arange(0, LOW) < D)[None, :], low - mean[:, None], 0.0)
    if HIGH > 0:
        high = tl.where((LOW + tl.arange(0, HIGH) < D)[None, :], high - mean[:, None], 0.0)
    rstd = tl.rsqrt(_row_sums(low * low, high * high, HIGH) / D + eps)
    return low * rstd[:, None], high * rstd[:, None], rstd


@triton.jit
def _normed_wide(
    ptr, across, exists, weight_ptr, bias_ptr, weight_step, bias_step, eps,
    D: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """q or k of some rows, normalised in ACC if there is a norm; else as they are."""
    low, high = _parts(ptr, across, exists, D, LOW, HIGH)
    if weight_ptr is None:
        return low, high
    else:
        unit_low, unit_high, _ = _standardise(low.to(ACC), high.to(ACC), eps, D, LOW, HIGH)
        weight_low, weight_high = _parameter(weight_ptr, weight_step, D, LOW, HIGH, ACC)
        bias_low, bias_high = _parameter(bias_ptr, bias_step, D, LOW, HIGH, ACC)
        return unit_low * weight_low + bias_low, unit_high * weight_high + bias_high


@triton.jit
def _normed(
    ptr, across, exists, weight_ptr, bias_ptr, weight_step, bias_step, eps,
    D: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """:func:`_normed_wide`, rounded to the rows' own dtype."""
    low, high = _normed_wide(
        ptr, across, exists, weight_ptr, bias_ptr, weight_step, bias_step, eps, D, LOW, HIGH, ACC
    )  # fmt: skip
    return low.to(ptr.dtype.element_ty), high.to(ptr.dtype.element_ty)


@triton.jit
def _dot(left_low, left_high, right_low, right_high, HIGH: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr):
    """left · rightᵀ over both parts."""
    total = tl.dot(left_low, tl.trans(right_low), input_precision=PRECISION, out_dtype=ACC)
    if HIGH > 0:
        total = tl.dot(left_high, tl.trans(right_high), total, input_precision=PRECISION, out_dtype=ACC)
    return total


@triton.jit
def _readable(query, key, tokens, registers, ATTEND: tl.constexpr):
    """Whether ``query`` may read ``key``, of shapes that broadcast."""
    allowed = (query < tokens) & (key < tokens)
    if ATTEND == "image_to_image" or ATTEND == "separate":
        allowed = allowed & ((query < registers) | (key >= registers))
    if ATTEND == "registers_to_registers" or ATTEND == "separate":
        allowed = allowed & ((query >= registers) | (key < registers))
    return allowed


@triton.jit
def _place(tokens, heads, BLOCK: tl.constexpr):
    """(sample as int64, head, the tokens of this program's block)."""
    blocks = tl.cdiv(tokens, BLOCK)
    program = tl.program_id(0)
    sample = (program // (blocks * heads)).to(tl.int64)
    return sample, (program // blocks) % heads, (program % blocks) * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def _rows(ptr, sample, head, token, batch, step, head_step, BY: tl.constexpr):
    """Pointers to the rows of ``token`` in one head."""
    ptr += sample * multiple(batch, BY) + head * multiple(head_step, BY).to(tl.int64)
    return ptr + token.to(tl.int64) * multiple(step, BY)


@triton.jit
def _kept(
    rng_ptr, place, sample, head, query, first, tokens, threshold, drop_scale,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, QUADS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Dropout's factors [queries, keys]; a sample's positions are (head, query, key) row-major."""
    samples = sample.to(tl.int32) + tl.zeros([QUERIES], tl.int32)
    row = head.to(tl.int64) * tokens + query
    return factors(rng_ptr, place, samples, row, first, tokens, threshold, drop_scale, QUERIES, KEYS, QUADS).to(ACC)


@triton.jit
def _store(
    ptr, across, exists, low, high, D: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr
):  # fmt: skip
    kind = ptr.dtype.element_ty
    column = tl.arange(0, LOW)
    inside = exists[:, None] & (column < D)[None, :]
    tl.store(ptr[:, None] + (column * across)[None, :], low.to(kind), inside)
    if HIGH > 0:
        column = LOW + tl.arange(0, HIGH)
        inside = exists[:, None] & (column < D)[None, :]
        tl.store(ptr[:, None] + (column * across)[None, :], high.to(kind), inside)


@_jit
def forward(
    qkv_ptr, q_weight_ptr, q_bias_ptr, k_weight_ptr, k_bias_ptr, rng_ptr, y_ptr, lse_ptr,
    tokens, heads, registers, eps, threshold, drop_scale, place, q_weight_step, q_bias_step, k_weight_step, k_bias_step,
    x_batch, x_token, x_which, x_head, x_column,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr, D: tl.constexpr, LOW: tl.constexpr,
    HIGH: tl.constexpr, SCALE: tl.constexpr, ATTEND: tl.constexpr, DROPOUT: tl.constexpr, QUADS: tl.constexpr,
    BY: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """y (B, T, h · d) and lse (B, h, T); running maximum and sum over the blocks of keys."""
    sample, head, query = _place(tokens, heads, QUERIES)
    exists = query < tokens
    x_which = multiple(x_which, BY).to(tl.int64)
    q_low, q_high = _normed(
        _rows(qkv_ptr, sample, head, query, x_batch, x_token, x_head, BY), x_column, exists,
        q_weight_ptr, q_bias_ptr, q_weight_step, q_bias_step, eps, D, LOW, HIGH, ACC,
    )  # fmt: skip
    kind = qkv_ptr.dtype.element_ty
    most = tl.full([QUERIES], float("-inf"), ACC)
    total = tl.zeros([QUERIES], ACC)
    y_low = tl.zeros([QUERIES, LOW], ACC)
    y_high = tl.zeros([QUERIES, HIGH if HIGH > 0 else LOW], ACC)
    for first in tl.range(0, tokens, KEYS, num_stages=STAGES):
        key = first + tl.arange(0, KEYS)
        k_ptr = _rows(qkv_ptr + x_which, sample, head, key, x_batch, x_token, x_head, BY)
        k_low, k_high = _normed(
            k_ptr, x_column, key < tokens, k_weight_ptr, k_bias_ptr, k_weight_step, k_bias_step, eps, D, LOW, HIGH, ACC
        )
        scores = _dot(q_low, q_high, k_low, k_high, HIGH, PRECISION, ACC) * (SCALE * LOG2E)
        allowed = _readable(query[:, None], key[None, :], tokens, registers, ATTEND)
        scores = tl.where(allowed, scores, float("-inf"))
        higher = tl.maximum(most, tl.max(scores, 1))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(scores - shift[:, None])
        faded = tl.exp2(most - shift)
        total = total * faded + tl.sum(weights, 1)
        most = higher
        if DROPOUT:
            weights *= _kept(
                rng_ptr, place, sample, head, query, first, tokens, threshold, drop_scale, QUERIES, KEYS, QUADS, ACC
            )
        v_low, v_high = _parts(k_ptr + x_which, x_column, key < tokens, D, LOW, HIGH)
        y_low = tl.dot(weights.to(kind), v_low, y_low * faded[:, None], input_precision=PRECISION, out_dtype=ACC)
        if HIGH > 0:
            y_high = tl.dot(weights.to(kind), v_high, y_high * faded[:, None], input_precision=PRECISION, out_dtype=ACC)
    scaled = tl.where(exists, 1.0 / total, 0.0)[:, None]
    y_at = y_ptr + (((sample * tokens + query) * heads) + head) * D
    _store(y_at, 1, exists, y_low * scaled, y_high * scaled, D, LOW, HIGH)
    lse = (most + tl.log2(total)) * 0.6931471805599453
    tl.store(lse_ptr + (sample * heads + head) * tokens + query, lse, exists)


@triton.jit
def _norm_backward(
    ptr, across, exists, low, high, weight_ptr, weight_step, eps,
    D: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The gradient of the rows at ``ptr`` from that of their norm's result, (low, high), in two parts, and the sums
    over these rows of the weight's and the bias's gradients, in two parts each; without a norm what came in."""
    if weight_ptr is None:
        return low, high, (low, high, low, high)
    else:
        x_low, x_high = _parts(ptr, across, exists, D, LOW, HIGH)
        unit_low, unit_high, rstd = _standardise(x_low.to(ACC), x_high.to(ACC), eps, D, LOW, HIGH)
        weight_low, weight_high = _parameter(weight_ptr, weight_step, D, LOW, HIGH, ACC)
        low = tl.where(exists[:, None], low, 0.0)
        high = tl.where(exists[:, None], high, 0.0)
        sums = (tl.sum(low * unit_low, 0), tl.sum(high * unit_high, 0), tl.sum(low, 0), tl.sum(high, 0))
        low *= weight_low
        high *= weight_high
        mean = (_row_sums(low, high, HIGH) / D)[:, None]
        slope = (_row_sums(low * unit_low, high * unit_high, HIGH) / D)[:, None]
        low = (low - mean - unit_low * slope) * rstd[:, None]
        high = (high - mean - unit_high * slope) * rstd[:, None]
        return low, high, sums


@triton.jit
def _store_sums(ptr, programs, sums, D: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr):
    """This program's row of the partial sums (2, programs, D) of a norm's weight and bias."""
    at = ptr + tl.program_id(0).to(tl.int64) * D
    bias_at = at + programs.to(tl.int64) * D
    column = tl.arange(0, LOW)
    tl.store(at + column, sums[0], column < D)
    tl.store(bias_at + column, sums[2], column < D)
    if HIGH > 0:
        column = LOW + tl.arange(0, HIGH)
        tl.store(at + column, sums[1], column < D)
        tl.store(bias_at + column, sums[3], column < D)


@triton.jit
def _through_norm(
    ptr, across, exists, low, high, weight_ptr, weight_step, eps, out, out_across, partial_ptr, programs,
    D: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Writes what :func:`_norm_backward` returns, the sums as this program's partial ones."""
    low, high, sums = _norm_backward(
        ptr, across, exists, low, high, weight_ptr, weight_step, eps, D, LOW, HIGH, ACC
    )  # fmt: skip
    if weight_ptr is not None:
        _store_sums(partial_ptr, programs, sums, D, LOW, HIGH)
    _store(out, out_across, exists, low, high, D, LOW, HIGH)


@_jit
def backward_queries(
    grad_ptr, qkv_ptr, y_ptr, lse_ptr, q_weight_ptr, q_bias_ptr, k_weight_ptr, k_bias_ptr, rng_ptr, dqkv_ptr,
    partial_ptr,
    tokens, heads, registers, eps, threshold, drop_scale, place, programs,
    q_weight_step, q_bias_step, k_weight_step, k_bias_step,
    g_batch, g_token, g_head, g_column, y_batch, y_token, y_head, y_column,
    x_batch, x_token, x_which, x_head, x_column,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr, D: tl.constexpr, LOW: tl.constexpr,
    HIGH: tl.constexpr, SCALE: tl.constexpr, ATTEND: tl.constexpr, DROPOUT: tl.constexpr, QUADS: tl.constexpr,
    BY: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dq of a block of queries, over the keys; dqkv is contiguous."""
    sample, head, query = _place(tokens, heads, QUERIES)
    exists = query < tokens
    x_which = multiple(x_which, BY).to(tl.int64)
    kind = qkv_ptr.dtype.element_ty
    q_ptr = _rows(qkv_ptr, sample, head, query, x_batch, x_token, x_head, BY)
    q_low, q_high = _normed(
        q_ptr, x_column, exists, q_weight_ptr, q_bias_ptr, q_weight_step, q_bias_step, eps, D, LOW, HIGH, ACC
    )
    g_low, g_high = _parts(
        _rows(grad_ptr, sample, head, query, g_batch, g_token, g_head, BY), g_column, exists, D, LOW, HIGH
    )
    y_low, y_high = _parts(
        _rows(y_ptr, sample, head, query, y_batch, y_token, y_head, BY), y_column, exists, D, LOW, HIGH
    )
    delta = _row_sums(g_low.to(ACC) * y_low.to(ACC), g_high.to(ACC) * y_high.to(ACC), HIGH)
    lse = tl.load(lse_ptr + (sample * heads + head) * tokens + query, exists, other=float("inf")) * LOG2E
    dq_low = tl.zeros([QUERIES, LOW], ACC)
    dq_high = tl.zeros([QUERIES, HIGH if HIGH > 0 else LOW], ACC)
    beyond = 0
    for first in tl.range(0, tokens, KEYS, num_stages=STAGES, disable_licm=True):
        beyond = first >> 30  # 0, but the compiler can't tell: pointers are made again after the loop, not kept
        key = first + tl.arange(0, KEYS)
        k_ptr = _rows(qkv_ptr + x_which, sample, head, key, x_batch, x_token, x_head, BY)
        k_low, k_high = _normed(
            k_ptr, x_column, key < tokens, k_weight_ptr, k_bias_ptr, k_weight_step, k_bias_step, eps, D, LOW, HIGH, ACC
        )
        scores = _dot(q_low, q_high, k_low, k_high, HIGH, PRECISION, ACC) * (SCALE * LOG2E)
        allowed = _readable(query[:, None], key[None, :], tokens, registers, ATTEND)
        weights = tl.where(allowed, tl.exp2(scores - lse[:, None]), 0.0)
        v_low, v_high = _parts(k_ptr + x_which, x_column, key < tokens, D, LOW, HIGH)
        dweights = _dot(g_low, g_high, v_low, v_high, HIGH, PRECISION, ACC)
        if DROPOUT:
            dweights *= _kept(
                rng_ptr, place, sample, head, query, first, tokens, threshold, drop_scale, QUERIES, KEYS, QUADS, ACC
            )
        dscores = (weights * (dweights - delta[:, None])).to(kind)
        dq_low = tl.dot(dscores, k_low, dq_low, input_precision=PRECISION, out_dtype=ACC)
        if HIGH > 0:
            dq_high = tl.dot(dscores, k_high, dq_high, input_precision=PRECISION, out_dtype=ACC)
    query += beyond
    q_ptr = _rows(qkv_ptr, sample, head, query, x_batch, x_token, x_head, BY)
    exists = query < tokens
    out = dqkv_ptr + (((sample * tokens + query) * 3) * heads + head) * D
    _through_norm(
        q_ptr, x_column, exists, dq_low * SCALE, dq_high * SCALE, q_weight_ptr, q_weight_step, eps, out, 1,
        partial_ptr, programs, D, LOW, HIGH, ACC,
    )  # fmt: skip


@_jit
def backward_keys(
    grad_ptr, qkv_ptr, y_ptr, lse_ptr, q_weight_ptr, q_bias_ptr, k_weight_ptr, k_bias_ptr, rng_ptr, dqkv_ptr,
    partial_ptr,
    tokens, heads, registers, eps, threshold, drop_scale, place, programs,
    q_weight_step, q_bias_step, k_weight_step, k_bias_step,
    g_batch, g_token, g_head, g_column, y_batch, y_token, y_head, y_column,
    x_batch, x_token, x_which, x_head, x_column,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr, D: tl.constexpr, LOW: tl.constexpr,
    HIGH: tl.constexpr, SCALE: tl.constexpr, ATTEND: tl.constexpr, DROPOUT: tl.constexpr, QUADS: tl.constexpr,
    BY: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dk and dv of a block of keys, over the queries; scores stand transposed, [keys, queries]."""
    sample, head, key = _place(tokens, heads, KEYS)
    exists = key < tokens
    x_which = multiple(x_which, BY).to(tl.int64)
    kind = qkv_ptr.dtype.element_ty
    k_ptr = _rows(qkv_ptr + x_which, sample, head, key, x_batch, x_token, x_head, BY)
    k_low, k_high = _normed(
        k_ptr, x_column, exists, k_weight_ptr, k_bias_ptr, k_weight_step, k_bias_step, eps, D, LOW, HIGH, ACC
    )
    v_low, v_high = _parts(k_ptr + x_which, x_column, exists, D, LOW, HIGH)
    dk_low = tl.zeros([KEYS, LOW], ACC)
    dk_high = tl.zeros([KEYS, HIGH if HIGH > 0 else LOW], ACC)
    dv_low = tl.zeros([KEYS, LOW], ACC)
    dv_high = tl.zeros([KEYS, HIGH if HIGH > 0 else LOW], ACC)
    beyond = 0
    for first in tl.range(0, tokens, QUERIES, num_stages=STAGES, disable_licm=True):
        beyond = first >> 30  # as above
        query = first + tl.arange(0, QUERIES)
        there = query < tokens
        q_low, q_high = _normed(
            _rows(qkv_ptr, sample, head, query, x_batch, x_token, x_head, BY), x_column, there,
            q_weight_ptr, q_bias_ptr, q_weight_step, q_bias_step, eps, D, LOW, HIGH, ACC,
        )  # fmt: skip
        lse = tl.load(lse_ptr + (sample * heads + head) * tokens + query, there, other=float("inf")) * LOG2E
        scores = _dot(k_low, k_high, q_low, q_high, HIGH, PRECISION, ACC) * (SCALE * LOG2E)
        allowed = _readable(query[None, :], key[:, None], tokens, registers, ATTEND)
        weights = tl.where(allowed, tl.exp2(scores - lse[None, :]), 0.0)
        g_low, g_high = _parts(
            _rows(grad_ptr, sample, head, query, g_batch, g_token, g_head, BY), g_column, there, D, LOW, HIGH
        )
        y_low, y_high = _parts(
            _rows(y_ptr, sample, head, query, y_batch, y_token, y_head, BY), y_column, there, D, LOW, HIGH
        )
        delta = _row_sums(g_low.to(ACC) * y_low.to(ACC), g_high.to(ACC) * y_high.to(ACC), HIGH)
        dweights = _dot(v_low, v_high, g_low, g_high, HIGH, PRECISION, ACC)
        dropped = weights
        if DROPOUT:
            kept = tl.trans(_kept(
                rng_ptr, place, sample, head, query, tl.min(key, 0), tokens, threshold, drop_scale, QUERIES, KEYS,
                QUADS, ACC,
            ))  # fmt: skip
            dropped = weights * kept
            dweights *= kept
        dv_low = tl.dot(dropped.to(kind), g_low, dv_low, input_precision=PRECISION, out_dtype=ACC)
        dscores = (weights * (dweights - delta[None, :])).to(kind)
        dk_low = tl.dot(dscores, q_low, dk_low, input_precision=PRECISION, out_dtype=ACC)
        if HIGH > 0:
            dv_high = tl.dot(dropped.to(kind), g_high, dv_high, input_precision=PRECISION, out_dtype=ACC)
            dk_high = tl.dot(dscores, q_high, dk_high, input_precision=PRECISION, out_dtype=ACC)
    key += beyond
    k_ptr = _rows(qkv_ptr + x_which, sample, head, key, x_batch, x_token, x_head, BY)
    exists = key < tokens
    out = dqkv_ptr + (((sample * tokens + key) * 3 + 1) * heads + head) * D
    _store(out + heads * D, 1, exists, dv_low, dv_high, D, LOW, HIGH)
    _through_norm(
        k_ptr, x_column, exists, dk_low * SCALE, dk_high * SCALE, k_weight_ptr, k_weight_step, eps, out, 1,
        partial_ptr, programs, D, LOW, HIGH, ACC,
    )  # fmt: skip
