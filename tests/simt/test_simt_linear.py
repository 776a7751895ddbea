"""The CUDA kernels around linear's GEMM in the emulator: right in every layout, dtype and order; gradcheck in fp64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import simt_emulator as emulator
import torch
from simt_linear import epilogue_bwd, epilogue_fwd
from simt_linear_cases import CASES, LAYER, LONG_CASES, RATE, RESIDUAL, EpilogueCase, assert_right, inputs_of, run

from sdp_kernels.ops.activation import ACTIVATIONS
from sdp_kernels.reference.activations import FUNCTIONS
from sdp_kernels.reference.philox import DROPOUT, keep_mask

pytestmark = pytest.mark.proof("emulator")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
two_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    for dtype in DTYPES:
        emulator.schedule("linear", dtype)


def bits(t: torch.Tensor) -> torch.Tensor:
    """Compares NaN and the sign of zero too."""
    return t.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


def assert_same_bits(got: dict, wanted: dict, what: str) -> None:
    for name in wanted:
        assert torch.equal(bits(got[name]), bits(wanted[name])), f"{name} differs: {what}"


@dtypes
@pytest.mark.parametrize("case", [*CASES, *LONG_CASES], ids=str)
def test_right(case, dtype):
    got, _, inputs = run(case, dtype)
    assert_right(case, dtype, got, inputs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("case", [*CASES[:8], *CASES[-6:], *LONG_CASES], ids=str)
def test_same_in_every_order(case, dtype):
    emulator.schedule("linear", dtype)
    wanted, *_ = run(case, dtype)
    for order, block_order in zip(emulator.ORDERS, (1, 99, 0, 0, 99, 1)):
        emulator.schedule("linear", dtype, order, block_order)
        assert_same_bits(run(case, dtype)[0], wanted, f"fiber order {order}, block order {block_order}")


def test_every_kernel_is_reached():
    """Each activation of its own and the common kernel, packed and not, with the residual's dtype alike and wider."""
    dtype, found = torch.bfloat16, set()
    emulator.launches("linear", dtype)
    for case in [*CASES, *LONG_CASES]:
        run(case, dtype)
        found |= {symbol for symbol, *_ in emulator.launches("linear", dtype)}
    for outer in ("13__nv_bfloat16S1_", "13__nv_bfloat16f"):
        for which in ("fwd", "bwd"):
            for kind, packed in ((0, 1), (1, 1), (2, 1), (9, 1), (9, 0)):
                mangled = f"linear_epilogue_rows_{which}I{outer}Li{kind}ELb{packed}E"
                assert any(mangled in symbol for symbol in found), mangled


@two_dtypes
@pytest.mark.parametrize(
    "columns", [1, 2, 3, 4, 7, 8, 9, 31, 63, 64, 65, 96, 128, 192, 255, 256, 257, 384, 512, 1000, 1024, 3072]
)
def test_any_number_of_columns(columns, dtype):
    case = EpilogueCase((2, 3, columns), "kelu", **RESIDUAL, registers=1, dropout=RATE)
    got, _, inputs = run(case, dtype)
    assert_right(case, dtype, got, inputs)


@pytest.mark.parametrize(
    ("columns", "lanes"), [(8, 8), (64, 8), (96, 16), (128, 16), (192, 8), (256, 32), (384, 16), (768, 32), (1000, 32)]
)
def test_few_lanes_are_idle(columns, lanes):
    told = epilogue_fwd(torch.zeros(1, 2, columns).bfloat16())[1]
    assert (told.packed, told.lanes) == (True, lanes)
    assert -(-columns // 8 // lanes) * lanes * 8 <= max(1.34 * columns, 64)


@two_dtypes
@pytest.mark.parametrize("columns", [12, 7])
def test_the_mask_is_the_references(columns, dtype):
    """Bit for bit, also where a thread's columns begin within a block of random words, and far into the counter."""
    z = torch.ones(2, 9, columns, dtype=dtype)
    for seed, step, first_sample in ((1, 0, 0), (-5, 2**32 - 1, 2**32 - 1)):
        rng = torch.tensor([seed, step, first_sample])
        for rate in (0.1, 0.5, 0.97):
            wanted = keep_mask(rng, 2**30 - 1, DROPOUT, 2, 9 * columns, rate, torch.float32).view(z.shape)
            y, _ = epilogue_fwd(z, dropout=rate, rng=rng, layer=2**30 - 1)
            assert torch.equal(y, wanted.to(dtype))
            dz, _, dbias, _ = epilogue_bwd(z, z, dropout=rate, rng=rng, layer=2**30 - 1)
            assert torch.equal(dz, wanted.to(dtype))
            torch.testing.assert_close(dbias, wanted.sum((0, 1)))


def error_in_ulps(got: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    info = torch.finfo(got.dtype)
    digits = torch.floor(torch.log2(wanted.abs().clamp_min(info.tiny)))
    return (got.double() - wanted).abs() / (info.eps * torch.exp2(digits))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation):
    """Value and slope in fp32: no worse than twice PyTorch's own error; in bf16 the right number or its neighbour."""
    for dtype in (torch.float32, torch.bfloat16):
        if dtype == torch.float32:
            x = torch.cat([torch.linspace(-12, 12, 60_001), torch.linspace(-120, 120, 4001)])
        else:
            x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
            x = x[torch.isfinite(x) & (x.abs() < 1e4)]
        x = x[x != 0]  # where the slope of some is a matter of taste
        ours = epilogue_fwd(x[None, None], activation)[0].flatten()
        slope = epilogue_bwd(torch.ones_like(x)[None, None], x[None, None], activation)[0].flatten()

        def torchs(x: torch.Tensor) -> list[torch.Tensor]:
            x = x.clone().requires_grad_()
            y = FUNCTIONS[activation](x)
            return [y.detach(), torch.autograd.grad(y, x, torch.ones_like(y))[0]]

        for got, wanted, torch_has in zip((ours, slope), torchs(x.double()), torchs(x)):
            if dtype == torch.float32:
                size = wanted.abs().clamp_min(1.0)
                theirs = ((torch_has.double() - wanted).abs() / size).max()
                assert ((got.double() - wanted).abs() / size).max() <= 2 * theirs + torch.finfo(dtype).eps
            else:  # below 1e-6 the tails' own relative accuracy counts
                visible = wanted.abs() > 1e-6
                assert error_in_ulps(got, wanted)[visible].max() <= 1.01


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_not_a_number_passes_through_and_infinity_does_what_it_should(activation):
    x = torch.tensor([[[float("nan"), float("inf"), -float("inf"), 0.0]]])
    y = epilogue_fwd(x, activation)[0].flatten()
    assert y[0].isnan()
    wanted = {"tanh": [1.0, -1.0], "sigmoid": [1.0, 0.0]}.get(activation, [float("inf")])
    assert y[1:].tolist()[: len(wanted)] == wanted
    assert epilogue_bwd(torch.ones_like(x), x, activation)[0].flatten()[0].isnan() or activation in (
        *("none", "relu", "leaky_relu", "selu"),  # slopes are chosen by comparing
    )


@two_dtypes
@pytest.mark.parametrize("case", [CASES[1], CASES[4], CASES[5], CASES[14], LONG_CASES[2]], ids=str)
def test_outputs_do_not_depend_on_the_batch(case, dtype):
    i = inputs_of(case, dtype)
    whole, *_ = run(case, dtype)
    for at in range(case.shape[0]):
        part = slice(at, at + 1)
        rng = None if i.rng is None else i.rng + torch.tensor([0, 0, at])
        mask = None if i.mask is None else i.mask[part].clone()
        common = {"registers": case.registers, "dropout": case.dropout, "rng": rng, "layer": LAYER}
        residual = None if i.residual is None else i.residual[part]
        y, _ = epilogue_fwd(i.z[part], case.activation, i.scale, mask, residual, **common)
        dz, *_ = epilogue_bwd(i.grad[part], i.z[part], case.activation, i.scale, mask, **common)
        assert_same_bits({"y": y, "dz": dz}, {"y": whole["y"][part], "dz": whole["dz"][part]}, f"sample {at}")


@two_dtypes
@pytest.mark.parametrize("case", [CASES[1], CASES[2], CASES[4], LONG_CASES[0]], ids=str)
def test_results_do_not_depend_on_strides(case, dtype):
    """Loads differ, the order of sums does not."""
    wanted, told, _ = run(case, dtype)
    for layout in ("sliced", "pitched", "transposed"):
        got, other, _ = run(replace(case, layout=layout), dtype)
        assert [t.packed for t in other] == [layout == "pitched" and t.packed for t in told]
        assert_same_bits(got, wanted, layout)


def test_offsets_beyond_31_bits():
    """Samples 2³¹ elements apart, in memory that is reserved but for them untouched."""
    base = torch.empty(2**31 + 4096, dtype=torch.bfloat16)
    z = base.as_strided((2, 3, 16), (2**31, 16, 1))
    z.copy_(torch.randn(z.shape, generator=torch.Generator().manual_seed(1)))
    mask, near = torch.tensor([2.0, 1.0]), z.clone()
    for tensors in ((z, z), (z[..., ::2], z[..., ::2])):
        same = [near if t is z else near[..., ::2] for t in tensors]
        far, _ = epilogue_fwd(tensors[0], "kelu", None, mask, tensors[1])
        assert torch.equal(far, epilogue_fwd(same[0], "kelu", None, mask, same[1])[0])
        got, expected = (epilogue_bwd(*t, "gelu", None, mask)[:3] for t in (tensors, same))
        assert all(torch.equal(a, b) for a, b in zip(got, expected))


def test_no_rows_and_no_columns():
    """An empty batch: sums are zeros."""
    for shape in ((0, 5, 24), (2, 0, 24), (2, 3, 0)):
        z, scale = torch.empty(shape, dtype=torch.bfloat16), torch.ones(shape[2])
        assert epilogue_fwd(z, "kelu", scale)[0].shape == shape
        dz, dscale, dbias, _ = epilogue_bwd(z, z, "kelu", scale)
        assert dz.shape == shape and torch.equal(dscale, 0 * scale) and torch.equal(dbias, 0 * scale)


def test_forward_blocks_go_round_where_there_are_enough_rows():
    z = torch.zeros(1, 300, 1032)
    few, many = (epilogue_fwd(z, "kelu", multiprocessors=n)[1].chunks for n in (132, 1))
    assert few == -(-300 // 64) and many == -(-300 // 256)


def test_how_sums_are_split_depends_on_the_shape_alone():
    z, scale = torch.randn(3, 900, 40), torch.ones(40)
    told = [epilogue_bwd(t, t, "kelu", scale)[3].chunks for t in (z, z.mT.contiguous().mT, z[:, :1].expand(z.shape))]
    assert told[0] > 1 and len(set(told)) == 1


class _Emulated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, residual, scale, mask, case, rng):
        ctx.save_for_backward(z, scale, mask)
        ctx.case, ctx.common = case, {"registers": case.registers, "dropout": case.dropout, "rng": rng, "layer": LAYER}
        return epilogue_fwd(z, case.activation, scale, mask, residual, **ctx.common)[0]

    @staticmethod
    def backward(ctx, grad):
        z, scale, mask = ctx.saved_tensors
        case = ctx.case
        dz, dscale, dbias, _ = epilogue_bwd(grad, z, case.activation, scale, mask, **ctx.common)
        assert torch.allclose(dbias, dz.sum((0, 1)))
        return dz, grad if case.residual else None, dscale if case.scale else None, None, None, None


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation):
    for case in (
        EpilogueCase((2, 3, 4), activation, **RESIDUAL, registers=1, mask=True),
        EpilogueCase((2, 2, 5), activation, dropout=RATE),
        EpilogueCase((2, 2, 3), activation, scale="wide", dropout=RATE, mask=True, layout="transposed"),
    ):
        i = inputs_of(replace(case, registers=0, mask=False), torch.float64)
        mask = inputs_of(case, torch.float64).mask
        z = (i.z + 0.0123).requires_grad_()  # away from kinks
        residual = i.residual.clone().requires_grad_() if case.residual else None
        scale = i.scale.clone().requires_grad_() if case.scale else None
        inputs = [t for t in (z, residual, scale) if t is not None]

        def function(*tensors, case=case, mask=mask, rng=i.rng):
            rest = iter(tensors[1:])
            residual = next(rest) if case.residual else None
            return _Emulated.apply(tensors[0], residual, next(rest, None), mask, case, rng)

        assert torch.autograd.gradcheck(function, inputs)
