"""The models' activations and their derivatives on tensors of ACC (float32 or float64), by name.

NaN passes through; where both are asked for, the compiler shares what they have in common. exp is the GPU's, whose
error is a few units in the last place; tanh and eˣ − 1 are Taylor sums near 0, where the difference would cancel.
"""

import triton
import triton.language as tl

from .kelu import kelu_slope, kelu_value


@triton.jit
def _normal_cdf(x):
    return tl.math.erf(x * 0.7071067811865476) * 0.5 + 0.5


@triton.jit
def _logistic(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _tangent(x, ACC: tl.constexpr):
    far = 1.0 - 2.0 / (tl.exp(x * 2.0) + 1.0)
    if tl.float64 == ACC:
        return far
    else:
        t = x * x
        near = t * -8.863235530e-03 + 2.186948854e-02
        near = near * t + -5.396825397e-02
        near = near * t + 1.333333333e-01
        near = near * t + -3.333333333e-01
        return tl.where(t < 0.0625, x * t * near + x, far)


@triton.jit
def _exponential_minus_one(x, ACC: tl.constexpr):
    """Of x ≤ 0."""
    far = tl.exp(x) - 1.0
    if tl.float64 == ACC:
        return far
    else:
        near = x * 1.984126984e-04 + 1.388888889e-03
        near = near * x + 8.333333333e-03
        near = near * x + 4.166666667e-02
        near = near * x + 1.666666667e-01
        near = near * x + 5.000000000e-01
        return tl.where(x > -0.25, x * x * near + x, far)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr, ACC: tl.constexpr):
    """act(x)."""
    if ACTIVATION == "kelu":
        return kelu_value(x, ACC)
    elif ACTIVATION == "gelu":
        return x * _normal_cdf(x)
    elif ACTIVATION == "fast_gelu":  # ½(1 + tanh u) is the logistic function of 2u
        return x * _logistic((x + x * x * x * 0.044715) * 1.5957691216057308)
    elif ACTIVATION == "relu":
        return tl.where(x <= 0, 0.0, x)
    elif ACTIVATION == "tanh":
        return _tangent(x, ACC)
    elif ACTIVATION == "sigmoid":
        return _logistic(x)
    elif ACTIVATION == "leaky_relu":
        return tl.where(x <= 0, x * 0.01, x)
    elif ACTIVATION == "selu":
        below = _exponential_minus_one(tl.where(x > 0, 0.0, x), ACC) * 1.6732632423543772
        return tl.where(x <= 0, below, x) * 1.0507009873554805
    else:
        tl.static_assert(ACTIVATION == "none")
        return x


@triton.jit
def activation_slope(x, ACTIVATION: tl.constexpr, ACC: tl.constexpr):
    """act′(x); where there are two, the one from below, as PyTorch has it."""
    if ACTIVATION == "kelu":
        return kelu_slope(x, ACC)
    elif ACTIVATION == "gelu":
        return _normal_cdf(x) + x * tl.exp(x * x * -0.5) * 0.3989422804014327
    elif ACTIVATION == "fast_gelu":
        s = _logistic((x + x * x * x * 0.044715) * 1.5957691216057308)
        return s + x * s * (1.0 - s) * (x * x * 0.134145 + 1.0) * 1.5957691216057308
    elif ACTIVATION == "relu":
        return tl.where(x <= 0, 0.0, tl.zeros_like(x) + 1.0)
    elif ACTIVATION == "tanh":
        t = _tangent(x, ACC)
        return 1.0 - t * t
    elif ACTIVATION == "sigmoid":
        s = _logistic(x)
        return s * (1.0 - s)
    elif ACTIVATION == "leaky_relu":
        return tl.where(x <= 0, 0.01, tl.zeros_like(x) + 1.0)
    elif ACTIVATION == "selu":
        below = tl.exp(tl.where(x > 0, 0.0, x)) * 1.6732632423543772
        return tl.where(x <= 0, below, tl.zeros_like(x) + 1.0) * 1.0507009873554805
    else:
        tl.static_assert(ACTIVATION == "none")
        return tl.zeros_like(x) + 1.0
