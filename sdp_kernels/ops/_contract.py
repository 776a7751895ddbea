"""The operator contract, once: schemas and fakes in every backend namespace, launching a kernel, double backward.

An operator file defines ``SCHEMAS`` (a literal dict, which the build reads as text to compute its hash), calls
:func:`define` with its fakes, and wraps :func:`launch` in an ``autograd.Function`` (measured cheaper per call than
``register_autograd``). A backend is a set of kernels registered under one of ``NAMESPACES`` for a dispatch key.
"""

from collections.abc import Callable

import torch
from torch.library import Library, register_fake

from .._schema_hash import hash_of
from ..backends import BACKENDS

NAMESPACES = tuple(dict.fromkeys(b.namespace for b in BACKENDS.values() if b.namespace))
_LIBRARIES = {namespace: Library(namespace, "FRAGMENT") for namespace in NAMESPACES}
_SCHEMAS: dict[str, str] = {}
_KERNELS: dict[tuple[str, str], torch._ops.OpOverload] = {}
"""(Backend, kernel) → what to call: looking it up in ``torch.ops`` costs as much as the call."""
OPERATORS: dict[str, tuple[str, ...]] = {}
"""Operator → names of the kernels it needs, e.g. ``kelu`` → (``kelu_fwd``, ``kelu_bwd``)."""


def define(
    operator: str,
    schemas: dict[str, str],
    fakes: dict[str, Callable],
    uses: tuple[str, ...] = (),
    optional: tuple[str, ...] = (),
) -> None:
    """Declare an operator: the same schemas and fakes in every namespace; its reference counts as there.

    ``uses`` names kernels of other operators that it is built from: a backend has it when it has all of them.
    ``optional`` names those of ``schemas`` that a backend may lack: another way to do what the others do.
    """
    if schemas.keys() != fakes.keys():
        raise ValueError(f"{operator}: every schema needs a fake, got {sorted(schemas)} and {sorted(fakes)}")
    for namespace, library in _LIBRARIES.items():
        for name, text in schemas.items():
            library.define(name + text, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
            register_fake(f"{namespace}::{name}", fakes[name], lib=library)
    for backend in BACKENDS.values():
        if backend.namespace is not None:
            overloads = {name: getattr(getattr(torch.ops, backend.namespace), name).default for name in schemas}
            _KERNELS.update(((backend.name, name), overload) for name, overload in overloads.items())
    _SCHEMAS.update(schemas)
    OPERATORS[operator] = (*(name for name in schemas if name not in optional), *uses)
    BACKENDS["reference"].operators.add(operator)


def current_schema_hash() -> str:
    """Hash of the schemas defined by this process, to compare with the one a library was built from."""
    return hash_of(_SCHEMAS)


def launch(backend: str, kernel: str, *args):
    """Call ``kernel`` (e.g. ``kelu_fwd``) of a backend that has kernels."""
    return _KERNELS[backend, kernel](*args)


def other_than(x: torch.Tensor, same: torch.Tensor | None) -> torch.Tensor | None:
    """``same``, as a view if it is x itself: a traced autograd.Function takes no tensor twice."""
    return same.view_as(same) if same is x else same


def differentiating_twice() -> bool:
    """True inside a backward pass that is itself recorded (``create_graph=True``); never while compiling."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def refuse_double_backward(operator: str, more: str = "") -> None:
    """The clear error of operators whose fused backward is not itself differentiable; ``more`` is what theirs needs
    beside the reference."""
    if differentiating_twice():
        wanted = f"backend='reference'{more}"
        raise RuntimeError(
            f"{operator} is not twice differentiable on this backend; use {wanted} where create_graph=True"
        )


def differentiate_reference(form: Callable, inputs: tuple, grad: torch.Tensor) -> tuple:
    """Gradients of ``form(*inputs)``, recorded so that they can be differentiated again; None where none is wanted."""
    wanted = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]
    with torch.enable_grad():
        gradients = iter(torch.autograd.grad(form(*inputs), wanted, grad, create_graph=True, allow_unused=True))
    return tuple(next(gradients) if isinstance(x, torch.Tensor) and x.requires_grad else None for x in inputs)
