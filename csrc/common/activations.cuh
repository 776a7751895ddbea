// The models' activations and their derivatives for CUDA kernels, in the accumulator's type. No torch.
//
// In fp32 what lies left of 0 is computed as a product, so that nothing cancels and tails keep their relative accuracy;
// what lies right of 0 follows by symmetry. Value and slope share their exponential. NaN passes through.
#pragma once
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "common/kelu.h"

namespace sdp {

// In the order of the names in sdp_kernels/ops/activation.py.
enum Activation : int { kNone, kKelu, kGelu, kFastGelu, kRelu, kTanh, kSigmoid, kLeakyRelu, kSelu, kActivations };

// What a kernel is compiled for besides one activation: all of them, with a switch at run time. Only the activations
// that models are mostly made of have kernels of their own, which keeps the library's build short.
constexpr int kAnyActivation = kActivations;

template <class A>
struct Activated {
  A value, slope;
};

// 1/x for 1 ≤ x < 2¹²⁶, within a unit in the last place: one instruction and no slow path.
__device__ __forceinline__ float reciprocal(float x) {
#ifdef __CUDA_ARCH__
  return __fdividef(1.0f, x);
#else
  return 1.0f / x;
#endif
}
__device__ __forceinline__ double reciprocal(double x) { return 1 / x; }

// exp(−x) for x ≥ 0.
__device__ __forceinline__ float decay(float x) { return expf(-x); }
__device__ __forceinline__ double decay(double x) { return exp(-x); }

constexpr double kSqrtHalf = 0.70710678118654752440, kInvSqrt2Pi = 0.39894228040143267794;
constexpr double kSqrt2OverPi = 0.79788456080286535588, kFastGelu3 = 0.044715;  // tanh(√(2/π)(x + c·x³))
constexpr double kSeluScale = 1.0507009873554804934193, kSeluAlpha = 1.6732632423543772848170;
constexpr double kLeakySlope = 0.01;

// Φ(−a) = exp(−a²/2) · R(a) for a = |x| ≥ 0, R a polynomial in t = 1/(1 + 0.26·a) with a relative error of 2e-8
// (minimax; the form is Abramowitz and Stegun's 7.1.26). From a = 13.2 on, the bell stays what it is there, 1e-38.
__device__ __forceinline__ Activated<float> gelu(float x) {
  const float magnitude = fabsf(x), a = magnitude > 13.2f ? 13.2f : magnitude;
  const float bell = exp2f(a * a * -0.72134752044f), t = reciprocal(a * 0.26f + 1.0f);
  const float c[] = {1.037621923e-01f,  1.029649068e-01f, 1.033915325e-01f,  4.964169375e-02f, 1.641544062e-01f,
                     -1.555388779e-01f, 2.554693512e-01f, -1.547416040e-01f, 3.089638886e-02f};
  const float ratio = t * horner(c, t), slope = bell * (ratio - a * float(kInvSqrt2Pi));
  return {(x < 0 ? 0.0f : x) - a * (bell * ratio), x < 0 ? slope : 1.0f - slope};
}
__device__ __forceinline__ Activated<double> gelu(double x) {
  const double below = 0.5 * erfc(-x * kSqrtHalf);
  return {x * below, below + x * exp(-0.5 * x * x) * kInvSqrt2Pi};
}

// x·σ(v) with v = 2√(2/π)(x + c·x³), since (1 + tanh(v/2))/2 = σ(v).
template <class A>
__device__ __forceinline__ Activated<A> fast_gelu(A x) {
  const A magnitude = x < 0 ? -x : x, a = magnitude > A(24) ? A(24) : magnitude, square = a * a;
  const A e = decay(a * (square * A(kFastGelu3) + A(1)) * A(2 * kSqrt2OverPi)), q = reciprocal(e + A(1));
  const A tail = e * q;  // σ(−|v|)
  const A slope = tail - a * tail * q * (square * A(3 * kFastGelu3) + A(1)) * A(2 * kSqrt2OverPi);
  return {(x < 0 ? A(0) : x) - a * tail, x < 0 ? slope : A(1) - slope};
}

template <class A>
__device__ __forceinline__ Activated<A> sigmoid(A x) {
  const A e = decay(x < 0 ? -x : x), q = reciprocal(e + A(1));
  return {x < 0 ? e * q : q, e * q * q};
}

// (1 − e)/(1 + e) with e = exp(−2|x|); an odd polynomial below 0.625 (Cephes), where that cancels.
__device__ __forceinline__ Activated<float> hyperbolic_tangent(float x) {
  const float a = fabsf(x), square = x * x, e = decay(2 * a), q = reciprocal(e + 1.0f);
  const float c[] = {-3.33332819422e-1f, 1.33314422036e-1f, -5.37397155531e-2f, 2.06390887954e-2f, -5.70498872745e-3f};
  const float inner = x + x * square * horner(c, square), outer = (1.0f - e) * q;
  return {a < 0.625f ? inner : x < 0 ? -outer : outer, 4.0f * e * q * q};
}
__device__ __forceinline__ Activated<double> hyperbolic_tangent(double x) {
  const double t = tanh(x);
  return {t, 1 - t * t};
}

__device__ __forceinline__ float exponential_minus_one(float x) { return expm1f(x); }
__device__ __forceinline__ double exponential_minus_one(double x) { return expm1(x); }

// Value and slope; what the caller leaves unused is not computed. `activation` is a constant, or the same for all.
template <class A>
__device__ __forceinline__ Activated<A> activated(A x, int activation) {
  switch (activation) {
    case kKelu: return {kelu_value<A>(x), kelu_slope<A>(x)};
    case kGelu: return gelu(x);
    case kFastGelu: return fast_gelu(x);
    case kRelu: return {x <= 0 ? A(0) : x, x <= 0 ? A(0) : A(1)};
    case kTanh: return hyperbolic_tangent(x);
    case kSigmoid: return sigmoid(x);
    case kLeakyRelu: return {x <= 0 ? x * A(kLeakySlope) : x, x <= 0 ? A(kLeakySlope) : A(1)};
    case kSelu: {
      constexpr A steep = A(kSeluAlpha * kSeluScale);
      const A left = x <= 0 ? x : A(0);
      return {x <= 0 ? exponential_minus_one(left) * steep : x * A(kSeluScale),
              x <= 0 ? decay(-left) * steep : A(kSeluScale)};
    }
  }
  return {x, A(1)};
}

// Calls body(constant) once for all elements of a pack: the switch at run time, where there is one, stands outside of
// the loop over them.
template <int Kind, class Body>
__device__ __forceinline__ void with_activation(int activation, const Body& body) {
  if constexpr (Kind != kAnyActivation) {
    body(std::integral_constant<int, Kind>());
  } else {
    switch (activation) {
      case kKelu: return body(std::integral_constant<int, kKelu>());
      case kGelu: return body(std::integral_constant<int, kGelu>());
      case kFastGelu: return body(std::integral_constant<int, kFastGelu>());
      case kRelu: return body(std::integral_constant<int, kRelu>());
      case kTanh: return body(std::integral_constant<int, kTanh>());
      case kSigmoid: return body(std::integral_constant<int, kSigmoid>());
      case kLeakyRelu: return body(std::integral_constant<int, kLeakyRelu>());
      case kSelu: return body(std::integral_constant<int, kSelu>());
      default: return body(std::integral_constant<int, kNone>());
    }
  }
}

}  // namespace sdp
