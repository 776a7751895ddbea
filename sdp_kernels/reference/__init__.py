"""The operators in plain PyTorch: the definition of right. Knows no other backend and registers nothing."""

from . import (
    conv_mlp,
    convnext_block,
    depthwise_conv2d,
    feed_forward,
    kelu,
    layer_norm_2d,
    linear,
    philox,
    register_attention,
)

__all__ = [
    "conv_mlp",
    "convnext_block",
    "depthwise_conv2d",
    "feed_forward",
    "kelu",
    "layer_norm_2d",
    "linear",
    "philox",
    "register_attention",
]
