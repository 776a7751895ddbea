"""Registers, spills, shared memory, occupancy and wide loads of every Triton configuration that ships, without a GPU.

    python tests/aot/resources_triton.py [sm_80 sm_90 sm_100]      prints them, compiled here

The kernels' own host code is run on small CPU tensors with the launch replaced by a recorder, once per entry of
``configurations.json``, so what is compiled is what would be launched. The compiler is the pinned Triton of
``tests/triton/pinned.py`` whatever Triton is installed; :func:`collect` runs this file with it, in two processes.
An operator takes part by ``triton_<operator>.py`` with

- ``MODULES``: its modules that use ``launch``;
- ``call(parts)``: for an entry "operator/part/…", a function that makes a call using it, and which of the call's
  launches that is;
- ``variants()``: name → function making calls that specialise kernels in other ways (dtypes, strides, sizes);
- ``NARROW``: parts of the names of entries that load nothing 16 bytes at a time, for the reason given there;
- ``TENSOR_CORES``, if it has any: the same of entries that must use them.
"""

from __future__ import annotations

import bisect
import itertools
import json
import os
import re
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import resources

ROOT = Path(__file__).resolve().parents[2]
TARGETS = ("sm_80", "sm_90", "sm_100")
SHARED_PER_SM = {80: 167936, 90: 233472, 100: 233472}
"""Bytes; a block takes 1 KiB of them on top of its own (CUDA C++ programming guide, compute capabilities)."""


@dataclass(frozen=True)
class Launched:
    """One launch as the host code made it."""

    kernel: object
    arguments: tuple
    warps: int
    constants: tuple


def occupancy(registers: int, shared: int, warps: int, capability: int) -> float:
    """Resident warps / 64: 64 Ki registers handed out 256 per warp on four partitions, 32 blocks, shared memory."""
    per_warp = -(-registers * 32 // 256) * 256
    by_registers = (16384 // per_warp) * 4 // warps
    by_shared = SHARED_PER_SM[capability] // (-(-shared // 128) * 128 + 1024)
    return min(by_registers, by_shared, 64 // warps, 32) * warps / 64


# ---- in a process with the pinned Triton -----------------------------------------------------------------------------


class _Recorder:
    """Stands in for ``launch`` of the operators' modules."""

    def __init__(self):
        self.launched: list[Launched] = []

    def __call__(self, kernel, grid, *arguments, warps, **constants):
        assert all(n > 0 for n in grid), "an empty grid compiles nothing"
        self.launched.append(Launched(kernel, arguments, warps, tuple(constants.items())))


def record(operator: str, call: Callable[[], object]) -> list[Launched]:
    """What ``call`` launches."""
    recorder = _Recorder()
    for module in resources.module(f"triton/{operator}").MODULES:
        module.launch = recorder
    call()
    return recorder.launched


def recorded(key: str, capability: int) -> Launched:
    """The launch that the table's entry ``key`` leads to on a GPU of that capability."""
    from sdp_kernels.triton import _launch

    _launch.capability_of = lambda device: capability
    operator, *parts = key.split("/")
    call, which = resources.module(f"triton/{operator}").call(parts)
    return record(operator, call)[which]


def _signature(launched: Launched) -> tuple[dict, dict, dict]:
    """Types, constants and hints of the arguments, as Triton's run time specialises them."""
    import torch

    kernel, constants = launched.kernel, dict(launched.constants)
    types = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.float16: "*fp16", torch.int64: "*i64"}
    signature, values, hints = {}, {}, {}
    given = dict(zip((n for n in kernel.arg_names if n not in constants), launched.arguments, strict=True))
    for i, (name, parameter) in enumerate(zip(kernel.arg_names, kernel.params, strict=True)):
        value = constants.get(name, given.get(name))
        special = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (special and isinstance(value, int) and value == 1):
            signature[name], values[(i,)] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[name], aligned = types[value.dtype], value.data_ptr() % 16 == 0
        elif hasattr(value, "block_shape"):  # a tensor's descriptor
            signature[name], aligned = f"tensordesc<{types[value.base.dtype][1:]}{value.block_shape}>", False
        elif isinstance(value, float):
            signature[name], aligned = "fp32", False
        else:
            signature[name], aligned = ("i32" if -(2**31) <= value < 2**31 else "i64"), special and value % 16 == 0
        if aligned:
            hints[(i,)] = [["tt.divisibility", 16]]
    return signature, values, hints


def _spilled(compiled, capability: int) -> int:
    """Bytes spilled according to ptxas (a stack alone does not prove a spill)."""
    from triton.backends.nvidia.compiler import get_ptxas

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(compiled.asm["ptx"])
        name = f"sm_{capability}{'a' if capability >= 90 else ''}"
        command = [get_ptxas(capability).path, "-v", f"--gpu-name={name}", str(source), "-o", os.devnull]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return sum(int(n) for n in re.findall(r"(\d+) bytes spill", said))


def compiled(launched: Launched, capability: int):
    """The launch compiled for sm_<capability>."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, values, hints = _signature(launched)
    source = ASTSource(fn=launched.kernel, signature=signature, constexprs=values, attrs=hints)
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options={"num_warps": launched.warps})


def _tool(name: str, *options: str) -> str:
    import triton

    command = [str(Path(triton.__file__).parent / "backends/nvidia/bin" / name), *options]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _usage(cubin: bytes) -> dict[str, int]:
    """Registers and stack."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = _tool("cuobjdump", "-res-usage", file.name)
    return {name: int(n) for name, n in re.findall(r"(REG|STACK):(\d+)", said)}


def _machine_code(cubin: bytes) -> bytes:
    """What stands in the ELF file's section .text.<kernel>."""
    (table,) = struct.unpack_from("<Q", cubin, 40)
    size, count, names = struct.unpack_from("<HHH", cubin, 58)
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(count)]
    names = sections[names][4]
    (code,) = (
        cubin[start : start + length]
        for name, _, _, _, start, length in sections
        if cubin.startswith(b".text.", names + name)
    )
    return code


def _instructions(cubins: list[bytes], capability: int) -> list[str]:
    """Each kernel's instructions. One after the other in one file: nvdisasm takes longer to start than for a kernel."""
    codes = [_machine_code(cubin) for cubin in cubins]
    ends = list(itertools.accumulate(len(code) for code in codes))
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(b"".join(codes))
        file.flush()
        text = _tool("nvdisasm", "-ndf", "-b", f"SM{capability}{'a' if capability >= 90 else ''}", file.name)
    _, *parts = re.split(r"^\s+/\*([0-9a-f]+)\*/", text, flags=re.MULTILINE)
    found = [[] for _ in cubins]
    for offset, instruction in zip(parts[::2], parts[1::2]):
        found[bisect.bisect_right(ends, int(offset, 16))].append(instruction)
    assert all(len(lines) == len(code) // 16 for lines, code in zip(found, codes)), "an instruction is 16 bytes"
    return ["\n".join(lines) for lines in found]


def measure(launches: list[Launched], capability: int) -> list[dict]:
    """Compile the launches for sm_<capability> and read off what each needs."""
    made = [compiled(launched, capability) for launched in launches]
    codes = _instructions([one.asm["cubin"] for one in made], capability)
    return [_row(*one, capability) for one in zip(launches, made, codes)]


def _row(launched: Launched, made, code: str, capability: int) -> dict:
    used = _usage(made.asm["cubin"])
    loads = re.findall(r"\b(LDG(?:STS)?\.E[.\w]*)", code)
    matrices = sorted(set(re.findall(r"\b(HMMA|HGMMA|UTCHMMA|UTMALDG)\b", code)))
    return {
        "registers": used["REG"],
        "spill_bytes": _spilled(made, capability) if used["STACK"] else 0,
        "shared_bytes": made.metadata.shared,
        "occupancy": occupancy(used["REG"], made.metadata.shared, launched.warps, capability),
        "warps": launched.warps,
        "ldg128": any(".128" in load for load in loads),
        **({"matrices": " ".join(matrices)} if matrices else {}),
    }


def measure_variants(operator: str) -> dict[str, list[dict]]:
    """Name of the operator's variant → what its launches need on sm_90."""
    calls = resources.module(f"triton/{operator}").variants()
    launches = {name: record(operator, call) for name, call in calls.items()}
    rows = iter(measure([one for each in launches.values() for one in each], 90))
    return {name: [next(rows) for _ in each] for name, each in launches.items()}


def _table(operator: str, capability: int) -> list[str]:
    from sdp_kernels.triton._launch import table_for

    return sorted(key for key in table_for(capability) if key.startswith(f"{operator}/"))


def measure_all(operator: str, targets: list[str], share: int, shares: int) -> dict[str, dict]:
    """Every ``shares``-th of the operator's entries from the ``share``-th on, for all targets."""
    found = {}
    for target in targets:
        capability = int(target.removeprefix("sm_"))
        keys = _table(operator, capability)[share::shares]
        rows = measure([recorded(key, capability) for key in keys], capability)
        found |= {f"{key}/{target}".replace(" ", "-"): row for key, row in zip(keys, rows)}
    return found


# ---- in any process --------------------------------------------------------------------------------------------------


def collect(operator: str, targets: tuple[str, ...] = TARGETS) -> dict[str, dict]:
    """``<entry of the table>/<target>`` → what :func:`measure` returns. Two processes; in pytest-xdist's worker one."""
    sys.path.insert(0, str(ROOT / "tests" / "triton"))
    from pinned import environment

    shares = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2
    command = [sys.executable, __file__, "--measure", operator]
    workers = [
        subprocess.Popen([*command, f"{i}/{shares}", *targets], env=environment(), stdout=subprocess.PIPE, text=True)
        for i in range(shares)
    ]
    answers = [worker.communicate()[0] for worker in workers]
    if any(worker.returncode for worker in workers):
        raise RuntimeError(f"compiling {operator}'s Triton kernels failed, see above")
    found = {key: row for answer in answers for key, row in json.loads(answer).items()}
    return {key.removeprefix(f"{operator}/"): found[key] for key in sorted(found)}


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["--measure"]:
        share, shares = map(int, arguments[2].split("/"))
        print(json.dumps(measure_all(arguments[1], arguments[3:], share, shares)))
        return
    for operator in resources.operators("triton"):
        for key, row in collect(operator, tuple(arguments) or TARGETS).items():
            print(f"{operator + '/' + key:<60}", *(f"{name} {value}" for name, value in row.items()))


if __name__ == "__main__":
    main(sys.argv[1:])
