// Register attention backward on sm_90's warpgroup products (wgmma), for heads of which two matrices fit on chip.
//
// The two roles of register_attention_backward.cuh, with 64 rows of a warpgroup in registers where it has a warp's 16,
// and 48 of the other side at a time. Scores leave one product where the next one takes its A, so here, too, no sum
// crosses warps. The matrices in shared memory are as wgmma's descriptors want them (wgmma.cuh), in both directions.
//
// Products run while the weights are made: dP behind S, dV behind dP, and dK while the next scores' products are already
// started. What that leaves idle is for the other block of the multiprocessor; registers are for two warpgroups. A wait
// must leave the products alone whose registers stand in the same turn of the loop: where they are carried into the
// next one, ptxas waits after each product instead (it says so, C7514, and the ahead-of-time proof refuses that).
#pragma once
#include "cuda/register_attention_wgmma_tail.cuh"

namespace sdp {

// a · bᵀ over columns: 16-column steps lie in turn in one half of a panel and the other.
template <class T, int D>
__device__ __forceinline__ void over_columns(float (&scores)[kWgmmaStep / 8][4], const RowTile<D>& a, uint64_t b,
                                             uint32_t panel_bytes) {
#pragma unroll
  for (int k = 0; k < D / 16; ++k) {
    const uint64_t step = b + (k / 2 * (panel_bytes / 16) + k % 2 * 2);
    if (k == 0) wgmma<T, false, false>(scores, a.x[k], step);
    else wgmma<T, false, true>(scores, a.x[k], step);
  }
  wgmma_commit();
}
// a · b over the step's rows.
template <class T, int D>
__device__ __forceinline__ void over_rows(float (&sums)[D / 8][4], const uint32_t (&a)[kWgmmaStep / 16][4],
                                          uint64_t b) {
#pragma unroll
  for (int k = 0; k < kWgmmaStep / 16; ++k) wgmma<T, true, true>(sums, a[k], b + k * (2 * kPanelGroup / 16));
  wgmma_commit();
}

template <class T, int D>
__device__ __forceinline__ void wgmma_backward_of_keys(const AttentionCase<float>& c, const AttentionPlan& plan,
                                                       int of_batch, const WgmmaMemory<D>& memory) {
  constexpr int tiles = kWgmmaStep / 8;
  const ScoreScale scale(c.scale);
  panels_of_queries<T, D>(c, AttentionHead<T, float>(c, of_batch), memory, scale.sign_bits);
  async_proxy_fence();
  __syncthreads();
  const uint32_t panel = memory.panel_bytes();
  for (int round = 0; round < plan.rounds; ++round) {
    const LaneRows rows(round * kGroupRows + threadIdx.x / kWarp * 16, false);
    RowTile<D> k, v;
    load_keys<T, D>(c, of_batch, memory, rows, k, v);
    float dk[D / 8][4] = {}, dv[D / 8][4] = {}, s[tiles][4], dp[tiles][4];
    uint32_t p[tiles / 2][4], ds[tiles / 2][4];

    wgmma_hold(dk, dv);
#pragma unroll 1
    for (int place = 0; place < memory.rows; place += kWgmmaStep) {
      const int at = place + kWgmmaStep <= memory.rows ? place : memory.rows - kWgmmaStep;
      wgmma_fence();
      over_columns<T, D>(s, k, panel_descriptor(memory.first + at * kPanelColumns, 0), panel);
      over_columns<T, D>(dp, v, panel_descriptor(memory.second + at * kPanelColumns, 0), panel);
      wgmma_wait<1>();
      wgmma_hold(s);
#pragma unroll
      for (int n = 0; n < tiles; ++n) {
        const Pack<float, 2> lse = load_pack<float, 2>(memory.lse + place + 8 * n + 2 * LanePlace().member);
#pragma unroll
        for (int i = 0; i < 4; ++i) s[n][i] = fast_exp2(s[n][i] * scale.in_base_2 - lse.items[i % 2]);
#pragma unroll
        for (int e = 0; e < 2; ++e) p[n / 2][n % 2 * 2 + e] = pack_pair<T>(s[n][2 * e], s[n][2 * e + 1]);
      }
      wgmma_fence();
      over_rows<T, D>(dv, p, panel_descriptor(memory.second + at * kPanelColumns, panel));
      wgmma_wait<1>();
      wgmma_hold(dp);
#pragma unroll
      for (int n = 0; n < tiles; ++n) {
        const Pack<float, 2> delta = load_pack<float, 2>(memory.delta + place + 8 * n + 2 * LanePlace().member);
#pragma unroll
        for (int i = 0; i < 4; ++i) s[n][i] *= dp[n][i] - delta.items[i % 2];
#pragma unroll
        for (int e = 0; e < 2; ++e) ds[n / 2][n % 2 * 2 + e] = pack_pair<T>(s[n][2 * e], s[n][2 * e + 1]);
      }
      wgmma_fence();
      over_rows<T, D>(dk, ds, panel_descriptor(memory.first + at * kPanelColumns, panel));
    }
    wgmma_wait<0>();
    wgmma_hold(dk, dv);
    finish_keys<T, D>(c, of_batch, scale, memory, rows, dk, dv);
  }
  if (wgmma_has_tail(c.tokens)) tail_of_keys<T, D>(c, of_batch, scale, memory);
}

template <class T, int D>
__device__ __forceinline__ void wgmma_backward_of_queries(const AttentionCase<float>& c, const AttentionPlan& plan,
                                                          int of_batch, const WgmmaMemory<D>& memory) {
  constexpr int tiles = kWgmmaStep / 8;
  const ScoreScale scale(c.scale);
  panels_of_keys<T, D>(c, AttentionHead<T, float>(c, of_batch), memory);
  async_proxy_fence();
  __syncthreads();
  const uint32_t panel = memory.panel_bytes();
  for (int round = 0; round < plan.rounds; ++round) {
    const LaneRows rows(round * kGroupRows + threadIdx.x / kWarp * 16, false);
    RowTile<D> q, dy;
    float delta[2], lse[2];
    load_queries<T, D>(c, of_batch, scale, memory, rows, q, dy, delta, lse);
    float dq[D / 8][4] = {}, s[tiles][4], dp[tiles][4];
    uint32_t ds[tiles / 2][4];

    wgmma_hold(dq);
#pragma unroll 1
    for (int place = 0; place < memory.rows; place += kWgmmaStep) {
      const int at = place + kWgmmaStep <= memory.rows ? place : memory.rows - kWgmmaStep;
      wgmma_fence();
      over_columns<T, D>(s, q, panel_descriptor(memory.first + at * kPanelColumns, 0), panel);
      over_columns<T, D>(dp, dy, panel_descriptor(memory.second + at * kPanelColumns, 0), panel);
      wgmma_wait<1>();
      wgmma_hold(s);
#pragma unroll
      for (int n = 0; n < tiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) s[n][i] = fast_exp2(s[n][i] * scale.in_base_2 - lse[i / 2]);
      if (place + kWgmmaStep > c.tokens)  // keys from T on, and those that have been in the step before
#pragma unroll
        for (int n = 0; n < tiles; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int key = at + 8 * n + 2 * LanePlace().member + i % 2;
            if (key < place || key >= c.tokens) s[n][i] = 0;
          }
      wgmma_wait<0>();
      wgmma_hold(dp);
#pragma unroll
      for (int n = 0; n < tiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) s[n][i] *= dp[n][i] - delta[i / 2];
#pragma unroll
        for (int e = 0; e < 2; ++e) ds[n / 2][n % 2 * 2 + e] = pack_pair<T>(s[n][2 * e], s[n][2 * e + 1]);
      }
      wgmma_fence();
      over_rows<T, D>(dq, ds, panel_descriptor(memory.first + at * kPanelColumns, panel));
    }
    wgmma_wait<0>();
    wgmma_hold(dq);
    finish_queries<T, D>(c, of_batch, memory, rows, dq);
  }
  if (wgmma_has_tail(c.tokens)) tail_of_queries<T, D>(c, of_batch, scale, memory);
}

template <class T, int D>
__global__ void __launch_bounds__(kGroupWarps* kWarp, kWgmmaBlocks<D>)
    register_attention_wgmma_bwd(AttentionCase<float> c, AttentionPlan plan) {
  if constexpr (kWarpgroups) {
    SDP_SWIZZLED_SHARED(swizzled);
    const WgmmaMemory<D> memory(swizzled, plan.chunk);
    const bool of_queries = blockIdx.x % 2;
    const int block = blockIdx.x / 2;
#pragma unroll
    for (int i = 0; i < D / 16; ++i) memory.warp_sums()[i * kWarp + threadIdx.x % kWarp] = 0;
    share_norm<T, D>(memory.q_parameters, c.q_norm, c.d);
    share_norm<T, D>(memory.k_parameters, c.k_norm, c.d);
    __syncthreads();
    if (of_queries) wgmma_backward_of_queries<T, D>(c, plan, block, memory);
    else wgmma_backward_of_keys<T, D>(c, plan, block, memory);
    if (!(of_queries ? c.q_norm.there : c.k_norm.there)) return;
    __syncthreads();
    const int64_t blocks = gridDim.x / 2;
    float* const partial = c.partial + ((of_queries ? blocks : 0) + block) * 2 * c.d;
    for (int i = threadIdx.x; i < 2 * c.d; i += blockDim.x) {
      const int place = column_sum_place<D>(i / c.d, i % c.d);
      float sum = 0;
      for (unsigned warp = 0; warp < blockDim.x / kWarp; ++warp) sum += memory.sums[warp * 2 * D + place];
      partial[i] = sum;
    }
  }
}

}  // namespace sdp
