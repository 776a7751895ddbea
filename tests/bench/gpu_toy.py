"""A part without torch, so that the machinery around parts is tested in seconds."""

from __future__ import annotations

import os
import time
from pathlib import Path

from bench.gpu.part import Failure, Item, Setting, Unavailable

ORDER = 1
TITLE = "toy"
BUDGET = 100
RESULT = {"value": float}


def cases(setting: Setting) -> list[Item]:
    """What SDP_TOY_CASES lists, e.g. "good-1,dies-2"."""
    names = os.environ["SDP_TOY_CASES"].split(",")
    return [
        Item(
            name,
            {"name": name},
            timeout=1.0 if name.startswith("hangs") else 60.0,
            again=name.startswith("again"),
            group=name.partition("-")[0],
            instead=[{"name": name, "parts": parts} for parts in (3, 2, 1)] if name.startswith("parts") else [],
        )
        for name in names
    ]


def run(setting: Setting, name: str, parts: int = 4) -> dict:
    """Behaves as its name says, and notes that it ran."""
    with open(os.environ["SDP_TOY_LOG"], "a") as log:
        log.write(name + "\n")
    kind = name.partition("-")[0]
    if kind == "parts" and (parts <= 2 or "dies" not in name):
        return {"value": float(parts)}
    if kind == "parts":
        os.abort()
    if kind == "fails":
        raise Failure("off by 3", {"value": 3.0})
    if kind == "absent":
        raise Unavailable("no such thing here")
    if kind == "raises":
        raise RuntimeError(f"in {Path(__file__).resolve()}")
    if kind == "faults":
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    if kind == "dies":
        os.write(2, b"last words\n")
        os.abort()
    if kind == "hangs":
        time.sleep(1000)
    if kind == "slow":
        time.sleep(0.5)
    if kind == "noisy":
        os.write(1, b"not a reply\n")
        print("nor this")
    if kind == "waits":
        while not Path(os.environ["SDP_TOY_LOG"]).with_name("go").exists():
            time.sleep(0.02)
    return {"value": float("nan") if kind == "nan" else "text" if kind == "misfit" else float(os.getpid())}


def summary(results: dict[str, dict], setting: Setting) -> dict:
    return {"lines": [f"{len(results)} good"], "good": sorted(results)}
