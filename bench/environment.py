"""Where a result was measured: what decides a time, and nothing that names the machine, its user or its folders."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

ASSUMED_CACHE = 32 * 2**20
_SIMD = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "neon", "asimd", "sve")


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def last_level_cache() -> tuple[int, str]:
    """Bytes of the largest cache that core 0 sees, and where the number comes from."""
    found: tuple[int, int] | None = None
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, size = _read(f"{index}/level").strip(), re.fullmatch(r"(\d+)([KMG])", _read(f"{index}/size").strip())
        if level.isdigit() and size and "Instruction" not in _read(f"{index}/type"):
            bytes_ = int(size[1]) * {"K": 2**10, "M": 2**20, "G": 2**30}[size[2]]
            found = max(found or (0, 0), (int(level), bytes_))
    if found is None:
        return ASSUMED_CACHE, "assumed, the system does not tell"
    return found[1], f"L{found[0]}, read from the system"


def processor() -> dict:
    """Name, and family/model/stepping besides: virtual machines often hide the name."""
    info: dict[str, str] = {}
    for line in _read("/proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        info.setdefault(key.strip(), value.strip())
    flags = (info.get("flags") or info.get("Features") or "").split()
    return {
        "name": info.get("model name") or platform.processor() or platform.machine(),
        "family_model_stepping": "/".join(info.get(k, "?") for k in ("cpu family", "model", "stepping")),
        "simd": [flag for flag in _SIMD if flag in flags],
    }


def commit() -> dict:
    """The commit that was measured; ``dirty``: tracked files differ from it (None without a git checkout)."""
    root = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    changed = git("status", "--porcelain", "--untracked-files=no")
    return {"id": git("rev-parse", "HEAD"), "dirty": None if changed is None else bool(changed)}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def describe() -> dict:
    """The environment block of a result file."""
    cache, source = last_level_cache()
    described = {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "last_level_cache_bytes": cache,
        "last_level_cache_source": source,
        "os": " ".join([platform.system(), *re.findall(r"^\d+\.\d+", platform.release())]),
        "architecture": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "timm": _version("timm"),
        "load": round(os.getloadavg()[0], 2),
        "commit": commit(),
        "gpu": None,
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        described["gpu"] = {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "l2_bytes": properties.L2_cache_size,
            "memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
        }
    return described
