"""Other libraries to compare with: which are here, which can be used, and why not.

``python -m bench.peers`` prints the table. Nothing is ever installed from here. "Usable" means imported for real, so a
broken installation is a reason in the table, not a crash.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .cases import Case, Function, UnusableError

DEVICES = {
    "timm": ("cpu", "cuda"),
    "Liger-Kernel": ("cuda",),
    "quack": ("cuda",),
    "apex": ("cuda",),
    "xformers": ("cuda",),
}


@dataclass(frozen=True)
class Peer:
    """One library as found: ``reason`` is None when it can be used, else it says why not."""

    name: str
    version: str | None
    offers: str
    reason: str | None


def _imported(module: str, name: str):
    """The module, or UnusableError with the reason."""
    try:
        if importlib.util.find_spec(module.partition(".")[0]) is None:
            raise UnusableError("not installed")
        return importlib.import_module(module)
    except UnusableError:
        raise
    except Exception as error:  # importing other people's code may fail in any way
        first = str(error).strip().splitlines() or [""]
        raise UnusableError(
            f"{name} is installed, but {module} does not import: {type(error).__name__}: {first[0]}"
        ) from None


def _attribute(module: str, attribute: str, name: str):
    loaded = _imported(module, name)
    if not hasattr(loaded, attribute):
        raise UnusableError(f"this version of {name} has no {module}.{attribute}")
    return getattr(loaded, attribute)


def _timm() -> Callable:
    return _attribute("timm.layers", "LayerNorm2d", "timm")


def _liger() -> Callable:
    return _attribute("liger_kernel.ops.layer_norm", "LigerLayerNormFunction", "Liger-Kernel")


def _quack() -> Callable:
    try:
        return _attribute("quack.rmsnorm", "layernorm_fwd", "quack")
    except UnusableError as first:
        if str(first) == "not installed":
            raise
        return _attribute("quack.layernorm", "_layernorm_fwd", "quack")


def _apex() -> Callable:
    """NVIDIA's apex, told by its compiled extension. The registry's package of that name is a web toolkit."""
    if importlib.util.find_spec("apex") is None:
        raise UnusableError(
            "not installed (NVIDIA's apex is built from source; the registry's package apex is another project)"
        )
    if importlib.util.find_spec("apex.normalization") is None:
        raise UnusableError(
            "a package named apex is installed, but it is not NVIDIA's: it has no apex.normalization. The registry's "
            "apex is an unrelated project; uninstall it and build NVIDIA's from source"
        )
    function = _attribute("apex.normalization.fused_layer_norm", "fused_layer_norm_affine", "apex")
    try:
        importlib.import_module("fused_layer_norm_cuda")
    except Exception as error:
        raise UnusableError(
            "NVIDIA's apex is installed without its compiled extension fused_layer_norm_cuda "
            f"({type(error).__name__}); build it with its CUDA extensions"
        ) from None
    return function


def _xformers() -> Callable:
    return _attribute("xformers.ops", "memory_efficient_attention", "xformers")


_FIND: dict[str, tuple[Callable[[], Callable], str, str]] = {
    "timm": (_timm, "timm", "LayerNorm2d, ConvNeXt's block"),
    "Liger-Kernel": (_liger, "liger_kernel", "LayerNorm over rows (Triton)"),
    "quack": (_quack, "quack-kernels", "LayerNorm over rows, forward only (CuTe DSL)"),
    "apex": (_apex, "apex", "FusedLayerNorm over rows (CUDA)"),
    "xformers": (_xformers, "xformers", "attention; it has neither a LayerNorm nor an activation of its own"),
}

LAYER_NORMS = ("timm", "Liger-Kernel", "quack", "apex")


def find(name: str, device: str | None = None) -> Callable:
    """The library's function, ready to use on ``device``; raises UnusableError with the reason."""
    function = _FIND[name][0]()
    if device is not None and device not in DEVICES[name]:
        raise UnusableError(f"runs on {'/'.join(DEVICES[name])} only, not on {device}")
    if device == "cuda" and not torch.cuda.is_available():
        raise UnusableError("no CUDA device here")
    return function


def _version(distribution: str) -> str | None:
    for name in dict.fromkeys((distribution, distribution.replace("_", "-"))):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def survey(device: str | None = None) -> list[Peer]:
    """Every library: usable on ``device`` (default: the GPU if there is one, else the CPU), or the reason why not."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for name, (_, distribution, offers) in _FIND.items():
        try:
            find(name, device)
            reason = None
        except UnusableError as error:
            reason = str(error)
        rows.append(Peer(name, _version(distribution), offers, reason))
    return rows


def layer_norm(name: str, case: Case, eps: float) -> Function:
    """A library's LayerNorm as (x, weight, bias) → y: timm's on pictures, the others' on contiguous rows.

    Raises UnusableError with the reason when it is absent or cannot do the case.
    """
    function = find(name, case.device)
    if name == "timm":
        return _timm_layer_norm(function, case, eps)
    if name == "Liger-Kernel":
        return lambda x, weight, bias: function.apply(x, weight, bias, eps)
    if name == "apex":
        return lambda x, weight, bias: function(x, weight, bias, (case.channels,), eps)
    if name == "quack":
        raise UnusableError("its LayerNorm has a forward pass only")
    raise UnusableError("has no LayerNorm")


def _timm_layer_norm(module: Callable, case: Case, eps: float) -> Function:
    norm = module(case.channels, eps=eps)

    def call(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if (
            norm.weight is not weight
        ):  # everybody's parameters in place of its own; functional_call would cost 50 µs a call
            norm.weight, norm.bias = weight, bias
        return norm(x)

    return call


def convnext_block(case: Case, eps: float, convolutions: bool = False) -> Function:
    """timm's ConvNeXt block with everybody's parameters; its GEMMs as linear layers or as 1×1 ``convolutions``.

    Raises UnusableError with the reason when it is absent or has another activation.
    """
    find("timm", case.device)
    if case.variant != "gelu":
        raise UnusableError("measured with the activation that it is published with")
    made = _attribute("timm.models.convnext", "ConvNeXtBlock", "timm")(case.channels, conv_mlp=convolutions)
    made.norm.eps = eps
    mlp = made.mlp
    owners = [made.conv_dw] * 2 + [made.norm] * 2 + [mlp.fc1] * 2 + [mlp.fc2] * 2 + [made]
    places = list(zip(owners, ["weight", "bias"] * 4 + ["gamma"]))
    for owner, name in places:
        delattr(owner, name)  # a parameter takes no view in its place

    def call(x: Tensor, *parameters: Tensor) -> Tensor:
        for (owner, name), parameter in zip(places, parameters):
            wanted = parameter[:, :, None, None] if convolutions and parameter.dim() == 2 else parameter
            object.__setattr__(owner, name, wanted)
        return made(x)

    return call


def table(rows: list[Peer]) -> str:
    """The survey as aligned text."""
    cells = [("library", "version", "usable", "what it offers, or the reason")]
    cells += [(p.name, p.version or "–", "no" if p.reason else "yes", p.reason or p.offers) for p in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(3)]
    return "\n".join("  ".join([*(c.ljust(w) for c, w in zip(row, widths)), row[3]]) for row in cells)


if __name__ == "__main__":
    print(table(survey(sys.argv[1] if len(sys.argv) > 1 else None)))
