"""Attention's kernels for few tokens: all of a head is on chip, and every row is normalised once where it is used.

Forward has the keys and values of a head in shared memory and a block of queries' scores for all of them in registers,
so that the softmax needs no running maximum. Backward has all queries and their gradients in shared memory and dq in
registers, while keys and values come by once, a block at a time: five products per pair of blocks, no atomics and no
exchange between programs. What stays is a tuple of tiles, since a tile's rows are a power of two: PARTS are their rows
(261 tokens: 16 + 4 · 64), STARTS their first tokens. Tuples are unrolled; the loops over blocks are not, and nothing is
hoisted from them: it would be kept in registers that a head needs.
"""

import triton
import triton.language as tl

from ._linear_kernels import multiple
from ._register_attention_kernels import (
    LOG2E,
    _dot,
    _jit,
    _norm_backward,
    _normed,
    _normed_wide,
    _parts,
    _readable,
    _row_sums,
    _rows,
    _store,
    _store_sums,
)


@triton.jit
def _nothing(ROWS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, ACC: tl.constexpr):
    return tl.zeros([ROWS, LOW], ACC), tl.zeros([ROWS, HIGH if HIGH > 0 else LOW], ACC)


@triton.jit
def _limited(
    scores, query, tokens, registers, START: tl.constexpr, SIZE: tl.constexpr, CUT: tl.constexpr, ATTEND: tl.constexpr
):
    """scores [queries, SIZE] of the keys from START on, −∞ where the query may not read; CUT: some may not exist."""
    key = (START + tl.arange(0, SIZE))[None, :]
    query = query[:, None]
    if CUT:
        scores = tl.where(key < tokens, scores, float("-inf"))
    if ATTEND == "image_to_image" or ATTEND == "separate":
        scores = tl.where((query < registers) | (key >= registers), scores, float("-inf"))
    if ATTEND == "registers_to_registers" or ATTEND == "separate":
        scores = tl.where((query >= registers) | (key < registers), scores, float("-inf"))
    return scores


@_jit
def forward(
    qkv_ptr, q_weight_ptr, q_bias_ptr, k_weight_ptr, k_bias_ptr, y_ptr, lse_ptr,
    tokens, heads, registers, eps, programs,
    q_weight_step, q_bias_step, k_weight_step, k_bias_step,
    x_batch, x_token, x_which, x_head, x_column,
    QUERIES: tl.constexpr, PARTS: tl.constexpr, STARTS: tl.constexpr, D: tl.constexpr, LOW: tl.constexpr,
    HIGH: tl.constexpr, SCALE: tl.constexpr, ATTEND: tl.constexpr, BY: tl.constexpr, PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """y (B, T, h · d) and lse (B, h, T); ``programs`` of them share the blocks of queries of a head."""
    row = tl.program_id(0) // programs
    sample = (row // heads).to(tl.int64)
    head = row % heads
    x_which = multiple(x_which, BY).to(tl.int64)
    kind = qkv_ptr.dtype.element_ty
    keys = ()
    values = ()
    for i in tl.static_range(len(PARTS)):
        key = STARTS[i] + tl.arange(0, PARTS[i])
        there = key < tokens
        k_ptr = _rows(qkv_ptr + x_which, sample, head, key, x_batch, x_token, x_head, BY)
        pair = _normed(
            k_ptr, x_column, there, k_weight_ptr, k_bias_ptr, k_weight_step, k_bias_step, eps, D, LOW, HIGH, ACC
        )
        keys += (pair,)
        values += (_parts(k_ptr + x_which, x_column, there, D, LOW, HIGH),)
    begin = (tl.program_id(0) % programs) * QUERIES
    for first in tl.range(begin, tokens, programs * QUERIES, num_stages=1, disable_licm=True):
        query = first + tl.arange(0, QUERIES)
        exists = query < tokens
        q_low, q_high = _normed_wide(
            _rows(qkv_ptr, sample, head, query, x_batch, x_token, x_head, BY), x_column, exists,
            q_weight_ptr, q_bias_ptr, q_weight_step, q_bias_step, eps, D, LOW, HIGH, ACC,
        )  # fmt: skip
        scores = ()
        q_low = q_low.to(kind)  # the high part only when this one has left shared memory: so two programs fit there
        for i in tl.static_range(len(PARTS)):
            scores += (tl.dot(q_low, tl.trans(keys[i][0]), input_precision=PRECISION, out_dtype=ACC),)
        if HIGH > 0:
            wider = ()
            q_high = q_high.to(kind)
            for i in tl.static_range(len(PARTS)):
                k_high = tl.trans(keys[i][1])
                wider += (tl.dot(q_high, k_high, scores[i], input_precision=PRECISION, out_dtype=ACC),)
            scores = wider
        most = tl.full([QUERIES], float("-inf"), ACC)
        limited = ()
        for i in tl.static_range(len(PARTS)):
            part = scores[i] * (SCALE * LOG2E)
            part = _limited(part, query, tokens, registers, STARTS[i], PARTS[i], i + 1 == len(PARTS), ATTEND)
            most = tl.maximum(most, tl.max(part, 1))
            limited += (part,)
        shift = tl.where(most == float("-inf"), 0.0, most)
        total = tl.zeros([QUERIES], ACC)
        y_low, y_high = _nothing(QUERIES, LOW, HIGH, ACC)
        for i in tl.static_range(len(PARTS)):
            weights = tl.exp2(limited[i] - shift[:, None])
            total += tl.sum(weights, 1)
            v_low, v_high = values[i]
            y_low = tl.dot(weights.to(kind), v_low, y_low, input_precision=PRECISION, out_dtype=ACC)
            if HIGH > 0:
                y_high = tl.dot(weights.to(kind), v_high, y_high, input_precision=PRECISION, out_dtype=ACC)
        scaled = tl.where(exists, 1.0 / total, 0.0)[:, None]
        y_at = y_ptr + (sample * tokens * heads + head) * D + query * (heads * D)
        _store(y_at, 1, exists, y_low * scaled, y_high * scaled, D, LOW, HIGH)
        lse = (most + tl.log2(total)) * 0.6931471805599453
        tl.store(lse_ptr + (sample * heads + head) * tokens + query, lse, exists)


@_jit
def backward(
    grad_ptr, qkv_ptr, y_ptr, lse_ptr, q_weight_ptr, q_bias_ptr, k_weight_ptr, k_bias_ptr, dqkv_ptr,
    q_partial_ptr, k_partial_ptr,
    tokens, heads, registers, eps, programs,
    q_weight_step, q_bias_step, k_weight_step, k_bias_step,
    g_batch, g_token, g_head, g_column, y_batch, y_token, y_head, y_column,
    x_batch, x_token, x_which, x_head, x_column,
    KEYS: tl.constexpr, PARTS: tl.constexpr, STARTS: tl.constexpr, D: tl.constexpr, LOW: tl.constexpr,
    HIGH: tl.constexpr, SCALE: tl.constexpr, ATTEND: tl.constexpr, BY: tl.constexpr, PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """dqkv (contiguous) of one head, and its partial sums (2, programs, D) of either norm's gradients."""
    sample = (tl.program_id(0) // heads).to(tl.int64)
    head = tl.program_id(0) % heads
    x_which = multiple(x_which, BY).to(tl.int64)
    kind = qkv_ptr.dtype.element_ty
    queries = ()
    grads = ()
    logs = ()
    deltas = ()
    dqs = ()
    for i in tl.static_range(len(PARTS)):
        query = STARTS[i] + tl.arange(0, PARTS[i])
        exists = query < tokens
        q_ptr = _rows(qkv_ptr, sample, head, query, x_batch, x_token, x_head, BY)
        pair = _normed(
            q_ptr, x_column, exists, q_weight_ptr, q_bias_ptr, q_weight_step, q_bias_step, eps, D, LOW, HIGH, ACC
        )
        g_ptr = _rows(grad_ptr, sample, head, query, g_batch, g_token, g_head, BY)
        g_low, g_high = _parts(g_ptr, g_column, exists, D, LOW, HIGH)
        at = _rows(y_ptr, sample, head, query, y_batch, y_token, y_head, BY)
        y_low, y_high = _parts(at, y_column, exists, D, LOW, HIGH)
        lse = tl.load(lse_ptr + (sample * heads + head) * tokens + query, exists, other=float("inf")) * LOG2E
        queries += (pair,)
        grads += ((g_low, g_high),)
        logs += (lse,)
        deltas += (_row_sums(g_low.to(ACC) * y_low.to(ACC), g_high.to(ACC) * y_high.to(ACC), HIGH),)
        dqs += (_nothing(PARTS[i], LOW, HIGH, ACC),)
    nothing_low = tl.zeros([LOW], ACC)
    nothing_high = tl.zeros([HIGH if HIGH > 0 else LOW], ACC)
    sums = (nothing_low, nothing_high, nothing_low, nothing_high)
    beyond = 0
    for first in tl.range(0, tokens, KEYS, num_stages=1, disable_licm=True):
        beyond = first >> 20  # 0, but the compiler can't tell: pointers to q are made again after the loop, not kept
        key = first + tl.arange(0, KEYS)
        there = key < tokens
        k_ptr = _rows(qkv_ptr + x_which, sample, head, key, x_batch, x_token, x_head, BY)
        k_low, k_high = _normed(
            k_ptr, x_column, there, k_weight_ptr, k_bias_ptr, k_weight_step, k_bias_step, eps, D, LOW, HIGH, ACC
        )
        v_low, v_high = _parts(k_ptr + x_which, x_column, there, D, LOW, HIGH)
        # −dk and −dv: a product that is added to would be chained to the next one, and a chain of products of 64 rows
        # is computed by each group of four warps for itself. Chained are only those that have 128 rows.
        dk_low, dk_high = _nothing(KEYS, LOW, HIGH, ACC)
        dv_low, dv_high = _nothing(KEYS, LOW, HIGH, ACC)
        grown = ()
        for i in tl.static_range(len(PARTS)):
            query = STARTS[i] + tl.arange(0, PARTS[i])
            q_low, q_high = queries[i]
            g_low, g_high = grads[i]
            dq_low, dq_high = dqs[i]
            scores = _dot(q_low, q_high, k_low, k_high, HIGH, PRECISION, ACC) * (SCALE * LOG2E)
            allowed = _readable(query[:, None], key[None, :], tokens, registers, ATTEND)
            weights = tl.where(allowed, tl.exp2(scores - logs[i][:, None]), 0.0)
            turned = tl.trans(weights.to(kind))
            dv_low -= tl.dot(turned, g_low, input_precision=PRECISION, out_dtype=ACC)
            if HIGH > 0:
                dv_high -= tl.dot(turned, g_high, input_precision=PRECISION, out_dtype=ACC)
            dweights = _dot(g_low, g_high, v_low, v_high, HIGH, PRECISION, ACC)
            dscores = (weights * (dweights - deltas[i][:, None])).to(kind)
            back = tl.trans(dscores)
            dk_low -= tl.dot(back, q_low, input_precision=PRECISION, out_dtype=ACC)
            dq_low = tl.dot(dscores, k_low, dq_low, input_precision=PRECISION, out_dtype=ACC)
            if HIGH > 0:
                dk_high -= tl.dot(back, q_high, input_precision=PRECISION, out_dtype=ACC)
                dq_high = tl.dot(dscores, k_high, dq_high, input_precision=PRECISION, out_dtype=ACC)
            grown += ((dq_low, dq_high),)
        dqs = grown
        out = dqkv_ptr + (((sample * tokens + key) * 3 + 1) * heads + head) * D
        _store(out + heads * D, 1, there, -dv_low, -dv_high, D, LOW, HIGH)
        dk_low, dk_high, more = _norm_backward(
            k_ptr, x_column, there, dk_low * -SCALE, dk_high * -SCALE, k_weight_ptr, k_weight_step, eps,
            D, LOW, HIGH, ACC,
        )  # fmt: skip
        _store(out, 1, there, dk_low, dk_high, D, LOW, HIGH)
        if k_weight_ptr is not None:
            sums = (sums[0] + more[0], sums[1] + more[1], sums[2] + more[2], sums[3] + more[3])
    if k_weight_ptr is not None:
        _store_sums(k_partial_ptr, programs, sums, D, LOW, HIGH)
    sums = (nothing_low, nothing_high, nothing_low, nothing_high)
    for i in tl.static_range(len(PARTS)):
        query = beyond + STARTS[i] + tl.arange(0, PARTS[i])
        exists = query < tokens
        q_ptr = _rows(qkv_ptr, sample, head, query, x_batch, x_token, x_head, BY)
        dq_low, dq_high, more = _norm_backward(
            q_ptr, x_column, exists, dqs[i][0] * SCALE, dqs[i][1] * SCALE, q_weight_ptr, q_weight_step, eps,
            D, LOW, HIGH, ACC,
        )  # fmt: skip
        out = dqkv_ptr + (((sample * tokens + query) * 3) * heads + head) * D
        _store(out, 1, exists, dq_low, dq_high, D, LOW, HIGH)
        if q_weight_ptr is not None:
            sums = (sums[0] + more[0], sums[1] + more[1], sums[2] + more[2], sums[3] + more[3])
    if q_weight_ptr is not None:
        _store_sums(q_partial_ptr, programs, sums, D, LOW, HIGH)
