"""The build without torch: settings, tools, plans, requirements, and real builds of a tiny source tree."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from sdp_build import backend, toolchain, torch_headers
from sdp_build.execute import first_error
from sdp_build.extensions import DemandedBuildError, build_extensions, library_name, schema_hash, summary
from sdp_build.plan import plan_extension, sources_of
from sdp_build.settings import SettingError, Settings, gencode_flags, parse_arch_list
from sdp_build.toolchain import Missing, Tool
from sdp_build.torch_headers import TorchHeaders

REPOSITORY = Path(__file__).resolve().parents[1]
NO_TOOL = "/nonexistent/compiler"
EXPORT = 'extern "C" __attribute__((visibility("default")))'


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
    script = tmp_path / "nvcc"
    script.write_text(
        f"#!{sys.executable}\n"
        "import subprocess, sys\n"
        "args = sys.argv[1:]\n"
        "if args == ['--version']: print('Cuda compilation tools, release 13.0, V13.0.88'); sys.exit()\n"
        "if args == ['--list-gpu-code']: print('sm_80\\nsm_90\\nsm_100'); sys.exit()\n"
        "own = ('-gencode', '--expt', '-Xcompiler', '-Xlinker', '-cudart')\n"
        "if '-c' in args: args[args.index('-c'):args.index('-c')] = ['-x', 'c++']\n"
        "sys.exit(subprocess.call(['g++', '-fPIC'] + [a for a in args if not a.startswith(own)]))\n"
    )
    script.chmod(0o755)
    return script


def need_a_compiler() -> None:
    try:
        toolchain.find_cxx(os.environ)
    except Missing as missing:
        pytest.skip(str(missing))  # a real build has nothing to run


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


# Settings


def test_settings_are_read_from_the_environment():
    env = {"SDP_BUILD_CPU": "0", "SDP_BUILD_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "8.0;9.0a 10.0+PTX", "MAX_JOBS": "3"}
    assert Settings.from_env(env) == Settings("0", "1", ("8.0", "9.0a", "10.0+PTX"), 3)
    default = Settings.from_env({})
    assert (default.cpu, default.cuda, default.arch_list) == ("auto", "auto", None)
    assert default.jobs >= 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SDP_BUILD_CPU", "yes"),
        ("SDP_BUILD_CUDA", "2"),
        ("MAX_JOBS", "0"),
        ("MAX_JOBS", "two"),
        ("TORCH_CUDA_ARCH_LIST", "Hopper"),
        ("TORCH_CUDA_ARCH_LIST", "8.0;sm_90"),
        ("TORCH_CUDA_ARCH_LIST", "9.0+ptx"),
    ],
)
def test_a_bad_value_is_an_error_that_names_its_variable(name, value):
    with pytest.raises(SettingError, match=name):
        Settings.from_env({name: value})


def test_an_arch_list_is_nobodys_business_without_cuda():
    assert Settings.from_env({"SDP_BUILD_CUDA": "0", "TORCH_CUDA_ARCH_LIST": "Hopper"}).arch_list is None


def test_arch_list_becomes_gencode_flags():
    assert parse_arch_list(" 8.0, 9.0a;;8.0 ") == ("8.0", "9.0a")
    assert parse_arch_list("") is None
    assert gencode_flags(("9.0a", "10.0+PTX")) == [
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_100,code=sm_100",
        "-gencode=arch=compute_100,code=compute_100",
    ]


# Tools


def test_a_wrapper_whose_toolkit_is_gone_is_no_nvcc(tmp_path):
    broken = tmp_path / "nvcc"
    broken.write_text('#!/bin/sh\nexec /nonexistent/bin/nvcc "$@"\n')
    broken.chmod(0o755)
    with pytest.raises(Missing, match="CUDACXX"):
        toolchain.find_nvcc({"CUDACXX": str(broken)})


def test_nvcc_is_found_in_cuda_home(nvcc, tmp_path):
    (tmp_path / "cuda/bin").mkdir(parents=True)
    shutil.move(nvcc, tmp_path / "cuda/bin/nvcc")
    found = toolchain.find_nvcc({"CUDA_HOME": str(tmp_path / "cuda"), "PATH": ""})
    assert found == Tool((str(tmp_path / "cuda/bin/nvcc"),), "nvcc 13.0.88")


def test_a_compiler_that_only_tells_its_version_is_no_compiler(tmp_path):
    driver = tmp_path / "g++"
    driver.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "g++ 12.0" && exit 0\nexit 1\n')
    driver.chmod(0o755)
    with pytest.raises(Missing, match="CXX="):
        toolchain.find_cxx({"CXX": str(driver)})


def make_torch(directory: Path, version: str) -> Path:
    (directory / "torch/include/torch/csrc/stable").mkdir(parents=True)
    (directory / "torch/include/torch/csrc/stable/library.h").touch()
    (directory / "torch/version.py").write_text(f"__version__ = '{version}'\ndebug = False\n")
    return directory


def test_torch_headers_are_the_first_that_are_new_enough(tmp_path):
    old, new = make_torch(tmp_path / "old", "2.9.1+cu128"), make_torch(tmp_path / "new", "2.11.0+cpu")
    newer = make_torch(tmp_path / "newer", "3.0.0")
    found = torch_headers.find_torch_headers([tmp_path / "none", old, new, newer])
    assert found == TorchHeaders(new / "torch/include", "2.11.0+cpu")
    with pytest.raises(Missing, match=r"2\.9\.1"):
        torch_headers.find_torch_headers([old])
    with pytest.raises(Missing, match="no torch headers"):
        torch_headers.find_torch_headers([tmp_path / "none"])


def test_the_target_environment_is_searched_before_the_builds_own_path():
    import sysconfig

    found = torch_headers.site_directories()
    assert found[0] == Path(sysconfig.get_path("purelib"))
    assert {Path(path) for path in sys.path if path} <= set(found)


# Requirements


@pytest.mark.parametrize(
    ("env", "compiler", "headers", "fetched", "expected"),
    [
        ({}, True, True, None, []),
        ({}, True, False, True, []),
        ({}, True, False, False, ["torch>=2.11"]),
        ({}, False, False, None, []),
        ({"SDP_BUILD_CPU": "0"}, True, False, False, ["torch>=2.11"]),
        ({"SDP_BUILD_CPU": "0", "SDP_BUILD_CUDA": "0"}, True, False, None, []),
    ],
)
def test_torch_is_required_only_where_its_headers_are_needed_and_not_to_be_had(
    monkeypatch, env, compiler, headers, fetched, expected
):
    def found(there: bool):
        def find(*args):
            if not there:
                raise Missing("not there")

        return find

    fetches = []
    monkeypatch.setattr(toolchain, "find_cxx", found(compiler))
    monkeypatch.setattr(torch_headers, "find_torch_headers", found(headers))
    monkeypatch.setattr(torch_headers, "fetch_torch_headers", lambda root: fetches.append(root) or fetched)
    assert backend.torch_requirement(env) == expected
    assert len(fetches) == (fetched is not None)  # nothing is downloaded that is not needed


def make_wheel(folder: Path, version: str) -> None:
    files = make_torch(folder.parent / f"unpacked-{version}", version)
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"torch-{version}-py3-none-any.whl", "w") as wheel:
        for path in [path for path in files.rglob("*") if path.is_file()]:
            wheel.write(path, path.relative_to(files))
        wheel.writestr("torch/lib/libtorch_cpu.so", "large")
        wheel.writestr(
            f"torch-{version}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n"
        )
        wheel.writestr(
            f"torch-{version}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )


def use_only(index: Path, monkeypatch) -> None:
    """Make ``index`` all that pip knows, as a configuration file would."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))


def test_headers_are_taken_out_of_the_wheel_that_pip_fetches(tmp_path, monkeypatch):
    make_wheel(tmp_path / "index", "2.11.1")
    use_only(tmp_path / "index", monkeypatch)
    assert torch_headers.fetch_torch_headers(tmp_path)
    kept = torch_headers.fetched_directory(tmp_path)
    assert torch_headers.find_torch_headers(torch_headers.search_path(tmp_path)) == TorchHeaders(
        kept / "torch/include", "2.11.1"
    )
    assert not (kept / "torch/lib").exists()
    assert [path.name for path in kept.parent.iterdir()] == ["torch_headers"]  # and no wheel is left behind


def test_where_pip_fetches_nothing_the_headers_are_not_there(tmp_path, monkeypatch, capsys):
    make_wheel(tmp_path / "index", "2.10.0")  # too old
    use_only(tmp_path / "index", monkeypatch)
    assert not torch_headers.fetch_torch_headers(tmp_path)
    assert not torch_headers.fetched_directory(tmp_path).exists()
    assert "asking for torch itself" in capsys.readouterr().out


def test_the_requirement_is_checked_against_the_same_variables():
    with pytest.raises(SettingError, match="SDP_BUILD_CUDA"):
        backend.torch_requirement({"SDP_BUILD_CUDA": "maybe"})


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
        "compile library.cpp",
        "compile op.cpp (baseline)",
        "compile op.cpp (avx2)",
        "compile op.cpp (avx512)",
    ]
    assert [step.text for step in plan(tree, machine="aarch64").steps if step.depfile] == [
        "compile library.cpp",
        "compile op.cpp (baseline)",
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


# The package


@pytest.fixture
def project(tree: Path) -> Path:
    """The tiny tree as a whole project: the real pyproject.toml, setup.py and backend around it."""
    for name in ("pyproject.toml", "setup.py", "LICENSE", "MANIFEST.in"):
        shutil.copy(REPOSITORY / name, tree)
    shutil.copytree(REPOSITORY / "build_backend", tree / "build_backend", ignore=shutil.ignore_patterns("__pycache__"))
    for package in ("sdp_kernels", "sdp_kernels/ops", "sdpnet"):
        (tree / package).mkdir(exist_ok=True)
        (tree / package / "__init__.py").touch()
    (tree / "sdpnet/presets").mkdir()
    (tree / "sdpnet/presets/digits.yaml").write_text("a: 1\n")
    (tree / "README.md").write_text("A package.\n")
    return tree


def call_hook(project: Path, hook: str, **env: str) -> Path:
    """Call a PEP 517 hook as a front end does, in a process of its own; returns what it made."""
    need_a_compiler()
    out = project / "out"
    out.mkdir(exist_ok=True)
    code = (
        f"import sys; sys.path.insert(0, 'build_backend'); from sdp_build import backend; backend.{hook}({str(out)!r})"
    )
    env = {**os.environ, "CUDACXX": NO_TOOL, **env}
    result = subprocess.run([sys.executable, "-c", code], cwd=project, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    if hook == "build_sdist":
        (made,) = out.glob("*.tar.gz")
    else:
        assert result.stdout.count("sdp_kernels: ") == 1  # the one line
        (made,) = out.glob("*.whl")
    return made


def test_a_wheel_carries_library_report_and_data_under_a_stable_tag(project):
    wheel = call_hook(project, "build_wheel")
    assert "-cp311-abi3-" in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    assert {"sdp_kernels/_C.abi3.so", "sdp_kernels/_build_report.json", "sdpnet/presets/digits.yaml"} <= set(names)
    assert not any(name.startswith(("tests", "csrc", "build")) for name in names)
    assert not library(project).exists()  # a wheel leaves the source tree as it was


def test_an_editable_install_builds_in_place(project):
    wheel = call_hook(project, "build_editable")
    assert library(project).is_file()
    assert (project / "sdp_kernels/_build_report.json").is_file()
    assert not any(name.endswith(".so") for name in zipfile.ZipFile(wheel).namelist())


def test_a_source_distribution_can_be_built_from(project):
    with tarfile.open(call_hook(project, "build_sdist")) as files:
        names = {name.partition("/")[2] for name in files.getnames()}
    assert {"csrc/op.h", "csrc/cpu/library.cpp", "build_backend/sdp_build/backend.py", "setup.py", "LICENSE"} <= names
    assert not any(name.startswith("build/") or name.endswith(".so") for name in names)


def test_without_a_compiler_the_package_still_builds(project):
    wheel = call_hook(project, "build_wheel", CXX=NO_TOOL)
    names = zipfile.ZipFile(wheel).namelist()
    assert "sdp_kernels/_build_report.json" in names
    assert not any(name.endswith(".so") for name in names)


def test_the_real_tree_has_sources_for_the_cpu_library():
    names = [path.name for path in sources_of(REPOSITORY, "_C")]
    assert "library.cpp" in names
    assert len(names) > 1
