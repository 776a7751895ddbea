"""Every barrier of the CUDA kernels is needed: without it, some order of fibers gives another result, or none.

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
from simt_norm_cases import CASES, LONG_CASES, run

pytestmark = pytest.mark.proof("emulator")
DTYPE = torch.bfloat16
SOURCES = sorted([*(emulator.CSRC / "cuda").glob("*.cuh"), *(emulator.CSRC / "common").glob("*.cuh")])
BARRIER = re.compile(r"__sync(threads|warp)\s*\(")


def barriers() -> list[str]:
    """ "file.cuh:line" of every barrier in the sources."""
    found = []
    for path in SOURCES:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            code = line.partition("//")[0]
            assert len(BARRIER.findall(code)) <= 1, f"two barriers in one line: {path.name}:{number}"
            if BARRIER.search(code):
                found.append(f"{path.name}:{number}")
    return found


def outputs(case) -> bytes:
    # Register rows of the sum may be NaN, of any bits.
    return b"".join(
        t.contiguous().nan_to_num(7.0).view(torch.uint8).numpy().tobytes() for t in run(case, DTYPE)[0].values()
    )


@pytest.fixture(scope="module")
def results() -> list[tuple[object, bytes, dict[str, int]]]:
    """Case, its outputs and the barriers it came to."""
    torch.set_num_threads(1)
    emulator.schedule(DTYPE)
    emulator.reached(DTYPE)
    table = []
    for case in [*CASES, *LONG_CASES[:-2]]:
        emulator.schedule(DTYPE)
        table.append((case, outputs(case), emulator.reached(DTYPE)))
    return table


def differs(case, wanted: bytes, order: int, skipped: str) -> bool:
    """Whether the case without the barrier crashes, is refused or gives other bits."""
    child = os.fork()
    if child == 0:
        faulthandler.disable()  # a crash is an answer
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        signal.alarm(60)
        same = False
        try:
            emulator.schedule(DTYPE, order, 0, skipped)
            same = outputs(case) == wanted
        finally:
            os._exit(0 if same else 1)
    _, status = os.waitpid(child, 0)
    return status != 0


def test_every_barrier_is_reached(results):
    reached = set().union(*(counts for _, _, counts in results))
    assert reached == set(barriers())


@pytest.mark.parametrize("barrier", barriers())
def test_without_it_something_is_noticed(barrier, results):
    reaching = [(case, wanted) for case, wanted, counts in results if barrier in counts]
    assert reaching
    for case, wanted in reaching:
        assert not differs(case, wanted, emulator.WARPS_DESCENDING, ""), f"{case} is not deterministic to begin with"
        for order in emulator.ORDERS:
            if differs(case, wanted, order, barrier):
                return
    pytest.fail(f"nothing changes without the barrier at {barrier}: take it out, or test what it is for")
