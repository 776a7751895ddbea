"""``python -m sdp_kernels.info``: versions, build, devices, and which backend runs which operator, or why not."""

import json
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import sdp_kernels

from ._loading import LIBRARIES
from .backends import BACKENDS
from .ops._contract import OPERATORS

DTYPE = torch.bfloat16
"""The table is for bf16; what a backend lacks in other dtypes stands below it."""


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    found = {key.strip(): value.strip() for key, colon, value in (line.partition(":") for line in lines) if colon}
    if "CPU part" in found and "model name" not in found:  # ARM tells numbers only
        return f"ARM, implementer {found.get('CPU implementer', '?')}, part {found['CPU part']}"
    return found.get("model name") or "unknown"


def build_report() -> dict[str, dict]:
    """What the last build of this tree recorded per library, empty where it left no record."""
    path = Path(__file__).with_name("_build_report.json")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def devices() -> dict[str, str]:
    """Device type → its name here, ``meta`` left out."""
    found = {"cpu": f"{_processor()}, {torch.get_num_threads()} threads"}
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        found["cuda"] = ", ".join(names)
    return found


def table() -> dict[str, dict[str, list[str]]]:
    """Operator → backend → reasons why it cannot run here; an empty list means it runs on at least one device here."""
    rows: dict[str, dict[str, list[str]]] = {}
    for operator in OPERATORS:
        rows[operator] = {}
        for name, backend in BACKENDS.items():
            reasons = [backend.unsupported_reasons(operator, device, DTYPE) for device in devices()]
            rows[operator][name] = min(reasons, key=len)
    return rows


def _library_lines() -> list[str]:
    lines, report = [], build_report()
    for library in LIBRARIES.values():
        built = library.build_info or report.get(library.module, {})
        if library.reason is None:
            details = ", ".join(
                str(part)
                for part in (
                    built.get("compiler"),
                    f"torch {built['torch_headers']} headers" if built.get("torch_headers") else None,
                    " ".join(built.get("arch_list", [])),
                    f"commit {built['commit']}" if built.get("commit") else None,
                )
                if part
            )
            lines.append(f"  {library.module:<8} loaded; built with {details or 'unknown tools'}")
        else:
            why = report.get(library.module, {}).get("reason")
            lines.append(f"  {library.module:<8} {library.reason}" + (f" (build: {why})" if why else ""))
    if LIBRARIES["cpu"].reason is None:
        from . import _C

        names = ("baseline", "AVX2", "AVX-512")
        if LIBRARIES["cpu"].build_info["arch_list"] == ["baseline"]:  # not x86-64
            lines.append("  SIMD     the baseline, this kind of processor has no other (on ARM it is NEON)")
        else:
            lines.append(
                f"  SIMD     {names[_C.cpu_level]} in use, {names[_C.cpu_level_detected]} detected "
                "(lower it with SDP_KERNELS_CPU_LEVEL=0, 1 or 2)"
            )
    return lines


def report() -> str:
    """The whole report as text."""
    lines = [
        f"sdp_kernels {sdp_kernels.__version__}, Python {platform.python_version()} on {platform.system()} "
        f"{platform.machine()}",
        f"torch {torch.__version__}, triton {_version('triton')}",
        "",
        "Libraries",
        *_library_lines(),
        "",
        "Devices",
        *(f"  {kind:<8} {name}" for kind, name in devices().items()),
        "",
        f"Operators by backend ({str(DTYPE).removeprefix('torch.')}; the leftmost yes is the automatic choice)",
    ]
    rows = table()
    width = max(map(len, rows)) + 2
    lines.append("  " + " " * width + "".join(f"{name:<11}" for name in BACKENDS))
    notes: dict[str, list[str]] = {}
    for operator, cells in rows.items():
        lines.append("  " + operator.ljust(width) + "".join(f"{'no' if why else 'yes':<11}" for why in cells.values()))
        for name, why in cells.items():
            if why:
                notes.setdefault(f"{name}: {'; '.join(why)}", []).append(operator)
    lines += ["", "Why not"]
    lines += [f"  {note}" + ("" if len(ops) == len(rows) else f" ({', '.join(ops)})") for note, ops in notes.items()]
    lines += [
        "",
        "Dtypes",
        *(
            f"  {name:<10} {', '.join(sorted(str(d).removeprefix('torch.') for d in backend.dtypes))}"
            for name, backend in BACKENDS.items()
        ),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(report() + "\n")
