"""The activations of the models by name, in plain PyTorch."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from .kelu import kelu


def fast_gelu(x: Tensor) -> Tensor:
    """GELU's tanh form."""
    return F.gelu(x, approximate="tanh")


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "kelu": kelu,
    "gelu": F.gelu,
    "fast_gelu": fast_gelu,
    "relu": F.relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "leaky_relu": F.leaky_relu,
    "selu": F.selu,
}
