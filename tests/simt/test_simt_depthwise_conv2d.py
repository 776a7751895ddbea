"""Depthwise convolution's CUDA kernels in the emulator: right in every layout, dtype and order of fibers."""

from __future__ import annotations

import pytest
import simt_depthwise_conv2d as kernels
import simt_emulator as emulator
import torch
from simt_depthwise_conv2d_cases import CASES, LONG_CASES, ConvCase, assert_right, inputs_of, run

pytestmark = pytest.mark.proof("emulator")
OPERATOR = "depthwise_conv2d"
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
KERNEL_SIZES = (3, 5, 7, 9)


def over(*dtypes: torch.dtype):
    return pytest.mark.parametrize("dtype", dtypes, ids=lambda d: str(d).removeprefix("torch."))


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    for dtype in DTYPES:
        emulator.schedule(OPERATOR, dtype)


def bits(t: torch.Tensor) -> torch.Tensor:
    """Compares the sign of zero too."""
    return t.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


def assert_same_bits(got: dict, wanted: dict, what: str) -> None:
    for name in wanted:
        assert torch.equal(bits(got[name]), bits(wanted[name])), f"{name} differs: {what}"


@over(*DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_right(case, dtype):
    assert_right(case, dtype, run(case, dtype)[0])


@over(torch.float64, torch.bfloat16)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_same_in_every_order(case, dtype):
    """Weight gradients too: sums have a fixed order."""
    emulator.schedule(OPERATOR, dtype)
    wanted, _, _ = run(case, dtype)
    for order, block_order in zip(emulator.ORDERS, (1, 99, 0, 0, 99, 1)):
        emulator.schedule(OPERATOR, dtype, order, block_order)
        assert_same_bits(run(case, dtype)[0], wanted, f"fiber order {order}, block order {block_order}")


@pytest.mark.parametrize("case", LONG_CASES, ids=str)
def test_blocks_that_go_round(case):
    dtype = torch.bfloat16
    emulator.schedule(OPERATOR, dtype)
    wanted, *told = run(case, dtype)
    assert_right(case, dtype, wanted)
    for each in told:
        tiles = -(-case.sizes[0] // each.images) * each.tiles[0] * each.tiles[1]
        assert tiles > each.splits, "every block has one tile only"
    emulator.schedule(OPERATOR, dtype, emulator.RANDOM, 99)
    assert_same_bits(run(case, dtype)[0], wanted, "at random")


@over(torch.float32, torch.bfloat16)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("k", KERNEL_SIZES)
@pytest.mark.parametrize(
    "picture", [(1, 1), (1, 7), (9, 1), (2, 2), (5, 3), (4, 8), (7, 7), (8, 8), (14, 14), (16, 16), (28, 28), (1, 65)]
)
def test_any_picture(picture, k, layout, dtype):
    for fma in (False, True):
        case = ConvCase((3, 19, *picture), k, layout, fma=fma)
        assert_right(case, dtype, run(case, dtype)[0])


@over(torch.float32, torch.bfloat16)
@pytest.mark.parametrize("channels", [1, 2, 8, 15, 16, 24, 31, 32, 33, 64, 72])
def test_any_number_of_channels(channels, dtype):
    for case in (
        ConvCase((2, channels, 3, 4), 7, tokens=True, registers=1, norm=True),
        ConvCase((2, channels, 5, 4), 7, norm=True),
        ConvCase((2, channels, 4, 4), 3),
    ):
        assert_right(case, dtype, run(case, dtype)[0])


@over(torch.float32, torch.bfloat16)
@pytest.mark.parametrize(
    ("sizes", "layout", "wanted"),
    [
        ((4, 64, 16, 16), "contiguous", "row packs"),
        ((4, 64, 28, 28), "contiguous", "row packs"),
        ((4, 64, 56, 56), "contiguous", "row packs"),
        ((4, 64, 7, 7), "contiguous", "plane packs"),
        ((4, 64, 16, 16), "channels_last", "channel packs"),
        ((4, 64, 7, 7), "channels_last", "channel packs"),
        ((4, 64, 56, 56), "channels_last", "channel packs"),
    ],
    ids=str,
)
def test_memory_is_accessed_in_packs(sizes, layout, wanted, dtype):
    emulator.schedule(OPERATOR, dtype, dry=True)
    for k in KERNEL_SIZES:
        for fma in (False, True):
            _, told, told_bwd = run(ConvCase(sizes, k, layout, fma=fma), dtype)
            assert told.accesses[:2] == [wanted] * 2 and told_bwd.accesses == [wanted] * 3


def test_which_kernel_runs():
    """Tensor cores for 16-bit types where they are there, but for the 3×3 forward pass; all else without."""
    for dtype in DTYPES:
        for tensor_cores in (True, False):
            emulator.schedule(OPERATOR, dtype, dry=True)
            told = [run(ConvCase((2, 16, 8, 8), k, fma=not tensor_cores), dtype)[1:] for k in KERNEL_SIZES]
            names = [(forward.kernel, backward.kernel) for forward, backward in told]
            on_cores = tensor_cores and dtype.itemsize == 2
            assert names == ([("fma", "mma"), *[("mma", "mma")] * 3] if on_cores else [("fma", "fma")] * 4)


@pytest.mark.parametrize("column", [5, 13, 20])
@pytest.mark.parametrize("k", (5, 7, 9))
def test_what_is_not_finite_spoils_whole_blocks_on_tensor_cores_only(k, column):
    """The bands' zeros times infinity: all 8 columns of each block whose 16 inputs contain it, and no others."""
    x, weight = torch.ones(2, 3, 16, 24, dtype=torch.bfloat16), torch.ones(3, 1, k, k, dtype=torch.bfloat16)
    x[1, 2, 8, column] = float("inf")
    rows = torch.arange(16).sub(8).abs() <= k // 2
    block = torch.arange(24) // 8 * 8
    spoilt = {
        True: (block - 4 <= column) & (column < block + 12),
        False: torch.arange(24).sub(column).abs() <= k // 2,
    }
    for tensor_cores, columns in spoilt.items():
        wanted = torch.zeros(x.shape, dtype=torch.bool)
        wanted[1, 2] = rows[:, None] & columns
        y, _ = kernels.depthwise_fwd(x, weight, options=(tensor_cores, 132))
        assert torch.equal(~y.isfinite(), wanted)
        dx, *_ = kernels.depthwise_bwd(x, torch.ones_like(x), weight, options=(tensor_cores, 132))
        assert torch.equal(~dx.isfinite(), wanted)


@over(torch.float32, torch.bfloat16)
@pytest.mark.parametrize(
    "case",
    [
        ConvCase((5, 20, 7, 7), 7),
        ConvCase((5, 16, 7, 7), 5, "channels_last", norm=True),
        ConvCase((5, 16, 4, 4), 3),
        ConvCase((3, 16, 4, 5), 7, tokens=True, registers=2),
        ConvCase((3, 16, 4, 5), 7, tokens=True, registers=2, fma=True),
    ],
    ids=str,
)
def test_outputs_do_not_depend_on_the_batch(case, dtype):
    i = inputs_of(case, dtype)
    options = (case.grid, case.registers)
    y, _ = kernels.depthwise_fwd(i.x, i.weight, i.bias, *options, i.norm, case.options)
    dx, *_ = kernels.depthwise_bwd(i.grad, i.x, i.weight, *options, i.norm, case.options)
    for at in range(case.sizes[0]):
        part = slice(at, at + 1)
        norm = i.norm and (i.norm[0][part], i.norm[1][part], *i.norm[2:])
        alone, _ = kernels.depthwise_fwd(i.x[part], i.weight, i.bias, *options, norm, case.options)
        same, *_ = kernels.depthwise_bwd(i.grad[part], i.x[part], i.weight, *options, norm, case.options)
        assert_same_bits({"y": alone, "dx": same}, {"y": y[part], "dx": dx[part]}, f"sample {at}")


@over(torch.float32, torch.bfloat16)
@pytest.mark.parametrize("k", KERNEL_SIZES)
def test_results_do_not_depend_on_strides(k, dtype):
    wanted, _, _ = run(ConvCase((3, 16, 8, 8), k), dtype)
    for layout in ("channels_last", "transposed", "sliced"):
        for other in (layout, "contiguous"):
            got, _, _ = run(ConvCase((3, 16, 8, 8), k, layout, other=other), dtype)
            assert_same_bits(got, wanted, f"{layout}, {other}")


@over(torch.float32, torch.bfloat16, torch.float16)
@pytest.mark.parametrize("k", KERNEL_SIZES)
def test_no_worse_than_pytorch(k, dtype):
    """err(kernel vs fp64) ≤ 2 · err(PyTorch, same dtype vs fp64) + floor, in the largest element and in L2."""
    generator = torch.Generator().manual_seed(k)
    x, grad = (torch.randn(4, 32, 16, 16, generator=generator).to(dtype) for _ in range(2))
    weight, bias = torch.randn(32, 1, k, k, generator=generator).to(dtype) / k, torch.zeros(32, dtype=dtype)

    def by_torch(*tensors):
        leaves = [t.detach().requires_grad_() for t in tensors]
        y = torch.nn.functional.conv2d(*leaves, padding=k // 2, groups=32)
        return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(y.dtype))]

    exact, peer = by_torch(x.double(), weight.double(), bias.double()), by_torch(x, weight, bias)
    got = [kernels.depthwise_fwd(x, weight, bias)[0], *kernels.depthwise_bwd(grad, x, weight)[:3]]
    for name, a, b, p in zip(("y", "dx", "dweight", "dbias"), got, exact, peer, strict=True):
        rows = 1 if name in ("y", "dx") else x.numel() // 32
        floor = 2 * torch.finfo(dtype).eps + rows**0.5 * torch.finfo(torch.float32).eps
        for size in (lambda t: t.abs().max().item(), lambda t: t.norm().item()):
            error, peers = size(a.double() - b), size(p.double() - b)
            assert error <= 2 * peers + floor * size(b), f"{name}: {error:.3e}, PyTorch's is {peers:.3e}"


def test_offsets_beyond_31_bits():
    """Samples, or channels, 2³¹ elements apart, in memory that is reserved but for them untouched."""
    far = 2**31 + 8
    base = torch.empty(2 * far + 4096, dtype=torch.bfloat16)
    weight = torch.randn(2, 1, 7, 7, generator=torch.Generator().manual_seed(2)).bfloat16()
    for strides in ((far, 16, 4, 1), (16, far, 4, 1), (far, 1, 8, 2), (8, 1, far, 2), (16, 1, 2, far // 2)):
        x = base.as_strided((2, 2, 2, 4) if strides[3] < far // 2 else (2, 2, 1, 4), strides)
        x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(1)))
        dense = x.contiguous()
        for tensor_cores in (True, False):
            y, _ = kernels.depthwise_fwd(x, weight, options=(tensor_cores, 132))
            assert torch.equal(y, kernels.depthwise_fwd(dense, weight, options=(tensor_cores, 132))[0])
            wanted = kernels.depthwise_bwd(dense, dense, weight, options=(tensor_cores, 132))
            got = kernels.depthwise_bwd(x, x, weight, options=(tensor_cores, 132))
            assert all(torch.equal(a, b) for a, b in zip(got[:3], wanted[:3]))


def test_no_rows():
    """An empty batch: weight gradients are zeros."""
    x, weight = torch.empty(0, 5, 3, 3, dtype=torch.bfloat16), torch.ones(5, 1, 7, 7, dtype=torch.bfloat16)
    _, dweight, dbias, _ = kernels.depthwise_bwd(x, x, weight)
    assert not dweight.any() and not dbias.any()


class _Emulated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, grid, registers):
        ctx.save_for_backward(x, weight)
        ctx.grid, ctx.registers = grid, registers
        return kernels.depthwise_fwd(x, weight, bias, grid, registers)[0]

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return *kernels.depthwise_bwd(grad, x, weight, ctx.grid, ctx.registers)[:3], None, None


@pytest.mark.parametrize(
    "case",
    [
        ConvCase((2, 3, 4, 5), 3),
        ConvCase((2, 4, 3, 4), 5, "channels_last"),
        ConvCase((1, 2, 5, 9), 7),
        ConvCase((2, 2, 3, 3), 9, tokens=True),
        ConvCase((1, 2, 3, 2), 7, tokens=True, registers=2),
    ],
    ids=str,
)
def test_gradcheck(case):
    i = inputs_of(case, torch.float64)
    leaves = [t.nan_to_num(3.0).detach().clone().requires_grad_() for t in (i.x, i.weight, i.bias)]
    assert torch.autograd.gradcheck(lambda *t: _Emulated.apply(*t, case.grid, case.registers), leaves)
