"""More than 2³¹ elements, and few elements that lie more than 2³¹ apart: 32-bit offsets would wrap around."""

from __future__ import annotations

import torch

from . import machine
from .judge import judge
from .part import Setting, Unavailable
from .subjects import SUBJECTS, Problem, alike, differentiate

TENSORS = 7
"""x, y, dy, dx, linear's z and dz, and what a comparison needs."""


def problems(operator: str, setting: Setting) -> list[Problem]:
    """One per layout and operator, in bf16, just above the border; the last sample lies wholly beyond it. None for
    attention, whose tensors have different shapes."""
    if operator == "register_attention":
        return []
    sample = (8, 4, 4) if setting.rehearsal else (768, 16, 16)
    if operator == "linear":
        sample = (8, 16) if setting.rehearsal else (256, 768)
    batch = machine.LARGE[setting.rehearsal] // torch.Size(sample).numel() + 2
    kernel = 7 if operator == "depthwise_conv2d" else 0
    layouts = ("contiguous",) if operator in ("kelu", "linear") else ("contiguous", "channels_last")
    more = {"kernel": kernel, "epilogue": "kelu" if operator == "linear" else ""}
    return [Problem(operator, (batch, *sample), "bfloat16", layout, **more) for layout in layouts]


def far(operator: str, setting: Setting) -> list[Problem]:
    """A batch of two samples with a batch stride beyond the border; none for attention."""
    if operator == "register_attention":
        return []
    shape = (2, 8, 4, 4) if setting.rehearsal else (2, 96, 7, 7)
    more = {"kernel": 7 if operator == "depthwise_conv2d" else 0, "epilogue": "gelu" if operator == "linear" else ""}
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
    elements = torch.Size(problem.shape).numel()
    _enough(setting, TENSORS * elements * dtype.itemsize + 2**32 * (not setting.rehearsal))
    x, dy = (_random(problem.shape, problem, setting, seed) for seed in (1, 2))
    parameters = subject.inputs(Problem.of(problem.json() | {"shape": (1, *problem.shape[1:])}), setting.device)[1:]
    outputs, gradients = differentiate(lambda *t: subject.ours(problem, backend, *t), [x, *parameters], [dy])

    batch, per_piece = problem.shape[0], 8 if setting.rehearsal else 64
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
            f"gradient {i + 1}", got, exact_sum, exact_sum.to(got.dtype), rows=elements // problem.channels
        )
    return found, f"{elements} elements"


def check_far(setting: Setting, problem: Problem, backend: str):
    """x, dy (and with them y and dx, where they follow) with a batch stride beyond 2³¹: the bits of the dense case."""
    subject, dtype = SUBJECTS[problem.operator], problem.torch_dtype
    stride = machine.LARGE[setting.rehearsal] + 64
    sample = torch.Size(problem.shape[1:]).numel()
    _enough(setting, 2 * (stride + sample) * dtype.itemsize)
    inputs = subject.inputs(problem, setting.device)
    dense = [inputs[0], _random(problem.shape, problem, setting, 2)]
    apart = []
    for tensor in dense:
        buffer = torch.empty(stride + sample, dtype=dtype, device=setting.device)
        view = buffer.as_strided(problem.shape, (stride, *tensor.stride()[1:]))
        apart.append(view.copy_(tensor))
    near = differentiate(lambda *t: subject.ours(problem, backend, *t), inputs, dense[1:])
    spread = differentiate(lambda *t: subject.ours(problem, backend, *t), [apart[0], *inputs[1:]], apart[1:])
    for i, (a, b) in enumerate(zip([*near[0], *near[1]], [*spread[0], *spread[1]])):
        alike(problem, f"tensor {i}, dense and spread over {stride} elements,", a, b)
    return {}, f"batch stride {stride}"
