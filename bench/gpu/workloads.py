"""What a configuration is timed on: for each entry of Triton's table a call that uses it, on tensors beyond the cache.

An entry without a workload is listed as such by the part, so that a new kernel's entries are not silently left untuned.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.gpu import warpgroups

BYTES = 96 * 2**20
"""Of one tensor; a set has two or three, and four sets take turns."""
SETS = 4


class NoWorkloadError(ValueError):
    """The table's entry is of a kind that nobody has described here."""


@dataclass(frozen=True)
class Workload:
    """``make(seed)`` → one set of tensors, ``call(*tensors)`` → the outputs that a configuration must not change."""

    make: Callable[[int], list[Tensor]]
    call: Callable[..., list[Tensor]]


def _normal(shape: tuple[int, ...], dtype: torch.dtype, device: str, seed: int) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)


def _kelu(key: list[str], dtype: torch.dtype, device: str, elements: int) -> Workload:
    from sdp_kernels.triton import kelu

    views: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
        "dense": ((elements,), lambda x: x),
        "line": ((elements, 2), lambda x: x[:, 0]),
        "narrow": ((elements // 7, 9), lambda x: x[:, :7]),
        "square": ((max(1, elements // 4096), 64, 64), lambda x: x[:, :, :56]),
    }
    if key[2] not in views:
        raise NoWorkloadError(f"no workload for KeLü's {key[2]!r}")
    shape, view = views[key[2]]

    def make(seed: int) -> list[Tensor]:
        x = view(_normal(shape, dtype, device, seed))
        return [x.transpose(-1, -2).contiguous().transpose(-1, -2) if key[2] == "square" else x, x]

    if key[1] == "forward":
        return Workload(make, lambda g, x: [kelu.kelu_fwd(x)])
    return Workload(make, lambda g, x: [kelu.kelu_bwd(g, x)])


def _channels(key: list[str]) -> int:
    """As many as the entry is for: a power of two, of which the models use three quarters (768 of 1024)."""
    if key[1] in ("forward", "backward"):
        return int(key[3]) * 3 // 4 - ("odd rows" in key)
    if key[1] == "add_partials":
        return 768 if key[2] == "narrow" else 1536
    return 16384


def _layer_norm(key: list[str], dtype: torch.dtype, device: str, elements: int) -> Workload:
    from sdp_kernels.triton import layer_norm_2d

    """"odd": of a size that no wide load fits."""
    channels, side = _channels(key), (16 if elements > 2**20 else 4) - ("odd columns" in key)
    shape = (max(2, elements // (channels * side * side)), channels, side, side)
    columns = any(part.endswith("columns") for part in key)

    def make(seed: int) -> list[Tensor]:
        tensors = [_normal(shape, dtype, device, seed + i) for i in range(2)]
        if not columns:
            tensors = [t.contiguous(memory_format=torch.channels_last) for t in tensors]
        weight = _normal((channels,), torch.float32, device, seed + 2)
        x = tensors[1].float()
        mean, rstd = x.mean(1), (x.var(1, correction=0) + 1e-6).rsqrt()
        return [*tensors, weight, mean, rstd]

    if key[1] in ("forward", "statistics", "normalise"):
        return Workload(
            make, lambda g, x, w, mean, rstd: list(layer_norm_2d.layer_norm_2d_fwd(x, None, w, w, 1e-6, 0)[:3])
        )
    if key[1] in ("backward", "row_means", "apply", "add_partials"):
        return Workload(
            make, lambda g, x, w, mean, rstd: list(layer_norm_2d.layer_norm_2d_bwd(g, None, x, w, mean, rstd, 0))
        )
    raise NoWorkloadError(f"no workload for layer_norm_2d's {key[1]!r}")


def _linear(key: list[str], dtype: torch.dtype, device: str, elements: int) -> Workload:
    from sdp_kernels.triton import linear

    columns = 767 if "odd rows" in key else 768
    tokens = 261 if elements > 2**20 else 5
    shape = (max(2, elements // (tokens * columns)), tokens, columns)

    def make(seed: int) -> list[Tensor]:
        z, grad = (_normal(shape, dtype, device, seed + i) for i in range(2))
        return [grad, z, _normal((columns,), torch.float32, device, seed + 2)]

    if key[1] == "forward":
        return Workload(make, lambda g, z, s: [linear.linear_epilogue_fwd(z, "gelu", s, None, g, 5, 0.0, None, 0)])
    if key[1] in ("backward", "add_partials"):
        return Workload(make, lambda g, z, s: list(linear.linear_epilogue_bwd(g, z, "gelu", s, None, 5, 0.0, None, 0)))
    if key[1] in ("gemm_forward", "gemm_backward", "form"):
        return _linear_gemm(key, dtype, device, shape[:2])
    raise NoWorkloadError(f"no workload for linear's {key[1]!r}")


def _linear_gemm(key: list[str], dtype: torch.dtype, device: str, rows: tuple[int, int]) -> Workload:
    """A ConvMLP block's layers of that form, in the kernel of ours or, for a "form", in whichever it chooses."""
    from sdp_kernels.triton import _linear_gemm as gemm
    from sdp_kernels.triton import linear

    c = 768 if rows[0] > 2 else 16
    depth, columns = {"expand": (c, 4 * c), "project": (4 * c, c)}.get(key[3], (c, c))
    forward = "forward" in (key[2], key[1].removeprefix("gemm_"))

    def make(seed: int) -> list[Tensor]:
        x, residual = (_normal((*rows, n), dtype, device, seed + i) for i, n in enumerate((depth, columns)))
        if key[2] == "pointers":  # a batch stride that no descriptor has
            residual = torch.cat([residual, residual[:, :1]], 1)[:, :-1]
        return [x, residual, _normal((columns, depth), dtype, device, seed + 2) * depth**-0.5]

    def ours(kernel: str, x: Tensor, weight: Tensor) -> bool:
        return key[1] != "form" or gemm.prefers(kernel, x, weight)

    def call_forward(x: Tensor, residual: Tensor, weight: Tensor) -> list[Tensor]:
        epilogue = ("gelu", None, None, None if key[3] == "expand" else residual, 5, 0.0, None, 0)
        if ours("linear_gemm_fwd", x, weight):
            return [gemm.linear_gemm_fwd(x, weight, None, *epilogue, True)[0]]
        return [linear.linear_epilogue_fwd(torch.nn.functional.linear(x, weight), *epilogue)]

    def call_backward(z: Tensor, d: Tensor, weight: Tensor) -> list[Tensor]:
        if key[2] == "pointers":
            z, d, weight = d, z, weight.t().contiguous()
        if ours("linear_gemm_bwd", z, weight):
            return list(gemm.linear_gemm_bwd(d, weight, z, "gelu", 5)[:2])
        h = linear.linear_epilogue_fwd(z, "gelu", None, None, None, 5, 0.0, None, 0)
        return [linear.linear_epilogue_bwd(d @ weight, z, "gelu", None, None, 5, 0.0, None, 0)[0], h]

    return Workload(make, call_forward if forward else call_backward)


def _depthwise_conv2d(key: list[str], dtype: torch.dtype, device: str, elements: int) -> Workload:
    from sdp_kernels.triton import depthwise_conv2d

    if key[1] not in ("convolve", "backward", "add_partials"):
        raise NoWorkloadError(f"no workload for depthwise_conv2d's {key[1]!r}")
    layout, k = ("rows", 7) if key[1] == "add_partials" else (key[2], int(key[3].removeprefix("k")))
    channels, side = (768, 16) if elements > 2**20 else (8, 4)
    shape = (max(2, elements // (channels * side * side)), channels, side, side)

    def make(seed: int) -> list[Tensor]:
        tensors = [_normal(shape, dtype, device, seed + i) for i in range(2)]
        if layout != "columns":
            tensors = [t.contiguous(memory_format=torch.channels_last) for t in tensors]
        weight, bias = (_normal(n, dtype, device, seed + 2) for n in ((channels, 1, k, k), (channels,)))
        mean, rstd = (_normal((shape[0], side, side), torch.float32, device, seed + i) for i in (3, 4))
        return [*tensors, weight, bias, mean, rstd]

    def norm(mean: Tensor, rstd: Tensor, bias: Tensor) -> tuple:
        return (mean, rstd, bias, bias) if layout == "normed rows" else (None,) * 4

    if key[1] == "convolve":
        return Workload(
            make,
            lambda g, x, w, b, m, r: [depthwise_conv2d.depthwise_conv2d_fwd(x, w, b, [], 0, *norm(m, r, b))],
        )
    return Workload(
        make, lambda g, x, w, b, m, r: list(depthwise_conv2d.depthwise_conv2d_bwd(g, x, w, [], 0, *norm(m, r, b)))
    )


def _attention(key: list[str], dtype: torch.dtype, device: str, elements: int) -> Workload:
    from sdp_kernels.triton import register_attention

    d = {"d64": 64, "d96": 96, "d128": 128}.get(key[2], 64)
    large, flash = elements > 2**20, not key[1].endswith("_short")
    tokens = 577 if flash else 261 if key[1] == "forward_short" else 197
    tokens, heads = (tokens, 768 // d) if large else (300 if flash else 20, 1)
    batch = max(2, elements // (3 * tokens * heads * d))
    limits = (1e-5, d**-0.5, 5, "all", 0.0, None, 0)

    def make(seed: int) -> list[Tensor]:
        qkv = _normal((batch, tokens, 3, heads, d), dtype, device, seed)
        return [qkv, _normal((batch, tokens, heads * d), dtype, device, seed + 1), torch.ones(d, device=device)]

    def forward(qkv: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return register_attention.register_attention_fwd(qkv, w, w, w, w, *limits)

    if key[1].startswith("forward"):
        return Workload(make, lambda qkv, grad, w: list(forward(qkv, w)))

    def backward(qkv: Tensor, grad: Tensor, w: Tensor) -> list[Tensor]:
        if qkv.data_ptr() not in kept:
            kept[qkv.data_ptr()] = forward(qkv, w)
        y, lse = kept[qkv.data_ptr()]
        return list(register_attention.register_attention_bwd(grad, qkv, y, lse, w, w, w, w, *limits))[:2]

    kept: dict[int, tuple[Tensor, Tensor]] = {}
    return Workload(make, backward)


CUDA = {f"cuda/register_attention/backward/d{d}/16bit": {"wgmma": 0} for d in (64, 96)}
"""What CUDA's kernels have instead of a table: constants of the sources (kAttentionWgmma), here by what they are timed
on; edited in place, they are what is launched."""


def _cuda_attention(entry: str, dtype: torch.dtype, device: str, elements: int) -> Workload:
    """The backward pass at the length of the models whose heads have that width."""
    d = int(entry.split("/")[3].removeprefix("d"))
    tokens, heads = (261 if d == 96 else 201, 768 // d) if elements > 2**20 else (20, 1)
    batch = max(2, elements // (3 * tokens * heads * d))
    limits = (1e-5, d**-0.5, 5, "all", 0.0, None, 0)

    def make(seed: int) -> list[Tensor]:
        qkv = _normal((batch, tokens, 3, heads, d), dtype, device, seed)
        weight = torch.ones(d, device=device)
        y, lse = torch.ops.sdp_kernels_cpp.register_attention_fwd(qkv, *(weight,) * 4, *limits)
        return [_normal((batch, tokens, heads * d), dtype, device, seed + 1), qkv, y, lse, weight]

    def call(grad: Tensor, qkv: Tensor, y: Tensor, lse: Tensor, w: Tensor) -> list[Tensor]:
        with warpgroups.cuda_attention("wgmma" if CUDA[entry]["wgmma"] else "mma"):
            made = torch.ops.sdp_kernels_cpp.register_attention_bwd(grad, qkv, y, lse, *(w,) * 4, *limits)
        return list(made)[:2]

    return Workload(make, call)


def workload(entry: str, device: str, *, tiny: bool) -> Workload:
    """Of the table's entry "operator/kernel/…/16bit", or of CUDA's. Raises NoWorkloadError."""
    key = entry.split("/")
    if entry in CUDA:
        return _cuda_attention(entry, torch.bfloat16, device, 512 if tiny else BYTES // 2)
    dtype = torch.bfloat16 if key[-1] == "16bit" else torch.float32
    makers = {"kelu": _kelu, "layer_norm_2d": _layer_norm, "linear": _linear}
    makers |= {"depthwise_conv2d": _depthwise_conv2d, "register_attention": _attention}
    if key[0] not in makers:
        raise NoWorkloadError(f"no workload for the operator {key[0]!r}")
    return makers[key[0]](key, dtype, device, 512 if tiny else BYTES // dtype.itemsize)
