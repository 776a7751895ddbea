"""Proof "ahead of time", Triton's half: every configuration that ships compiles for three GPUs without spilling.

And it needs what the committed table says, for the pinned Triton.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "triton")]

import resources  # noqa: E402
import resources_triton  # noqa: E402
from pinned import NotAvailable, environment  # noqa: E402

pytestmark = pytest.mark.proof("aot triton")
TABLE = json.loads((HERE.parents[1] / "sdp_kernels/triton/configurations.json").read_text())


@pytest.fixture(scope="module", params=resources.operators("triton"))
def operator(request) -> str:
    pytest.importorskip("triton")
    return request.param


@pytest.fixture(scope="module")
def measured(operator):
    try:
        return resources_triton.collect(operator)
    except NotAvailable as reason:
        pytest.skip(str(reason))  # the pinned Triton is not to be had: another makes other code


def test_every_entry_of_the_table_is_compiled_for_every_target(measured, operator):
    """Also those that only newer capabilities have, for these."""
    for target in resources_triton.TARGETS:
        capability = int(target.removeprefix("sm_"))
        listed = {key for above, entries in TABLE.items() if int(above) <= capability for key in entries}
        wanted = {key.removeprefix(f"{operator}/") for key in listed if key.startswith(f"{operator}/")}
        compiled = {key for key in measured if key.endswith("/" + target)}
        assert wanted and {f"{key.replace(' ', '-')}/{target}" for key in wanted} == compiled


def test_every_operator_of_the_table_is_here():
    listed = {key.partition("/")[0] for entries in TABLE.values() for key in entries}
    assert listed == set(resources.operators("triton"))


def test_as_committed(measured, operator):
    lines = resources.differences(resources.committed(f"triton/{operator}"), measured)
    told = f"not what is committed (`python tests/aot/resources.py --write triton/{operator}` writes it):"
    assert not lines, "\n".join([told, *lines])


def test_nothing_spills(measured):
    assert not {key: row["spill_bytes"] for key, row in measured.items() if row["spill_bytes"]}


def test_registers_and_occupancy(measured):
    for key, row in measured.items():
        assert 16 <= row["registers"] <= 255, key
        assert row["registers"] * row["warps"] * 32 <= 65536, key
        assert 0.1 < row["occupancy"] <= 1, f"{key}: {row['occupancy']}"


def test_wide_loads_where_strides_allow_them(measured, operator):
    wide = {key for key, row in measured.items() if row["ldg128"]}
    narrow = {key for key in measured if any(part in key for part in resources.module(f"triton/{operator}").NARROW)}
    assert wide and measured.keys() - wide - narrow == set()


def test_tensor_cores_where_they_are_claimed(measured, operator):
    """Each GPU's own instructions; TMA where the entry is for descriptors."""
    claimed = getattr(resources.module(f"triton/{operator}"), "TENSOR_CORES", ())
    for key, row in measured.items():
        if any(part in key for part in claimed):
            instruction = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA"}[key.rpartition("/")[2]]
            assert instruction in row["matrices"].split(), key
            assert "UTMALDG" in row["matrices"] or "descriptors" not in key, key


def test_occupancy_as_nvidias_calculator_gives_it():
    """Points from CUDA's cuda_occupancy.h: (registers, dynamic shared memory, warps, capability) → resident share."""
    for point, share in {
        (32, 0, 4, 90): 1.0,
        (113, 98304, 8, 90): 0.25,
        (255, 4096, 4, 90): 0.125,
        (128, 0, 16, 80): 0.25,
        (40, 0, 8, 90): 0.75,
    }.items():
        assert resources_triton.occupancy(*point) == share, point


VARIANTS = """
import json, sys
sys.path.insert(0, {here!r})
import resources, resources_triton as r
if {pinned}:
    found = r.measure_variants({operator!r})
else:
    calls = resources.module("triton/{operator}").variants()
    found = {{n: [r.compiled(one, 90).name for one in r.record({operator!r}, call)] for n, call in calls.items()}}
print(json.dumps(found))
"""


@pytest.mark.parametrize("which", ["installed", "pinned"])
def test_variants_compile_without_spilling(which, operator):
    """What the table's entries are specialised to besides: registers, rows apart, huge strides, odd sizes, fp16."""
    try:
        variables = environment(pinned=which == "pinned")
    except NotAvailable as reason:
        pytest.skip(str(reason))  # the pinned Triton is not to be had: another makes other code
    script = VARIANTS.format(here=str(HERE), operator=operator, pinned=which == "pinned")
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found, module = json.loads(done.stdout), resources.module(f"triton/{operator}")
    assert found and all(found.values())
    if which == "pinned":
        spilled = {name: [row["spill_bytes"] for row in rows] for name, rows in found.items()}
        assert not any(any(rows) for name, rows in spilled.items() if name not in module.SPILLING_VARIANTS), spilled
        assert all(found[name][0]["ldg128"] for name in module.WIDE_VARIANTS)
