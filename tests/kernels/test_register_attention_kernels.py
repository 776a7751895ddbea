"""Register attention's kernels as such: what they keep, their bits, masks in backward, what they refuse."""

from __future__ import annotations

import _plain as plain
import pytest
import torch
from _cases import backend_params
from _layouts import normal
from _numerics import differentiate
from test_register_attention import compare, large, norm, with_norms
from torch.nn.attention import SDPBackend, sdpa_kernel

import sdp_kernels as sk
from sdp_kernels.backends import BACKENDS

KERNELS = [p for p in backend_params("register_attention") if BACKENDS[p.values[0]].namespace is not None]
pytestmark = pytest.mark.parametrize("backend", KERNELS)


def test_backward_draws_the_forwards_masks_whatever_became_of_the_rng(backend):
    qkv, rng = normal(2, 9, 3, 1, 8).requires_grad_(), sk.make_rng(1, 2)
    more = {"dropout": 0.5, "backend": backend}
    wanted = torch.autograd.grad(sk.register_attention(qkv, rng=sk.make_rng(1, 2), **more).sum(), qkv)[0]
    y = sk.register_attention(qkv, rng=rng, **more)
    rng[1] += 1
    assert torch.equal(torch.autograd.grad(y.sum(), qkv)[0], wanted)


@pytest.mark.levels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_at_any_thread_count_and_place_in_the_batch(backend, dtype):
    inputs = large(5, 70, 2, 24, dtype)
    more = {"registers": 3, "attend": "separate"}
    whole = differentiate(with_norms(backend, **more), inputs)
    torch.set_num_threads(2)
    for a, b in zip(sum(whole, ()), sum(differentiate(with_norms(backend, **more), inputs), ()), strict=True):
        assert torch.equal(a, b)
    for sample in (0, 3):
        alone = differentiate(with_norms(backend, **more), [inputs[0][sample : sample + 1], *inputs[1:]])
        assert torch.equal(alone[0][0], whole[0][0][sample : sample + 1])
        assert torch.equal(alone[1][0], whole[1][0][sample : sample + 1])


def test_backward_keeps_what_the_docstring_says(backend):
    """qkv, the result and 4 bytes per token and head, whatever the number of tokens; the rng's 24 bytes if it drops."""
    batch, tokens, heads, d = 2, 40, 3, 16
    qkv, *norms = (p.requires_grad_() for p in large(batch, tokens, heads, d, torch.bfloat16))
    for more, extra in (({}, 0), ({"dropout": 0.1, "rng": sk.make_rng(1)}, 24)):
        kept: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            y = with_norms(backend, **more)(qkv, *norms)
        sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
        for t in (qkv, y, *norms):
            sizes.pop(t.untyped_storage().data_ptr())
        assert sum(sizes.values()) == 4 * batch * tokens * heads + extra


def test_norm_gradients_come_for_the_norms_that_there_are(backend):
    qkv, q, k = normal(2, 5, 3, 2, 16), norm(16, 1), norm(16, 3)
    for which, pair in (("q_norm", q), ("k_norm", k)):
        got = differentiate(lambda x, *p, n=which: sk.register_attention(x, **{n: p}, backend=backend), [qkv, *pair])
        wanted = differentiate(lambda x, *p, n=which: plain.register_attention(x, **{n: p}), [qkv, *pair])
        assert got[1][1].any()
        compare(got, wanted)


def test_double_backward_is_refused(backend):
    qkv = normal(1, 4, 3, 1, 8).requires_grad_()
    y = sk.register_attention(qkv, backend=backend)
    with pytest.raises(RuntimeError, match=r"register_attention is not twice differentiable.*SDPBackend\.MATH"):
        torch.autograd.grad(y.sum(), qkv, create_graph=True)
    with sdpa_kernel(SDPBackend.MATH):  # as the error says
        y = sk.register_attention(qkv, backend="reference")
        (first,) = torch.autograd.grad(y.square().sum(), qkv, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), qkv)
    assert second.abs().max() > 0
