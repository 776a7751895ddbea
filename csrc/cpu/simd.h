// SIMD vectors of the level being compiled, and loads and stores of fp64, fp32, bf16 and fp16 that widen and round.
//
// Level code sees no torch and no standard-library template: an inline function shared between levels could be kept by
// the linker in its AVX-512 form and run on a machine without it. Everything here has internal linkage.
#pragma once
#include <cstdint>
#include <cstring>
#include <utility>  // integer_sequence, a type only

#if SDP_LEVEL > 0
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>  // every such processor has it: the baseline
#define SDP_NEON 1
#endif

#include "common/macros.h"

namespace sdp {

// 16-bit storage types; the bits are PyTorch's.
struct BFloat16 { uint16_t bits; };
struct Float16 { uint16_t bits; };

// In the order of the function tables below.
enum Dtype { kFloat64, kFloat32, kBFloat16, kFloat16, kDtypes };

namespace {

constexpr int kVectorBytes = SDP_LEVEL == 2 ? 64 : SDP_LEVEL == 1 ? 32 : 16;
#ifdef SDP_NEON
constexpr int kVectorRegisters = 32;
#else
constexpr int kVectorRegisters = SDP_LEVEL == 2 ? 32 : 16;
#endif

template <class Scalar> struct VectorOf;
template <> struct VectorOf<float> {
  static constexpr int lanes = kVectorBytes / 4;
  typedef float type __attribute__((vector_size(kVectorBytes)));
  typedef uint32_t bits __attribute__((vector_size(kVectorBytes)));
  typedef uint16_t half_bits __attribute__((vector_size(kVectorBytes / 2)));
};
template <> struct VectorOf<double> {
  static constexpr int lanes = kVectorBytes / 8;
  typedef double type __attribute__((vector_size(kVectorBytes)));
};
using Floats = VectorOf<float>::type;
using Bits = VectorOf<float>::bits;
using HalfBits = VectorOf<float>::half_bits;

// Accumulator of a storage type.
template <class T> struct AccumulatorOf { using type = float; };
template <> struct AccumulatorOf<double> { using type = double; };
template <class T> using Accumulator = typename AccumulatorOf<T>::type;
template <class T> using Vector = typename VectorOf<Accumulator<T>>::type;
template <class T> constexpr int kLanes = VectorOf<Accumulator<T>>::lanes;

template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

#if SDP_LEVEL == 2
SDP_HOST_DEVICE Floats widen(HalfBits half, BFloat16) {
  return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)half), 16);
}
SDP_HOST_DEVICE HalfBits round_to(Floats x, BFloat16) {  // nearest even; NaN stays NaN
  const __m512i bits = (__m512i)x, half = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
  const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
  const __mmask16 nan = _mm512_cmp_ps_mask((__m512)x, (__m512)x, _CMP_UNORD_Q);
  const __m512i even = _mm512_mask_add_epi32(half, odd, half, _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_mask_or_epi32(even, nan, bits, _mm512_set1_epi32(0x400000));
  const __m512i upper = _mm512_set_epi16(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 31, 29, 27, 25, 23, 21, 19, 17, 15, 13,
                                         11, 9, 7, 5, 3, 1);
  return (HalfBits)_mm512_castsi512_si256(_mm512_permutexvar_epi16(upper, rounded));
}
#elif defined(SDP_NEON)
// GCC takes a generic vector of 8 bytes apart in general registers to widen it.
SDP_HOST_DEVICE Floats widen(HalfBits half, BFloat16) { return (Floats)vshll_n_u16((uint16x4_t)half, 16); }
SDP_HOST_DEVICE HalfBits round_to(Floats x, BFloat16) {
  const uint32x4_t bits = (uint32x4_t)x, odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint32x4_t even = vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), odd), nan = vorrq_u32(bits, vdupq_n_u32(0x400000));
  return (HalfBits)vshrn_n_u32(vbslq_u32(vceqq_f32((float32x4_t)x, (float32x4_t)x), even, nan), 16);
}
#else
SDP_HOST_DEVICE Floats widen(HalfBits half, BFloat16) { return bit_cast<Floats>(__builtin_convertvector(half, Bits) << 16); }

SDP_HOST_DEVICE HalfBits round_to(Floats x, BFloat16) {
  const Bits bits = bit_cast<Bits>(x);
  const Bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return __builtin_convertvector(x == x ? rounded : (bits >> 16) | 0x40u, HalfBits);
}
#endif

#if SDP_LEVEL == 2
SDP_HOST_DEVICE Floats widen(HalfBits half, Float16) { return (Floats)_mm512_cvtph_ps((__m256i)half); }
SDP_HOST_DEVICE HalfBits round_to(Floats x, Float16) { return (HalfBits)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT); }
#elif SDP_LEVEL == 1
SDP_HOST_DEVICE Floats widen(HalfBits half, Float16) { return (Floats)_mm256_cvtph_ps((__m128i)half); }
SDP_HOST_DEVICE HalfBits round_to(Floats x, Float16) { return (HalfBits)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT); }
#elif defined(SDP_NEON)
SDP_HOST_DEVICE Floats widen(HalfBits half, Float16) { return (Floats)vcvt_f32_f16((float16x4_t)half); }
SDP_HOST_DEVICE HalfBits round_to(Floats x, Float16) { return (HalfBits)vcvt_f16_f32((float32x4_t)x); }
#else
// Integer forms after F. Giesen's half/float conversions (public domain), two selects wider for infinity and NaN.
SDP_HOST_DEVICE Floats widen(HalfBits half, Float16) {
  const Bits bits = __builtin_convertvector(half, Bits);
  const Bits magnitude = (bits & 0x7fffu) << 13, sign = (bits & 0x8000u) << 16;
  const Bits scaled = bit_cast<Bits>(bit_cast<Floats>(magnitude) * bit_cast<float>(uint32_t((254 - 15) << 23)));
  const Bits special = magnitude | 0x7f800000u;
  return bit_cast<Floats>(((bits & 0x7c00u) == 0x7c00u ? special : scaled) | sign);
}
SDP_HOST_DEVICE HalfBits round_to(Floats x, Float16) {
  const Bits bits = bit_cast<Bits>(x), sign = bits & 0x80000000u, magnitude = bits ^ sign;
  const float smallest = bit_cast<float>(uint32_t(126 << 23));  // 0.5: its last bit is fp16's smallest subnormal
  const Bits subnormal = bit_cast<Bits>(bit_cast<Floats>(magnitude) + smallest) - bit_cast<uint32_t>(smallest);
  const Bits normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;
  Bits rounded = magnitude < 0x38800000u ? subnormal : normal;
  rounded = magnitude >= 0x477ff000u ? Bits{} + 0x7c00u : rounded;
  rounded = magnitude > 0x7f800000u ? Bits{} + 0x7e00u : rounded;
  return __builtin_convertvector(rounded | (sign >> 16), HalfBits);
}
#endif

// |x|, and the smaller and the larger of two, where a NaN among x stays one. x86's instructions keep their second operand
// then (NEON's keep whichever is one), but the compiler doesn't find them behind a selection.
SDP_HOST_DEVICE Floats magnitude(Floats x) { return bit_cast<Floats>(bit_cast<Bits>(x) & 0x7fffffffu); }
#if SDP_LEVEL == 2
SDP_HOST_DEVICE Floats at_most(Floats x, float limit) { return (Floats)_mm512_min_ps(_mm512_set1_ps(limit), (__m512)x); }
SDP_HOST_DEVICE Floats at_least(Floats x, float limit) { return (Floats)_mm512_max_ps(_mm512_set1_ps(limit), (__m512)x); }
#elif SDP_LEVEL == 1
SDP_HOST_DEVICE Floats at_most(Floats x, float limit) { return (Floats)_mm256_min_ps(_mm256_set1_ps(limit), (__m256)x); }
SDP_HOST_DEVICE Floats at_least(Floats x, float limit) { return (Floats)_mm256_max_ps(_mm256_set1_ps(limit), (__m256)x); }
#elif defined(SDP_NEON)
SDP_HOST_DEVICE Floats at_most(Floats x, float limit) { return (Floats)vminq_f32((float32x4_t)x, vdupq_n_f32(limit)); }
SDP_HOST_DEVICE Floats at_least(Floats x, float limit) { return (Floats)vmaxq_f32((float32x4_t)x, vdupq_n_f32(limit)); }
#else
SDP_HOST_DEVICE Floats at_most(Floats x, float limit) { return x > limit ? Floats{} + limit : x; }
SDP_HOST_DEVICE Floats at_least(Floats x, float limit) { return x < limit ? Floats{} + limit : x; }
#endif
SDP_HOST_DEVICE VectorOf<double>::type magnitude(VectorOf<double>::type x) { return x < 0.0 ? -x : x; }
SDP_HOST_DEVICE VectorOf<double>::type at_most(VectorOf<double>::type x, double limit) {
  return x > limit ? VectorOf<double>::type{} + limit : x;
}
SDP_HOST_DEVICE VectorOf<double>::type at_least(VectorOf<double>::type x, double limit) {
  return x < limit ? VectorOf<double>::type{} + limit : x;
}

template <class V, class T>
inline V load_bytes(const T* from) {
  V v;
  memcpy(&v, from, sizeof(V));
  return v;
}

SDP_HOST_DEVICE VectorOf<double>::type load(const double* p) { return load_bytes<VectorOf<double>::type>(p); }
SDP_HOST_DEVICE Floats load(const float* p) { return load_bytes<Floats>(p); }
template <class T>
SDP_HOST_DEVICE Floats load(const T* p) { return widen(load_bytes<HalfBits>(p), T()); }

SDP_HOST_DEVICE void store(double* p, VectorOf<double>::type v) { memcpy(p, &v, sizeof(v)); }
SDP_HOST_DEVICE void store(float* p, Floats v) { memcpy(p, &v, sizeof(v)); }
template <class T>
SDP_HOST_DEVICE void store(T* p, Floats v) {
  const HalfBits half = round_to(v, T());
  memcpy(p, &half, sizeof(half));
}

// Always inlined: GCC drops calls of a function that does nothing but prefetch, taking it for one without effect.
SDP_HOST_DEVICE void prefetch(const void* p) { __builtin_prefetch(p); }

// As it would be read back after a store to T.
template <class T>
SDP_HOST_DEVICE Vector<T> rounded(Vector<T> v) {
  if constexpr (sizeof(T) == 2) return widen(round_to(v, T()), T());
  else return v;
}

// The first `count` elements of a vector of 16-bit elements, which may be none or all; the others are 0.
template <class T>
SDP_HOST_DEVICE HalfBits load_bits_part(const T* p, int count) {
#if SDP_LEVEL == 2
  return (HalfBits)_mm256_maskz_loadu_epi16(__mmask16((1u << count) - 1), p);
#else
  if (count == VectorOf<float>::lanes) return load_bytes<HalfBits>(p);
  HalfBits half{};
  for (int i = 0; i < count; ++i) half[i] = p[i].bits;
  return half;
#endif
}
template <class T>
SDP_HOST_DEVICE void store_bits_part(T* p, HalfBits half, int count) {
  if (count == VectorOf<float>::lanes) {
    memcpy(p, &half, sizeof(half));
    return;
  }
#if SDP_LEVEL == 2
  _mm256_mask_storeu_epi16(p, __mmask16((1u << count) - 1), (__m256i)half);
#else
  for (int i = 0; i < count; ++i) p[i].bits = half[i];
#endif
}

// The first `count` lanes, `stride` elements apart; the other lanes are 0. Stride 0 repeats one element.
template <class T>
SDP_HOST_DEVICE Vector<T> load_part(const T* p, int count, int64_t stride = 1) {
#if SDP_LEVEL == 2
  if (stride == 1) {
    if constexpr (sizeof(T) == 8) return (Vector<T>)_mm512_maskz_loadu_pd(__mmask8((1u << count) - 1), p);
    else if constexpr (sizeof(T) == 4) return (Vector<T>)_mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), p);
    else return widen(load_bits_part(p, count), T());
  }
#endif
  if (stride == 1 && count == kLanes<T>) return load(p);
  T lanes[kLanes<T>] = {};
  for (int i = 0; i < count; ++i) lanes[i] = p[i * stride];
  return load(lanes);
}
template <class T>
SDP_HOST_DEVICE void store_part(T* p, Vector<T> v, int count, int64_t stride = 1) {
  if (stride == 1 && count == kLanes<T>) return store(p, v);
#if SDP_LEVEL == 2
  if (stride == 1) {
    if constexpr (sizeof(T) == 8) return _mm512_mask_storeu_pd(p, __mmask8((1u << count) - 1), (__m512d)v);
    else if constexpr (sizeof(T) == 4) return _mm512_mask_storeu_ps(p, __mmask16((1u << count) - 1), (__m512)v);
    else return store_bits_part(p, round_to(v, T()), count);
  }
#endif
  T lanes[kLanes<T>];
  store(lanes, v);
  for (int i = 0; i < count; ++i) p[i * stride] = lanes[i];
}

// Lanes added in a fixed tree order.
template <int Step, class V, int... I>
inline V rotated(V v, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(v, v, ((I + Step) % int(sizeof...(I)))...);
}
template <class V, int Step = int(sizeof(V) / sizeof(V{}[0])) / 2>
inline auto horizontal_sum(V v) {
  if constexpr (Step == 0) {
    return v[0];
  } else {
    constexpr int lanes = sizeof(V) / sizeof(V{}[0]);
    return horizontal_sum<V, Step / 2>(v + rotated<Step>(v, std::make_integer_sequence<int, lanes>()));
  }
}

// Rows of vectors, the elements counted through row after row: log₂(Times) rounds that interleave row i with row
// i + count/2, each of which moves the first bit of an element's number to its end. A matrix of Times rows is transposed.
template <int First, class V, int... I>
inline V interleaved(V a, V b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (First + I / 2 + I % 2 * int(sizeof...(I)))...);
}
template <int Times, class V, int count>
inline __attribute__((always_inline)) void interleave_rows(V (&rows)[count]) {
  constexpr int lanes = sizeof(V) / sizeof(V{}[0]);
  using Lanes = std::make_integer_sequence<int, lanes>;
  SDP_UNROLL for (int size = 1; size < Times; size *= 2) {
    V next[count];
    SDP_UNROLL for (int i = 0; i < count / 2; ++i) {
      next[2 * i] = interleaved<0>(rows[i], rows[i + count / 2], Lanes());
      next[2 * i + 1] = interleaved<lanes / 2>(rows[i], rows[i + count / 2], Lanes());
    }
    SDP_UNROLL for (int i = 0; i < count; ++i) rows[i] = next[i];
  }
}

// Transposes a square of lanes × lanes in place.
template <class V, int lanes>
inline __attribute__((always_inline)) void transpose(V (&rows)[lanes]) { interleave_rows<lanes>(rows); }

// Vectors of 16-bit elements one behind the other, and the two halves of such a vector.
using DoubleBits __attribute__((vector_size(kVectorBytes))) = uint16_t;
template <int... I>
inline Bits joined(HalfBits a, HalfBits b, std::integer_sequence<int, I...>) {
  return bit_cast<Bits>(__builtin_shufflevector(a, b, I...));
}
SDP_HOST_DEVICE Bits joined(HalfBits a, HalfBits b) {
  return joined(a, b, std::make_integer_sequence<int, 2 * VectorOf<float>::lanes>());
}
template <int Half, int... I>
inline HalfBits half_of(Bits x, std::integer_sequence<int, I...>) {
  const DoubleBits both = bit_cast<DoubleBits>(x);
  return __builtin_shufflevector(both, both, (I + Half * int(sizeof...(I)))...);
}
template <int Half>
SDP_HOST_DEVICE HalfBits half_of(Bits x) {
  return half_of<Half>(x, std::make_integer_sequence<int, VectorOf<float>::lanes>());
}

// Two 16-bit elements per lane, the first in the lower half.
template <class T>
SDP_HOST_DEVICE Floats widen_low(Bits pair, T) { return widen(__builtin_convertvector(pair & 0xffffu, HalfBits), T()); }
template <class T>
SDP_HOST_DEVICE Floats widen_high(Bits pair, T) { return widen(__builtin_convertvector(pair >> 16, HalfBits), T()); }
SDP_HOST_DEVICE Floats widen_low(Bits pair, BFloat16) { return bit_cast<Floats>(pair << 16); }
SDP_HOST_DEVICE Floats widen_high(Bits pair, BFloat16) { return bit_cast<Floats>(pair & 0xffff0000u); }
template <class T>
SDP_HOST_DEVICE Bits round_to_pair(Floats low, Floats high, T) {
  return __builtin_convertvector(round_to(low, T()), Bits) | __builtin_convertvector(round_to(high, T()), Bits) << 16;
}

}  // namespace
}  // namespace sdp
