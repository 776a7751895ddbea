"""PEP 517 hooks: setuptools' own, plus torch as a build requirement in the one case that needs it.

Asking for torch always would put gigabytes into pip's isolated build environment on every install, also where torch
is installed already or no compiler runs. So nothing is asked for unless an extension is wanted, a C++ compiler really
runs, and no usable torch headers are visible in the environment that is being installed into. Even then headers are
all that is needed: they are taken out of torch's wheel where pip can fetch it, and only otherwise torch is required.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import (
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

from . import toolchain, torch_headers
from .settings import Settings

ROOT = Path(__file__).resolve().parents[2]

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


def torch_requirement(env: Mapping[str, str] | None = None, root: Path = ROOT) -> list[str]:
    """``["torch>=2.11"]`` if an extension is wanted, a compiler runs and no headers are to be had, else ``[]``."""
    env = os.environ if env is None else env
    settings = Settings.from_env(env)
    if settings.cpu == settings.cuda == "0" or not sys.platform.startswith("linux"):
        return []
    try:
        toolchain.find_cxx(env)
    except toolchain.Missing:
        return []
    try:
        torch_headers.find_torch_headers(torch_headers.search_path(root))
    except toolchain.Missing:
        return [] if torch_headers.fetch_torch_headers(root) else [torch_headers.REQUIREMENT]
    return []


def get_requires_for_build_wheel(config_settings=None) -> list[str]:
    """Requirements for building a wheel."""
    return [*build_meta.get_requires_for_build_wheel(config_settings), *torch_requirement()]


def get_requires_for_build_editable(config_settings=None) -> list[str]:
    """Requirements for ``pip install -e .``."""
    return [*build_meta.get_requires_for_build_editable(config_settings), *torch_requirement()]
