"""PEP 517 hooks: setuptools' own, plus torch as a build requirement in the one case that needs it.

Asking for torch always would put gigabytes into pip's isolated build environment on every install, also where
torch is installed already or no compiler runs. So it is asked for only if an extension is wanted, a C++ compiler really
runs, and no usable torch headers are visible in the environment that is being installed into.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

from setuptools import build_meta
from setuptools.build_meta import (
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

from . import toolchain
from .settings import Settings

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]


def torch_requirement(env: Mapping[str, str] | None = None) -> list[str]:
    """``["torch>=2.11"]`` if an extension is wanted, a compiler runs and no torch headers are visible, else ``[]``."""
    env = os.environ if env is None else env
    settings = Settings.from_env(env)
    if settings.cpu == settings.cuda == "0" or not sys.platform.startswith("linux"):
        return []
    try:
        toolchain.find_cxx(env)
    except toolchain.Missing:
        return []
    try:
        toolchain.find_torch_headers()
    except toolchain.Missing:
        return [f"torch>={'.'.join(map(str, toolchain.MIN_TORCH))}"]
    return []


def get_requires_for_build_wheel(config_settings=None) -> list[str]:
    """Requirements for building a wheel."""
    return [*build_meta.get_requires_for_build_wheel(config_settings), *torch_requirement()]


def get_requires_for_build_editable(config_settings=None) -> list[str]:
    """Requirements for ``pip install -e .``."""
    return [*build_meta.get_requires_for_build_editable(config_settings), *torch_requirement()]
