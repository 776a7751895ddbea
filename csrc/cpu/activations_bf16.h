// bf16 as it stands around products of bf16 pairs (level 2 with AVX512_BF16), for the passes behind linear's own GEMM.
//
// What such a pass costs is the number of its vector instructions. So results are rounded by the instruction that rounds
// the products too, one instead of six; like the products it takes subnormal numbers for 0. And the two activations that
// the models are trained with have forms as exact as bf16 can show: a relative error below 5e-6 (half a unit is 2e-3), with
// slopes below 2e-7 near their zeros, where GELU's and KeLü's cross from one sign to the other.
#pragma once
#include "cpu/activations.h"
#include "cpu/bf16_pairs.h"

#ifdef SDP_BF16_PAIRS

namespace sdp {
namespace {

// As gelu(Floats), but exp(−a²/2) = 2^y with y split at its floor, which scaling by a power of two does on the way, and R a
// quotient (relative error 4e-7, minimax, closer where the slope is 0): one division and fewer steps than a polynomial.
SDP_HOST_DEVICE Activated<Floats> bf16_gelu(Floats x) {
  const Floats a = at_most(magnitude(x), 13.2f), y = a * -0.72134752044f * a;
  const Floats f = (Floats)_mm512_reduce_ps((__m512)y, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // y − ⌊y⌋
  const float two[] = {1.000002593e+00f, 6.930038352e-01f, 2.414427551e-01f, 5.201146167e-02f, 1.353416812e-02f};
  const Floats bell = (Floats)_mm512_scalef_ps((__m512)horner(two, f), (__m512)y);  // · 2^⌊y⌋
  const float over[] = {4.999998140e-01f, 3.597593002e-01f, 1.182585735e-01f, 1.674795980e-02f};
  const float under[] = {1.0f, 1.517385117e+00f, 9.473554403e-01f, 2.962087672e-01f, 4.198657095e-02f};
  const Floats ratio = horner(over, a) / horner(under, a);
  const Floats slope = bell * (ratio - a * float(kInvSqrt2Pi));
  return {at_least(x, 0.0f) - a * bell * ratio, x < Floats{} ? slope : 1.0f - slope};
}

// As kelu(V), with the polynomials in (a − min(|x|, a))² instead of u², and every factor in their coefficients.
SDP_HOST_DEVICE Activated<Floats> bf16_kelu(Floats x) {
  const Floats m = at_most(magnitude(x), float(kKeluA)), v = float(kKeluA) - m, t = v * v;
  const float sine[] = {1.918290082e-02f, -7.727519119e-04f, 1.481510667e-05f, -1.639233338e-07f, 1.033034484e-09f};
  const float cosine[] = {5.754871291e-02f, -3.863826068e-03f, 1.037636832e-04f, -1.491740431e-06f, 1.318660466e-08f,
                          -6.886668658e-11f};
  const Floats gap = v * t * horner(sine, t), slope = gap - m * (t * horner(cosine, t));
  return {at_least(x, 0.0f) - m * gap, x < Floats{} ? slope : 1.0f - slope};
}

}  // namespace
}  // namespace sdp
#endif
