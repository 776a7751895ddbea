"""Checks of arguments: each raises TypeError or ValueError naming the argument, what came and what is wanted."""

import math
import sys

import torch
from torch import Tensor

from ..backends import FLOATING
from ..reference.precision import autocast_dtype


def check_floating(name: str, value: object) -> None:
    """A dense tensor of fp64, fp32, bf16 or fp16."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(value).__name__}")
    if value.dtype not in FLOATING:
        raise TypeError(f"{name} must be float64, float32, bfloat16 or float16, got {value.dtype}")
    if value.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got {value.layout}")


def check_parameter(name: str, value: object, shape: tuple[int, ...], x: Tensor) -> None:
    """A tensor of ``shape`` on x's device, in x's dtype or fp32 (or any, under autocast, which casts it)."""
    strided = isinstance(value, Tensor) and value.layout is torch.strided
    if strided and value.dtype is x.dtype and value.shape == shape and value.device == x.device:
        return
    check_floating(name, value)
    if value.device != x.device:
        raise ValueError(f"{name} must be on x's device {x.device}, got {value.device}")
    if value.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(value.shape)}")
    if value.dtype != x.dtype and value.dtype != torch.float32 and autocast_dtype(x) is None:
        raise TypeError(f"{name} must be {x.dtype} like x, or float32, got {value.dtype}")


def check_same_dtype(name: str, value: Tensor | None, x: Tensor) -> None:
    """x's dtype, for operators that PyTorch runs in one dtype; under autocast anything goes."""
    if value is not None and value.dtype != x.dtype and autocast_dtype(x) is None:
        raise TypeError(f"{name} must be {x.dtype} like x, got {value.dtype}")


def check_rank(name: str, value: Tensor, ranks: tuple[int, ...], wanted: str) -> None:
    """Number of dimensions."""
    if value.dim() not in ranks:
        raise ValueError(f"{name} must be {wanted}, got {value.dim()} dimensions: {tuple(value.shape)}")


def check_tensor(name: str, value: object, ranks: tuple[int, ...], wanted: str) -> None:
    """A tensor of fp64, fp32, bf16 or fp16 with so many dimensions."""
    if isinstance(value, Tensor) and value.dtype in FLOATING and value.dim() in ranks and value.layout is torch.strided:
        return
    check_floating(name, value)
    check_rank(name, value, ranks, wanted)


def check_scale(scale: float | None) -> None:
    """A finite number, or None for the default."""
    if scale is None or (type(scale) is float and math.isfinite(scale)):
        return
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale must be a number or None, got {type(scale).__name__}")
    if not abs(scale) <= sys.float_info.max:
        raise ValueError(f"scale must be finite, got {scale}")


def check_eps(eps: float) -> None:
    """A positive finite number."""
    if type(eps) is float and 0 < eps < math.inf:
        return
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(f"eps must be a number, got {type(eps).__name__}")
    if not (eps > 0 and math.isfinite(eps)):
        raise ValueError(f"eps must be positive and finite, got {eps}")


def check_rate(name: str, rate: float) -> None:
    """A probability of dropping, in [0, 1)."""
    if isinstance(rate, bool) or not isinstance(rate, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(rate).__name__}")
    if not 0 <= rate < 1:
        raise ValueError(f"{name} must be in [0, 1), got {rate}")


def check_rng(rng: Tensor | None, rate: float, x: Tensor) -> None:
    """When something is dropped: int64 (seed, step, first_sample) on x's device."""
    if rate == 0:
        return
    if rng is None:
        raise ValueError("rng is needed when a dropout or drop_path rate is above 0; make one with make_rng")
    if not isinstance(rng, Tensor) or rng.dtype != torch.int64 or tuple(rng.shape) != (3,):
        got = f"{rng.dtype} {tuple(rng.shape)}" if isinstance(rng, Tensor) else type(rng).__name__
        raise TypeError(f"rng must be an int64 tensor of shape (3,): seed, step, first_sample; got {got}")
    if rng.device != x.device:
        raise ValueError(f"rng must be on x's device {x.device}, got {rng.device}")


def check_layer(layer: int) -> None:
    """The call site's number for the masks: the counter keeps 30 bits for it."""
    if isinstance(layer, bool) or not isinstance(layer, int):
        raise TypeError(f"layer must be an int, got {type(layer).__name__}")
    if not 0 <= layer < 2**30:
        raise ValueError(f"layer must be in [0, 2**30), got {layer}")


def check_registers(registers: int, x: Tensor) -> None:
    """Register rows exist in token buffers (B, T, C) only, and there are at most T of them."""
    if type(registers) is int and registers == 0:
        return
    if isinstance(registers, bool) or not isinstance(registers, int):
        raise TypeError(f"registers must be an int, got {type(registers).__name__}")
    if registers < 0:
        raise ValueError(f"registers must be at least 0, got {registers}")
    if registers and x.dim() != 3:
        raise ValueError(f"registers needs a token buffer (B, T, C), got x of shape {tuple(x.shape)}")
    if registers and registers > x.shape[1]:
        raise ValueError(f"registers must be at most T = {x.shape[1]}, got {registers}")


def check_grid(grid: object, registers: int, x: Tensor) -> None:
    """Rows and columns of the image tokens: H·W = T − registers."""
    if not (isinstance(grid, (tuple, list)) and len(grid) == 2):
        raise ValueError(f"grid must be (H, W) for a token buffer (B, T, C), got {grid!r}")
    if not all(isinstance(side, (int, torch.SymInt)) for side in grid):
        raise TypeError(f"grid must be two ints (H, W), got {tuple(grid)!r}")
    if grid[0] < 1 or grid[1] < 1 or registers + grid[0] * grid[1] != x.shape[1]:
        raise ValueError(
            f"grid must be (H, W) with registers + H·W = T = {x.shape[1]}, got {tuple(grid)} with {registers} registers"
        )


def check_residual(residual: Tensor | None, shape: tuple[int, ...], x: Tensor) -> None:
    """A floating tensor of the output's shape on x's device; the output takes its dtype."""
    if residual is None:
        return
    check_floating("residual", residual)
    if tuple(residual.shape) != tuple(shape):
        raise ValueError(f"residual must have the output's shape {tuple(shape)}, got {tuple(residual.shape)}")
    if residual.device != x.device:
        raise ValueError(f"residual must be on x's device {x.device}, got {residual.device}")
