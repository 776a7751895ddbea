"""These tests run Triton kernels in its interpreter: TRITON_INTERPRET=1, a process of its own, bf16 mended."""

import os
import sys
import warnings
from pathlib import Path

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    raise pytest.UsageError(
        "set TRITON_INTERPRET=1 for tests/triton/interpreted, or run tests/triton/test_interpreter.py"
    )

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "kernels")]

import bfloat16  # noqa: E402
import guards  # noqa: E402
import language  # noqa: E402
import torch  # noqa: E402

bfloat16.install()
language.install()
torch.set_num_threads(1)
warnings.filterwarnings("ignore", "Casting complex values|invalid value encountered|overflow encountered")


@pytest.fixture
def guarded(monkeypatch):
    """Allocations of the kernels' host code lie inside NaN, see guards.py."""
    with guards.Guards(monkeypatch) as g:
        yield g
