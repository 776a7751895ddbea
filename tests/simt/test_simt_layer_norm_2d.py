"""LayerNorm's CUDA kernels in the emulator: right in every layout, dtype and order of fibers; gradcheck in fp64."""

from __future__ import annotations

import pytest
import simt_emulator as emulator
import simt_layer_norm_2d as kernels
import torch
from simt_layer_norm_2d_cases import CASES, LONG_CASES, SMALL_CHIP, NormCase, assert_right, inputs_of, run

pytestmark = pytest.mark.proof("emulator")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    for dtype in DTYPES:
        emulator.schedule("layer_norm_2d", dtype)


def bits(t: torch.Tensor) -> torch.Tensor:
    """Compares NaN and the sign of zero too."""
    return t.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


def assert_same_bits(got: dict, wanted: dict, what: str) -> None:
    for name in wanted:
        assert torch.equal(bits(got[name]), bits(wanted[name])), f"{name} differs: {what}"


@dtypes
@pytest.mark.parametrize("case", CASES, ids=str)
def test_right(case, dtype):
    got, _, _ = run(case, dtype)
    assert_right(case, dtype, got)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_same_in_every_order(case, dtype):
    emulator.schedule("layer_norm_2d", dtype)
    wanted, _, _ = run(case, dtype)
    for order, block_order in zip(emulator.ORDERS, (1, 99, 0, 0, 99, 1)):
        emulator.schedule("layer_norm_2d", dtype, order, block_order)
        assert_same_bits(run(case, dtype)[0], wanted, f"fiber order {order}, block order {block_order}")


@pytest.mark.parametrize("case", LONG_CASES, ids=str)
def test_blocks_that_go_round(case):
    dtype = torch.bfloat16
    emulator.schedule("layer_norm_2d", dtype)
    wanted, _, _ = run(case, dtype)
    assert_right(case, dtype, wanted)
    for order in emulator.ORDERS[1:]:
        emulator.schedule("layer_norm_2d", dtype, order, 99)
        assert_same_bits(run(case, dtype)[0], wanted, f"fiber order {order}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "channels",
    [1, 2, 3, 7, 8, 9, 31, 32, 33, 64, 95, 96, 128, 192, 256, 257, 384, 512, 640, 768, 1000, 1024, 1025, 1032, 2048]
    + [4096, 8191, 8192, 8200],
)
def test_any_number_of_channels(channels, dtype):
    for case in (
        NormCase((2, 3, channels), registers=1, residual=True),
        NormCase((1, channels, 2, 3), residual=True),
    ):
        assert_right(case, dtype, run(case, dtype)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    "picture", [(1, 1), (1, 7), (7, 1), (2, 2), (5, 3), (7, 7), (8, 8), (14, 14), (1, 65)], ids=str
)
def test_any_picture(picture, layout, dtype):
    case = NormCase((3, 20, *picture), layout)
    assert_right(case, dtype, run(case, dtype)[0])


def test_families():
    """Every family is what the shapes above are meant for; packs are used where memory allows."""
    found, half = {}, 0
    for case in CASES:
        _, told, told_bwd = run(case, torch.bfloat16)
        half += told.half_packed and told_bwd.half_packed
        found.setdefault((told.family, told.packed, told.on_chip), []).append(str(case))
        found.setdefault((told_bwd.family, told_bwd.packed, told_bwd.on_chip), []).append(str(case))
    for family in ("teams", "blocks"):
        assert {(family, True, False), (family, False, False)} <= found.keys(), found
    assert {("columns", packed, chip) for packed in (True, False) for chip in (True, False)} <= found.keys(), found
    assert half


@pytest.mark.parametrize("limits", [emulator.H200, emulator.A100], ids=["sm_90", "sm_80"])
@pytest.mark.parametrize("backward", [False, True], ids=["fwd", "bwd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_both_sides_of_the_chips_border(dtype, backward, limits):
    """Columns are read once up to where C × 8 pixels fill shared memory but for 2 KB; right on both sides of it."""

    def on_chip(channels: int) -> bool:
        emulator.schedule("layer_norm_2d", dtype, dry=True)
        x, weight = torch.empty(1, channels, 2, 4, dtype=dtype), torch.empty(channels)
        statistics = torch.empty(1, 2, 4)
        if backward:
            told = kernels.layer_norm_bwd(x, None, x, weight, statistics, statistics, limits=limits)[-1]
        else:
            told = kernels.layer_norm_fwd(x, None, weight, weight, limits=limits)[-1]
        emulator.schedule("layer_norm_2d", dtype)
        assert told.family == "columns" and told.packed
        assert told.tile_pixels == 8 or not told.on_chip or channels < 8000
        return told.on_chip

    low, high = 1, 60_000
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if on_chip(middle) else (low, middle)
    assert low >= (limits[0] - 2048) // (8 * dtype.itemsize * (2 if backward else 1)), low
    for channels in (low, high):
        for picture in ((2, 4), (3, 3)):
            case = NormCase((1, channels, *picture), limits=limits)
            got, told, told_bwd = run(case, dtype)
            assert (told_bwd if backward else told).on_chip == (channels == low)
            assert_right(case, dtype, got)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "case",
    [
        NormCase((3, 24, 4, 4), residual=True),
        NormCase((3, 33, 7, 7)),
        NormCase((3, 24, 4, 4), "channels_last", residual=True),
        NormCase((3, 24, 4, 4), limits=SMALL_CHIP),
        NormCase((3, 700, 4, 4), limits=SMALL_CHIP),
        NormCase((3, 1100, 2, 2), "channels_last"),
        NormCase((3, 9, 40), registers=2),
    ],
    ids=str,
)
def test_outputs_do_not_depend_on_the_batch(case, dtype):
    i = inputs_of(case, dtype)
    y, mean, rstd, total, _ = kernels.layer_norm_fwd(
        i.x, i.residual, i.weight, i.bias, 1e-5, case.registers, case.limits
    )
    x = i.x if total is None else total
    dx, *_ = kernels.layer_norm_bwd(i.grad, i.grad_sum, x, i.weight, mean, rstd, case.registers, case.limits)
    for at in range(case.shape[0]):
        part = slice(at, at + 1)
        residual = None if i.residual is None else i.residual[part]
        grad_sum = None if i.grad_sum is None else i.grad_sum[part]
        alone = kernels.layer_norm_fwd(i.x[part], residual, i.weight, i.bias, 1e-5, case.registers, case.limits)
        same = kernels.layer_norm_bwd(
            i.grad[part], grad_sum, x[part], i.weight, mean[part], rstd[part], case.registers, case.limits
        )
        wanted = {"y": y[part], "mean": mean[part], "rstd": rstd[part], "dx": dx[part]}
        got = {"y": alone[0], "mean": alone[1], "rstd": alone[2], "dx": same[0]}
        assert_same_bits(got, wanted, f"sample {at}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("case", "layouts"),
    [
        (NormCase((2, 40, 4, 4)), ("transposed",)),
        (NormCase((2, 6, 64)), ("sliced", "pitched")),
        (NormCase((2, 2, 2048)), ("sliced", "pitched")),
    ],
    ids=str,
)
def test_outputs_do_not_depend_on_strides(case, layouts, dtype):
    """Loads differ, the order of sums does not."""
    wanted, *told = run(case, dtype)
    for layout in layouts:
        for x_layout, other in ((layout, layout), (case.layout, layout)):
            got, *other_told = run(NormCase(case.shape, x_layout, other=other), dtype)
            if layout != "pitched":
                assert told[1].packed and not other_told[1].packed
            names = ("y", "mean", "rstd", "dx")
            assert_same_bits(got, {name: wanted[name] for name in names}, f"{x_layout}, {other}")


def test_offsets_beyond_31_bits():
    """Samples 2³¹ elements apart, in memory that is reserved but for them untouched."""
    far = 2**31
    base = torch.empty(far + 4096, dtype=torch.bfloat16)
    for shape, strides in (((2, 16, 4), (far, 4, 1)), ((2, 4, 16), (far, 16, 1))):
        x = base.as_strided(shape, strides)
        near = torch.randn(shape, generator=torch.Generator().manual_seed(1)).bfloat16()
        x.copy_(near)
        weight = torch.ones(shape[2])
        for tensors in ((x, x), (x.unsqueeze(2).permute(0, 3, 1, 2), None)):
            value, grad = tensors[0], tensors[0]
            dense = torch.empty_like(value).copy_(value)
            y, mean, rstd, *_ = kernels.layer_norm_fwd(value, None, weight, weight)
            same, *_ = kernels.layer_norm_fwd(dense, None, weight, weight)
            assert torch.equal(y, same)
            dx, *_ = kernels.layer_norm_bwd(grad, None, value, weight, mean, rstd)
            same, *_ = kernels.layer_norm_bwd(dense, None, dense, weight, mean, rstd)
            assert torch.equal(dx, same)


def test_no_rows():
    """An empty batch: weight gradients are zeros."""
    x = torch.empty(0, 5, 3, 3, dtype=torch.bfloat16)
    weight, statistics = torch.ones(5), torch.empty(0, 3, 3)
    _, dweight, dbias, _ = kernels.layer_norm_bwd(x, None, x, weight, statistics, statistics)
    assert torch.equal(dweight, torch.zeros(5)) and torch.equal(dbias, torch.zeros(5))


class _Emulated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, bias, registers, limits):
        y, mean, rstd, total, _ = kernels.layer_norm_fwd(x, residual, weight, bias, 1e-5, registers, limits)
        ctx.save_for_backward(x if total is None else total, weight, mean, rstd)
        ctx.registers, ctx.limits = registers, limits
        return (y, y.new_zeros(()) if total is None else total)

    @staticmethod
    def backward(ctx, grad, grad_sum):
        x, weight, mean, rstd = ctx.saved_tensors
        more = grad_sum if grad_sum.dim() else None
        dx, dw, db, _ = kernels.layer_norm_bwd(grad, more, x, weight, mean, rstd, ctx.registers, ctx.limits)
        return dx, dx if more is not None else None, dw, db, None, None


@pytest.mark.parametrize(
    "case",
    [
        NormCase((2, 5, 2, 3)),
        NormCase((2, 5, 2, 3), "channels_last", residual=True),
        NormCase((2, 4, 6), registers=1, residual=True),
        NormCase((1, 4, 2, 2), residual=True),
        NormCase((1, 70, 1, 2), limits=(2000, 4000, 1)),
        NormCase((1, 1, 1026), limits=SMALL_CHIP),
    ],
    ids=str,
)
def test_gradcheck(case):
    i = inputs_of(NormCase(case.shape, case.layout, residual=case.residual), torch.float64)
    inputs = [t.detach().clone().requires_grad_() for t in (i.x, i.weight, i.bias)]
    residual = i.residual.detach().clone().requires_grad_() if case.residual else None

    def norm(x, weight, bias, *more):
        y, total = _Emulated.apply(x, more[0] if more else None, weight, bias, case.registers, case.limits)
        return (y, total) if more else y

    tensors = [*inputs, *([residual] if case.residual else [])]
    assert torch.autograd.gradcheck(norm, tensors, fast_mode=case.shape[-1] > 1000)
