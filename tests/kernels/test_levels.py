"""The SIMD levels of the CPU library: each runs the tests marked ``levels`` in a process of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from _subprocess import python

from sdp_kernels.backends import BACKENDS

pytestmark = pytest.mark.skipif(BACKENDS["cpu"].absent is not None, reason=f"cpu: {BACKENDS['cpu'].absent}")
MEANT_FOR = "not reference and not composed and not test_error_is_within and not test_input_of_any"


def levels() -> list[int]:
    """Those below the one that this machine runs by itself, and with which the other tests run."""
    if BACKENDS["cpu"].absent is not None:
        return [0]
    from sdp_kernels import _C

    return list(range(_C.cpu_level_detected)) or [0]


@pytest.mark.parametrize("level", levels())
def test_lower_level_passes_the_tests(level):
    done = python(
        *(
            "-m",
            "pytest",
            str(Path(__file__).parent),
            "-m",
            "levels",
            "-k",
            MEANT_FOR,
            "-q",
            "-x",
            "-p",
            "no:cacheprovider",
        ),
        SDP_KERNELS_CPU_LEVEL=str(level),
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    passed = [
        int(word)
        for line in done.stdout.splitlines()
        for word, what in zip(line.split(), line.split()[1:])
        if what.startswith("passed")
    ]
    assert passed and passed[0] > 60, done.stdout[-500:]


BAD = """
import importlib, os
import torch, sdp_kernels
from sdp_kernels import info
from sdp_kernels.backends import BACKENDS
print(BACKENDS["cpu"].absent)
assert BACKENDS["cpu"].absent in info.report()
assert sdp_kernels.kelu(torch.ones(2)).shape == (2,)
for value in ("-1", "avx2", "1.5", "0 ", "", "99999999999999999999"):
    os.environ["SDP_KERNELS_CPU_LEVEL"] = value
    try:
        importlib.import_module("sdp_kernels._C")
    except ImportError as error:
        print(error)
"""


def test_wrong_level_is_a_recorded_reason():
    done = python("-c", BAD, SDP_KERNELS_CPU_LEVEL="3")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 7
    for line, value in zip(lines, ("3", "-1", "avx2", "1.5", "0 ", "", "99999999999999999999")):
        assert "SDP_KERNELS_CPU_LEVEL must be an integer in [0, " in line and f"'{value}'" in line
