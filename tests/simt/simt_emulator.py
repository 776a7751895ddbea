"""Compiles the CUDA kernels for the emulator and calls them on CPU tensors.

Every tensor a kernel sees lies between bands of NaN: reading beyond an end spoils the result, writing there is noticed.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import itertools
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


@functools.cache
def _sources(command: tuple[str, ...], source: str) -> list[Path]:
    """The source and all of this repository's files that it includes."""
    done = subprocess.run([*command, "-MM", str(HERE / source)], capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[-6000:]}"
    return sorted(Path(name) for name in done.stdout.replace("\\\n", " ").split()[1:])


def compile_source(source: str, *flags: str, shared: bool = True, define: str = "") -> Path:
    """The library (or program) made of a source in this folder; kept between runs, by the contents of its sources."""
    compiler = os.environ.get("CXX", "g++").split()
    if shutil.which(compiler[0]) is None:
        pytest.skip(f"the emulator needs a C++ compiler, there is no {compiler[0]}")  # nothing to compile with
    command = [*compiler, "-std=c++17", "-O2", "-g1", "-fPIC", "-fno-gnu-unique", "-Wno-unknown-pragmas", *flags]
    command += [f"-I{HERE / 'include'}", f"-I{HERE}", f"-I{CSRC}", *([f"-D{define}"] if define else [])]
    if shared:
        command += ["-shared", "-Wl,-Bsymbolic"]
    digest = hashlib.sha256(repr([command, source, os.uname()]).encode())
    for path in _sources(tuple(command), source):
        digest.update(path.read_bytes())
    folder = Path(tempfile.gettempdir()) / f"sdp-simt-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    made = folder / f"{Path(source).stem}-{digest.hexdigest()[:20]}{'.so' if shared else ''}"
    with made.with_suffix(".lock").open("w") as lock, tempfile.TemporaryDirectory(dir=folder) as work:
        fcntl.flock(lock, fcntl.LOCK_EX)  # whoever wants it at the same time waits for it
        if not made.exists():
            fresh = Path(work) / "made"
            done = subprocess.run(
                [*command, str(HERE / source), "-o", str(fresh), "-ldl"], capture_output=True, text=True
            )
            assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[-6000:]}"
            fresh.replace(made)
    return made


@functools.cache
def library(operator: str, dtype: torch.dtype) -> ctypes.CDLL:
    """An operator's kernels with that storage type: ``<operator>.cpp``."""
    loaded = ctypes.CDLL(str(compile_source(f"{operator}.cpp", define=f"SIMT_TYPE={TYPES[dtype]}")))
    loaded.simt_reached.restype = loaded.simt_launches.restype = ctypes.c_char_p
    return loaded


def schedule(
    operator: str, dtype: torch.dtype, order: int = 0, block_order: int = 0, skipped: str = "", dry: bool = False
) -> None:
    """Sets the order of fibers and blocks, a barrier ("file.cuh:line") to leave out, and whether to launch at all."""
    library(operator, dtype).simt_set(order, block_order, skipped.encode(), int(dry))


def reached(operator: str, dtype: torch.dtype) -> dict[str, int]:
    """Barriers of the source reached since the last call, and how often."""
    lines = library(operator, dtype).simt_reached().decode().split("\n")
    return {name: int(count) for name, count in (line.split() for line in lines if line)}


def launches(operator: str, dtype: torch.dtype) -> list[tuple[str, int, int, int]]:
    """(symbol, blocks, threads, bytes of shared memory) of the launches since the last call."""
    lines = library(operator, dtype).simt_launches().decode().split("\n")
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
    buffer = torch.full((span(like) + 2 * _BAND + shift,), float("nan"), dtype=like.dtype)
    assert buffer.data_ptr() % 16 == 0
    view = buffer.as_strided(like.shape, like.stride(), _BAND + shift)
    if fill and 0 not in like.stride():
        view.copy_(like)
    elif fill:
        for index, value in zip(_indices(like), like.reshape(-1)):
            view[index] = value
    return Guarded(view, buffer)


def _indices(like: Tensor):
    return itertools.product(*(range(n) for n in like.shape))


@dataclass
class Outputs:
    """Guarded outputs of one call."""

    guards: list[Guarded] = field(default_factory=list)

    def out(self, like: Tensor, shift: int = 0) -> Tensor:
        """A tensor like ``like``, NaN everywhere, for a kernel to write."""
        self.guards.append(guarded(like, fill=False, shift=shift))
        return self.guards[-1].view

    def assert_untouched(self) -> None:
        for g in self.guards:
            g.assert_untouched()


def pointer(t: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if t is None else t.data_ptr())


def sizes(x: Tensor) -> ctypes.Array:
    """B, C, H, W of a picture (B, C, H, W) or of a token buffer (B, T, C), which is one row."""
    return (ctypes.c_int64 * 4)(*(x.shape if x.dim() == 4 else (x.shape[0], x.shape[2], 1, x.shape[1])))


def strides(x: Tensor) -> tuple[int, ...]:
    """Of B, C, H, W, as by :func:`sizes`."""
    s = x.stride()
    return s if x.dim() == 4 else (s[0], s[2], 0, s[1])


def views(*tensors: Tensor | None) -> ctypes.Array:
    """Address and strides of each tensor; zeros for None."""
    numbers = [n for t in tensors for n in ((0,) * 5 if t is None else (t.data_ptr(), *strides(t)))]
    return (ctypes.c_int64 * len(numbers))(*numbers)


def spans(*tensors: Tensor | None) -> list[int]:
    """Of each tensor, how many elements its memory spans, and its strides: for the sanitized programs."""
    return [n for t in tensors for n in ((0,) * 5 if t is None else (span(t), *strides(t)))]


def span(t: Tensor) -> int:
    """Elements from its first to its last."""
    return 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride())) if t.numel() else 0


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of accumulators, statistics and parameter gradients' partial sums."""
    return torch.float64 if dtype == torch.float64 else torch.float32
