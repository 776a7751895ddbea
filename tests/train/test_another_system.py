"""Training where nothing of Linux is to be had: what macOS lacks is taken away from a process, which then trains.

No Mac has run it. Left to trust: PyTorch itself, and that nothing else is missing there.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import sdpnet

MAC = """
import ctypes, os, pathlib, platform, sys
import torch  # this system's, so before
sys.platform, platform.system = "darwin", lambda: "Darwin"
del os.sched_getaffinity
for name in ("sdp_kernels._C", "sdp_kernels._C_cuda", "triton", "resource", "fcntl"):
    sys.modules[name] = None  # its import fails
ctypes.CDLL = lambda name: object()  # a C library without mallopt
read = pathlib.Path.read_text
def read_text(path, *words, **options):
    if path.parts[:2] in (("/", "proc"), ("/", "sys")):
        raise FileNotFoundError(path)
    return read(path, *words, **options)
pathlib.Path.read_text = read_text
from sdp_kernels import info
print(info.report())
from sdpnet import train
sys.exit(train.main(sys.argv[1:]))
"""


def test_training_and_the_report_need_nothing_of_linux(tiny_words, tmp_path):
    words = [*tiny_words, "run.device=cpu", "--fused", "--out", str(tmp_path / "run")]
    ran = subprocess.run(
        [sys.executable, "-c", MAC, *words], cwd=Path(sdpnet.__file__).parents[1], capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    assert re.fullmatch(r"done in .* top1=[\d.]+%", ran.stdout.splitlines()[-1])
    assert "on Darwin" in ran.stdout and "triton is not installed" in ran.stdout
    assert "library sdp_kernels._C not built" in ran.stdout
