"""``linear`` as PyTorch's GEMM, our activation and the reference's epilogue."""

from torch import Tensor
from torch.nn import functional as F

from ..backends import BACKENDS
from ..ops.activation import activation as activate
from ..reference.linear import finish

BACKENDS["composed"].operators.add("linear")


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    layer_scale: Tensor | None = None,
    residual: Tensor | None = None,
    registers: int = 0,
    dropout_rate: float = 0.0,
    drop_path: float = 0.0,
    rng: Tensor | None = None,
    layer: int = 0,
    branch: int = 0,
) -> Tensor:
    """Same arguments and result as :func:`sdp_kernels.reference.linear.linear`."""
    y = activate(F.linear(x, weight, bias), activation)
    return finish(y, layer_scale, residual, registers, dropout_rate, drop_path, rng, layer, branch)
