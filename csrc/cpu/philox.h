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

typedef uint64_t WideBits __attribute__((vector_size(2 * kVectorBytes)));

inline void multiply(uint32_t factor, Bits x, Bits& high, Bits& low) {
  const WideBits product = __builtin_convertvector(x, WideBits) * uint64_t(factor);
  high = __builtin_convertvector(product >> 32, Bits);
  low = __builtin_convertvector(product, Bits);
}

// The four words of blocks [first, first + lanes) of a sample.
inline void philox_blocks(const DropoutSource& source, uint32_t sample, uint32_t first, Bits (&words)[4]) {
  Bits c0 = Bits{} + first, c1 = Bits{} + (source.first_sample + sample), c2 = Bits{} + source.step;
  Bits c3 = Bits{} + source.place;
  for (unsigned i = 0; i < sizeof(Bits) / 4; ++i) c0[i] += i;
  uint32_t k0 = source.key0, k1 = source.key1;
  for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
    Bits high0, low0, high1, low1;
    multiply(0xD2511F53u, c0, high0, low0);
    multiply(0xCD9E8D57u, c2, high1, low1);
    c0 = high1 ^ c1 ^ k0, c1 = low1, c2 = high0 ^ c3 ^ k1, c3 = low0;
  }
  words[0] = c0, words[1] = c1, words[2] = c2, words[3] = c3;
}

// Factors (0 or scale) for positions [first, first + count) of a sample, count ≤ kDropoutChunk.
constexpr int kDropoutChunk = 256;
struct DropoutFactors {
  float values[kDropoutChunk + 4 * VectorOf<float>::lanes + 4];

  // Returns where the factor of `first` stands.
  const float* draw(const DropoutSource& source, uint32_t sample, uint64_t first, int count) {
    constexpr int lanes = VectorOf<float>::lanes;
    const uint32_t block = uint32_t(first / 4);
    const int skipped = int(first % 4);
    for (int done = 0; done < skipped + count; done += 4 * lanes) {
      Bits words[4];
      philox_blocks(source, sample, block + done / 4, words);
      for (int word = 0; word < 4; ++word)
        for (int i = 0; i < lanes; ++i)
          values[done + 4 * i + word] = words[word][i] >= source.threshold ? source.scale : 0.0f;
    }
    return values + skipped;
  }
};

}  // namespace
}  // namespace sdp
