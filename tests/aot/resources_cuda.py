"""What the CUDA kernels need on GPUs that are not here: compiled by nvcc per architecture, read from ptxas and SASS.

For the architecture that the build makes by default, what the build has made is read, if it is what would be made here.

``collect(operator)`` has, per kernel and architecture, registers, bytes spilled, stack and static shared memory, and
how many 128-bit accesses to global memory and tensor-core instructions its code has; and for shapes that matter which
kernel runs, with which geometry and occupancy. An operator brings ``cuda_<operator>.cu``, which instantiates every
kernel that ships, and ``cuda_<operator>.py`` with

- ``CASES``: name → function of the device's limits, which calls the operator's emulated launcher while nothing runs;
- ``ONLY``: name of a case → the architecture on which alone it is launched (absent: every case on each);
- ``WIDE``, ``WIDE_COUNT``: pattern of the kernels that move 16 bytes at a time, and how many of them there are;
- ``TENSOR_CORES``, ``TENSOR_CORES_COUNT``: the same for kernels that multiply on tensor cores (absent: none);
- ``WARPGROUPS``: kernels that multiply with warpgroups, in code for sm_90 alone, elsewhere they are empty and never
  launched: name → how many products and waits for them their code has (absent: none).
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"
sys.path[:0] = [str(HERE), str(HERE.parent / "simt"), str(ROOT / "build_backend")]

import resources  # noqa: E402

from sdp_build import toolchain  # noqa: E402
from sdp_build.plan import NVCC_FLAGS  # noqa: E402
from sdp_build.settings import gencode_flags  # noqa: E402

PINNED = "13.0"
"""Version of nvcc that the committed table was made with."""
BUILT = ROOT / "build" / "sdp" / "_C_cuda"
(BUILT_FOR,) = toolchain.DEFAULT_ARCH_LIST

ARCHITECTURES = {
    # multiprocessor's and block's shared memory, bytes
    "sm_80": (167936, 166912),
    "sm_90": (233472, 232448),
    "sm_100": (233472, 232448),
}
MACHINE_CODE = {"sm_90": "sm_90a"}
"""What is made for an architecture where that is not its plain form: as the build does."""
TYPES = {"__nv_bfloat16": "bf16", "__half": "fp16", "float": "fp32", "true": "yes", "false": "no"}


def nvcc() -> str | None:
    """Path of a working nvcc."""
    for candidate in ("nvcc", "/usr/local/cuda/bin/nvcc"):
        found = shutil.which(candidate)
        if found and subprocess.run([found, "--version"], capture_output=True).returncode == 0:
            return found
    return None


def nvcc_version(program: str | None = None) -> str | None:
    """E.g. "13.0"; None without nvcc."""
    found = program or nvcc()
    text = subprocess.run([found, "--version"], capture_output=True, text=True).stdout if found else ""
    release = re.search(r"release (\d+\.\d+)", text)
    return release and release[1]


def _triton_tool(name: str) -> str:
    spec = importlib.util.find_spec("triton")
    return str(Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name)


def _readable(symbols: list[str]) -> dict[str, str]:
    """Mangled name → e.g. ``layer_norm_teams_bwd<bf16, 24, yes>``."""
    out = subprocess.run(["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True).stdout
    names = {}
    for symbol, text in zip(symbols, out.splitlines()):
        name = re.search(r"sdp::(\w+<.*?>)\(", text)[1]
        name = re.sub(r"\((?:int|bool)\)", "", name)
        names[symbol] = re.sub(r"\w+", lambda m: TYPES.get(m[0], m[0]), name)
    return names


def _command(made: Path) -> list[str]:
    """The command that made an object of the build; empty if ninja would run it again, or can't tell."""
    for paths in (str(Path(sys.executable).parent), os.environ.get("PATH", "")):  # a ninja reads no other version's log
        ninja = toolchain.find_ninja({"PATH": paths})
        with tempfile.TemporaryDirectory() as folder:  # of which it throws away those that are too old for it
            for name in ("build.ninja", ".ninja_log", ".ninja_deps"):
                if (made.parent / name).is_file():
                    shutil.copy2(made.parent / name, folder)
            ask = [*ninja.command, "-C", folder] if ninja else ["false"]
            to_do, commands = (toolchain.run([*ask, *options, str(made)]) for options in (["-n"], ["-t", "commands"]))
        if to_do and "no work to do" in to_do.stdout and commands and commands.returncode == 0:
            return shlex.split(commands.stdout.splitlines()[-1])
    return []


def built(operator: str, work: Path = BUILT) -> Path | None:
    """The operator's object in the build's folder, if the pinned nvcc made it for ``BUILT_FOR`` alone of today's files.

    The flags are those used here, ninja knows every file it was made from. Both ways make the same code, to the bit.
    """
    made = work / f"{operator}.o"
    if not made.is_file() or any(os.environ.get(f"NVCC_{at}_FLAGS") for at in ("PREPEND", "APPEND")):
        return None
    command, flags = _command(made), [*NVCC_FLAGS, *gencode_flags((BUILT_FOR,))]
    same = command[1 : 1 + len(flags)] == flags and not any("-gencode" in w for w in command[1 + len(flags) :])
    return made if same and nvcc_version(command[0]) == PINNED else None


def _built_resources(made: Path) -> dict[str, dict[str, int]] | None:
    """As :func:`_resources`; None where a kernel has a stack or static shared memory, of which ptxas knows more.

    Who has shared memory has 1 KB of the runtime's own besides.
    """
    said = subprocess.run([_triton_tool("cuobjdump"), "-res-usage", made], capture_output=True, text=True, check=True)
    found = {}
    for symbol, registers, stack, shared in re.findall(
        r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", said.stdout
    ):
        if stack != "0" or shared not in ("0", "1024"):
            return None
        found[symbol] = {"registers": int(registers), "spilled": 0, "stack": 0, "static_shared": 0}
    return found


def _compile(source: Path, arch: str, work: Path) -> tuple[Path, str]:
    cubin = work / f"{arch}.cubin"
    command = [nvcc(), *NVCC_FLAGS, f"-arch={MACHINE_CODE.get(arch, arch)}", f"-I{CSRC}", "-Xptxas=-v"]
    done = subprocess.run([*command, "-cubin", "-o", cubin, source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-6000:]
    assert "warning" not in done.stderr.lower(), done.stderr[:6000]
    # What ptxas has to say of warpgroup products (C7510 and on: it waits after each of them) is only "info" to it.
    assert not re.search(r"\(C75\d\d\)|Performance Loss", done.stderr), done.stderr[:6000]
    return cubin, done.stderr


def _made(operator: str, arch: str, work: Path) -> tuple[dict, dict]:
    """Mangled name → numbers of ptxas and of the SASS."""
    same = gencode_flags((BUILT_FOR,))[0].endswith(f"code={MACHINE_CODE.get(arch, arch)}")
    ready = built(operator) if same else None
    if ready and (numbers := _built_resources(ready)):
        return numbers, _instructions(ready)
    cubin, log = _compile(HERE / f"cuda_{operator}.cu", arch, work)
    return _resources(log), _instructions(cubin)


def _resources(log: str) -> dict[str, dict[str, int]]:
    """ptxas -v: mangled name → numbers."""
    found = {}
    for block in re.split(r"Compiling entry function '", log)[1:]:
        symbol = block[: block.index("'")]
        frame = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", block)
        stack, stores, loads = map(int, frame.groups())
        shared = re.search(r"(\d+) bytes smem", block)
        found[symbol] = {
            "registers": int(re.search(r"Used (\d+) registers", block)[1]),
            "spilled": stores + loads,
            "stack": stack,
            "static_shared": int(shared[1]) if shared else 0,
        }
    return found


def _instructions(cubin: Path) -> dict[str, dict[str, int]]:
    """Mangled name → 128-bit loads and stores of global memory and tensor-core multiplications in its SASS; of those
    how many are of warpgroups, with waits for them, if any are."""
    text = subprocess.run(
        [_triton_tool("cuobjdump"), "-sass", cubin], capture_output=True, text=True, check=True
    ).stdout
    parts = re.split(r"Function : (\S+)", text)[1:]
    wanted = {"loads_128": r"\bLDG\.E\S*\.128", "stores_128": r"\bSTG\.E\S*\.128", "mma": r"\b(?:HMMA|HGMMA)\."}
    of_warpgroups = {"wgmma": r"\bHGMMA\.", "wgmma_waits": r"\bWARPGROUP\.DEPBAR\b"}
    return {
        symbol: {
            name: len(re.findall(pattern, code))
            for name, pattern in (wanted | (of_warpgroups if "HGMMA." in code else {})).items()
        }
        for symbol, code in zip(parts[::2], parts[1::2])
    }


def blocks_per_multiprocessor(arch: str, registers: int, threads: int, shared: int) -> int:
    """Resident blocks: registers go to warps in 256s, shared memory in 128s after 1 KB of the runtime's own."""
    warps = -(-threads // 32)
    by_registers = 65536 // (-(-registers * 32 // 256) * 256) // 4 * 4 // warps
    by_shared = ARCHITECTURES[arch][0] // (-(-(shared + 1024) // 128) * 128)
    return min(by_registers, by_shared, 64 // warps, 32)


def views(shape: tuple[int, ...], layout: str, present: list[bool]) -> ctypes.Array:
    """Addresses and strides of tensors that are not there, in the layout; zeros for absent ones."""
    import torch

    like = torch.empty(shape, device="meta", memory_format=torch.channels_last if layout == "channels_last" else None)
    s = like.stride()
    strides = s if len(shape) == 4 else (s[0], s[2], 0, s[1])
    numbers = [n for there in present for n in ((4096, *strides) if there else (0,) * 5)]
    return (ctypes.c_int64 * len(numbers))(*numbers)


def case_name(which: str, shape: tuple[int, ...], layout: str, dtype: str) -> str:
    return f"{which} {'x'.join(map(str, shape))} {layout} {dtype}"


def torch_dtype(name: str):
    import torch

    return {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}[name]


def dry(operator: str, dtype: str, call: Callable[[ctypes.CDLL], None]) -> list[tuple[str, int, int, int]]:
    """(mangled name, blocks, threads, dynamic shared memory) of what ``call`` of the emulator's library launches."""
    import simt_emulator as emulator

    emulator.schedule(operator, torch_dtype(dtype), dry=True)
    emulator.launches(operator, torch_dtype(dtype))
    call(emulator.library(operator, torch_dtype(dtype)))
    emulator.schedule(operator, torch_dtype(dtype))
    return emulator.launches(operator, torch_dtype(dtype))


def limits_of(arch: str) -> ctypes.Array:
    """DeviceLimits: shared memory of a block and of a multiprocessor, bytes; multiprocessors, always an H200's."""
    multiprocessor, block = ARCHITECTURES[arch]
    return (ctypes.c_int64 * 3)(block, multiprocessor, 132)


def collect(operator: str) -> dict:
    """{"compiler", "kernels": {name: {arch: numbers}}, "launches": {case: {arch: text}}}."""
    with tempfile.TemporaryDirectory() as work, ThreadPoolExecutor(2) as pool:
        made = dict(zip(ARCHITECTURES, pool.map(lambda arch: _made(operator, arch, Path(work)), ARCHITECTURES)))
    numbers, instructions = ({arch: both[i] for arch, both in made.items()} for i in (0, 1))
    names = _readable(sorted(numbers["sm_90"]))
    kernels = {
        name: {arch: numbers[arch][symbol] | instructions[arch][symbol] for arch in ARCHITECTURES}
        for symbol, name in sorted(names.items(), key=lambda item: item[1])
    }
    launches = {}
    module = resources.module(f"cuda/{operator}")
    for case, launched in module.CASES.items():
        launches[case] = {}
        for arch in ARCHITECTURES:
            if arch != getattr(module, "ONLY", {}).get(case, arch):
                continue
            lines = []
            for symbol, blocks, threads, shared in launched(limits_of(arch)):
                resident = blocks_per_multiprocessor(arch, numbers[arch][symbol]["registers"], threads, shared)
                lines.append(
                    f"{names[symbol]}: {blocks} blocks of {threads}, {shared} bytes shared,"
                    f" {resident} resident, occupancy {resident * -(-threads // 32) / 64:.2f}"
                )
            launches[case][arch] = lines
    return {"compiler": f"nvcc {nvcc_version()}", "kernels": kernels, "launches": launches}
