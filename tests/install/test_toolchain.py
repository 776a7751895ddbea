"""What the build decides before it compiles: settings, tools, torch's headers, requirements."""

from __future__ import annotations

import os
import shutil
import sys
import zipfile
from pathlib import Path

import pytest
from trees import program

from sdp_build import backend, toolchain, torch_headers
from sdp_build.settings import SettingError, Settings, gencode_flags, parse_arch_list
from sdp_build.toolchain import Missing, Tool
from sdp_build.torch_headers import TorchHeaders

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


def test_hopper_gets_its_own_instructions_and_later_gpus_get_ptx_without_them():
    """Kernels of warpgroup products are empty in code for sm_90; PTX for sm_90a would run on no later GPU."""
    own = "-gencode=arch=compute_90a,code=sm_90a"
    assert gencode_flags(("9.0",)) == gencode_flags(("9.0a",)) == gencode_flags(toolchain.DEFAULT_ARCH_LIST) == [own]
    assert gencode_flags(("9.0+PTX",)) == [own, "-gencode=arch=compute_90,code=compute_90"]
    assert gencode_flags(("8.0", "8.9", "10.0")) == [
        f"-gencode=arch=compute_{number},code=sm_{number}" for number in ("80", "89", "100")
    ]


# Tools


def test_a_wrapper_whose_toolkit_is_gone_is_no_nvcc(tmp_path):
    broken = program(tmp_path / "nvcc", '#!/bin/sh\nexec /nonexistent/bin/nvcc "$@"\n')
    with pytest.raises(Missing, match="CUDACXX"):
        toolchain.find_nvcc({"CUDACXX": str(broken)})


def test_nvcc_is_found_in_cuda_home(nvcc, tmp_path):
    (tmp_path / "cuda/bin").mkdir(parents=True)
    shutil.move(nvcc, tmp_path / "cuda/bin/nvcc")
    found = toolchain.find_nvcc({"CUDA_HOME": str(tmp_path / "cuda"), "PATH": ""})
    assert found == Tool((str(tmp_path / "cuda/bin/nvcc"),), "nvcc 13.0.88")


def test_a_compiler_that_only_tells_its_version_is_no_compiler(tmp_path):
    driver = program(tmp_path / "g++", '#!/bin/sh\n[ "$1" = --version ] && echo "g++ 12.0" && exit 0\nexit 1\n')
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


def test_libraries_are_taken_out_of_the_wheel_only_by_name(tmp_path, monkeypatch):
    make_wheel(tmp_path / "index", "2.11.0")
    use_only(tmp_path / "index", monkeypatch)
    torch_headers.take_from_wheel("torch==2.11.0", tmp_path / "kept", libraries=("libtorch_cpu.so", "libtorch_cuda.so"))
    assert (tmp_path / "kept/torch/include").is_dir()
    assert [path.name for path in (tmp_path / "kept/torch/lib").iterdir()] == ["libtorch_cpu.so"]
    with pytest.raises(Missing, match=r"torch==2\.12\.0"):
        torch_headers.take_from_wheel("torch==2.12.0", tmp_path / "other")


def test_the_requirement_is_checked_against_the_same_variables():
    with pytest.raises(SettingError, match="SDP_BUILD_CUDA"):
        backend.torch_requirement({"SDP_BUILD_CUDA": "maybe"})
