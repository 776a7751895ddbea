"""One problem of an operator: its shape, dtype, memory layout and options; how its tensors are made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

GRADIENT = 5.0
"""About the largest value of a normal gradient."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Problem:
    """One operator on one tensor. ``layout`` and ``grad`` name memory layouts (see LAYOUTS, GRADIENTS); ``epilogue`` is
    what linear does behind its GEMM: an activation's name, "scale", "residual", "masks", separated by blanks; of
    attention, which tokens may be read. ``kernel``: a convolution's, or the columns of a head."""

    operator: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    layout: str = "contiguous"
    grad: str = "like y"
    registers: int = 0
    residual: bool = False
    kernel: int = 0
    wide_parameters: bool = False
    normed: bool = False
    """depthwise_conv2d normalises x as it loads it."""
    epilogue: str = ""
    own_gemm: bool = False
    """Matrix products in the backend's own kernels, whatever its table says of them."""
    warpgroups: bool = False
    """CUDA's attention multiplies with warpgroups in its backward pass, whatever is its default."""

    @property
    def name(self) -> str:
        extra = [f"{self.registers} registers"] * bool(self.registers) + ["residual"] * self.residual
        extra += ["normed"] * self.normed + ["own GEMM"] * self.own_gemm
        extra += ["warpgroups"] * self.warpgroups
        extra += [f"k{self.kernel}"] * bool(self.kernel) + ["fp32 parameters"] * self.wide_parameters
        extra += [self.epilogue] * bool(self.epilogue)
        extra += [f"gradient {self.grad}"] * (self.grad != "like y")
        return " ".join([self.operator, "x".join(map(str, self.shape)), self.dtype, self.layout, *extra])

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def channels(self) -> int:
        return self.shape[1] if len(self.shape) == 4 else self.shape[-1]

    @property
    def rows(self) -> int:
        return torch.Size(self.shape).numel() // max(1, self.channels)

    def json(self) -> dict:
        return asdict(self)

    @classmethod
    def of(cls, arguments: dict) -> Problem:
        return cls(**arguments | {"shape": tuple(arguments["shape"])})


def _gaps(x: Tensor) -> Tensor:
    buffer = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), float("nan"))
    buffer[..., ::2] = x
    return buffer[..., ::2]


def _slice(x: Tensor) -> Tensor:
    buffer = x.new_full((x.shape[0], x.shape[1] + 3, *x.shape[2:]), float("nan"))
    view = buffer[:, 1:-2]
    view.copy_(x)
    return view


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "tokens": lambda x: x.contiguous(),
    "gaps": _gaps,
    "slice": _slice,
    "swapped": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "batch last": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "image rows": lambda x: (  # of a token buffer: channels last, with a batch stride of more than C · H · W
        _slice(x.flatten(2).transpose(1, 2).contiguous()).unflatten(1, tuple(x.shape[2:])).permute(0, 3, 1, 2)
    ),
}
GRADIENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "like y": lambda g: g,
    "expanded": lambda g: g.reshape(-1)[:1].reshape([1] * g.dim()).expand_as(g),
    "expanded per sample": lambda g: g[(slice(None), *[slice(0, 1)] * (g.dim() - 1))].expand_as(g),
    "swapped": LAYOUTS["swapped"],
    "gaps": _gaps,
}


def normal(problem: Problem, shape: tuple[int, ...], seed: int, device: str, scale: float = 1.0) -> Tensor:
    """Normal values of the problem's dtype, made on the device."""
    generator = torch.Generator(device).manual_seed(seed)
    return (torch.randn(shape, generator=generator, device=device) * scale).to(problem.torch_dtype)


@dataclass(frozen=True)
class Subject:
    """``inputs(problem, device)`` → leaves, x first; ``ours(problem, backend, *inputs)``, ``plain(problem, *inputs)`` →
    outputs; ``slack(problem, inputs)`` → absolute errors that conditioning explains, outputs first, then gradients."""

    inputs: Callable[[Problem, str], list[Tensor]]
    ours: Callable[..., tuple[Tensor, ...]]
    plain: Callable[..., tuple[Tensor, ...]]
    slack: Callable[[Problem, list[Tensor]], list[float]]
    parameters: int
    """How many of the inputs, behind x, are summed over all rows in the backward pass."""
    vendor_gemm: bool = False
    """The vendor's GEMM is part of it: its bits may depend on the batch, on graphs and on the compiler."""
    needs: tuple[str, ...] = ()
    """The operators that have to have kernels for it, where that is not the operator itself."""


class Surroundings:
    """A copy of a tensor, strides kept, within memory that is NaN wherever the tensor is not: before, behind, and
    between its elements. An expanded tensor stays what it is."""

    MARGIN = 4096
    """Elements on either side; keeps what the original's address was aligned to, up to 128 bytes."""

    def __init__(self, original: Tensor) -> None:
        steps = [(size - 1) * stride for size, stride in zip(original.shape, original.stride()) if size > 1]
        overlaps = any(size > 1 and stride == 0 for size, stride in zip(original.shape, original.stride()))
        self._buffer, self.tensor = None, original
        if overlaps or original.numel() == 0:
            return
        begin = self.MARGIN + original.data_ptr() % 128 // original.element_size()
        self._buffer = original.new_full((begin + sum(steps) + 1 + self.MARGIN,), float("nan"))
        self.tensor = self._buffer.as_strided(original.shape, original.stride(), begin)
        self.tensor.copy_(original)
        self._before = self._buffer.clone()

    def untouched(self) -> bool:
        """Whether the buffer still holds what it held, NaN where that was."""
        if self._buffer is None:
            return True
        same = (self._buffer == self._before) | (self._buffer.isnan() & self._before.isnan())
        return bool(same.all())
