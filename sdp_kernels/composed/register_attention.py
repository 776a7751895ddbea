"""``register_attention`` as our LayerNorm for q and k and PyTorch's scaled_dot_product_attention (flash, cuDNN, memory
efficient, as PyTorch chooses). Dropout, whose mask that one draws elsewhere, takes the reference's explicit form."""

from torch import Tensor

from .. import reference
from ..backends import BACKENDS
from ..ops.layer_norm_2d import layer_norm_2d
from ..reference.precision import autocast_dtype

BACKENDS["composed"].operators.add("register_attention")


def _normed(x: Tensor, norm: tuple[Tensor, Tensor] | None, eps: float) -> Tensor:
    """x (B, T, h, d) of any strides, each row of d normalised; a copy where there is a norm."""
    return x if norm is None else layer_norm_2d(x.flatten(1, 2), *norm, eps).view(x.shape)


def register_attention(
    qkv: Tensor,
    q_norm: tuple[Tensor, Tensor] | None = None,
    k_norm: tuple[Tensor, Tensor] | None = None,
    eps: float = 1e-5,
    scale: float | None = None,
    registers: int = 0,
    attend: str = "all",
    dropout: float = 0.0,
    rng: Tensor | None = None,
    layer: int = 0,
) -> Tensor:
    """Same arguments and result as :func:`sdp_kernels.reference.register_attention.register_attention`."""
    q, k, v = qkv.to(autocast_dtype(qkv) or qkv.dtype).unbind(2)
    q, k = _normed(q, q_norm, eps), _normed(k, k_norm, eps)
    return reference.register_attention.attention(q, k, v, scale, registers, attend, dropout, rng, layer)
