"""The parts of SdP-Net on one token buffer (B, R + H·W, C), registers first.

Each part holds parameters and calls public operators of :mod:`sdp_kernels`; inside a block nothing is sliced, permuted
or concatenated. ``backend`` is "reference" (unfused) or None (the best there is); :meth:`SdPNet.set_fused` sets it.
``layer`` numbers a place where random masks are drawn, one number per operator call, so that no two share a mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import sdp_kernels
from sdp_kernels import ConvMLPWeights, FeedForwardWeights

from .config import SdPNetConfig

INIT_STD = 0.02


class Part(nn.Module):
    """Something that calls an operator: carries which backend to ask for."""

    backend: str | None = "reference"


class Dense(Part):
    """y = act(x Wᵀ + b), x (..., in), with the epilogues of :func:`sdp_kernels.linear` as keywords."""

    def __init__(self, inputs: int, outputs: int, bias: bool, activation: str = "none") -> None:
        super().__init__()
        self.activation = activation
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        nn.init.trunc_normal_(self.weight, std=INIT_STD)

    def forward(self, x: Tensor, **epilogue: Any) -> Tensor:
        return sdp_kernels.linear(
            x, self.weight, self.bias, activation=self.activation, backend=self.backend, **epilogue
        )


class Norm(Part):
    """LayerNorm over the last dimension of a token buffer (B, T, C), fp32 statistics."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return sdp_kernels.layer_norm_2d(x, self.weight, self.bias, self.eps, backend=self.backend)

    def branch(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(x, normed x) for a residual branch: x's gradients from both join in the norm's backward pass."""
        return sdp_kernels.layer_norm_2d(x, self.weight, self.bias, self.eps, with_input=True, backend=self.backend)


class Affine(nn.Module):
    """Weight and bias (C,) of a LayerNorm that another operator applies."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))


def scale_vector(config: SdPNetConfig) -> nn.Parameter | None:
    """γ of one residual branch, or None when LayerScale is off."""
    return None if config.layer_scale is None else nn.Parameter(torch.full((config.dim,), config.layer_scale))


class ConvMLP(Part):
    """x ← x + DropPath(γ₁ · act(PW₁(DW_k(LN(x))))), x ← x + DropPath(γ₂ · PW₃(act(PW₂(LN(x))))) on the image tokens.

    Register rows pass by untouched.
    """

    def __init__(self, config: SdPNetConfig, drop_path: float, ids: Iterator[int]) -> None:
        super().__init__()
        dim, hidden, k = config.dim, int(config.conv_ratio * config.dim), config.kernel_size
        self.activation, self.eps, self.registers = config.activation, config.conv_eps, config.registers
        self.drop_path, self.layer = drop_path, next(ids)
        self.norm1 = Affine(dim)
        self.depthwise = nn.Module()
        self.depthwise.weight = nn.Parameter(torch.empty(dim, 1, k, k))
        self.depthwise.bias = nn.Parameter(torch.zeros(dim)) if config.depthwise_bias else None
        nn.init.trunc_normal_(self.depthwise.weight, std=INIT_STD)
        self.pointwise = Dense(dim, dim, config.pointwise_bias)
        self.scale1 = scale_vector(config)
        self.norm2 = Affine(dim)
        self.expand = Dense(dim, hidden, config.pointwise_bias)
        self.project = Dense(hidden, dim, config.pointwise_bias)
        self.scale2 = scale_vector(config)

    def weights(self) -> ConvMLPWeights:
        """The parameters in the order that :func:`sdp_kernels.conv_mlp` takes."""
        return ConvMLPWeights(
            self.norm1.weight, self.norm1.bias, self.depthwise.weight, self.depthwise.bias,
            self.pointwise.weight, self.pointwise.bias, self.scale1,
            self.norm2.weight, self.norm2.bias, self.expand.weight, self.expand.bias,
            self.project.weight, self.project.bias, self.scale2,
        )  # fmt: skip

    def forward(self, x: Tensor, grid: tuple[int, int], rng: Tensor | None) -> Tensor:
        return sdp_kernels.conv_mlp(
            x, self.weights(), grid=grid, registers=self.registers, activation=self.activation, eps=self.eps,
            drop_path=self.drop_path if self.training else 0.0, rng=rng, layer=self.layer, backend=self.backend,
        )  # fmt: skip


class Encoder(Part):
    """t ← t + DropPath(γ₃ · O(attention(QKV(LN(t))))), then t ← t + DropPath(γ₄ · FFN(LN(t))); all read all."""

    def __init__(self, config: SdPNetConfig, drop_path: float, ids: Iterator[int]) -> None:
        super().__init__()
        dim, hidden, head_dim = config.dim, int(config.ffn_ratio * config.dim), config.dim // config.heads
        self.heads, self.eps, self.registers = config.heads, config.token_eps, config.registers
        self.drop_path, self.dropout = drop_path, config.dropout
        self.attention_dropout, self.projection_dropout = config.attention_dropout, config.projection_dropout
        # feed_forward takes the number of its first masks and the one that follows.
        self.attention_layer, self.projection_layer, self.up_layer, self.down_layer = (next(ids) for _ in range(4))
        self.norm1 = Norm(dim, config.token_eps)
        self.qkv = Dense(dim, 3 * dim, bias=False)
        self.q_norm = Affine(head_dim) if config.qk_norm else None
        self.k_norm = Affine(head_dim) if config.qk_norm else None
        self.out = Dense(dim, dim, bias=False)
        self.scale1 = scale_vector(config)
        self.norm2 = Norm(dim, config.token_eps)
        self.up = Dense(dim, hidden, bias=True, activation=config.activation)
        self.gate = Dense(dim, hidden, bias=False) if config.gated_ffn else None
        self.down = Dense(hidden, dim, bias=True)
        self.scale2 = scale_vector(config)

    def attention(self, x: Tensor, rng: Tensor | None) -> Tensor:
        """Normed tokens (B, T, C) → (B, T, C), before the output projection."""
        packed = self.qkv(x).unflatten(-1, (3, self.heads, -1))
        return sdp_kernels.register_attention(
            packed,
            None if self.q_norm is None else (self.q_norm.weight, self.q_norm.bias),
            None if self.k_norm is None else (self.k_norm.weight, self.k_norm.bias),
            eps=self.eps, registers=self.registers, dropout=self.attention_dropout if self.training else 0.0,
            rng=rng, layer=self.attention_layer, backend=self.backend,
        )  # fmt: skip

    def feed_forward(self, x: Tensor, rng: Tensor | None, dropout: float, drop_path: float) -> Tensor:
        """t ← t + DropPath(γ₄ · FFN(LN(t)))."""
        masks = {"dropout": dropout, "drop_path": drop_path, "rng": rng}
        up, down = self.up, self.down
        if self.gate is None:
            weights = FeedForwardWeights(
                self.norm2.weight, self.norm2.bias, up.weight, up.bias, down.weight, down.bias, self.scale2
            )
            return sdp_kernels.feed_forward(
                x, weights, activation=up.activation, eps=self.eps, layer=self.up_layer, backend=self.backend, **masks
            )
        x, h = self.norm2.branch(x)
        # What is dropped of one factor is dropped of the product.
        h = up(h, dropout=dropout, rng=rng, layer=self.up_layer) * self.gate(h)
        return down(h, layer_scale=self.scale2, residual=x, layer=self.down_layer, **masks)

    def forward(self, x: Tensor, rng: Tensor | None) -> Tensor:
        rates = (self.projection_dropout, self.dropout, self.drop_path)
        projection, dropout, drop_path = rates if self.training else (0.0, 0.0, 0.0)
        masks = {"dropout": projection, "drop_path": drop_path, "rng": rng}
        x, h = self.norm1.branch(x)
        h = self.attention(h, rng)
        x = self.out(h, layer_scale=self.scale1, residual=x, layer=self.projection_layer, **masks)
        return self.feed_forward(x, rng, dropout, drop_path)


class Block(nn.Module):
    """``conv_blocks`` ConvMLPs and an encoder, in the order of ``conv_first``."""

    def __init__(self, config: SdPNetConfig, drop_path: float, ids: Iterator[int]) -> None:
        super().__init__()
        self.conv_first = config.conv_first
        self.convs = nn.ModuleList(ConvMLP(config, drop_path, ids) for _ in range(config.conv_blocks))
        self.encoder = Encoder(config, drop_path, ids)

    def forward(self, x: Tensor, grid: tuple[int, int], rng: Tensor | None) -> Tensor:
        if not self.conv_first:
            x = self.encoder(x, rng)
        for conv in self.convs:
            x = conv(x, grid, rng)
        return self.encoder(x, rng) if self.conv_first else x


class Head(Part):
    """Token buffer → logits (B, num_classes); the three forms of ``SdPNetConfig.head``."""

    def __init__(self, config: SdPNetConfig, ids: Iterator[int]) -> None:
        super().__init__()
        self.kind, self.registers = config.head, config.registers
        self.dropout, self.layer = config.head_dropout, next(ids)
        classes, bias = config.num_classes, config.head_bias
        self.norm = None if config.head == "mean" else Norm(config.dim, config.token_eps)
        self.first = Dense(config.dim, classes, bias, "tanh" if config.head == "tanh" else "none")
        self.second = Dense(classes, classes, bias) if config.head == "tanh" else None

    def forward(self, x: Tensor, rng: Tensor | None) -> Tensor:
        tokens = x[:, self.registers :] if self.kind == "mean" else x[:, : self.registers]
        pooled = tokens.mean(1, keepdim=True)
        if self.norm is not None:
            pooled = self.norm(pooled)
        if self.second is None:
            return self.first(pooled).squeeze(1)
        rate = self.dropout if self.training else 0.0
        return self.second(self.first(pooled, dropout=rate, rng=rng, layer=self.layer)).squeeze(1)
