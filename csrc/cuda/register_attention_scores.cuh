// Register attention on tensor cores: geometry, which scores count, and dropout's masks.
#pragma once
#include "cuda/register_attention_tiles.cuh"

namespace sdp {

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// Warps of a block: few, so that two blocks (three at D = 32) share a multiprocessor, or many where only one block's
// matrices fit. Threads are bounded so that registers do for either.
template <int D>
constexpr int kAttentionFewWarps = D <= 96 ? 4 : 8;
constexpr int kAttentionManyWarps = 8;
template <int D>
constexpr int kAttentionThreadBound = D <= 32 ? 384 : 256;
// Row tiles that a warp of the forward pass takes at a time, sharing what it loads of K and V.
template <int D>
constexpr int kAttentionRowTiles = D <= 96 ? 2 : 1;

// Scores are sums of products with |scale|; a negative scale is a sign of q.
struct ScoreScale {
  float in_base_2;      // |scale| · log₂ e; not 0, so that −∞ stays what it is
  float magnitude;      // |scale|
  uint32_t sign_bits;   // to XOR two elements of q with
  __device__ __forceinline__ explicit ScoreScale(float scale)
      : in_base_2(scale == 0 ? 1e-30f : fabsf(scale) * kLog2e),
        magnitude(fabsf(scale)),
        sign_bits(scale < 0 ? 0x80008000u : 0u) {}
  __device__ __forceinline__ uint32_t hidden_zero() const { return sign_bits & 1; }
};

// Sets scores that do not count to −∞. Queries × keys: `rows` are queries, and score [n][2e + b] of a lane belongs to
// key first_key + 4t + 2n + b.
__device__ __forceinline__ void forbid_keys(float (&scores)[2][4], const AttentionCase<float>& c, const LaneRows& rows,
                                            int first_query, int first_key) {
  const bool edge = first_key + 16 > c.tokens;
  const bool limited = c.limited() && (first_query < c.registers || first_key < c.registers);
  if (!edge && !limited) return;
#pragma unroll
  for (int n = 0; n < 2; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int key = first_key + 4 * LanePlace().member + 2 * n + i % 2;
      if (key >= c.tokens || (limited && c.forbids(rows.row[i / 2], key))) scores[n][i] = -INFINITY;
    }
}
// The same for keys × queries: score [n][2e + b] belongs to query first_query + 8n + 2t + b. Keys beyond T stay, their
// rows are not kept.
__device__ __forceinline__ void forbid_queries(float (&scores)[2][4], const AttentionCase<float>& c,
                                               const LaneRows& rows, int first_query, int first_key) {
  if (!c.limited() || (first_query >= c.registers && first_key >= c.registers)) return;
#pragma unroll
  for (int n = 0; n < 2; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (c.forbids(first_query + 8 * n + 2 * LanePlace().member + i % 2, rows.row[i / 2])) scores[n][i] = -INFINITY;
}

// ---- Dropout. Position (head · T + query) · T + key within the sample; word position % 4 of block position / 4.
// Queries × keys, tile after tile of keys: a lane draws one block per row and tile, and takes from its neighbour what
// of its four keys lies in the next one, since T need not divide by 4.
template <int Tiles>
struct RowDraws {
  uint32_t current;  // of the tile to come, four bits per row: row g + 8e of tile u from bit 8u + 4e on

  // first_row: head · T + the first tile's first query. Sources and positions are made anew at each tile: registers are
  // what the kernel is short of.
  __device__ __forceinline__ static uint32_t draw(const AttentionCase<float>& c, int64_t first_row, uint32_t sample,
                                                  int first_key) {
    const PhiloxSource source = philox_source(c.rng, c.place);
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < 2 * Tiles; ++i) {
      const uint64_t position = static_cast<uint64_t>(first_row + 8 * i + LanePlace().group) * c.tokens + first_key;
      bits |= philox_keeps(source, sample, static_cast<uint32_t>(position / 4) + LanePlace().member, c.threshold)
              << (4 * i);
    }
    return bits;
  }
  // Bits 8u + 4e + 2n + b: whether element [n][2e + b] of tile u is kept. Goes on to the next 16 keys.
  __device__ __forceinline__ uint32_t next(const AttentionCase<float>& c, int64_t first_row, uint32_t sample,
                                           int first_key) {
    const int lane = threadIdx.x % kWarp, member = lane % 4;
    const uint32_t ahead = draw(c, first_row, sample, first_key + 16);
    const uint32_t beside = __shfl_sync(kAllLanes, member == 0 ? ahead : current, lane / 4 * 4 + (member + 1) % 4);
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < 2 * Tiles; ++i) {
      const uint32_t shift = static_cast<uint32_t>(first_row + 8 * i + lane / 4) * static_cast<uint32_t>(c.tokens) % 4;
      const uint32_t eight = (current >> 4 * i & 15) | (beside >> 4 * i & 15) << 4;
      bits |= (eight >> shift & 15) << 4 * i;
    }
    current = ahead;
    return bits;
  }
};

// Keys × queries: bit 4e + 2n + b of the result says whether [n][2e + b], of key g + 8e, is kept.
// Lane i draws for query i % 16, the first three of its row's five blocks or the others.
__device__ __forceinline__ uint32_t draw_columns(const AttentionCase<float>& c, int64_t first_row, uint32_t sample,
                                                 int first_key) {
  const PhiloxSource source = philox_source(c.rng, c.place);
  const int lane = threadIdx.x % kWarp, half = lane / 16;
  const LanePlace place;
  const uint64_t position = static_cast<uint64_t>(first_row + lane % 16) * c.tokens + first_key;
  uint32_t bits = 0;
#pragma unroll 1
  for (int i = 0; i < 3; ++i)
    bits |= philox_keeps(source, sample, static_cast<uint32_t>(position / 4) + 3 * half + i, c.threshold)
            << (12 * half + 4 * i);
  bits |= __shfl_xor_sync(kAllLanes, bits, 16);
  bits >>= position % 4;
  uint32_t kept = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t query = __shfl_sync(kAllLanes, bits, 8 * (i / 2) + 2 * place.member + i % 2);
    kept |= (query >> place.group & 1) << i | (query >> (place.group + 8) & 1) << (4 + i);
  }
  return kept;
}

}  // namespace sdp
