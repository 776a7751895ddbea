// Register attention backward with warpgroups: the last rows of a head, where they are 16 or fewer. 64 rows for them
// would be a fifth of the work at T = 257 to 272. They are a tile for mma.sync, which all four warps have in registers;
// each takes a quarter of the other side, 16 rows at a time, and the four sums are added in the order of the warps.
#pragma once
#include "cuda/register_attention_wgmma_memory.cuh"

namespace sdp {

// Whether that is so; from 128 rows on, so that the sums have room where the matrices were.
SDP_HOST_DEVICE bool wgmma_has_tail(int tokens) { return tokens > 2 * kGroupRows && tokens % kGroupRows - 1u < 16u; }

// Operands B as load_over_columns and load_over_rows have them, of the tile from row `at` on of a matrix in panels.
__device__ __forceinline__ void panel_over_columns(uint32_t (&b)[4], const uint16_t* matrix, int rows, int at, int k) {
  const int lane = threadIdx.x % kWarp, row = at + lane % 8 + lane / 16 * 8;
  ldmatrix<4>(b, matrix + (k / 2 * rows + row) * kPanelColumns + ((k % 2 * 2 + lane / 8 % 2) ^ (row / 2 % 4)) * 8);
}
__device__ __forceinline__ void panel_over_rows(uint32_t (&b)[4], const uint16_t* matrix, int rows, int at, int k) {
  const int lane = threadIdx.x % kWarp, row = at + lane % 16;
  ldmatrix<4, true>(b, matrix + (k / 2 * rows + row) * kPanelColumns + ((k % 2 * 2 + lane / 16) ^ (row / 2 % 4)) * 8);
}

// a · firstᵀ and b · secondᵀ for 16 rows of the matrices.
template <class T, int D>
__device__ __forceinline__ void tail_scores(float (&s)[2][4], float (&dp)[2][4], const RowTile<D>& a,
                                            const RowTile<D>& b, const WgmmaMemory<D>& memory, int at) {
#pragma unroll
  for (int k = 0; k < D / 16; ++k) {
    uint32_t words[4];
    panel_over_columns(words, memory.first, memory.rows, at, k);
    mma_pair<T>(s[0], s[1], a.x[k], words);
    panel_over_columns(words, memory.second, memory.rows, at, k);
    mma_pair<T>(dp[0], dp[1], b.x[k], words);
  }
}
template <class T, int D>
__device__ __forceinline__ void tail_sums(float (&sums)[D / 8][4], const uint32_t (&a)[4], const uint16_t* matrix,
                                          int rows, int at) {
#pragma unroll
  for (int k = 0; k < D / 16; ++k) {
    uint32_t words[4];
    panel_over_rows(words, matrix, rows, at, k);
    mma_pair<T>(sums[2 * k], sums[2 * k + 1], a, words);
  }
}

// Adds the warps' numbers into the first warp's. `room`: shared memory for three warps' numbers, which nobody reads.
template <int N>
__device__ __forceinline__ void add_warps(float (&numbers)[N][4], float* room) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  if (warp > 0)
#pragma unroll
    for (int i = 0; i < 4 * N; ++i) room[((warp - 1) * 4 * N + i) * kWarp + lane] = numbers[i / 4][i % 4];
  __syncthreads();
  if (warp > 0) return;
#pragma unroll 1
  for (int other = 0; other < kGroupWarps - 1; ++other)
#pragma unroll
    for (int i = 0; i < 4 * N; ++i) numbers[i / 4][i % 4] += room[(other * 4 * N + i) * kWarp + lane];
}

template <class T, int D>
__device__ __forceinline__ void tail_of_keys(const AttentionCase<float>& c, int of_batch, const ScoreScale& scale,
                                             const WgmmaMemory<D>& memory) {
  const LaneRows rows(c.tokens / kGroupRows * kGroupRows, false);
  RowTile<D> k, v;
  load_keys<T, D>(c, of_batch, memory, rows, k, v);
  xor_rows<D>(k, scale.hidden_zero());
  xor_rows<D>(v, scale.hidden_zero());
  float dk[D / 8][4] = {}, dv[D / 8][4] = {};
#pragma unroll 1
  for (int at = threadIdx.x / kWarp * 16; at < c.tokens; at += kGroupRows) {
    float s[2][4] = {}, dp[2][4] = {};
    tail_scores<T, D>(s, dp, k, v, memory, at);
    uint32_t p[4], ds[4];
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const int place = memory.place_of_query(at) + 8 * n + 2 * LanePlace().member;
      const Pack<float, 2> lse = load_pack<float, 2>(memory.lse + place);
      const Pack<float, 2> delta = load_pack<float, 2>(memory.delta + place);
      float gradient[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        s[n][i] = fast_exp2(s[n][i] * scale.in_base_2 - lse.items[i % 2]);
        gradient[i] = s[n][i] * (dp[n][i] - delta.items[i % 2]);
      }
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        p[2 * n + e] = pack_pair<T>(s[n][2 * e], s[n][2 * e + 1]);
        ds[2 * n + e] = pack_pair<T>(gradient[2 * e], gradient[2 * e + 1]);
      }
    }
    tail_sums<T, D>(dv, p, memory.second, memory.rows, at);
    tail_sums<T, D>(dk, ds, memory.first, memory.rows, at);
  }
  __syncthreads();  // the matrices have been read
  float* const room = reinterpret_cast<float*>(memory.first);
  add_warps(dk, room);
  add_warps(dv, room + (kGroupWarps - 1) * D / 2 * kWarp);
  if (threadIdx.x >= kWarp) return;
  finish_keys<T, D>(c, of_batch, scale, memory, rows, dk, dv);
}

template <class T, int D>
__device__ __forceinline__ void tail_of_queries(const AttentionCase<float>& c, int of_batch, const ScoreScale& scale,
                                                const WgmmaMemory<D>& memory) {
  const LaneRows rows(c.tokens / kGroupRows * kGroupRows, false);
  RowTile<D> q, dy;
  float delta[2], lse[2];
  load_queries<T, D>(c, of_batch, scale, memory, rows, q, dy, delta, lse);
  xor_rows<D>(dy, scale.hidden_zero());
  float dq[D / 8][4] = {};
#pragma unroll 1
  for (int at = threadIdx.x / kWarp * 16; at < c.tokens; at += kGroupRows) {
    float s[2][4] = {}, dp[2][4] = {};
    tail_scores<T, D>(s, dp, q, dy, memory, at);
    uint32_t ds[4];
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const bool there = at + 8 * n + 2 * LanePlace().member + i % 2 < c.tokens;
        s[n][i] = there ? fast_exp2(s[n][i] * scale.in_base_2 - lse[i / 2]) * (dp[n][i] - delta[i / 2]) : 0;
      }
#pragma unroll
      for (int e = 0; e < 2; ++e) ds[2 * n + e] = pack_pair<T>(s[n][2 * e], s[n][2 * e + 1]);
    }
    tail_sums<T, D>(dq, ds, memory.first, memory.rows, at);
  }
  __syncthreads();  // the matrices have been read
  add_warps(dq, reinterpret_cast<float*>(memory.first));
  if (threadIdx.x >= kWarp) return;
  finish_queries<T, D>(c, of_batch, memory, rows, dq);
}

}  // namespace sdp
