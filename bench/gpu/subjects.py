"""The operators under test: how their inputs are made, what they compute, and the same in plain PyTorch.

Those made of others are in blocks.py. A new operator with kernels needs an entry here; a test says so.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import sdp_kernels
from bench.baselines import layer_norm_permuted, layer_norm_tokens
from sdp_kernels import reference
from sdp_kernels.backends import BACKENDS, every_reason

from . import warpgroups
from .blocks import BLOCKS
from .judge import accumulator, judge, same_bits
from .part import Setting
from .problem import DTYPES, GRADIENT, GRADIENTS, LAYOUTS, Problem, Subject, normal

EPS = 1e-6
GPU_BACKENDS = ("cuda", "triton")


def _kelu_inputs(problem: Problem, device: str) -> list[Tensor]:
    return [LAYOUTS[problem.layout](normal(problem, problem.shape, 1, device, 2.0))]


KELU = Subject(
    inputs=_kelu_inputs,
    ours=lambda problem, backend, x: (sdp_kernels.kelu(x, backend=backend),),
    plain=lambda problem, x: (reference.kelu.kelu(x),),
    slack=lambda problem, inputs: [0.0, 0.0],
    parameters=0,
)


def _norm_inputs(problem: Problem, device: str) -> list[Tensor]:
    lay, c = LAYOUTS[problem.layout], (problem.channels,)
    x = lay(normal(problem, problem.shape, 1, device, 2.0))
    parameters = [1 + 0.2 * normal(problem, c, 2, device).float(), normal(problem, c, 3, device).float()]
    parameters = [p.to(torch.float32 if problem.wide_parameters else problem.torch_dtype) for p in parameters]
    return [x, *parameters, *([lay(normal(problem, problem.shape, 4, device))] if problem.residual else [])]


def _norm_ours(problem: Problem, backend: str, x, weight, bias, residual=None) -> tuple[Tensor, ...]:
    options = {"registers": problem.registers, "residual": residual, "backend": backend}
    y = sdp_kernels.layer_norm_2d(x, weight, bias, EPS, **options)
    return y if residual is not None else (y,)


def _norm_plain(problem: Problem, x, weight, bias, residual=None) -> tuple[Tensor, ...]:
    total = x if residual is None else x + residual
    if weight.dtype != x.dtype:
        y = reference.layer_norm_2d.layer_norm_2d(total, weight, bias, EPS, problem.registers)
    elif x.dim() == 4:
        y = layer_norm_permuted(total, weight, bias, EPS)
    else:
        y = layer_norm_tokens(total, weight, bias, EPS, problem.registers)
    return (y,) if residual is None else (total, y)


def _norm_slack(problem: Problem, inputs: list[Tensor]) -> list[float]:
    """x is known to eps · |x| only, which the division by the standard deviation magnifies."""
    x, weight = inputs[0], inputs[1]
    if x.numel() == 0:
        return [0.0] * 8
    total = x.double() + (inputs[3].double() if problem.residual else 0.0)
    rstd = (total.var(1 if x.dim() == 4 else 2, correction=0) + EPS).rsqrt().max().item()
    unit = torch.finfo(accumulator(x.dtype)).eps
    magnified, w = 8 * unit * total.abs().max().item() * rstd, weight.abs().max().item()
    over_rows = GRADIENT * problem.rows**0.5  # what a sum over rows may lose, though its terms cancel
    gradients = [w * GRADIENT * rstd * max(magnified, 8 * unit), over_rows * magnified, over_rows * unit]
    outputs = [w * magnified] * (2 if problem.residual else 1)
    return [*outputs, *gradients, *(gradients[:1] if problem.residual else [])]


LAYER_NORM = Subject(_norm_inputs, _norm_ours, _norm_plain, _norm_slack, parameters=2)


def _grid(problem: Problem) -> tuple[int, int] | None:
    if len(problem.shape) == 4:
        return None
    image = problem.shape[1] - problem.registers
    height = max(h for h in range(1, int(image**0.5) + 1) if image % h == 0)
    return height, image // height


def _conv_slack(problem: Problem, inputs: list[Tensor]) -> list[float]:
    x = inputs[0]
    over_rows = GRADIENT * problem.rows**0.5 * torch.finfo(accumulator(x.dtype)).eps
    largest = (4 if problem.normed else 1) * x.abs().max().item() if x.numel() else 0.0
    return [0.0, 0.0, over_rows * largest, over_rows]


def _conv_inputs(problem: Problem, device: str) -> list[Tensor]:
    x = LAYOUTS[problem.layout](normal(problem, problem.shape, 1, device))
    weight = normal(problem, (problem.channels, 1, problem.kernel, problem.kernel), 2, device, 1 / problem.kernel)
    return [x, weight, normal(problem, (problem.channels,), 3, device)]


def _conv_options(problem: Problem, x: Tensor) -> dict:
    """Statistics that are a function of each pixel alone, whatever else is in the batch; no gradients of theirs."""
    options = {"grid": _grid(problem), "registers": problem.registers}
    if problem.normed:
        values, channels = x.detach().to(accumulator(x.dtype)), 1 if x.dim() == 4 else 2
        rstd = 1 / (1 + values.select(channels, -1).abs())
        weight, bias = (torch.linspace(*ends, problem.channels, device=x.device) for ends in ((0.5, 1.5), (-1, 1)))
        options["norm"] = sdp_kernels.Norm(values.select(channels, 0), rstd, weight, bias)
    return options


CONVOLUTION = Subject(
    inputs=_conv_inputs,
    ours=lambda problem, backend, x, *more: (
        sdp_kernels.depthwise_conv2d(x, *more, **_conv_options(problem, x), backend=backend),
    ),
    plain=lambda problem, x, *more: (
        reference.depthwise_conv2d.depthwise_conv2d(x, *more, **_conv_options(problem, x)),
    ),
    slack=_conv_slack,
    parameters=2,
)


def _linear_options(problem: Problem, device: str) -> dict:
    words = problem.epilogue.split()
    names = [word for word in words if word in sdp_kernels.ACTIVATIONS]
    masks = {"rng": sdp_kernels.make_rng(3, 1, device=device), "layer": 5} if "masks" in words else {}
    return {"activation": names[0] if names else "none", "registers": problem.registers, **masks}


def _linear_inputs(problem: Problem, device: str) -> list[Tensor]:
    """x, weight, bias, and with an epilogue's words γ and the residual; as many outputs as inputs."""
    c, words = problem.shape[-1], problem.epilogue.split()
    x = LAYOUTS[problem.layout](normal(problem, problem.shape, 1, device))
    parameters = [normal(problem, (c, c), 2, device, c**-0.5), normal(problem, (c,), 3, device)]
    scale = 1 + 0.2 * normal(problem, (c,), 4, device).float() if "scale" in words else torch.ones(c, device=device)
    scale = scale.to(torch.float32 if problem.wide_parameters else problem.torch_dtype)
    residual = [normal(problem, problem.shape, 5, device)] if "residual" in words else []
    return [x, *parameters, scale, *residual]


def _linear_ours(problem: Problem, backend: str, x, weight, bias, scale, residual=None) -> tuple[Tensor, ...]:
    rates = {"dropout": 0.3, "drop_path": 0.3} if "masks" in problem.epilogue else {}
    options = _linear_options(problem, str(x.device)) | rates
    more = {"layer_scale": scale, "residual": residual, "backend": backend}
    return (sdp_kernels.linear(x, weight, bias, **more, **options),)


def _linear_plain(problem: Problem, x, weight, bias, scale, residual=None) -> tuple[Tensor, ...]:
    rates = {"dropout_rate": 0.3, "drop_path": 0.3} if "masks" in problem.epilogue else {}
    options = _linear_options(problem, str(x.device)) | rates
    return (reference.linear.linear(x, weight, bias, layer_scale=scale, residual=residual, **options),)


def _linear_slack(problem: Problem, inputs: list[Tensor]) -> list[float]:
    rows = max(1, inputs[0].numel() // problem.shape[-1])
    over_rows = GRADIENT * rows**0.5 * torch.finfo(accumulator(problem.torch_dtype)).eps
    return [0.0, 0.0, *[4 * over_rows] * 3, 0.0]


LINEAR = Subject(_linear_inputs, _linear_ours, _linear_plain, _linear_slack, parameters=3, vendor_gemm=True)


def _attention_inputs(problem: Problem, device: str) -> list[Tensor]:
    """qkv and both norms' parameters; the problem's shape is y's, (B, T, h · d), and d its ``kernel``."""
    batch, tokens, columns = problem.shape
    d = problem.kernel
    qkv = LAYOUTS[problem.layout](normal(problem, (batch, tokens, 3, columns // d, d), 1, device))
    norms = [i % 2 + 0.2 * normal(problem, (d,), 2 + i, device).float() for i in (1, 2, 3, 4)]
    return [qkv, *(p.to(torch.float32 if problem.wide_parameters else problem.torch_dtype) for p in norms)]


def _attention_options(problem: Problem, device: str) -> dict:
    words = problem.epilogue.split()
    options = {"registers": problem.registers, "attend": next((w for w in words if w != "masks"), "all")}
    masks = {"dropout": 0.3, "rng": sdp_kernels.make_rng(3, 1, device=device), "layer": 5}
    return options | (masks if "masks" in words else {})


def _attention_ours(problem: Problem, backend: str, qkv, *norms) -> tuple[Tensor, ...]:
    options = _attention_options(problem, str(qkv.device))
    return (sdp_kernels.register_attention(qkv, norms[:2], norms[2:], backend=backend, **options),)


def _attention_plain(problem: Problem, qkv, *norms) -> tuple[Tensor, ...]:
    options = _attention_options(problem, str(qkv.device))
    return (reference.register_attention.register_attention(qkv, norms[:2], norms[2:], **options),)


def _attention_slack(problem: Problem, inputs: list[Tensor]) -> list[float]:
    """The bias of k's norm has a gradient of 0, which leaves rounding errors only."""
    over_rows = GRADIENT * inputs[0][:, :, 0, :, 0].numel() ** 0.5 * torch.finfo(problem.torch_dtype).eps
    return [0.0, 0.0, *[over_rows] * 4]


ATTENTION = Subject(_attention_inputs, _attention_ours, _attention_plain, _attention_slack, parameters=4)
SUBJECTS = {"kelu": KELU, "layer_norm_2d": LAYER_NORM, "depthwise_conv2d": CONVOLUTION, "linear": LINEAR}
SUBJECTS |= {"register_attention": ATTENTION}
"""The operators that have kernels of their own."""
EVERYTHING = SUBJECTS | BLOCKS


def alike(problem: Problem, name: str, got: Tensor, wanted: Tensor) -> None:
    """Raise Failure unless the two are equal to the bit, or as near as a vendor's GEMM keeps to the other."""
    if EVERYTHING[problem.operator].vendor_gemm:
        judge(name, got, wanted, wanted, rows=max(problem.rows, problem.channels))
    else:
        same_bits(name, got, wanted)


OWN_GEMM = ("triton",)
"""Backends with matrix products of their own, which their tables may leave to the vendor."""


@contextlib.contextmanager
def choice_of_gemm(problem: Problem, backend: str) -> Iterator[None]:
    """The problem's: our own matrix products or warpgroups where it wants them, else what the backend chooses."""
    chosen = BACKENDS[backend]
    before = chosen.prefers
    if problem.own_gemm:
        chosen.prefers = lambda kernel, x, weight: kernel in ("linear_gemm_fwd", "linear_gemm_bwd")
    try:
        with warpgroups.cuda_attention("wgmma" if problem.warpgroups else None):
            yield
    finally:
        chosen.prefers = before


def solvable(problems: list[Problem], backend: str) -> list[Problem]:
    """Without those that the backend has no kernels for."""
    found = [problem for problem in problems if not problem.own_gemm or backend in OWN_GEMM]
    return [problem for problem in found if not problem.warpgroups or (backend == "cuda" and warpgroups.there())]


def needs(operator: str) -> tuple[str, ...]:
    """The operators of sdp_kernels that have to have kernels for it."""
    return EVERYTHING[operator].needs or (operator,)


def backends(setting: Setting, operator: str, dtype: str = "float32") -> list[str]:
    """Those to be tested in this process, in the order of automatic choice: the GPU's, or in a rehearsal what runs."""
    if setting.variant == "interpreter":
        wanted: tuple[str, ...] = ("triton",)
    elif setting.rehearsal:
        wanted = ("cpu",) if BACKENDS["cpu"].absent is None else ("reference",)
    else:
        wanted = GPU_BACKENDS
    reasons = [every_reason(kernel, setting.device, DTYPES[dtype]) for kernel in needs(operator)]
    return [name for name in wanted if not any(told[name] for told in reasons)]


def missing(setting: Setting, operator: str) -> dict[str, str]:
    """GPU backend → why it can't run the operator here."""
    told = [every_reason(kernel, setting.device, torch.float32) for kernel in needs(operator)]
    reasons = {name: [why for one in told for why in one[name]] for name in GPU_BACKENDS}
    return {name: "; ".join(dict.fromkeys(why)) for name, why in reasons.items() if why}


def differentiate(function: Callable, inputs: list[Tensor], grads: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """(outputs, gradients of all inputs), strides of the inputs kept."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = function(*leaves)
    gradients = torch.autograd.grad(outputs, leaves, [g.to(y.dtype) for g, y in zip(grads, outputs)])
    return [y.detach() for y in outputs], list(gradients)


def gradients_for(problem: Problem, device: str) -> list[Tensor]:
    """One per output, laid out as the problem says."""
    count = 2 if problem.residual else 1
    lay = GRADIENTS[problem.grad] if 0 not in problem.shape else GRADIENTS["like y"]
    made = [LAYOUTS[problem.layout](normal(problem, problem.shape, 10 + i, device)) for i in range(count)]
    return [lay(g) for g in made]
