"""What the CUDA kernels need on GPUs that are not here: compiled by nvcc per architecture, read from ptxas and SASS.

``collect()`` has, per kernel and architecture, registers, bytes spilled, stack and static shared memory, and how many
128-bit accesses to global memory its code has; and for shapes that matter which kernel runs, with which geometry and
occupancy.
"""

from __future__ import annotations

import ctypes
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
sys.path.insert(0, str(HERE.parent / "simt"))
PINNED = "13.0"
"""Version of nvcc that the committed table was made with."""

ARCHITECTURES = {
    # multiprocessor's and block's shared memory, bytes
    "sm_80": (167936, 166912),
    "sm_90": (233472, 232448),
    "sm_100": (233472, 232448),
}
# (what, layout, shape, dtype): pictures (B, C, H, W) or token buffers (B, T, C)
SHAPES = [
    *(
        ("norm", layout, (256, 768, 16, 16), dtype)
        for layout in ("channels_last", "contiguous")
        for dtype in ("bf16", "fp32")
    ),
    *(
        ("norm", layout, shape, "bf16")
        for layout in ("channels_last", "contiguous")
        for shape in ((256, 96, 56, 56), (256, 192, 28, 28), (256, 384, 14, 14), (256, 768, 7, 7), (256, 1536, 8, 8))
    ),
    *(("norm", "tokens", (256, 261, c), "bf16") for c in (384, 512, 768, 1024, 2048, 4096, 8192)),
    ("norm", "contiguous", (64, 8192, 8, 8), "bf16"),
    ("kelu", "dense", (256, 3072, 16, 16), "bf16"),
    ("kelu", "dense", (256, 3072, 16, 16), "fp32"),
]
TYPES = {"__nv_bfloat16": "bf16", "__half": "fp16", "float": "fp32", "true": "yes", "false": "no"}


def nvcc() -> str | None:
    """Path of a working nvcc."""
    for candidate in ("nvcc", "/usr/local/cuda/bin/nvcc"):
        found = shutil.which(candidate)
        if found and subprocess.run([found, "--version"], capture_output=True).returncode == 0:
            return found
    return None


def nvcc_version() -> str | None:
    """E.g. "13.0"; None without nvcc."""
    found = nvcc()
    if found is None:
        return None
    text = subprocess.run([found, "--version"], capture_output=True, text=True).stdout
    return re.search(r"release (\d+\.\d+)", text)[1]


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


def _compile(arch: str, work: Path) -> tuple[Path, str]:
    cubin = work / f"{arch}.cubin"
    command = [nvcc(), "-std=c++17", "-O3", "--expt-relaxed-constexpr", f"-arch={arch}", f"-I{CSRC}", "-Xptxas=-v"]
    done = subprocess.run([*command, "-cubin", "-o", cubin, HERE / "kernels.cu"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-6000:]
    assert "warning" not in done.stderr.lower(), done.stderr[:6000]
    return cubin, done.stderr


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


def _vector_accesses(cubin: Path) -> dict[str, tuple[int, int]]:
    """Mangled name → 128-bit loads and stores of global memory in its SASS."""
    text = subprocess.run(
        [_triton_tool("cuobjdump"), "-sass", cubin], capture_output=True, text=True, check=True
    ).stdout
    parts = re.split(r"Function : (\S+)", text)[1:]
    return {
        symbol: (len(re.findall(r"\bLDG\.E\S*\.128", code)), len(re.findall(r"\bSTG\.E\S*\.128", code)))
        for symbol, code in zip(parts[::2], parts[1::2])
    }


def blocks_per_multiprocessor(arch: str, registers: int, threads: int, shared: int) -> int:
    """Resident blocks: registers go to warps in 256s, shared memory in 128s after 1 KB of the runtime's own."""
    warps = -(-threads // 32)
    by_registers = 65536 // (-(-registers * 32 // 256) * 256) // 4 * 4 // warps
    by_shared = ARCHITECTURES[arch][0] // (-(-(shared + 1024) // 128) * 128)
    return min(by_registers, by_shared, 64 // warps, 32)


def _views(shape: tuple[int, ...], layout: str, present: list[bool]) -> ctypes.Array:
    import torch

    like = torch.empty(shape, device="meta", memory_format=torch.channels_last if layout == "channels_last" else None)
    s = like.stride()
    strides = s if len(shape) == 4 else (s[0], s[2], 0, s[1])
    numbers = [n for there in present for n in ((4096, *strides) if there else (0,) * 5)]
    return (ctypes.c_int64 * 20)(*numbers)


def launches_of(what: str, layout: str, shape: tuple[int, ...], dtype: str, arch: str, backward: bool) -> list[tuple]:
    """(mangled name, blocks, threads, dynamic shared memory) of what an operator launches: nothing runs."""
    import simt_emulator as emulator
    import torch

    dtypes = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
    library, pointer = emulator.library(dtypes[dtype]), ctypes.c_void_p(4096)
    multiprocessor, block = ARCHITECTURES[arch]
    limits, told = (ctypes.c_int64 * 3)(block, multiprocessor, 132), (ctypes.c_int64 * 5)()
    emulator.schedule(dtypes[dtype], dry=True)
    emulator.launches(dtypes[dtype])
    if what == "kelu":
        n = torch.Size(shape).numel()
        strides = (ctypes.c_int64 * 4)(n, 1, 1, 1)
        library.kelu(pointer if backward else None, pointer, pointer, ctypes.c_int64(n), 1, strides)
    else:
        sizes = shape if len(shape) == 4 else (shape[0], shape[2], 1, shape[1])
        sizes = (ctypes.c_int64 * 4)(*sizes)
        registers = ctypes.c_int64(5 if layout == "tokens" else 0)
        statistics = (pointer, pointer)
        if backward:
            views = _views(shape, layout, [True] * 4)
            library.layer_norm_2d_bwd(sizes, views, registers, pointer, 1, *statistics, pointer, pointer, limits, told)
        else:
            views = _views(shape, layout, [True, False, True, False])
            eps = ctypes.c_double(1e-6)
            library.layer_norm_2d_fwd(sizes, views, registers, eps, pointer, pointer, 1, 1, *statistics, limits, told)
    emulator.schedule(dtypes[dtype])
    return emulator.launches(dtypes[dtype])


def collect() -> dict:
    """{"compiler", "kernels": {name: {arch: numbers}}, "launches": {case: {arch: text}}}."""
    with tempfile.TemporaryDirectory() as work, ThreadPoolExecutor(2) as pool:
        made = dict(zip(ARCHITECTURES, pool.map(lambda arch: _compile(arch, Path(work)), ARCHITECTURES)))
        resources = {arch: _resources(log) for arch, (_, log) in made.items()}
        accesses = {arch: _vector_accesses(cubin) for arch, (cubin, _) in made.items()}
    names = _readable(sorted(resources["sm_90"]))
    kernels = {}
    for symbol, name in sorted(names.items(), key=lambda item: item[1]):
        kernels[name] = {
            arch: resources[arch][symbol] | dict(zip(("loads_128", "stores_128"), accesses[arch][symbol]))
            for arch in ARCHITECTURES
        }
    launches = {}
    for what, layout, shape, dtype in SHAPES:
        for backward in (False, True):
            case = f"{what} {'bwd' if backward else 'fwd'} {'x'.join(map(str, shape))} {layout} {dtype}"
            launches[case] = {}
            for arch in ARCHITECTURES:
                lines = []
                for symbol, blocks, threads, shared in launches_of(what, layout, shape, dtype, arch, backward):
                    numbers = resources[arch][symbol]
                    resident = blocks_per_multiprocessor(arch, numbers["registers"], threads, shared)
                    lines.append(
                        f"{names[symbol]}: {blocks} blocks of {threads}, {shared} bytes shared,"
                        f" {resident} resident, occupancy {resident * -(-threads // 32) / 64:.2f}"
                    )
                launches[case][arch] = lines
    return {"compiler": f"nvcc {nvcc_version()}", "kernels": kernels, "launches": launches}
