"""The models' activations by name; KeLü runs on its own kernels, the others are PyTorch's."""

from torch import Tensor

from ..backends import check_backend
from ..reference.activations import FUNCTIONS
from ._checks import check_floating
from .kelu import kelu

ACTIVATIONS = tuple(FUNCTIONS)


def check_activation(name: str) -> None:
    """One of ACTIVATIONS."""
    if name not in FUNCTIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {name!r}")


def activation(x: Tensor, name: str, *, backend: str | None = None) -> Tensor:
    """Apply the activation called ``name`` (one of ``ACTIVATIONS``) to a floating tensor; same shape and dtype.

    ``fast_gelu`` is GELU's tanh form, ``leaky_relu`` has slope 0.01, ``none`` returns x itself.

    Raises:
        TypeError: x is not a floating tensor. ValueError: unknown name or backend.
    """
    check_floating("x", x)
    check_activation(name)
    check_backend(backend)
    return kelu(x, backend=backend) if name == "kelu" else FUNCTIONS[name](x)
