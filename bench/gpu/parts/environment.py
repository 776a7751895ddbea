"""The machine: versions, clocks, the build of the kernels, and the two rates that every floor is computed from."""

from __future__ import annotations

import csv
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional as F

import sdp_kernels.info
from bench.gpu import machine
from bench.gpu.part import Failure, Item, Setting
from bench.gpu.worker import ROOT, scrubbed
from sdp_kernels._loading import LIBRARIES

ORDER = 10
TITLE = "the machine, the build of the kernels, copy bandwidth and GEMM rate"
BUDGET = 450
RESULT = {"*": any}
CLOCKS = ("clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem")
QUERY = (*CLOCKS, "driver_version", "power.limit", "temperature.gpu")
GIB = 2**30
COPIES = {"2 GiB": 2 * GIB, "96 MiB": 96 * 2**20}
"""The second is the size of one tensor of the models, launch and tail included."""
PRODUCTS = {"8192 x 8192 x 8192": (8192, 8192, 8192), "65536 x 768 x 3072": (65536, 768, 3072)}


def cases(setting: Setting) -> list[Item]:
    """The build comes first, and again where the library that it makes can't be loaded (a fresh machine)."""
    absent = not setting.rehearsal and LIBRARIES["cuda"].reason is not None
    if setting.variant != "plain":
        return []
    return [
        Item("build", {"what": "build"}, timeout=440, again=absent, renew=not setting.rehearsal),
        Item("machine", {"what": "machine"}, timeout=60),
        Item("copy", {"what": "copy"}, timeout=60),
        Item("gemm", {"what": "gemm"}, timeout=60),
        Item("PyTorch's depthwise convolution", {"what": "depthwise"}, timeout=90),
    ]


def run(setting: Setting, what: str) -> dict:
    return {"build": build, "machine": describe, "copy": copy, "gemm": gemm, "depthwise": depthwise}[what](setting)


def build(setting: Setting) -> dict:
    """The documented command for a machine without network. A rehearsal asks pip for its version only."""
    command = ["install", "--no-build-isolation", "--no-deps", "-e", "."]
    if setting.prebuilt and LIBRARIES["cuda"].reason is None:
        return {"command": "none, the library was brought along", "seconds": 0.0, "left_out": {}}
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "pip", *(["--version"] if setting.rehearsal else command)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise Failure(f"pip ended with {done.returncode}: {(done.stdout + done.stderr)[-1200:]}")
    report = {name: entry.get("reason") for name, entry in sdp_kernels.info.build_report().items()}
    return {"command": " ".join(["pip", *command]), "seconds": round(time.monotonic() - start, 1), "left_out": report}


def _nvcc() -> str | None:
    for folder in (os.environ.get("CUDA_HOME"), "/usr/local/cuda"):
        found = shutil.which("nvcc", path=str(Path(folder, "bin"))) if folder else None
        if found:
            break
    else:
        found = shutil.which("nvcc")
    if not found:
        return None
    told = subprocess.run([found, "--version"], capture_output=True, text=True, timeout=30).stdout
    release = re.search(r"release (\S+),", told)
    return release[1] if release else None


def clocks() -> dict[str, str]:
    """What nvidia-smi reads, nothing is set; empty where there is none."""
    command = ["nvidia-smi", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except OSError:
        return {}
    rows = list(csv.reader(done.stdout.splitlines()))
    return dict(zip(QUERY, (cell.strip() for cell in rows[0]))) if done.returncode == 0 and rows else {}


def describe(setting: Setting) -> dict:
    """Versions and what is loaded; the clocks before and right after some work."""
    idle = clocks()
    a = torch.randn(64 if setting.rehearsal else 8192, 64 if setting.rehearsal else 8192, device=setting.device)
    for _ in range(20):
        a = torch.mm(a, a).clamp_(-1, 1)
    machine.synchronise(setting)
    found = {
        "nvcc": _nvcc(),
        "clocks_idle": idle,
        "clocks_busy": clocks(),
        "libraries": {
            name: {"reason": scrubbed(library.reason or "") or None, "arch_list": library.build_info.get("arch_list")}
            for name, library in LIBRARIES.items()
        },
        "operators": {op: [b for b, why in row.items() if not why] for op, row in sdp_kernels.info.table().items()},
    }
    if not setting.rehearsal:
        properties = torch.cuda.get_device_properties(0)
        found["multiprocessors"] = properties.multi_processor_count
        found["shared_memory_per_multiprocessor"] = getattr(properties, "shared_memory_per_multiprocessor", None)
    return found


def _median(setting: Setting, call, repeats: int = 30) -> float:
    clock = machine.clock(setting)
    for _ in range(5):
        clock.run(call)
    clock.take()
    for _ in range(repeats):
        clock.run(call)
    return statistics.median(clock.take())


def copy(setting: Setting) -> dict:
    """Bytes per second, read plus written, of one tensor copied to another, both beyond the cache; random data."""
    rates = {}
    for name, size in COPIES.items():
        count = (2**16 if setting.rehearsal else size) // 2
        pairs = 1 if size >= GIB else 4  # together beyond any cache
        source = [torch.randn(count, device=setting.device, dtype=torch.bfloat16) for _ in range(pairs)]
        target = [torch.empty_like(s) for s in source]
        turn = iter(range(10**9))

        def call(source=source, target=target, turn=turn):
            i = next(turn) % len(source)
            target[i].copy_(source[i])

        rates[name] = 4 * count / _median(setting, call)
        del source, target, call
    return {"bytes_per_second": rates}


def gemm(setting: Setting) -> dict:
    """bf16 FLOP/s of the vendor's GEMM on random data (zeros run faster)."""
    rates = {}
    for name, (m, k, n) in PRODUCTS.items():
        if setting.rehearsal:
            m, k, n = 32, 32, 32
        a = torch.randn(m, k, device=setting.device, dtype=torch.bfloat16)
        b = torch.randn(n, k, device=setting.device, dtype=torch.bfloat16)
        rates[name] = 2 * m * k * n / _median(setting, lambda a=a, b=b: a @ b.t())
    return {"flops_per_second": rates}


def depthwise(setting: Setting) -> dict:
    """Seconds of PyTorch's own 7×7 depthwise convolution, bf16, each of its three passes alone, in both layouts."""
    shape = (2, 8, 8, 8) if setting.rehearsal else (256, 768, 16, 16)
    c, found = shape[1], {}
    weight = torch.randn(c, 1, 7, 7, device=setting.device).bfloat16()
    for layout, form in (("contiguous", torch.contiguous_format), ("channels_last", torch.channels_last)):
        x, dy = (torch.randn(shape, device=setting.device).bfloat16().contiguous(memory_format=form) for _ in range(2))

        def back(*wanted: bool, x=x, dy=dy):
            options = (None, [1, 1], [3, 3], [1, 1], False, [0, 0], c)
            return torch.ops.aten.convolution_backward(dy, x, weight, *options, wanted)

        passes = {
            "forward": lambda x=x: F.conv2d(x, weight, padding=3, groups=c),
            "dgrad": lambda back=back: back(True, False, False),
            "wgrad": lambda back=back: back(False, True, False),
        }
        for name, call in passes.items():
            found[f"{layout} {name}"] = _median(setting, call, 10)
    return {"seconds": found, "bytes": 4 * x.numel()}


def summary(results: dict[str, dict], setting: Setting) -> dict:
    """The facts that later parts use: both rates."""
    found: dict = {"lines": []}
    if "build" in results:
        found["lines"].append(f"built in {results['build']['seconds']} s")
    if "copy" in results:
        rates = results["copy"]["bytes_per_second"]
        found["copy_bytes_per_second"] = max(rates.values())
        found["lines"] += [f"copy {name}: {rate / 1e12:.3f} TB/s" for name, rate in rates.items()]
    if "gemm" in results:
        rates = results["gemm"]["flops_per_second"]
        found["gemm_flops_per_second"] = max(rates.values())
        found["lines"] += [f"bf16 GEMM {name}: {rate / 1e12:.0f} TFLOP/s" for name, rate in rates.items()]
    own = next((result for result in results.values() if "seconds" in result and "bytes" in result), None)
    if own and "copy" in results:
        least = own["bytes"] / found["copy_bytes_per_second"]
        told = [f"{name} {1e6 * s:.0f} µs, {s / least:.1f} × a copy" for name, s in own["seconds"].items()]
        found["lines"].append("PyTorch's 7×7 depthwise: " + "; ".join(told))
    return found
