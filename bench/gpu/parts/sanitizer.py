"""compute-sanitizer over a small script per operator: accesses out of bounds, races, misused barriers."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

from bench.gpu.drive import CONTROL
from bench.gpu.part import Failure, Item, Setting, Unavailable
from bench.gpu.subjects import SUBJECTS, backends
from bench.gpu.worker import ROOT, scrubbed

ORDER = 30
TITLE = "compute-sanitizer: memcheck, racecheck, synccheck over every operator's kernels"
BUDGET = 460
PARALLEL = 6
RESULT = {"tool": str, "operator": str, "backend": str, "errors": int, "seconds": float, "sanitizer": str}
TOOLS = ("memcheck", "racecheck", "synccheck")
TIMEOUT = 240.0
FOUND = 86
"""Exit status that the sanitizer is told to end with when it found something."""
REFUSED = ("Device not supported", "Unable to find injection library", "Failed to initialize")
STAND_IN = "none (rehearsal)"


def find() -> str | None:
    """compute-sanitizer on the PATH, in the CUDA toolkit, or in a folder of NVIDIA's wheels."""
    found = shutil.which("compute-sanitizer")
    for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda"):
        found = found or (home and shutil.which("compute-sanitizer", path=str(Path(home, "bin")))) or None
    wheels = Path(sysconfig.get_path("purelib"), "nvidia")
    for pattern in ("*/bin/compute-sanitizer", "*/compute-sanitizer", "*/compute-sanitizer/compute-sanitizer"):
        runnable = (str(p) for p in sorted(wheels.glob(pattern)) if p.is_file() and os.access(p, os.X_OK))
        found = found or next(runnable, None)
    return found


def cases(setting: Setting) -> list[Item]:
    """The control first: a sanitizer that does not notice a planted fault proves nothing."""
    found = []
    if setting.variant == "plain" and not setting.rehearsal:
        found.append(Item("memcheck notices a planted fault", {"tool": "memcheck", "operator": CONTROL}, TIMEOUT + 20))
    for tool in TOOLS:
        for operator in SUBJECTS:
            for backend in backends(setting, operator):
                arguments = {"tool": tool, "operator": operator, "backend": backend}
                name = f"{tool}: {operator} {backend}"
                found.append(Item(name, arguments, TIMEOUT + 20, setting.variant))
    return found if not setting.rehearsal else found[:1]


def command(sanitizer: str | None, tool: str, log: str) -> list[str]:
    """What stands before the program; nothing in a rehearsal."""
    if sanitizer is None:
        return []
    extra = {"memcheck": ["--padding", "32"]}.get(tool, [])
    return [sanitizer, "--tool", tool, *extra, "--error-exitcode", str(FOUND), "--print-limit", "20", "--log-file", log]


def read_log(text: str) -> tuple[int | None, str]:
    """(errors that the sanitizer counted, None without its summary; the first few lines about them)."""
    counts = [int(n) for n in re.findall(r"ERROR SUMMARY: (\d+) error", text)]
    counts += [int(n) for n in re.findall(r"RACECHECK SUMMARY: (\d+) hazard", text)]
    lines = [line.lstrip("= \t") for line in text.splitlines() if line.startswith("=========")]
    told = [line for line in lines if line and not line.startswith(("COMPUTE-SANITIZER", "Host Frame", "Saved host"))]
    return (max(counts) if counts else None), "; ".join(told[:8])[:900]


def run(setting: Setting, tool: str, operator: str, backend: str = "") -> dict:
    """One tool over one operator's script; Failure where it finds something."""
    sanitizer = None if setting.rehearsal else find()
    if sanitizer is None and not setting.rehearsal:
        raise Unavailable("compute-sanitizer is neither on the PATH nor in the CUDA toolkit nor among NVIDIA's wheels")
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        script = [sys.executable, "-m", "bench.gpu.drive", operator, *([backend] if backend else [])]
        environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        start = time.monotonic()
        try:
            done = subprocess.run(
                [*command(sanitizer, tool, str(log)), *script, "--device", setting.device],
                cwd=ROOT,
                env=environment,
                capture_output=True,
                text=True,
                timeout=TIMEOUT,
            )
        except subprocess.TimeoutExpired:
            raise Unavailable(f"not through within {TIMEOUT:.0f} s") from None
        text = log.read_text(errors="replace") if log.exists() else ""
    errors, told = read_log(text)
    said = scrubbed((done.stdout + done.stderr).strip()[-600:])
    if any(sign in text + said for sign in REFUSED):
        raise Unavailable(f"compute-sanitizer can't work here: {told or said}")
    result = {
        "tool": tool,
        "operator": operator,
        "backend": backend,
        "errors": errors or 0,
        "seconds": round(time.monotonic() - start, 1),
        "sanitizer": "compute-sanitizer" if sanitizer else STAND_IN,
    }
    if operator == CONTROL:
        if not errors:
            raise Failure(
                f"a store out of bounds went unnoticed; exit status {done.returncode}: {told or said}", result
            )
        return result
    if errors or done.returncode == FOUND:
        raise Failure(f"{errors} errors: {told}", result)
    if done.returncode or (sanitizer and errors is None):
        raise Failure(f"the script ended with {done.returncode} and no verdict: {told or said}", result)
    return result


def summary(results: dict[str, dict], setting: Setting) -> dict:
    clean = [row["tool"] for row in results.values() if row["operator"] != CONTROL]
    return {"lines": [f"{tool}: {clean.count(tool)} without findings" for tool in TOOLS]}
