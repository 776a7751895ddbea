"""Bad input of every operator: the right exception before any kernel runs, and its message names the argument."""

from __future__ import annotations

import math
import re

import pytest
import torch
from test_conv_mlp import weights
from test_convnext_block import weights as convnext_weights
from test_feed_forward import weights as feed_forward_weights

import sdp_kernels as sk
from sdp_kernels.backends import BACKENDS

Z = torch.zeros
PICTURE, TOKENS, QKV = Z(2, 4, 3, 5), Z(2, 7, 4), Z(2, 7, 3, 2, 8)
ONES, META = torch.ones(4), Z(4, device="meta")
RNG = sk.make_rng(1)
W = weights(4, 6, dtype=torch.float32)
V = sk.ConvNeXtWeights(*(w.float() for w in convnext_weights(4, 6)))
FFN = sk.FeedForwardWeights(*(w.float() for w in feed_forward_weights(4, 6)))
STATISTICS = sk.Norm(Z(2, 3, 5), Z(2, 3, 5), ONES, ONES)


def norm(x=PICTURE, weight=ONES, bias=ONES, eps=1e-6, **more):
    return sk.layer_norm_2d(x, weight, bias, eps, **more)


def conv(x=PICTURE, weight=Z(4, 1, 3, 3), bias=None, **more):  # noqa: B008
    return sk.depthwise_conv2d(x, weight, bias, **more)


def linear(x=TOKENS, weight=Z(6, 4), bias=None, **more):  # noqa: B008
    return sk.linear(x, weight, bias, **more)


def mlp(x=TOKENS, grid=(2, 3), registers=1, **more):
    fields = {k: more.pop(k) for k in list(more) if k in W._fields}
    return sk.conv_mlp(x, W._replace(**fields), grid=grid, registers=registers, **more)


def convnext(x=TOKENS, grid=(2, 3), registers=1, **more):
    fields = {k: more.pop(k) for k in list(more) if k in V._fields}
    return sk.convnext_block(x, V._replace(**fields), grid=grid, registers=registers, **more)


def feed_forward(x=TOKENS, **more):
    fields = {k: more.pop(k) for k in list(more) if k in FFN._fields}
    return sk.feed_forward(x, FFN._replace(**fields), **more)


def attention(qkv=QKV, q_norm=None, k_norm=None, **more):
    return sk.register_attention(qkv, q_norm, k_norm, **more)


def drop(x=TOKENS, p=0.5, rng=RNG, **more):
    return sk.dropout(x, p, rng=rng, **more)


NUMBERS = (math.nan, math.inf, -math.inf)
REGISTERS = [
    *((TypeError, "registers", {"registers": r}) for r in (1.0, "1", True, None)),
    *((ValueError, "registers", {"registers": r}) for r in (-1, 8)),
]


def rates(name: str) -> list:
    """Rates that are none, and masks that lack their source."""
    wrong = [(ValueError, name, {name: r, "rng": RNG}) for r in (-0.1, 1, 1.0, 1.5, *NUMBERS)]
    wrong += [(TypeError, name, {name: r, "rng": RNG}) for r in ("0.1", True, None)]
    wrong += [(ValueError, "rng", {name: 0.5}), (ValueError, "rng", {name: 0.5, "rng": RNG.to("meta")})]
    wrong += [(TypeError, "rng", {name: 0.5, "rng": r}) for r in (3, Z(3), torch.zeros(2, dtype=torch.int64))]
    wrong += [(ValueError, "layer", {name: 0.5, "rng": RNG, "layer": n}) for n in (-1, 2**30)]
    wrong += [(TypeError, "layer", {name: 0.5, "rng": RNG, "layer": n}) for n in (1.0, "1", True)]
    return wrong


def parameter(name: str, good: torch.Tensor, optional: bool = False, any_float: bool = False) -> list:
    """A parameter of the wrong kind, dtype, shape, device."""
    wrong = [(TypeError, name, {name: wrong}) for wrong in (1.0, good.int(), good.to_sparse())]
    wrong += [
        (ValueError, name, {name: Z(*good.shape[:-1], good.shape[-1] + 1)}),
        (ValueError, name, {name: good[None]}),
    ]
    wrong += [(ValueError, name, {name: good.to("meta")})]
    wrong += [] if any_float else [(TypeError, name, {name: good.double()})]
    wrong += [] if optional else [(TypeError, name, {name: None})]
    return wrong


def tensor(name: str, ranks: list[torch.Tensor]) -> list:
    """No floating tensor, or one of these, whose rank or shape is wrong."""
    others = [torch.zeros(2, 3, dtype=dtype) for dtype in (torch.int32, torch.bool, torch.complex64, torch.uint8)]
    wrong = [(TypeError, name, {name: x}) for x in (None, [1.0], 1.0, *others, Z(2, 3).to_sparse())]
    return wrong + [(ValueError, name, {name: x}) for x in ranks]


EPS = [
    *((ValueError, "eps", {"eps": e}) for e in (0, 0.0, -1e-6, *NUMBERS)),
    *((TypeError, "eps", {"eps": e}) for e in ("1e-6", None, True)),
]
ACTIVATION = [(ValueError, "activation", {"activation": a}) for a in ("gellu", "GELU", "", None)]
BACKEND = [(ValueError, "backend", {"backend": b}) for b in ("cpp", "CPU")]
RESIDUAL = [
    (TypeError, "residual", {"residual": 1.0}),
    (ValueError, "residual", {"residual": Z(2, 7, 5)}),
]
GRID = [
    (ValueError, "grid", {"x": TOKENS, "grid": g}) for g in (None, 7, (7,), (2, 3), (7, 0), (-1, -7), (1, 7, 1), "17")
] + [
    (ValueError, "grid", {"x": PICTURE, "grid": (3, 5)}),
    (ValueError, "grid", {"x": TOKENS, "grid": (7, 1), "registers": 1}),
    *((TypeError, "grid", {"x": TOKENS, "grid": g}) for g in ((7.0, 1.0), ("7", "1"), (None, 7))),
]

WRONG = {
    sk.kelu: [*tensor("x", []), *((e, n, {"x": PICTURE, **m}) for e, n, m in BACKEND)],
    sk.activation: [
        (TypeError, "x", {"x": None, "name": "gelu"}),
        (ValueError, "activation", {"x": PICTURE, "name": "gellu"}),
        (ValueError, "activation", {"x": PICTURE, "name": None}),
    ],
    norm: [
        *tensor("x", [Z(4), Z(2, 4), Z(2, 4, 3, 5, 6)]),
        (ValueError, "x", {"x": Z(2, 0, 3, 3), "weight": Z(0), "bias": Z(0)}),
        *parameter("weight", ONES),
        *parameter("bias", ONES),
        *EPS,
        *((e, n, {"x": TOKENS, **m}) for e, n, m in REGISTERS),
        (ValueError, "registers", {"registers": 1}),
        *((e, n, {"x": TOKENS, **m}) for e, n, m in RESIDUAL),
        (ValueError, "residual", {"residual": PICTURE[:1]}),
        (ValueError, "residual", {"residual": PICTURE.to("meta")}),
        (TypeError, "residual", {"residual": PICTURE.double()}),
        *BACKEND,
    ],
    conv: [
        *tensor("x", [Z(4), Z(2, 4), Z(2, 4, 3, 5, 6)]),
        *((ValueError, "weight", {"weight": Z(4, 1, k, k)}) for k in (0, 1, 2, 4, 6, 8, 11)),
        *(
            (ValueError, "weight", {"weight": Z(s)})
            for s in ((4, 1, 3, 5), (4, 3, 3), (4, 4, 3, 3), (5, 1, 3, 3), (4, 3), ())
        ),
        *((TypeError, "weight", {"weight": w}) for w in (None, Z(4, 1, 3, 3).double(), Z(4, 1, 3, 3).int())),
        (ValueError, "weight", {"weight": Z(4, 1, 3, 3, device="meta")}),
        *parameter("bias", ONES, optional=True),
        *((e, n, {"x": TOKENS, "grid": (1, 7), **m}) for e, n, m in REGISTERS),
        (ValueError, "registers", {"registers": 1}),
        *GRID,
        *((TypeError, "norm", {"norm": n}) for n in (ONES, (ONES, ONES), "layer")),
        *((ValueError, f"norm.{n}", {"norm": STATISTICS._replace(**{n: Z(2, 5, 3)})}) for n in ("mean", "rstd")),
        *((ValueError, f"norm.{n}", {"norm": STATISTICS._replace(**{n: Z(5)})}) for n in ("weight", "bias")),
        (ValueError, "norm.weight", {"norm": STATISTICS._replace(weight=META)}),
        *BACKEND,
    ],
    linear: [
        *tensor("x", [Z(()), Z(2, 5), Z(2, 7, 6)]),
        *((TypeError, "weight", {"weight": w}) for w in (None, Z(6, 4).double(), Z(6, 4).int())),
        *((ValueError, "weight", {"weight": w}) for w in (Z(4), Z(6, 4, 1), Z(6, 4, device="meta"))),
        *parameter("bias", Z(6), optional=True),
        *parameter("layer_scale", Z(6), optional=True),
        *ACTIVATION,
        *RESIDUAL,
        (ValueError, "residual", {"residual": Z(2, 7, 6, device="meta")}),
        *REGISTERS,
        (ValueError, "registers", {"x": Z(2, 4), "registers": 1}),
        *rates("dropout"),
        *rates("drop_path"),
        (ValueError, "x", {"x": Z(4), "dropout": 0.5, "rng": RNG}),
        *BACKEND,
    ],
    mlp: [
        *tensor("x", [Z(4), Z(2, 4), Z(2, 4, 3, 5, 6)]),
        *(
            (e, f"weights.{n}", m)
            for f in W._fields
            for e, n, m in parameter(
                f,
                getattr(W, f),
                f
                in ("depthwise_bias", "pointwise_bias", "layer_scale1", "expand_bias", "project_bias", "layer_scale2"),
            )
        ),
        (ValueError, "weights.depthwise_weight", {"depthwise_weight": Z(4, 1, 4, 4)}),
        *((ValueError, f"weights.{f}_weight", {f"{f}_weight": Z(())}) for f in ("depthwise", "expand")),
        (TypeError, "weights.depthwise_weight", {"x": TOKENS.bfloat16()}),
        (ValueError, "weights.project_weight", {"project_weight": Z(6, 4)}),
        *ACTIVATION,
        *EPS,
        *((e, n, m) for e, n, m in REGISTERS),
        (ValueError, "registers", {"x": PICTURE, "grid": None, "registers": 1}),
        *((e, n, {"registers": 0, **m}) for e, n, m in GRID),
        *rates("drop_path"),
        *BACKEND,
    ],
    convnext: [
        *tensor("x", [Z(4), Z(2, 4), Z(2, 4, 3, 5, 6)]),
        *(
            (e, f"weights.{n}", m)
            for f in V._fields
            for e, n, m in parameter(
                f, getattr(V, f), f in ("depthwise_bias", "expand_bias", "project_bias", "layer_scale")
            )
        ),
        (ValueError, "weights.depthwise_weight", {"depthwise_weight": Z(4, 1, 4, 4)}),
        *((ValueError, f"weights.{f}_weight", {f"{f}_weight": Z(())}) for f in ("depthwise", "expand")),
        (TypeError, "weights.depthwise_weight", {"x": TOKENS.bfloat16()}),
        (ValueError, "weights.project_weight", {"project_weight": Z(6, 4)}),
        *ACTIVATION,
        *EPS,
        *((e, n, m) for e, n, m in REGISTERS),
        (ValueError, "registers", {"x": PICTURE, "grid": None, "registers": 1}),
        *((e, n, {"registers": 0, **m}) for e, n, m in GRID),
        *rates("drop_path"),
        *BACKEND,
    ],
    feed_forward: [
        *tensor("x", [Z(4), Z(7, 4), PICTURE]),
        *(
            (e, f"weights.{n}", m)
            for f in FFN._fields
            for e, n, m in parameter(f, getattr(FFN, f), f in ("expand_bias", "project_bias", "layer_scale"))
        ),
        *((ValueError, "weights.expand_weight", {"expand_weight": w}) for w in (Z(6, 5), Z(()))),
        (TypeError, "weights.expand_weight", {"x": TOKENS.bfloat16()}),
        (ValueError, "weights.project_weight", {"project_weight": Z(6, 4)}),
        *ACTIVATION,
        *EPS,
        *rates("dropout"),
        *rates("drop_path"),
        *BACKEND,
    ],
    attention: [
        *tensor("qkv", [Z(2, 7, 48), Z(2, 7, 2, 2, 8), Z(2, 7, 3, 2), Z(2, 0, 3, 2, 8), Z(2, 7, 3, 0, 8)]),
        *((ValueError, "qkv", {"qkv": Z(2, 7, 3, 2, d)}) for d in (0, 1, 4, 12, 33, 136, 256)),
        *(
            (TypeError, n, {n: p})
            for n in ("q_norm", "k_norm")
            for p in (Z(8), (Z(8),), (Z(8),) * 3, (Z(8), None), "x")
        ),
        *((ValueError, n, {n: p}) for n in ("q_norm", "k_norm") for p in ((Z(9), Z(8)), (Z(8), Z(1)), (Z(8), Z(1, 8)))),
        (ValueError, "q_norm", {"q_norm": (Z(8), Z(8, device="meta"))}),
        (TypeError, "k_norm", {"k_norm": (Z(8), Z(8).double())}),
        *EPS,
        *((ValueError, "scale", {"scale": s}) for s in (*NUMBERS, 10**400)),
        *((TypeError, "scale", {"scale": s}) for s in ("1", True)),
        *((ValueError, "registers", {"registers": r}) for r in (-1, 8, 1.0, True, None)),
        *((ValueError, "attend", {"attend": a}) for a in ("", "image", None, "ALL")),
        *rates("dropout"),
        *BACKEND,
    ],
    drop: [
        *((TypeError, "x", {"x": x}) for x in (None, Z(2, 3).int())),
        (ValueError, "x", {"x": Z(())}),
        *((ValueError, "p", {"p": p}) for p in (-0.1, 1, 1.0, 1.5, *NUMBERS)),
        *((TypeError, "p", {"p": p}) for p in ("0.1", True, None)),
        *(
            (e, n, {"p": 0.5, **{k: v for k, v in m.items() if k != "q"}})
            for e, n, m in rates("q")
            if n != "q" and "rng" in m
        ),
        (ValueError, "rng", {"rng": None}),
    ],
    sk.make_rng: [
        *((TypeError, n, {"seed": 0, n: v}) for n in ("seed", "step", "first_sample") for v in (1.0, "1", True, None)),
        *((ValueError, "seed", {"seed": s}) for s in (2**63, -(2**63) - 1)),
        *((ValueError, n, {"seed": 0, n: v}) for n in ("step", "first_sample") for v in (-1, 2**32)),
    ],
    sk.LayerNorm2d: [(ValueError, "channels", {"channels": c}) for c in (0, -1, 2.0, "4", True)],
    sk.DepthwiseConv2d: [
        *((ValueError, "channels", {"channels": c}) for c in (0, 2.0)),
        *((ValueError, "kernel_size", {"channels": 4, "kernel_size": k}) for k in (1, 2, 4, 11, "7", None)),
    ],
    sk.ConvMLP: [
        (ValueError, "dim", {"dim": 0}),
        (ValueError, "kernel_size", {"dim": 4, "kernel_size": 4}),
        (ValueError, "activation", {"dim": 4, "activation": "gellu"}),
        *((ValueError, "mlp_ratio", {"dim": 4, "mlp_ratio": r}) for r in (0, -1.0, 0.01)),
    ],
    sk.ConvNeXtBlock: [
        (ValueError, "dim", {"dim": 0}),
        (ValueError, "kernel_size", {"dim": 4, "kernel_size": 4}),
        (ValueError, "activation", {"dim": 4, "activation": "gellu"}),
        *((ValueError, "mlp_ratio", {"dim": 4, "mlp_ratio": r}) for r in (0, -1.0, 0.01)),
    ],
    sk.RegisterAttention: [
        *((ValueError, "head_dim", {"head_dim": d}) for d in (0, -8, 8.0, 12, 136)),
        (ValueError, "attend", {"head_dim": 8, "attend": "image"}),
        (ValueError, "eps", {"head_dim": 8, "eps": 0.0}),
        (ValueError, "dropout", {"head_dim": 8, "dropout": 1.0}),
        (ValueError, "layer", {"head_dim": 8, "layer": -1}),
    ],
}
CASES = [
    pytest.param(call, error, name, arguments, id=f"{call.__name__}-{name}-{i}")
    for call, cases in WRONG.items()
    for i, (error, name, arguments) in enumerate(cases)
]


@pytest.fixture
def no_kernel(monkeypatch):
    """Errors come before work: choosing a backend is the last step that may be reached."""
    import sdp_kernels.reference as reference

    def never(*_, **__):
        raise AssertionError("a kernel ran")

    for operator in set(reference.__all__) - {"philox"}:
        monkeypatch.setattr(getattr(reference, operator), operator, never)


@pytest.mark.parametrize(("call", "error", "name", "arguments"), CASES)
def test_message_names_the_argument(call, error, name, arguments, no_kernel):
    with pytest.raises(error) as raised:
        call(**arguments)
    assert type(raised.value) is error
    assert re.match(rf"{re.escape(name)}\b|.*\b{re.escape(name)}\b.* must", str(raised.value)), raised.value


def test_good_arguments_raise_nothing():
    """Each call of the list above, left as it is: what was wrong there is wrong by itself."""
    norm(), norm(TOKENS, registers=2), conv(), conv(TOKENS, grid=(2, 3), registers=1), linear(registers=2), mlp()
    convnext(), feed_forward()
    (
        conv(norm=STATISTICS),
        mlp(PICTURE, None, 0),
        attention(),
        drop(),
        norm(residual=PICTURE),
        linear(residual=Z(2, 7, 6)),
    )


def test_weights_of_the_blocks_must_be_named():
    with pytest.raises(TypeError, match="weights must be a ConvMLPWeights"):
        sk.conv_mlp(TOKENS, tuple(W), grid=(1, 7))
    with pytest.raises(TypeError, match="weights must be a ConvNeXtWeights"):
        sk.convnext_block(TOKENS, tuple(V), grid=(1, 7))
    with pytest.raises(TypeError, match="weights must be a FeedForwardWeights"):
        sk.feed_forward(TOKENS, tuple(FFN))


@pytest.mark.parametrize("backend", BACKENDS)
def test_wrong_input_is_told_before_a_wrong_backend(backend):
    with pytest.raises(ValueError, match="eps"):
        norm(eps=0, backend=backend)
