"""What the user asked for: the build's environment variables, read once and checked before anything runs."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

ARCH_PATTERN = re.compile(r"(\d{1,2})\.(\d)([af]?)(\+PTX)?")


class SettingError(ValueError):
    """An environment variable of the build holds a value that means nothing; the text names the variable."""


@dataclass(frozen=True)
class Settings:
    """One build's wishes. ``cpu``, ``cuda``: "auto" (build if possible), "0" (don't) or "1" (fail if impossible)."""

    cpu: str = "auto"
    cuda: str = "auto"
    arch_list: tuple[str, ...] | None = None  # ("8.0", "9.0a", "10.0+PTX"); None: the GPU present, else the default
    jobs: int = 1

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None) -> Settings:
        """Read SDP_BUILD_CPU, SDP_BUILD_CUDA, TORCH_CUDA_ARCH_LIST and MAX_JOBS; raises SettingError on a bad value."""
        env = os.environ if env is None else env
        cuda = _switch(env, "SDP_BUILD_CUDA")
        return cls(
            cpu=_switch(env, "SDP_BUILD_CPU"),
            cuda=cuda,
            # Containers often set an arch list for everything; it is nobody's business where no CUDA is built.
            arch_list=None if cuda == "0" else parse_arch_list(env.get("TORCH_CUDA_ARCH_LIST", "")),
            jobs=_jobs(env),
        )


def _switch(env: Mapping[str, str], name: str) -> str:
    value = env.get(name, "").strip().lower() or "auto"
    if value not in ("auto", "0", "1"):
        raise SettingError(f"{name} must be auto, 0 or 1, got {env[name]!r}")
    return value


def _jobs(env: Mapping[str, str]) -> int:
    text = env.get("MAX_JOBS", "").strip()
    if not text:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not re.fullmatch(r"[0-9]+", text) or int(text) < 1:
        raise SettingError(f"MAX_JOBS must be a whole number of at least 1, got {text!r}")
    return int(text)


def parse_arch_list(text: str) -> tuple[str, ...] | None:
    """Split "8.0;9.0a;10.0+PTX" (also by spaces or commas) into its entries, doubles dropped; None when empty."""
    entries = [entry for entry in re.split(r"[;,\s]+", text) if entry]
    for entry in entries:
        if not ARCH_PATTERN.fullmatch(entry):
            raise SettingError(
                f"TORCH_CUDA_ARCH_LIST: {entry!r} is no compute capability; wanted are entries such as 8.0, 9.0a or "
                "10.0+PTX, separated by semicolons"
            )
    return tuple(dict.fromkeys(entries)) or None


def gencode_flags(arch_list: tuple[str, ...]) -> list[str]:
    """nvcc's flags for an arch list: machine code for every entry, and PTX besides for those ending in +PTX.

    Machine code for 9.0 is that of 9.0a: every GPU of compute capability 9.0 runs it, none of a later one runs either,
    and it alone may multiply with warpgroups (wgmma). PTX for later GPUs stays that of 9.0.
    """
    flags = []
    for entry in arch_list:
        major, minor, suffix, ptx = ARCH_PATTERN.fullmatch(entry).groups()
        number = f"{major}{minor}{suffix}"
        code = "90a" if number == "90" else number
        flags.append(f"-gencode=arch=compute_{code},code=sm_{code}")
        if ptx:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags
