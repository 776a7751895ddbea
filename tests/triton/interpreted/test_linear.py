"""linear's Triton kernels against fp64: activations, masks to the bit, registers, residuals, sums, any strides."""

from __future__ import annotations

import json

import _plain as plain
import cases
import numpy as np
import pytest
import torch
import triton.language as tl
from _cases import conv_mlp_shapes
from _layouts import hostile, layouts, normal
from _numerics import assert_as_exact, differentiate
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder

import sdp_kernels as sk
from sdp_kernels.reference import philox
from sdp_kernels.triton import _launch, _linear_gemm, linear

OPS = cases.OPS
TABLE = _launch.table_for(90)
FLOATING = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
EXACT = {"rtol": 1e-11, "atol": 1e-12}
WIDTHS = {"16bit": torch.bfloat16, "32bit": torch.float32}
REGISTERS, LAYER, RATE = 2, 5, 0.3


def tokens(batch: int, tokens: int, columns: int, dtype=torch.float64, seed: int = 0) -> Tensor:
    samples = [normal(tokens, columns, seed=seed + 31 * b, dtype=dtype, scale=2) for b in range(max(1, batch))]
    return torch.stack(samples)[:batch]


def epilogue(z, scale, residual, activation, registers, mask, dropout, rng, layer=LAYER) -> Tensor:
    """The definition, in z's dtype."""
    y = plain.ACTIVATIONS[activation](z)
    if dropout:
        positions = z[0].numel()
        y = y * philox.keep_mask(rng, layer, philox.DROPOUT, z.shape[0], positions, dropout, torch.float32).view(
            z.shape
        )
    if scale is not None:
        y = y * scale.to(y.dtype)
    if mask is not None:
        y = y * mask.to(y.dtype)[:, None, None]
    y = plain.without_registers(y, registers)
    return y if residual is None else residual.to(y.dtype) + y


def both(z, scale, residual, grad, activation="gelu", registers=0, mask=None, dropout=0.0, rng=None, layer=LAYER):
    """(y, dz, dscale, dbias) of the kernels."""
    masks = (mask, residual, registers, dropout, rng, layer)
    y = OPS.linear_epilogue_fwd(z, activation, scale, *masks)
    return y, *OPS.linear_epilogue_bwd(grad, z, activation, scale, mask, registers, dropout, rng, layer)


def wanted(z, scale, residual, grad, activation="gelu", registers=0, mask=None, dropout=0.0, rng=None, layer=LAYER):
    """The same by autograd."""
    shift = torch.zeros(z.shape[2], dtype=z.dtype)
    leaves = [z, shift, *([] if scale is None else [scale.to(z.dtype)])]

    def call(z, shift, scale=None):
        return epilogue(z + shift, scale, residual, activation, registers, mask, dropout, rng, layer)

    (y,), (dz, dbias, *dscale) = differentiate(call, leaves, [grad])
    return y, dz, dscale[0] if dscale else dbias.new_empty(0), dbias


def assert_right(got, z, scale, residual, grad, *rest, **more) -> None:
    """By the rule of _numerics, PyTorch's peer computing in z's dtype."""
    wide = lambda t: None if t is None else t.double()  # noqa: E731
    exact = wanted(*(wide(t) for t in (z, scale, residual, grad)), *rest, **more)
    grad_ = grad.to(z.dtype) if residual is None else grad
    peer = wanted(z, scale, residual, grad_, *rest, **more)
    rows = z.shape[0] * z.shape[1]
    for i, name in enumerate(("y", "dz", "dscale", "dbias")):
        assert_as_exact(name, got[i], exact[i], peer[i], rows=rows if i > 1 else 1, k=3.0)


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("activation", sk.ACTIVATIONS)
def test_activations_over_their_range(activation, dtype):
    """Errors of the value and of the slope are a few units of fp32 (fp64), then one rounding to 16 bits."""
    z = torch.linspace(-12, 12, 3072, dtype=torch.float64).view(1, 24, 128).to(dtype)
    one = torch.ones_like(z)
    y, dz, _, _ = both(z, None, None, one, activation)
    exact = wanted(z.double(), None, None, one.double(), activation)
    accurate = 1e-14 if dtype == torch.float64 else 1e-6
    for got, want in ((y, exact[0]), (dz, exact[1])):
        near = want.abs() * (torch.finfo(dtype).eps / 2 if dtype.itemsize == 2 else 0)
        spacing = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        assert ((got.double() - want).abs() <= near + accurate * (1 + want.abs()) + spacing).all()


@pytest.mark.parametrize("activation", sk.ACTIVATIONS)
def test_special_values(activation):
    z = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 3e4, -3e4, 1e-30]).view(1, 1, 8)
    y, dz, _, _ = both(z, None, None, torch.ones_like(z), activation)
    assert y[0, 0, 0].isnan()
    leaf = z.clone().requires_grad_()
    right = sk.activation(leaf, activation, backend="reference")
    (slope,) = torch.autograd.grad(right.sum(), leaf)
    finite = torch.isfinite(z) & (z.abs() < 1e3 if activation == "fast_gelu" else True)  # x³, say, overflows there
    torch.testing.assert_close(y[finite], right[finite].detach(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(dz[finite], slope[finite], rtol=1e-6, atol=1e-7)
    if activation in ("kelu", "relu", "leaky_relu", "tanh", "sigmoid"):
        torch.testing.assert_close(y[0, 0, 1:3], right[0, 0, 1:3].detach())


@pytest.mark.parametrize("columns", [12, 7, 130])
@pytest.mark.parametrize("state", [(0, 0, 0), (2**62 + 12345, 2**31 + 7, 2**20), (-5, 3, 2**32 - 2)], ids=str)
def test_dropout_mask_is_the_references_to_the_bit(state, columns):
    rng = torch.tensor(state, dtype=torch.int64)
    z = torch.ones(3, 21, columns)
    for rate, layer in ((0.3, 0), (0.9, 2**29 + 1)):
        want = philox.keep_mask(rng, layer, philox.DROPOUT, 3, 21 * columns, rate, torch.float32).view(z.shape)
        y, dz, _, dbias = both(z, None, None, z, "none", dropout=rate, rng=rng, layer=layer)
        assert torch.equal(y, want) and torch.equal(dz, want)
        torch.testing.assert_close(dbias, want.sum((0, 1)))


def test_dropout_far_into_a_sample(monkeypatch):
    """Positions beyond 2³²; of the programs only the last is run. Memory that nobody touches costs nothing."""
    rows, columns, rng, block = 2**12 + 16, 2**20, sk.make_rng(3, 1), 128
    z = torch.ones((), dtype=torch.float16).expand(1, rows, columns)
    y = torch.empty(rows * columns, dtype=torch.float16)
    program_id = InterpreterBuilder.create_get_program_id

    def last(self, axis):
        handle = program_id(self, axis)
        handle.data = handle.data + np.int32(rows // 16 * (columns // block) - 1)
        return handle

    monkeypatch.setattr(InterpreterBuilder, "create_get_program_id", last)
    constants = {"ROWS": 16, "BLOCK": block, "ACTIVATION": "none", "DROPOUT": True, "BY": 1, "QUADS": True}
    drawing = linear.dropout_arguments(0.5, LAYER)
    sizes = (rows, rows, columns, 0, *drawing, 1, *z.stride(), 0, 0, 0)
    linear.kernels.forward[(1,)](z, None, None, None, rng, y, *sizes, **constants, ACC=tl.float32)
    position = torch.arange(rows * columns - 64, rows * columns)
    step, place = torch.tensor(1), torch.tensor(LAYER * 4)
    words = philox.philox((position // 4, torch.tensor(0), step, place), (torch.tensor(3), torch.tensor(0)))
    kept = torch.stack(words)[position % 4, torch.arange(64)] >= 2**31
    assert y[-64:].tolist() == (2.0 * kept).tolist() and 16 < kept.sum() < 48


@pytest.mark.parametrize("layout", ["rows", "odd rows"])
@pytest.mark.parametrize("width", WIDTHS)
def test_every_configuration_inside_guard_bands(width, layout, guarded, monkeypatch):
    """As it ships: several tiles of rows and of columns, the last of them cut; registers whose rows are NaN; masks."""
    dtype, asked = WIDTHS[width], []
    monkeypatch.setattr(
        linear, "configuration", lambda x, *key: asked.append("/".join(key[1:])) or _launch.configuration(x, *key)
    )
    columns = 136 if layout == "rows" else 131
    z, residual, grad = (tokens(3, 21, columns, dtype, 7 * i) for i in range(3))
    scale, mask, rng = normal(columns, seed=5, dtype=torch.float32), torch.tensor([1.25, 0.0, 1.25]), sk.make_rng(1, 2)
    more = ("kelu", REGISTERS, mask, RATE, rng)
    want = both(z, scale, residual, grad, *more)
    assert_right(want, z, scale, residual, grad, *more)
    for t in (z, grad):
        t[:, :REGISTERS] = float("nan")
    z[1], grad[1] = float("nan"), float("nan")  # dropped by the path's mask
    got = both(*(guarded.inside(t) for t in (z, scale, residual, grad)), *more)
    assert guarded.allocations >= 5
    assert set(asked) == {f"forward/{layout}", f"backward/{layout}", "add_partials"}
    assert torch.equal(got[0], want[0]) and all(torch.equal(a, b) for a, b in zip(got[1:], want[1:], strict=True))
    assert torch.equal(got[0][:, :REGISTERS], residual[:, :REGISTERS]) and torch.equal(got[0][1], residual[1])
    assert not got[1][:, :REGISTERS].any() and not got[1][1].any()


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("parts", ["nothing", "scale", "residual", "both"])
def test_each_argument_alone(parts, dtype, guarded):
    z, residual, grad = (tokens(2, 5, 24, dtype, 7 * i) for i in range(3))
    scale = normal(24, seed=9, dtype=dtype) if parts in ("scale", "both") else None
    residual = residual if parts in ("residual", "both") else None
    for activation in ("none", "gelu"):
        got = both(*(guarded.inside(t) for t in (z, scale, residual, grad)), activation)
        assert_right(got, z, scale, residual, grad, activation)
        assert (
            got[0].is_contiguous()
            and got[1].is_contiguous()
            and got[2].shape == (24 if parts in ("scale", "both") else 0,)
        )


@pytest.mark.parametrize("z_dtype", FLOATING[1:], ids=str)
@pytest.mark.parametrize("residual_dtype", FLOATING[1:], ids=str)
def test_residual_of_another_dtype(z_dtype, residual_dtype):
    """The output takes it, and it is rounded once."""
    z, residual = tokens(2, 5, 24, z_dtype), tokens(2, 5, 24, residual_dtype, 7)
    grad, scale = tokens(2, 5, 24, residual_dtype, 14), normal(24, seed=9, dtype=torch.float32)
    y, dz, dscale, dbias = both(z, scale, residual, grad, "kelu")
    assert (y.dtype, dz.dtype, dscale.dtype, dbias.dtype) == (residual_dtype, z_dtype, torch.float32, torch.float32)
    exact = wanted(z.double(), scale.double(), residual.double(), grad.double(), "kelu")
    for got, want in zip((y, dz, dscale, dbias), exact, strict=True):
        torch.testing.assert_close(got.double(), want.double(), rtol=torch.finfo(got.dtype).eps, atol=1e-5)


def test_any_strides_inside_guard_bands(guarded):
    z, residual, grad = (normal(3, 6, 20, seed=i) for i in range(3))
    scale = layouts(normal(20, seed=9)[None])["gaps"][0]
    want = wanted(z, scale, residual, grad, "selu", 1)
    names, gradients = list(layouts(z)), hostile(grad)
    for i, name in enumerate(names):
        a, b = layouts(z)[name], layouts(residual)[names[(i + 1) % len(names)]]
        y = OPS.linear_epilogue_fwd(
            guarded.inside(a), "selu", guarded.inside(scale), None, guarded.inside(b), 1, 0.0, None, 0
        )
        torch.testing.assert_close(y, want[0], **EXACT)
        for kind, g in gradients.items():
            right = wanted(z, scale, residual, g, "selu", 1)
            g = g if 0 in g.stride() else guarded.inside(g)
            got = OPS.linear_epilogue_bwd(g, guarded.inside(a), "selu", scale, None, 1, 0.0, None, 0)
            for result, one in zip(got, right[1:], strict=True):
                torch.testing.assert_close(result, one, **EXACT, msg=lambda t, n=name, k=kind: f"{n}, {k}: {t}")


def test_blocks_of_several_tiles(monkeypatch):
    z, residual, grad = (normal(5, 23, 20, seed=i) for i in range(3))
    scale = normal(20, seed=9)
    want = wanted(z, scale, residual, grad, "tanh", 3)
    for blocks in (1, 2, 3, 1000):
        monkeypatch.setitem(TABLE["linear/backward/rows/32bit"], "blocks", blocks)
        got = both(z, scale, residual, grad, "tanh", 3)
        for result, one in zip(got, want, strict=True):
            torch.testing.assert_close(result, one, **EXACT)


@pytest.mark.parametrize(
    ("shape", "registers"), [((0, 5, 8), 0), ((2, 0, 8), 0), ((2, 3, 8), 3), ((2, 1, 1), 0)], ids=str
)
def test_little_and_nothing(shape, registers):
    z, residual, grad = (normal(*shape, seed=i) for i in range(3))
    scale = normal(shape[2], seed=9)
    got = both(z, scale, residual, grad, "sigmoid", registers)
    for result, one in zip(got, wanted(z, scale, residual, grad, "sigmoid", registers), strict=True):
        torch.testing.assert_close(result, one, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_determinism(dtype):
    """Twice the same bits; y and dz of a sample by itself, or elsewhere in another batch, are the same too."""
    z, residual, grad = (tokens(4, 21, 40, dtype, 7 * i) for i in range(3))
    scale = normal(40, seed=9, dtype=torch.float32)
    more = ("gelu", 3)
    first = both(z, scale, residual, grad, *more)
    assert all(torch.equal(a, b) for a, b in zip(first, both(z, scale, residual, grad, *more), strict=True))
    for batch in ([2], [3, 2], [2, 0, 1]):
        again = both(z[batch], scale, residual[batch], grad[batch], *more)
        assert torch.equal(again[0], first[0][batch]) and torch.equal(again[1], first[1][batch])


@pytest.mark.parametrize("activation", ["kelu", "gelu", "none"])
def test_gradcheck_of_the_public_operator(activation):
    shapes = ((2, 4, 3), (5, 3), (5,), (5,), (2, 4, 5))
    inputs = [normal(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes)]

    def call(x, weight, bias, scale, residual):
        more = {"registers": 1, "dropout": 0.3, "drop_path": 0.3, "rng": sk.make_rng(3, 1), "layer": 2}
        return sk.linear(
            x, weight, bias, activation=activation, layer_scale=scale, residual=residual, backend="triton", **more
        )

    assert torch.autograd.gradcheck(call, inputs)


def gemm_inputs(dtype, batch=2, tokens_=75, depth=40, columns=72):
    x, residual = tokens(batch, tokens_, depth, dtype, 1), tokens(batch, tokens_, columns, dtype, 2)
    weight, bias = normal(columns, depth, seed=3, dtype=dtype, scale=depth**-0.5), normal(columns, seed=4, dtype=dtype)
    return x, weight, bias, normal(columns, seed=5, dtype=torch.float32), residual


def gemm_forward(x, weight, bias, scale, residual, activation, masks=True, keep=True, registers=REGISTERS):
    mask = torch.tensor([1.25, 0.0, 1.25])[: x.shape[0]] if masks else None
    more = (registers, RATE if masks else 0.0, sk.make_rng(1, 2) if masks else None, LAYER)
    return OPS.linear_gemm_fwd(x, weight, bias, activation, scale, mask, residual, *more, keep)


def spied(monkeypatch) -> list[str]:
    """The table's entries that the GEMMs ask for and find."""
    asked: list[str] = []

    def configuration(x, *key):
        found = _launch.configuration(x, *key)
        asked.extend("/".join(key[1:]) for _ in [0] if found)
        return found

    monkeypatch.setattr(_linear_gemm, "configuration", configuration)
    return asked


def assert_gemm(x, weight, bias, scale, residual, activation, guard=lambda t: t, **more) -> None:
    """Both GEMMs against fp64; PyTorch's peers computing in x's dtype."""
    exact = [t.double() for t in (x, weight, bias, scale, residual)]
    y, z = gemm_forward(*(guard(t) for t in (x, weight, bias, scale, residual)), activation, **more)
    z_exact, z_peer = plain.linear(*exact[:3]), plain.linear(x, weight, bias)
    masks, registers = more.get("masks", True), more.get("registers", REGISTERS)
    mask = torch.tensor([1.25, 0.0, 1.25])[: x.shape[0]] if masks else None
    rest = (activation, registers, mask, RATE if masks else 0.0, sk.make_rng(1, 2))
    want, peer = epilogue(z_exact, exact[3], exact[4], *rest), epilogue(z_peer, scale, residual, *rest)
    assert_as_exact("y", y, want, peer, k=3.0, rows=x.shape[2])
    if activation == "none":
        assert z.shape == (0,)
    else:
        assert_as_exact("z", z, z_exact, z_peer, k=3.0, rows=x.shape[2])
    d = plain.without_registers(residual, registers)
    dz, h, dbias = OPS.linear_gemm_bwd(guard(d), guard(weight), guard(x), activation, registers)
    for name, got, form in (("dz", dz, 0), ("h", h, 1), ("dbias", dbias, 2)):
        results = []
        for dtype in (torch.float64, x.dtype):
            before = x.to(dtype).requires_grad_()
            value = plain.without_registers(plain.ACTIVATIONS[activation](before), registers)
            (right,) = torch.autograd.grad(value, before, d.to(dtype) @ weight.to(dtype))
            results.append((right, value.detach(), right.sum((0, 1)))[form])
        assert_as_exact(name, got, *results, k=3.0, rows=weight.shape[0] + x.shape[1] * (form == 2))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("way", ["descriptors", "pointers", "odd"])
def test_gemm_configurations_inside_guard_bands(way, width, guarded, monkeypatch):
    """As they ship, tiles cut in both directions and in depth; descriptors only where the table has them."""
    asked, dtype = spied(monkeypatch), WIDTHS[width]
    sizes = (41, 73) if way == "odd" else (136, 200) if width == "16bit" else (40, 72)
    inputs = gemm_inputs(dtype, 2, 75, *sizes)
    if way == "pointers":  # rows of the residual and of z not evenly spaced
        apart = lambda t: torch.cat([t, t[:, :1]], 1)[:, :-1]  # noqa: E731
        inputs = (apart(inputs[0]), *inputs[1:4], apart(inputs[4]))
    assert_gemm(*inputs, "gelu", guarded.inside)
    described = way == "descriptors" and width == "16bit"
    assert set(asked) == {f"gemm_{p}/{'descriptors' if described else 'pointers'}" for p in ("forward", "backward")}


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("activation", ["none", "kelu", "selu"])
def test_gemm_without_masks(activation, dtype):
    assert_gemm(*gemm_inputs(dtype, 1, 20, 24, 16), activation, masks=False, registers=0)


def test_gemm_keeps_the_preactivation_only_where_it_is_wanted():
    inputs = gemm_inputs(torch.bfloat16, 1, 20, 24, 16)
    y, z = gemm_forward(*inputs, "gelu")
    again, nothing = gemm_forward(*inputs, "gelu", keep=False)
    assert nothing.shape == (0,) and z.shape == y.shape and torch.equal(again, y)
    torch.testing.assert_close(z, torch.nn.functional.linear(*inputs[:3]), rtol=0.01, atol=0.01)


def test_gemm_is_repeatable_and_rows_depend_on_themselves_alone():
    x, weight, bias, scale, residual = gemm_inputs(torch.bfloat16, 3, 60, 40, 72)
    first = gemm_forward(x, weight, bias, scale, residual, "gelu", masks=False)
    back = OPS.linear_gemm_bwd(residual, weight, x, "gelu", REGISTERS)
    assert all(torch.equal(a, b) for a, b in zip(back, OPS.linear_gemm_bwd(residual, weight, x, "gelu", REGISTERS)))
    for batch in ([1], [2, 0]):
        alone = gemm_forward(x[batch], weight, bias, scale, residual[batch], "gelu", masks=False)
        assert all(torch.equal(a, b[batch]) for a, b in zip(alone, first))
        one = OPS.linear_gemm_bwd(residual[batch], weight, x[batch], "gelu", REGISTERS)
        assert torch.equal(one[0], back[0][batch]) and torch.equal(one[1], back[1][batch])


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (2, 2)], ids=str)
def test_gemm_of_nothing(shape):
    """No rows, or register rows alone."""
    x, weight, bias, scale, residual = gemm_inputs(torch.float32, *shape, 8, 16)
    y, z = gemm_forward(x, weight, bias, scale, residual, "gelu", masks=False)
    assert y.shape == z.shape == (*shape, 16) and torch.equal(y, residual)
    dz, h, dbias = OPS.linear_gemm_bwd(residual, weight, x, "gelu", REGISTERS)
    assert dz.shape == h.shape == x.shape and not dz.any() and not h.any() and not dbias.any()


def test_gemm_of_tf32_only_where_pytorch_allows_it():
    assert _linear_gemm.precision(torch.float32) == "ieee"
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        assert _linear_gemm.precision(torch.float32) == "tf32" and _linear_gemm.precision(torch.bfloat16) == "ieee"
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


CHANNELS, HIDDEN = 16, 64


def block(x, *weights):
    more = {"registers": 1, "activation": "kelu", "drop_path": 0.3, "rng": sk.make_rng(3, 1)}
    return sk.conv_mlp(x, sk.ConvMLPWeights(*weights), grid=(2, 3), **more, backend="triton")


def test_the_table_chooses_between_the_vendors_gemm_and_ours(monkeypatch):
    """linear and conv_mlp, forward and backward: off as committed; on, the results are the same."""
    asked = spied(monkeypatch)
    shapes = ((2, 7, CHANNELS), *conv_mlp_shapes(CHANNELS, HIDDEN))
    inputs = [normal(*s, seed=i, dtype=torch.float32, scale=0.5) for i, s in enumerate(shapes)]
    grads = [normal(2, 7, CHANNELS, seed=40, dtype=torch.float32)]
    vendor = differentiate(block, inputs, grads)
    more = {"activation": "gelu", "layer_scale": inputs[4], "residual": inputs[0], "registers": 1, "backend": "triton"}
    call = lambda x, weight: sk.linear(x, weight, **more)  # noqa: E731
    single = differentiate(call, [inputs[0], inputs[5]], grads)
    assert not [key for key in asked if key.startswith("gemm")]
    for pass_ in ("forward", "backward"):
        for form in ("square", "expand", "project"):
            monkeypatch.setitem(TABLE, f"linear/form/{pass_}/{form}/32bit", {"gemm": 1})
    asked.clear()
    ours = differentiate(block, inputs, grads)
    assert asked.count("gemm_forward/pointers") == 3 and asked.count("gemm_backward/pointers") == 1
    asked.clear()
    ours += differentiate(call, [inputs[0], inputs[5]], grads)
    assert asked.count("gemm_forward/pointers") == 1
    for a, b in zip(sum(ours, ()), sum(vendor + single, ()), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


def test_forms_are_listed_for_every_class_and_off_until_measured():
    for out, depth, form in (
        (3072, 768, "expand"),
        (768, 3072, "project"),
        (768, 768, "square"),
        (1000, 768, "square"),
    ):
        assert _linear_gemm.form(torch.empty(out, depth)) == form
        x = torch.empty(1, dtype=torch.bfloat16)
        for kernel, pass_ in (("linear_gemm_fwd", "forward"), ("linear_gemm_bwd", "backward")):
            assert f"linear/form/{pass_}/{form}/16bit" in TABLE
            assert _linear_gemm.prefers(kernel, x, torch.empty(out, depth)) is False


@pytest.mark.parametrize("form", ["vendor", "ours"])
def test_compiled_with_either_form(form, monkeypatch):
    """One graph; what the table says, for which the device is asked, is a constant there."""
    if form == "ours":
        monkeypatch.setitem(TABLE, "linear/form/forward/square/32bit", {"gemm": 1})
    monkeypatch.setattr(_launch, "capability_of", lambda device: json.loads("90"))
    x, weight = normal(2, 7, 16, dtype=torch.float32), normal(16, 16, seed=1, dtype=torch.float32)
    call = lambda x, weight: sk.linear(x, weight, activation="gelu", registers=1, backend="triton")  # noqa: E731
    want = differentiate(call, [x, weight])
    torch._dynamo.reset()
    launched = []
    run = _linear_gemm.launch
    monkeypatch.setattr(_linear_gemm, "launch", lambda *a, **more: launched.append(a[0]) or run(*a, **more))
    got = differentiate(torch.compile(call, fullgraph=True, backend="aot_eager"), [x, weight])
    assert len(launched) == (form == "ours")
    for a, b in zip(sum(got, ()), sum(want, ()), strict=True):
        torch.testing.assert_close(a, b)
