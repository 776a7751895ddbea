"""Fused kernels for hybrid conv–attention vision models: the public names, nothing else."""

from importlib.metadata import PackageNotFoundError, version

from . import _loading  # noqa: F401  finds the kernels that can run here
from .backends import UnsupportedError, use_backend
from .modules import ConvMLP, ConvNeXtBlock, DepthwiseConv2d, KeLU, LayerNorm2d, RegisterAttention
from .ops.activation import ACTIVATIONS, activation
from .ops.conv_mlp import ConvMLPWeights, conv_mlp
from .ops.convnext_block import ConvNeXtWeights, convnext_block
from .ops.depthwise_conv2d import Norm, depthwise_conv2d
from .ops.dropout import dropout, make_rng
from .ops.feed_forward import FeedForwardWeights, feed_forward
from .ops.kelu import kelu
from .ops.layer_norm_2d import layer_norm_2d
from .ops.linear import linear
from .ops.register_attention import ATTEND, register_attention

try:
    __version__ = version("sdp-kernels")
except PackageNotFoundError:  # run from a source tree that nobody installed
    __version__ = "0+source"

__all__ = [
    "ACTIVATIONS",
    "ATTEND",
    "ConvMLP",
    "ConvMLPWeights",
    "ConvNeXtBlock",
    "ConvNeXtWeights",
    "DepthwiseConv2d",
    "FeedForwardWeights",
    "KeLU",
    "LayerNorm2d",
    "Norm",
    "RegisterAttention",
    "UnsupportedError",
    "activation",
    "conv_mlp",
    "convnext_block",
    "depthwise_conv2d",
    "dropout",
    "feed_forward",
    "kelu",
    "layer_norm_2d",
    "linear",
    "make_rng",
    "register_attention",
    "use_backend",
]
