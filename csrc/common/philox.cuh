// Philox4x32-10 (Salmon et al., 2011) for CUDA kernels, word for word what sdp_kernels/reference/philox.py draws.
#pragma once
#include <cstdint>

namespace sdp {

// Where one operator call draws its dropout mask from; made by the kernel from the rng tensor, which lives on the GPU.
struct PhiloxSource {
  uint32_t key0, key1, first_sample, step, place;  // place = 4 · layer + stream
};

__device__ __forceinline__ PhiloxSource philox_source(const int64_t* rng, uint32_t place) {
  const uint64_t seed = static_cast<uint64_t>(rng[0]);
  return {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), static_cast<uint32_t>(rng[2]),
          static_cast<uint32_t>(rng[1]), place};
}

// The words of positions 4 · block … 4 · block + 3 of a sample.
__device__ __forceinline__ void philox(const PhiloxSource& source, uint32_t sample, uint32_t block,
                                       uint32_t (&words)[4]) {
  uint32_t c0 = block, c1 = source.first_sample + sample, c2 = source.step, c3 = source.place;
  uint32_t k0 = source.key0, k1 = source.key1;
#pragma unroll
  for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
    const uint64_t first = uint64_t(0xD2511F53u) * c0, second = uint64_t(0xCD9E8D57u) * c2;
    c0 = static_cast<uint32_t>(second >> 32) ^ c1 ^ k0, c1 = static_cast<uint32_t>(second);
    c2 = static_cast<uint32_t>(first >> 32) ^ c3 ^ k1, c3 = static_cast<uint32_t>(first);
  }
  words[0] = c0, words[1] = c1, words[2] = c2, words[3] = c3;
}

// Bit i: word i of the block is at least `threshold`, its element is kept.
__device__ __forceinline__ uint32_t philox_keeps(const PhiloxSource& source, uint32_t sample, uint32_t block,
                                                 uint32_t threshold) {
  uint32_t words[4], bits = 0;
  philox(source, sample, block, words);
#pragma unroll
  for (int i = 0; i < 4; ++i) bits |= uint32_t(words[i] >= threshold) << i;
  return bits;
}

}  // namespace sdp
