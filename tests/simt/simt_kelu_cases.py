"""What sanitizers try KeLü's CUDA kernels on; they have no barriers."""

from __future__ import annotations

BARRIER_CASES = ()


def outputs(case, dtype):
    raise LookupError("KeLü's kernels have no barriers")


def sanitizer_calls(dtype) -> list[str]:
    calls = []
    for n in (1, 7, 8, 4096, 8192 + 13, 20_001):
        for backward in (0, 1):
            calls.append(f"kelu {backward} {n} 1 {n} 1 1 1 {n} {n} {n}")
    # y (5, 7) dense, x every second column, grad the same for each row
    calls.append("kelu 1 35 2 5 7 7 1 14 2 0 1 35 69 7")
    calls.append("kelu 0 35 2 5 7 7 1 14 2 0 0 35 69 0")
    return calls
