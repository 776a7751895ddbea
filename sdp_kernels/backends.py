"""Which backends exist here, what each cannot do and why, and how one is chosen.

Automatic choice takes the first backend, in the order measured fastest, that has no reason against the case. A backend
asked for by name (``backend=``, :func:`use_backend`, ``SDP_KERNELS_BACKEND``) is taken or refused with every backend's
reasons. The choice reads metadata only, so ``torch.compile`` can trace it; it is kept for the backward pass.
"""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ._device import multiplied_slowly, type_of_device

log = logging.getLogger("sdp_kernels")

HALF_AND_SINGLE = frozenset({torch.float32, torch.bfloat16, torch.float16})
FLOATING = HALF_AND_SINGLE | {torch.float64}

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton reads the variable when a kernel is defined: set it before the import, for the whole process."""


class UnsupportedError(RuntimeError):
    """A backend was asked for by name and cannot do the case; the message lists every backend's reasons."""


@dataclass
class Backend:
    """One way to run operators. ``operators`` and ``absent`` are filled in when the package is imported."""

    name: str
    namespace: str | None
    """``torch.ops`` namespace of its kernels; None for backends that are plain Python."""
    device_types: frozenset[str]
    dtypes: frozenset[torch.dtype]
    operators: set[str] = field(default_factory=set)
    absent: str | None = None
    """Why nothing of this backend can run here, e.g. a library that did not load."""
    prefers: Callable[[str, Tensor, Tensor], bool] | None = None
    """(optional kernel, x, weight) → whether it is to be run for them instead of the kernels that every backend has."""
    multiplies: frozenset[torch.dtype] = frozenset()
    """Of which dtypes it has GEMMs of its own that are faster than PyTorch's on this processor."""

    def can(self, operator: str, device_type: str, dtype: torch.dtype) -> bool:
        """Whether this backend runs ``operator`` on tensors of that device and dtype."""
        return (
            self.absent is None
            and operator in self.operators
            and device_type in self.device_types
            and dtype in self.dtypes
        )

    def unsupported_reasons(self, operator: str, device_type: str, dtype: torch.dtype) -> list[str]:
        """Why this backend cannot run ``operator`` on tensors of that device and dtype; empty when it can."""
        if self.absent is not None:
            return [self.absent]
        reasons = []
        if operator not in self.operators:
            reasons.append("has no kernel for it")
        if device_type not in self.device_types:
            reasons.append(f"runs on {'/'.join(sorted(self.device_types))}, not on {device_type}")
        if dtype not in self.dtypes:
            reasons.append(f"has no {str(dtype).removeprefix('torch.')} kernels")
        return reasons


def _cpu_prefers(kernel: str, x: Tensor, weight: Tensor) -> bool:
    """Backward through an activation is one pass behind the GEMM instead of two, PyTorch's if it has one. The other
    GEMMs are for the processors that they were written for; bfloat16 is multiplied in pairs, so they sum an even number
    of products."""
    ours = x.dtype in BACKENDS["cpu"].multiplies
    if kernel == "linear_gemm_bwd":
        return ours or not multiplied_slowly(x.dtype)
    if not ours:
        return False
    summed = {"linear_gemm_fwd": weight.shape[1], "linear_gemm_dgrad": weight.shape[0]}.get(kernel, 0)
    return x.dtype != torch.bfloat16 or summed % 2 == 0


BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Backend("cpu", "sdp_kernels_cpp", frozenset({"cpu"}), FLOATING, prefers=_cpu_prefers),
        Backend("cuda", "sdp_kernels_cpp", frozenset({"cuda"}), HALF_AND_SINGLE),
        # In Triton's interpreter (a test's tool, not a way to train) the kernels run on CPU tensors, fp64 included.
        Backend(
            "triton",
            "sdp_kernels_triton",
            frozenset({"cpu"}) if INTERPRETING else frozenset({"cuda"}),
            FLOATING if INTERPRETING else HALF_AND_SINGLE,
        ),
        Backend("composed", None, frozenset({"cpu", "cuda"}), FLOATING),
        Backend("reference", None, frozenset({"cpu", "cuda", "meta"}), FLOATING),
    )
}
"""In the order of automatic choice. ``composed`` builds an operator from smaller ones, each choosing for itself."""


def check_backend(name: str | None, where: str = "backend") -> str | None:
    """``name`` if it is a backend's or None, else ValueError saying ``where`` it came from."""
    if name is not None and name not in BACKENDS:
        raise ValueError(f"{where} must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


_forced: str | None = check_backend(
    os.environ.get("SDP_KERNELS_BACKEND") or None, "environment variable SDP_KERNELS_BACKEND"
)
_reported: set[str] = set()


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Run every operator inside the block on ``name`` (None: choose automatically). Process-wide, not per thread.

    Raises ValueError for an unknown name; an operator that ``name`` cannot run raises :class:`UnsupportedError`.
    """
    global _forced
    before, _forced = _forced, check_backend(name, "use_backend's name")
    try:
        yield
    finally:
        _forced = before


def every_reason(operator: str, device_type: str, dtype: torch.dtype) -> dict[str, list[str]]:
    """Backend → reasons against the case, for all backends; an empty list means it can."""
    return {name: b.unsupported_reasons(operator, device_type, dtype) for name, b in BACKENDS.items()}


def choose(operator: str, x: Tensor, backend: str | None = None, limits: dict[str, str] | None = None) -> str:
    """Name of the backend to run ``operator`` on ``x``. ``backend`` asks for one by name.

    ``limits`` are the operator's own reasons against this case: backend → reason.

    Raises ValueError for an unknown name and :class:`UnsupportedError` when a named backend cannot do the case.
    """
    device_type, dtype, limits = type_of_device(x), x.dtype, limits or {}
    requested = _forced if backend is None else check_backend(backend)
    if requested == "composed" and backend is None and operator not in BACKENDS["composed"].operators:
        requested = None  # a part of a composed operator: it chooses for itself
    if requested is not None:
        if requested not in limits and BACKENDS[requested].can(operator, device_type, dtype):
            return requested
        told = every_reason(operator, device_type, dtype)
        for name, reason in limits.items():
            told[name] = [*told[name], reason]
        lines = [f"  {name}: {'; '.join(reasons) or 'can'}" for name, reasons in told.items()]
        raise UnsupportedError(
            f"backend {requested!r} cannot run {operator} on {device_type} tensors of {dtype}:\n" + "\n".join(lines)
        )
    for name, candidate in BACKENDS.items():
        if (name == "triton" and INTERPRETING) or name in limits:
            continue  # the interpreter runs only when asked for by name
        if candidate.can(operator, device_type, dtype):
            if name == "reference":
                _report_fallback(operator, device_type, dtype)
            return name
    raise UnsupportedError(f"no backend runs {operator} on {device_type} tensors of {dtype}")


def _report_fallback(operator: str, device_type: str, dtype: torch.dtype) -> None:
    """One line per operator, once a process; meta tensors run no kernel, and a traced call must not log.

    The first is a warning, which is seen without any logging set up: nobody wants to find out by the clock.
    """
    if torch.compiler.is_compiling() or operator in _reported or device_type == "meta":
        return
    level = logging.INFO if _reported else logging.WARNING
    _reported.add(operator)
    reasons = every_reason(operator, device_type, dtype)
    told = "; ".join(f"{name}: {', '.join(why)}" for name, why in reasons.items() if why)
    where = "python -m sdp_kernels.info shows every operator"
    log.log(level, "sdp_kernels: %s runs on the reference backend (%s); %s", operator, told, where)
