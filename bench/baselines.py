"""What the fused operators are measured against when nothing but PyTorch is installed.

Per operator: the fastest plain PyTorch known (what a careful user would write) and the form of the project the models
come from (what was there before). Each is measured eagerly and under torch.compile. They are ordinary differentiable
functions; PyTorch's autograd supplies the backward pass.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from .cases import Function

KELU_HALF_WIDTH = 3.5


def kelu_where(x: Tensor) -> Tensor:
    """KeLü in x's own dtype with two ``where``."""
    a = KELU_HALF_WIDTH
    inside = x.clamp(
        -a, a
    )  # keeps infinities from making NaN; its gradient at ±a is 0, so the outer pieces take x = ±a
    bent = 0.5 * inside * (1 + inside / a + torch.sin(inside * (math.pi / a)) / math.pi)
    return torch.where(x >= a, x, torch.where(x <= -a, torch.zeros_like(x), bent))


def kelu_masks(x: Tensor) -> Tensor:
    """KeLü as the original has it: three pieces, each multiplied by its mask, added up."""
    a = KELU_HALF_WIDTH
    above = (x > a).to(x.dtype)
    between = ((x >= -a) & (x <= a)).to(x.dtype)
    return x * above + 0.5 * x * (1 + x / a + torch.sin(math.pi * x / a) / math.pi) * between


def layer_norm_permuted(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm over C of (B, C, H, W) by PyTorch's kernel on a permuted view; y is channels-last in memory."""
    return F.layer_norm(x.permute(0, 2, 3, 1), weight.shape, weight, bias, eps).permute(0, 3, 1, 2)


def layer_norm_moments(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm over C of (B, C, H, W) as the original has it: mean and variance over dimension 1, then affine."""
    mean = x.mean(1, keepdim=True)
    centred = x - mean
    variance = centred.pow(2).mean(1, keepdim=True)
    return weight[:, None, None] * (centred / torch.sqrt(variance + eps)) + bias[:, None, None]


def layer_norm_tokens(x: Tensor, weight: Tensor, bias: Tensor, eps: float, registers: int = 0) -> Tensor:
    """LayerNorm over the last dimension of (B, T, C); the first ``registers`` rows of each sample come out as 0."""
    if not registers:
        return F.layer_norm(x, weight.shape, weight, bias, eps)
    return F.pad(F.layer_norm(x[:, registers:], weight.shape, weight, bias, eps), (0, 0, registers, 0))


ACTIVATIONS = {"kelu": kelu_where, "gelu": F.gelu}
ORIGINAL_ACTIVATIONS = {"kelu": kelu_masks, "gelu": F.gelu}


def conv_mlp(x: Tensor, weights: tuple[Tensor, ...], activation: Function, eps: float) -> Tensor:
    """SdP-Net's ConvMLP on a picture, channels last throughout: F.layer_norm, F.conv2d, F.linear, without a copy.

    ``weights``: norm1 (weight, bias), depthwise (C, 1, k, k), pointwise (C, C), norm2 (weight, bias), expand, project.
    """
    gain1, shift1, depthwise, pointwise, gain2, shift2, expand, project = weights
    x = x.permute(0, 2, 3, 1)
    h = F.layer_norm(x, gain1.shape, gain1, shift1, eps).permute(0, 3, 1, 2)
    h = F.conv2d(h, depthwise, padding=depthwise.shape[-1] // 2, groups=depthwise.shape[0]).permute(0, 2, 3, 1)
    x = x + activation(F.linear(h, pointwise))
    h = F.layer_norm(x, gain2.shape, gain2, shift2, eps)
    return (x + F.linear(activation(F.linear(h, expand)), project)).permute(0, 3, 1, 2)


def conv_mlp_original(x: Tensor, weights: tuple[Tensor, ...], activation: Function, eps: float) -> Tensor:
    """The same as the original has it: moments for the norms, 1×1 convolutions, x in the layout that it comes in."""
    gain1, shift1, depthwise, pointwise, gain2, shift2, expand, project = weights

    def one_by_one(h: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(h, weight[:, :, None, None])

    h = layer_norm_moments(x, gain1, shift1, eps)
    h = F.conv2d(h, depthwise, padding=depthwise.shape[-1] // 2, groups=depthwise.shape[0])
    x = x + activation(one_by_one(h, pointwise))
    h = layer_norm_moments(x, gain2, shift2, eps)
    return x + one_by_one(activation(one_by_one(h, expand)), project)


def encoder(x: Tensor, weights: tuple[Tensor, ...], heads: int, activation: Function, eps: float) -> Tensor:
    """Pre-norm transformer encoder with q/k LayerNorm on tokens (B, T, C): one GEMM for q, k and v, SDPA, no dropout.

    ``weights``: norm1 (weight, bias), qkv (3C, C), q_norm and k_norm (weight, bias each), out (C, C), norm2, up and
    down (weight, bias each).
    """
    return _encoder(x, weights, heads, activation, eps, _packed_heads)


def encoder_original(x: Tensor, weights: tuple[Tensor, ...], heads: int, activation: Function, eps: float) -> Tensor:
    """The same with three projections, as the original has it."""
    return _encoder(x, weights, heads, activation, eps, _separate_heads)


def _packed_heads(h: Tensor, qkv: Tensor, heads: int) -> tuple[Tensor, ...]:
    return F.linear(h, qkv).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind()


def _separate_heads(h: Tensor, qkv: Tensor, heads: int) -> tuple[Tensor, ...]:
    return tuple(F.linear(h, weight).unflatten(-1, (heads, -1)).transpose(1, 2) for weight in qkv.chunk(3))


def _encoder(x, weights, heads, activation, eps, split) -> Tensor:
    gain1, shift1, qkv, gain_q, shift_q, gain_k, shift_k, out, gain2, shift2, up, up_bias, down, down_bias = weights
    q, k, v = split(F.layer_norm(x, gain1.shape, gain1, shift1, eps), qkv, heads)
    q = F.layer_norm(q, gain_q.shape, gain_q, shift_q, eps).to(v.dtype)  # autocast may have made them fp32
    k = F.layer_norm(k, gain_k.shape, gain_k, shift_k, eps).to(v.dtype)
    x = x + F.linear(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2), out)
    h = activation(F.linear(F.layer_norm(x, gain2.shape, gain2, shift2, eps), up, up_bias))
    return x + F.linear(h, down, down_bias)


def convnext_block(x: Tensor, weights: tuple[Tensor, ...], activation: Function, eps: float) -> Tensor:
    """ConvNeXt's block on a picture, channels last throughout: F.conv2d, F.layer_norm, F.linear, without a copy.

    ``weights``: depthwise (C, 1, k, k), norm, expand, project, each with its bias, and the layer scale.
    """
    depthwise, bias, gain, shift, expand, bias1, project, bias2, scale = weights
    h = F.conv2d(x, depthwise, bias, padding=depthwise.shape[-1] // 2, groups=depthwise.shape[0]).permute(0, 2, 3, 1)
    h = F.linear(activation(F.linear(F.layer_norm(h, gain.shape, gain, shift, eps), expand, bias1)), project, bias2)
    return x + (scale * h).permute(0, 3, 1, 2)


def on_tokens(block: Function, grid: tuple[int, int], registers: int) -> Function:
    """A block of pictures on a token buffer (B, T, C) whose registers pass by: sliced off and put back."""

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        picture = x[:, registers:].unflatten(1, grid).permute(0, 3, 1, 2)
        y = block(picture, *parameters).permute(0, 2, 3, 1).flatten(1, 2)
        return torch.cat([x[:, :registers], y], dim=1) if registers else y

    return run
