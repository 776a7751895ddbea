"""The operators whose CUDA kernels the emulator runs: one module ``simt_<operator>_cases.py`` each, with

- ``BARRIER_CASES``: small cases that between them reach every barrier of its kernels; empty if there is none;
- ``outputs(case, dtype)``: all that the kernels wrote, a list of tensors (what may be of any bits masked out);
- ``sanitizer_calls(dtype)``: lines for ``sanitize_<operator>.cpp``, each starting with the operator's name.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

_MODULES = sorted(Path(__file__).parent.glob("simt_*_cases.py"))
OPERATORS: dict[str, ModuleType] = {
    path.stem.removeprefix("simt_").removesuffix("_cases"): importlib.import_module(path.stem) for path in _MODULES
}
