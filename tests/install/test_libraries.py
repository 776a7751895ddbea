"""Plans, schema hashes, and real builds of a tiny source tree, CPU and CUDA."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from trees import EXPORT, NO_TOOL, build, library, load, text_of

from sdp_build import backend, toolchain
from sdp_build.execute import first_error
from sdp_build.extensions import DemandedBuildError, schema_hash, summary
from sdp_build.plan import plan_extension
from sdp_build.toolchain import Missing, Tool
from sdp_build.torch_headers import TorchHeaders

# Plans


def plan(root: Path, name: str = "_C", **kwargs):
    tools = {
        "cxx": Tool(("g++",), "g++ 12"),
        "nvcc": Tool(("nvcc",), "nvcc 13"),
        "torch": TorchHeaders(Path("/t"), "2.11.0"),
    }
    rest = {"python_include": Path("/p"), "schema_hash": "0123456789abcdef", "machine": "x86_64"}
    return plan_extension(name, root, root / "work", **{**tools, **rest, **kwargs})


def test_an_operator_is_compiled_once_per_level_and_the_library_once(tree):
    assert [step.text for step in plan(tree).steps if step.depfile] == [
        "compile op.cpp (avx512)",
        "compile op.cpp (avx2)",
        "compile op.cpp (baseline)",
        "compile library.cpp",
    ]
    assert [step.text for step in plan(tree, machine="aarch64").steps if step.depfile] == [
        "compile op.cpp (baseline)",
        "compile library.cpp",
    ]


def test_nothing_is_ever_tuned_to_the_building_machine(tree, nvcc):
    (tree / "csrc/cuda").mkdir()
    (tree / "csrc/cuda/library.cu").touch()
    for name in ("_C", "_C_cuda"):
        words = [word for step in plan(tree, name, arch_list=("9.0",)).steps for word in step.command]
        assert words
        assert not any("march=native" in word or "mtune" in word for word in words)
    baseline = [step for step in plan(tree).steps if "baseline" in step.text or step.text == "compile library.cpp"]
    assert not any(word.startswith("-mavx") for step in baseline for word in step.command)


def test_users_flags_and_host_compiler_are_respected(tree):
    (tree / "csrc/cuda").mkdir()
    (tree / "csrc/cuda/library.cu").touch()
    assert all("-g1" in step.command for step in plan(tree, env={"CXXFLAGS": "-g1"}).steps if step.depfile)
    assert "-Wl,-z,now" in plan(tree, env={"LDFLAGS": "-Wl,-z,now"}).steps[-1].command
    for step in plan(tree, "_C_cuda", env={"CXX": "g++-12"}).steps:
        assert ("-ccbin" in step.command) == (step.command[0] == "nvcc")


def test_first_error_is_the_line_a_user_needs():
    output = "ninja: Entering\n[1/2] compile\nop.cpp:3:1: warning: w\nop.cpp:4:2: error: no such thing\nmore\n"
    assert first_error(output) == "op.cpp:4:2: error: no such thing"
    assert first_error("one\ntwo\n") == "two"


# Schema hash


def test_schema_hash_follows_the_schemas_and_nothing_else(tree):
    ops = tree / "sdp_kernels/ops/op.py"
    before = schema_hash(tree)
    ops.write_text('"""Other words."""\nSCHEMAS = {"op_fwd": "(Tensor x) -> Tensor"}\nOTHER = 1\n')
    assert schema_hash(tree) == before
    ops.write_text('SCHEMAS = {"op_fwd": "(Tensor x, float a) -> Tensor"}\n')
    assert schema_hash(tree) != before


# Real builds


@pytest.mark.parametrize("with_ninja", [True, False])
def test_build_report_and_library_agree(tree, monkeypatch, with_ninja):
    if not with_ninja:
        monkeypatch.setattr(toolchain, "find_ninja", lambda env: None)
    report = build(tree)
    assert report == json.loads((tree / "sdp_kernels/_build_report.json").read_text())
    entry = report["_C"]
    assert entry["built"]
    assert entry["reason"] is None
    assert entry["schema_hash"] == schema_hash(tree)
    assert report["_C_cuda"] == {"built": False, "reason": "this source tree holds no sources for it (csrc/cuda)"}
    built = load(tree)
    assert built.levels() == len(entry["arch_list"])
    assert [getattr(built, f"op_{level}")() for level in range(built.levels())] == list(range(41, 41 + built.levels()))
    assert text_of(built.hash) == schema_hash(tree)
    assert json.loads(text_of(built.info)) == {
        key: value for key, value in entry.items() if key not in ("built", "reason")
    }
    line = summary(report)
    assert "built _C (" in line
    assert "left out _C_cuda: this source tree" in line


def test_a_changed_header_recompiles_what_includes_it_and_only_that(tree):
    build(tree)
    objects = tree / "build/sdp/_C"
    before = {path.name: path.stat().st_mtime_ns for path in objects.glob("*.o")}
    (tree / "csrc/op.h").write_text("#define ANSWER 50\n")
    build(tree)
    after = {path.name: path.stat().st_mtime_ns for path in objects.glob("*.o")}
    assert {name for name in after if after[name] != before[name]} == {name for name in after if name.startswith("op.")}
    assert load(tree).op_0() == 50


def test_a_changed_schema_rebuilds_the_library_with_its_new_hash(tree):
    build(tree)
    (tree / "sdp_kernels/ops/op.py").write_text('SCHEMAS = {"op_fwd": "(Tensor y) -> Tensor"}\n')
    report = build(tree)
    assert text_of(load(tree).hash) == schema_hash(tree) == report["_C"]["schema_hash"]


def test_without_a_compiler_the_reason_is_recorded_and_a_stale_library_goes(tree):
    assert build(tree)["_C"]["built"]
    report = build(tree, CXX=NO_TOOL)
    assert not report["_C"]["built"]
    assert NO_TOOL in report["_C"]["reason"]
    assert not library(tree).exists()
    assert "built no extension" in summary(report)


def test_a_failed_compile_is_a_reason_and_when_demanded_an_error(tree):
    assert build(tree)["_C"]["built"]
    (tree / "csrc/cpu/op.cpp").write_text("int broken() { return nonsense; }\n")
    report = build(tree)
    assert not report["_C"]["built"]
    assert "op.cpp" in report["_C"]["reason"]
    assert "nonsense" in report["_C"]["reason"]
    assert not library(tree).exists()
    with pytest.raises(DemandedBuildError, match="SDP_BUILD_CPU=1"):
        build(tree, SDP_BUILD_CPU="1")
    assert not json.loads((tree / "sdp_kernels/_build_report.json").read_text())["_C"]["built"]


def test_on_another_system_nothing_is_built_or_asked_for_and_it_is_said(tree, monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    report = build(tree)
    assert {name: entry["built"] for name, entry in report.items()} == {"_C": False, "_C_cuda": False}
    assert "Linux only, this is darwin" in report["_C"]["reason"] and report["_C"]["reason"] in summary(report)
    assert backend.torch_requirement({}, tree) == []
    with pytest.raises(DemandedBuildError, match="Linux only"):
        build(tree, SDP_BUILD_CPU="1")


def test_switching_off_removes_the_library_and_says_so(tree):
    build(tree)
    assert build(tree, SDP_BUILD_CPU="0")["_C"] == {"built": False, "reason": "switched off by SDP_BUILD_CPU=0"}
    assert not library(tree).exists()


def add_cuda(tree: Path) -> None:
    (tree / "csrc/cuda").mkdir()
    (tree / "csrc/cuda/library.cu").write_text(f"{EXPORT} const char* info() {{ return SDP_BUILD_INFO; }}\n")


def test_cuda_demanded_without_nvcc_is_an_error(tree):
    add_cuda(tree)
    with pytest.raises(DemandedBuildError, match=r"SDP_BUILD_CUDA=1.*CUDACXX"):
        build(tree, SDP_BUILD_CUDA="1")
    report = build(tree)
    assert report["_C"]["built"]
    assert NO_TOOL in report["_C_cuda"]["reason"]


def real_nvcc() -> list[str]:
    try:
        return list(toolchain.find_nvcc(os.environ).command)
    except Missing:
        return []


@pytest.mark.parametrize("compiler", ["stand-in", *real_nvcc()])
def test_cuda_is_built_for_the_archs_asked_for(tree, nvcc, compiler):
    """With nvcc itself where there is one: only it can refuse the flags."""
    real = compiler != "stand-in"
    add_cuda(tree)
    if real:
        (tree / "csrc/cuda/op.cu").write_text(
            "__global__ void twice(float* x) { x[threadIdx.x] *= 2; }\n"
            f"{EXPORT} void launch(float* x, cudaStream_t s) {{ twice<<<1, 32, 0, s>>>(x); }}\n"
        )
    report = build(tree, CUDACXX=compiler if real else str(nvcc), TORCH_CUDA_ARCH_LIST="8.0;9.0a")
    assert report["_C_cuda"]["built"], report["_C_cuda"]["reason"]
    assert report["_C_cuda"]["arch_list"] == ["8.0", "9.0a"]
    assert "-gencode=arch=compute_90a,code=sm_90a" in report["_C_cuda"]["flags"]
    assert b'\\"arch_list\\": [\\"8.0\\", \\"9.0a\\"]' in (tree / "build/sdp/_C_cuda/build_info.h").read_bytes()
    if real:
        needed = subprocess.run(["readelf", "-d", library(tree, "_C_cuda")], capture_output=True, text=True).stdout
        assert "libtorch_cuda.so" in needed
        assert "libcudart" not in needed
        command = ["nm", "-D", "--defined-only", library(tree, "_C_cuda")]
        exported = subprocess.run(command, capture_output=True, text=True).stdout
        assert "launch" in exported
        assert "cudaMalloc" not in exported
    else:
        assert json.loads(text_of(load(tree, "_C_cuda").info))["arch_list"] == ["8.0", "9.0a"]


def test_without_a_wish_cuda_is_built_for_the_gpu_present_else_the_default(tree, nvcc, monkeypatch):
    add_cuda(tree)
    monkeypatch.setattr(toolchain, "present_gpus", lambda: ("8.0", "10.0"))
    assert build(tree, CUDACXX=str(nvcc))["_C_cuda"]["arch_list"] == ["8.0", "10.0"]
    monkeypatch.setattr(toolchain, "present_gpus", lambda: ())
    assert build(tree, CUDACXX=str(nvcc))["_C_cuda"]["arch_list"] == ["9.0"]


def test_an_arch_that_nvcc_does_not_know_is_a_reason_that_names_it(tree, nvcc):
    add_cuda(tree)
    reason = build(tree, CUDACXX=str(nvcc), TORCH_CUDA_ARCH_LIST="7.0;9.0")["_C_cuda"]["reason"]
    assert "TORCH_CUDA_ARCH_LIST" in reason
    assert "7.0" in reason
