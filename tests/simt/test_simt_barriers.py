"""Every barrier of the CUDA kernels is needed: without it, some order of fibers gives another result, or none.

So is what orders warpgroup products: fences, the ends of their groups, and waits.

The barrier is taken out of the running emulator, in a child process, since what then happens may be anything.
"""

from __future__ import annotations

import faulthandler
import os
import re
import signal

import pytest
import simt_emulator as emulator
import torch
from simt_operators import OPERATORS

pytestmark = pytest.mark.proof("emulator")
DTYPE = torch.bfloat16
SOURCES = sorted([*(emulator.CSRC / "cuda").glob("*.cuh"), *(emulator.CSRC / "common").glob("*.cuh")])
BARRIER = re.compile(r"(?:__sync(?:threads|warp)|wgmma_(?:fence|commit|wait<\d>)|async_proxy_fence)\s*\(")
DEFINITION = "void "


def barriers() -> list[str]:
    """ "file.cuh:line" of every barrier in the sources."""
    found = []
    for path in SOURCES:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            code = line.partition("//")[0]
            assert len(BARRIER.findall(code)) <= 1, f"two barriers in one line: {path.name}:{number}"
            if BARRIER.search(code) and DEFINITION not in code:
                found.append(f"{path.name}:{number}")
    return found


def outputs(operator: str, case) -> bytes:
    tensors = OPERATORS[operator].outputs(case, DTYPE)
    return b"".join(t.contiguous().view(torch.uint8).numpy().tobytes() for t in tensors if t.numel())


@pytest.fixture(scope="module")
def results() -> list[tuple[str, object, bytes, dict[str, int]]]:
    """Operator, case, its outputs and the barriers it came to."""
    torch.set_num_threads(1)
    table = []
    for operator, cases in OPERATORS.items():
        for case in cases.BARRIER_CASES:
            emulator.schedule(operator, DTYPE)
            emulator.reached(operator, DTYPE)
            wanted = outputs(operator, case)
            table.append((operator, case, wanted, emulator.reached(operator, DTYPE)))
    return table


def differs(operator: str, case, wanted: bytes, order: int, skipped: str) -> bool:
    """Whether the case without the barrier crashes, is refused or gives other bits."""
    child = os.fork()
    if child == 0:
        faulthandler.disable()  # a crash is an answer
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        signal.alarm(60)
        same = False
        try:
            emulator.schedule(operator, DTYPE, order, 0, skipped)
            same = outputs(operator, case) == wanted
        finally:
            os._exit(0 if same else 1)
    _, status = os.waitpid(child, 0)
    return status != 0


def test_every_barrier_is_reached(results):
    reached = set().union(*(counts for *_, counts in results))
    assert reached == set(barriers())


@pytest.mark.parametrize("barrier", barriers())
def test_without_it_something_is_noticed(barrier, results):
    reaching = [result[:3] for result in results if barrier in result[3]]
    assert reaching
    for operator, case, wanted in reaching:
        still = not differs(operator, case, wanted, emulator.WARPS_DESCENDING, "")
        assert still, f"{operator} {case} is not deterministic to begin with"
        for order in emulator.ORDERS:
            if differs(operator, case, wanted, order, barrier):
                return
    pytest.fail(f"nothing changes without the barrier at {barrier}: take it out, or test what it is for")
