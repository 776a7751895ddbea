"""A tiny source tree's libraries: built without torch's headers, found and loaded."""

from __future__ import annotations

import ctypes
import os
import shutil
from pathlib import Path

import pytest

from sdp_build import toolchain
from sdp_build.extensions import build_extensions, library_name
from sdp_build.toolchain import Missing

REPOSITORY = Path(__file__).resolve().parents[2]
NO_TOOL = "/nonexistent/compiler"
EXPORT = 'extern "C" __attribute__((visibility("default")))'


def program(path: Path, text: str) -> Path:
    """A file that can be run."""
    path.write_text(text)
    path.chmod(0o755)
    return path


def need_a_compiler() -> None:
    try:
        toolchain.find_cxx(os.environ)
    except Missing as missing:
        pytest.skip(str(missing))  # nothing to build with; CI has a compiler


def build(root: Path, **env: str) -> dict[str, dict]:
    need_a_compiler()
    base = {"PATH": os.environ["PATH"], "CUDACXX": NO_TOOL}
    return build_extensions(root, root / "sdp_kernels", {**base, **env})


def library(root: Path, name: str = "_C") -> Path:
    return root / "sdp_kernels" / library_name(name)


def load(root: Path, name: str = "_C") -> ctypes.CDLL:
    import torch  # noqa: F401  the library wants torch's own libraries loaded

    # A copy under a fresh name: the loader keeps one library per path.
    copy = root / f"copy{len(list(root.glob('copy*')))}.so"
    shutil.copy(library(root, name), copy)
    return ctypes.CDLL(str(copy))


def text_of(function) -> str:
    function.restype = ctypes.c_char_p
    return function().decode()
