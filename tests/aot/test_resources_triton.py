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

pytestmark = pytest.mark.proof("aot")
TABLE = json.loads((HERE.parents[1] / "sdp_kernels/triton/configurations.json").read_text())
NARROW = ("kelu/forward/line", "kelu/forward/narrow", "kelu/forward/square", "kelu/backward/line")
NARROW += ("kelu/backward/narrow", "kelu/backward/square", "add_partials", "/odd-")
"""Kernels for strides that allow no wide loads."""
TOO_FEW = ("rows/16/16bit", "backward/columns/16/16bit")
"""Twelve channels of 16 bits are 24 bytes; a tile of 32 pixels on 128 threads gives each less than 16 bytes."""


@pytest.fixture(scope="module")
def measured():
    pytest.importorskip("triton")
    try:
        return resources_triton.collect()
    except NotAvailable as reason:
        pytest.skip(str(reason))


def test_every_entry_of_the_table_is_compiled_for_every_target(measured):
    """Also those that only newer capabilities have, for these."""
    for target in resources_triton.TARGETS:
        capability = int(target.removeprefix("sm_"))
        wanted = {key for listed, entries in TABLE.items() if int(listed) <= capability for key in entries}
        assert {f"triton/{key.replace(' ', '-')}/{target}" for key in wanted} == {
            key for key in measured if key.endswith("/" + target)
        }


def test_as_committed(measured):
    lines = resources.differences(resources.committed("triton"), measured)
    told = "not what tests/aot/resources.json says (`python tests/aot/resources.py --write triton` writes it):"
    assert not lines, "\n".join([told, *lines])


def test_nothing_spills(measured):
    assert not {key: row["spill_bytes"] for key, row in measured.items() if row["spill_bytes"]}


def test_registers_and_occupancy(measured):
    for key, row in measured.items():
        assert 16 <= row["registers"] <= 255, key
        assert row["registers"] * row["warps"] * 32 <= 65536, key
        assert 0.1 < row["occupancy"] <= 1, f"{key}: {row['occupancy']}"


def test_wide_loads_where_strides_allow_them(measured):
    wide = {key for key, row in measured.items() if row["ldg128"]}
    unwanted = {key for key in measured if any(part in key for part in NARROW) or any(p in key for p in TOO_FEW)}
    assert measured.keys() - wide - unwanted == set()
    assert any("dense" in key for key in wide) and any("columns/1024" in key for key in wide)


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
import json, sys, torch
sys.path.insert(0, {here!r})
import resources_triton as r
from sdp_kernels.triton import layer_norm_2d as n, kelu as k
def record(call):
    n.launch = k.launch = recorder = r._Recorder()
    call()
    return recorder.launched
found = {{}}
def norm(name, x, registers=0, residual=False):
    c = x.shape[1] if x.dim() == 4 else x.shape[2]
    w = torch.empty(c)
    s = torch.empty((x.shape[0], *x.shape[2:]) if x.dim() == 4 else x.shape[:2])
    more = x if residual else None
    launched = record(lambda: n.layer_norm_2d_fwd(x, more, w, w, 1e-6, registers))
    launched += record(lambda: n.layer_norm_2d_bwd(x, more, x, w, s, s, registers))
    found[name] = [r.measure(one, 90) for one in launched]
norm("fp16", torch.empty(2, 768, 16, 16, dtype=torch.float16))
norm("token buffer", torch.empty(2, 261, 768, dtype=torch.bfloat16), 5, True)
norm("14 x 14", torch.empty(2, 384, 14, 14, dtype=torch.bfloat16))
norm("7 x 7", torch.empty(2, 1024, 7, 7, dtype=torch.bfloat16), residual=True)
norm("image rows of tokens", torch.empty(2, 17, 17, 96, dtype=torch.bfloat16)[:, :16, 1:].permute(0, 3, 1, 2))
norm("far", torch.empty_strided((2, 64, 16, 16), (2**36, 2**30, 16, 1), dtype=torch.bfloat16, device="meta"))
x = torch.empty(4096, dtype=torch.float16)
found["kelu fp16"] = [r.measure(one, 90) for one in record(lambda: k.kelu_fwd(x)) + record(lambda: k.kelu_bwd(x, x))]
print(json.dumps(found))
"""


@pytest.mark.parametrize("which", ["installed", "pinned"])
def test_variants_compile_without_spilling(which, tmp_path):
    """What the table's entries are specialised to besides: registers, rows apart, huge strides, odd sizes, fp16."""
    pytest.importorskip("triton")
    try:
        variables = environment(pinned=which == "pinned")
    except NotAvailable as reason:
        pytest.skip(str(reason))
    command = [sys.executable, "-c", VARIANTS.format(here=str(HERE))]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert len(found) == 7
    if which == "pinned":
        spilled = {name: [row["spill_bytes"] for row in rows] for name, rows in found.items()}
        assert not any(any(rows) for name, rows in spilled.items() if name != "far"), spilled
        assert all(row["ldg128"] for name in ("fp16", "token buffer", "kelu fp16") for row in found[name][:1])
