"""The two kernels of CUDA's attention for its backward pass, mma.sync's and warpgroups': which of them runs."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

VARIABLE = "SDP_KERNELS_CUDA_ATTENTION"
"""What the CUDA library reads at each backward pass: "wgmma", "mma", or empty for the default."""


def there() -> bool:
    """Whether the GPU multiplies with warpgroups (wgmma)."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability(0) == (9, 0)


@contextlib.contextmanager
def cuda_attention(form: str | None) -> Iterator[None]:
    """Backward passes in here take that form; None leaves what is set."""
    before = os.environ.get(VARIABLE)
    if form is not None:
        os.environ[VARIABLE] = form
    try:
        yield
    finally:
        if form is not None:
            os.environ.pop(VARIABLE) if before is None else os.environ.update({VARIABLE: before})


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, form):
        ctx.form = form
        return y.view_as(y)

    @staticmethod
    def backward(ctx, grad):
        os.environ[VARIABLE] = ctx.form
        return grad, None


def in_form(form: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function, whose backward pass begins by setting the form, for contenders that take turns in any order."""
    return lambda *tensors: _Backward.apply(function(*tensors), form)
