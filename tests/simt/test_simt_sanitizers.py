"""The kernels under AddressSanitizer and UBSan: no access outside of a tensor or of the shared memory asked for."""

from __future__ import annotations

import subprocess

import pytest
import simt_emulator as emulator
import torch
from simt_operators import OPERATORS
from test_simt_machine import SANITIZE

pytestmark = pytest.mark.proof("emulator")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_kernels(operator, dtype):
    define = f"SIMT_TYPE={emulator.TYPES[dtype]}"
    program = emulator.compile_source(f"sanitize_{operator}.cpp", "-O1", *SANITIZE, shared=False, define=define)
    calls = OPERATORS[operator].sanitizer_calls(dtype)
    done = subprocess.run([str(program)], input="\n".join(calls), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert calls and done.stdout == f"{len(calls)} calls\n"
