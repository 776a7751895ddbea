"""Under autocast, weight gradients leave the fused operators in the type of their sums: never rounded to 16 bits."""

from __future__ import annotations

import pytest
import torch
from _cases import BY_NAME, cpu_backends
from _layouts import normal
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import sdp_kernels as sk
from sdp_kernels import _device
from sdp_kernels.backends import BACKENDS
from sdp_kernels.ops._products import wgrad
from sdp_kernels.ops.linear import Branch, branch_bwd

LOW = torch.bfloat16
PARAMETERS = {
    "conv": [1, 2],
    "conv-tokens": [1],
    "conv-norm": [1, 2],
    "linear-intermediate": [1, 2],
    "linear-residual": [1, 2, 3],
    "linear-masks": [1, 2, 3],
    "conv_mlp": [3, 4, 5, 6, 7, 10, 11, 12, 13, 14],
    "convnext_block": [1, 2, 5, 6, 7, 8, 9],
}
"""Case → its inputs that autocast casts, and the layer scales."""


@pytest.fixture(autouse=True)
def unrounded(monkeypatch):
    """Where neither our GEMM nor one of fp32 multiplies bfloat16, but PyTorch's, which rounds: as if it had none."""
    if LOW not in BACKENDS["cpu"].multiplies:
        monkeypatch.setattr(_device, "_MULTIPLIED_SLOWLY", frozenset({LOW, torch.float16}))


def gradients(call, inputs):
    leaves = [x.clone().requires_grad_() for x in inputs]
    with torch.autocast("cpu", LOW):
        y = call(*leaves)
    generator = torch.Generator().manual_seed(7)
    grad = torch.randn(y.shape, generator=generator).to(LOW).to(y.dtype)
    return grad, torch.autograd.grad(y, leaves, grad)


def rounded_share(gradient) -> float:
    """Of its elements, those that are 16-bit values; of sums over few tokens some are. Taps that see no pixel are 0."""
    gradient = gradient[gradient != 0]
    return float((gradient == gradient.to(LOW).float()).float().mean())


@pytest.mark.parametrize("name", PARAMETERS)
def test_they_are_not_rounded(name):
    case = BY_NAME[name]
    backend = "cpu" if BACKENDS["cpu"].absent is None else None
    inputs = case.inputs(torch.float32, batch=3)
    _, found = gradients(lambda *x: case.call(backend, *x), inputs)
    for i in PARAMETERS[name]:
        assert found[i].dtype == torch.float32
        assert rounded_share(found[i]) < 0.4, f"{name}: input {i}"


@pytest.mark.parametrize("layer_scale", [False, True], ids=["plain", "layer scale"])
def test_as_exact_as_their_sums(layer_scale):
    """linear's are those of the 16-bit x and dy to fp32's accuracy; PyTorch rounds them to bfloat16."""
    x, weight = normal(4, 33, 48, dtype=LOW).float(), normal(34, 48, seed=1, dtype=LOW).float()
    scale = 1 + normal(34, seed=2, dtype=torch.float32) if layer_scale else None
    grad, (_, ours, *dscale) = gradients(
        lambda x, w, *s: sk.linear(x, w, layer_scale=s[0] if s else None),
        [x, weight, *([scale] if layer_scale else [])],
    )
    exact = grad.double().flatten(0, 1).t() @ x.double().flatten(0, 1)
    if layer_scale:
        expected = (exact * weight.double()).sum(1)
        torch.testing.assert_close(dscale[0].double(), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
        exact = scale.double()[:, None] * exact
    largest = float(exact.abs().max())
    torch.testing.assert_close(ours.double(), exact, rtol=0, atol=1e-6 * largest)
    if not layer_scale:
        theirs = gradients(F.linear, [x, weight])[1][1]
        assert (theirs.double() - exact).abs().max() > 1e-4 * largest


def test_layer_scales_see_the_bias_that_was_added():
    """Its bfloat16 number, not the parameter: 1, where the gradient is small beside bias · Σ dy."""
    x, weight = normal(4, 33, 48, dtype=LOW).float(), normal(34, 48, seed=1, dtype=LOW).float()
    bias, scale = torch.full((34,), 1 + 0.49 * 2**-8), torch.ones(34)
    grad, (*_, dscale) = gradients(lambda x, w, b, s: sk.linear(x, w, b, layer_scale=s), [x, weight, bias, scale])
    exact = (grad.double() * (x.double() @ weight.double().T + 1)).sum((0, 1))
    torch.testing.assert_close(dscale.double(), exact, rtol=1e-5, atol=1e-5 * float(exact.abs().max()))


@pytest.mark.parametrize("name", ["linear-intermediate", "linear-residual", "conv_mlp", "convnext_block"])
def test_parameters_may_change_before_backward(name):
    """Backward needs their cast copies alone, as PyTorch's does under autocast."""
    case = BY_NAME[name]
    leaves = [x.requires_grad_() for x in case.inputs(torch.float32)]
    seen = []
    for change in (False, True):
        with torch.autocast("cpu", LOW):
            y = case.call(None, *leaves)
        if change:
            with torch.no_grad():
                for i in PARAMETERS[name]:
                    if leaves[i].dim() > 1:
                        leaves[i].mul_(1.5)
        seen.append(torch.autograd.grad(y.square().sum(), leaves))
    assert all(torch.equal(a, b) for a, b in zip(*seen))


@pytest.mark.parametrize("name", PARAMETERS)
def test_compiled(name):
    """The casts inside the node are traced with it."""
    case = BY_NAME[name]
    inputs = case.inputs(torch.float32)
    call = lambda *x: case.call(None, *x)  # noqa: E731
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for got, wanted in zip(gradients(compiled, inputs)[1], gradients(call, inputs)[1]):
        assert got.dtype == wanted.dtype
        torch.testing.assert_close(got, wanted, rtol=0, atol=0.01 * float(wanted.abs().max()))


@pytest.mark.parametrize("name", ["linear", "conv", "conv-norm"])
def test_the_parameter_itself_is_twice_differentiated(name):
    """Its cast copy, which the kernel reads, hangs on nothing."""
    case = BY_NAME[name]
    seen = []
    for backend in [b for b in cpu_backends(case.operator) if BACKENDS[b].absent is None]:
        leaves = [x.requires_grad_() for x in case.inputs(torch.float32)]
        with torch.autocast("cpu", LOW):
            y = case.call(backend, *leaves)
        first = torch.autograd.grad(y.float().square().sum(), leaves, create_graph=True)
        seen.append(torch.autograd.grad(sum(g.float().square().sum() for g in first), leaves))
    assert len(seen) > 1
    for others in seen[1:]:
        for i, (got, wanted) in enumerate(zip(others, seen[0])):
            assert wanted.abs().max() > 0, f"input {i}"
            torch.testing.assert_close(got, wanted, rtol=0, atol=0.05 * float(wanted.abs().max()))


def test_the_vendors_gemm_on_a_gpu_writes_its_sums():
    """One product that writes fp32, no cast behind it; nothing of it runs, and no GPU is needed."""

    class Called(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(str(function))
            return function(*args, **(kwargs or {}))

    for dtype in (LOW, torch.float16, torch.float32):
        names = []
        with torch._subclasses.FakeTensorMode(), Called():
            d, x, weight = (torch.empty(s, dtype=dtype, device="cuda") for s in ((2, 9, 6), (2, 9, 4), (6, 4)))
            names.clear()
            wide, narrow = (wgrad(d, x, weight, "cuda", w) for w in (True, False))
        assert wide.dtype == torch.float32 and narrow.dtype == dtype
        assert wide.shape == narrow.shape == (6, 4)
        products = [n for n in names if "mm" in n or "_to_copy" in n]
        assert products == ["aten.mm.default" if dtype == torch.float32 else "aten.mm.dtype", "aten.mm.default"]


def test_a_plain_layer_on_a_gpu_runs_no_pass_for_its_bias():
    """Two products and a sum, of 16-bit tensors to fp32 gradients; nothing of it runs, and no GPU is needed."""
    with torch._subclasses.FakeTensorMode():
        grad, x, weight, bias = (torch.empty(s, dtype=LOW, device="cuda") for s in ((2, 9, 6), (2, 9, 4), (6, 4), (6,)))
        branch = Branch("none", 0, "cuda", epilogue=False, autocast=LOW)
        with FlopCounterMode(display=False) as counter:
            dx, dweight, dbias, dscale = branch_bwd(grad, x, None, weight, bias, None, None, branch)
    assert (dx.dtype, dweight.dtype, dbias.dtype, dscale) == (LOW, torch.float32, torch.float32, None)
    assert (dx.shape, dweight.shape, dbias.shape) == (x.shape, weight.shape, bias.shape)
    assert counter.get_total_flops() == 2 * 2 * 18 * 6 * 4
