"""The CUDA kernels as compiled need what the committed table says: no spills, wide loads, occupancy."""

from __future__ import annotations

import os
import re
import shlex
import subprocess

import pytest
import resources
import resources_cuda

pytestmark = pytest.mark.proof("aot cuda")
ARCHITECTURES = pytest.mark.parametrize("arch", list(resources_cuda.ARCHITECTURES))


@pytest.fixture(scope="module", params=resources.operators("cuda"))
def operator(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def compiled(operator) -> dict:
    version = resources_cuda.nvcc_version()
    if version is None:
        pytest.skip("no nvcc here")  # there is nothing to compile with; CI has one
    if version != resources_cuda.PINNED:
        pytest.skip(f"the tables are for nvcc {resources_cuda.PINNED}, here is {version}")  # another makes other code
    return resources_cuda.collect(operator)


def test_as_committed(compiled, operator):
    lines = resources.differences(resources.committed(f"cuda/{operator}"), compiled)
    told = f"not what is committed (`python tests/aot/resources.py --write cuda/{operator}` writes it):"
    assert not lines, "\n".join([told, *lines])


@ARCHITECTURES
def test_nothing_spills(compiled, arch):
    spilling = {name: numbers[arch] for name, numbers in compiled["kernels"].items() if numbers[arch]["spilled"]}
    assert not spilling
    assert not {
        name: n[arch] for name, n in compiled["kernels"].items() if n[arch]["stack"] or n[arch]["static_shared"]
    }


@ARCHITECTURES
def test_wide_accesses_where_memory_allows(compiled, operator, arch):
    """Each kernel for aligned tensors moves 16 bytes at a time."""
    module = resources.module(f"cuda/{operator}")
    names = [name for name in compiled["kernels"] if module.WIDE.match(name)]
    assert len(names) == module.WIDE_COUNT > 0
    for name in names:
        numbers = compiled["kernels"][name][arch]
        assert numbers["loads_128"] > 0 and numbers["stores_128"] > 0, name


@ARCHITECTURES
def test_tensor_cores_where_claimed_and_only_there(compiled, operator, arch):
    module = resources.module(f"cuda/{operator}")
    claimed, count = getattr(module, "TENSOR_CORES", None), getattr(module, "TENSOR_CORES_COUNT", 0)
    names = [name for name in compiled["kernels"] if claimed and claimed.match(name)]
    assert len(names) == count
    names = [name for name in names if arch == "sm_90" or name not in getattr(module, "WARPGROUPS", {})]
    assert [name for name, numbers in compiled["kernels"].items() if numbers[arch]["mma"]] == names


@ARCHITECTURES
def test_warpgroup_products_where_claimed_and_never_one_by_one(compiled, operator, arch):
    """Code for sm_90 has them, each wait of the source once; a compiler that can't keep them apart waits after each."""
    module = resources.module(f"cuda/{operator}")
    claimed = getattr(module, "WARPGROUPS", {}) if arch == "sm_90" else {}
    found = {name: n[arch] for name, n in compiled["kernels"].items() if n[arch].get("wgmma")}
    assert {name: (n["wgmma"], n["wgmma_waits"]) for name, n in found.items()} == claimed


@ARCHITECTURES
def test_occupancy(compiled, arch):
    """Every launch fits: at least one block and 8 warps per multiprocessor."""
    for case, launches in compiled["launches"].items():
        for line in launches.get(arch, ()):
            threads, resident = map(int, re.search(r"blocks of (\d+), .* (\d+) resident", line).groups())
            assert resident >= 1 and resident * threads >= 256, f"{case}: {line}"


def test_occupancy_formula():
    """Against NVIDIA's occupancy tables: full registers, full shared memory, the limit of blocks and of warps."""
    blocks = resources_cuda.blocks_per_multiprocessor
    assert blocks("sm_90", 32, 256, 0) == 8
    assert blocks("sm_90", 128, 256, 0) == 2
    assert blocks("sm_90", 255, 256, 0) == 1
    assert blocks("sm_90", 32, 32, 0) == 32
    assert blocks("sm_90", 32, 128, 232448) == 1
    assert blocks("sm_90", 32, 128, 100 * 1024) == 2
    assert blocks("sm_80", 32, 128, 100 * 1024) == 1


def test_an_object_of_the_build_is_read_only_while_it_is_what_would_be_made_here(tmp_path):
    ninja, nvcc, source = resources_cuda.toolchain.find_ninja(os.environ), tmp_path / "nvcc", tmp_path / "op.cu"
    if ninja is None:
        pytest.skip("no ninja here")  # then no object is taken from the build; CI has one
    made, flags = tmp_path / "op.o", [*resources_cuda.NVCC_FLAGS, "-gencode=arch=compute_90a,code=sm_90a"]

    def build(release: str = resources_cuda.PINNED, flags: list[str] = flags):
        touch = shlex.join(["touch", str(made)])
        nvcc.write_text(f"#!/bin/sh\n[ $1 = --version ] && echo release {release}, V || {touch}\n")
        nvcc.chmod(0o755)
        command = shlex.join([str(nvcc), *flags, "-c", str(source), "-o", str(made)])
        text = f"rule run\n  command = {command}\nbuild {made}: run {source}\n".replace("$", "$$")
        (tmp_path / "build.ninja").write_text(text)
        subprocess.run([*ninja.command, "-C", tmp_path], check=True, capture_output=True)
        return resources_cuda.built("op", tmp_path)

    source.touch()
    assert build() == made
    assert build(release="12.9") is None
    assert build(flags=[*flags, "-gencode=arch=compute_80,code=sm_80"]) is None
    assert build(flags=["-O2", *flags[1:]]) is None
    assert build() == made
    os.utime(source, (made.stat().st_mtime + 2,) * 2)
    assert resources_cuda.built("op", tmp_path) is None


def test_a_difference_reads_well():
    old = {"a": {"sm_90": {"registers": 64, "spilled": 0}}, "gone": 1}
    new = {"a": {"sm_90": {"registers": 72, "spilled": 0}}, "new": 2}
    lines = resources.differences(old, new)
    assert lines == ["a / sm_90 / registers: 64 → 72", "gone: gone", "new: new"]
