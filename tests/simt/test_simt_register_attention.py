"""Register attention's CUDA kernels in the emulator: right in every dtype, limit and order; gradcheck in fp64."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import simt_emulator as emulator
import simt_register_attention as attention
import torch
from simt_register_attention_cases import CASES, LOW_CHIP, RNG, SMALL_CHIP, AttentionCase, inputs_of, run

from sdp_kernels.reference.philox import ATTENTION, keep_mask
from sdp_kernels.reference.register_attention import ATTEND, attention_mask
from sdp_kernels.reference.register_attention import register_attention as reference

sys.path.append(str(Path(__file__).resolve().parents[1] / "kernels"))
from _numerics import assert_as_exact

pytestmark = pytest.mark.proof("emulator")
HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float64, torch.float32, *HALF)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
half_dtypes = pytest.mark.parametrize("dtype", HALF, ids=lambda d: str(d).removeprefix("torch."))

# Shapes and values that ask for more than the small cases.
HARD_CASES = [
    AttentionCase(1, 197, 1, 64),
    AttentionCase(1, 261, 1, 96, registers=5, attend="separate", dropout=0.2),
    AttentionCase(2, 17, 2, 56, norms="", gain=6.0),
    AttentionCase(1, 120, 1, 64, norms="", gain=4.0),
    AttentionCase(1, 150, 1, 32, norms="", gain=6.0, limits=SMALL_CHIP, scale=0.3),
    AttentionCase(1, 37, 1, 104, eps=1e-12, scale=1.5),
    AttentionCase(1, 21, 2, 16, scale=0.0, registers=2, attend="image_to_image"),
    AttentionCase(1, 64, 1, 32, registers=64, attend="registers_to_registers"),
    AttentionCase(1, 131, 1, 88, limits=LOW_CHIP, dropout=0.3, registers=40, attend="registers_to_registers"),
    AttentionCase(9, 5, 9, 48, norms="qk"),
    AttentionCase(1, 261, 1, 96, wgmma=True),
    AttentionCase(1, 197, 1, 64, wgmma=True),
    AttentionCase(1, 120, 1, 64, norms="", gain=4.0, wgmma=True),
    AttentionCase(1, 37, 1, 88, eps=1e-12, scale=1.5, wgmma=True),
    AttentionCase(1, 21, 2, 16, scale=0.0, wgmma=True),
    AttentionCase(9, 5, 9, 8, norms="w", wgmma=True),
]


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    for dtype in DTYPES:
        emulator.schedule(attention.OPERATOR, dtype)


def expected(case: AttentionCase, inputs, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """By the reference in ``dtype``, differentiated by PyTorch."""
    o = case.options
    qkv = inputs.qkv.to(dtype).requires_grad_()
    wide = emulator.wide_dtype(dtype)
    norms = [None if p is None else p.to(wide).requires_grad_() for p in inputs.norms]
    ones = [torch.ones(case.d, dtype=wide), torch.zeros(case.d, dtype=wide)] * 2
    pairs = [
        None
        if norms[i] is None and norms[i + 1] is None
        else tuple(ones[j] if norms[j] is None else norms[j] for j in (i, i + 1))
        for i in (0, 2)
    ]
    limits = (o["eps"], o["scale"], o["registers"], o["attend"], o["dropout"], o["rng"], o["layer"])
    y = reference(qkv, *pairs, *limits)
    names = ("dq_weight", "dq_bias", "dk_weight", "dk_bias")
    leaves = {"dqkv": qkv} | {name: p for name, p in zip(names, norms) if p is not None}
    gradients = torch.autograd.grad(y, list(leaves.values()), inputs.grad.to(dtype))
    return {"y": y.detach()} | dict(zip(leaves, gradients))


def log_sum_exp(case: AttentionCase, inputs) -> torch.Tensor:
    """In fp64, from norms rounded as the kernels round them."""
    q, k, _ = inputs.qkv.double().permute(2, 0, 3, 1, 4)
    norms = [None if p is None else p.double() for p in inputs.norms]
    for which in (0, 1):
        weight, bias = norms[2 * which : 2 * which + 2]
        if weight is None and bias is None:
            continue
        normed = torch.nn.functional.layer_norm((q, k)[which], (case.d,), weight, bias, case.eps)
        q, k = (normed, k) if which == 0 else (q, normed)
    scores = q @ k.transpose(-1, -2) * (case.d**-0.5 if case.scale is None else case.scale)
    mask = attention_mask(case.attend, case.tokens, case.registers, scores.device)
    return (scores if mask is None else scores.masked_fill(~mask, float("-inf"))).logsumexp(-1)


def assert_right(case: AttentionCase, dtype: torch.dtype) -> None:
    inputs = inputs_of(case, dtype)
    got = run(case, dtype)
    exact, peer = expected(case, inputs, torch.float64), expected(case, inputs, dtype)
    lse = log_sum_exp(case, inputs)
    loose = 4 * torch.finfo(dtype).eps * max(1.0, lse.abs().max().item())
    assert (got.pop("lse").double() - lse).abs().max() <= loose
    assert got.keys() == exact.keys()
    for part, name in enumerate(("dq", "dk", "dv")):
        for source in (got, exact, peer):
            source[name] = source["dqkv"][:, :, part]
    rows = case.tokens * case.batch
    for name, value in got.items():
        if name == "dqkv":
            continue
        # Scores of hundreds magnify fp64's rounding; few sums of rounded numbers lean to one side by chance. A shift of
        # all keys changes no softmax: the gradient of k's bias is 0, and what comes out is noise of the others' size.
        size = (exact["dk" if name == "dk_bias" else name]).abs().max().item()
        factor = {torch.float64: 1000, torch.float32: 8 if case.gain > 1 else 0}.get(dtype, 0)
        slack = factor * torch.finfo(dtype).eps * size
        if name.startswith(("dq_", "dk_")):
            slack += torch.finfo(dtype).eps / 4 * size * (rows**0.5 if name == "dk_bias" else 1)
        assert_as_exact(f"{case} {name}", value, exact[name], peer[name], rows=rows, slack=slack)


@dtypes
@pytest.mark.parametrize("case", [*CASES, *HARD_CASES], ids=str)
def test_right(case, dtype):
    if case.tokens > 150 and dtype in (torch.float64, torch.float16):
        case = dataclasses.replace(case, tokens=case.tokens // 3)
    assert_right(case, dtype)


@pytest.mark.parametrize("tokens", [15, 16, 17, 127, 128, 129, 201])
@half_dtypes
def test_every_length(tokens, dtype):
    assert_right(AttentionCase(1, tokens, 1, 32, registers=1, attend="image_to_image"), dtype)


@pytest.mark.parametrize("tokens", [1, 16, 17, 47, 48, 49, 63, 64, 65, 96, 97, 128, 129, 144, 145, 192, 193, 208, 209])
@half_dtypes
def test_every_length_by_warpgroups(tokens, dtype):
    """On both sides of what they take at a time: 64 rows on one side, 48 on the other; up to 16 rows left over."""
    assert_right(AttentionCase(1, tokens, 1, 32, wgmma=True), dtype)


def test_long_sequence_in_pieces():
    """1029 tokens that do not fit: several blocks per head, each with several pieces."""
    case = AttentionCase(1, 1029, 1, 32, limits=(60_000, 70_000, 132))
    inputs = inputs_of(case, torch.bfloat16)
    *_, told = attention.forward(inputs.qkv, inputs.norms, **case.options, limits=case.limits)
    assert told.parts > 1 and 1029 > told.chunk > 128
    assert_right(case, torch.bfloat16)


@dtypes
@pytest.mark.parametrize("case", [CASES[2], CASES[3], CASES[8], CASES[12], CASES[14], CASES[15]], ids=str)
def test_same_in_every_order(case, dtype):
    wanted = run(case, dtype)
    for order in emulator.ORDERS[1:]:
        emulator.schedule(attention.OPERATOR, dtype, order, order)
        got = run(case, dtype)
        emulator.schedule(attention.OPERATOR, dtype)
        assert all(torch.equal(got[name], wanted[name]) for name in wanted), f"order {order}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", [CASES[2], CASES[3], CASES[14]], ids=str)
def test_samples_do_not_depend_on_their_batch(case, dtype):
    case = dataclasses.replace(case, batch=3, dropout=0.0 if case.wgmma else 0.2)
    i = inputs_of(case, dtype)
    o = case.options | {"limits": case.limits}
    y, lse, _ = attention.forward(i.qkv, i.norms, **o)
    dqkv, _, _ = attention.backward(i.grad, i.qkv, y, lse, i.norms, **o, wgmma=case.wgmma)
    for sample in range(3):
        one = slice(sample, sample + 1)
        alone = o | {"rng": torch.tensor([RNG[0], RNG[1], RNG[2] + sample])}
        qkv, grad = i.qkv[one].clone(), i.grad[one].clone()
        y_alone, lse_alone, _ = attention.forward(qkv, i.norms, **alone)
        dqkv_alone, _, _ = attention.backward(grad, qkv, y_alone, lse_alone, i.norms, **alone, wgmma=case.wgmma)
        assert torch.equal(y_alone, y[one]) and torch.equal(lse_alone, lse[one])
        assert torch.equal(dqkv_alone, dqkv[one])


@dtypes
@pytest.mark.parametrize("limits", [emulator.H200, SMALL_CHIP], ids=["whole", "pieces"])
@pytest.mark.parametrize("tokens", [29, 30, 32])
def test_masks_are_philox(dtype, limits, tokens):
    """Weights all 1/T and V, or dY, a unit matrix: the result has a zero exactly where an element is dropped."""
    rng, heads, samples = torch.tensor(RNG), 3, 2
    mask = keep_mask(rng, 5, ATTENTION, samples, heads * tokens * tokens, 0.3, torch.float32)
    mask = mask.view(samples, heads, tokens, tokens)
    unit = torch.eye(tokens, 32).to(dtype)
    qkv = torch.zeros(samples, tokens, 3, heads, 32, dtype=dtype)
    qkv[:, :, 2] = unit[:, None]
    options = {"dropout": 0.3, "rng": rng, "layer": 5, "limits": limits}
    y, lse, _ = attention.forward(qkv, **options)
    weights = y.view(samples, tokens, heads, 32)[..., :tokens].permute(0, 2, 1, 3)
    assert torch.allclose(weights.float() * tokens, mask, rtol=1e-2)
    assert torch.equal(weights == 0, mask == 0)
    grad = unit[:, None].expand(samples, tokens, heads, 32).reshape(samples, tokens, heads * 32)
    dqkv, _, _ = attention.backward(grad.contiguous(), qkv, y, lse, **options)
    dv = dqkv[:, :, 2].permute(0, 2, 3, 1)[:, :, :tokens]
    assert torch.equal(dv == 0, mask == 0)
    assert torch.allclose(dv.float() * tokens, mask, rtol=1e-2)


@pytest.mark.parametrize("attend", ATTEND)
@half_dtypes
def test_forbidden_tokens_are_not_read(attend, dtype):
    """Other values of V's forbidden rows, however large, change no bit; other values of the allowed ones do."""
    tokens, registers = 40, 5
    case = AttentionCase(1, tokens, 1, 32, registers=registers, attend=attend)
    i = inputs_of(case, dtype)
    y, _, _ = attention.forward(i.qkv, i.norms, **case.options)
    mask = attention_mask(attend, tokens, registers, torch.device("cpu"))
    for query in (0, tokens - 1):
        allowed = torch.ones(tokens, dtype=torch.bool) if mask is None else mask[query]
        for rows, same in ((~allowed, True), (allowed, False)):
            changed = i.qkv.clone()
            changed[:, rows, 2] += 100
            y_changed, _, _ = attention.forward(changed, i.norms, **case.options)
            assert torch.equal(y_changed[:, query], y[:, query]) == (same or not rows.any())


@half_dtypes
@pytest.mark.parametrize("wgmma", [False, True])
def test_samples_keep_their_nan(dtype, wgmma):
    case = AttentionCase(2, 20, 2, 32)
    i = inputs_of(case, dtype)
    y, *_ = attention.forward(i.qkv, i.norms)
    spoiled = i.qkv.clone()
    spoiled[0, 3, 1, 1] = float("nan")
    y_spoiled, lse_spoiled, _ = attention.forward(spoiled, i.norms)
    assert torch.equal(y_spoiled[1], y[1]) and torch.equal(y_spoiled[0, :, :32], y[0, :, :32])
    assert y_spoiled[0, :, 32:].isnan().all()
    dqkv, _, _ = attention.backward(i.grad, spoiled, y_spoiled, lse_spoiled, i.norms, wgmma=wgmma)
    assert dqkv[1].isfinite().all() and dqkv[0, :, :, 0].isfinite().all()


class _Emulated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, *norms_and_options):
        *norms, options = norms_and_options
        y, lse, _ = attention.forward(qkv.contiguous(), norms, **options)
        ctx.save_for_backward(qkv, y, lse, *norms)
        ctx.options = options
        return y

    @staticmethod
    def backward(ctx, grad):
        qkv, y, lse, *norms = ctx.saved_tensors
        dqkv, gradients, _ = attention.backward(grad.contiguous(), qkv.contiguous(), y, lse, norms, **ctx.options)
        return dqkv, *gradients, None


@pytest.mark.parametrize(
    "case",
    [
        AttentionCase(1, 3, 2, 8, dropout=0.3),
        AttentionCase(1, 4, 1, 8, registers=2, attend="separate", scale=-0.4),
        AttentionCase(1, 34, 1, 8, norms="k", registers=1, attend="registers_to_registers"),
    ],
    ids=str,
)
def test_gradcheck(case):
    i = inputs_of(case, torch.float64)
    leaves = [t if t is None else t.detach().clone().requires_grad_() for t in (i.qkv, *i.norms)]
    assert torch.autograd.gradcheck(lambda *t: _Emulated.apply(*t, case.options), leaves, fast_mode=case.tokens > 4)


@pytest.mark.parametrize(
    "limits", [emulator.H200, emulator.A100, (101_376, 102_400, 132)], ids=["H200", "A100", "4090"]
)
@pytest.mark.parametrize("d", [32, 64, 96, 128])
@pytest.mark.parametrize("tokens", [1, 197, 261, 577, 1029, 4101])
def test_plan_covers_all_rows_and_fits(tokens, d, limits):
    dtype = torch.bfloat16
    qkv = torch.empty(1, tokens, 3, 2, d, dtype=dtype)
    y, lse = torch.empty(1, tokens, 2 * d, dtype=dtype), torch.empty(1, 2, tokens)
    emulator.schedule(attention.OPERATOR, dtype, dry=True)
    emulator.launches(attention.OPERATOR, dtype)
    *_, forward = attention.forward(qkv, limits=limits)
    *_, backward = attention.backward(y, qkv, y, lse, limits=limits)
    launched = emulator.launches(attention.OPERATOR, dtype)
    assert len(launched) == 2
    for told, (_, blocks, threads, shared), sides in zip((forward, backward), launched, (1, 2)):
        assert shared <= limits[0] and told.chunk % 16 == 0 and told.chunk >= min(32, tokens)
        tiles = 2 if d <= 96 and sides == 1 else 1
        assert told.parts * told.rounds * threads // 32 * tiles * 16 >= tokens
        assert blocks == 2 * sides * told.parts
        assert told.parts == 1 or (told.rounds == 1 and told.chunk < tokens)


@pytest.mark.parametrize("d", [32, 64, 96])
@pytest.mark.parametrize("tokens", [1, 197, 201, 261, 272])
def test_plan_of_warpgroups_leaves_room_for_another_block(tokens, d):
    dtype, heads = torch.bfloat16, 3
    qkv, y, lse = torch.empty(1, tokens, 3, heads, d), torch.empty(1, tokens, heads * d), torch.empty(1, heads, tokens)
    emulator.schedule(attention.OPERATOR, dtype, dry=True)
    emulator.launches(attention.OPERATOR, dtype)
    *_, told = attention.backward(y.to(dtype), qkv.to(dtype), y.to(dtype), lse, wgmma=True)
    ((name, blocks, threads, shared),) = emulator.launches(attention.OPERATOR, dtype)
    assert "wgmma" in name and told.wgmma and (blocks, threads) == (2 * heads, 128)
    assert 2 * (shared + 1024) <= emulator.H200[1] and told.chunk >= max(48, tokens)
    left = tokens - 64 * told.rounds
    assert -64 < left <= (16 if tokens > 128 else 0)


@pytest.mark.parametrize(
    "why",
    [
        {"tokens": 289, "d": 96},
        {"d": 104},
        {"dropout": 0.1},
        {"registers": 2, "attend": "separate"},
        {"limits": SMALL_CHIP},
        {"dtype": torch.float32},
        {"wgmma": False},
    ],
    ids=str,
)
def test_other_kernels_where_warpgroups_do_not_serve(why):
    options = {"tokens": 20, "d": 32, "dtype": torch.bfloat16, "wgmma": True} | why
    tokens, d, dtype = (options.pop(name) for name in ("tokens", "d", "dtype"))
    qkv, y, lse = (torch.empty(shape, dtype=dtype) for shape in ((1, tokens, 3, 1, d), (1, tokens, d), (1, 1, tokens)))
    options["rng"] = torch.tensor(RNG) if "dropout" in options else None
    emulator.schedule(attention.OPERATOR, dtype, dry=True)
    emulator.launches(attention.OPERATOR, dtype)
    *_, told = attention.backward(y, qkv, y, lse.float(), **options)
    ((name, *_),) = emulator.launches(attention.OPERATOR, dtype)
    assert "wgmma" not in name and not told.wgmma


def test_whole_heads_are_on_chip_where_it_matters():
    """ViT-S/B (d 64, T 197, 201) and SdP-Net XL (d 96, T 261) on an H200."""
    for tokens, d in ((197, 64), (201, 64), (261, 64), (261, 96)):
        case = AttentionCase(1, tokens, 1, d)
        i = inputs_of(case, torch.bfloat16)
        emulator.schedule(attention.OPERATOR, torch.bfloat16, dry=True)
        y, lse, told = attention.forward(i.qkv, i.norms)
        *_, told_bwd = attention.backward(i.grad, i.qkv, y, lse, i.norms)
        for t in (told, told_bwd):
            assert t.parts == 1 and t.chunk >= tokens
