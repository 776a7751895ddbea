"""Operators made of others, as ``bench`` knows them: what is between the kernels (saved tensors, register rows, strides
that one kernel writes and the next reads) is tested here, against the same block in plain PyTorch."""

from __future__ import annotations

import importlib
from dataclasses import replace

import torch
from torch import Tensor

from bench.cases import Case

from .problem import GRADIENT, LAYOUTS, Problem, Subject, normal

NAMES = ("conv_mlp", "convnext_block", "feed_forward", "sdpnet_block")


def _module(name: str):
    return importlib.import_module(f"bench.test_{name}")


def _case(problem: Problem, device: str) -> Case:
    return Case(
        problem.operator, problem.shape, problem.torch_dtype, problem.layout, device=device,
        registers=problem.registers, variant=problem.epilogue,
    )  # fmt: skip


def _inputs(problem: Problem, device: str) -> list[Tensor]:
    """x and the parameters, of x's dtype."""
    x = LAYOUTS[problem.layout](normal(problem, problem.shape, 1, device))
    made = _module(problem.operator).parameters(_case(problem, device), torch.Generator().manual_seed(2))
    return [x, *(p.detach() for p in made)]


def _ours(problem: Problem, backend: str, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    return (_module(problem.operator).fused(_case(problem, str(x.device)), backend)(x, *weights),)


def _plain(problem: Problem, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    return (_module(problem.operator).plain(_case(problem, str(x.device)))(x, *weights),)


def _slack(problem: Problem, inputs: list[Tensor]) -> list[float]:
    """A parameter's gradient may vanish in exact arithmetic (the bias of k's norm) and leaves its terms' roundings."""
    over_rows = GRADIENT * max(1, problem.rows) ** 0.5 * torch.finfo(problem.torch_dtype).eps
    return [0.0, 0.0, *[over_rows] * (len(inputs) - 1)]


def _subject(parameters: int, *needs: str) -> Subject:
    return Subject(_inputs, _ours, _plain, _slack, parameters=parameters, vendor_gemm=True, needs=needs)


BLOCKS: dict[str, Subject] = {
    "conv_mlp": _subject(8),
    "convnext_block": _subject(9),
    "feed_forward": _subject(6),
    "sdpnet_block": _subject(30, "layer_norm_2d", "linear", "conv_mlp", "register_attention"),
}


def _problems(name: str, dtype: str, large: bool) -> list[Problem]:
    def p(*shape: int, layout: str = "tokens", epilogue: str = "gelu", **more) -> Problem:
        return Problem(name, shape, dtype, layout, epilogue=epilogue, **more)

    pictures = ("contiguous", "channels_last")
    tokens = [p(3, 25, 48, registers=5, epilogue=a) for a in ("gelu", "kelu")] + [p(3, 25, 40, registers=5)]
    found = {
        "conv_mlp": [p(3, 40, 9, 11, layout=n, epilogue=a) for n in pictures for a in ("gelu", "kelu")] + tokens,
        "convnext_block": [p(3, c, 7, 9, layout=n) for n in pictures for c in (40, 33)],
        "feed_forward": [p(3, 21, c, epilogue=a) for c in (40, 33) for a in ("gelu", "kelu")],
        "sdpnet_block": [p(2, 69, 128, registers=5, epilogue=a) for a in ("gelu", "kelu")]
        + [p(2, 25, 64, registers=5)],
    }[name]
    if large:
        shape = {"convnext_block": (16, 512, 14, 14)}.get(name, (16, 261, 768))
        registers = 5 if name in ("conv_mlp", "sdpnet_block") else 0
        found += [p(*shape, layout="channels_last" if len(shape) == 4 else "tokens", registers=registers)]
    return found


def problems(name: str) -> list[Problem]:
    """In the dtypes of training; the large ones in bf16, as they are used."""
    found = [p for dtype in ("float32", "bfloat16", "float16") for p in _problems(name, dtype, dtype == "bfloat16")]
    large = [p for p in found if p.dtype == "bfloat16"][-1:]
    return [*found, *(replace(p, own_gemm=True) for p in (found[0], *large) if name != "sdpnet_block")]


def tiny(name: str) -> list[Problem]:
    """One that takes milliseconds; nothing of an interpreter's, to which these are minutes."""
    shape, registers = {"convnext_block": ((2, 8, 4, 4), 0)}.get(name, ((2, 11, 16), 2))
    registers = registers if name in ("conv_mlp", "sdpnet_block") else 0
    layout = "channels_last" if len(shape) == 4 else "tokens"
    return [Problem(name, shape, "float32", layout, registers=registers, epilogue="kelu")]


def repeatable(name: str) -> list[Problem]:
    """For determinism, torch.compile and graphs."""
    return [_problems(name, "bfloat16", True)[-1]]
