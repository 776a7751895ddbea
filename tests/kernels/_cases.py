"""Every operator as cases that the tests of the contract run: inputs, the call, and the same in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import _plain as plain
import pytest
import torch
from _layouts import normal
from torch import Tensor

import sdp_kernels as sk
from sdp_kernels.backends import BACKENDS
from sdp_kernels.ops._contract import OPERATORS


def cpu_backends(operator: str) -> list[str]:
    """The backends that run ``operator`` on CPU tensors, or would if their library were here."""
    return [
        name
        for name, backend in BACKENDS.items()
        if "cpu" in backend.device_types
        and (operator in backend.operators or (backend.namespace is not None and OPERATORS[operator]))
    ]


def backend_params(operator: str, *more) -> list:
    """pytest parameters (*more, backend), skipped with its reason where the backend's library is missing."""
    return [
        pytest.param(
            *more,
            name,
            id="-".join([*(str(getattr(m, "name", m)) for m in more), name]),
            marks=[pytest.mark.skipif(BACKENDS[name].absent is not None, reason=f"{name}: {BACKENDS[name].absent}")],
        )
        for name in cpu_backends(operator)
    ]


@dataclass(frozen=True)
class Case:
    """``call(backend, *inputs)`` is the operator, ``plain(*inputs)`` the same without the package.

    ``shapes`` are the inputs' for a batch of 2; all inputs are differentiable. ``batched`` inputs have the batch first.
    """

    name: str
    operator: str
    shapes: tuple[tuple[int, ...], ...]
    call: Callable
    plain: Callable | None
    batched: frozenset[int] = frozenset({0})
    twice: bool = False
    """Double backward is promised."""
    registers: int = 0
    """Register rows at the front of the batched inputs and of the outputs."""
    keeps_registers: bool = False
    """The register rows of the (last) output are those of the residual, not 0."""
    offsets: dict[int, float] = field(default_factory=dict)
    """Added to an input, e.g. 1 for the weight of a norm."""
    vanishing: frozenset[int] = frozenset()
    """Inputs whose exact gradient is 0; what comes is the rounding of sums as large as the gradient before."""

    def __str__(self) -> str:
        return self.name

    def inputs(self, dtype: torch.dtype = torch.float64, batch: int = 2, seed: int = 0) -> list[Tensor]:
        """Inputs for that batch; parameters don't depend on it, nor do the first samples of a larger batch."""
        values = []
        for i, shape in enumerate(self.shapes):
            if i in self.batched:
                sample = shape[1:]
                x = torch.stack([normal(*sample, seed=1000 * seed + 100 * i + b) for b in range(batch)] or [])
            else:
                x = normal(*shape, seed=1000 * seed + 100 * i + 7, scale=0.5 if len(shape) > 1 else 1)
            values.append((x + self.offsets.get(i, 0)).to(torch.bfloat16).to(dtype))
        return values

    def empty(self, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """Inputs for a batch of none."""
        return [x[:0] if i in self.batched else x for i, x in enumerate(self.inputs(dtype, 1))]


def _norm_call(residual: bool, registers: int):
    def call(backend, x, weight, bias, *more):
        return sk.layer_norm_2d(
            x, weight, bias, 1e-6, residual=more[0] if residual else None, registers=registers, backend=backend
        )

    def same(x, weight, bias, *more):
        total = x + more[0] if residual else x
        y = plain.layer_norm_2d(total, weight, bias, 1e-6, registers)
        return (total, y) if residual else y

    return call, same


def _conv_call(grid, registers):
    def call(backend, x, weight, bias=None):
        return sk.depthwise_conv2d(x, weight, bias, grid=grid, registers=registers, backend=backend)

    return call, lambda x, weight, bias=None: plain.depthwise_conv2d(x, weight, bias, grid, registers)


def _conv_norm_call(grid, registers):
    """Normalise on load."""

    def statistics(x):
        mean = torch.linspace(-0.5, 0.5, x.shape[1]).repeat(x.shape[0], 1)
        return mean, 1 + mean.abs()

    def call(backend, x, weight, bias, norm_weight, norm_bias):
        norm = sk.Norm(*statistics(x), norm_weight, norm_bias)
        return sk.depthwise_conv2d(x, weight, bias, grid=grid, registers=registers, norm=norm, backend=backend)

    def same(x, weight, bias, norm_weight, norm_bias):
        mean, rstd = (s.to(torch.promote_types(x.dtype, torch.float32))[..., None] for s in statistics(x))
        h = ((x - mean) * rstd * norm_weight + norm_bias).to(x.dtype)
        return plain.depthwise_conv2d(h, weight, bias, grid, registers)

    return call, same


def _linear_call(activation="none", registers=0, dropout=0.0, drop_path=0.0):
    options = {"activation": activation, "registers": registers}
    masks = {"dropout": dropout, "drop_path": drop_path}

    def call(backend, x, weight, bias=None, layer_scale=None, residual=None):
        rng = sk.make_rng(3, 1) if dropout or drop_path else None
        more = {**options, **masks, "rng": rng, "layer": 5, "backend": backend}
        return sk.linear(x, weight, bias, layer_scale=layer_scale, residual=residual, **more)

    def same(x, weight, bias=None, layer_scale=None, residual=None):
        return plain.linear(x, weight, bias, layer_scale=layer_scale, residual=residual, **options)

    return call, None if dropout or drop_path else same


def _conv_mlp_call(grid, registers, activation, drop_path=0.0):
    def call(backend, x, *weights):
        rng = sk.make_rng(3, 1) if drop_path else None
        more = {"grid": grid if x.dim() == 3 else None, "registers": registers, "activation": activation}
        more |= {"drop_path": drop_path, "rng": rng, "layer": 2, "backend": backend}
        return sk.conv_mlp(x, sk.ConvMLPWeights(*weights), **more)

    def same(x, *weights):
        if x.dim() == 4:
            tokens = same(x.permute(0, 2, 3, 1).flatten(1, 2), *weights)
            return tokens.unflatten(1, grid).permute(0, 3, 1, 2)
        return plain.conv_mlp(x, sk.ConvMLPWeights(*weights), grid, registers, activation, 1e-6)

    return call, None if drop_path else same


def conv_mlp_shapes(c: int, hidden: int, k: int = 3) -> tuple[tuple[int, ...], ...]:
    """Shapes of ConvMLPWeights' fields."""
    return (
        *((c,), (c,), (c, 1, k, k), (c,), (c, c), (c,), (c,)),
        *((c,), (c,), (hidden, c), (hidden,), (c, hidden), (c,), (c,)),
    )


def _convnext_call(grid, registers, activation, drop_path=0.0):
    def call(backend, x, *weights):
        more = {"grid": grid if x.dim() == 3 else None, "registers": registers, "activation": activation}
        more |= {"drop_path": drop_path, "rng": sk.make_rng(3, 1) if drop_path else None, "layer": 3}
        return sk.convnext_block(x, sk.ConvNeXtWeights(*weights), **more, backend=backend)

    def same(x, *weights):
        if x.dim() == 4:
            tokens = same(x.permute(0, 2, 3, 1).flatten(1, 2), *weights)
            return tokens.unflatten(1, grid).permute(0, 3, 1, 2)
        return plain.convnext_block(x, sk.ConvNeXtWeights(*weights), grid, registers, activation, 1e-6)

    return call, None if drop_path else same


def convnext_shapes(c: int, hidden: int, k: int = 3) -> tuple[tuple[int, ...], ...]:
    """Shapes of ConvNeXtWeights' fields."""
    return (c, 1, k, k), (c,), (c,), (c,), (hidden, c), (hidden,), (c, hidden), (c,), (c,)


def _feed_forward_call(activation, dropout=0.0, drop_path=0.0):
    def call(backend, x, *weights):
        more = {"activation": activation, "dropout": dropout, "drop_path": drop_path}
        more |= {"rng": sk.make_rng(3, 1) if dropout or drop_path else None, "layer": 6}
        return sk.feed_forward(x, sk.FeedForwardWeights(*weights), **more, backend=backend)

    return call, None if dropout or drop_path else lambda x, *weights: plain.feed_forward(
        x, sk.FeedForwardWeights(*weights), activation, 1e-5
    )


def feed_forward_shapes(c: int, hidden: int) -> tuple[tuple[int, ...], ...]:
    """Shapes of FeedForwardWeights' fields."""
    return (c,), (c,), (hidden, c), (hidden,), (c, hidden), (c,), (c,)


def _attention_call(registers, attend, normed, dropout=0.0):
    def call(backend, qkv, *norms):
        more = {"registers": registers, "attend": attend, "backend": backend}
        more |= {"dropout": dropout, "rng": sk.make_rng(3, 1) if dropout else None, "layer": 4}
        return sk.register_attention(qkv, *((norms[:2], norms[2:]) if normed else (None, None)), **more)

    def same(qkv, *norms):
        pair = (norms[:2], norms[2:]) if normed else (None, None)
        return plain.register_attention(qkv, *pair, registers=registers, attend=attend)

    return call, None if dropout else same


_TOKENS, _GRID = (2, 8, 5), (2, 3)  # two registers
_MLP = conv_mlp_shapes(5, 6)
CASES = [
    Case("kelu", "kelu", ((2, 3, 5, 4),), lambda b, x: sk.kelu(x, backend=b), plain.kelu, twice=True),
    Case("norm", "layer_norm_2d", ((2, 5, 3, 4), (5,), (5,)), *_norm_call(False, 0), twice=True, offsets={1: 1}),
    Case("norm-tokens", "layer_norm_2d", (_TOKENS, (5,), (5,)), *_norm_call(False, 2), twice=True, registers=2),
    Case(
        "norm-residual",
        "layer_norm_2d",
        ((2, 5, 3, 4), (5,), (5,), (2, 5, 3, 4)),
        *_norm_call(True, 0),
        batched=frozenset({0, 3}),
        twice=True,
    ),
    Case(
        "norm-tokens-residual",
        "layer_norm_2d",
        (_TOKENS, (5,), (5,), _TOKENS),
        *_norm_call(True, 2),
        batched=frozenset({0, 3}),
        twice=True,
        registers=2,
    ),
    Case(
        "conv",
        "depthwise_conv2d",
        ((2, 3, 4, 3), (3, 1, 3, 3), (3,)),
        *_conv_call(None, 0),
        twice=True,
    ),
    Case(
        "conv-tokens",
        "depthwise_conv2d",
        (_TOKENS, (5, 1, 5, 5)),
        *_conv_call(_GRID, 2),
        twice=True,
        registers=2,
    ),
    Case(
        "conv-norm",
        "depthwise_conv2d",
        (_TOKENS, (5, 1, 3, 3), (5,), (5,), (5,)),
        *_conv_norm_call(_GRID, 2),
        registers=2,
    ),
    Case("linear", "linear", ((2, 3, 5), (4, 5)), *_linear_call()),
    Case(
        "linear-intermediate",
        "linear",
        (_TOKENS, (6, 5), (6,)),
        *_linear_call("kelu", 2),
        registers=2,
    ),
    Case(
        "linear-residual",
        "linear",
        (_TOKENS, (5, 5), (5,), (5,), _TOKENS),
        *_linear_call("gelu", 2),
        batched=frozenset({0, 4}),
        registers=2,
        keeps_registers=True,
    ),
    Case(
        "linear-masks",
        "linear",
        (_TOKENS, (5, 5), (5,), (5,), _TOKENS),
        *_linear_call("kelu", 2, dropout=0.3, drop_path=0.3),
        batched=frozenset({0, 4}),
        registers=2,
        keeps_registers=True,
    ),
    Case(
        "conv_mlp",
        "conv_mlp",
        (_TOKENS, *_MLP),
        *_conv_mlp_call(_GRID, 2, "kelu"),
        registers=2,
        keeps_registers=True,
        offsets={1: 1, 8: 1},
    ),
    Case(
        "conv_mlp-picture",
        "conv_mlp",
        ((2, 5, 2, 3), *_MLP),
        *_conv_mlp_call(_GRID, 0, "gelu"),
        offsets={1: 1, 8: 1},
    ),
    Case(
        "conv_mlp-masks",
        "conv_mlp",
        (_TOKENS, *_MLP),
        *_conv_mlp_call(_GRID, 2, "gelu", 0.4),
        registers=2,
        keeps_registers=True,
        offsets={1: 1, 8: 1},
    ),
    Case(
        "convnext_block",
        "convnext_block",
        (_TOKENS, *convnext_shapes(5, 6)),
        *_convnext_call(_GRID, 2, "kelu"),
        registers=2,
        keeps_registers=True,
        offsets={3: 1},
    ),
    Case(
        "convnext_block-picture",
        "convnext_block",
        ((2, 8, 2, 3), *convnext_shapes(8, 6)),
        *_convnext_call(_GRID, 0, "gelu"),
        offsets={3: 1},
    ),
    Case(
        "convnext_block-masks",
        "convnext_block",
        (_TOKENS, *convnext_shapes(5, 6)),
        *_convnext_call(_GRID, 2, "gelu", 0.4),
        registers=2,
        keeps_registers=True,
        offsets={3: 1},
    ),
    Case(
        "feed_forward",
        "feed_forward",
        (_TOKENS, *feed_forward_shapes(5, 6)),
        *_feed_forward_call("kelu"),
        offsets={1: 1},
    ),
    Case(
        "feed_forward-masks",
        "feed_forward",
        (_TOKENS, *feed_forward_shapes(5, 6)),
        *_feed_forward_call("gelu", 0.3, 0.3),
        offsets={1: 1},
    ),
    Case("attention", "register_attention", ((2, 4, 3, 2, 8),), *_attention_call(1, "all", False)),
    Case(
        "attention-normed",
        "register_attention",
        ((2, 4, 3, 1, 8), *[(8,)] * 4),
        *_attention_call(2, "image_to_image", True),
        offsets={1: 1, 3: 1},
        vanishing=frozenset({4}),  # softmax does not see a shift of all keys
    ),
    Case(
        "attention-masks",
        "register_attention",
        ((2, 4, 3, 1, 8), *[(8,)] * 4),
        *_attention_call(2, "separate", True, 0.3),
        offsets={1: 1, 3: 1},
        vanishing=frozenset({4}),
    ),
]
BY_NAME = {case.name: case for case in CASES}


def on_every_backend(cases=CASES):
    """Parametrises ``case, backend`` over all cases and the backends that run them on the CPU."""
    return pytest.mark.parametrize(("case", "backend"), [p for c in cases for p in backend_params(c.operator, c)])


def on_backends_of(operator: str):
    """Parametrises ``backend``."""
    return pytest.mark.parametrize("backend", backend_params(operator))
