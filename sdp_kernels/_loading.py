"""Loads the compiled libraries and the Triton kernels, if they can be used here, and records why not.

Importing sdp_kernels never needs any of them.
"""

import importlib
import importlib.util
import json
from dataclasses import dataclass

import torch

from . import ops  # noqa: F401  all schemas must be defined before a library is compared with them
from .backends import BACKENDS, INTERPRETING
from .ops._contract import OPERATORS, current_schema_hash

_DISPATCH_KEYS = {"cpu": "CPU", "cuda": "CUDA", "triton": "CPU" if INTERPRETING else "CUDA"}
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
    if libraries["cpu"].reason is None:
        module = importlib.import_module("sdp_kernels._C")
        found = {torch.bfloat16: module.multiplies_bf16, torch.float32: module.multiplies_fp32}
        BACKENDS["cpu"].multiplies = frozenset(dtype for dtype, does in found.items() if does)
    return libraries


def load_triton() -> None:
    """Import the Triton kernels, each of which registers itself, or record why they can't run here."""
    backend = BACKENDS["triton"]
    if importlib.util.find_spec("triton") is None:
        backend.absent = "triton is not installed"
    elif not (INTERPRETING or torch.cuda.is_available()):
        backend.absent = "no CUDA device is available, and Triton's interpreter is off (TRITON_INTERPRET=1)"
    elif importlib.util.find_spec("sdp_kernels.triton") is None:
        backend.absent = "this package holds no Triton kernels"
    else:
        importlib.import_module("sdp_kernels.triton")
        backend.operators = {op for op, kernels in OPERATORS.items() if _complete("triton", kernels)}


LIBRARIES = load()
load_triton()
