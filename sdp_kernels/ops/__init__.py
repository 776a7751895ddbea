"""The operators: schema, fakes, checks, choice of backend, autograd and the public function of each, one file each.

Importing the package defines all of them, which the libraries' schema hash is compared with.
"""

from . import (
    activation,
    conv_mlp,
    convnext_block,
    depthwise_conv2d,
    dropout,
    feed_forward,
    kelu,
    layer_norm_2d,
    linear,
    register_attention,
)

__all__ = [
    "activation",
    "conv_mlp",
    "convnext_block",
    "depthwise_conv2d",
    "dropout",
    "feed_forward",
    "kelu",
    "layer_norm_2d",
    "linear",
    "register_attention",
]
