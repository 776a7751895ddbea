"""More than 2³¹ elements, and few elements that lie more than 2³¹ apart: 32-bit offsets would wrap around."""

from __future__ import annotations

from dataclasses import replace

import torch

from . import machine
from .judge import judge
from .part import Setting, Unavailable
from .subjects import SUBJECTS, Problem, alike, differentiate

TOKENS = {"linear": (256, 768), "register_attention": (261, 768)}
TINY = {"linear": (8, 16), "register_attention": (32, 16)}


def problems(operator: str, setting: Setting) -> list[Problem]:
    """One per layout and operator, in bf16, just above the border; the last sample of the result, and so of all
    tensors, lies wholly beyond it."""
    pictures = operator not in TOKENS
    sample = (8, 4, 4) if setting.rehearsal else (768, 16, 16)
    if not pictures:
        sample = (TINY if setting.rehearsal else TOKENS)[operator]
    batch = machine.LARGE[setting.rehearsal] // torch.Size(sample).numel() + 2
    layouts = ("contiguous", "channels_last") if pictures and operator != "kelu" else ("contiguous",)
    more = {"epilogue": "kelu"} if operator == "linear" else _kernel(operator, setting)
    found = [Problem(operator, (batch, *sample), "bfloat16", layout, **more) for layout in layouts]
    return [*found, *(replace(p, own_gemm=True) for p in found if operator == "linear" and not setting.rehearsal)]


def _kernel(operator: str, setting: Setting) -> dict[str, int]:
    """A convolution's, or the columns of a head."""
    kernels = {"depthwise_conv2d": 3 if setting.rehearsal else 7, "register_attention": 16 if setting.rehearsal else 96}
    return {"kernel": kernels[operator]} if operator in kernels else {}


def far(operator: str, setting: Setting) -> list[Problem]:
    """A batch of two samples with a batch stride beyond the border."""
    shape = (2, 8, 4, 4) if setting.rehearsal else (2, 96, 7, 7)
    if operator == "register_attention":
        shape = (2, 8, 16) if setting.rehearsal else (2, 69, 192)
    more = {"epilogue": "gelu"} if operator == "linear" else _kernel(operator, setting)
    return [Problem(operator, shape, "bfloat16", **more)]


def _enough(setting: Setting, need: int) -> None:
    free = machine.free_memory(setting)
    if free < need:
        raise Unavailable(f"needs {need / 2**30:.0f} GiB of GPU memory, {free / 2**30:.0f} GiB are free")


def _random(shape: tuple[int, ...], problem: Problem, setting: Setting, seed: int) -> torch.Tensor:
    """Filled sample by sample group, so that no fp32 copy of the whole is ever there."""
    generator = torch.Generator(setting.device).manual_seed(seed)
    memory_format = torch.channels_last if problem.layout == "channels_last" else torch.contiguous_format
    made = torch.empty(shape, dtype=problem.torch_dtype, device=setting.device, memory_format=memory_format)
    for piece in made.split(256):
        piece.copy_(torch.randn(piece.shape, generator=generator, device=setting.device))
    return made


def check(setting: Setting, problem: Problem, backend: str):
    """First, middle and last samples against fp64 and themselves alone; parameters' gradients over all samples."""
    subject, dtype = SUBJECTS[problem.operator], problem.torch_dtype
    single = Problem.of(problem.json() | {"shape": (1, *problem.shape[1:])})
    one, *parameters = subject.inputs(single, setting.device)
    batch, slack = problem.shape[0], subject.slack(single, [one, *parameters])
    elements = torch.Size(problem.shape).numel()
    # x and dx; y and dy, and linear's z and dz; and what a comparison needs.
    _enough(setting, (3 * batch * one.numel() + 4 * elements) * dtype.itemsize + 2**32 * (not setting.rehearsal))
    x = _random((batch, *one.shape[1:]), problem, setting, 1)
    dy = _random(problem.shape, problem, setting, 2)
    outputs, gradients = differentiate(lambda *t: subject.ours(problem, backend, *t), [x, *parameters], [dy])

    per_piece = 8 if setting.rehearsal else 64
    border = machine.LARGE[setting.rehearsal] // torch.Size(problem.shape[1:]).numel()
    shown = {sample // per_piece * per_piece for sample in (0, border // 2, border, batch - 1)}
    sums = [torch.zeros_like(p, dtype=torch.float64) for p in parameters]
    found = {}
    for begin in range(0, batch, per_piece):
        piece = slice(begin, min(begin + per_piece, batch))
        if begin not in shown and not parameters:
            continue
        wide = [x[piece].double(), *(p.double() for p in parameters)]
        exact = differentiate(lambda *t: subject.plain(problem, *t), wide, [dy[piece]])
        for total, more in zip(sums, exact[1][1:]):
            total += more
        if begin in shown:
            peer = differentiate(lambda *t: subject.plain(problem, *t), [x[piece], *parameters], [dy[piece]])
            alone = differentiate(lambda *t: subject.ours(problem, backend, *t), [x[piece], *parameters], [dy[piece]])
            for name, i in (("y", 0), ("dx", 1)):
                whole = (outputs[0], gradients[0])[i][piece]
                named = f"{name} of samples {piece.start} to {piece.stop}"
                alike(problem, f"{named}, alone and in the batch,", whole, alone[i][0])
                found[named] = judge(named, whole, exact[i][0], peer[i][0], rows=problem.channels)
    for i, (got, exact_sum) in enumerate(zip(gradients[1:], sums)):
        found[f"gradient {i + 1}"] = judge(
            *(f"gradient {i + 1}", got, exact_sum, exact_sum.to(got.dtype)),
            rows=elements // problem.channels,
            slack=slack[2 + i] * batch**0.5,  # rounding errors of a sum over as many times more rows
        )
    return found, f"{elements} elements"


def check_far(setting: Setting, problem: Problem, backend: str):
    """x, dy (and with them y and dx, where they follow) with a batch stride beyond 2³¹: the bits of the dense case."""
    subject, dtype = SUBJECTS[problem.operator], problem.torch_dtype
    stride = machine.LARGE[setting.rehearsal] + 64
    inputs = subject.inputs(problem, setting.device)
    dense = [inputs[0], _random(problem.shape, problem, setting, 2)]
    _enough(setting, sum(stride + tensor[0].numel() for tensor in dense) * dtype.itemsize)
    apart = []
    for tensor in dense:
        buffer = torch.empty(stride + tensor[0].numel(), dtype=dtype, device=setting.device)
        view = buffer.as_strided(tensor.shape, (stride, *tensor.stride()[1:]))
        apart.append(view.copy_(tensor))
    near = differentiate(lambda *t: subject.ours(problem, backend, *t), inputs, dense[1:])
    spread = differentiate(lambda *t: subject.ours(problem, backend, *t), [apart[0], *inputs[1:]], apart[1:])
    for i, (a, b) in enumerate(zip([*near[0], *near[1]], [*spread[0], *spread[1]])):
        alike(problem, f"tensor {i}, dense and spread over {stride} elements,", a, b)
    return {}, f"batch stride {stride}"
