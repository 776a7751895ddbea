"""``nn.Module`` faces of the operators, for use in one's own model. Each takes ``backend``: None chooses.

Kernels and matrices start from a truncated normal of std 0.02, biases at 0, norms at 1 and 0. Wrong options raise
TypeError or ValueError that name the option, when the module is made.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .ops._checks import check_eps, check_layer, check_rate
from .ops.activation import check_activation
from .ops.conv_mlp import ConvMLPWeights, conv_mlp
from .ops.convnext_block import ConvNeXtWeights, convnext_block
from .ops.depthwise_conv2d import KERNEL_SIZES, depthwise_conv2d
from .ops.kelu import kelu
from .ops.layer_norm_2d import layer_norm_2d
from .ops.register_attention import ATTEND, register_attention


def _check_positive(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive int, got {value!r}")


def _check_kernel_size(value: int) -> None:
    if value not in KERNEL_SIZES:
        raise ValueError(f"kernel_size must be one of {KERNEL_SIZES}, got {value!r}")


def _parameter(*shape: int, std: float = 0.02) -> nn.Parameter:
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(shape), std=std))


class KeLU(nn.Module):
    """KeLü, see :func:`sdp_kernels.kelu`. Any shape."""

    def __init__(self, backend: str | None = None):
        super().__init__()
        self.backend = backend

    def forward(self, x: Tensor) -> Tensor:
        return kelu(x, backend=self.backend)


class LayerNorm2d(nn.Module):
    """LayerNorm over C of a picture (B, C, H, W) or a token buffer (B, T, C), see :func:`sdp_kernels.layer_norm_2d`.

    ``registers`` rows at the front of a token buffer are written as 0. Parameters: weight (ones), bias (zeros).
    """

    def __init__(self, channels: int, eps: float = 1e-6, registers: int = 0, backend: str | None = None):
        super().__init__()
        _check_positive("channels", channels)
        check_eps(eps)
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps, self.registers, self.backend = eps, registers, backend

    def forward(self, x: Tensor) -> Tensor:
        registers = self.registers if x.dim() == 3 else 0
        return layer_norm_2d(x, self.weight, self.bias, self.eps, registers=registers, backend=self.backend)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}, registers={self.registers}"


class DepthwiseConv2d(nn.Module):
    """Depthwise k×k convolution, stride 1, "same" padding, see :func:`sdp_kernels.depthwise_conv2d`.

    Parameters: weight (C, 1, k, k) as in ``nn.Conv2d(C, C, k, groups=C)``, bias (C,) if asked for.
    """

    def __init__(self, channels: int, kernel_size: int = 7, bias: bool = True, backend: str | None = None):
        super().__init__()
        _check_positive("channels", channels)
        _check_kernel_size(kernel_size)
        self.weight = _parameter(channels, 1, kernel_size, kernel_size)
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None
        self.backend = backend

    def forward(self, x: Tensor, grid: tuple[int, int] | None = None, registers: int = 0) -> Tensor:
        return depthwise_conv2d(x, self.weight, self.bias, grid=grid, registers=registers, backend=self.backend)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, kernel_size={self.weight.shape[-1]}, bias={self.bias is not None}"


class _Block(nn.Module):
    """A module around an operator on image tokens: parameters by the names of its weights, and the call."""

    operator: Callable[..., Tensor]
    kind: type[ConvMLPWeights] | type[ConvNeXtWeights]

    def __init__(
        self,
        dim: int,
        kernel_size: int,
        activation: str,
        layer_scale: float | None,
        drop_path: float,
        eps: float,
        layer: int,
        backend: str | None,
    ):
        super().__init__()
        _check_positive("dim", dim)
        _check_kernel_size(kernel_size)
        check_activation(activation)
        if isinstance(layer_scale, bool) or not isinstance(layer_scale, (int, float, type(None))):
            raise TypeError(f"layer_scale must be a number or None, got {type(layer_scale).__name__}")
        check_rate("drop_path", drop_path)
        check_eps(eps)
        check_layer(layer)
        self.activation, self.drop_path, self.eps = activation, drop_path, eps
        self.layer, self.backend = layer, backend

    def weights(self) -> ConvMLPWeights | ConvNeXtWeights:
        """The parameters in the operator's order."""
        return self.kind(*(getattr(self, name) for name in self.kind._fields))

    def forward(
        self, x: Tensor, grid: tuple[int, int] | None = None, registers: int = 0, rng: Tensor | None = None
    ) -> Tensor:
        return self.operator(
            x,
            self.weights(),
            grid=grid,
            registers=registers,
            activation=self.activation,
            eps=self.eps,
            drop_path=self.drop_path if self.training else 0.0,
            rng=rng,
            layer=self.layer,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        dim, _, kernel_size, _ = self.depthwise_weight.shape
        hidden, activation = self.expand_weight.shape[0], self.activation
        return f"{dim}, kernel_size={kernel_size}, {hidden=}, {activation=}, drop_path={self.drop_path}"


class ConvMLP(_Block):
    """Both residual branches of SdP-Net's ConvMLP on a token buffer or a picture, see :func:`sdp_kernels.conv_mlp`.

    Args:
        dim: channels C. kernel_size: of the depthwise convolution. mlp_ratio: hidden width = round(ratio · C).
        activation: one of ``ACTIVATIONS``. bias: of the depthwise and the pointwise convolutions.
        layer_scale: initial value of γ₁ and γ₂, None for none. drop_path: rate in training. eps: of both norms.
        layer: number of this module for its drop-path masks; give each module of a model its own.
    """

    operator, kind = staticmethod(conv_mlp), ConvMLPWeights

    def __init__(
        self,
        dim: int,
        kernel_size: int = 7,
        mlp_ratio: float = 4.0,
        activation: str = "gelu",
        bias: bool = False,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        eps: float = 1e-6,
        layer: int = 0,
        backend: str | None = None,
    ):
        super().__init__(dim, kernel_size, activation, layer_scale, drop_path, eps, layer, backend)
        hidden = round(mlp_ratio * dim)
        _check_positive("round(mlp_ratio · dim)", hidden)

        def vector(size: int, value: float, wanted: bool = True) -> nn.Parameter | None:
            return nn.Parameter(torch.full((size,), value)) if wanted else None

        scaled, scale = layer_scale is not None, float(layer_scale or 0)
        self.norm1_weight, self.norm1_bias = vector(dim, 1.0), vector(dim, 0.0)
        self.depthwise_weight = _parameter(dim, 1, kernel_size, kernel_size)
        self.depthwise_bias = vector(dim, 0.0, bias)
        self.pointwise_weight, self.pointwise_bias = _parameter(dim, dim), vector(dim, 0.0, bias)
        self.layer_scale1 = vector(dim, scale, scaled)
        self.norm2_weight, self.norm2_bias = vector(dim, 1.0), vector(dim, 0.0)
        self.expand_weight, self.expand_bias = _parameter(hidden, dim), vector(hidden, 0.0, bias)
        self.project_weight, self.project_bias = _parameter(dim, hidden), vector(dim, 0.0, bias)
        self.layer_scale2 = vector(dim, scale, scaled)


class ConvNeXtBlock(_Block):
    """A ConvNeXt block on a picture or a token buffer, see :func:`sdp_kernels.convnext_block`.

    Args:
        dim: channels C. kernel_size: of the depthwise convolution. mlp_ratio: hidden width = int(ratio · C).
        activation: one of ``ACTIVATIONS``. layer_scale: initial value of γ, None for none.
        drop_path: rate in training. eps: of the norm.
        layer: number of this module for its drop-path mask; give each module of a model its own.
    """

    operator, kind = staticmethod(convnext_block), ConvNeXtWeights

    def __init__(
        self,
        dim: int,
        kernel_size: int = 7,
        mlp_ratio: float = 4.0,
        activation: str = "gelu",
        layer_scale: float | None = 1e-6,
        drop_path: float = 0.0,
        eps: float = 1e-6,
        layer: int = 0,
        backend: str | None = None,
    ):
        super().__init__(dim, kernel_size, activation, layer_scale, drop_path, eps, layer, backend)
        hidden = int(mlp_ratio * dim)
        _check_positive("int(mlp_ratio · dim)", hidden)
        self.depthwise_weight = _parameter(dim, 1, kernel_size, kernel_size)
        self.depthwise_bias = nn.Parameter(torch.zeros(dim))
        self.norm_weight, self.norm_bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))
        self.expand_weight, self.expand_bias = _parameter(hidden, dim), nn.Parameter(torch.zeros(hidden))
        self.project_weight, self.project_bias = _parameter(dim, hidden), nn.Parameter(torch.zeros(dim))
        self.layer_scale = None if layer_scale is None else nn.Parameter(torch.full((dim,), float(layer_scale)))


class RegisterAttention(nn.Module):
    """Attention over packed (B, T, 3, h, d) with learned per-head q/k LayerNorm, see
    :func:`sdp_kernels.register_attention`. The projections around it are the model's.

    Parameters, if ``qk_norm``: q_norm_weight, q_norm_bias, k_norm_weight, k_norm_bias, each (d,).

    Args:
        head_dim: d, a multiple of 8 up to 128. qk_norm: normalise q and k per head. eps: of these norms.
        attend: which tokens a query may read, one of ``ATTEND``. dropout: rate on the attention weights in training.
        layer: number of this module for its dropout masks; give each module of a model its own.
    """

    def __init__(
        self,
        head_dim: int,
        qk_norm: bool = True,
        eps: float = 1e-5,
        attend: str = "all",
        dropout: float = 0.0,
        layer: int = 0,
        backend: str | None = None,
    ):
        super().__init__()
        _check_positive("head_dim", head_dim)
        if head_dim % 8 or head_dim > 128:
            raise ValueError(f"head_dim must be a multiple of 8 up to 128, got {head_dim}")
        if attend not in ATTEND:
            raise ValueError(f"attend must be one of {', '.join(ATTEND)}, got {attend!r}")
        check_eps(eps)
        check_rate("dropout", dropout)
        check_layer(layer)
        for name in ("q_norm", "k_norm"):
            setattr(self, f"{name}_weight", nn.Parameter(torch.ones(head_dim)) if qk_norm else None)
            setattr(self, f"{name}_bias", nn.Parameter(torch.zeros(head_dim)) if qk_norm else None)
        self.eps, self.attend, self.dropout, self.layer, self.backend = eps, attend, dropout, layer, backend

    def forward(self, qkv: Tensor, registers: int = 0, rng: Tensor | None = None) -> Tensor:
        normed = self.q_norm_weight is not None
        return register_attention(
            qkv,
            (self.q_norm_weight, self.q_norm_bias) if normed else None,
            (self.k_norm_weight, self.k_norm_bias) if normed else None,
            eps=self.eps,
            registers=registers,
            attend=self.attend,
            dropout=self.dropout if self.training else 0.0,
            rng=rng,
            layer=self.layer,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        normed = self.q_norm_weight is not None
        return f"qk_norm={normed}, eps={self.eps}, attend={self.attend!r}, dropout={self.dropout}"
