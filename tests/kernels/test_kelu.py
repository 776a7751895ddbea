"""KeLü: accuracy over every 16-bit pattern, vector tails, threads, the second derivative."""

from __future__ import annotations

import ast
import math
import re
from pathlib import Path

import _plain as plain
import pytest
import torch
from _cases import backend_params, on_backends_of
from _layouts import layouts, normal
from _numerics import DTYPES, NARROW, differentiate
from hypothesis import given
from hypothesis import strategies as st

import sdp_kernels as sk

A = 3.5
pytestmark = pytest.mark.levels
on_kernels = pytest.mark.parametrize("backend", [p for p in backend_params("kelu") if p.values != ("reference",)])


def exact(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(f, f′) in fp64 without cancellation: u − sin u and 1 − cos u by their series where u is small."""
    x = x.double()
    m = x.abs().clamp(max=A)
    u = math.pi * (A - m) / A
    sine_gap = sum((-1) ** (i + 1) * u ** (2 * i + 1) / float(math.factorial(2 * i + 1)) for i in range(1, 12))
    cosine_gap = 2 * torch.sin(u / 2) ** 2
    sine_gap = torch.where(u < 1.5, sine_gap, u - torch.sin(u))
    low, slope = -m * sine_gap / (2 * math.pi), 0.5 * (sine_gap / math.pi - m / A * cosine_gap)
    return x.clamp(min=0) + low, torch.where(x < 0, slope, 1 - slope)


def every_pattern(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


def in_ulps(x: torch.Tensor) -> torch.Tensor:
    """Position among the 16-bit numbers; +0 and −0 share one."""
    bits = x.view(torch.int16).int()
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)


def value_and_slope(x: torch.Tensor, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    (y,), (slope,) = differentiate(lambda x: sk.kelu(x, backend=backend), [x])
    return y, slope


def test_exact_agrees_with_the_definition():
    x = torch.linspace(-5, 5, 10001, dtype=torch.float64)
    (y,), (slope,) = differentiate(plain.kelu, [x])
    torch.testing.assert_close(exact(x)[0], y, rtol=0, atol=1e-14)
    torch.testing.assert_close(exact(x)[1], slope, rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@on_kernels
def test_one_ulp_on_every_16_bit_pattern(backend, dtype):
    x = every_pattern(dtype)
    y, slope = value_and_slope(x, backend)
    number = ~x.isnan()
    for name, got, right in zip(("f", "f′"), (y, slope), exact(x), strict=True):
        assert got.isnan().equal(x.isnan()), name
        off = (in_ulps(got[number]) - in_ulps(right[number].to(dtype))).abs()
        assert off.max() <= 1, f"{name}: {off.max()} ulp at {x[number][off.argmax()].item()}"
    assert y[x == math.inf] == math.inf and slope[x == math.inf] == 1
    assert y[x == -math.inf] == 0 and slope[x == -math.inf] == 0


@on_kernels
def test_single_precision_is_within_2e_7(backend):
    x = torch.cat([torch.linspace(-4, 4, 400_001), torch.tensor([-A, A]), normal(5000, dtype=torch.float32)])
    x = torch.cat([x, torch.nextafter(x, x.new_tensor(0.0)), torch.tensor([1e-40, -1e-40, 1e-30, -0.0])])
    x = x[x.abs() <= 4]
    for name, got, right in zip(("f", "f′"), value_and_slope(x, backend), exact(x), strict=True):
        error = (got.double() - right).abs()
        assert error.max() <= 2e-7, f"{name}: {error.max():.2e} at {x[error.argmax()].item()}"


@on_kernels
def test_double_precision(backend):
    x = torch.linspace(-4, 4, 100_001, dtype=torch.float64)
    for got, right in zip(value_and_slope(x, backend), exact(x), strict=True):
        torch.testing.assert_close(got, right, rtol=0, atol=5e-15)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@on_backends_of("kelu")
def test_beyond_the_transition(backend, dtype):
    x = torch.tensor([-math.inf, -1e4, -3.75, 3.75, 1e4, math.inf, math.nan], dtype=dtype)
    y, slope = value_and_slope(x, backend)
    assert torch.equal(y[:6], x[:6].clamp(min=0)) and y[6].isnan()
    assert slope[:6].tolist() == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@on_kernels
def test_result_does_not_depend_on_position_or_length(backend, dtype):
    """Vector body, vector tail and unaligned starts give the same bits."""
    x = normal(300, dtype=dtype, scale=2)
    y, slope = value_and_slope(x, backend)
    for length in [*range(1, 70), 127, 128, 129, 255]:
        for start in (0, 1, 7):
            part, part_slope = value_and_slope(x[start : start + length], backend)
            assert torch.equal(part, y[start : start + length]), (start, length)
            assert torch.equal(part_slope, slope[start : start + length]), (start, length)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@on_kernels
def test_any_number_of_threads_and_any_strides_give_the_same_bits(backend, dtype):
    x, grad = normal(3, 7, 61, 67, dtype=dtype, scale=2), normal(3, 7, 61, 67, dtype=dtype, seed=1)
    results = []
    for threads in (1, 2, 1):
        torch.set_num_threads(threads)
        for version in layouts(x).values():
            (y,), (dx,) = differentiate(lambda x: sk.kelu(x, backend=backend), [version], [grad])
            results.append((y, dx))
    for y, dx in results[1:]:
        assert torch.equal(y, results[0][0]) and torch.equal(dx, results[0][1])


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@on_kernels
def test_gradient_is_rounded_once(backend, dtype):
    """grad · f′(x), not grad · (f′(x) rounded to 16 bits)."""
    x, grad = normal(4000, dtype=dtype, scale=2), normal(4000, dtype=dtype, seed=1)
    _, (dx,) = differentiate(lambda x: sk.kelu(x, backend=backend), [x], [grad])
    wanted = grad.double() * exact(x)[1]
    half_unit = 0.51 * torch.finfo(dtype).eps * (wanted.abs() + torch.finfo(dtype).smallest_normal)
    assert ((dx.double() - wanted).abs() <= half_unit + 2e-7 * grad.abs()).all()


@on_backends_of("kelu")
def test_second_derivative(backend):
    x = torch.linspace(-4, 4, 801, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(sk.kelu(x, backend=backend).sum(), x, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), x)
    t = math.pi * x.detach() / A
    wanted = 0.5 * ((2 / A) * (1 + torch.cos(t)) - (math.pi * x.detach() / A**2) * torch.sin(t))
    torch.testing.assert_close(curvature, torch.where(x.abs() <= A, wanted, 0.0).detach(), rtol=0, atol=1e-13)


@given(
    shape=st.lists(st.integers(0, 6), max_size=5),
    order=st.randoms(use_true_random=False),
    start=st.integers(0, 2),
    step=st.integers(1, 3),
    dtype=st.sampled_from(DTYPES),
)
@on_kernels
def test_any_shape_and_strides(backend, shape, order, start, step, dtype):
    dims = list(range(len(shape)))
    order.shuffle(dims)
    stored = normal(*(start + step * shape[d] for d in dims), dtype=dtype)
    view = stored[tuple(slice(start, start + step * shape[d], step) for d in dims)]
    x = view.permute([dims.index(d) for d in range(len(shape))])
    assert list(x.shape) == shape
    y, slope = value_and_slope(x, backend)
    assert y.shape == x.shape and y.dtype == dtype and y.stride() == torch.empty_like(x).stride()
    dense, dense_slope = value_and_slope(x.contiguous(), backend)
    assert torch.equal(y, dense) and torch.equal(slope, dense_slope)
    torch.testing.assert_close(y.double(), exact(x)[0], rtol=torch.finfo(dtype).eps, atol=3e-7)


@on_backends_of("kelu")
def test_autocast_leaves_the_dtype_alone(backend):
    for dtype in DTYPES:
        x = normal(50, dtype=dtype)
        with torch.autocast("cpu", torch.bfloat16):
            y, slope = value_and_slope(x, backend)
        assert y.dtype == slope.dtype == dtype
        assert torch.equal(y, value_and_slope(x, backend)[0])


def test_activation_and_module_are_the_operator():
    x = normal(2, 3, 4)
    assert torch.equal(sk.activation(x, "kelu"), sk.kelu(x))
    assert torch.equal(sk.KeLU()(x), sk.kelu(x))
    assert torch.equal(sk.KeLU(backend="reference")(x), sk.kelu(x, backend="reference"))


ROOT = Path(__file__).resolve().parents[2]
GAPS = ("sine_gap", "cosine_gap")


def tables_in_c() -> dict[tuple[str, str], list[float]]:
    """(polynomial, scalar) → coefficients, lowest power first, as csrc/common/kelu.h has them."""
    text = (ROOT / "csrc/common/kelu.h").read_text()
    found = re.findall(r"V (\w+)\((float|double), V t\) \{.*?c\[\] = \{(.*?)\};", text, re.DOTALL)
    return {(name, scalar): [float(c.strip().rstrip("f")) for c in row.split(",")] for name, scalar, row in found}


def tables_in_triton() -> dict[tuple[str, str], list[float]]:
    """The same from sdp_kernels/triton/kelu.py, where each function is an ``if`` of two Horner schemes: powers fall."""
    tables = {}
    for function in ast.parse((ROOT / "sdp_kernels/triton/kelu.py").read_text()).body:
        if isinstance(function, ast.FunctionDef) and function.name.lstrip("_") in GAPS:
            branch = next(node for node in function.body if isinstance(node, ast.If))
            for scalar, lines in (("double", branch.body), ("float", branch.orelse)):
                numbers = re.findall(r"(?<![\w.])-?\d\.\d+e?[-+]?\d*", "\n".join(map(ast.unparse, lines)))
                tables[function.name.lstrip("_"), scalar] = [float(n) for n in reversed(numbers)]
    return tables


def rounded(values: list[float], scalar: str) -> list[float]:
    return torch.tensor(values, dtype=getattr(torch, {"float": "float32", "double": "float64"}[scalar])).tolist()


def test_both_backends_have_the_same_polynomials():
    """As the numbers that the arithmetic sees, fp32's rounded to fp32."""
    in_c, in_triton = tables_in_c(), tables_in_triton()
    assert {key: len(row) for key, row in in_c.items()} == {
        ("sine_gap", "float"): 6,
        ("sine_gap", "double"): 11,
        ("cosine_gap", "float"): 7,
        ("cosine_gap", "double"): 11,
    }
    assert in_triton.keys() == in_c.keys()
    for key, row in in_c.items():
        assert rounded(in_triton[key], key[1]) == rounded(row, key[1]), key


@pytest.mark.parametrize(("scalar", "bound"), [("float", 3e-9), ("double", 3e-15)])
@pytest.mark.parametrize("name", GAPS)
def test_polynomials_are_what_they_say(name, scalar, bound):
    """(u − sin u)/u³ and (1 − cos u)/u² by their series, digits as written; fp64 is bounded by its own rounding."""
    t = torch.linspace(0, math.pi**2, 2001, dtype=torch.float64)
    start = 3 if name == "sine_gap" else 2
    exact_gap = sum((-1) ** i * t**i / float(math.factorial(2 * i + start)) for i in range(20))
    got = sum(c * t**i for i, c in enumerate(tables_in_c()[name, scalar]))
    assert ((got - exact_gap).abs() / exact_gap).max() < bound


@pytest.mark.parametrize("name", sk.ACTIVATIONS)
def test_activations_by_name(name):
    x = torch.linspace(-6, 6, 401, dtype=torch.float64)
    got = differentiate(lambda x: sk.activation(x, name), [x])
    wanted = differentiate(plain.ACTIVATIONS[name], [x])
    apart = x != 0  # the kink of relu and its like
    torch.testing.assert_close(got[0][0], wanted[0][0], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(got[1][0][apart], wanted[1][0][apart], rtol=1e-12, atol=1e-12)
