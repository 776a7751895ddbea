"""Compiles the CUDA kernels for the emulator and calls them on CPU tensors.

Every tensor a kernel sees lies between bands of NaN: reading beyond an end spoils the result, writing there is noticed.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
TYPES = {torch.float32: "float", torch.bfloat16: "__nv_bfloat16", torch.float16: "__half", torch.float64: "double"}
ASCENDING, DESCENDING, WARPS_ASCENDING, WARPS_DESCENDING, RANDOM = 0, 1, 2, 3, 4711
ORDERS = (ASCENDING, DESCENDING, WARPS_ASCENDING, WARPS_DESCENDING, RANDOM, RANDOM + 1)
H200, A100 = (232448, 233472, 132), (166912, 167936, 132)
"""DeviceLimits: shared memory of a block and of a multiprocessor, bytes; multiprocessors, always an H200's."""
FAMILIES = ("teams", "blocks", "columns")


def compile_source(source: str, *flags: str, shared: bool = True, define: str = "") -> Path:
    """The library (or program) made of a source in this folder; kept between runs, by the contents of all sources."""
    compiler = os.environ.get("CXX", "g++").split()
    if shutil.which(compiler[0]) is None:
        pytest.skip(f"the emulator needs a C++ compiler, there is no {compiler[0]}")
    command = [*compiler, "-std=c++17", "-O2", "-g1", "-fPIC", "-fno-gnu-unique", "-Wno-unknown-pragmas", *flags]
    command += [f"-I{HERE / 'include'}", f"-I{HERE}", f"-I{CSRC}", *([f"-D{define}"] if define else [])]
    if shared:
        command += ["-shared", "-Wl,-Bsymbolic"]
    digest = hashlib.sha256(repr([command, source, os.uname()]).encode())
    for path in sorted([*HERE.rglob("*.h"), *HERE.rglob("*.cpp"), *CSRC.rglob("*.cuh"), *CSRC.rglob("*.h")]):
        digest.update(path.read_bytes())
    folder = Path(tempfile.gettempdir()) / f"sdp-simt-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    made = folder / f"{Path(source).stem}-{digest.hexdigest()[:20]}{'.so' if shared else ''}"
    if not made.exists():
        with tempfile.TemporaryDirectory(dir=folder) as work:
            fresh = Path(work) / "made"
            done = subprocess.run(
                [*command, str(HERE / source), "-o", str(fresh), "-ldl"], capture_output=True, text=True
            )
            assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[-6000:]}"
            fresh.replace(made)
    return made


@functools.cache
def library(dtype: torch.dtype) -> ctypes.CDLL:
    """All kernels with that storage type."""
    loaded = ctypes.CDLL(str(compile_source("kernels.cpp", define=f"SIMT_TYPE={TYPES[dtype]}")))
    loaded.simt_reached.restype = loaded.simt_launches.restype = ctypes.c_char_p
    return loaded


def schedule(dtype: torch.dtype, order: int = 0, block_order: int = 0, skipped: str = "", dry: bool = False) -> None:
    """Sets the order of fibers and blocks, a barrier ("file.cuh:line") to leave out, and whether to launch at all."""
    library(dtype).simt_set(order, block_order, skipped.encode(), int(dry))


def reached(dtype: torch.dtype) -> dict[str, int]:
    """Barriers of the source reached since the last call, and how often."""
    lines = library(dtype).simt_reached().decode().split("\n")
    return {name: int(count) for name, count in (line.split() for line in lines if line)}


def launches(dtype: torch.dtype) -> list[tuple[str, int, int, int]]:
    """(symbol, blocks, threads, bytes of shared memory) of the launches since the last call."""
    lines = library(dtype).simt_launches().decode().split("\n")
    return [(name, *map(int, numbers)) for name, *numbers in (line.split() for line in lines if line)]


_BAND = 64


@dataclass
class Guarded:
    """A tensor of any strides between bands of NaN, unused gaps NaN as well."""

    view: Tensor
    buffer: Tensor

    def assert_untouched(self) -> None:
        used = torch.zeros(self.buffer.shape, dtype=torch.bool)
        used.as_strided(self.view.shape, self.view.stride(), self.view.storage_offset()).fill_(True)
        assert self.buffer[~used].isnan().all(), "written outside of a tensor"


def guarded(like: Tensor, fill: bool = True, shift: int = 0) -> Guarded:
    """``like`` with its strides, `shift` elements off from an alignment of 16 bytes; not filled: NaN everywhere."""
    span = 1 + sum((n - 1) * s for n, s in zip(like.shape, like.stride())) if like.numel() else 0
    buffer = torch.full((span + 2 * _BAND + shift,), float("nan"), dtype=like.dtype)
    assert buffer.data_ptr() % 16 == 0
    view = buffer.as_strided(like.shape, like.stride(), _BAND + shift)
    if fill and 0 not in like.stride():
        view.copy_(like)
    elif fill:
        for index, value in zip(_indices(like), like.reshape(-1)):
            view[index] = value
    return Guarded(view, buffer)


def _indices(like: Tensor):
    import itertools

    return itertools.product(*(range(n) for n in like.shape))


def _sizes(x: Tensor):
    shape = x.shape if x.dim() == 4 else (x.shape[0], x.shape[2], 1, x.shape[1])
    return (ctypes.c_int64 * 4)(*shape)


def _views(*tensors: Tensor | None):
    numbers = []
    for t in tensors:
        if t is None:
            numbers += [0] * 5
        else:
            s = t.stride()
            numbers += [t.data_ptr(), *(s if t.dim() == 4 else (s[0], s[2], 0, s[1]))]
    return (ctypes.c_int64 * len(numbers))(*numbers)


def _pointer(t: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if t is None else t.data_ptr())


@dataclass
class Told:
    """What a launch decided, and its guarded outputs."""

    numbers: ctypes.Array
    guards: list[Guarded] = field(default_factory=list)

    @property
    def family(self) -> str:
        return FAMILIES[self.numbers[0]]

    @property
    def packed(self) -> bool:
        """16-byte accesses."""
        return self.numbers[1] == 1

    @property
    def half_packed(self) -> bool:
        """8-byte accesses."""
        return self.numbers[1] == 2

    @property
    def on_chip(self) -> bool:
        return bool(self.numbers[2])

    @property
    def sums_on_chip(self) -> bool:
        return bool(self.numbers[3])

    @property
    def tile_pixels(self) -> int:
        return self.numbers[4]

    def out(self, like: Tensor, shift: int = 0) -> Tensor:
        self.guards.append(guarded(like, fill=False, shift=shift))
        return self.guards[-1].view

    def assert_untouched(self) -> None:
        for g in self.guards:
            g.assert_untouched()


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def layer_norm_fwd(
    x, residual, weight, bias, eps=1e-6, registers=0, limits=H200
) -> tuple[Tensor, Tensor, Tensor, Tensor, Told]:
    """(y, mean, rstd, sum, told) as ``layer_norm_2d_fwd`` gives them."""
    told = Told((ctypes.c_int64 * 5)())
    y = told.out(torch.empty_like(x))
    total = None if residual is None else told.out(torch.empty_like(x))
    shape = (x.shape[0], *x.shape[2:]) if x.dim() == 4 else x.shape[:2]
    mean, rstd = (told.out(torch.empty(shape, dtype=wide_dtype(x.dtype))) for _ in range(2))
    wide = [int(p.dtype == wide_dtype(x.dtype)) for p in (weight, bias)]
    library(x.dtype).layer_norm_2d_fwd(
        *(_sizes(x), _views(x, residual, y, total), ctypes.c_int64(registers), ctypes.c_double(eps)),
        *(_pointer(weight), _pointer(bias), *wide, _pointer(mean), _pointer(rstd)),
        *((ctypes.c_int64 * 3)(*limits), told.numbers),
    )
    told.assert_untouched()
    return y, mean, rstd, total, told


def layer_norm_bwd(
    grad, grad_sum, x, weight, mean, rstd, registers=0, limits=H200
) -> tuple[Tensor, Tensor, Tensor, Told]:
    """(dx, dweight, dbias, told) as ``layer_norm_2d_bwd`` gives them."""
    told = Told((ctypes.c_int64 * 5)())
    dx, dweight, dbias = told.out(torch.empty_like(x)), told.out(weight), told.out(weight)
    library(x.dtype).layer_norm_2d_bwd(
        *(_sizes(x), _views(x, grad, grad_sum, dx), ctypes.c_int64(registers)),
        *(_pointer(weight), int(weight.dtype == wide_dtype(x.dtype)), _pointer(mean), _pointer(rstd)),
        *(_pointer(dweight), _pointer(dbias), (ctypes.c_int64 * 3)(*limits), told.numbers),
    )
    told.assert_untouched()
    return dx, dweight, dbias, told


def kelu(x: Tensor, grad: Tensor | None = None, y: Tensor | None = None) -> Tensor:
    """KeLü of x, or with ``grad`` its gradient, written to ``y`` (of any strides) or to a new tensor like x."""
    told = Told((ctypes.c_int64 * 5)())
    y = told.out(torch.empty_like(x) if y is None else y)
    tensors = [y, x] if grad is None else [y, x, grad]
    sizes, strides = merged(tensors)
    numbers = [*sizes, *strides[0], *strides[1], *(strides[2] if grad is not None else [0] * len(sizes))]
    library(x.dtype).kelu(
        *(_pointer(grad), _pointer(x), _pointer(y), ctypes.c_int64(x.numel()), len(sizes)),
        (ctypes.c_int64 * max(1, len(numbers)))(*numbers),
    )
    told.assert_untouched()
    return y


def merged(tensors: list[Tensor]) -> tuple[list[int], list[list[int]]]:
    """Sizes and, per tensor, strides of dimensions merged as far as they go, outermost first, as by host.cuh."""
    dims = [(n, [t.stride(d) for t in tensors]) for d, n in enumerate(tensors[0].shape) if n != 1]
    dims.sort(key=lambda dim: -dim[1][0])
    out: list[tuple[int, list[int]]] = []
    for n, strides in dims:
        if out and all(outer == inner * n for outer, inner in zip(out[-1][1], strides)):
            out[-1] = (out[-1][0] * n, strides)
        else:
            out.append((n, strides))
    return [n for n, _ in out], [[s[k] for _, s in out] for k in range(len(tensors))]
