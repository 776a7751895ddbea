"""SdP-Net: convolution and attention blocks over one token buffer."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from .config import SdPNetConfig
from .embedding import Embedding
from .layers import Block, Encoder, Head, Part


class SdPNet(nn.Module):
    """Images (B, in_channels, H, W) → logits (B, num_classes).

    ::

        patch conv (p×p, stride p, no bias) + position → activation ─┐
                                              R register embeddings ─┴→ N × block → encoder → head
        block   = conv_blocks × ConvMLP, then Encoder                 (conv_first; else the encoder first)
        ConvMLP:  x ← x + DropPath(γ₁ · act(PW₁(DW_k(LN2d(x)))))      image tokens only, eps 1e-6
                  x ← x + DropPath(γ₂ · PW₃(act(PW₂(LN2d(x)))))
        Encoder:  t ← t + DropPath(γ₃ · Drop(O(softmax(LN_q(q)·LN_k(k)ᵀ/√d)·v)))     q,k,v = QKV(LN(t)), eps 1e-5
                  t ← t + DropPath(γ₄ · Drop(W₂(Drop(act(W₁(LN(t)))))))

    The tokens live in one contiguous buffer (B, R + H·W, C), registers first, in the autocast dtype or the parameters'.
    Weights are initialised from a normal of std 0.02 (matrices and kernels truncated), biases 0, norms 1.

    :param config: every option; see :class:`SdPNetConfig`.
    :param fused: False uses the reference backend for every operator, True the best backend there is.
    :raises ValueError: images whose size is no multiple of the patch size or with a wrong channel count.
    """

    def __init__(self, config: SdPNetConfig, *, fused: bool = False) -> None:
        super().__init__()
        if not isinstance(config, SdPNetConfig):
            raise TypeError(f"config must be an SdPNetConfig, got {type(config).__name__}")
        self.config = config
        ids = itertools.count()
        self.embedding = Embedding(config)
        self.blocks = nn.ModuleList(Block(config, rate, ids) for rate in config.drop_path_rates)
        self.encoder = Encoder(config, 0.0, ids)
        self.head = Head(config, ids)
        rates = (config.dropout, config.attention_dropout, config.projection_dropout, config.head_dropout)
        self.random = any((*rates, *config.drop_path))
        self.set_fused(fused)

    def set_fused(self, fused: bool) -> SdPNet:
        """Switches kernels, never the maths; returns self."""
        for module in self.modules():
            if isinstance(module, Part):
                module.backend = None if fused else "reference"
        self.fused = fused
        return self

    def forward_tokens(self, images: Tensor, rng: Tensor | None = None) -> Tensor:
        """The token buffer (B, R + H·W, C) behind the final encoder."""
        grid = self.embedding.grid(images)
        x = self.embedding(images, grid)
        for block in self.blocks:
            x = block(x, grid, rng)
        return self.encoder(x, rng)

    def forward_features(self, images: Tensor, rng: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(image tokens (B, H·W, C), registers (B, R, C)), both views of the token buffer."""
        x = self.forward_tokens(images, self._rng(images, rng))
        return x[:, self.config.registers :], x[:, : self.config.registers]

    def forward(self, images: Tensor, rng: Tensor | None = None) -> Tensor:
        """Logits (B, num_classes).

        :param rng: int64 (seed, step, first sample) from :func:`sdp_kernels.make_rng`, read only in training with a
            rate above 0. Without it a fresh one is drawn from torch's default generator of the images' device.
        """
        rng = self._rng(images, rng)
        return self.head(self.forward_tokens(images, rng), rng)

    def _rng(self, images: Tensor, rng: Tensor | None) -> Tensor | None:
        if rng is not None or not (self.training and self.random):
            return rng
        seed = torch.randint(2**63 - 1, (1,), device=images.device)
        return torch.cat((seed, seed.new_zeros(2)))

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay leaves alone: biases, norms, embeddings, registers, γ."""
        embeddings = ("embedding.position.", "embedding.registers")
        return {
            name for name, parameter in self.named_parameters() if parameter.dim() < 2 or name.startswith(embeddings)
        }
