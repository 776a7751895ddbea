"""The emulator's warpgroup products against the PTX ISA's tables: fragments, descriptors, what must be waited for.

Figures are written out as the manual draws them ("Register fragments for wgmma.mma_async.m64nNk16", "Matrix
descriptor", "Swizzling modes"), not by a formula. D and A of a warp are those of mma.sync (test_simt_mma.py).
"""

from __future__ import annotations

import ctypes
import faulthandler
import functools
import os
import signal

import pytest
import simt_emulator as emulator
import torch
from test_simt_mma import A_BLOCKS, ROWS, dtypes, figure, normal, orders, pointer

pytestmark = pytest.mark.proof("emulator")

# Which 16-byte chunk of a row stands where in it, rows 0 to 7 of the pattern; it repeats from there on.
PATTERNS = {
    32: ["0 1", "0 1", "0 1", "0 1", "1 0", "1 0", "1 0", "1 0"],
    64: ["0 1 2 3", "0 1 2 3", "1 0 3 2", "1 0 3 2", "2 3 0 1", "2 3 0 1", "3 2 1 0", "3 2 1 0"],
    128: [
        "0 1 2 3 4 5 6 7",
        "1 0 3 2 5 4 7 6",
        "2 3 0 1 6 7 4 5",
        "3 2 1 0 7 6 5 4",
        "4 5 6 7 0 1 2 3",
        "5 4 7 6 1 0 3 2",
        "6 7 4 5 2 3 0 1",
        "7 6 5 4 3 2 1 0",
    ],
}
MODES = {128: 1, 64: 2, 32: 3}
NAMES = "none no_proxy_fence proxy_fence_first no_fence no_commit no_wait early a_changes d_changes memory_changes"
MISTAKES = [*NAMES.split(), "a_changed_behind_fence", "d_changed_behind_fence", "warps_differ", "warp_leaves"]


@functools.cache
def library(dtype: torch.dtype) -> ctypes.CDLL:
    path = emulator.compile_source("wgmma.cpp", define=f"SIMT_TYPE={emulator.TYPES[dtype]}")
    loaded = ctypes.CDLL(str(path), mode=ctypes.RTLD_LOCAL)
    loaded.panel_descriptor.restype = ctypes.c_uint64
    return loaded


def ordered(dtype: torch.dtype, order: int = 0) -> ctypes.CDLL:
    library(dtype).simt_set(order, 0, b"", 0)
    return library(dtype)


def descriptor(start: int, leading: int, stride: int, width: int) -> ctypes.c_uint64:
    """By the ISA's table: bits 0 to 13, 16 to 29 and 32 to 45 in units of 16 bytes, swizzle mode in 62 and 63."""
    return ctypes.c_uint64(start >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | MODES[width] << 62)


def swizzled(matrix: torch.Tensor, width: int) -> torch.Tensor:
    """The matrix (rows, columns), in panels of `width` bytes with all rows each, as bytes."""
    rows, columns = matrix.shape
    panels = matrix.view(torch.uint8).view(rows, columns * 2 // width, width // 16, 16).transpose(0, 1).contiguous()
    out = torch.empty_like(panels)
    for row in range(rows):
        for chunk, place in zip(range(width // 16), map(int, PATTERNS[width][row % 8].split())):
            out[:, row, place] = panels[:, row, chunk]
    return out.flatten()


@functools.cache
def _places(blocks: tuple[tuple[int, ...], ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Lane and number in its fragment of each element of a warp's matrix."""
    return torch.tensor(figure(ROWS, [list(row) for row in blocks])).unbind(-1)


A_PLACES, D_PLACES = tuple(map(tuple, A_BLOCKS)), ((0,), (2,))


def operand_a(a: torch.Tensor) -> torch.Tensor:
    """(128, 8): of each thread of a warpgroup, four registers of a (64, 16)."""
    out = a.new_full((4, 32, 8), float("nan"))
    for warp, part in zip(out, a.split(16)):
        warp[_places(A_PLACES)] = part
    return out.view(128, 8)


def registers_d(c: torch.Tensor) -> torch.Tensor:
    """(128, columns / 2): what each thread holds of c (64, columns), tile after tile of eight columns."""
    out = c.new_full((4, 32, c.shape[1] // 8, 4), float("nan"))
    for warp, part in zip(out, c.split(16)):
        for n, tile in enumerate(part.split(8, 1)):
            warp[:, n][_places(D_PLACES)] = tile
    return out.view(128, -1)


def matrix_d(held: torch.Tensor) -> torch.Tensor:
    """(64, columns), from what each thread holds."""
    tiles = held.view(4, 32, -1, 4).unbind(2)
    return torch.cat([torch.cat([warp[_places(D_PLACES)] for warp in tile]) for tile in tiles], 1)


@orders
@dtypes
@pytest.mark.parametrize("over_rows", [False, True], ids=["over columns", "over rows"])
@pytest.mark.parametrize("width", [32, 64, 128])
@pytest.mark.parametrize("columns", [32, 48, 64, 96])
def test_product(columns, width, over_rows, dtype, order):
    """The second 16 of the summed index, and columns from the second eight on, of a larger matrix."""
    a, c = normal(64, 16, seed=1).to(dtype), normal(64, columns, seed=2)
    whole_panels = -(-columns // (width // 2)) * (width // 2)
    b = normal(*((40, whole_panels) if over_rows else (columns + 16, 64)), seed=3).to(dtype)
    memory, panel = swizzled(b, width), b.shape[0] * width
    start = 16 * width if over_rows else 8 * width + (panel if width == 32 else 32)
    used = b[16:32, :columns] if over_rows else b[8 : 8 + columns, 16:32].T
    left, held = operand_a(a), torch.stack([registers_d(c), torch.zeros(128, columns // 2)])
    ordered(dtype, order).run_wgmma(
        *(columns // 8, int(over_rows), pointer(left), pointer(memory), ctypes.c_int64(memory.numel())),
        *(descriptor(start, panel if over_rows else 0, 8 * width, width), pointer(held)),
    )
    wanted = a.double() @ used.double()
    assert (matrix_d(held[1]).double() - wanted).abs().max() <= 4e-6
    assert (matrix_d(held[0]).double() - wanted - c.double()).abs().max() <= 4e-6


@pytest.mark.parametrize("over_rows", [False, True], ids=["over columns", "over rows"])
@pytest.mark.parametrize("width", [32, 64, 128])
def test_every_element_has_a_place_of_its_own(width, over_rows):
    """Numbered elements of a 16×64 operand; in two panels and eight-row groups further apart than they need be."""
    rows, columns = (16, 64) if over_rows else (64, width // 2)
    memory = swizzled(torch.arange(rows * columns, dtype=torch.int16).view(rows, columns), width).view(torch.int16)
    find = library(torch.bfloat16).place
    told = descriptor(0, rows * width, 8 * width, width)
    for k in range(16):
        for n in range(64):
            place = find(told, int(over_rows), k, n)
            assert memory[place // 2] == (k * columns + n if over_rows else n * columns + k)
    apart = descriptor(1024, 8192, 4096, width)
    assert find(apart, 1, 0, width // 2) - find(apart, 1, 0, 0) == 8192
    assert find(apart, 1, 8, 0) - find(apart, 1, 0, 0) == 4096
    assert find(apart, 0, 0, 8) - find(apart, 0, 0, 0) == 4096


def test_places_without_swizzle():
    """Core matrices of 8 rows of 16 bytes; over columns, the leading offset is from one to the next along k, the stride
    along n; over rows the other way round in k and n as the ISA's table has it."""
    told = ctypes.c_uint64(256 >> 4 | 128 >> 4 << 16 | 1024 >> 4 << 32)
    find = library(torch.bfloat16).place
    assert [find(told, 0, k, n) for k, n in ((0, 0), (1, 0), (0, 1), (8, 0), (0, 8))] == [256, 258, 272, 384, 1280]
    assert [find(told, 1, k, n) for k, n in ((0, 0), (0, 1), (1, 0), (8, 0), (0, 8))] == [256, 258, 272, 384, 1280]


def test_descriptor_of_a_panel():
    """Bit by bit: the start and the leading offset in units of 16 bytes, 512 from eight rows to the next, 64 bytes."""
    got = library(torch.bfloat16).panel_descriptor(2560, 17408, ctypes.c_int64(4096))
    assert got & 0x3FFF == 160 and got >> 16 & 0x3FFF == 1088 and got >> 32 & 0x3FFF == 32
    assert got >> 62 == 2 and got & 0x3FF1_C000_C000_C000 == 0


def outcome(mistake: str, order: int) -> str:
    """Whether the result is "right" or "wrong", or the run "refused"."""
    a, b = normal(64, 16, seed=1).bfloat16(), normal(32, 64, seed=2).bfloat16()
    left, memory, held = operand_a(a), swizzled(b, 64), torch.zeros(128, 16)
    wanted, ours = registers_d(a.float() @ b[:, :16].T.float()), ordered(torch.bfloat16, order)
    child = os.fork()  # which computes nothing with PyTorch: its threads are the parent's
    if child == 0:
        faulthandler.disable()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        signal.alarm(60)
        ours.run_mistaken(
            *(MISTAKES.index(mistake), pointer(left), pointer(memory), ctypes.c_int64(memory.numel())),
            *(descriptor(0, 0, 512, 64), pointer(held)),
        )
        pairs = zip(held.flatten().tolist(), wanted.flatten().tolist())
        os._exit(0 if all(abs(got - right) <= 4e-6 for got, right in pairs) else 1)
    _, status = os.waitpid(child, 0)
    return "refused" if os.WIFSIGNALED(status) else ("right", "wrong")[os.WEXITSTATUS(status)]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_noticed(mistake):
    for order in emulator.ORDERS:
        assert outcome(mistake, order) == {"none": "right", "early": "wrong"}.get(mistake, "refused")
