"""Feed-forward branch: activations, parameters left out, where its masks stand, what it keeps."""

from __future__ import annotations

import _plain as plain
import pytest
import torch
from _cases import feed_forward_shapes, on_backends_of
from _layouts import normal
from _numerics import differentiate

import sdp_kernels as sk
from sdp_kernels.backends import BACKENDS
from sdp_kernels.reference import philox

CLOSE = {"rtol": 1e-10, "atol": 1e-10}
OPTIONAL = ("expand_bias", "project_bias", "layer_scale")
pytestmark = on_backends_of("feed_forward")


def weights(c: int, hidden: int) -> sk.FeedForwardWeights:
    return sk.FeedForwardWeights(
        *(normal(*s, seed=20 + i, scale=0.5) for i, s in enumerate(feed_forward_shapes(c, hidden)))
    )


def through(function, x, w, grads):
    """(outputs, gradients) of x and of the weights that there are."""
    names = [n for n, t in zip(w._fields, w, strict=True) if t is not None]

    def run(x, *tensors):
        return function(x, sk.FeedForwardWeights(**{**dict.fromkeys(w._fields), **dict(zip(names, tensors))}))

    return names, differentiate(run, [x, *(t for t in w if t is not None)], grads)


def compare(ours, theirs, x, w, **close) -> None:
    grads = [normal(*x.shape, seed=3)]
    names, got = through(ours, x, w, grads)
    _, wanted = through(theirs, x, w, grads)
    for name, a, b in zip(("y", "x", *names), sum(got, ()), sum(wanted, ()), strict=True):
        torch.testing.assert_close(a, b, **(close or CLOSE), msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("activation", sk.ACTIVATIONS)
def test_activations(backend, activation):
    compare(
        lambda x, w: sk.feed_forward(x, w, activation=activation, eps=1e-3, backend=backend),
        lambda x, w: plain.feed_forward(x, w, activation, 1e-3),
        normal(2, 7, 6),
        weights(6, 9),
    )


@pytest.mark.parametrize("missing", [*OPTIONAL, OPTIONAL], ids=str)
def test_parameters_left_out(backend, missing):
    compare(
        lambda x, w: sk.feed_forward(x, w, backend=backend),
        lambda x, w: plain.feed_forward(x, w, "gelu", 1e-5),
        normal(2, 6, 4),
        weights(4, 8)._replace(**dict.fromkeys([missing] if isinstance(missing, str) else missing)),
    )


@pytest.mark.parametrize("activation", ["gelu", "none"])
@pytest.mark.parametrize("rates", [(0.3, 0.0), (0.0, 0.4), (0.3, 0.4)], ids=str)
def test_masks_are_philox_draws_of_two_layers(backend, rates, activation):
    """The first dropout's of ``layer``, the second's and the drop-path's of the next, in both passes."""
    batch, tokens, c, hidden, layer = 5, 6, 4, 8, 9
    rng, (rate, path) = sk.make_rng(-4, 3, 7), rates

    def factors(width: int, where: int):
        mask = philox.keep_mask(rng, where, philox.DROPOUT, batch, tokens * width, rate, torch.float64)
        return mask.view(batch, tokens, width)

    samples = philox.drop_path_mask(rng, path, layer + 1, batch).double().view(-1, 1, 1)

    def written_out(x, w):
        h = plain.layer_norm_2d(x, w.norm_weight, w.norm_bias, 1e-5)
        h = plain.linear(h, w.expand_weight, w.expand_bias, activation) * factors(hidden, layer)
        h = plain.linear(h, w.project_weight, w.project_bias) * factors(c, layer + 1)
        return x + h * w.layer_scale * samples

    more = {"dropout": rate, "drop_path": path, "activation": activation, "backend": backend}
    compare(
        lambda x, w: sk.feed_forward(x, w, rng=rng, layer=layer, **more),
        written_out,
        normal(batch, tokens, c),
        weights(c, hidden),
        rtol=1e-5,  # factors are fp32 numbers
        atol=1e-5,
    )


def test_a_kernel_keeps_the_pre_activation_and_the_norms_statistics(backend):
    """Where there is none, the parts keep more."""
    x, w = normal(3, 7, 4, dtype=torch.bfloat16).requires_grad_(), weights(4, 10)
    w = sk.FeedForwardWeights(*(t.bfloat16().requires_grad_() for t in w))
    for more, extra in (({}, 0), ({"dropout": 0.2, "rng": sk.make_rng(1)}, 24)):
        kept: dict[int, torch.Tensor] = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t, k=kept: k.update({t.data_ptr(): t}) or t, lambda t: t):
            y = sk.feed_forward(x, w, backend=backend, **more)
        for t in (x, *w):
            kept.pop(t.data_ptr(), None)
        total, promised = sum(t.nbytes for t in kept.values()), 3 * 7 * (10 * 2 + 8) + extra
        assert y.data_ptr() not in kept
        assert total > promised if BACKENDS[backend].namespace is None else total == promised


def test_a_kernel_refuses_double_backward(backend):
    """The others do what their parts do, which are twice differentiable here."""
    x = normal(1, 4, 4).requires_grad_()
    y = sk.feed_forward(x, weights(4, 6), backend=backend)
    if BACKENDS[backend].namespace is None:
        assert torch.autograd.grad(y.sum(), x, create_graph=True)[0].requires_grad
        return
    with pytest.raises(RuntimeError, match="feed_forward is not twice differentiable"):
        torch.autograd.grad(y.sum(), x, create_graph=True)
