"""ConvMLP: the operator against the equations, masks per branch, parameters left out, the module."""

from __future__ import annotations

import _plain as plain
import pytest
import torch
from _cases import conv_mlp_shapes, on_backends_of
from _layouts import normal
from _numerics import differentiate

import sdp_kernels as sk
from sdp_kernels.backends import BACKENDS

CLOSE = {"rtol": 1e-10, "atol": 1e-10}
OPTIONAL = ("depthwise_bias", "pointwise_bias", "layer_scale1", "expand_bias", "project_bias", "layer_scale2")
pytestmark = on_backends_of("conv_mlp")


def weights(c: int, hidden: int, k: int = 3, dtype: torch.dtype = torch.float64) -> sk.ConvMLPWeights:
    values = [normal(*s, seed=10 + i, dtype=dtype, scale=0.5) for i, s in enumerate(conv_mlp_shapes(c, hidden, k))]
    return sk.ConvMLPWeights(*values)


@pytest.mark.parametrize("activation", sk.ACTIVATIONS)
def test_activations(backend, activation):
    w, x = weights(6, 9), normal(2, 7, 6)
    y = sk.conv_mlp(x, w, grid=(2, 3), registers=1, activation=activation, eps=1e-3, backend=backend)
    torch.testing.assert_close(y, plain.conv_mlp(x, w, (2, 3), 1, activation, 1e-3), **CLOSE)


@pytest.mark.parametrize("missing", [*OPTIONAL, OPTIONAL], ids=str)
def test_parameters_left_out(backend, missing):
    w = weights(4, 8)._replace(**dict.fromkeys([missing] if isinstance(missing, str) else missing))
    given = [t for t in w if t is not None]
    names = [n for n, t in zip(w._fields, w, strict=True) if t is not None]
    x = normal(2, 6, 4)

    def through(function):
        def run(x, *tensors):
            return function(x, sk.ConvMLPWeights(**{**dict.fromkeys(w._fields), **dict(zip(names, tensors))}))

        return differentiate(run, [x, *given], [normal(2, 6, 4, seed=3)])

    got = through(lambda x, w: sk.conv_mlp(x, w, grid=(2, 3), backend=backend))
    wanted = through(lambda x, w: plain.conv_mlp(x, w, (2, 3), 0, "gelu", 1e-6))
    for name, a, b in zip(("y", "x", *names), sum(got, ()), sum(wanted, ()), strict=True):
        torch.testing.assert_close(a, b, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


def test_picture_is_a_token_buffer(backend):
    w, x = weights(4, 8, 5), normal(2, 4, 3, 5)
    tokens = sk.conv_mlp(x.flatten(2).transpose(1, 2), w, grid=(3, 5), backend=backend)
    y = sk.conv_mlp(x, w, backend=backend)
    torch.testing.assert_close(y.flatten(2).transpose(1, 2), tokens, **CLOSE)


@pytest.mark.parametrize("k", [3, 5, 7, 9])
def test_registers_are_untouched_and_unseen(backend, k):
    w, x = weights(4, 8, k), normal(2, 3 + 12, 4)
    y = sk.conv_mlp(x, w, grid=(3, 4), registers=3, backend=backend)
    assert torch.equal(y[:, :3], x[:, :3])
    alone = sk.conv_mlp(x[:, 3:], w, grid=(3, 4), backend=backend)
    torch.testing.assert_close(y[:, 3:], alone, **CLOSE)


def test_drop_path_drops_each_branch_of_each_sample_on_its_own(backend):
    """One sample repeated: it comes out in four kinds, as (1 − p)² : p(1 − p) : p(1 − p) : p²."""
    batch, rate = 1000, 0.3
    w, one = weights(4, 6), normal(1, 6, 4)
    x = one.expand(batch, 6, 4)
    y = sk.conv_mlp(x, w, grid=(2, 3), drop_path=rate, rng=sk.make_rng(3), layer=5, backend=backend)

    def with_masks(first: float, second: float) -> torch.Tensor:
        scaled = w._replace(layer_scale1=w.layer_scale1 * first, layer_scale2=w.layer_scale2 * second)
        return plain.conv_mlp(one, scaled, (2, 3), 0, "gelu", 1e-6)

    keep, found = 1 / (1 - rate), torch.zeros(batch, dtype=torch.bool)
    for first, second in ((keep, keep), (keep, 0), (0, keep), (0, 0)):
        same = (y - with_masks(first, second)).abs().flatten(1).amax(1) < 1e-5
        p = (rate if first == 0 else 1 - rate) * (rate if second == 0 else 1 - rate)
        assert abs(same.double().mean() - p) < 5 * (p * (1 - p) / batch) ** 0.5, (first, second)
        found |= same
    assert found.all()


def test_micro_batches_draw_what_the_whole_batch_draws(backend):
    w, x = weights(4, 6), normal(9, 6, 4)
    more = {"grid": (2, 3), "drop_path": 0.4, "layer": 1, "backend": backend}
    whole = sk.conv_mlp(x, w, rng=sk.make_rng(5, 6), **more)
    parts = [sk.conv_mlp(x[a:b], w, rng=sk.make_rng(5, 6, first_sample=a), **more) for a, b in ((0, 2), (2, 3), (3, 9))]
    torch.testing.assert_close(torch.cat(parts), whole, **CLOSE)


@pytest.mark.parametrize("activation", sk.ACTIVATIONS)
@pytest.mark.parametrize("registers", [0, 2])
def test_backward_is_the_same_with_and_without_the_optional_kernels(backend, activation, registers, monkeypatch):
    """A backend without a GEMM of its own through the activation takes the vendor's, and two passes behind it."""
    w, x = weights(6, 9), normal(2, 6 + registers, 6)

    def gradients():
        more = {"grid": (2, 3), "registers": registers, "activation": activation, "backend": backend}
        return differentiate(lambda x, *t: sk.conv_mlp(x, sk.ConvMLPWeights(*t), **more), [x, *w])[1]

    with_them = gradients()
    monkeypatch.setattr(BACKENDS[backend], "prefers", None)
    for a, b in zip(with_them, gradients(), strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


def test_module(backend):
    torch.manual_seed(0)
    module = sk.ConvMLP(6, kernel_size=3, mlp_ratio=1.5, bias=True, layer_scale=0.1, drop_path=0.5, backend=backend)
    assert [tuple(t.shape) for t in module.weights()] == list(conv_mlp_shapes(6, 9))
    assert set(dict(module.named_parameters())) == set(sk.ConvMLPWeights._fields)
    x = normal(40, 7, 6, dtype=torch.float32)
    rng = sk.make_rng(2)
    with pytest.raises(ValueError, match="rng"):
        module(x, grid=(2, 3), registers=1)
    trained = module(x, grid=(2, 3), registers=1, rng=rng)
    wanted = sk.conv_mlp(x, module.weights(), grid=(2, 3), registers=1, drop_path=0.5, rng=rng, backend=backend)
    assert torch.equal(trained, wanted)
    module.eval()
    torch.testing.assert_close(
        module(x, grid=(2, 3), registers=1), plain.conv_mlp(x, module.weights(), (2, 3), 1, "gelu", 1e-6)
    )
    bare = sk.ConvMLP(6, backend=backend)
    assert [n for n, t in zip(bare.weights()._fields, bare.weights(), strict=True) if t is None] == list(OPTIONAL)
