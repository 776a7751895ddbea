"""Wheels, editable installs and source distributions of a tiny source tree."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from trees import NO_TOOL, REPOSITORY, library, need_a_compiler

from sdp_build.plan import sources_of

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
