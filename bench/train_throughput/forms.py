"""SdP-Net without this library's kernels: the best plain PyTorch, and the form of the project it comes from.

Both take their parameters from an :class:`sdpnet.models.SdPNet`, so that they compute the same.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sdpnet.models import SdPNet

from ..baselines import ACTIVATIONS, ORIGINAL_ACTIVATIONS, conv_mlp, conv_mlp_original, encoder, encoder_original


class Plain(nn.Module):
    """The best plain PyTorch: channels last throughout, one GEMM for q, k and v, SDPA, F.layer_norm.

    Raises ValueError for options that no speed preset uses.
    """

    def __init__(self, model: SdPNet) -> None:
        super().__init__()
        c = model.config
        unsupported = {
            "conv_first": not c.conv_first,
            "layer_scale": c.layer_scale is not None,
            "depthwise_bias": c.depthwise_bias,
            "pointwise_bias": c.pointwise_bias,
            "gated_ffn": c.gated_ffn,
            "dropout": model.random,
            "qk_norm": not c.qk_norm,
            "head": c.head == "mean",
            "activation": c.activation not in ACTIVATIONS,
        }
        if wrong := [name for name, is_so in unsupported.items() if is_so]:
            values = ", ".join(f"{name}={getattr(c, name)!r}" for name in wrong)
            raise ValueError(f"model: the plain forms are written for the speed presets' options, not for {values}")
        self.model = model
        self.activation = ACTIVATIONS[c.activation]

    def no_weight_decay(self) -> set[str]:
        return {f"model.{name}" for name in self.model.no_weight_decay()}

    def embed(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """Image tokens (B, H·W, C) by the model's own formula: one matrix product and the positions."""
        e = self.model.embedding
        weight = e.patch.weight.unflatten(1, (e.in_channels, *e.patch_size))
        tokens = F.conv2d(images, weight, stride=e.patch_size).flatten(2).transpose(1, 2)
        return (tokens + e.position(grid)).to(e.token_dtype(images.device.type))

    def convolutions(self, tokens: Tensor, block: nn.Module, grid: tuple[int, int]) -> Tensor:
        """The block's ConvMLPs on image tokens (B, H·W, C)."""
        picture = tokens.unflatten(1, grid).permute(0, 3, 1, 2)
        for conv in block.convs:
            picture = conv_mlp(picture, _conv_weights(conv), self.activation, conv.eps)
        return picture.permute(0, 2, 3, 1).flatten(1, 2)

    def encode(self, x: Tensor, module: nn.Module) -> Tensor:
        return encoder(x, _encoder_weights(module), module.heads, self.activation, module.eps)

    def forward(self, images: Tensor, rng: Tensor | None = None) -> Tensor:
        """Images → logits; ``rng`` is there for the trainer's sake and not read."""
        model = self.model
        grid = model.embedding.grid(images)
        tokens = self.embed(images, grid)
        registers = model.embedding.registers.to(tokens.dtype).expand(images.shape[0], -1, -1)
        count = registers.shape[1]
        for block in model.blocks:
            tokens = self.convolutions(tokens, block, grid)
            x = self.encode(torch.cat((registers, tokens), 1), block.encoder)
            registers, tokens = x[:, :count], x[:, count:]
        x = self.encode(torch.cat((registers, tokens), 1), model.encoder)
        return model.head(x, None)


class Original(Plain):
    """As the original has it: contiguous pictures, moments for the norms, 1×1 convolutions, three projections."""

    def __init__(self, model: SdPNet) -> None:
        super().__init__(model)
        self.activation = ORIGINAL_ACTIVATIONS[model.config.activation]

    def convolutions(self, tokens: Tensor, block: nn.Module, grid: tuple[int, int]) -> Tensor:
        picture = tokens.transpose(1, 2).unflatten(2, grid).contiguous()
        for conv in block.convs:
            picture = conv_mlp_original(picture, _conv_weights(conv), self.activation, conv.eps)
        return picture.flatten(2).transpose(1, 2)

    def encode(self, x: Tensor, module: nn.Module) -> Tensor:
        return encoder_original(x, _encoder_weights(module), module.heads, self.activation, module.eps)


def _conv_weights(conv: nn.Module) -> tuple[Tensor, ...]:
    """In the order of bench.baselines.conv_mlp."""
    return (
        conv.norm1.weight, conv.norm1.bias, conv.depthwise.weight, conv.pointwise.weight,
        conv.norm2.weight, conv.norm2.bias, conv.expand.weight, conv.project.weight,
    )  # fmt: skip


def _encoder_weights(e: nn.Module) -> tuple[Tensor, ...]:
    """In the order of bench.baselines.encoder."""
    return (
        e.norm1.weight, e.norm1.bias, e.qkv.weight, e.q_norm.weight, e.q_norm.bias, e.k_norm.weight, e.k_norm.bias,
        e.out.weight, e.norm2.weight, e.norm2.bias, e.up.weight, e.up.bias, e.down.weight, e.down.bias,
    )  # fmt: skip


def build(name: str, model: SdPNet) -> nn.Module:
    """The form called ``name`` around the model, not yet run; torch.compile as a user would call it."""
    if name == "original":
        return Original(model)
    if name == "eager":
        return Plain(model)
    if name == "eager, compiled":
        return torch.compile(Plain(model))
    model.set_fused(True)
    return torch.compile(model, fullgraph=True) if name == "fused, compiled" else model


FORMS = ("original", "eager", "eager, compiled", "fused", "fused, compiled")
