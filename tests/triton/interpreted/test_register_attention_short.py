"""register_attention's Triton kernels for few tokens; what holds for all kernels is in test_register_attention.py."""

from __future__ import annotations

import _plain as plain
import pytest
import torch
from _layouts import hostile, normal
from _numerics import differentiate
from test_register_attention import EXACT, HEADS, TABLE, assert_right, assert_same_bits, inputs, ours

import sdp_kernels as sk
from sdp_kernels.triton import _register_attention_kernels, _register_attention_short_kernels, register_attention


@pytest.fixture
def launched(monkeypatch):
    """The kernels that were launched, in their order."""
    found, launch = [], register_attention.launch

    def watched(kernel, *arguments, **constants):
        found.append(kernel.fn)
        launch(kernel, *arguments, **constants)

    monkeypatch.setattr(register_attention, "launch", watched)
    return found


@pytest.fixture
def small(monkeypatch):
    """Entries with tiles of at most 32 and blocks of 16, for every width: several of each in few tokens."""
    for head in HEADS:
        for width in ("16bit", "32bit"):
            forward = {"queries": 16, "part": 32, "tokens": 64, "programs": 4, "warps": 4}
            monkeypatch.setitem(TABLE, f"register_attention/forward_short/{head}/{width}", forward)
            backward = {"keys": 16, "part": 32, "tokens": 64, "warps": 4}
            monkeypatch.setitem(TABLE, f"register_attention/backward_short/{head}/{width}", backward)


def are_short(launched: list) -> bool:
    kernels = _register_attention_short_kernels
    return kernels.forward.fn in launched and kernels.backward.fn in launched


def assert_exact(tensors, grad, **more) -> None:
    """fp64: y and all gradients as the reference has them."""
    got = differentiate(lambda *t: ours(*t, **more), tensors, [grad])
    wanted = differentiate(lambda *t: ours(*t, backend="reference", **more), tensors, [grad])
    for a, b in zip(sum(got, ()), sum(wanted, ()), strict=True):
        torch.testing.assert_close(a, b, **EXACT)


@pytest.mark.parametrize(("head", "tokens"), [("d64", 133), ("d96", 69)])
def test_as_they_ship(head, tokens, guarded, launched):
    """Inside guard bands, several tiles and blocks, the last ones cut; the table has no backward for 96 columns."""
    tensors = inputs(tokens, 1, HEADS[head], torch.bfloat16, batch=1)
    grad = normal(1, tokens, HEADS[head], seed=9, dtype=torch.bfloat16)
    assert_right(tensors, grad, guarded.inside, registers=5, attend="separate")
    assert _register_attention_short_kernels.forward.fn in launched and are_short(launched) == (head == "d64")
    assert guarded.allocations >= 7


@pytest.mark.parametrize("attend", sk.ATTEND)
def test_who_reads_whom(attend, small, launched):
    """Also registers that fill whole tiles and blocks."""
    for tokens, registers in ((7, 2), (53, 35)):
        qkv, grad = normal(1, tokens, 3, 2, 8), normal(1, tokens, 16, seed=1)
        more = {"registers": registers, "attend": attend}
        got = differentiate(lambda t, m=more: ours(t, **m), [qkv], [grad])
        wanted = differentiate(lambda t, m=more: plain.register_attention(t, **m), [qkv], [grad])
        for a, b in zip(sum(got, ()), sum(wanted, ()), strict=True):
            torch.testing.assert_close(a, b, **EXACT)
    assert are_short(launched)


@pytest.mark.parametrize(("d", "tokens"), [(8, 1), (24, 49), (40, 16), (72, 17), (112, 21), (128, 64)])
def test_head_sizes_and_odd_token_counts(d, tokens, small, launched, guarded):
    tensors, grad = inputs(tokens, 2, d, batch=1), normal(1, tokens, 2 * d, seed=1)
    assert_exact([guarded.inside(t) for t in tensors], guarded.inside(grad), registers=1, attend="image_to_image")
    assert are_short(launched)


def test_without_norms_and_with_one(small, launched):
    qkv, *norms = inputs(37, 1, 24)
    grad = normal(2, 37, 24, seed=1)
    for pair in ((None, None), (norms[:2], None), (None, norms[2:])):
        tensors = [qkv, *(p for norm in pair if norm is not None for p in norm)]

        def call(t, *given, pair=pair, backend):
            rest = iter(given)
            made = tuple(None if norm is None else (next(rest), next(rest)) for norm in pair)
            return sk.register_attention(t, *made, eps=0.01, backend=backend)

        got, wanted = (
            differentiate(lambda *t, n=n: call(*t, backend=n), tensors, [grad]) for n in ("triton", "reference")
        )
        for a, b in zip(sum(got, ()), sum(wanted, ()), strict=True):
            torch.testing.assert_close(a, b, **EXACT)
    assert are_short(launched)


def test_any_strides(small, launched, guarded):
    qkv, *norms = inputs(5, 2, 8, batch=1)
    qkv = guarded.inside(qkv.transpose(1, 3).contiguous().transpose(1, 3))
    for grad in hostile(normal(1, 5, 16, seed=1)).values():
        assert_exact([qkv, *norms], grad, registers=2)
    assert are_short(launched)


def test_determinism(small, launched):
    """Also where several programs share a head's queries, as they do for a sample by itself."""
    dtype = torch.bfloat16
    assert_same_bits(inputs(35, 1, 24, dtype, batch=3), normal(3, 35, 24, seed=1, dtype=dtype))
    assert are_short(launched)


def test_large_scores_and_huge_strides(small, launched):
    """Tokens 2³⁰ elements apart; memory that nobody touches costs nothing."""
    big = torch.empty(2**32 + 4096, dtype=torch.float16)
    values = 30 * normal(2, 4, 3, 1, 8, seed=1, dtype=torch.float16)
    want = differentiate(lambda t: ours(t), [values])
    exact = differentiate(lambda t: ours(t, backend="reference"), [values.double()])
    torch.testing.assert_close(want[0][0].double(), exact[0][0], rtol=2e-3, atol=0.1)
    qkv = big.as_strided(values.shape, (512, 2**30, 8, 8, 1))
    qkv.copy_(values)
    got = differentiate(lambda t: ours(t), [qkv])
    assert torch.equal(got[0][0], want[0][0]) and torch.equal(got[1][0], want[1][0])
    assert are_short(launched)


def test_what_is_too_much_for_them_goes_to_the_others(small, launched):
    """More tokens than the entry's limit, dropout, and more than 64 columns of q without a norm."""
    flash = _register_attention_kernels
    wide, many, drawn = normal(1, 4, 3, 1, 72), normal(1, 65, 3, 1, 8), {"dropout": 0.5, "rng": sk.make_rng(3, 1)}
    for qkv, more in ((wide, {}), (many, {}), (many[:, :4], drawn)):
        launched.clear()
        assert_exact([qkv], torch.ones(1, qkv.shape[1], qkv.shape[4], dtype=torch.float64), **more)
        assert launched[:3] == [flash.forward.fn, flash.backward_queries.fn, flash.backward_keys.fn]


@pytest.mark.parametrize(("least", "most"), [(16, 64), (128, 128), (16, 16)])
def test_tiles_hold_all_tokens_and_only_the_last_is_cut(least, most):
    for tokens in range(1, 300):
        found = register_attention.parts(tokens, least, most)
        sizes, starts = found["PARTS"], found["STARTS"]
        assert all(n & (n - 1) == 0 and least <= n <= most for n in sizes)
        assert [start + n for start, n in zip(starts, sizes)] == [*starts[1:], sum(sizes)]
        assert starts[-1] < tokens <= sum(sizes) < tokens + least


def test_empty_batch(small):
    qkv, *norms = inputs(5, 2, 8)
    y, gradients = differentiate(lambda *t: ours(*t), [qkv[:0], *norms])
    assert y[0].shape == (0, 5, 16) and not any(g.any() for g in gradients)
