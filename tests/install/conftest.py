"""A source tree of one operator, and a stand-in for nvcc."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from other_compilers import ARM, CLANG
from trees import EXPORT, REPOSITORY, program

# Compilers that no build here needs; a skip would say that something is missing.
WITHOUT = {"test_arm.py": ARM, "test_clang.py": CLANG}
collect_ignore = [file for file, compiler in WITHOUT.items() if shutil.which(compiler) is None]


def pytest_report_header() -> str | None:
    left_out = ", ".join(f"{file} (no {WITHOUT[file]})" for file in collect_ignore)
    return f"left out: {left_out}" if left_out else None


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A source tree with one operator that needs no torch, under a path with a blank."""
    root = tmp_path / "source tree"
    (root / "csrc/cpu").mkdir(parents=True)
    (root / "sdp_kernels/ops").mkdir(parents=True)
    shutil.copy(REPOSITORY / "sdp_kernels/_schema_hash.py", root / "sdp_kernels")
    (root / "sdp_kernels/ops/op.py").write_text('SCHEMAS = {"op_fwd": "(Tensor x) -> Tensor"}\n')
    (root / "csrc/op.h").write_text("#define ANSWER 41\n")
    (root / "csrc/cpu/op.cpp").write_text(
        '#include "op.h"\n#define CAT(a, b) a##b\n#define NAME(a, b) CAT(a, b)\n'
        f"{EXPORT} int NAME(op_, SDP_LEVEL)() {{ return ANSWER + SDP_LEVEL; }}\n"
    )
    (root / "csrc/cpu/library.cpp").write_text(
        f"{EXPORT} int levels() {{ return SDP_LEVELS; }}\n"
        f"{EXPORT} const char* hash() {{ return SDP_SCHEMA_HASH; }}\n"
        f"{EXPORT} const char* info() {{ return SDP_BUILD_INFO; }}\n"
    )
    return root


@pytest.fixture
def nvcc(tmp_path: Path) -> Path:
    """A stand-in for nvcc: knows three architectures, hands compiling and linking to g++ without its own flags."""
    return program(
        tmp_path / "nvcc",
        f"#!{sys.executable}\n"
        "import subprocess, sys\n"
        "args = sys.argv[1:]\n"
        "if args == ['--version']: print('Cuda compilation tools, release 13.0, V13.0.88'); sys.exit()\n"
        "if args == ['--list-gpu-code']: print('sm_80\\nsm_90\\nsm_100'); sys.exit()\n"
        "own = ('-gencode', '--expt', '-Xcompiler', '-Xlinker', '-cudart')\n"
        "if '-c' in args: args[args.index('-c'):args.index('-c')] = ['-x', 'c++']\n"
        "sys.exit(subprocess.call(['g++', '-fPIC'] + [a for a in args if not a.startswith(own)]))\n",
    )
