"""What the CPU library's plan gives another compiler to do, and what that says to it."""

from __future__ import annotations

import subprocess
from pathlib import Path

from trees import REPOSITORY

from sdp_build import toolchain, torch_headers
from sdp_build.plan import Step, plan_extension

ARM, CLANG = "aarch64-linux-gnu-g++", "clang++"


def steps(compiler: str, machine: str, work: Path) -> list[Step]:
    """One for each source and level."""
    made = plan_extension(
        "_C",
        REPOSITORY,
        work,
        cxx=toolchain.find_cxx({"CXX": compiler}),
        nvcc=None,
        torch=torch_headers.find_torch_headers(torch_headers.site_directories()),
        python_include=toolchain.find_python_headers(),
        schema_hash="0" * 16,
        machine=machine,
    )
    compiling = [step for step in made.steps if step.depfile is not None]
    assert {step.inputs[0] for step in compiling} == set((REPOSITORY / "csrc/cpu").glob("*.cpp"))
    return compiling


def said(step: Step, *options: str) -> str:
    """What the compiler says; nothing is the right answer."""
    result = subprocess.run([*step.command, *options], capture_output=True, text=True)
    return result.stderr + (f"exit status {result.returncode}" if result.returncode != 0 else "")
