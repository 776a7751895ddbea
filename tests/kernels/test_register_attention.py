"""Register attention: who reads whom, q/k norms, scale, head sizes, dropout on the weights."""

from __future__ import annotations

import itertools

import _plain as plain
import pytest
import torch
from _cases import on_backends_of
from _layouts import normal
from _numerics import NARROW, assert_as_exact, differentiate, floor_of

import sdp_kernels as sk
from sdp_kernels.reference import philox

CLOSE = {"rtol": 1e-11, "atol": 1e-11}
pytestmark = on_backends_of("register_attention")


def norm(d: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    return normal(d, seed=seed) * 0.5 + 1, normal(d, seed=seed + 1)


def with_norms(backend: str, **more):
    """register_attention of (qkv, q weight, q bias, k weight, k bias)."""
    return lambda qkv, *p: sk.register_attention(qkv, p[:2], p[2:], backend=backend, **more)


def large(batch: int, tokens: int, heads: int, d: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """Inputs of :func:`with_norms`, rounded to bf16 so that every dtype holds them."""
    inputs = [normal(batch, tokens, 3, heads, d, seed=tokens), *norm(d, 1), *norm(d, 3)]
    return [x.to(torch.bfloat16).to(dtype) for x in inputs]


def compare(got, wanted, **close) -> None:
    """(outputs, gradients) of two runs."""
    for a, b in zip(sum(got, ()), sum(wanted, ()), strict=True):
        torch.testing.assert_close(a, b, **(close or CLOSE))


@pytest.mark.parametrize("registers", [0, 2, 7])
@pytest.mark.parametrize("attend", sk.ATTEND)
def test_who_reads_whom(backend, attend, registers):
    qkv = normal(2, 7, 3, 2, 8)
    more = {"registers": registers, "attend": attend}
    got = differentiate(lambda t: sk.register_attention(t, **more, backend=backend), [qkv], [normal(2, 7, 16, seed=1)])
    wanted = differentiate(lambda t: plain.register_attention(t, **more), [qkv], [normal(2, 7, 16, seed=1)])
    for a, b in zip(sum(got, ()), sum(wanted, ()), strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


@pytest.mark.parametrize("which", ["none", "q", "k", "both"])
def test_norms(backend, which):
    qkv, q, k = normal(2, 5, 3, 2, 16), norm(16, 1), norm(16, 3)
    q, k = (q if which in ("q", "both") else None), (k if which in ("k", "both") else None)
    y = sk.register_attention(qkv, q, k, eps=0.01, backend=backend)
    torch.testing.assert_close(y, plain.register_attention(qkv, q, k, eps=0.01), **CLOSE)


@pytest.mark.parametrize("d", [8, 24, 64, 96, 128])
def test_head_sizes(backend, d):
    qkv, q, k = normal(1, 6, 3, 3, d), norm(d, 1), norm(d, 3)
    y = sk.register_attention(qkv, q, k, registers=2, attend="separate", backend=backend)
    assert y.shape == (1, 6, 3 * d)
    torch.testing.assert_close(y, plain.register_attention(qkv, q, k, registers=2, attend="separate"), **CLOSE)


@pytest.mark.parametrize("scale", [None, 0, 0.3, -2.0, 1])
def test_scale(backend, scale):
    qkv = normal(2, 5, 3, 1, 8)
    y = sk.register_attention(qkv, scale=scale, backend=backend)
    torch.testing.assert_close(y, plain.register_attention(qkv, scale=scale), **CLOSE)


def test_one_token_returns_its_value(backend):
    qkv = normal(3, 1, 3, 2, 8)
    torch.testing.assert_close(sk.register_attention(qkv, backend=backend), qkv[:, :, 2].flatten(2), **CLOSE)


def test_large_scores_do_not_overflow(backend):
    qkv = normal(1, 4, 3, 1, 8, dtype=torch.float32) * 1e4
    for dtype in (torch.float32, torch.bfloat16):
        y = sk.register_attention(qkv.to(dtype), backend=backend)
        assert y.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("part", "spoilt"), [(0, 1), (1, 20), (2, 20)], ids=["q", "k", "v"])
def test_what_is_not_a_number_reaches_whoever_reads_it(backend, part, spoilt, dtype):
    """A query its own row, a key or a value every row: a maximum or a bounded exponent must not swallow it."""
    qkv = normal(1, 20, 3, 1, 16).to(dtype)
    qkv[0, 5, part, 0, 3] = float("nan")
    rows = sk.register_attention(qkv, backend=backend).isnan().any(-1)
    assert rows.sum() == spoilt and rows[0, 5]


@pytest.mark.parametrize("attend", sk.ATTEND)
def test_dropout_replaces_weights_and_keeps_their_mean(backend, attend):
    """Averaged over many draws the result is that without dropout; each draw alone is not."""
    draws, rate = 3000, 0.3
    qkv = normal(1, 4, 3, 1, 8)
    more = {"registers": 2, "attend": attend, "backend": backend}
    wanted = sk.register_attention(qkv, **more)[0]
    y = sk.register_attention(qkv.expand(draws, -1, -1, -1, -1), dropout=rate, rng=sk.make_rng(9), layer=2, **more)
    values = qkv[0, :, 2].flatten(1).abs().max()
    bound = 5 * values * (rate / (1 - rate) / draws) ** 0.5
    assert (y.mean(0) - wanted).abs().max() < bound
    assert (y - wanted).abs().amax((1, 2)).median() > 0.1 * values


def test_dropout_draws_per_head_query_and_key(backend):
    """With v = one-hot of the key the output is the masked weights themselves."""
    tokens = heads = 8
    qkv = torch.zeros(1, tokens, 3, heads, 8, dtype=torch.float64)
    qkv[0, :, 2] = torch.eye(8, dtype=torch.float64)[:, None].expand(tokens, heads, 8)
    y = sk.register_attention(qkv, dropout=0.5, rng=sk.make_rng(4), backend=backend).view(tokens, heads, 8)
    kept = y > 0
    torch.testing.assert_close(y[kept], torch.full_like(y[kept], 2 / 8))
    assert 0.4 < kept.double().mean() < 0.6
    for dim in range(3):
        assert not torch.equal(kept, kept.roll(1, dim))


def test_micro_batches_draw_what_the_whole_batch_draws(backend):
    qkv, q, k = normal(7, 5, 3, 2, 8), norm(8, 1), norm(8, 3)
    more = {"dropout": 0.4, "layer": 3, "backend": backend}
    whole = sk.register_attention(qkv, q, k, rng=sk.make_rng(5, 6), **more)
    parts = [
        sk.register_attention(qkv[a:b], q, k, rng=sk.make_rng(5, 6, first_sample=a), **more)
        for a, b in ((0, 3), (3, 7))
    ]
    torch.testing.assert_close(torch.cat(parts), whole, **CLOSE)


def test_module(backend):
    module = sk.RegisterAttention(16, attend="image_to_image", dropout=0.2, layer=3, backend=backend)
    qkv = normal(2, 6, 3, 2, 16, dtype=torch.float32)
    rng = sk.make_rng(1)
    norms = ((module.q_norm_weight, module.q_norm_bias), (module.k_norm_weight, module.k_norm_bias))
    more = {"registers": 2, "attend": "image_to_image", "backend": backend}
    trained = module(qkv, registers=2, rng=rng)
    assert torch.equal(trained, sk.register_attention(qkv, *norms, dropout=0.2, rng=rng, layer=3, **more))
    assert torch.equal(module.eval()(qkv, registers=2), sk.register_attention(qkv, *norms, **more))
    assert not list(sk.RegisterAttention(16, qk_norm=False).parameters())


@pytest.mark.levels
@pytest.mark.parametrize(
    ("tokens", "d"),
    [(1, 8), (2, 24), (15, 40), (16, 64), (17, 96), (31, 8), (32, 16), (33, 72), (64, 128), (65, 104), (197, 64)]
    + [(261, 96), (1029, 8), (1100, 32)],
)
def test_every_size(backend, tokens, d):
    """One token less and more than the vectors, tiles and blocks of the kernels hold."""
    inputs = large(1, tokens, 2 if tokens < 100 else 1, d)
    grads = [normal(1, tokens, inputs[0][0, 0, 0].numel(), seed=8)]
    got = differentiate(with_norms(backend, registers=tokens // 3), inputs, grads)
    wanted = differentiate(lambda qkv, *p: plain.register_attention(qkv, p[:2], p[2:]), inputs, grads)
    compare(got, wanted, rtol=1e-9, atol=1e-10)


def scaled_dot_product(qkv, *p):
    """What one writes with PyTorch, in qkv's dtype throughout."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    q, k = (torch.nn.functional.layer_norm(x, x.shape[-1:], *n) for x, n in ((q, p[:2]), (k, p[2:])))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


@pytest.mark.levels
@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize(("tokens", "d"), [(197, 64), (261, 96)])
def test_error_at_full_size_is_within_that_of_pytorch(backend, tokens, d, dtype):
    inputs = large(2, tokens, 2, d, dtype)
    grads = [normal(2, tokens, 2 * d, seed=9).to(torch.bfloat16)]
    got = differentiate(with_norms(backend), inputs, grads)
    exact = differentiate(scaled_dot_product, [x.double() for x in inputs], grads)
    peer = differentiate(scaled_dot_product, inputs, grads)
    for i, values in enumerate(zip(*(sum(r, ()) for r in (got, exact, peer)), strict=True)):
        rows = 1 if i < 2 else 4 * tokens
        # The exact gradient of the last, k's bias, is 0.
        slack = floor_of(dtype, rows) * exact[1][3].abs().max().item() if i == 5 else 0.0
        assert_as_exact(f"result {i}", *values, rows=rows, slack=slack)


@pytest.mark.levels
@pytest.mark.parametrize("attend", sk.ATTEND)
def test_masks_are_philox_draws_in_both_passes(backend, attend):
    """Weights written out, each multiplied by the factor of its place: (head, query, key) within the sample."""
    tokens, heads, d, rate, registers = 270, 2, 8, 0.3, 5
    inputs = large(2, tokens, heads, d)
    rng = sk.make_rng(-3, 5, 8)
    factors = philox.keep_mask(rng, 7, philox.ATTENTION, 2, heads * tokens * tokens, rate, torch.float64)
    register = torch.arange(tokens) < registers
    query, key = register[:, None], register[None, :]
    forbidden = {
        "all": query & ~query,
        "image_to_image": ~query & key,
        "registers_to_registers": query & ~key,
        "separate": query != key,
    }[attend]

    def written_out(qkv, *p):
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        q, k = (torch.nn.functional.layer_norm(x, (d,), *n) for x, n in ((q, p[:2]), (k, p[2:])))
        weights = (q @ k.transpose(-1, -2) * 0.4).masked_fill(forbidden, -torch.inf).softmax(-1)
        return (weights * factors.view(weights.shape) @ v).transpose(1, 2).flatten(2)

    more = {"dropout": rate, "rng": rng, "layer": 7, "attend": attend, "registers": registers, "scale": 0.4}
    grads = [normal(2, tokens, heads * d, seed=3)]
    got = differentiate(with_norms(backend, **more), inputs, grads)
    # Factors are fp32 numbers on every backend.
    compare(got, differentiate(written_out, inputs, grads), rtol=1e-5, atol=1e-5)
    unlike = differentiate(with_norms(backend, **{**more, "layer": 8}), inputs, grads)
    assert (unlike[0][0] - got[0][0]).abs().max() > 0.1


def test_norms_in_single_precision_beside_half(backend):
    """As in a model whose tokens are bf16 and whose parameters are not: gradients in the parameters' dtype."""
    qkv, *norms = large(2, 9, 2, 16, torch.float32)
    leaves = [qkv.bfloat16().requires_grad_(), *(p.requires_grad_() for p in norms)]
    y = with_norms(backend)(*leaves)
    gradients = torch.autograd.grad(y.float().square().sum(), leaves)
    assert [y.dtype, *(g.dtype for g in gradients)] == [torch.bfloat16] * 2 + [torch.float32] * 4
    wanted = with_norms(backend)(qkv, *norms)
    torch.testing.assert_close(y.float(), wanted, rtol=0.05, atol=0.05)


def test_qkv_in_any_order_of_dimensions(backend):
    """(B, T, 3, h, d) as a view of memory in each of a few orders, and expanded over the batch."""
    inputs = large(2, 11, 2, 16)
    wanted = differentiate(with_norms(backend), inputs)
    for order in itertools.islice(itertools.permutations(range(5)), 3, 120, 13):
        back = [order.index(i) for i in range(5)]
        odd = inputs[0].permute(order).contiguous().permute(back)
        compare(differentiate(with_norms(backend), [odd, *inputs[1:]]), wanted)
    same = inputs[0][:1].expand(2, -1, -1, -1, -1)
    y = with_norms(backend)(same, *inputs[1:])
    torch.testing.assert_close(y[0], y[1], rtol=0, atol=0)
    torch.testing.assert_close(y[:1], with_norms(backend)(inputs[0][:1], *inputs[1:]), **CLOSE)
