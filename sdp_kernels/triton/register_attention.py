"""Attention over register and image tokens, q/k norms inside: geometry and launches.

Of the (T, T) weights nothing is written. Where the table has an entry for it and T is within its limit, all of a head
stays on chip: forward normalises each row once and needs no running maximum, backward is one kernel with five products
per pair of blocks. Else it is flash-style: forward goes over the keys for each block of queries; backward once over the
keys for dq and once over the queries for dk and dv, seven products, which is what no atomics cost there. Gradients of
the norms are partial sums, one row per program, added in their order.
"""

import math

import torch
import triton
from torch import Tensor

from . import _linear_kernels
from . import _register_attention_kernels as kernels
from . import _register_attention_short_kernels as short
from ._launch import ACCUMULATOR, configuration, launch, register
from ._philox import STREAMS, threshold_and_scale

OPERATOR = "register_attention"
ATTENTION_STREAM = 2


def head_tiles(d: int) -> tuple[int, int]:
    """(LOW, HIGH): powers of two from 16 on whose sum is at least d; HIGH is 0, or at most half of LOW."""
    low = max(16, 2 ** int(math.log2(d)))
    rest = d - low
    if rest <= 0:
        return low, 0
    high = max(16, triton.next_power_of_2(rest))
    return (low, high) if 2 * high <= low else (2 * low, 0)


def size(d: int) -> str:
    """The table's class of a head: in one tile or two."""
    return "d64" if d <= 64 else "d96" if head_tiles(d)[1] else "d128"


def precision(dtype: torch.dtype) -> str:
    """fp32 is multiplied as fp32, unless PyTorch was told that TF32 will do."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def divisor(d: int, *strides: tuple[int, ...]) -> int:
    """1, 2, 4 or 8: divides d and all strides but the columns'; 1 where a column stride is not 1."""
    if any(s[-1] != 1 for s in strides):
        return 1
    return math.gcd(8, d, *(n for s in strides for n in s[:-1]))


def steps(*parameters: Tensor | None) -> tuple[int, ...]:
    return tuple(1 if p is None else p.stride(0) for p in parameters)


def heads_of(t: Tensor, heads: int) -> tuple[int, int, int, int]:
    """Strides (sample, token, head, column) of t (B, T, h · d)."""
    return t.stride(0), t.stride(1), t.stride(2) * (t.shape[2] // heads), t.stride(2)


def constants(qkv: Tensor, entry: dict, scale: float, attend: str, by: int) -> dict:
    """What all kernels take."""
    d = qkv.shape[4]
    low, high = head_tiles(d)
    return {
        "warps": entry["warps"],
        "D": d,
        "LOW": low,
        "HIGH": high,
        "SCALE": scale,
        "ATTEND": attend,
        "BY": by,
        "PRECISION": precision(qkv.dtype),
        "ACC": ACCUMULATOR[qkv.dtype],
    }


def blocks(entry: dict, tokens: int, dropout: float) -> dict:
    """What the flash-style kernels take besides."""
    sizes = {"QUERIES": entry["queries"], "KEYS": entry["keys"], "STAGES": entry["stages"]}
    return sizes | {"DROPOUT": dropout > 0, "QUADS": tokens % 4 == 0}


def parts(tokens: int, least: int, most: int) -> dict:
    """PARTS and STARTS: tiles of ``most`` tokens, before them smaller ones, powers of two from ``least`` on. Only the
    last tile reaches beyond the last token, by less than ``least``."""
    rest, found = -(-tokens // least) * least % most, []
    while rest:
        found.insert(0, 1 << (rest.bit_length() - 1))
        rest -= found[0]
    found += [most] * (tokens // most + (tokens % most > most - least))
    return {"PARTS": tuple(found), "STARTS": tuple(sum(found[:i]) for i in range(len(found)))}


def short_entry(qkv: Tensor, which: str, q_weight: Tensor | None, dropout: float) -> dict | None:
    """The launch of the kernel for few tokens, if that is to be taken. Drawing masks beside a whole head's scores would
    take more registers than there are; q as it came, more shared memory than two heads of 96 columns leave."""
    tokens, d = qkv.shape[1], qkv.shape[4]
    entry = configuration(qkv, OPERATOR, f"{which}_short", size(d))
    fits = entry is not None and tokens <= entry["tokens"] and (d <= 64 or q_weight is not None)
    return entry if fits and dropout == 0 else None


def masks(dropout: float, layer: int) -> tuple[int, float, int]:
    """(threshold, scale, place) as the kernels take them."""
    return *threshold_and_scale(dropout), (layer * STREAMS + ATTENTION_STREAM) % 2**32


@register("register_attention_fwd")
def register_attention_fwd(
    qkv: Tensor,
    q_weight: Tensor | None,
    q_bias: Tensor | None,
    k_weight: Tensor | None,
    k_bias: Tensor | None,
    eps: float,
    scale: float,
    registers: int,
    attend: str,
    dropout: float,
    rng: Tensor | None,
    layer: int,
) -> tuple[Tensor, Tensor]:
    """(y, lse); qkv of any strides. Reads q once; k and v once per program, of which a head has one or, in small
    batches, several (no bit depends on that), flash-style one per block of queries."""
    batch, tokens, _, heads, d = qkv.shape
    y = qkv.new_empty((batch, tokens, heads * d))
    wide = torch.float64 if qkv.dtype == torch.float64 else torch.float32
    lse = qkv.new_empty((batch, heads, tokens), dtype=wide)
    norms = (q_weight, q_bias, k_weight, k_bias)
    entry = short_entry(qkv, "forward", q_weight, dropout)
    sizes, by = (tokens, heads, registers, eps), divisor(d, qkv.stride())
    if entry is not None:
        split = min(triton.cdiv(tokens, entry["queries"]), triton.cdiv(entry["programs"], max(1, batch * heads)))
        launch(
            short.forward,
            (batch * heads * split,),
            *(qkv, *norms, y, lse, *sizes, split, *steps(*norms), *qkv.stride()),
            **constants(qkv, entry, scale, attend, by),
            **parts(tokens, 16, entry["part"]),
            QUERIES=entry["queries"],
        )
        return y, lse
    entry = configuration(qkv, OPERATOR, "forward", size(d))
    launch(
        kernels.forward,
        (batch * heads * triton.cdiv(tokens, entry["queries"]),),
        *(qkv, *norms, rng if dropout > 0 else None, y, lse),
        *(*sizes, *masks(dropout, layer), *steps(*norms), *qkv.stride()),
        **constants(qkv, entry, scale, attend, by),
        **blocks(entry, tokens, dropout),
    )
    return y, lse


def _norm_gradients(partial: Tensor | None, qkv: Tensor, weight: Tensor | None, bias: Tensor | None) -> list[Tensor]:
    """Sums over the programs of partial (2, programs, d); empty without that norm."""
    wide = torch.float64 if qkv.dtype == torch.float64 else torch.float32
    sums = [qkv.new_empty(0 if p is None else qkv.shape[4], dtype=wide) for p in (weight, bias)]
    if partial is not None:
        _, programs, d = partial.shape
        entry = configuration(qkv, OPERATOR, "add_partials")
        launch(
            _linear_kernels.add_partials,
            (triton.cdiv(d, entry["block"]), 2),
            *(partial, *sums, programs, d),
            warps=entry["warps"],
            ROWS=entry["rows"],
            BLOCK=entry["block"],
            ACC=ACCUMULATOR[qkv.dtype],
        )
    return sums


@register("register_attention_bwd")
def register_attention_bwd(
    grad: Tensor,
    qkv: Tensor,
    y: Tensor,
    lse: Tensor,
    q_weight: Tensor | None,
    q_bias: Tensor | None,
    k_weight: Tensor | None,
    k_bias: Tensor | None,
    eps: float,
    scale: float,
    registers: int,
    attend: str,
    dropout: float,
    rng: Tensor | None,
    layer: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dqkv, the norms' four gradients); grad of any strides, dqkv contiguous."""
    batch, tokens, _, heads, d = qkv.shape
    dqkv = qkv.new_empty(qkv.shape)
    norms = (q_weight, q_bias, k_weight, k_bias)
    strides = (heads_of(grad, heads), heads_of(y, heads), qkv.stride())
    by, steps_of_all = divisor(d, *strides), (*steps(*norms), *(n for s in strides for n in s))
    tensors, sizes = (grad, qkv, y, lse, *norms), (tokens, heads, registers, eps)

    def partial(weight: Tensor | None, programs: int) -> Tensor | None:
        return None if weight is None else lse.new_empty((2, programs, d))

    entry, programs = short_entry(qkv, "backward", q_weight, dropout), batch * heads
    if entry is not None:
        sums = [partial(q_weight, programs), partial(k_weight, programs)]
        launch(
            short.backward,
            (programs,),
            *(*tensors, dqkv, *sums, *sizes, programs, *steps_of_all),
            **constants(qkv, entry, scale, attend, by),
            **parts(tokens, entry["part"], entry["part"]),
            KEYS=entry["keys"],
        )
    else:
        sums = []
        for name, kernel, weight in (
            ("queries", kernels.backward_queries, q_weight),
            ("keys", kernels.backward_keys, k_weight),
        ):
            entry = configuration(qkv, OPERATOR, f"backward_{name}", size(d))
            programs = batch * heads * triton.cdiv(tokens, entry[name])
            sums.append(partial(weight, programs))
            launch(
                kernel,
                (programs,),
                *(*tensors, rng if dropout > 0 else None, dqkv, sums[-1]),
                *(*sizes, *masks(dropout, layer), programs, *steps_of_all),
                **constants(qkv, entry, scale, attend, by),
                **blocks(entry, tokens, dropout),
            )
    return dqkv, *_norm_gradients(sums[0], qkv, q_weight, q_bias), *_norm_gradients(sums[1], qkv, k_weight, k_bias)
