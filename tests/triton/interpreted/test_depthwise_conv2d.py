"""The depthwise convolution's Triton kernels against fp64: every configuration that ships, every layout, registers,
normalise on load, strips, tiles and blocks on both sides of their borders."""

from __future__ import annotations

import _plain as plain
import cases
import pytest
import torch
from _layouts import hostile, layouts, normal
from _numerics import assert_as_exact, differentiate

import sdp_kernels as sk
from sdp_kernels.triton import _launch, depthwise_conv2d

OPS = cases.OPS
TABLE = _launch.table_for(90)
EXACT = {"rtol": 1e-11, "atol": 1e-12}
WIDTHS = {"16bit": torch.bfloat16, "32bit": torch.float32}
LAYOUTS = ("rows", "normed rows", "columns")


def _parameters(channels, k, dtype=torch.float64):
    return normal(channels, 1, k, k, seed=91, dtype=dtype), normal(channels, seed=92, dtype=dtype)


def _norm(x, channels):
    """Statistics of no sample in particular, parameters that don't leave 0 where it was."""
    shape = (x.shape[0], *x.shape[2:]) if x.dim() == 4 else tuple(x.shape[:2])
    dtype = torch.promote_types(x.dtype, torch.float32)
    mean, rstd = normal(*shape, seed=93, dtype=dtype), 1 + normal(*shape, seed=94, dtype=dtype).abs()
    return mean, rstd, 1 + normal(channels, seed=95, dtype=dtype), 1 + normal(channels, seed=96, dtype=dtype)


def _run(x, weight, bias, grad, grid=(), registers=0, norm=None):
    """(y, dx, dweight, dbias) of the kernels."""
    norm = (None,) * 4 if norm is None else norm
    y = OPS.depthwise_conv2d_fwd(x, weight, bias, list(grid), registers, *norm)
    return y, *OPS.depthwise_conv2d_bwd(grad, x, weight, list(grid), registers, *norm)


def _exact(x, weight, bias, grad, grid=(), registers=0, norm=None):
    """The same in fp64 and plain PyTorch; dx is that of the normalised input."""
    x, weight, bias, grad = (t.double() for t in (x, weight, bias, grad))
    if norm is not None:
        mean, rstd, gamma, beta = (t.double() for t in norm)
        along = (slice(None), None, None) if x.dim() == 4 else (slice(None),)
        at = 1 if x.dim() == 4 else 2
        x = (x - mean.unsqueeze(at)) * rstd.unsqueeze(at) * gamma[along] + beta[along]
    call = lambda *t: plain.depthwise_conv2d(*t, tuple(grid) or None, registers)  # noqa: E731
    outputs, gradients = differentiate(call, [x, weight, bias], [grad])
    return *outputs, *gradients


def _assert(got, x, weight, *more, **keywords):
    """As near as rounding the exact result once allows, but for sums in fp32."""
    exact = _exact(x, weight, *more, **keywords)
    pixels = x.numel() // max(1, weight.shape[0])
    for i, name in enumerate(("y", "dx", "dweight", "dbias")):
        rows = weight.shape[-1] ** 2 if i < 2 else pixels
        assert got[i].dtype == (x.dtype if i < 2 else torch.promote_types(x.dtype, torch.float32))
        assert_as_exact(name, got[i], exact[i], exact[i].to(got[i].dtype), rows=rows)


def _asked(monkeypatch):
    """The keys of the entries that the host code reads."""
    keys = []

    def configuration(x, *key):
        keys.append("/".join(key[1:]))
        return _launch.configuration(x, *key)

    monkeypatch.setattr(depthwise_conv2d, "configuration", configuration)
    return keys


def _set(monkeypatch, name, value, kernels=("convolve", "backward")):
    """That constant in all entries of the table."""
    for key, entry in TABLE.items():
        if key.startswith(tuple(f"depthwise_conv2d/{kernel}/" for kernel in kernels)):
            monkeypatch.setitem(TABLE, key, entry | {name: value})


@pytest.mark.parametrize("k", [3, 5, 7, 9])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("width", WIDTHS)
def test_every_configuration_inside_guard_bands(layout, k, width, guarded, monkeypatch):
    """As it ships: a tile and a column more, a block and a channel more."""
    dtype = WIDTHS[width]
    entry = TABLE[f"depthwise_conv2d/convolve/{layout}/k{k}/{width}"]
    channels, columns = entry["block"] + 1, entry["groups"] * entry["outputs"] + 1
    memory = layout.removeprefix("normed ")
    x, grad = (cases.picture(1, channels, 2, columns, memory, dtype, seed) for seed in (1, 2))
    weight, bias = _parameters(channels, k, dtype)
    norm = _norm(x, channels) if layout == "normed rows" or (layout == "columns" and k == 5) else None
    keys = _asked(monkeypatch)
    inside = [guarded.inside(t) for t in (x, weight, bias, grad)]
    got = _run(*inside, norm=None if norm is None else [guarded.inside(t) for t in norm])
    assert {f"convolve/{layout}/k{k}", f"backward/{layout}/k{k}", "add_partials"} <= set(keys)
    assert guarded.allocations >= 7
    _assert(got, x, weight, bias, grad, norm=norm)


def test_the_table_has_these_and_no_other_entries():
    wanted = {
        f"{kernel}/{layout}/k{k}" for kernel in ("convolve", "backward") for layout in LAYOUTS for k in (3, 5, 7, 9)
    }
    wanted = {f"depthwise_conv2d/{key}/{width}" for key in wanted | {"add_partials"} for width in WIDTHS}
    assert wanted == {key for key in TABLE if key.startswith("depthwise_conv2d/")}
    fused = {key.split("/", 2)[2] for key in wanted if TABLE[key].get("fused")}
    assert {"rows/k3/16bit", "rows/k5/16bit", "columns/k7/16bit"} <= fused and "rows/k9/16bit" not in fused


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("k", [3, 5, 7, 9])
@pytest.mark.parametrize("size", [(1, 1), (1, 4), (4, 1), (2, 5), (7, 7)], ids=str)
def test_pictures_smaller_than_the_kernel_too(size, k, layout, guarded):
    x, grad = (cases.picture(2, 3, *size, layout, torch.float64, seed) for seed in (1, 2))
    weight, bias = _parameters(3, k)
    got = _run(*(guarded.inside(t) for t in (x, weight, bias, grad)))
    _assert(got, x, weight, bias, grad)


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize(("width", "channels"), [(16, 64), (17, 65), (32, 8), (33, 9), (14, 16)], ids=str)
def test_full_tiles_and_blocks_and_one_more(width, channels, layout, guarded):
    """With lanes that need no mask, and with such that do."""
    x, grad = (cases.picture(1, channels, 3, width, layout, torch.float16, seed) for seed in (1, 2))
    weight, bias = _parameters(channels, 3, torch.float16)
    got = _run(*(guarded.inside(t) for t in (x, weight, bias, grad)))
    _assert(got, x, weight, bias, grad)


@pytest.mark.parametrize("layout", ["rows", "columns", "tokens"])
@pytest.mark.parametrize("k", [3, 7])
def test_strips_change_no_bit(k, layout, guarded, monkeypatch):
    """Heights on both sides of a strip's border; with a norm, whose rows outside the strip exist nevertheless."""
    for height in (8, 9, 17) if k == 3 else (9,):
        if layout == "tokens":
            x, grad = (normal(1, 2 + 3 * height, 5, seed=seed, dtype=torch.float32) for seed in (1, 2))
            more = {"grid": (height, 3), "registers": 2}
        else:
            x, grad = (cases.picture(1, 5, height, 3, layout, torch.float32, seed) for seed in (1, 2))
            more = {}
        weight, bias = _parameters(5, k, torch.float32)
        arguments = (x, weight, bias, grad)
        norm = _norm(x, 5) if height == 9 else None
        _set(monkeypatch, "programs", 1)
        whole = _run(*(guarded.inside(t) for t in arguments), norm=norm, **more)
        _assert(whole, *arguments, norm=norm, **more)
        _set(monkeypatch, "programs", 1000)
        cut = _run(*(guarded.inside(t) for t in arguments), norm=norm, **more)
        _assert(cut, *arguments, norm=norm, **more)
        assert torch.equal(cut[0], whole[0]) and torch.equal(cut[1], whole[1])


def test_strips_are_counted_from_the_shape():
    """One for a large batch, several where programs would be few, none of less than a few rows."""
    entry = TABLE["depthwise_conv2d/convolve/rows/k7/16bit"]
    for batch, height, rows in ((256, 56, 56), (1, 56, 8), (2, 17, 6), (1, 7, 7), (1, 8, 8), (1, 9, 5)):
        x = torch.empty(batch, 768, height, 16).to(memory_format=torch.channels_last)
        cut = depthwise_conv2d.geometry([x], [], 0).cut(entry)
        assert cut.rows == rows and cut.strips == -(-height // rows), (batch, height, cut)


@pytest.mark.parametrize(("k", "normed"), [(3, True), (7, False), (9, True)])
def test_any_strides(k, normed, guarded):
    x, grad = normal(2, 3, 2, 3, seed=1), normal(2, 3, 2, 3, seed=2)
    weight, bias = _parameters(3, k)
    norm = _norm(x, 3) if normed else None
    want = _exact(x, weight, bias, grad, norm=norm)
    odd_norm = None if norm is None else (*norm[:2], *(layouts(t)["gaps"] for t in norm[2:]))
    odd_weight, odd_bias = layouts(weight)["swapped"], layouts(bias)["gaps"]
    made = layouts(x)
    kinds = {name: g for name, g in hostile(grad).items() if "expanded" not in name}
    names = list(kinds)
    for i, (name, odd) in enumerate(made.items()):
        kind = names[i % len(names)]
        got = _run(guarded.inside(odd), odd_weight, odd_bias, guarded.inside(kinds[kind]), norm=odd_norm)
        assert got[0].stride() == got[1].stride() == torch.empty_like(odd).stride()
        for result, wanted in zip(got, want, strict=True):
            torch.testing.assert_close(result, wanted, **EXACT, msg=lambda t, n=name, k=kind: f"{n}, {k}: {t}")


@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_gradients_of_any_strides(layout):
    """Expanded ones too: strides of 0."""
    x, grad = (cases.picture(2, 3, 4, 5, layout, torch.float64, seed) for seed in (1, 2))
    weight, bias = _parameters(3, 3)
    for name, g in hostile(grad).items():
        want = _exact(x, weight, bias, g)[1:]
        for got, wanted in zip(OPS.depthwise_conv2d_bwd(g, x, weight, [], 0, *(None,) * 4), want, strict=True):
            torch.testing.assert_close(got, wanted, **EXACT, msg=lambda t, n=name: f"{n}: {t}")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("k", [3, 7])
@pytest.mark.parametrize("layout", ["contiguous", "swapped"])
def test_register_rows(layout, k, normed, dtype, guarded):
    """Written as 0; whatever they hold, NaN too, nothing else sees it."""
    grid, r = (3, 4), 5
    x, grad = (normal(2, r + 12, 6, seed=seed, dtype=dtype) for seed in (1, 2))
    weight, bias = _parameters(6, k, dtype)
    norm = _norm(x, 6) if normed else None
    laid = lambda t: layouts(t)[layout]  # noqa: E731
    clean = _run(laid(x), weight, bias, grad, grid, r, norm)
    _assert(clean, x, weight, bias, grad, grid=grid, registers=r, norm=norm)
    for t in (x, grad, *(norm or ())[:2]):
        t[:, :r] = float("nan")
    inside = [guarded.inside(t) for t in (laid(x), weight, bias, grad)]
    spoilt = _run(*inside, grid, r, None if norm is None else [guarded.inside(t) for t in norm])
    for a, b in zip(spoilt, clean, strict=True):
        assert torch.equal(a, b)
    assert not spoilt[0][:, :r].any() and not spoilt[1][:, :r].any()


def test_more_registers_than_groups(guarded):
    x, grad = (normal(1, 43, 3, seed=seed) for seed in (1, 2))
    weight, bias = _parameters(3, 3)
    got = _run(guarded.inside(x), weight, bias, grad, (1, 2), 41)
    _assert(got, x, weight, bias, grad, grid=(1, 2), registers=41)
    assert not got[0][:, :41].any()


def test_token_buffers_are_the_pictures_behind_the_registers():
    x, grad = (normal(2, 3 + 20, 6, seed=seed) for seed in (1, 2))
    weight, bias = _parameters(6, 5)
    tokens = _run(x, weight, bias, grad, (4, 5), 3)
    picture = lambda t: t[:, 3:].unflatten(1, (4, 5)).permute(0, 3, 1, 2)  # noqa: E731
    same = _run(picture(x), weight, bias, picture(grad))
    for i in (0, 1):
        torch.testing.assert_close(picture(tokens[i]), same[i], rtol=0, atol=0)
    for i in (2, 3):
        torch.testing.assert_close(tokens[i], same[i], **EXACT)


@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_norm_is_not_applied_to_the_padding(layout):
    """Outside the picture there are zeros, not normalised zeros."""
    x = cases.picture(1, 2, 2, 2, layout, torch.float64)
    norm = (torch.full((1, 2, 2), 5.0), torch.full((1, 2, 2), 2.0), torch.ones(2), torch.full((2,), 7.0))
    weight, bias = torch.ones(2, 1, 3, 3, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    y, _, dweight, _ = _run(x, weight, bias, torch.ones_like(x), norm=norm)
    seen = ((x - 5) * 2 + 7).sum((2, 3))  # every output sees all four pixels once
    torch.testing.assert_close(y, seen[..., None, None].expand_as(y), **EXACT)
    torch.testing.assert_close(dweight[:, 0, 1, 1], seen[0], **EXACT)
    torch.testing.assert_close(dweight[:, 0, 0, 0], ((x - 5) * 2 + 7)[0, :, 0, 0], **EXACT)


def test_parameters_of_a_norm_in_another_dtype():
    x, grad = (cases.picture(1, 9, 3, 4, "rows", torch.bfloat16, seed) for seed in (1, 2))
    weight, bias = _parameters(9, 3, torch.bfloat16)
    mean, rstd, gamma, beta = _norm(x, 9)
    norm = (mean, rstd, gamma.bfloat16(), beta)
    _assert(_run(x, weight, bias, grad, norm=norm), x, weight, bias, grad, norm=norm)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("k", [3, 7])
@pytest.mark.parametrize("layout", ["rows", "columns", "tokens"])
def test_determinism(layout, k, dtype):
    """Twice the same bits; outputs and dx of a sample by itself, or elsewhere in another batch, are the same too."""
    if layout == "tokens":
        x, grad = (normal(3, 2 + 12, 10, seed=i, dtype=dtype) for i in range(2))
        more = ((3, 4), 2)
    else:
        x, grad = (cases.picture(3, 10, 3, 4, layout, dtype, i) for i in range(2))
        more = ()
    weight, bias = _parameters(10, k, dtype)
    first = _run(x, weight, bias, grad, *more)
    for a, b in zip(first, _run(x, weight, bias, grad, *more), strict=True):
        assert torch.equal(a, b)
    for batch in ([2], [2, 1]):
        fresh = [t[batch].clone(memory_format=torch.preserve_format) for t in (x, grad)]
        again = _run(fresh[0], weight, bias, fresh[1], *more)
        for i in (0, 1):
            assert torch.equal(again[i], first[i][batch])


@pytest.mark.parametrize("k", [3, 9])
def test_partial_sums_of_any_number_of_parts(k, monkeypatch):
    """One part of all samples, some of several, one for each: equal up to the order of the sums."""
    x, grad = (cases.picture(5, 4, 2, 2, "rows", torch.float64, seed) for seed in (1, 2))
    weight, bias = _parameters(4, k)
    for programs in (1, 2, 3, 100):
        _set(monkeypatch, "programs", programs)
        _assert(_run(x, weight, bias, grad), x, weight, bias, grad)


def test_batch_size_does_not_choose_the_variant():
    """What is compiled in is the same for one sample and for many."""
    entry, variants = TABLE["depthwise_conv2d/convolve/rows/k7/16bit"], set()
    for batch in (1, 2, 300):
        x = cases.picture(batch, 24, 7, 7, "rows")
        g = depthwise_conv2d.geometry([x, x], [], 0)
        variants.add(tuple(g.constants(g.cut(entry), 7, 0, x, X=g.strides[0]).items()))
    assert len(variants) == 1


def test_offsets_beyond_32_bits():
    """Strides beyond 32 bits, and such that only their multiples are; memory that nobody touches costs nothing."""
    big = torch.empty(2**32 + 2**31, dtype=torch.float16)
    weight, bias = _parameters(3, 3, torch.float16)
    far = 3 * 2**29
    for strides in ((2**32, 9, 3, 1), (64, far, 3, 1), (64, 1, 2**31, 3), (64, 1, far, 4), (64, 1, 12, far)):
        x = big.as_strided((2, 3, 3, 3), strides)
        values = normal(2, 3, 3, 3, seed=1, dtype=torch.float16)
        x.copy_(values)
        got, want = _run(x, weight, bias, x), _run(values, weight, bias, values)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("shape", [(0, 5, 3, 4), (2, 5, 0, 4), (2, 5, 3, 0), (2, 0, 3, 4)], ids=str)
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_nothing(shape, layout):
    x = torch.empty(shape).contiguous(memory_format=cases.FORMATS[layout])
    weight, bias = _parameters(shape[1], 3, torch.float32)
    y, dx, dweight, dbias = _run(x, weight, bias, x)
    assert y.shape == dx.shape == x.shape and dweight.shape == weight.shape and dbias.shape == bias.shape
    assert not dweight.any() and not dbias.any()


def test_without_a_bias(guarded):
    x = cases.picture(1, 3, 4, 5, "rows", torch.float64)
    weight, _ = _parameters(3, 3)
    y = OPS.depthwise_conv2d_fwd(guarded.inside(x), weight, None, [], 0, *(None,) * 4)
    torch.testing.assert_close(y, plain.depthwise_conv2d(x, weight, None), **EXACT)


@pytest.mark.parametrize("name", ["picture", "channels_last", "tokens", "norm"])
def test_gradcheck(name):
    """Through the public operator, whose backward differentiates the norm as well."""
    tokens = name in ("tokens", "norm")
    x = normal(1, 3, 2, seed=1) if tokens else normal(1, 2, 1, 3, seed=1)
    x = x.contiguous(memory_format=torch.channels_last) if name == "channels_last" else x
    more = {"grid": (1, 2), "registers": 1} if tokens else {}
    inputs = [x, *_parameters(2, 3), *(_norm(x, 2) if name == "norm" else ())]

    def call(x, weight, bias, *norm):
        norm = sk.Norm(*norm) if norm else None
        return sk.depthwise_conv2d(x, weight, bias, norm=norm, backend="triton", **more)

    leaves = [t.double().requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(call, leaves, fast_mode=name != "picture")
    if name == "picture":
        assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)
