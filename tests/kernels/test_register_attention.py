"""Register attention: who reads whom, q/k norms, scale, head sizes, dropout on the weights."""

from __future__ import annotations

import _plain as plain
import pytest
import torch
from _cases import on_backends_of
from _layouts import normal
from _numerics import differentiate

import sdp_kernels as sk

CLOSE = {"rtol": 1e-11, "atol": 1e-11}
pytestmark = on_backends_of("register_attention")


def norm(d: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    return normal(d, seed=seed) * 0.5 + 1, normal(d, seed=seed + 1)


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
