"""The emulator's matrix instructions against the figures of the PTX ISA: which lane holds which element.

The figures are written out here as the manual draws them ("Matrix fragments for mma.m16n8k16 with floating point type",
"ldmatrix", "movmatrix"), not by a formula.
"""

from __future__ import annotations

import ctypes
import functools

import pytest
import simt_emulator as emulator
import torch

pytestmark = pytest.mark.proof("emulator")
orders = pytest.mark.parametrize("order", emulator.ORDERS)
dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])

# Lanes of an 8×8 block of 16-bit elements, two neighbours of a row each: also a block of A, of ldmatrix, of C.
ROWS = """
 0  0  1  1  2  2  3  3
 4  4  5  5  6  6  7  7
 8  8  9  9 10 10 11 11
12 12 13 13 14 14 15 15
16 16 17 17 18 18 19 19
20 20 21 21 22 22 23 23
24 24 25 25 26 26 27 27
28 28 29 29 30 30 31 31
"""
# Lanes of an 8×8 block of B: two neighbours of a column each.
COLUMNS = """
 0  4  8 12 16 20 24 28
 0  4  8 12 16 20 24 28
 1  5  9 13 17 21 25 29
 1  5  9 13 17 21 25 29
 2  6 10 14 18 22 26 30
 2  6 10 14 18 22 26 30
 3  7 11 15 19 23 27 31
 3  7 11 15 19 23 27 31
"""
# First element of a block in its lane's fragment: a0 … a7, b0 … b3, c0 … c3.
A_BLOCKS, B_BLOCKS, C_BLOCKS = [[0, 4], [2, 6]], [[0], [2]], [[0], [2]]


def figure(lanes: str, blocks: list[list[int]]) -> list[list[tuple[int, int]]]:
    """(lane, number in the lane's fragment) of each element of the matrix."""
    drawn = [[int(word) for word in line.split()] for line in lanes.strip().splitlines()]
    out = []
    for block_row in blocks:
        for i, line in enumerate(drawn):
            pair = (lambda i, j: i % 2) if lanes is COLUMNS else (lambda i, j: j % 2)
            out.append([(lane, first + pair(i, j)) for first in block_row for j, lane in enumerate(line)])
    return out


def fragments(matrix: torch.Tensor, places, count: int) -> torch.Tensor:
    """(32, count): what each lane holds."""
    out = torch.full((32, count), float("nan"), dtype=matrix.dtype)
    for i, line in enumerate(places):
        for j, place in enumerate(line):
            assert out[place].isnan(), "two elements in one place"
            out[place] = matrix[i, j]
    assert not out.isnan().any()
    return out


def matrix_of(held: torch.Tensor, places) -> torch.Tensor:
    return torch.stack([torch.stack([held[place] for place in line]) for line in places])


@functools.cache
def library(dtype: torch.dtype) -> ctypes.CDLL:
    path = emulator.compile_source("mma.cpp", define=f"SIMT_TYPE={emulator.TYPES[dtype]}")
    return ctypes.CDLL(str(path), mode=ctypes.RTLD_LOCAL)


def ordered(dtype: torch.dtype, order: int = 0) -> ctypes.CDLL:
    found = library(dtype)
    found.simt_set(order, 0, b"", 0)
    return found


def pointer(t: torch.Tensor) -> ctypes.c_void_p:
    assert t.is_contiguous()
    return ctypes.c_void_p(t.data_ptr())


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@orders
@dtypes
def test_product(dtype, order):
    a, b, c = normal(16, 16, seed=1).to(dtype), normal(16, 8, seed=2).to(dtype), normal(16, 8, seed=3)
    held_a, held_b = fragments(a, figure(ROWS, A_BLOCKS), 8), fragments(b, figure(COLUMNS, B_BLOCKS), 4)
    held = fragments(c, figure(ROWS, C_BLOCKS), 4)
    ordered(dtype, order).run_mma(pointer(held_a), pointer(held_b), pointer(held))
    wanted = a.double() @ b.double() + c.double()
    assert (matrix_of(held, figure(ROWS, C_BLOCKS)).double() - wanted).abs().max() <= 3e-6


@dtypes
def test_product_of_unit_matrices(dtype):
    """Exactly one one in A and in B: a swap of two places in both maps would not hide."""
    ours = ordered(dtype)
    for k in range(16):
        a, b = torch.zeros(16, 16, dtype=dtype), torch.zeros(16, 8, dtype=dtype)
        a[:, k], b[k] = torch.arange(1.0, 17), torch.arange(1.0, 9)
        held_a, held_b = fragments(a, figure(ROWS, A_BLOCKS), 8), fragments(b, figure(COLUMNS, B_BLOCKS), 4)
        held = torch.zeros(32, 4)
        ours.run_mma(pointer(held_a), pointer(held_b), pointer(held))
        wanted = torch.arange(1.0, 17)[:, None] * torch.arange(1.0, 9)
        assert torch.equal(matrix_of(held, figure(ROWS, C_BLOCKS)), wanted)


@orders
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix(count, transposed, order):
    rows = torch.arange(32 * 8, dtype=torch.int16).view(32, 8) + 1
    out = torch.empty(32, count, 2, dtype=torch.int16)
    ordered(torch.bfloat16, order).run_ldmatrix(count, int(transposed), 1, pointer(rows), pointer(out))
    for m in range(count):
        held = matrix_of(out[:, m], figure(ROWS, [[0]]))
        wanted = rows[8 * m : 8 * m + 8]
        assert torch.equal(held, wanted.T if transposed else wanted)


def test_ldmatrix_without_a_barrier_shows():
    """Rows that other lanes write just before: some order of fibers must read them too early."""
    rows = torch.arange(32 * 8, dtype=torch.int16).view(32, 8) + 1
    out = torch.empty(32, 4, 2, dtype=torch.int16)
    wrong = 0
    for order in emulator.ORDERS:
        ordered(torch.bfloat16, order).run_ldmatrix(4, 0, 0, pointer(rows), pointer(out))
        held = torch.cat([matrix_of(out[:, m], figure(ROWS, [[0]])) for m in range(4)])
        wrong += not torch.equal(held, rows)
    assert wrong >= 2


@orders
def test_movmatrix(order):
    matrix = torch.arange(64, dtype=torch.int16).view(8, 8)
    held = fragments(matrix.float(), figure(ROWS, [[0]]), 2).to(torch.int16)
    out = torch.empty_like(held)
    ordered(torch.bfloat16, order).run_movmatrix(pointer(held), pointer(out))
    assert torch.equal(matrix_of(out, figure(ROWS, [[0]])), matrix.T)


@pytest.mark.parametrize("size", [4, 8, 16])
def test_copies_land_at_the_wait(size):
    data = torch.randint(0, 255, (32, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(size))
    out = torch.zeros(32, 3, 2, size, dtype=torch.uint8)
    ordered(torch.bfloat16).run_copies(size, pointer(data), pointer(out))
    poison = torch.full_like(data, 255)
    there = torch.where(torch.arange(32)[:, None] % 2 == 0, data, 0)
    assert torch.equal(out[:, 0, 0], poison) and torch.equal(out[:, 0, 1], poison)
    assert torch.equal(out[:, 1, 0], data) and torch.equal(out[:, 1, 1], poison)
    assert torch.equal(out[:, 2, 0], data) and torch.equal(out[:, 2, 1], there)


@dtypes
def test_pairs_and_powers(dtype):
    x = normal(64, seed=4) * 40
    x[:6] = torch.tensor([0.0, float("inf"), float("-inf"), 1e-6, -200.0, 3.0])
    packed = torch.empty(64, dtype=dtype)
    unpacked, powers = torch.empty(64), torch.empty(64)
    ordered(dtype).run_pairs(pointer(x), pointer(packed), pointer(unpacked), pointer(powers))
    assert torch.equal(packed, x.to(dtype)) and torch.equal(unpacked, x.to(dtype).float())
    wanted = torch.exp2(x.double())
    assert powers[:3].tolist() == [1.0, float("inf"), 0.0] and powers[4] == 0
    assert ((powers.double() - wanted).abs() / wanted.clamp_min(1e-30))[5:].max() <= 2.4e-7
