"""What the fused operators keep between forward and backward, by the profiler's memory events: what their docstrings
say and nothing else, and at most six tenths of the best plain PyTorch form's."""

from __future__ import annotations

import pytest
import torch
from _cases import conv_mlp_shapes, convnext_shapes
from _layouts import normal
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

import sdp_kernels as sk
from sdp_kernels.backends import BACKENDS

BATCH, GRID, DIM, HIDDEN = 2, (8, 6), 64, 256
TOKENS = BATCH * GRID[0] * GRID[1]
STATISTICS = 2 * 4 * TOKENS
"""mean and rstd of one norm, fp32."""
pytestmark = [
    pytest.mark.skipif(BACKENDS["cpu"].absent is not None, reason=f"cpu: {BACKENDS['cpu'].absent}"),
    pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str),
]


def live_bytes(function, *inputs: Tensor | None) -> int:
    """Allocated by ``function`` and not freed while its result (not counted) waits for backward."""
    leaves = [None if x is None else x.requires_grad_() for x in inputs]
    function(*leaves).sum().backward()  # what happens once only is not looked at
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        y = function(*leaves)
    kept = sum(e.nbytes() for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]")
    y.sum().backward()
    return kept - y.untyped_storage().nbytes()


def tensors(shapes, dtype, seed: int = 0) -> list[Tensor]:
    return [normal(*shape, seed=seed + i, dtype=dtype, scale=0.5) for i, shape in enumerate(shapes)]


def picture(dtype) -> Tensor:
    return normal(BATCH, DIM, *GRID, dtype=dtype).contiguous(memory_format=torch.channels_last)


def conv_mlp(x: Tensor, *weights: Tensor) -> Tensor:
    """Plain PyTorch at its best: everything channels last, permuted views, F.linear."""
    w = sk.ConvMLPWeights(*weights)
    h = F.layer_norm(x.permute(0, 2, 3, 1), (DIM,), w.norm1_weight, w.norm1_bias, 1e-6).permute(0, 3, 1, 2)
    h = F.conv2d(h, w.depthwise_weight, w.depthwise_bias, padding=1, groups=DIM).permute(0, 2, 3, 1)
    x = x.permute(0, 2, 3, 1) + F.gelu(F.linear(h, w.pointwise_weight, w.pointwise_bias)) * w.layer_scale1
    h = F.gelu(F.linear(F.layer_norm(x, (DIM,), w.norm2_weight, w.norm2_bias, 1e-6), w.expand_weight, w.expand_bias))
    return (x + F.linear(h, w.project_weight, w.project_bias) * w.layer_scale2).permute(0, 3, 1, 2)


def convnext_block(x: Tensor, *weights: Tensor) -> Tensor:
    w = sk.ConvNeXtWeights(*weights)
    h = F.conv2d(x, w.depthwise_weight, w.depthwise_bias, padding=1, groups=DIM).permute(0, 2, 3, 1)
    h = F.layer_norm(h, (DIM,), w.norm_weight, w.norm_bias, 1e-6)
    h = F.linear(F.gelu(F.linear(h, w.expand_weight, w.expand_bias)), w.project_weight, w.project_bias)
    return x + (h * w.layer_scale).permute(0, 3, 1, 2)


def test_conv_mlp_keeps_3c_and_hidden_elements_a_token(dtype):
    weights = tensors(conv_mlp_shapes(DIM, HIDDEN), dtype, seed=1)

    def fused(x, *w):
        return sk.conv_mlp(x, sk.ConvMLPWeights(*w), backend="cpu")

    kept, unfused = (live_bytes(form, picture(dtype), *weights) for form in (fused, conv_mlp))
    assert kept == (3 * DIM + HIDDEN) * TOKENS * dtype.itemsize + 2 * STATISTICS
    assert kept <= 0.6 * unfused, kept / unfused


def test_convnext_block_keeps_c_and_hidden_elements_a_token(dtype):
    weights = tensors(convnext_shapes(DIM, HIDDEN), dtype, seed=1)

    def fused(x, *w):
        return sk.convnext_block(x, sk.ConvNeXtWeights(*w), backend="cpu")

    kept, unfused = (live_bytes(form, picture(dtype), *weights) for form in (fused, convnext_block))
    assert kept == (DIM + HIDDEN) * TOKENS * dtype.itemsize + STATISTICS
    assert kept <= 0.6 * unfused, kept / unfused


def test_linear_keeps_the_pre_activation_alone(dtype):
    x, weight, bias, scale = tensors([(BATCH, 48, DIM), (HIDDEN, DIM), (HIDDEN,), (HIDDEN,)], dtype)
    residual = normal(BATCH, 48, HIDDEN, seed=9, dtype=dtype)

    def fused(x, weight, bias, scale, residual):
        return sk.linear(x, weight, bias, activation="gelu", layer_scale=scale, residual=residual, backend="cpu")

    def plain(x, weight, bias, scale, residual):
        return residual + F.gelu(F.linear(x, weight, bias)) * scale

    kept, unfused = (live_bytes(form, x, weight, bias, scale, residual) for form in (fused, plain))
    assert kept == HIDDEN * TOKENS * dtype.itemsize
    assert kept <= 0.6 * unfused, kept / unfused
    bare = live_bytes(lambda *t: sk.linear(*t, activation="gelu", backend="cpu"), x, weight, bias)
    assert bare == HIDDEN * TOKENS * dtype.itemsize
