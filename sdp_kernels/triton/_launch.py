"""What all Triton kernels share: registration as opaque operators, the configuration table, the launch itself."""

import contextlib
import functools
import json
from pathlib import Path

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import Library

from ..backends import BACKENDS, INTERPRETING

DISPATCH_KEY = "CPU" if INTERPRETING else "CUDA"
_LIBRARY = Library(BACKENDS["triton"].namespace, "IMPL")

TABLE: dict[str, dict[str, dict[str, int]]] = json.loads(
    Path(__file__).with_name("configurations.json").read_text(encoding="utf-8")
)
"""Capability ("90" for sm_90) → "operator/kernel/…" → constants of the launch; a capability adds to and replaces what
stands at lower ones. There is no tuning at run time: equal shapes give equal bits, in every process."""

ACCUMULATOR = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.float32,
    torch.float16: tl.float32,
}


def register(kernel: str):
    """Decorator: the function is ``sdp_kernels_triton::<kernel>``; its first argument's device is current meanwhile."""

    def decorate(function):
        @functools.wraps(function)
        def on_its_device(*arguments):
            device = arguments[0].device
            elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
            with torch.cuda.device(device) if elsewhere else contextlib.nullcontext():
                return function(*arguments)

        _LIBRARY.impl(kernel, on_its_device, DISPATCH_KEY)
        return function

    return decorate


@functools.cache
def table_for(capability: int) -> dict[str, dict[str, int]]:
    """ "operator/kernel/…" → constants, for that capability; the lowest listed serves older devices too."""
    lowest, *others = sorted(int(c) for c in TABLE)
    entries = dict(TABLE[str(lowest)])
    for listed in others:
        if listed <= capability:
            entries |= TABLE[str(listed)]
    return entries


@functools.cache
def _capability(index: int | None) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def capability_of(device: torch.device) -> int:
    """10 · major + minor; 90 where there is none (interpreter)."""
    return _capability(device.index) if device.type == "cuda" else 90


def listed(device: torch.device, itemsize: int, *key: str | int) -> dict[str, int] | None:
    """Constants of the launch for "operator", "kernel", … and elements of that many bytes; None if not listed."""
    width = 16 if itemsize == 2 else 32
    return table_for(capability_of(device)).get("/".join(map(str, (*key, f"{width}bit"))))


def configuration(x: Tensor, *key: str | int) -> dict[str, int] | None:
    """:func:`listed` for x."""
    return listed(x.device, x.dtype.itemsize, *key)


def launch(kernel: triton.JITFunction, grid: tuple[int, ...], *arguments, warps: int, **constants) -> None:
    """Run ``kernel`` on ``grid`` programs, if any. ``constants`` are its ``tl.constexpr`` parameters."""
    if all(grid):
        kernel[grid](*arguments, num_warps=warps, **constants)
