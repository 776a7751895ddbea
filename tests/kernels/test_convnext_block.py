"""ConvNeXt block: timm's block in both layouts, masks, parameters left out, what it keeps, the module."""

from __future__ import annotations

import functools
import importlib.util

import _plain as plain
import pytest
import torch
from _cases import convnext_shapes, on_backends_of
from _layouts import normal
from _numerics import differentiate
from torch import Tensor, nn

import sdp_kernels as sk

CLOSE = {"rtol": 1e-10, "atol": 1e-10}
OPTIONAL = ("depthwise_bias", "expand_bias", "project_bias", "layer_scale")
pytestmark = on_backends_of("convnext_block")


class Block(nn.Module):
    """timm's ConvNeXtBlock with its parameters' names, for where timm is not installed."""

    def __init__(self, dim: int, kernel_size: int, mlp_ratio: float, ls_init_value: float):
        super().__init__()
        self.conv_dw = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential()
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(dim, int(mlp_ratio * dim)), nn.Linear(int(mlp_ratio * dim), dim)
        self.gamma = nn.Parameter(torch.full((dim,), ls_init_value))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.conv_dw(x).permute(0, 2, 3, 1))
        h = self.mlp.fc2(nn.functional.gelu(self.mlp.fc1(h))).permute(0, 3, 1, 2)
        return x + h * self.gamma.view(-1, 1, 1)


def peer(name: str, dim: int, kernel_size: int) -> nn.Module:
    if name == "timm":
        from timm.models.convnext import ConvNeXtBlock as Peer
    else:
        Peer = Block
    torch.manual_seed(0)
    block = Peer(dim, kernel_size=kernel_size, mlp_ratio=1.5, ls_init_value=0.5).double()
    for parameter in block.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return block


def weights_of(block: nn.Module) -> list[Tensor]:
    """In the operator's order."""
    conv, norm, mlp = block.conv_dw, block.norm, block.mlp
    return [
        *(conv.weight, conv.bias, norm.weight, norm.bias),
        *(mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias, block.gamma),
    ]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("name", ["written out", *(["timm"] if importlib.util.find_spec("timm") else [])])
def test_same_as_timms_block(backend, name, memory_format):
    block = peer(name, 6, 7)
    x = normal(2, 6, 5, 4).contiguous(memory_format=memory_format)
    grads = [normal(2, 6, 5, 4, seed=1)]

    def theirs(x, *tensors):
        return torch.func.functional_call(block, dict(zip(names, tensors, strict=True)), (x,))

    tensors = weights_of(block)
    names = [next(n for n, p in block.named_parameters() if p is t) for t in tensors]
    tensors = [t.detach() for t in tensors]
    wanted = differentiate(theirs, [x, *tensors], grads)
    ours = functools.partial(sk.convnext_block, backend=backend)
    got = differentiate(lambda x, *w: ours(x, sk.ConvNeXtWeights(*w)), [x, *tensors], grads)
    assert got[0][0].is_contiguous(memory_format=memory_format)
    for what, a, b in zip(("y", "x", *names), sum(got, ()), sum(wanted, ()), strict=True):
        torch.testing.assert_close(a, b, **CLOSE, msg=lambda text, what=what: f"{what}: {text}")


def weights(c: int, hidden: int, k: int = 3) -> sk.ConvNeXtWeights:
    return sk.ConvNeXtWeights(
        *(normal(*s, seed=10 + i, scale=0.5) for i, s in enumerate(convnext_shapes(c, hidden, k)))
    )


@pytest.mark.parametrize("activation", sk.ACTIVATIONS)
def test_activations(backend, activation):
    w, x = weights(6, 9), normal(2, 7, 6)
    y = sk.convnext_block(x, w, grid=(2, 3), registers=1, activation=activation, eps=1e-3, backend=backend)
    torch.testing.assert_close(y, plain.convnext_block(x, w, (2, 3), 1, activation, 1e-3), **CLOSE)


@pytest.mark.parametrize("missing", [*OPTIONAL, OPTIONAL], ids=str)
def test_parameters_left_out(backend, missing):
    w = weights(4, 8)._replace(**dict.fromkeys([missing] if isinstance(missing, str) else missing))
    names = [n for n, t in zip(w._fields, w, strict=True) if t is not None]
    x = normal(2, 6, 4)

    def through(function):
        def run(x, *tensors):
            return function(x, sk.ConvNeXtWeights(**{**dict.fromkeys(w._fields), **dict(zip(names, tensors))}))

        return differentiate(run, [x, *(t for t in w if t is not None)], [normal(2, 6, 4, seed=3)])

    got = through(lambda x, w: sk.convnext_block(x, w, grid=(2, 3), backend=backend))
    wanted = through(lambda x, w: plain.convnext_block(x, w, (2, 3), 0, "gelu", 1e-6))
    for name, a, b in zip(("y", "x", *names), sum(got, ()), sum(wanted, ()), strict=True):
        torch.testing.assert_close(a, b, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("k", [3, 5, 7, 9])
def test_registers_are_untouched_and_unseen(backend, k):
    w, x = weights(4, 8, k), normal(2, 3 + 12, 4)
    y = sk.convnext_block(x, w, grid=(3, 4), registers=3, backend=backend)
    assert torch.equal(y[:, :3], x[:, :3])
    alone = sk.convnext_block(x[:, 3:], w, grid=(3, 4), backend=backend)
    torch.testing.assert_close(y[:, 3:], alone, **CLOSE)


def test_drop_path_drops_whole_samples_of_the_branch(backend):
    batch, rate = 400, 0.25
    w, x, rng = weights(4, 6), normal(batch, 6, 4), sk.make_rng(7)
    y = sk.convnext_block(x, w, grid=(2, 3), drop_path=rate, rng=rng, layer=3, backend=backend)
    dropped = (y == x).flatten(1).all(1)
    scaled = plain.convnext_block(x, w._replace(layer_scale=w.layer_scale / (1 - rate)), (2, 3), 0, "gelu", 1e-6)
    torch.testing.assert_close(y[~dropped], scaled[~dropped], rtol=1e-6, atol=1e-6)
    assert abs(dropped.double().mean() - rate) < 5 * (rate * (1 - rate) / batch) ** 0.5
    half = sk.convnext_block(
        x[200:], w, grid=(2, 3), drop_path=rate, rng=sk.make_rng(7, first_sample=200), layer=3, backend=backend
    )
    torch.testing.assert_close(half, y[200:], **CLOSE)


def test_module(backend):
    torch.manual_seed(0)
    module = sk.ConvNeXtBlock(6, kernel_size=3, mlp_ratio=1.5, layer_scale=0.1, drop_path=0.5, backend=backend)
    assert [tuple(t.shape) for t in module.weights()] == list(convnext_shapes(6, 9))
    assert set(dict(module.named_parameters())) == set(sk.ConvNeXtWeights._fields)
    x, rng = normal(40, 7, 6, dtype=torch.float32), sk.make_rng(2)
    with pytest.raises(ValueError, match="rng"):
        module(x, grid=(2, 3), registers=1)
    trained = module(x, grid=(2, 3), registers=1, rng=rng)
    w = module.weights()
    wanted = sk.convnext_block(x, w, grid=(2, 3), registers=1, drop_path=0.5, rng=rng, backend=backend)
    assert torch.equal(trained, wanted)
    module.eval()
    torch.testing.assert_close(module(x, grid=(2, 3), registers=1), plain.convnext_block(x, w, (2, 3), 1, "gelu", 1e-6))
    assert sk.ConvNeXtBlock(6, layer_scale=None, backend=backend).weights().layer_scale is None
