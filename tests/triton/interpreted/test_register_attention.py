"""register_attention's Triton kernels against fp64 and against the reference's masks."""

from __future__ import annotations

import _plain as plain
import cases
import pytest
import torch
from _layouts import hostile, layouts, normal
from _numerics import assert_as_exact, differentiate
from torch import Tensor

import sdp_kernels as sk
from sdp_kernels import reference
from sdp_kernels.triton import _launch, register_attention

OPS = cases.OPS
TABLE = _launch.table_for(90)
WIDTHS = {"16bit": torch.bfloat16, "32bit": torch.float32}
HEADS = {"d64": 64, "d96": 96, "d128": 128}
EXACT = {"rtol": 1e-10, "atol": 1e-11}


def inputs(tokens: int, heads: int, d: int, dtype=torch.float64, batch: int = 2) -> list[Tensor]:
    """qkv and the norms' parameters; values that every dtype holds."""
    qkv = torch.stack([normal(tokens, 3, heads, d, seed=31 * b, dtype=dtype) for b in range(batch)])
    norms = [normal(d, seed=i, dtype=torch.float64, scale=0.5) + (i % 2) for i in (1, 2, 3, 4)]
    return [qkv, *(p.to(torch.bfloat16).to(dtype) for p in norms)]


def ours(qkv, *norms, backend="triton", **more) -> Tensor:
    pair = (norms[:2], norms[2:]) if norms else (None, None)
    return sk.register_attention(qkv, *pair, backend=backend, **more)


def assert_right(tensors: list[Tensor], grad: Tensor, guard=lambda t: t, **more) -> None:
    """y and all gradients against the reference in fp64, PyTorch's peer being the reference in the same dtype."""
    got = differentiate(lambda *t: ours(*t, **more), [guard(t) for t in tensors], [guard(grad)])
    call = lambda *t: ours(*t, backend="reference", **more)  # noqa: E731
    exact = differentiate(call, [t.double() for t in tensors], [grad.double()])
    peer = differentiate(call, tensors, [grad])
    names = ("y", "dqkv", "dq_weight", "dq_bias", "dk_weight", "dk_bias")
    rows = tensors[0].shape[0] * tensors[0].shape[1] * tensors[0].shape[3]
    largest = max(g.abs().max().item() for g in exact[1])
    for i, (name, a, b, c) in enumerate(zip(names, sum(got, ()), sum(exact, ()), sum(peer, ()))):
        # dk_bias is 0: a shift of all keys shifts all scores of a row. What is left of it is rounding.
        slack = 0.2 * torch.finfo(a.dtype).eps * largest * rows**0.5 if name == "dk_bias" else 0.0
        assert_as_exact(name, a, b, c, k=3.0, rows=rows if i > 1 else tensors[0].shape[1], slack=slack)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("head", HEADS)
def test_every_configuration_inside_guard_bands(head, width, guarded, monkeypatch):
    """As it ships, over several blocks of queries and of keys, the last ones cut; limits, norms and dropout."""
    asked = []

    def configuration(x, *key):
        asked.append("/".join(key[1:]))
        return _launch.configuration(x, *key)

    monkeypatch.setattr(register_attention, "configuration", configuration)
    parts = {f"{p}/{head}" for p in ("forward", "backward_queries", "backward_keys")}
    entries = [TABLE[f"register_attention/{part}/{width}"] for part in parts]
    tokens = max(max(e["queries"], e["keys"]) for e in entries) + 5
    tensors = inputs(tokens, 1, HEADS[head], WIDTHS[width], batch=1)
    more = {"registers": 5, "attend": "separate", "dropout": 0.2, "rng": sk.make_rng(3, 1), "layer": 4}
    assert_right(tensors, normal(1, tokens, HEADS[head], seed=9, dtype=WIDTHS[width]), guarded.inside, **more)
    assert {a for a in asked if "_short/" not in a} == parts | {"add_partials"} and guarded.allocations >= 7


@pytest.mark.parametrize("registers", [0, 2, 7])
@pytest.mark.parametrize("attend", sk.ATTEND)
def test_who_reads_whom(attend, registers):
    qkv, grad = normal(2, 7, 3, 2, 8), normal(2, 7, 16, seed=1)
    more = {"registers": registers, "attend": attend}
    got = differentiate(lambda t: ours(t, **more), [qkv], [grad])
    wanted = differentiate(lambda t: plain.register_attention(t, **more), [qkv], [grad])
    for a, b in zip(sum(got, ()), sum(wanted, ()), strict=True):
        torch.testing.assert_close(a, b, **EXACT)


def test_registers_that_fill_blocks_of_keys(monkeypatch):
    """Whole blocks that a query may not read, first or last: the running maximum starts at nothing."""
    for pass_ in ("forward", "backward_queries", "backward_keys"):
        for constant in ("queries", "keys"):
            monkeypatch.setitem(TABLE[f"register_attention/{pass_}/d64/32bit"], constant, 16)
    tensors, grad = inputs(53, 1, 8, batch=1), normal(1, 53, 8, seed=1)
    for attend in sk.ATTEND:
        more = {"registers": 35, "attend": attend}
        got = differentiate(lambda *t, m=more: ours(*t, **m), tensors, [grad])
        wanted = differentiate(lambda *t, m=more: ours(*t, backend="reference", **m), tensors, [grad])
        for a, b in zip(sum(got, ()), sum(wanted, ()), strict=True):
            torch.testing.assert_close(a, b, **EXACT)


@pytest.mark.parametrize("d", [8, 24, 40, 48, 72, 112])
def test_head_sizes(d, guarded):
    low, high = register_attention.head_tiles(d)
    assert low + high >= d and (high == 0 or 2 * high <= low)
    tensors, grad = inputs(6, 2, d), normal(2, 6, 2 * d, seed=1)
    more = {"registers": 2, "attend": "image_to_image", "scale": 0.3}
    got = differentiate(lambda *t: ours(*t, **more), [guarded.inside(t) for t in tensors], [guarded.inside(grad)])
    wanted = differentiate(lambda *t: ours(*t, backend="reference", **more), tensors, [grad])
    for a, b in zip(sum(got, ()), sum(wanted, ()), strict=True):
        torch.testing.assert_close(a, b, **EXACT)


@pytest.mark.parametrize("which", ["q", "k"])
def test_one_norm_alone(which):
    qkv, *norms = inputs(5, 2, 16)
    pair = (norms[:2], None) if which == "q" else (None, norms[2:])
    grad = normal(2, 5, 32, seed=1)
    found = [
        differentiate(
            lambda t, w, b, name=name: sk.register_attention(
                t, *((w, b) if p is not None else None for p in pair), eps=0.01, backend=name
            ),
            [qkv, *next(p for p in pair if p is not None)],
            [grad],
        )
        for name in ("triton", "reference")
    ]
    for a, b in zip(*(sum(f, ()) for f in found), strict=True):
        torch.testing.assert_close(a, b, **EXACT)
    limits = (1e-5, 0.25, 0, "all", 0.0, None, 0)
    y, lse = OPS.register_attention_fwd(qkv, None, None, None, None, *limits)
    assert [g.numel() for g in OPS.register_attention_bwd(y, qkv, y, lse, None, None, None, None, *limits)[1:]] == [
        0
    ] * 4
    scores = torch.einsum("bqhd,bkhd->bhqk", qkv[:, :, 0], qkv[:, :, 1]) * 0.25
    torch.testing.assert_close(lse, scores.logsumexp(-1), **EXACT)


@pytest.mark.parametrize("tokens", [12, 9])
def test_dropout_mask_is_the_references(tokens):
    """With v the identity y shows the dropped weights themselves, in every head and sample; 12 tokens draw in fours."""
    qkv = torch.zeros(3, tokens, 3, 2, 16, dtype=torch.float64)
    qkv[:, :, 2, :, :tokens] = torch.eye(tokens, dtype=torch.float64)[None, :, None]
    rng = torch.tensor([2**62 + 5, 2**31 + 1, 7])
    y = ours(qkv, dropout=0.4, rng=rng, layer=6).view(3, tokens, 2, 16)[..., :tokens].transpose(1, 2)
    philox = reference.philox
    kept = philox.keep_mask(rng, 6, philox.ATTENTION, 3, 2 * tokens * tokens, 0.4, torch.float32)
    torch.testing.assert_close(y, kept.view(y.shape).double() / tokens, **EXACT)


def test_any_strides_inside_guard_bands(guarded):
    qkv, *norms = inputs(5, 2, 8)
    norms = [layouts(p[None])["gaps"][0] for p in norms]
    odd = {"gaps": layouts(qkv)["gaps"], "tokens": torch.cat([qkv, qkv], 1)[:, 3:8], "heads": qkv.transpose(1, 3)}
    odd["heads"] = odd["heads"].contiguous().transpose(1, 3)
    odd["tokens"].copy_(qkv)
    for name, t in odd.items():
        for kind, grad in hostile(normal(2, 5, 16, seed=1)).items():
            args = [guarded.inside(t), *norms]
            got = differentiate(lambda *a: ours(*a, registers=2), args, [grad])
            wanted = differentiate(lambda *a: ours(*a, registers=2, backend="reference"), [qkv, *norms], [grad])
            for a, b in zip(sum(got, ()), sum(wanted, ()), strict=True):
                torch.testing.assert_close(a, b, **EXACT, msg=lambda text, n=name, k=kind: f"{n}, {k}: {text}")


def assert_same_bits(tensors, grad):
    """Twice the same; a sample by itself, or elsewhere in another batch, has the same y and dqkv."""
    first = differentiate(lambda *t: ours(*t, registers=3), tensors, [grad])
    again = differentiate(lambda *t: ours(*t, registers=3), tensors, [grad])
    assert all(torch.equal(a, b) for a, b in zip(sum(first, ()), sum(again, ()), strict=True))
    for batch in ([1], [2, 0]):
        part = differentiate(lambda *t: ours(*t, registers=3), [tensors[0][batch], *tensors[1:]], [grad[batch]])
        assert torch.equal(part[0][0], first[0][0][batch]) and torch.equal(part[1][0], first[1][0][batch])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_determinism(dtype):
    assert_same_bits(inputs(37, 2, 24, dtype, batch=3), normal(3, 37, 48, seed=1, dtype=dtype))


def test_nothing_and_one_token():
    qkv, *norms = inputs(1, 2, 8)
    torch.testing.assert_close(ours(qkv, *norms), qkv[:, :, 2].flatten(2), **EXACT)
    empty = differentiate(lambda *t: ours(*t), [qkv[:0], *norms])
    assert empty[0][0].shape == (0, 1, 16) and not any(g.any() for g in empty[1])


def test_large_scores_do_not_overflow():
    qkv = 100 * normal(1, 20, 3, 1, 16, dtype=torch.float32)
    got = differentiate(lambda t: ours(t), [qkv])
    wanted = differentiate(lambda t: ours(t, backend="reference"), [qkv.double()])
    torch.testing.assert_close(got[0][0].double(), wanted[0][0], rtol=1e-3, atol=1e-2)
    assert torch.isfinite(got[1][0]).all()


@pytest.mark.parametrize("attend", ["all", "separate"])
def test_gradcheck(attend):
    tensors = [t.requires_grad_() for t in inputs(3, 1, 8, batch=1)]
    more = {"registers": 1, "attend": attend, "dropout": 0.3, "rng": sk.make_rng(3, 1)}
    assert torch.autograd.gradcheck(lambda *t: ours(*t, **more), tensors, fast_mode=True)


def test_offsets_beyond_32_bits():
    """A batch stride of 2³¹ and more, and tokens 2³⁰ apart; memory that nobody touches costs nothing."""
    big = torch.empty(2**32 + 4096, dtype=torch.float16)
    values = normal(2, 4, 3, 1, 8, seed=1, dtype=torch.float16)
    want = differentiate(lambda t: ours(t), [values])
    for strides in ((2**31, 24, 8, 8, 1), (512, 2**30, 8, 8, 1)):
        qkv = big.as_strided(values.shape, strides)
        qkv.copy_(values)
        got = differentiate(lambda t: ours(t), [qkv])
        assert torch.equal(got[0][0], want[0][0]) and torch.equal(got[1][0], want[1][0])
