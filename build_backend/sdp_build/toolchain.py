"""What this machine has: a C++ compiler, nvcc, ninja, Python's headers, GPUs. Everything is tried by running it.

A finder returns what it found, or raises ``Missing`` with the sentence that the user will read.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

DEFAULT_ARCH_LIST = ("9.0",)


class Missing(Exception):
    """Something the build needs is not on this machine; the text says what and how to get it."""


@dataclass(frozen=True)
class Tool:
    """A program that was run with success: its command line's first words and the line that names its version."""

    command: tuple[str, ...]
    version: str


def run(command: Iterable[str], timeout: float = 120, **kwargs) -> subprocess.CompletedProcess | None:
    """Run a command with its output captured; None when it can't be started at all, or does not end."""
    try:
        return subprocess.run(
            list(command),
            capture_output=True,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            timeout=timeout,
            **kwargs,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None


def find_cxx(env: Mapping[str, str]) -> Tool:
    """The C++ compiler: $CXX if set (then nothing else), else the first of c++, g++, clang++ that makes a library."""
    asked = env.get("CXX", "").strip()
    candidates = [shlex.split(asked)] if asked else [["c++"], ["g++"], ["clang++"]]
    for command in candidates:
        if _makes_a_library(command):
            first_line = (run([*command, "--version"]).stdout.splitlines() or [""])[0]
            return Tool(tuple(command), first_line.strip() or command[0])
    if asked:
        raise Missing(f"the compiler named by CXX={asked!r} cannot compile and link a C++ library")
    raise Missing("no C++ compiler runs (c++, g++ and clang++ were tried; on Debian or Ubuntu: apt install g++)")


def _makes_a_library(command: list[str]) -> bool:
    # A driver without its C++ front end, or without headers, answers --version all the same: so compile something.
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text(
            '#include <cstdint>\n#include <vector>\nextern "C" int64_t probe() { return std::vector<int>(1).size(); }\n'
        )
        result = run([*command, "-std=c++17", "-fPIC", "-shared", "-o", str(Path(folder, "probe.so")), str(source)])
        return result is not None and result.returncode == 0


def find_nvcc(env: Mapping[str, str]) -> Tool:
    """nvcc: $CUDACXX if set (and then nothing else), else from $CUDA_HOME, $CUDA_PATH, PATH or /usr/local/cuda."""
    asked = env.get("CUDACXX", "").strip()
    if asked:
        candidates = [asked]
    else:
        homes = [env.get("CUDA_HOME"), env.get("CUDA_PATH")]
        candidates = [str(Path(home, "bin", "nvcc")) for home in homes if home]
        candidates += [shutil.which("nvcc", path=env.get("PATH")), "/usr/local/cuda/bin/nvcc"]
    for candidate in candidates:
        # nvcc may be a wrapper script whose toolkit is gone: existence says nothing, its exit status does.
        result = run([candidate, "--version"]) if candidate else None
        if result is not None and result.returncode == 0:
            release = re.search(r"release [\d.]+, V([\d.]+)", result.stdout)
            return Tool((candidate,), f"nvcc {release[1]}" if release else "nvcc")
    if asked:
        raise Missing(f"the compiler named by CUDACXX={asked!r} does not run")
    raise Missing("no nvcc runs (CUDA_HOME, PATH and /usr/local/cuda were tried; install the CUDA toolkit to get one)")


def find_ninja(env: Mapping[str, str]) -> Tool | None:
    """ninja from PATH, beside this Python, or from the package of that name; None without one (then: one by one)."""
    candidates = [shutil.which("ninja", path=env.get("PATH")), str(Path(sys.executable).with_name("ninja"))]
    spec = importlib.util.find_spec("ninja")
    if spec is not None and spec.origin is not None:
        candidates.append(str(Path(spec.origin).parent / "data" / "bin" / "ninja"))
    for candidate in candidates:
        result = run([candidate, "--version"]) if candidate else None
        if result is not None and result.returncode == 0:
            return Tool((candidate,), f"ninja {result.stdout.strip()}")
    return None


def find_python_headers() -> Path:
    """The directory of Python.h for the Python that runs the build."""
    include = Path(sysconfig.get_paths()["include"])
    if not (include / "Python.h").is_file():
        raise Missing(f"Python.h is not in {include} (on Debian or Ubuntu: apt install python3-dev)")
    return include


def present_gpus() -> tuple[str, ...]:
    """Compute capabilities of this machine's NVIDIA GPUs, such as ("9.0",); empty without a GPU or a driver."""
    result = run(["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"], timeout=30)
    if result is None or result.returncode != 0:
        return ()
    return tuple(sorted(set(re.findall(r"^\s*(\d+\.\d)\s*$", result.stdout, re.MULTILINE)), key=float))


def git_commit(root: Path) -> str | None:
    """Short name of the commit checked out in ``root``, None when it is no checkout or git is not there."""
    if not (root / ".git").exists():
        return None
    result = run(["git", "-C", os.fspath(root), "rev-parse", "--short=12", "HEAD"], timeout=30)
    return result.stdout.strip() or None if result is not None and result.returncode == 0 else None
