"""torch.compile in one graph, forward and backward, with dynamic sizes and few compilations."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo
from _cases import BY_NAME, CASES, backend_params, cpu_backends, on_backends_of, on_every_backend
from _layouts import normal
from torch._dynamo.testing import CompileCounterWithBackend

import sdp_kernels as sk
from sdp_kernels.backends import BACKENDS

CLOSE = {"rtol": 1e-9, "atol": 1e-10}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def gradients(function, inputs):
    """Outputs and gradients of their squares' sum, which gives gradients that are not constant."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    out = out if isinstance(out, tuple) else (out,)
    return [*(y.detach() for y in out), *torch.autograd.grad(sum((y * y).sum() for y in out), leaves)]


def assert_same(got, wanted, **close):
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, **(close or CLOSE))
        assert a.stride() == b.stride()


@on_every_backend([c for c in CASES if c.name not in ("conv_mlp-masks", "linear-masks")])
def test_one_graph_for_every_batch(case, backend):
    """The batch is dynamic: one compilation, whatever its size."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda *x: case.call(backend, *x), fullgraph=True, backend=counter)
    for batch in (2, 3, 5):
        inputs = case.inputs(batch=batch)
        for i in case.batched:
            torch._dynamo.mark_dynamic(inputs[i], 0)
        leaves = [x.requires_grad_() for x in inputs]
        out = compiled(*leaves)
        out = out if isinstance(out, tuple) else (out,)
        got = [*(y.detach() for y in out), *torch.autograd.grad(sum((y * y).sum() for y in out), leaves)]
        assert_same(got, gradients(lambda *x: case.call(backend, *x), inputs))
    assert counter.frame_count == 1


PICTURES = {
    "kelu": lambda b, x: sk.kelu(x, backend=b),
    "layer_norm_2d": lambda b, x: sk.layer_norm_2d(x, x.new_ones(6), x.new_zeros(6), backend=b),
    "depthwise_conv2d": lambda b, x: sk.depthwise_conv2d(x, x.new_ones(6, 1, 3, 3), backend=b),
    "linear": lambda b, x: sk.linear(x.permute(0, 2, 3, 1), x.new_ones(4, 6), activation="gelu", backend=b),
}


@pytest.mark.parametrize(
    ("operator", "backend"),
    [pytest.param(o, *p.values, marks=p.marks, id=f"{o}-{p.id}") for o in PICTURES for p in backend_params(o)],
)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_at_most_one_more_graph_for_every_size(operator, backend, memory_format):
    """Sizes that change without being marked: the second compilation is dynamic, and there is no third."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x: PICTURES[operator](backend, x), fullgraph=True, backend=counter)
    for sizes in ((2, 6, 4, 5), (3, 6, 7, 3), (4, 6, 2, 9), (7, 6, 8, 8)):
        x = normal(*sizes).contiguous(memory_format=memory_format)
        assert_same(gradients(compiled, [x]), gradients(lambda x: PICTURES[operator](backend, x), [x]))
    assert counter.frame_count <= 2


TOKENS = {
    "layer_norm_2d": lambda b, x, grid: sk.layer_norm_2d(x, x.new_ones(8), x.new_zeros(8), registers=2, backend=b),
    "depthwise_conv2d": lambda b, x, grid: sk.depthwise_conv2d(
        x, x.new_ones(8, 1, 3, 3), grid=grid, registers=2, backend=b
    ),
    "linear": lambda b, x, grid: sk.linear(x, x.new_ones(8, 8), residual=x, registers=2, backend=b),
    "register_attention": lambda b, x, grid: sk.register_attention(
        x.view(*x.shape[:2], 1, 1, 8).expand(-1, -1, 3, -1, -1), registers=2, attend="image_to_image", backend=b
    ),
}


@pytest.mark.parametrize(
    ("operator", "backend"),
    [pytest.param(o, *p.values, marks=p.marks, id=f"{o}-{p.id}") for o in TOKENS for p in backend_params(o)],
)
def test_at_most_one_more_graph_for_every_grid(operator, backend):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x, grid: TOKENS[operator](backend, x, grid), fullgraph=True, backend=counter)
    for batch, grid in ((2, (2, 3)), (3, (4, 5)), (4, (5, 7)), (2, (6, 2))):
        x = normal(batch, 2 + grid[0] * grid[1], 8)
        got = gradients(lambda x, grid=grid: compiled(x, grid), [x])
        assert_same(got, gradients(lambda x, grid=grid: TOKENS[operator](backend, x, grid), [x]))
    assert counter.frame_count <= 2


@on_backends_of("linear")
def test_new_seed_and_step_compile_nothing_new(backend):
    counter = CompileCounterWithBackend("aot_eager")
    x, weight = normal(4, 5, 6), normal(6, 6, seed=1)

    def call(x, rng):
        return sk.linear(x, weight, residual=x, dropout=0.2, drop_path=0.2, rng=rng, layer=3, backend=backend)

    compiled = torch.compile(call, fullgraph=True, backend=counter)
    for seed, step, first in ((1, 0, 0), (2, 5, 0), (2**40, 6, 8)):
        rng = sk.make_rng(seed, step, first)
        assert torch.equal(compiled(x, rng), call(x, rng))
    assert counter.frame_count == 1


def test_forced_backend_is_traced_and_guarded():
    """A compiled function asks again when the forced backend changes."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x: sk.kelu(x), fullgraph=True, backend=counter)
    x = normal(50, dtype=torch.float32, scale=2)
    automatic = compiled(x)
    with sk.use_backend("reference"):
        assert torch.equal(compiled(x), sk.kelu(x))
    assert torch.equal(compiled(x), automatic)
    assert counter.frame_count == 2 if BACKENDS["cpu"].absent is None else counter.frame_count <= 2


INDUCTOR = [
    *("kelu", "norm-tokens-residual", "conv", "linear-intermediate", "attention-normed"),
    *("conv_mlp", "convnext_block", "feed_forward"),
]


def test_inductor_list_is_complete():
    assert sorted(BY_NAME[name].operator for name in INDUCTOR) == sorted({c.operator for c in CASES})


@pytest.mark.parametrize("name", INDUCTOR)
def test_inductor_once(name):
    """With the backend that is chosen automatically; fp32, so that its own fusions may round elsewhere."""
    case = BY_NAME[name]
    assert cpu_backends(case.operator)
    compiled = torch.compile(lambda *x: case.call(None, *x), fullgraph=True)
    inputs = case.inputs(torch.float32)
    got = gradients(compiled, inputs)
    wanted = gradients(lambda *x: case.call(None, *x), inputs)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
