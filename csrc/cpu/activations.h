// The models' activations and their derivatives on SIMD vectors, fp32 and fp64.
//
// In fp32 they are polynomials. What lies left of 0 is computed as a product, so that nothing cancels and the tails keep
// their relative accuracy; what lies right of 0 follows by symmetry (f(x) = x + f(−x), f′(x) = 1 − f′(−x)). A value and
// its slope share their exponential: where both are asked for, the compiler finds it once. In fp64, a test's dtype, the
// C library is asked lane by lane.
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

// eˣ − 1 = 2ⁿ·(eʳ − 1) + (2ⁿ − 1) with x = n·ln2 + r, |r| ≤ ln2/2; `power` is 2ⁿ, made of the exponent's bits.
SDP_HOST_DEVICE Floats reduced_exponential(Floats bounded, Floats& power) {
  const Floats shifted = bounded * 1.44269504f + 12582912.0f;  // 1.5·2²³: the sum's last bits are the rounded n
  const Floats n = shifted - 12582912.0f, r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
  const float c[] = {1.000000038e+00f, 5.000000047e-01f, 1.666641551e-01f, 4.166635290e-02f, 8.375126398e-03f,
                     1.394110843e-03f};
  power = bit_cast<Floats>((bit_cast<Bits>(shifted) + 127u) << 23);
  return r * horner(c, r);
}

// Below −87 eˣ is 0, above 88 it stays finite.
SDP_HOST_DEVICE Floats exponential(Floats x) {
  Floats power;
  const Floats gap = reduced_exponential(at_least(at_most(x, 88.0f), -87.0f), power);
  return x < -87.0f ? Floats{} : (gap + 1.0f) * power;
}
SDP_HOST_DEVICE Doubles exponential(Doubles x) { return by_lane(x, [](double v) { return __builtin_exp(v); }); }

SDP_HOST_DEVICE Floats exponential_minus_one(Floats x) {
  Floats power;
  const Floats gap = reduced_exponential(at_least(at_most(x, 88.0f), -87.0f), power);
  return gap * power + (power - 1.0f);
}
SDP_HOST_DEVICE Doubles exponential_minus_one(Doubles x) { return by_lane(x, [](double v) { return __builtin_expm1(v); }); }

constexpr double kInvSqrt2Pi = 0.39894228040143267794, kSqrtHalf = 0.70710678118654752440;
constexpr double kSqrt2OverPi = 0.79788456080286535588, kFastGelu3 = 0.044715;  // fast_gelu's tanh(√(2/π)(x + c·x³))
constexpr double kSeluScale = 1.0507009873554804934193, kSeluAlpha = 1.6732632423543772848170;
constexpr double kLeakySlope = 0.01;

// Φ(−a) = exp(−a²/2) · R(a) for a ≥ 0: the bell and R, a polynomial in t = 1/(1 + 0.26·a) with a relative error of
// 2e-8 (minimax; the form is Abramowitz and Stegun's 7.1.26). From a = 13.2 on, the bell stays what it is there, 1e-38.
SDP_HOST_DEVICE void normal_tail(Floats a, Floats& bell, Floats& ratio) {
  const Floats square = a * a;
  const float binary = -0.72134752044f;  // exp(−a²/2) = 2^(binary · a²) = 2ⁿ · 2^f, |f| ≤ ½
  const Floats shifted = square * binary + 12582912.0f, f = square * binary - (shifted - 12582912.0f);
  const float two[] = {1.000000072e+00f, 6.931469671e-01f, 2.402211972e-01f, 5.550713290e-02f, 9.675541293e-03f,
                       1.327646680e-03f};
  bell = horner(two, f) * bit_cast<Floats>((bit_cast<Bits>(shifted) + 127u) << 23);
  const float c[] = {1.037621923e-01f, 1.029649068e-01f, 1.033915325e-01f, 4.964169375e-02f, 1.641544062e-01f,
                     -1.555388779e-01f, 2.554693512e-01f, -1.547416040e-01f, 3.089638886e-02f};
  const Floats t = 1.0f / (a * 0.26f + 1.0f), t2 = t * t, t4 = t2 * t2;  // pairs instead of a chain: half the latency
  const Floats first = (t * c[3] + c[2]) * t2 + (t * c[1] + c[0]), second = (t * c[7] + c[6]) * t2 + (t * c[5] + c[4]);
  ratio = t * ((t4 * c[8] + second) * t4 + first);
}

template <class V>
struct Activated {
  V value, slope;
};

template <class V>
SDP_HOST_DEVICE Activated<V> kelu(V x) {
  using A = std::remove_cv_t<std::remove_reference_t<decltype(x[0])>>;
  const V m = at_most(magnitude(x), A(kKeluA)), slope = kelu_left_slope<A>(m);
  return {at_least(x, A(0)) + kelu_left<A>(m), x < V{} ? slope : A(1) - slope};
}

SDP_HOST_DEVICE Activated<Floats> gelu(Floats x) {
  const Floats a = at_most(magnitude(x), 13.2f);
  Floats bell, ratio;
  normal_tail(a, bell, ratio);
  const Floats slope = bell * (ratio - a * float(kInvSqrt2Pi));
  return {at_least(x, 0.0f) - a * bell * ratio, x < Floats{} ? slope : 1.0f - slope};
}
SDP_HOST_DEVICE Activated<Doubles> gelu(Doubles x) {
  const Doubles below = by_lane(x, [](double v) { return 0.5 * __builtin_erfc(-v * kSqrtHalf); });
  return {x * below, below + x * exponential(x * x * -0.5) * kInvSqrt2Pi};
}

// x·σ(v) with v = 2√(2/π)(x + c·x³), since (1 + tanh(v/2))/2 = σ(v).
template <class V>
SDP_HOST_DEVICE Activated<V> fast_gelu(V x) {
  using A = std::remove_cv_t<std::remove_reference_t<decltype(x[0])>>;
  const V a = at_most(magnitude(x), A(24)), square = a * a;
  const V e = exponential(a * (square * A(kFastGelu3) + A(1)) * A(-2 * kSqrt2OverPi)), q = A(1) / (e + A(1));
  const V tail = e * q;  // σ(−|v|)
  const V slope = tail - a * tail * q * (square * A(3 * kFastGelu3) + A(1)) * A(2 * kSqrt2OverPi);
  return {at_least(x, A(0)) - a * tail, x < V{} ? slope : A(1) - slope};
}

template <class V>
SDP_HOST_DEVICE Activated<V> sigmoid(V x) {
  using A = std::remove_cv_t<std::remove_reference_t<decltype(x[0])>>;
  const V e = exponential(-magnitude(x)), q = A(1) / (e + A(1));
  return {x < V{} ? e * q : q, e * q * q};
}

// An odd polynomial below 0.625 (Cephes), (1 − e)/(1 + e) with e = exp(−2|x|) above.
SDP_HOST_DEVICE Activated<Floats> hyperbolic_tangent(Floats x) {
  const Floats a = magnitude(x), square = x * x, e = exponential(a * -2.0f), q = 1.0f / (e + 1.0f);
  const float c[] = {-3.33332819422e-1f, 1.33314422036e-1f, -5.37397155531e-2f, 2.06390887954e-2f, -5.70498872745e-3f};
  const Floats inner = x + x * square * horner(c, square), outer = (1.0f - e) * q;
  return {a < 0.625f ? inner : x < Floats{} ? -outer : outer, 4.0f * e * q * q};
}
SDP_HOST_DEVICE Activated<Doubles> hyperbolic_tangent(Doubles x) {
  const Doubles t = by_lane(x, [](double v) { return __builtin_tanh(v); });
  return {t, 1.0 - t * t};
}

// Value and slope; what the caller leaves unused is not computed.
template <class V>
SDP_HOST_DEVICE Activated<V> activated(V x, Activation activation) {
  using A = std::remove_cv_t<std::remove_reference_t<decltype(x[0])>>;
  const V one = V{} + A(1);
  switch (activation) {
    case kNone: return {x, one};
    case kKelu: return kelu(x);
    case kGelu: return gelu(x);
    case kFastGelu: return fast_gelu(x);
    case kRelu: return {x <= V{} ? V{} : x, x <= V{} ? V{} : one};
    case kTanh: return hyperbolic_tangent(x);
    case kSigmoid: return sigmoid(x);
    case kLeakyRelu: return {x <= V{} ? x * A(kLeakySlope) : x, x <= V{} ? one * A(kLeakySlope) : one};
    case kSelu: {
      const V left = exponential_minus_one(x) * A(kSeluAlpha * kSeluScale);
      return {x <= V{} ? left : x * A(kSeluScale), x <= V{} ? left + A(kSeluAlpha * kSeluScale) : one * A(kSeluScale)};
    }
  }
  return {x, one};
}

}  // namespace
}  // namespace sdp
