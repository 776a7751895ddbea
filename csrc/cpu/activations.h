// The models' activations and their derivatives on SIMD vectors, fp32 and fp64.
//
// exp, erf and what follows from them are polynomials in fp32 (errors below 1e-7, absolute where the value is below 1); in
// fp64, and for the rarer activations, the C library is asked lane by lane.
#pragma once
#include <type_traits>

#include "common/kelu.h"
#include "cpu/simd.h"

namespace sdp {

// In the order of the names in sdp_kernels/ops/activation.py.
enum Activation { kNone, kKelu, kGelu, kFastGelu, kRelu, kTanh, kSigmoid, kLeakyRelu, kSelu };

namespace {

using Doubles = VectorOf<double>::type;

template <class V, class F>
SDP_HOST_DEVICE V by_lane(V x, const F& f) {
  for (unsigned i = 0; i < sizeof(V) / sizeof(x[0]); ++i) x[i] = f(x[i]);
  return x;
}

// eˣ: x = n·ln2 + r, |r| ≤ ln2/2, times 2ⁿ by the exponent's bits. Below −87 it is 0, above 88 it stays finite.
SDP_HOST_DEVICE Floats exponential(Floats x) {
  const Floats high = Floats{} + 88.0f, low = Floats{} - 87.0f;
  const Floats bounded = x > high ? high : x < low ? low : x;
  const Floats shifted = bounded * 1.44269504f + 12582912.0f;  // 1.5·2²³: the sum's last bits are the rounded n
  const Floats n = shifted - 12582912.0f, r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
  const float c[] = {1.000000000e+00f, 1.000000038e+00f, 5.000000047e-01f, 1.666641551e-01f, 4.166635290e-02f,
                     8.375126398e-03f, 1.394110843e-03f};
  const Bits power = (bit_cast<Bits>(shifted) + 127u) << 23;
  const Floats value = horner(c, r) * bit_cast<Floats>(power);
  return x < low ? Floats{} : value;
}
SDP_HOST_DEVICE Doubles exponential(Doubles x) { return by_lane(x, [](double v) { return __builtin_exp(v); }); }

// erf: x·P(x²) below 1, 1 − exp(Q(|x|)) above.
SDP_HOST_DEVICE Floats error_function(Floats x) {
  const Floats magnitude = x < Floats{} ? -x : x, limit = Floats{} + 4.1f;
  const Floats t = magnitude > limit ? limit : magnitude;
  const float small[] = {1.128379166e+00f, -3.761262667e-01f, 1.128359472e-01f, -2.685421201e-02f, 5.189087423e-03f,
                         -8.016864287e-04f, 7.875875063e-05f};
  const float large[] = {2.979374622e-04f, -1.130141460e+00f, -6.319870659e-01f, -1.099244810e-01f, 2.633027460e-02f,
                         -4.726724977e-03f, 5.895989285e-04f, -4.518101704e-05f, 1.591706218e-06f};
  const Floats inner = x * horner(small, t * t), outer = 1.0f - exponential(horner(large, t));
  return magnitude <= 1.0f ? inner : x < Floats{} ? -outer : outer;
}
SDP_HOST_DEVICE Doubles error_function(Doubles x) { return by_lane(x, [](double v) { return __builtin_erf(v); }); }

SDP_HOST_DEVICE Floats hyperbolic_tangent(Floats x) { return 1.0f - 2.0f / (exponential(x * 2.0f) + 1.0f); }
SDP_HOST_DEVICE Doubles hyperbolic_tangent(Doubles x) { return by_lane(x, [](double v) { return __builtin_tanh(v); }); }

template <class V>
SDP_HOST_DEVICE V exact_tangent(V x) { return by_lane(x, [](auto v) { return sizeof(v) == 4 ? __builtin_tanhf(v) : __builtin_tanh(v); }); }
template <class V>
SDP_HOST_DEVICE V exponential_minus_one(V x) { return by_lane(x, [](auto v) { return sizeof(v) == 4 ? __builtin_expm1f(v) : __builtin_expm1(v); }); }

constexpr double kSqrtHalf = 0.70710678118654752440, kInvSqrt2Pi = 0.39894228040143267794;
constexpr double kSqrt2OverPi = 0.79788456080286535588, kFastGelu3 = 0.044715;  // fast_gelu's tanh(√(2/π)(x + c·x³))
constexpr double kSeluScale = 1.0507009873554804934193, kSeluAlpha = 1.6732632423543772848170;
constexpr double kLeakySlope = 0.01;

template <class V>
SDP_HOST_DEVICE V activate(V x, Activation activation) {
  using A = std::remove_cv_t<std::remove_reference_t<decltype(x[0])>>;
  switch (activation) {
    case kNone: return x;
    case kKelu: return kelu_value<A>(x);
    case kGelu: return x * (error_function(x * A(kSqrtHalf)) * A(0.5) + A(0.5));
    case kFastGelu:
      return x * (hyperbolic_tangent((x + x * x * x * A(kFastGelu3)) * A(kSqrt2OverPi)) * A(0.5) + A(0.5));
    case kRelu: return x <= V{} ? V{} : x;
    case kTanh: return exact_tangent(x);
    case kSigmoid: return A(1) / (exponential(-x) + A(1));
    case kLeakyRelu: return x <= V{} ? x * A(kLeakySlope) : x;
    case kSelu: return (x <= V{} ? exponential_minus_one(x) * A(kSeluAlpha) : x) * A(kSeluScale);
  }
  return x;
}

template <class V>
SDP_HOST_DEVICE V activation_slope(V x, Activation activation) {
  using A = std::remove_cv_t<std::remove_reference_t<decltype(x[0])>>;
  const V one = V{} + A(1);
  switch (activation) {
    case kNone: return one;
    case kKelu: return kelu_slope<A>(x);
    case kGelu:
      return error_function(x * A(kSqrtHalf)) * A(0.5) + A(0.5) + x * exponential(x * x * A(-0.5)) * A(kInvSqrt2Pi);
    case kFastGelu: {
      const V t = hyperbolic_tangent((x + x * x * x * A(kFastGelu3)) * A(kSqrt2OverPi));
      return t * A(0.5) + A(0.5) + x * (one - t * t) * (x * x * A(3 * kFastGelu3) + A(1)) * A(0.5 * kSqrt2OverPi);
    }
    case kRelu: return x <= V{} ? V{} : one;
    case kTanh: {
      const V t = exact_tangent(x);
      return one - t * t;
    }
    case kSigmoid: {
      const V s = A(1) / (exponential(-x) + A(1));
      return s * (one - s);
    }
    case kLeakyRelu: return x <= V{} ? one * A(kLeakySlope) : one;
    case kSelu: return (x <= V{} ? (exponential_minus_one(x) + A(1)) * A(kSeluAlpha) : one) * A(kSeluScale);
  }
  return one;
}

}  // namespace
}  // namespace sdp
