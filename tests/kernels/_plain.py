"""The operators once more in plain PyTorch, written for the tests alone and without the package: what "right" is.

Evaluated in fp64 they are the exact result, in the kernel's own dtype they are PyTorch's error to compare with.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def kelu(x: Tensor) -> Tensor:
    a = 3.5
    inside = 0.5 * x * (1 + x / a + torch.sin(math.pi * x / a) / math.pi)
    return torch.where(x > a, x, torch.where(x < -a, torch.zeros_like(x), inside))


def without_registers(y: Tensor, registers: int) -> Tensor:
    return torch.cat([torch.zeros_like(y[:, :registers]), y[:, registers:]], 1) if registers else y


def layer_norm_2d(x: Tensor, weight: Tensor, bias: Tensor, eps: float, registers: int = 0) -> Tensor:
    weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    if x.dim() == 4:
        return F.layer_norm(x.permute(0, 2, 3, 1), weight.shape, weight, bias, eps).permute(0, 3, 1, 2)
    return without_registers(F.layer_norm(x, weight.shape, weight, bias, eps), registers)


def depthwise_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, grid: tuple[int, int] | None = None, registers: int = 0
) -> Tensor:
    """Shifted and weighted copies added up, as the definition says."""
    if x.dim() == 3:
        picture = x[:, registers:].reshape(x.shape[0], *grid, x.shape[2]).permute(0, 3, 1, 2)
        y = depthwise_conv2d(picture, weight, bias).permute(0, 2, 3, 1).flatten(1, 2)
        return torch.cat([torch.zeros_like(x[:, :registers]), y], 1)
    k, (height, width) = weight.shape[-1], x.shape[2:]
    padded = F.pad(x, [k // 2] * 4)
    terms = [
        padded[:, :, i : i + height, j : j + width] * weight[:, 0, i, j].view(-1, 1, 1)
        for i in range(k)
        for j in range(k)
    ]
    y = torch.stack(terms).sum(0)
    return y if bias is None else y + bias.view(-1, 1, 1)


ACTIVATIONS = {
    "none": lambda x: x,
    "kelu": kelu,
    "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
    "fast_gelu": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: x.clamp(min=0),
    "tanh": torch.tanh,
    "sigmoid": lambda x: 1 / (1 + torch.exp(-x)),
    "leaky_relu": lambda x: torch.where(x > 0, x, 0.01 * x),
    "selu": lambda x: (
        1.0507009873554804934193349852946
        * torch.where(x > 0, x, 1.6732632423543772848170429916717 * (torch.exp(x.clamp(max=0)) - 1))
    ),
}


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    layer_scale: Tensor | None = None,
    residual: Tensor | None = None,
    registers: int = 0,
) -> Tensor:
    y = x @ weight.T
    y = ACTIVATIONS[activation](y if bias is None else y + bias)
    y = without_registers(y if layer_scale is None else y * layer_scale, registers)
    return y if residual is None else residual + y


def conv_mlp(x: Tensor, w, grid: tuple[int, int], registers: int, activation: str, eps: float) -> Tensor:
    h = layer_norm_2d(x, w.norm1_weight, w.norm1_bias, eps, registers)
    h = depthwise_conv2d(h, w.depthwise_weight, w.depthwise_bias, grid, registers)
    x = linear(h, w.pointwise_weight, w.pointwise_bias, activation, w.layer_scale1, x, registers)
    h = layer_norm_2d(x, w.norm2_weight, w.norm2_bias, eps, registers)
    h = linear(h, w.expand_weight, w.expand_bias, activation, registers=registers)
    return linear(h, w.project_weight, w.project_bias, "none", w.layer_scale2, x, registers)


def convnext_block(x: Tensor, w, grid: tuple[int, int], registers: int, activation: str, eps: float) -> Tensor:
    h = depthwise_conv2d(x, w.depthwise_weight, w.depthwise_bias, grid, registers)
    h = layer_norm_2d(h, w.norm_weight, w.norm_bias, eps, registers)
    h = linear(h, w.expand_weight, w.expand_bias, activation, registers=registers)
    return linear(h, w.project_weight, w.project_bias, "none", w.layer_scale, x, registers)


def feed_forward(x: Tensor, w, activation: str, eps: float) -> Tensor:
    h = linear(layer_norm_2d(x, w.norm_weight, w.norm_bias, eps), w.expand_weight, w.expand_bias, activation)
    return linear(h, w.project_weight, w.project_bias, "none", w.layer_scale, x)


def register_attention(qkv, q_norm=None, k_norm=None, eps=1e-5, scale=None, registers=0, attend="all") -> Tensor:
    """Head by head, query by query."""
    batch, tokens, _, heads, d = qkv.shape
    scale = d**-0.5 if scale is None else scale
    samples = []
    for b in range(batch):
        columns = []
        for h in range(heads):
            q, k, v = qkv[b, :, 0, h], qkv[b, :, 1, h], qkv[b, :, 2, h]
            q = q if q_norm is None else F.layer_norm(q, (d,), *q_norm, eps)
            k = k if k_norm is None else F.layer_norm(k, (d,), *k_norm, eps)
            rows = []
            for t in range(tokens):
                first, last = 0, tokens
                if t >= registers and attend in ("image_to_image", "separate"):
                    first = registers
                if t < registers and attend in ("registers_to_registers", "separate"):
                    last = registers
                weights = torch.softmax((k[first:last] @ q[t]) * scale, 0)
                rows.append(weights @ v[first:last])
            columns.append(torch.stack(rows))
        samples.append(torch.cat(columns, 1))
    return torch.stack(samples) if samples else qkv.new_zeros(0, tokens, heads * d)
