"""The oldest torch that the libraries promise to run with: its headers and what its libraries export.

From the environment, if that is the torch installed, else out of its wheel, once, into a cache folder of the user's.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from sdp_build import torch_headers
from sdp_build.toolchain import Missing
from sdp_build.torch_headers import MIN_TORCH, TorchHeaders

VERSION = ".".join(map(str, (*MIN_TORCH, 0)))
LIBRARIES = ("libtorch_cpu.so", "libtorch_cuda.so")
OF_TORCH = re.compile(r"(aoti_)?torch_|_ZN?K?(2at|3c10|5torch|6caffe2)")
"""Symbols of torch: its C interface, and C++, which no torch promises to keep."""
ANY_PYTHON = ("--python-version", "3.11", "--implementation", "cp")
"""For pip, where this Python is newer than that torch: the headers are the same for every Python."""


@dataclass(frozen=True)
class OldestTorch:
    """``cuda``: whether the exported symbols are a CUDA build's."""

    headers: TorchHeaders
    exported: frozenset[str]
    cuda: bool


def symbols(library: Path, which: str) -> set[str]:
    """torch's names that a library has: ``which`` is "defined" or "undefined"."""
    command = ["nm", "-D", "-P", f"--{which}-only", str(library)]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name for line in listed.splitlines() if OF_TORCH.match(name := line.split()[0].partition("@")[0])}


def newer(library: Path, oldest: OldestTorch) -> set[str]:
    """What a library wants of torch and the oldest one does not have."""
    names = symbols(library, "undefined") - oldest.exported
    return names if oldest.cuda else {name for name in names if "cuda" not in name}


def _exports(lib: Path) -> dict[str, list[str]]:
    """Library → the names of torch's C interface in it."""
    there = [name for name in LIBRARIES if (lib / name).is_file()]
    return {name: sorted(s for s in symbols(lib / name, "defined") if not s.startswith("_Z")) for name in there}


def _fetch(target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as work:
        fresh = Path(work, "torch")
        try:
            torch_headers.take_from_wheel(f"torch=={VERSION}", fresh, libraries=LIBRARIES)
        except Missing:
            torch_headers.take_from_wheel(f"torch=={VERSION}", fresh, *ANY_PYTHON, libraries=LIBRARIES)
        (fresh / "exports.json").write_text(json.dumps(_exports(fresh / "torch/lib")))
        shutil.rmtree(fresh / "torch/lib")  # about a gigabyte
        fresh.rename(target)


def find() -> OldestTorch:
    """Raises Missing where it is not installed and can't be fetched."""
    for directory in torch_headers.site_directories():
        try:
            headers = torch_headers.find_torch_headers([directory])
        except Missing:
            continue
        if headers.version.partition("+")[0] == VERSION:
            return _with(headers, _exports(headers.include.with_name("lib")))
        break
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sdp_kernels"
    target = cache / f"torch-{VERSION}-headers"
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "torch.lock").open("w") as lock:  # several processes may want it at once
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.is_dir():
            _fetch(target)
    return _with(torch_headers.find_torch_headers([target]), json.loads((target / "exports.json").read_text()))


def _with(headers: TorchHeaders, exports: dict[str, list[str]]) -> OldestTorch:
    return OldestTorch(headers, frozenset(name for names in exports.values() for name in names), len(exports) == 2)
