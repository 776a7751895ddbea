"""16-bit products on a CPU for which PyTorch has no such GEMM (float16 on most) go through fp32."""

from __future__ import annotations

import pytest
import torch
from _cases import BY_NAME
from _layouts import normal
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import sdp_kernels as sk
from sdp_kernels import _device
from sdp_kernels.backends import BACKENDS

pytestmark = pytest.mark.skipif(BACKENDS["cpu"].absent is not None, reason=f"cpu: {BACKENDS['cpu'].absent}")
HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@pytest.fixture(params=["PyTorch's fp32", "our fp32"])
def without_gemm(request, monkeypatch):
    """A processor for which PyTorch has no 16-bit GEMM; and where we have one of fp32, if this one has."""
    ours = frozenset({torch.float32}) & BACKENDS["cpu"].multiplies if request.param == "our fp32" else frozenset()
    monkeypatch.setattr(BACKENDS["cpu"], "multiplies", ours)
    monkeypatch.setattr(_device, "_MULTIPLIED_SLOWLY", frozenset({torch.bfloat16, torch.float16}))


class Products(TorchDispatchMode):
    """The dtypes that matrix products find."""

    def __init__(self):
        super().__init__()
        self.dtypes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().split("::")[1].split(".")[0]
        if name in ("mm", "addmm", "bmm", "linear", "matmul") or "gemm" in name:
            self.dtypes.append(args[1].dtype)
        return function(*args, **(kwargs or {}))


@HALVES
@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_linear_rounds_once(without_gemm, dtype, activation):
    x, weight, bias = (normal(*s, seed=i, dtype=dtype) for i, s in enumerate([(3, 7, 20), (12, 20), (12,)]))
    grad = normal(3, 7, 12, seed=3, dtype=dtype)
    seen = []
    for form, wide in ((sk.linear, None), (F.linear, torch.float64)):
        leaves = [t.to(wide or dtype).requires_grad_() for t in (x, weight, bias)]
        with Products() as products:
            y = form(*leaves, activation=activation) if wide is None else form(*leaves)
            if wide is not None and activation == "gelu":
                y = F.gelu(y)
            seen.append((y.detach(), *torch.autograd.grad(y, leaves, grad.to(y.dtype))))
        if wide is None:
            assert products.dtypes and set(products.dtypes) == {torch.float32}
    roundings = 1 if activation == "none" else 3  # of z, of what follows from it
    for got, exact in zip(*seen, strict=True):
        assert got.dtype == dtype
        allowed = roundings * (0.51 * torch.finfo(dtype).eps + 1e-5) * float(exact.abs().max())
        torch.testing.assert_close(got.double(), exact, rtol=0, atol=allowed)


@pytest.mark.parametrize("name", ["linear", "linear-residual", "conv_mlp", "convnext_block", "feed_forward"])
def test_every_product_of_a_block(without_gemm, name):
    """Under autocast too, where the weights' gradients are then the sums themselves."""
    case = BY_NAME[name]
    leaves = [x.requires_grad_() for x in case.inputs(torch.float32)]
    with Products() as products:
        with torch.autocast("cpu", torch.bfloat16):
            y = case.call(None, *leaves)
        gradients = torch.autograd.grad(y.float().square().sum(), leaves)
    assert len(products.dtypes) >= 3 and set(products.dtypes) == {torch.float32}
    weights = [g for g in gradients if g.dim() == 2]
    assert weights and all((g != g.bfloat16().float()).any() for g in weights)


def test_without_the_library_every_16_bit_type_is_slow(monkeypatch):
    monkeypatch.setattr(torch.ops, "mkldnn", torch._ops._OpNamespace("no_such_library"))
    assert _device._without_gemm() == {torch.bfloat16, torch.float16}


@HALVES
def test_it_compiles(without_gemm, dtype):
    x, weight = normal(2, 3, 8, dtype=dtype), normal(4, 8, seed=1, dtype=dtype)
    call = torch.compile(lambda x, w: sk.linear(x, w, activation="relu"), fullgraph=True, backend="aot_eager")
    leaves = [weight.clone().requires_grad_() for _ in range(2)]
    for form, leaf in zip((call, lambda x, w: sk.linear(x, w, activation="relu")), leaves):
        form(x, leaf).float().square().sum().backward()
    assert torch.equal(leaves[0].grad, leaves[1].grad) and leaves[0].grad.abs().max() > 0
