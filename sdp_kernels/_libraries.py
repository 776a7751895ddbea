"""Loads the compiled libraries, if they are there, and records why one is not usable. Importing never needs one."""

import importlib
import json
from dataclasses import dataclass

import torch

from . import ops  # noqa: F401  all schemas must be defined before a library is compared with them
from .backends import BACKENDS
from .ops._contract import OPERATORS, current_schema_hash

_DISPATCH_KEYS = {"cpu": "CPU", "cuda": "CUDA"}
_MODULES = {"cpu": "_C", "cuda": "_C_cuda"}


@dataclass(frozen=True)
class CompiledLibrary:
    """One compiled library: how it was built, or the reason why it can't be used."""

    backend: str
    module: str
    build_info: dict
    reason: str | None


def _import(backend: str) -> CompiledLibrary:
    name = _MODULES[backend]
    try:
        module = importlib.import_module(f"sdp_kernels.{name}")
    except ImportError as error:
        built = "not built" if isinstance(error, ModuleNotFoundError) else "did not load"
        return CompiledLibrary(backend, name, {}, f"library sdp_kernels.{name} {built}: {error}")
    info = json.loads(module.build_info)
    if module.schema_hash != current_schema_hash():
        return CompiledLibrary(
            backend,
            name,
            info,
            f"library sdp_kernels.{name} is stale: built from schemas {module.schema_hash}, this package has "
            f"{current_schema_hash()}; run pip install -e . again",
        )
    return CompiledLibrary(backend, name, info, None)


def _complete(backend: str, kernels: tuple[str, ...]) -> bool:
    namespace, key = BACKENDS[backend].namespace, _DISPATCH_KEYS[backend]
    return bool(kernels) and all(
        torch._C._dispatch_has_kernel_for_dispatch_key(f"{namespace}::{kernel}", key) for kernel in kernels
    )


def load() -> dict[str, CompiledLibrary]:
    """Import both libraries and tell their backends what they hold or why they hold nothing."""
    libraries = {}
    for backend in _MODULES:
        library = libraries[backend] = _import(backend)
        BACKENDS[backend].absent = library.reason
        if library.reason is None:
            BACKENDS[backend].operators = {op for op, kernels in OPERATORS.items() if _complete(backend, kernels)}
    return libraries


LIBRARIES = load()
