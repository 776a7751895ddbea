"""LayerNorm2d's Triton kernels against fp64: every configuration that ships, every layout, registers, residual."""

from __future__ import annotations

import _plain as plain
import cases
import pytest
import torch
from _layouts import hostile, layouts, normal

import sdp_kernels as sk
from sdp_kernels.triton import _launch, layer_norm_2d

OPS = cases.OPS
TABLE = _launch.table_for(90)
EXACT = {"rtol": 1e-10, "atol": 1e-11}
WIDTHS = {"16bit": torch.bfloat16, "32bit": torch.float32}


def _production():
    """(layout, channels, width): for each tile of all channels in the table, three quarters of its channels."""
    keys = [key.split("/") for key in TABLE if key.startswith(("layer_norm_2d/forward", "layer_norm_2d/backward"))]
    return sorted(
        {(layout, int(block) * 3 // 4 - (layout == "odd rows"), width) for _, _, layout, block, width in keys}
    )


def _nothing_fits(monkeypatch):
    """Leave the two-pass kernels only."""
    for key in [k for k in TABLE if k.startswith(("layer_norm_2d/forward", "layer_norm_2d/backward"))]:
        monkeypatch.delitem(TABLE, key)


def _block(pass_, layout, channels, width):
    """The class that these channels fall into, None if their tile does not fit."""
    fits = [b for b in layer_norm_2d.CHANNEL_CLASSES if f"layer_norm_2d/{pass_}/{layout}/{b}/{width}" in TABLE]
    return next((b for b in fits if b >= channels), None)


@pytest.mark.parametrize(("layout", "channels", "width"), _production())
def test_every_configuration_inside_guard_bands(layout, channels, width, guarded, monkeypatch):
    """As it ships, on a few rows: more than one tile, the last of them cut; a residual; blocks of several tiles."""
    dtype = WIDTHS[width]
    blocks = {p: _block(p, layout, channels, width) for p in ("forward", "backward")}
    pixels = max(TABLE[f"layer_norm_2d/{p}/{layout}/{b}/{width}"]["pixels"] for p, b in blocks.items() if b) + 4
    pixels = pixels // 4 * 4 + (layout == "odd columns")
    asked = []

    def configuration(x, *key):
        found = _launch.configuration(x, *key)
        asked.extend(key for _ in [0] if found)
        return found

    monkeypatch.setattr(layer_norm_2d, "configuration", configuration)
    memory = layout.removeprefix("odd ")
    x, residual, grad, grad_sum = (cases.picture(2, channels, 1, pixels, memory, dtype, 100 * i) for i in range(4))
    weight, bias = cases.parameters(channels)
    arguments = (x, weight, bias, residual, grad, grad_sum)
    got = cases.norm(*(guarded.inside(t) for t in arguments))
    assert guarded.allocations >= 8
    assert {("layer_norm_2d", p, layout, b) for p, b in blocks.items() if b} <= set(asked)
    cases.assert_norm(got, *arguments)


@pytest.mark.parametrize(("pass_", "layout", "width"), [
    (p, layout, w) for p in ("forward", "backward") for layout in ("rows", "columns", "odd columns") for w in WIDTHS
])  # fmt: skip
def test_both_sides_of_the_border_between_one_pass_and_two(pass_, layout, width, guarded, monkeypatch):
    """The widest tile that is read once, and one channel more, which is read twice; with a residual and without."""
    asked = []

    def configuration(x, *key):
        asked.append(key[1])
        return _launch.configuration(x, *key)

    monkeypatch.setattr(layer_norm_2d, "configuration", configuration)
    border = max(b for b in layer_norm_2d.CHANNEL_CLASSES if _block(pass_, layout, b, width))
    two = {"forward": {"statistics", "normalise"}, "backward": {"row_means", "apply"}}[pass_]
    for channels in (border, border + 1):
        shape, memory = (1, channels, 1, 5 if "odd" in layout else 4), layout.removeprefix("odd ")
        x, residual, grad, grad_sum = (cases.picture(*shape, memory, WIDTHS[width], i) for i in range(4))
        weight, bias = cases.parameters(channels)
        more = (residual, grad, grad_sum) if channels > border or layout == "rows" else (None, grad, None)
        arguments = (x, weight, bias, *more)
        asked.clear()
        cases.assert_norm(cases.norm(*(guarded.inside(t) for t in arguments), only=pass_), *arguments)
        assert (two <= set(asked)) == (channels > border)


@pytest.mark.parametrize("pass_", ["whole", "passes"])
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_blocks_of_several_tiles(layout, pass_, monkeypatch):
    """As in a big picture, where a block sums over many tiles and samples; the last block has fewer."""
    channels = 24
    x, grad = cases.picture(5, channels, 8, 13, layout, seed=3), cases.picture(5, channels, 8, 13, layout, seed=4)
    weight, bias = cases.parameters(channels)
    if pass_ == "passes":
        _nothing_fits(monkeypatch)
        for name in ("statistics", "normalise", "row_means", "apply"):
            entry = TABLE[f"layer_norm_2d/{name}/{layout}/32bit"]
            monkeypatch.setitem(entry, "block", 16)
            monkeypatch.setitem(entry, "pixels", 32)
        backward = TABLE[f"layer_norm_2d/apply/{layout}/32bit"]
    else:
        backward = TABLE[f"layer_norm_2d/backward/{layout}/64/32bit"]
    for blocks, ahead in ((1, 0), (3, 1), (3, 0)):
        monkeypatch.setitem(backward, "blocks", blocks)
        monkeypatch.setitem(backward, "ahead", ahead)
        cases.assert_norm(cases.norm(x, weight, bias, grad=grad), x, weight, bias, grad=grad)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(2, 1, 3, 3), (3, 5, 1, 1), (2, 8, 7, 7), (2, 12, 1, 5), (2, 12, 5, 1)], ids=str)
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_small_shapes_inside_guard_bands(shape, layout, dtype, guarded):
    x, grad = cases.picture(*shape, layout, dtype, 1), cases.picture(*shape, layout, dtype, 2)
    weight, bias = cases.parameters(shape[1], dtype)
    got = cases.norm(*(guarded.inside(t) for t in (x, weight, bias)), grad=guarded.inside(grad))
    cases.assert_norm(got, x, weight, bias, grad=grad)
    for i in (0, 4):
        assert got[i].stride() == torch.empty_like(x).stride()
    assert got[3].shape == (0,)


@pytest.mark.parametrize("shape", [(2, 5, 3, 4), (3, 6, 5)], ids=["picture", "tokens"])
def test_any_strides_inside_guard_bands(shape, guarded):
    """x, residual and gradients in every layout, one with the next, against the contiguous case."""
    registers = 2 if len(shape) == 3 else 0
    channels = shape[1] if len(shape) == 4 else shape[2]
    x, residual, grad, grad_sum = (normal(*shape, seed=i) for i in range(4))
    weight, bias = cases.parameters(channels, torch.float64)
    weight, bias = layouts(weight[None])["gaps"][0], layouts(bias[None])["gaps"][0]
    want = cases.norm(x, weight, bias, residual, grad, grad_sum, registers)
    odd = [layouts(t) for t in (x, residual)]
    names = list(odd[0])
    kinds = [hostile(grad), hostile(grad_sum)]
    right = {
        kind: OPS.layer_norm_2d_bwd(
            kinds[0][kind].contiguous(), kinds[1][kind].contiguous(), want[3], weight, *want[1:3], registers
        )
        for kind in kinds[0]
    }
    for i, name in enumerate(names):
        a, b = odd[0][name], odd[1][names[(i + 1) % len(names)]]
        y, mean, rstd, total = OPS.layer_norm_2d_fwd(
            guarded.inside(a), guarded.inside(b), guarded.inside(weight), guarded.inside(bias), 1e-6, registers
        )
        for got, wanted in zip((y, mean, rstd, total), want, strict=False):
            torch.testing.assert_close(got, wanted, **EXACT, msg=lambda t, n=name: f"{n}: {t}")
        assert y.stride() == total.stride() == torch.empty_like(a).stride()
        for kind in kinds[0]:
            g, s = kinds[0][kind], kinds[1][kind]
            got = OPS.layer_norm_2d_bwd(g, s, guarded.inside(layouts(want[3])[name]), weight, mean, rstd, registers)
            assert got[0].stride() == torch.empty_like(layouts(want[3])[name]).stride()
            for result, wanted in zip(got, right[kind], strict=True):
                torch.testing.assert_close(result, wanted, **EXACT, msg=lambda t, n=name, k=kind: f"{n}, {k}: {t}")


@pytest.mark.parametrize("layout", ["contiguous", "swapped"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("passes", [False, True])
def test_register_rows(dtype, layout, passes, guarded, monkeypatch):
    """Written as 0, or as the residual's gradient; whatever they hold, NaN too, nothing else sees it."""
    if passes:
        _nothing_fits(monkeypatch)
    r = 3
    x, residual, grad, grad_sum = (normal(2, 9, 24, seed=i, dtype=dtype) for i in range(4))
    weight, bias = cases.parameters(24, dtype)
    laid = lambda t: layouts(t)[layout]  # noqa: E731
    clean = cases.norm(laid(x), weight, bias, residual, grad, grad_sum, r)
    cases.assert_norm(clean, x, weight, bias, residual, grad, grad_sum, r)
    assert torch.equal(clean[4][:, :r], grad_sum[:, :r])
    for t in (x, residual, grad):
        t[:, :r] = float("nan")
    spoilt = cases.norm(guarded.inside(laid(x)), weight, bias, residual, grad, grad_sum, r)
    for i in (0, 1, 2, 4, 5, 6):
        assert torch.equal(spoilt[i], clean[i])
    assert not spoilt[0][:, :r].any()
    no_sum = cases.norm(x, weight, bias, None, grad, None, r)
    assert not no_sum[4][:, :r].any() and all(torch.isfinite(no_sum[i]).all() for i in (0, 1, 2, 4, 5, 6))


@pytest.mark.parametrize(("tokens", "registers"), [(1, 1), (4, 4), (1, 0)])
def test_nothing_but_register_rows(tokens, registers):
    x, grad, grad_sum = (normal(3, tokens, 8, seed=i) for i in range(3))
    weight, bias = cases.parameters(8, torch.float64)
    got = cases.norm(x, weight, bias, None, grad, grad_sum, registers)
    cases.assert_norm(got, x, weight, bias, None, grad, grad_sum, registers)
    if registers:
        assert torch.equal(got[4], grad_sum) and not any(got[i].any() for i in (0, 1, 2, 5, 6))


@pytest.mark.parametrize("shape", [(0, 5, 3, 4), (2, 5, 0, 4), (0, 7, 5), (2, 0, 5)], ids=str)
def test_nothing(shape):
    x = torch.empty(shape)
    channels = shape[1] if len(shape) == 4 else shape[2]
    weight, bias = cases.parameters(channels)
    for residual in (None, x):
        y, _, _, total, dx, dweight, dbias = cases.norm(x, weight, bias, residual, x, residual)
        assert y.shape == dx.shape == x.shape and (residual is None or total.shape == x.shape)
        assert dweight.shape == dbias.shape == (channels,) and not dweight.any() and not dbias.any()


def test_parameters_of_another_dtype():
    for dtype in (torch.bfloat16, torch.float64):
        x, grad = cases.picture(2, 20, 3, 4, dtype=dtype), cases.picture(2, 20, 3, 4, dtype=dtype, seed=5)
        weight, bias = cases.parameters(20, torch.float32)
        got = cases.norm(x, weight, bias, grad=grad)
        assert got[5].dtype == got[6].dtype == torch.float32 and got[0].dtype == dtype
        cases.assert_norm(got, x, weight, bias, grad=grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["rows", "columns", "tokens"])
def test_determinism(layout, dtype):
    """Twice the same bits; outputs and dx of a sample by itself, or elsewhere in another batch, are the same too."""
    if layout == "tokens":
        x, grad = (normal(4, 40, 24, seed=i, dtype=dtype) for i in range(2))
        registers = 3
    else:
        x, grad = (cases.picture(4, 24, 7, 7, layout, dtype, i) for i in range(2))
        registers = 0
    weight, bias = cases.parameters(24)
    first = cases.norm(x, weight, bias, x, grad, grad, registers)
    for a, b in zip(first, cases.norm(x, weight, bias, x, grad, grad, registers), strict=True):
        assert torch.equal(a, b)
    for batch in ([2], [3, 2], [2, 0, 1]):
        fresh = [t[batch].clone(memory_format=torch.preserve_format) for t in (x, grad)]
        again = cases.norm(fresh[0], weight, bias, fresh[0], fresh[1], fresh[1], registers)
        for i in range(5):
            assert torch.equal(again[i], first[i][batch])
    alone = cases.norm(x[2:3], weight, bias, x[2:3], grad[2:3], grad[2:3], registers)
    for i in range(5):
        assert torch.equal(alone[i], first[i][2:3])


def test_batch_size_does_not_choose_the_variant():
    """What is compiled in (and so the order of a row's sums) is the same for one sample and for many."""
    variants = set()
    for layout in ("rows", "columns"):
        for batch in (1, 2, 5):
            x = cases.picture(batch, 24, 7, 7, layout)
            g = layer_norm_2d.geometry([x, x], 0)
            constants = g.constants(0, x, 8, 64, X=g.strides[0])
            variants.add((layout, *((k, v) for k, v in constants.items()), g.strides[0][2:]))
    assert len(variants) == 2


def test_offsets_beyond_32_bits():
    """Batch, channel and pixel strides of 2³⁰ and more; memory that nobody touches costs nothing."""
    big = torch.empty(2**32 + 4096, dtype=torch.float16)
    weight, bias = cases.parameters(4)
    near_and_far = ((2**31, 6, 3, 1), (1024, 2**30, 3, 1), (64, 1, 3 * 2**29, 2**29), (64, 1, 16, 2**30))
    for strides in near_and_far:
        x = big.as_strided((2, 4, 2, 3), strides)
        values = normal(2, 4, 2, 3, seed=1, dtype=torch.float16)
        x.copy_(values)
        got, want = cases.norm(x, weight, bias, grad=x), cases.norm(values, weight, bias, grad=values)
        for i in (0, 1, 2, 4, 5, 6):
            torch.testing.assert_close(got[i], want[i], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["picture", "channels_last", "tokens", "residual", "tokens with residual", "passes"])
def test_gradcheck(name, monkeypatch):
    if name == "passes":
        _nothing_fits(monkeypatch)
        for kernel in ("statistics", "normalise", "row_means", "apply"):
            monkeypatch.setitem(TABLE[f"layer_norm_2d/{kernel}/columns/32bit"], "block", 16)
    channels = 18 if name == "passes" else 3
    x = normal(1, 3, channels, seed=1) if "tokens" in name else normal(1, channels, 1, 2, seed=1)
    x = x.contiguous(memory_format=torch.channels_last) if name == "channels_last" else x
    residual = [normal(*x.shape, seed=2)] if "residual" in name else []
    registers = 1 if "tokens" in name else 0
    inputs = [t.requires_grad_() for t in (x, *cases.parameters(channels, torch.float64), *residual)]

    def call(x, weight, bias, residual=None):
        return sk.layer_norm_2d(x, weight, bias, residual=residual, registers=registers, backend="triton")

    assert torch.autograd.gradcheck(call, inputs, fast_mode=name == "passes")


def test_gradient_through_the_public_operator_twice():
    inputs = [t.requires_grad_() for t in (normal(1, 3, 1, 2, seed=1), *cases.parameters(3, torch.float64))]
    assert torch.autograd.gradgradcheck(lambda *t: sk.layer_norm_2d(*t, backend="triton"), inputs)


def test_large_mean_does_not_cancel():
    """A mean of 1000 at a deviation of 1: the two-pass variance, and the merged one, keep their digits."""
    weight, bias = cases.parameters(2049)
    for channels, layout in ((96, "columns"), (96, "rows"), (2049, "columns")):
        x = 1000 + cases.picture(1, channels, 1, 3, layout)
        y, *_ = OPS.layer_norm_2d_fwd(x, None, weight[:channels], bias[:channels], 1e-6, 0)
        want = plain.layer_norm_2d(x.double(), weight[:channels].double(), bias[:channels].double(), 1e-6)
        assert (y.double() - want).abs().max() < 2e-3
