"""The libraries' sources compile against the oldest torch's headers, and ask no torch for more than that one has.

Otherwise a macro or a function of a newer torch goes unnoticed wherever the newest one is installed.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
from pathlib import Path

import oldest_torch
import pytest
from trees import EXPORT, REPOSITORY, library, need_a_compiler

from sdp_build import toolchain, torch_headers
from sdp_build.execute import execute
from sdp_build.plan import TARGET, plan_extension
from sdp_build.settings import Settings
from sdp_build.toolchain import Missing
from sdp_build.torch_headers import MIN_TORCH, TorchHeaders

QUICK = {"-O3": ["-O0"], "-gencode=arch=compute_90a,code=sm_90a": ["-G"]}
"""What compiles is the same without optimisation; of kernels unoptimised PTX is made, and no machine code."""
NEWER_MACRO = """
#include <torch/csrc/stable/tensor.h>
void check(AtenTensorHandle t, int32_t* to) { STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t, to)); }
"""
OLDER_MACRO = NEWER_MACRO.replace("STABLE_TORCH", "TORCH").replace("stable/tensor.h>", "stable/library.h>")
NEWER_FUNCTION = """
#include <torch/csrc/stable/c/shim.h>
int tag() { return torch_tag_core(); }
"""


@pytest.fixture(scope="session")
def oldest() -> oldest_torch.OldestTorch:
    try:
        return oldest_torch.find()
    except Missing as reason:
        pytest.skip(str(reason))  # no registry with that version; CI has one


@pytest.fixture(scope="session")
def installed() -> TorchHeaders:
    return torch_headers.find_torch_headers(torch_headers.site_directories())


def build(name: str, headers: TorchHeaders, work: Path) -> Path:
    """The real sources' library, for looking at."""
    need_a_compiler()
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    plan = plan_extension(
        name,
        REPOSITORY,
        work,
        cxx=toolchain.find_cxx(os.environ),
        nvcc=toolchain.find_nvcc(os.environ) if name == "_C_cuda" else None,
        torch=headers,
        python_include=toolchain.find_python_headers(),
        arch_list=("9.0+PTX",),
        schema_hash="0" * 16,
        env={"CXX": os.environ.get("CXX", "")},
    )
    steps = [
        dataclasses.replace(step, command=tuple(w for word in step.command for w in QUICK.get(word, [word])))
        for step in plan.steps
    ]
    assert any("-O0" in step.command for step in steps)
    execute(
        dataclasses.replace(plan, steps=tuple(steps)),
        work,
        ninja=toolchain.find_ninja(os.environ),
        jobs=max(1, Settings.from_env({}).jobs // workers),
    )
    return plan.output


@pytest.mark.parametrize("name", ["_C", "_C_cuda"])
def test_the_sources_compile_against_the_oldest_headers_and_use_what_it_exports(name, oldest, tmp_path):
    try:
        made = build(name, oldest.headers, tmp_path)
    except Missing as reason:
        pytest.skip(str(reason))  # no nvcc; CI has one
    assert len(oldest_torch.symbols(made, "undefined")) > 20
    assert not oldest_torch.newer(made, oldest)


@pytest.mark.parametrize("name", ["_C", "_C_cuda"])
def test_the_library_built_here_runs_with_the_oldest(name, oldest):
    """Whatever torch's headers it was built with."""
    built = library(REPOSITORY, name)
    if not built.is_file():
        pytest.skip(f"{name} is not built")  # see its reason in `python -m sdp_kernels.info`; CI builds both
    assert len(oldest_torch.symbols(built, "undefined")) > 20
    assert not oldest_torch.newer(built, oldest)


def compiles(source: str, headers: TorchHeaders, folder: Path, target: list[str] = TARGET) -> str:
    """What the compiler says against it."""
    need_a_compiler()
    (folder / "source.cpp").write_text(source)
    command = [*toolchain.find_cxx(os.environ).command, "-std=c++17", "-fsyntax-only", *target]
    command += ["-isystem", str(headers.include), str(folder / "source.cpp")]
    return subprocess.run(command, capture_output=True, text=True).stderr


def test_a_macro_of_a_newer_torch_is_refused(oldest, tmp_path):
    assert "STABLE_TORCH_ERROR_CODE_CHECK" in compiles(NEWER_MACRO, oldest.headers, tmp_path)
    assert not compiles(OLDER_MACRO, oldest.headers, tmp_path)


def test_newer_functions_are_hidden_by_the_target_version(installed, tmp_path):
    """Also from the newest headers; they are there for who asks for a newer torch."""
    assert "torch_tag_core" in compiles(NEWER_FUNCTION, installed, tmp_path)
    wanted = ["-DTORCH_TARGET_VERSION=0x020c000000000000"]
    has_it = tuple(map(int, installed.version.split(".")[:2])) > MIN_TORCH
    assert ("torch_tag_core" not in compiles(NEWER_FUNCTION, installed, tmp_path, wanted)) == has_it


def test_a_library_that_wants_a_newer_function_is_found(oldest, tmp_path):
    need_a_compiler()
    source, made = tmp_path / "source.cpp", tmp_path / "made.so"
    source.write_text(
        'extern "C" int torch_tag_core(), torch_get_num_threads();\nnamespace c10 { int hidden(); }\n'
        f"{EXPORT} int all() {{ return torch_tag_core() + torch_get_num_threads() + c10::hidden(); }}\n"
    )
    command = [*toolchain.find_cxx(os.environ).command, "-fPIC", "-shared", "-o", str(made), str(source)]
    subprocess.run(command, check=True)
    assert oldest_torch.newer(made, oldest) == {"torch_tag_core", "_ZN3c106hiddenEv"}
