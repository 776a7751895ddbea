"""What every operator promises on every backend that runs on the CPU: values, gradients, layouts, registers."""

from __future__ import annotations

import ctypes
import platform

import pytest
import torch
from _cases import CASES, on_every_backend
from _layouts import hostile, layouts, normal
from _numerics import NARROW, assert_as_exact, differentiate, floor_of
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from sdp_kernels.backends import BACKENDS
from sdp_kernels.ops._contract import OPERATORS

EXACT = {"rtol": 1e-10, "atol": 1e-11, "equal_nan": False}
WITH_PLAIN = [c for c in CASES if c.plain is not None]
WITH_REGISTERS = [c for c in CASES if c.registers and not c.operator.startswith("register")]


def grads_for(outputs, seed: int = 50):
    return [normal(*y.shape, seed=seed + i, dtype=y.dtype) for i, y in enumerate(outputs)]


def outputs_of(case, backend, inputs):
    with torch.no_grad():
        out = case.call(backend, *inputs)
    return out if isinstance(out, tuple) else (out,)


def run(case, backend, inputs, grads=None):
    grads = grads_for(outputs_of(case, backend, inputs)) if grads is None else grads
    return differentiate(lambda *leaves: case.call(backend, *leaves), inputs, grads)


def test_every_operator_has_a_case():
    assert {c.operator for c in CASES} == OPERATORS.keys()


@pytest.mark.levels
@on_every_backend(WITH_PLAIN)
def test_values_and_gradients_in_fp64(case, backend):
    inputs = case.inputs()
    outputs, gradients = run(case, backend, inputs)
    wanted, wanted_gradients = differentiate(case.plain, inputs, grads_for(outputs))
    for got, right in zip((*outputs, *gradients), (*wanted, *wanted_gradients), strict=True):
        torch.testing.assert_close(got, right, **EXACT)


@pytest.mark.levels
@pytest.mark.parametrize("dtype", NARROW, ids=str)
@on_every_backend(WITH_PLAIN)
def test_error_is_within_that_of_plain_pytorch(case, backend, dtype):
    inputs = case.inputs(dtype, batch=4)
    outputs, gradients = run(case, backend, inputs)
    grads = grads_for(outputs)
    assert all(y.dtype == dtype for y in outputs)
    assert [g.dtype for g in gradients] == [x.dtype for x in inputs]
    exact, exact_gradients = differentiate(case.plain, [x.double() for x in inputs], grads)
    peer, peer_gradients = differentiate(case.plain, inputs, grads)
    for i, values in enumerate(zip(outputs, exact, peer, strict=True)):
        assert_as_exact(f"output {i}", *values)
    for i, values in enumerate(zip(gradients, exact_gradients, peer_gradients, strict=True)):
        rows = 1 if i in case.batched else inputs[0].numel()
        beside = exact_gradients[i - 1].abs().max().item() if i in case.vanishing else 0.0
        assert_as_exact(f"gradient of input {i}", *values, rows=rows, slack=floor_of(dtype, rows) * beside)


@pytest.mark.levels
@on_every_backend()
def test_gradcheck(case, backend):
    """Every element of the Jacobian for kernels; a random projection of it where PyTorch differentiates by itself."""
    leaves = [x.requires_grad_() for x in case.inputs(batch=2)]
    assert gradcheck(lambda *x: case.call(backend, *x), leaves, fast_mode=BACKENDS[backend].namespace is None)


@on_every_backend([c for c in CASES if c.twice])
def test_gradgradcheck(case, backend):
    leaves = [x.requires_grad_() for x in case.inputs(batch=1)]
    assert gradgradcheck(lambda *x: case.call(backend, *x), leaves, fast_mode=BACKENDS[backend].namespace is None)


@on_every_backend()
def test_input_of_any_strides(case, backend):
    inputs = case.inputs()
    outputs, gradients = run(case, backend, inputs)
    for name, x in layouts(inputs[0]).items():
        got, got_gradients = run(case, backend, [x, *inputs[1:]])
        for a, b in zip((*got, *got_gradients), (*outputs, *gradients), strict=True):
            torch.testing.assert_close(a, b, **EXACT, msg=lambda text, name=name: f"x: {name}: {text}")


@on_every_backend([c for c in CASES if len(c.shapes) > 1])
def test_parameters_and_residual_of_any_strides(case, backend):
    inputs = case.inputs()
    outputs, gradients = run(case, backend, inputs)
    odd = [layouts(x)["gaps"] for x in inputs]
    got, got_gradients = run(case, backend, odd)
    for a, b in zip((*got, *got_gradients), (*outputs, *gradients), strict=True):
        torch.testing.assert_close(a, b, **EXACT)


@on_every_backend([c for c in CASES if len(c.shapes[0]) == 4])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_picture_keeps_its_memory_format(case, backend, memory_format):
    x, *rest = (x.float() for x in case.inputs())
    x = x.contiguous(memory_format=memory_format)
    outputs, gradients = run(case, backend, [x, *rest])
    for y in outputs:
        assert y.is_contiguous(memory_format=memory_format), y.stride()
    if backend == "cpu":  # PyTorch's own operators choose their gradients' format themselves
        assert gradients[0].is_contiguous(memory_format=memory_format), gradients[0].stride()


@pytest.mark.levels
@on_every_backend()
def test_gradient_of_any_strides(case, backend):
    inputs = case.inputs()
    plain_grads = grads_for(outputs_of(case, backend, inputs))
    odd = [hostile(g) for g in plain_grads]
    for name in odd[0]:
        grads = [versions[name] for versions in odd]
        _, got = run(case, backend, inputs, grads)
        _, wanted = run(case, backend, inputs, [g.clone(memory_format=torch.contiguous_format) for g in grads])
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b, **EXACT, msg=lambda text, name=name: f"grad: {name}: {text}")


@on_every_backend()
def test_gradient_through_cat_sum_and_transpose(case, backend):
    """The three ways in which autograd itself hands over slices, expanded scalars and another order of dimensions."""
    inputs = case.inputs()

    def head(call):
        def through(*leaves):
            out = call(*leaves)
            y = out[-1] if isinstance(out, tuple) else out
            both = torch.cat([y, 2 * y], 1)
            return y.sum() + (both * both).sum() + (y.transpose(1, 2) ** 3).sum()

        return through

    _, got = differentiate(head(lambda *x: case.call(backend, *x)), inputs)
    if case.plain is None:
        _, wanted = differentiate(head(lambda *x: case.call("reference", *x)), inputs)
    else:
        _, wanted = differentiate(head(case.plain), inputs)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


@on_every_backend()
def test_empty_batch(case, backend):
    inputs = case.empty()
    full = outputs_of(case, backend, case.inputs(torch.float32, 1))
    outputs, gradients = run(case, backend, inputs)
    assert [y.shape for y in outputs] == [(0, *y.shape[1:]) for y in full]
    for i, (gradient, x) in enumerate(zip(gradients, inputs, strict=True)):
        assert gradient.shape == x.shape and not gradient.any(), f"gradient of input {i}"


@on_every_backend()
def test_frozen_parameters_and_frozen_input(case, backend):
    """Only what asks for a gradient gets one, and it is the one it gets when all ask."""
    inputs = case.inputs()
    outputs, gradients = run(case, backend, inputs)
    grads = grads_for(outputs)
    for alone in range(len(inputs)):
        leaves = [x.clone().requires_grad_(i == alone) for i, x in enumerate(inputs)]
        out = case.call(backend, *leaves)
        out = out if isinstance(out, tuple) else (out,)
        asked = [(y, g) for y, g in zip(out, grads, strict=True) if y.requires_grad]
        torch.autograd.backward([y for y, _ in asked], [g for _, g in asked])
        assert [x.grad is not None for x in leaves] == [i == alone for i in range(len(leaves))]
        torch.testing.assert_close(leaves[alone].grad, gradients[alone], **EXACT)


class Products(TorchDispatchMode):
    """Counts PyTorch's matrix products, which fp64 is multiplied with."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten.mm.default
        return function(*args, **(kwargs or {}))


@on_every_backend([c for c in CASES if any(len(shape) == 2 for shape in c.shapes[1:])])
def test_a_frozen_weight_costs_no_product(case, backend):
    """A matrix among the parameters has one of its own in the backward pass, its gradient's."""
    counts = []
    for trained in (True, False):
        leaves = [x.requires_grad_(trained or i == 0) for i, x in enumerate(case.inputs())]
        (y,) = [y for y in (case.call(backend, *leaves),) if isinstance(y, torch.Tensor)]
        with Products() as products:
            y.backward(torch.ones_like(y))
        counts.append(products.count)
    matrices = [shape for shape in case.shapes[1:] if len(shape) == 2]
    assert counts[0] - counts[1] >= len(matrices) > 0


@on_every_backend()
def test_inputs_are_left_alone_and_shared_by_no_output(case, backend):
    inputs = case.inputs()
    before = [x.clone() for x in inputs]
    outputs, gradients = run(case, backend, inputs)
    grads = grads_for(outputs)
    for y in (*outputs, *gradients):
        y.fill_(float("nan"))
    for x, right in zip((*inputs, *grads), (*before, *grads_for(outputs)), strict=True):
        assert torch.equal(x, right)


@pytest.fixture
def fill_memory():
    """fill_memory(byte): what fresh memory holds, PyTorch's tensors and the kernels' scratch alike (glibc)."""
    perturb, mallopt = -6, getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or platform.machine() == "aarch64":
        pytest.skip("memory is not glibc's")  # musl, macOS, or mimalloc (PyTorch on ARM): what it holds cannot be set

    def fill(byte: int) -> None:
        mallopt(perturb, 0x100 | byte ^ 0xFF)  # of which memset takes the low byte; 0 would turn it off
        assert (torch.empty(100_000, dtype=torch.uint8) == byte).all()

    yield fill
    mallopt(perturb, 0)


@pytest.mark.levels
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@on_every_backend()
def test_what_memory_held_before_makes_no_difference(case, backend, dtype, fill_memory):
    """Outputs, statistics and gradients are written in full and depend on the inputs alone."""
    inputs = case.inputs(dtype)
    for x in (inputs[0], *list(layouts(inputs[0]).values())[1:]):
        found = []
        for byte in (0xFF, 0x7F):  # repeated: NaN, and the largest values there are
            fill_memory(byte)
            outputs, gradients = run(case, backend, [x, *inputs[1:]])
            found.append((*outputs, *gradients))
        for one, other in zip(*found, strict=True):
            assert torch.isfinite(one).all() and torch.equal(one, other)


@pytest.mark.levels
@on_every_backend(WITH_REGISTERS)
def test_register_rows_are_zero_or_the_residuals(case, backend):
    inputs = case.inputs()
    outputs, _ = run(case, backend, inputs)
    rows = outputs[-1][:, : case.registers]
    if case.keeps_registers:
        residual = inputs[max(case.batched)]
        assert torch.equal(rows, residual[:, : case.registers])
    else:
        assert not rows.any()


def assert_nan_in_register_rows_stays_there(case, backend, in_x, twice):
    r = case.registers
    inputs = case.inputs()
    outputs, gradients = run(case, backend, inputs)
    odd = [x.clone() for x in inputs]
    grads = grads_for(outputs)
    for t in [odd[i] for i in case.batched if i > 0 or in_x] + grads:
        t[:, :r] = float("nan")
    leaves = [x.requires_grad_() for x in odd]
    out = case.call(backend, *leaves)
    out = out if isinstance(out, tuple) else (out,)
    for i, (y, right) in enumerate(zip(out, outputs, strict=True)):
        torch.testing.assert_close(y[:, r:], right[:, r:], **EXACT, msg=lambda text, i=i: f"output {i}: {text}")
    if not case.keeps_registers:
        assert not out[-1][:, :r].any()
    if twice and backend == "cpu" and case.operator in ("linear", "conv_mlp", "convnext_block"):
        with pytest.raises(RuntimeError, match="not twice differentiable"):
            torch.autograd.grad(out, leaves, grads, create_graph=True)
        return
    got = torch.autograd.grad(out, leaves, grads, create_graph=twice)
    for i, (gradient, right) in enumerate(zip(got, gradients, strict=True)):
        rows = (slice(None), slice(r, None)) if i in case.batched else ()
        torch.testing.assert_close(
            gradient[rows], right[rows], **EXACT, msg=lambda text, i=i: f"gradient of input {i}: {text}"
        )


@pytest.mark.levels
@pytest.mark.parametrize("twice", [False, True], ids=["once", "create_graph"])
@on_every_backend(WITH_REGISTERS)
def test_nan_in_register_rows_of_residual_and_gradient_stays_there(case, backend, twice):
    """Whatever these rows hold: image rows and parameter gradients don't see it."""
    assert_nan_in_register_rows_stays_there(case, backend, in_x=False, twice=twice)


@pytest.mark.levels
@pytest.mark.parametrize("twice", [False, True], ids=["once", "create_graph"])
@on_every_backend([case for case in WITH_REGISTERS if case.operator != "linear"])
def test_nan_in_register_rows_of_x_stays_there(case, backend, twice):
    """The same with NaN in the register rows of x itself, as in a buffer that nobody filled.

    Not ``linear``, whose documented rule is that these rows of x are finite: dweight is one product over all rows.
    """
    assert_nan_in_register_rows_stays_there(case, backend, in_x=True, twice=twice)
