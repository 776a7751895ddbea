// Philox4x32-10 (Salmon et al., 2011) on SIMD vectors, word for word what sdp_kernels/reference/philox.py draws.
#pragma once
#include "cpu/simd.h"

namespace sdp {

// Where one operator call draws its dropout mask from.
struct DropoutSource {
  uint32_t key0, key1, step, place;  // place = 4 · layer + stream
  uint32_t first_sample;
  uint32_t threshold;  // an element is kept when its word is at least this
  float scale;         // of what is kept; 0 switches dropout off
};

namespace {

// A counter's words stand in 64-bit lanes of their own: a 32 × 32 bit product then is one instruction that takes the lower
// halves as they are, its upper half is one shift away, and whatever else an upper half holds is never looked at.
typedef uint64_t Counters __attribute__((vector_size(kVectorBytes)));
constexpr int kCounters = kVectorBytes / 8;

#if SDP_LEVEL == 2
SDP_HOST_DEVICE Counters multiply_low(Counters x, Counters y) { return (Counters)_mm512_mul_epu32((__m512i)x, (__m512i)y); }
#elif SDP_LEVEL == 1
SDP_HOST_DEVICE Counters multiply_low(Counters x, Counters y) { return (Counters)_mm256_mul_epu32((__m256i)x, (__m256i)y); }
#elif defined(SDP_NEON)
SDP_HOST_DEVICE Counters multiply_low(Counters x, Counters y) {
  return (Counters)vmull_u32(vmovn_u64((uint64x2_t)x), vmovn_u64((uint64x2_t)y));
}
#else
SDP_HOST_DEVICE Counters multiply_low(Counters x, Counters y) { return (x & 0xffffffffu) * (y & 0xffffffffu); }
#endif

// The 4 · kCounters words of blocks [first, first + kCounters) of a sample, in the order of their positions.
SDP_HOST_DEVICE void philox_blocks(const DropoutSource& source, uint32_t sample, uint32_t first, Bits (&words)[2]) {
  Counters c0 = Counters{} + first, c1 = Counters{} + (source.first_sample + sample);
  Counters c2 = Counters{} + source.step, c3 = Counters{} + source.place;
  for (unsigned i = 0; i < kCounters; ++i) c0[i] += i;
  const Counters m0 = Counters{} + 0xD2511F53u, m1 = Counters{} + 0xCD9E8D57u;
  uint32_t k0 = source.key0, k1 = source.key1;
  SDP_UNROLL for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
    const Counters p0 = multiply_low(c0, m0), p1 = multiply_low(c2, m1);
    c0 = (p1 >> 32) ^ c1 ^ uint64_t(k0), c1 = p1;
    c2 = (p0 >> 32) ^ c3 ^ uint64_t(k1), c3 = p0;
  }
  const Counters front = (c0 & 0xffffffffu) | (c1 << 32), back = (c2 & 0xffffffffu) | (c3 << 32);
  using Lanes = std::make_integer_sequence<int, kCounters>;
  words[0] = bit_cast<Bits>(interleaved<0>(front, back, Lanes()));
  words[1] = bit_cast<Bits>(interleaved<kCounters / 2>(front, back, Lanes()));
}

// Factors (0 or scale) for positions [first, first + count) of a sample, count ≤ kDropoutChunk.
constexpr int kDropoutChunk = 256;
struct DropoutFactors {
  static constexpr int lanes = VectorOf<float>::lanes, kDrawn = 4 * kCounters;
  float values[kDropoutChunk + kDrawn + 4];

  // Returns where the factor of `first` stands; what lies within a vector behind the last one may be read.
  const float* draw(const DropoutSource& source, uint32_t sample, uint64_t first, int count) {
    const uint32_t block = uint32_t(first / 4);
    const int skipped = int(first % 4);
    const Floats kept = Floats{} + source.scale;
    for (int done = 0; done < skipped + count; done += kDrawn) {
      Bits words[2];
      philox_blocks(source, sample, block + done / 4, words);
      for (int half = 0; half < 2; ++half)
        store(values + done + half * lanes, words[half] >= source.threshold ? kept : Floats{});
    }
    return values + skipped;
  }
};

}  // namespace
}  // namespace sdp
