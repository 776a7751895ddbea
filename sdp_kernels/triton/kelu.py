"""KeLü forward and backward. The formula, its evaluation without cancellation and the polynomials are those of
csrc/common/kelu.h:

    u = π(a − min(|x|, a))/a ∈ [0, π]                    so no range reduction is needed, and no sine
    f(−|x|)  = −|x| · (u − sin u) / 2π                   f(x) = max(x, 0) + f(−|x|)
    f′(−|x|) = ½[(u − sin u)/π − (|x|/a)(1 − cos u)]     f′(|x|) = 1 − f′(−|x|)

NaN passes through: every selection keeps its NaN operand.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import ACCUMULATOR, configuration, launch, register
from ._strides import Tiling, tiling


@triton.jit
def _sine_gap(t, ACC: tl.constexpr):
    """Q(t) = (u − sin u)/u³ at t = u² on [0, π²]: relative error below 3e-9 in fp32, 3e-19 in fp64."""
    if tl.float64 == ACC:
        q = t * 3.53315858066318713e-23 + -1.94955551391600425e-20
        q = q * t + 8.21961757707918198e-18
        q = q * t + -2.81144891975267293e-15
        q = q * t + 7.64716329268912530e-13
        q = q * t + -1.60590438219507206e-10
        q = q * t + 2.50521083851276100e-08
        q = q * t + -2.75573192239820173e-06
        q = q * t + 1.98412698412698169e-04
        q = q * t + -8.33333333333333322e-03
        return q * t + 1.66666666666666657e-01
    else:
        q = t * -1.390408338e-10 + 2.481271677e-08
        q = q * t + -2.754484186e-06
        q = q * t + 1.984097191e-04
        q = q * t + -8.333330691e-03
        return q * t + 1.666666663e-01


@triton.jit
def _cosine_gap(t, ACC: tl.constexpr):
    """R(t) = (1 − cos u)/u² at t = u² on [0, π²], as exact as Q."""
    if tl.float64 == ACC:
        r = t * 8.06216791590282086e-22 + -4.09106112108483715e-19
        r = r * t + 1.56166761162674057e-16
        r = r * t + -4.77945661215473813e-14
        r = r * t + 1.14707445062698370e-11
        r = r * t + -2.08767569509120072e-09
        r = r * t + 2.75573192232053739e-07
        r = r * t + -2.48015873015776827e-05
        r = r * t + 1.38888888888888287e-03
        r = r * t + -4.16666666666666644e-02
        return r * t + 5.00000000000000000e-01
    else:
        r = t * 9.883164324e-12 + -2.065857552e-09
        r = r * t + 2.754216395e-07
        r = r * t + -2.480103909e-05
        r = r * t + 1.388887930e-03
        r = r * t + -4.166666602e-02
        return r * t + 4.999999999e-01


@triton.jit
def kelu_value(x, ACC: tl.constexpr):
    """f(x) of a tensor of ACC (float32 or float64)."""
    magnitude = tl.abs(x)
    magnitude = tl.where(magnitude > 3.5, 3.5, magnitude)
    u = (3.5 - magnitude) * 0.8975979010256552  # π / a
    t = u * u
    negative = magnitude * (u * t * _sine_gap(t, ACC)) * -0.15915494309189535  # −1 / 2π
    return tl.where(x < 0, 0.0, x) + negative


@triton.jit
def kelu_slope(x, ACC: tl.constexpr):
    """f′(x) of a tensor of ACC (float32 or float64)."""
    magnitude = tl.abs(x)
    magnitude = tl.where(magnitude > 3.5, 3.5, magnitude)
    u = (3.5 - magnitude) * 0.8975979010256552  # π / a
    t = u * u
    negative = (u * t * _sine_gap(t, ACC)) * 0.15915494309189535  # 1 / 2π
    negative -= magnitude * (t * _cosine_gap(t, ACC)) * 0.14285714285714285  # 1 / 2a
    return tl.where(x < 0, negative, 1.0 - negative)


@triton.jit
def _result(grad_ptr, x_ptr, grad_at, x_at, inside, ACC: tl.constexpr):
    """f(x), or grad · f′(x) where there is a gradient."""
    x = tl.load(x_ptr + x_at, inside).to(ACC)
    if grad_ptr is None:
        return kelu_value(x, ACC)
    else:
        return tl.load(grad_ptr + grad_at, inside).to(ACC) * kelu_slope(x, ACC)


@triton.jit(do_not_specialize=["elements"])
def dense(grad_ptr, x_ptr, y_ptr, elements, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """All tensors dense in one order. Whole blocks go without a mask, so that any length is read in 16-byte loads."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    at = tl.arange(0, BLOCK)
    x_ptr += first
    y_ptr += first
    if grad_ptr is not None:
        grad_ptr += first
    if first + BLOCK <= elements:
        tl.store(y_ptr + at, _result(grad_ptr, x_ptr, at, at, None, ACC).to(y_ptr.dtype.element_ty))
    else:
        inside = at < elements - first
        tl.store(y_ptr + at, _result(grad_ptr, x_ptr, at, at, inside, ACC).to(y_ptr.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["second", "rows", "columns"])
def strided(
    grad_ptr, x_ptr, y_ptr, second, rows, columns,
    grad_first, grad_second, grad_row, grad_column,
    x_first, x_second, x_row, x_column,
    y_first, y_second, y_row, y_column,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Any strides over sizes (first, second, rows, columns): a tile of rows × columns per program, so that tensors
    whose fastest dimensions differ are all read and written along their own."""
    program = tl.program_id(0)
    column_tiles = tl.cdiv(columns, COLUMNS)
    row_tiles = tl.cdiv(rows, ROWS)
    column = (program % column_tiles).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    program = program // column_tiles
    row = (program % row_tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    program = (program // row_tiles).to(tl.int64)
    j = program % second
    i = program // second
    inside = (row < rows) & (column < columns)
    x_at = i * x_first + j * x_second + row * x_row + column * x_column
    y_at = i * y_first + j * y_second + row * y_row + column * y_column
    grad_at = x_at
    if grad_ptr is not None:
        grad_at = i * grad_first + j * grad_second + row * grad_row + column * grad_column
    result = _result(grad_ptr, x_ptr, grad_at, x_at, inside, ACC)
    tl.store(y_ptr + y_at, result.to(y_ptr.dtype.element_ty), inside)


def _launch_strided(tensors: list[Tensor], has_grad: bool, parts: Tiling) -> None:
    x = tensors[1]
    first, second, rows, columns = parts.sizes
    shape = "line" if rows == 1 else "narrow" if columns <= 8 else "square"
    constants = configuration(x, "kelu", "backward" if has_grad else "forward", shape)
    row_block, column_block = constants["rows"], constants["columns"]
    for offsets in parts.offsets:
        there = [t.as_strided((1,), (1,), t.storage_offset() + o) for t, o in zip(tensors, offsets, strict=True)]
        launch(
            strided,
            (first * second * triton.cdiv(rows, row_block) * triton.cdiv(columns, column_block),),
            there[2] if has_grad else None,
            *(there[1], there[0], second, rows, columns),
            *parts.strides[2],
            *parts.strides[1],
            *parts.strides[0],
            warps=constants["warps"],
            ROWS=row_block,
            COLUMNS=column_block,
            ACC=ACCUMULATOR[x.dtype],
        )


def _run(grad: Tensor | None, x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    has_grad = grad is not None
    tensors = [y, x, grad if has_grad else x]
    parts = tiling(tensors)
    if parts.dense:
        constants = configuration(x, "kelu", "backward" if has_grad else "forward", "dense")
        launch(
            dense,
            (triton.cdiv(x.numel(), constants["block"]),),
            *(grad, x, y, x.numel()),
            warps=constants["warps"],
            BLOCK=constants["block"],
            ACC=ACCUMULATOR[x.dtype],
        )
    elif x.numel():
        _launch_strided(tensors, has_grad, parts)
    return y


@register("kelu_fwd")
def kelu_fwd(x: Tensor) -> Tensor:
    """f(x), in ``empty_like(x)``'s strides. Moves 2 elements per element."""
    return _run(None, x)


@register("kelu_bwd")
def kelu_bwd(grad: Tensor, x: Tensor) -> Tensor:
    """grad · f′(x), in ``empty_like(x)``'s strides; grad of any strides. Moves 3 elements per element."""
    return _run(grad, x)
