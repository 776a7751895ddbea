"""Floating-point operations of a training step, counted from the operators that run, and the chips' peak rates.

Model FLOPs: what the equations need, forward and backward, a multiply-add as two. Attention's recomputation does not
count. Fused GEMMs also run over the register rows, which the equations leave out of the ConvMLPs: that surplus is known
(:func:`register_rows`), so both forms' counts must agree exactly.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from math import prod

import torch
from torch.utils.flop_counter import FlopCounterMode

from sdpnet.models import SdPNet

PEAK = (
    (r"\bB200\b", 2250e12),
    (r"\bH(100|200)\b(?!.*PCIe)", 989e12),
    (r"\bA100\b", 312e12),
    (r"\bL40S\b", 362e12),
    (r"\bRTX 4090\b", 165e12),
)
"""Dense bf16 with fp32 accumulation, FLOP/s, from NVIDIA's data sheets."""

aten = torch.ops.aten


def peak_rate(device_name: str | None) -> float | None:
    """bf16 FLOP/s of the chip, None for one that is not listed."""
    return next((rate for pattern, rate in PEAK if device_name and re.search(pattern, device_name)), None)


def _convolution(x, weight, bias, stride, padding, dilation, transposed, output_padding, groups, out_shape=None, **_):
    return 2 * prod(out_shape) * prod(weight[1:])


def _convolution_backward(
    grad,
    x,
    weight,
    bias_sizes,
    stride,
    padding,
    dilation,
    transposed,
    output_padding,
    groups,
    mask,
    out_shape=None,
    **_,
):
    return 2 * prod(grad) * prod(weight[1:]) * (mask[0] + mask[1])


def _sdpa(q, k, v, *_, out_shape=None, **__):
    batch, heads, tokens, d = q
    return 4 * batch * heads * tokens * k[2] * d


def _sdpa_backward(grad, q, k, v, *_, out_shape=None, **__):
    return 2 * _sdpa(q, k, v)


def _packed(qkv, *_, out_shape=None, **__):
    batch, tokens, _three, heads, d = qkv
    return 4 * batch * heads * tokens**2 * d


def _packed_backward(grad, qkv, *_, out_shape=None, **__):
    return 2 * _packed(qkv)


def _depthwise(x, weight, bias, grid, registers, *_, out_shape=None, **__):
    return 2 * _pixels(x, grid) * prod(weight)


def _depthwise_backward(grad, x, weight, grid, registers, *_, out_shape=None, **__):
    return 4 * _pixels(x, grid) * prod(weight)


def _gemm(x, weight, *_, out_shape=None, **__):
    return 2 * prod(x) * weight[0]


def _gemm_backward(d, other, *_, out_shape=None, **__):
    """Of d (B, T, N) with a weight (N, M), or with the layer's input (B, T, M)."""
    return 2 * prod(d) * other[-1]


def _pixels(x, grid) -> int:
    return x[0] * (prod(grid) if grid else x[2] * x[3])


def _formulas() -> dict:
    """Operator → formula of its arguments' shapes, if PyTorch has none or takes a depthwise filter as dense."""
    found = {aten.convolution: _convolution, aten.convolution_backward: _convolution_backward}
    for kind in ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu"):
        for name, formula in ((kind, _sdpa), (kind.replace("_for_cpu", ""), _sdpa_backward)):
            suffix = "" if formula is _sdpa else "_for_cpu_backward" if "cpu" in kind else "_backward"
            packet = getattr(aten, f"_scaled_dot_product_{name}{suffix}", None)
            if packet is not None:
                found[packet] = formula
    ours = {
        "depthwise_conv2d_fwd": _depthwise,
        "depthwise_conv2d_bwd": _depthwise_backward,
        "linear_gemm_fwd": _gemm,
        "linear_gemm_bwd": _gemm_backward,
        "linear_gemm_dgrad": _gemm_backward,
        "linear_gemm_wgrad": _gemm_backward,
        "register_attention_fwd": _packed,
        "register_attention_bwd": _packed_backward,
    }
    for namespace in ("sdp_kernels_cpp", "sdp_kernels_triton"):
        for name, formula in ours.items():
            found[getattr(getattr(torch.ops, namespace), name)] = formula
    return found


def count(call: Callable[[], object]) -> int:
    """FLOPs of what ``call`` runs (uncompiled)."""
    with FlopCounterMode(display=False, custom_mapping=_formulas()) as counter:
        call()
    return counter.get_total_flops()


def register_rows(model: SdPNet, batch: int) -> int:
    """FLOPs that a fused step's ConvMLPs spend on register rows: three GEMMs each, forward, dgrad and wgrad."""
    c = model.config
    convs = [conv for block in model.blocks for conv in block.convs]
    weights = sum(p.weight.numel() for conv in convs for p in (conv.pointwise, conv.expand, conv.project))
    return 3 * 2 * batch * c.registers * weights
