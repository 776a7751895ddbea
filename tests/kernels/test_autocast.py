"""Under autocast convolution, linear, blocks and attention cast, norms compute in fp32, KeLü keeps its input's dtype.
Every backend follows the same rule, so fused and unfused differ by kernels only."""

from __future__ import annotations

import pytest
import torch
from _cases import BY_NAME, CASES, cpu_backends, on_every_backend
from _layouts import normal
from _numerics import differentiate

import sdp_kernels as sk

LOW = torch.bfloat16
WANTED = {  # dtype of the (last) output for fp32 inputs
    "kelu": torch.float32,
    "layer_norm_2d": torch.float32,
    "depthwise_conv2d": LOW,
    "conv_mlp": torch.float32,  # the residual's
    "convnext_block": torch.float32,
    "feed_forward": torch.float32,
    "register_attention": LOW,
}


def wanted_dtype(case) -> torch.dtype:
    if case.operator == "linear":
        return torch.float32 if len(case.batched) > 1 else LOW  # a residual keeps its dtype
    return WANTED[case.operator]


def under_autocast(case, backend, inputs):
    def call(*leaves):
        with torch.autocast("cpu", LOW):
            return case.call(backend, *leaves)

    return differentiate(call, inputs)


@on_every_backend()
def test_dtypes(case, backend):
    inputs = case.inputs(torch.float32)
    outputs, gradients = under_autocast(case, backend, inputs)
    assert outputs[-1].dtype == wanted_dtype(case)
    assert [g.dtype for g in gradients] == [x.dtype for x in inputs]
    assert all(t.isfinite().all() for t in (*outputs, *gradients))


@on_every_backend()
def test_the_operator_really_computes_in_the_lower_precision(case, backend):
    """The result differs from fp32's by about bf16's rounding where the rule says so, and not at all elsewhere."""
    inputs = case.inputs(torch.float32)
    outputs, _ = under_autocast(case, backend, inputs)
    full, _ = differentiate(lambda *x: case.call(backend, *x), inputs)
    off = (outputs[-1].float() - full[-1]).abs().max() / full[-1].abs().max()
    if case.operator in ("kelu", "layer_norm_2d"):
        assert off == 0
    else:
        assert 1e-5 < off < 0.05


@pytest.mark.parametrize("case", [c for c in CASES if len(cpu_backends(c.operator)) > 1], ids=str)
def test_backends_follow_the_same_rule(case):
    inputs = case.inputs(torch.float32, batch=4)
    by_backend = {
        name: under_autocast(case, name, inputs)
        for name in cpu_backends(case.operator)
        if sk.backends.BACKENDS[name].absent is None
    }
    wanted, wanted_gradients = by_backend.pop("reference")
    sizes = [wanted_gradients[i - 1 if i in case.vanishing else i].abs().max() for i in range(len(inputs))]
    sizes = [*(b.abs().max() for b in wanted), *sizes]
    for name, (outputs, gradients) in by_backend.items():
        for a, b, size in zip((*outputs, *gradients), (*wanted, *wanted_gradients), sizes, strict=True):
            assert a.dtype == b.dtype, name
            torch.testing.assert_close(a.float(), b.float(), rtol=0, atol=0.02 * size.item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@on_every_backend([BY_NAME[n] for n in ("kelu", "norm", "norm-tokens-residual", "conv_mlp", "convnext_block")])
def test_input_decides_where_the_rule_says_so(case, backend, dtype):
    x, *rest = case.inputs(torch.float32)
    inputs = [t.to(dtype) if i == 0 or i in case.batched else t for i, t in enumerate([x, *rest])]
    if case.operator in ("conv_mlp", "convnext_block") and backend == "cpu" and dtype not in (torch.float32, LOW):
        with pytest.raises(sk.UnsupportedError, match=r"cpu: adds no torch\.bfloat16 branch to a torch\.float16 x"):
            under_autocast(case, backend, inputs)
        backend = None  # an automatic choice goes on to the next
    outputs, _ = under_autocast(case, backend, inputs)
    assert all(y.dtype == dtype for y in outputs)


def test_linear_mixes_dtypes_under_autocast_only():
    x, weight = normal(2, 5, dtype=torch.float32), normal(3, 5, dtype=LOW)
    with torch.autocast("cpu", LOW):
        assert sk.linear(x, weight).dtype == LOW
    with pytest.raises(TypeError, match="weight"):
        sk.linear(x, weight)
