// KeLü and its derivative without cancellation, for scalars (CUDA) and for SIMD vectors (CPU) alike.
//
//   u = π(a − min(|x|, a))/a ∈ [0, π]                    so no range reduction is needed
//   f(−|x|)  = −|x| · (u − sin u) / 2π                   f(x) = max(x, 0) + f(−|x|)
//   f′(−|x|) = ½[(u − sin u)/π − (|x|/a)(1 − cos u)]     f′(|x|) = 1 − f′(−|x|)
//
// u − sin u = u³·Q(u²) and 1 − cos u = u²·R(u²); the polynomials' relative error on [0, π] is below 3e-9 in fp32
// (minimax) and below 3e-19 in fp64 (Chebyshev). NaN passes through: every selection keeps its NaN operand.
#pragma once

#include "common/macros.h"

namespace sdp {
namespace {  // internal linkage: each SIMD level compiles its own copy

template <class Scalar, int Count, class V>
SDP_HOST_DEVICE V horner(const Scalar (&coefficients)[Count], V t) {
  V sum = t * coefficients[Count - 1] + coefficients[Count - 2];
  SDP_UNROLL for (int i = Count - 3; i >= 0; --i) sum = sum * t + coefficients[i];
  return sum;
}

template <class V>
SDP_HOST_DEVICE V sine_gap(float, V t) {  // Q(t) = (u − sin u)/u³ at t = u²
  const float c[] = {1.666666663e-01f, -8.333330691e-03f, 1.984097191e-04f, -2.754484186e-06f, 2.481271677e-08f,
                     -1.390408338e-10f};
  return horner(c, t);
}
template <class V>
SDP_HOST_DEVICE V sine_gap(double, V t) {
  const double c[] = {1.66666666666666657e-01, -8.33333333333333322e-03, 1.98412698412698169e-04,
                      -2.75573192239820173e-06, 2.50521083851276100e-08, -1.60590438219507206e-10,
                      7.64716329268912530e-13, -2.81144891975267293e-15, 8.21961757707918198e-18,
                      -1.94955551391600425e-20, 3.53315858066318713e-23};
  return horner(c, t);
}
template <class V>
SDP_HOST_DEVICE V cosine_gap(float, V t) {  // R(t) = (1 − cos u)/u² at t = u²
  const float c[] = {4.999999999e-01f, -4.166666602e-02f, 1.388887930e-03f, -2.480103909e-05f, 2.754216395e-07f,
                     -2.065857552e-09f, 9.883164324e-12f};
  return horner(c, t);
}
template <class V>
SDP_HOST_DEVICE V cosine_gap(double, V t) {
  const double c[] = {5.00000000000000000e-01, -4.16666666666666644e-02, 1.38888888888888287e-03,
                      -2.48015873015776827e-05, 2.75573192232053739e-07, -2.08767569509120072e-09,
                      1.14707445062698370e-11, -4.77945661215473813e-14, 1.56166761162674057e-16,
                      -4.09106112108483715e-19, 8.06216791590282086e-22};
  return horner(c, t);
}

constexpr double kKeluA = 3.5, kPi = 3.14159265358979323846;

// f(−m) and f′(−m) for m in [0, a]; V is Scalar itself or a SIMD vector of it.
template <class Scalar, class V>
SDP_HOST_DEVICE V kelu_left(V m) {
  const V u = (Scalar(kKeluA) - m) * Scalar(kPi / kKeluA), t = u * u;
  return m * (u * t * sine_gap(Scalar(), t)) * Scalar(-0.5 / kPi);
}
template <class Scalar, class V>
SDP_HOST_DEVICE V kelu_left_slope(V m) {
  const V u = (Scalar(kKeluA) - m) * Scalar(kPi / kKeluA), t = u * u;
  return (u * t * sine_gap(Scalar(), t)) * Scalar(0.5 / kPi) - m * (t * cosine_gap(Scalar(), t)) * Scalar(0.5 / kKeluA);
}

// min(|x|, a); V{} + s broadcasts s.
template <class Scalar, class V>
SDP_HOST_DEVICE V bent_magnitude(V x) {
  const V a = V{} + Scalar(kKeluA), magnitude = x < V{} ? -x : x;
  return magnitude > a ? a : magnitude;
}

template <class Scalar, class V>
SDP_HOST_DEVICE V kelu_value(V x) {
  return (x < V{} ? V{} : x) + kelu_left<Scalar>(bent_magnitude<Scalar>(x));
}

template <class Scalar, class V>
SDP_HOST_DEVICE V kelu_slope(V x) {
  const V left = kelu_left_slope<Scalar>(bent_magnitude<Scalar>(x));
  return x < V{} ? left : Scalar(1) - left;
}

}  // namespace
}  // namespace sdp
