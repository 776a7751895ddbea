"""Linear layer: activations, epilogue, masks of dropout and drop-path, residual dtype."""

from __future__ import annotations

import _plain as plain
import pytest
import torch
from _cases import on_backends_of
from _layouts import normal
from _numerics import differentiate

import sdp_kernels as sk

CLOSE = {"rtol": 1e-11, "atol": 1e-11}
pytestmark = on_backends_of("linear")


@pytest.mark.parametrize("activation", sk.ACTIVATIONS)
def test_activations(backend, activation):
    inputs = [normal(2, 7, 5), normal(6, 5, seed=1), normal(6, seed=2)]
    grads = [normal(2, 7, 6, seed=3)]
    got = differentiate(lambda *t: sk.linear(*t, activation=activation, backend=backend), inputs, grads)
    wanted = differentiate(lambda *t: plain.linear(*t, activation), inputs, grads)
    for a, b in zip(sum(got, ()), sum(wanted, ()), strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


@pytest.mark.levels
def test_dropout_next_to_one_drops(backend):
    """As a threshold of 32 bits that rate is 2³², which is no 32-bit number: kept would be everything."""
    x = torch.ones(4, 100, dtype=torch.float32)
    y = sk.linear(x, torch.eye(100), dropout=1 - 2**-34, rng=sk.make_rng(1), backend=backend)
    assert not y.any()


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 0, 5), (2, 3, 4, 5)], ids=str)
def test_leading_dimensions(backend, shape):
    x, weight, bias = normal(*shape), normal(6, 5, seed=1), normal(6, seed=2)
    residual, scale = normal(*shape[:-1], 6, seed=3), normal(6, seed=4)
    y = sk.linear(x, weight, bias, layer_scale=scale, residual=residual, backend=backend)
    torch.testing.assert_close(y, residual + (x @ weight.T + bias) * scale, **CLOSE)


def test_drop_path_drops_whole_samples_of_the_branch_only(backend):
    batch, rate = 400, 0.25
    x, weight, residual = normal(batch, 3, 5), normal(4, 5, seed=1), normal(batch, 3, 4, seed=2)
    y = sk.linear(x, weight, residual=residual, drop_path=rate, rng=sk.make_rng(7), layer=3, backend=backend)
    dropped = (y == residual).flatten(1).all(1)
    kept = residual + (x @ weight.T) / (1 - rate)
    torch.testing.assert_close(y[~dropped], kept[~dropped], rtol=1e-6, atol=1e-6)
    assert abs(dropped.double().mean() - rate) < 5 * (rate * (1 - rate) / batch) ** 0.5


def test_dropout_is_the_operators_mask_on_the_branch(backend):
    """After the activation, before layer scale and residual; the same draw as ``dropout`` with that layer."""
    x, weight, residual, scale = normal(6, 3, 5), normal(4, 5, seed=1), normal(6, 3, 4, seed=2), normal(4, seed=3)
    rng = sk.make_rng(11, 2)
    more = {"activation": "tanh", "layer_scale": scale, "residual": residual, "backend": backend}
    y = sk.linear(x, weight, dropout=0.4, rng=rng, layer=9, **more)
    wanted = residual + scale * sk.dropout(torch.tanh(x @ weight.T), 0.4, rng=rng, layer=9)
    torch.testing.assert_close(y, wanted, **CLOSE)
    assert not torch.allclose(y, sk.linear(x, weight, dropout=0.4, rng=rng, layer=8, **more))
    assert not torch.allclose(y, sk.linear(x, weight, dropout=0.4, rng=sk.make_rng(11, 3), layer=9, **more))


@pytest.mark.parametrize("rates", [{"dropout": 0.3}, {"drop_path": 0.3}, {"dropout": 0.2, "drop_path": 0.3}], ids=str)
def test_micro_batches_draw_what_the_whole_batch_draws(backend, rates):
    x, weight, residual = normal(9, 5), normal(5, 5, seed=1), normal(9, 5, seed=2)
    more = {**rates, "layer": 2, "backend": backend}
    whole = sk.linear(x, weight, residual=residual, rng=sk.make_rng(5, 6), **more)
    parts = [
        sk.linear(x[a:b], weight, residual=residual[a:b], rng=sk.make_rng(5, 6, first_sample=a), **more)
        for a, b in ((0, 2), (2, 3), (3, 9))
    ]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(parts[2], sk.linear(x[3:], weight, residual=residual[3:], rng=sk.make_rng(5, 6), **more))


def test_masks_are_replayed_in_backward(backend):
    """dx is zero exactly where the dropped outputs are the only ones that need it."""
    x = normal(8, 6, dtype=torch.float64).requires_grad_()
    y = sk.linear(x, torch.eye(6, dtype=torch.float64), dropout=0.5, rng=sk.make_rng(1), backend=backend)
    y.sum().backward()
    assert torch.equal(x.grad, torch.where(y == 0, 0.0, 2.0).double())


@pytest.mark.parametrize("residual_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_output_takes_the_residuals_dtype(backend, residual_dtype):
    x, weight, residual = normal(2, 3, 8, dtype=torch.bfloat16), normal(8, 8, seed=1, dtype=torch.bfloat16), None
    assert sk.linear(x, weight, backend=backend).dtype == torch.bfloat16
    residual = normal(2, 3, 8, seed=2, dtype=residual_dtype)
    y = sk.linear(x, weight, residual=residual, backend=backend)
    assert y.dtype == residual_dtype
    wanted = residual.double() + x.double() @ weight.double().T
    torch.testing.assert_close(y.double(), wanted, rtol=0.02, atol=0.02)


def test_single_precision_layer_scale_is_rounded_once(backend):
    """residual + γ · y with γ in fp32: the product is not rounded to bf16 before it is added."""
    x, weight = torch.ones(1, 1, 1, dtype=torch.bfloat16), torch.ones(1, 1, dtype=torch.bfloat16)
    scale, residual = torch.tensor([1 / 3]), torch.full((1, 1, 1), 128.0, dtype=torch.bfloat16)
    y = sk.linear(x, weight, layer_scale=scale, residual=residual.float(), backend=backend)
    assert y.item() == pytest.approx(128 + 1 / 3, rel=1e-7)


def test_registers_pass_the_residual_or_are_zero(backend):
    x, weight, bias = normal(2, 5, 4), normal(4, 4, seed=1), normal(4, seed=2)
    residual = normal(2, 5, 4, seed=3)
    y = sk.linear(x, weight, bias, registers=2, backend=backend)
    full = x @ weight.T + bias
    assert not y[:, :2].any()
    torch.testing.assert_close(y[:, 2:], full[:, 2:], **CLOSE)
    more = {"dropout": 0.2, "drop_path": 0.2, "rng": sk.make_rng(1), "backend": backend}
    y = sk.linear(x, weight, bias, activation="sigmoid", residual=residual, registers=2, **more)
    assert torch.equal(y[:, :2], residual[:, :2])
