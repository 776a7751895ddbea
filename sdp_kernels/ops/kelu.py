"""KeLü: the activation x ↦ 0 below −3.5, x above 3.5, and ``x/2 · (1 + x/a + sin(πx/a)/π)`` between."""

import torch
from torch import Tensor

from .. import reference
from ..backends import choose
from ._checks import check_floating
from ._contract import define, differentiating_twice, launch

SCHEMAS = {
    "kelu_fwd": "(Tensor x) -> Tensor",
    "kelu_bwd": "(Tensor grad, Tensor x) -> Tensor",
}


def _fake_fwd(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def _fake_bwd(grad: Tensor, x: Tensor) -> Tensor:
    return torch.empty_like(x)


define("kelu", SCHEMAS, {"kelu_fwd": _fake_fwd, "kelu_bwd": _fake_bwd})


class _KeLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, backend: str) -> Tensor:
        ctx.save_for_backward(x)
        ctx.backend = backend
        return launch(backend, "kelu_fwd", x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (x,) = ctx.saved_tensors
        if differentiating_twice():
            return reference.kelu.kelu_bwd(grad, x), None
        return launch(ctx.backend, "kelu_bwd", grad, x), None


def kelu(x: Tensor, *, backend: str | None = None) -> Tensor:
    """KeLü (Keen Learning Unit), a = 3.5: ``0`` for x < −a, ``x`` for x > a, else ``x/2 · (1 + x/a + sin(πx/a)/π)``.

    Args:
        x: any shape and strides; float32, bfloat16, float16, or float64 (CPU and reference).
        backend: run this backend or raise; None chooses (see :mod:`sdp_kernels.backends`).

    Returns:
        A tensor of x's shape and dtype; x's memory layout where x is dense. Computed in fp32 (fp64 for float64) and
        rounded once; f and f′ are within 2e-7 of the exact value in fp32, within one unit in the last place in 16 bits.

    Backward keeps x (its own bytes per element, nothing else) and recomputes the rest. Twice differentiable in eager
    mode. Does not change x's dtype under autocast.

    Raises:
        TypeError: x is not a floating tensor. ValueError: unknown backend. UnsupportedError: ``backend`` can't do it.

    Source of the formula: the SdP-Net project's KeLü; the evaluation without cancellation is in docs/numerics.md.
    """
    check_floating("x", x)
    chosen = choose("kelu", x, backend)
    if chosen == "reference":
        return reference.kelu.kelu(x)
    return _KeLU.apply(x, chosen)
