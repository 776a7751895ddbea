// Register attention forward on tensor cores: K, normalised, and V of a head in shared memory, a warp's queries in
// registers. Softmax runs along with the keys; nothing of size (T, T) exists.
#pragma once
#include "cuda/register_attention_scores.cuh"

namespace sdp {

// How far, as a power of two, a score may outgrow its row's reference before the row is scaled down to a new one: the
// weights stay below 2⁸, which every dtype holds as well as 1, and mostly no lane has to ask its neighbours.
constexpr float kAttentionGrowth = 8;

// K and V of `rows` tokens, and the norms' parameters.
template <int D>
constexpr int64_t attention_forward_shared(int64_t rows, int /*warps*/) {
  return 2 * rows * D * 2 + 4 * D * 4;
}

// Tokens first … first + rows of K, normalised, and V into shared memory. Lean: by warps that have queries at work.
template <class T, int D, bool Lean>
__device__ __forceinline__ void share_keys(const AttentionCase<float>& c, const AttentionHead<T, float>& head,
                                           const float* k_parameters, int first, int rows, uint16_t* shared_keys,
                                           uint16_t* shared_values) {
  const int64_t stride = c.row_stride();
#pragma unroll 1
  for (int at = threadIdx.x / kWarp * 16; at < rows && first + at < c.tokens; at += blockDim.x / 2) {
    const LaneRows from(first + at, true);
    if (Lean) {
      copy_rows<T, D>(shared_keys + at * D, head.keys, stride, from, c.tokens, c.d);
      copy_rows<T, D>(shared_values + at * D, head.values, stride, from, c.tokens, c.d);
      if (c.k_norm.there)
        norm_rows_in_place<T, D>(shared_keys + at * D, k_parameters, from, c.tokens, c.d, c.eps);
    } else {
      RowTile<D> k, v;  // both on their way at a time
      load_rows<T, D>(k, head.keys, stride, from, c.tokens, c.d);
      load_rows<T, D>(v, head.values, stride, from, c.tokens, c.d);
      if (c.k_norm.there) norm_rows<T, D>(k, k_parameters, from, c.tokens, c.d, c.eps);
      share_rows<D>(k, shared_keys, at);
      share_rows<D>(v, shared_values, at);
    }
  }
}

template <class T, int D>
__global__ void __launch_bounds__(kAttentionThreadBound<D>)
    register_attention_mma_fwd(AttentionCase<float> c, AttentionPlan plan) {
  constexpr int tiles = kAttentionRowTiles<D>;
  SDP_DYNAMIC_SHARED(shared);
  uint16_t* const shared_keys = reinterpret_cast<uint16_t*>(shared);
  uint16_t* const shared_values = shared_keys + plan.chunk * D;
  float* const q_parameters = reinterpret_cast<float*>(shared_values + plan.chunk * D);
  float* const k_parameters = q_parameters + 2 * D;

  const int warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const int part = blockIdx.x % plan.parts, of_batch = blockIdx.x / plan.parts;
  const int64_t stride = c.row_stride();
  const ScoreScale scale(c.scale);

  share_norm<T, D>(q_parameters, c.q_norm, c.d);
  share_norm<T, D>(k_parameters, c.k_norm, c.d);
  __syncthreads();
  const bool all_on_chip = plan.chunk >= c.tokens;
  if (all_on_chip) {
    share_keys<T, D, false>(c, AttentionHead<T, float>(c, of_batch), k_parameters, 0, plan.chunk, shared_keys,
                            shared_values);
    __syncthreads();
  }

  for (int round = 0; round < plan.rounds; ++round) {
    // The warp with one round more is another one in the next head, so that no quarter of the processor has them all.
    const int turn = (warp + of_batch) % warps;
    const int first_query = ((part * plan.rounds + round) * warps + turn) * tiles * 16;
    const bool busy = first_query < c.tokens;
    RowTile<D> q[tiles];
    float sum[tiles][2], reference[tiles][2], o[tiles][D / 8][4];
#pragma unroll
    for (int u = 0; u < tiles; ++u) {
#pragma unroll
      for (int e = 0; e < 2; ++e) sum[u][e] = 0, reference[u][e] = -1e30f;
#pragma unroll
      for (int n = 0; n < D / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) o[u][n][i] = 0;
      const LaneRows rows(first_query + 16 * u, false);
      load_rows<T, D>(q[u], AttentionHead<T, float>(c, forgotten(of_batch)).queries, stride, rows, c.tokens, c.d);
    }
#pragma unroll
    for (int u = 0; u < tiles; ++u) {
      if (c.q_norm.there)
        norm_rows<T, D>(q[u], q_parameters, LaneRows(first_query + 16 * u, false), c.tokens, c.d, c.eps);
      xor_rows<D>(q[u], scale.sign_bits);
    }

    for (int first = 0; first < c.tokens; first += plan.chunk) {
      if (!all_on_chip) {
        if (first > 0 || round > 0) __syncthreads();
        share_keys<T, D, true>(c, AttentionHead<T, float>(c, forgotten(of_batch)), k_parameters, first, plan.chunk,
                               shared_keys, shared_values);
        __syncthreads();
      }
      if (!busy) continue;
      const int64_t first_row = int64_t(of_batch % c.heads) * c.tokens + first_query;
      const uint32_t sample = of_batch / c.heads;
      RowDraws<tiles> draws{};
      if (c.dropout) draws.current = draws.draw(c, first_row, sample, first);
#pragma unroll 1
      for (int at = 0; at < plan.chunk && first + at < c.tokens; at += 16) {
        const int lane = lane_of_tile<D>();
        const uint16_t *tile_keys = shared_keys + at * D, *tile_values = shared_values + at * D;
        float s[tiles][2][4] = {};
#pragma unroll
        for (int k = 0; k < D / 16; ++k) {
          uint32_t b[4];
          load_over_columns<D>(b, tile_keys, k, lane);
#pragma unroll
          for (int u = 0; u < tiles; ++u) mma_pair<T>(s[u][0], s[u][1], q[u].x[k], b);
        }
        float highest[tiles][2];
        bool grows = false;
#pragma unroll
        for (int u = 0; u < tiles; ++u) {
          forbid_keys(s[u], c, LaneRows(first_query + 16 * u, false), first_query + 16 * u, first + at);
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const float left = fmaxf(s[u][0][2 * e], s[u][0][2 * e + 1]);
            highest[u][e] = fmaxf(left, fmaxf(s[u][1][2 * e], s[u][1][2 * e + 1])) * scale.in_base_2;
            grows = grows || highest[u][e] > reference[u][e] + kAttentionGrowth;
          }
        }
        if (__any_sync(kAllLanes, grows)) {
#pragma unroll
          for (int u = 0; u < tiles; ++u)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              float most = fmaxf(highest[u][e], __shfl_xor_sync(kAllLanes, highest[u][e], 1));
              most = fmaxf(reference[u][e], fmaxf(most, __shfl_xor_sync(kAllLanes, most, 2)));
              const float factor = fast_exp2(reference[u][e] - most);
              reference[u][e] = most;
              sum[u][e] *= factor;
#pragma unroll
              for (int n = 0; n < D / 8; ++n) o[u][n][2 * e] *= factor, o[u][n][2 * e + 1] *= factor;
            }
        }
#pragma unroll
        for (int u = 0; u < tiles; ++u)
#pragma unroll
          for (int n = 0; n < 2; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              s[u][n][i] = fast_exp2(s[u][n][i] * scale.in_base_2 - reference[u][i / 2]);
              sum[u][i / 2] += s[u][n][i];
            }
        if (c.dropout) {  // after the sum: dropout acts on weights that add up to 1
          const uint32_t kept = draws.next(c, first_row, sample, first + at);
#pragma unroll
          for (int u = 0; u < tiles; ++u)
#pragma unroll
            for (int n = 0; n < 2; ++n)
#pragma unroll
              for (int i = 0; i < 4; ++i)
                if (!(kept >> (8 * u + i / 2 * 4 + 2 * n + i % 2) & 1)) s[u][n][i] = 0;
        }
        uint32_t p[tiles][4];
#pragma unroll
        for (int u = 0; u < tiles; ++u)
#pragma unroll
          for (int i = 0; i < 4; ++i) p[u][i] = pack_pair<T>(s[u][i / 2][i % 2 * 2], s[u][i / 2][i % 2 * 2 + 1]);
#pragma unroll
        for (int k = 0; k < D / 16; ++k) {
          uint32_t b[4];
          load_over_rows<D>(b, tile_values, k, lane);
#pragma unroll
          for (int u = 0; u < tiles; ++u) mma_pair<T>(o[u][2 * k], o[u][2 * k + 1], p[u], b);
        }
      }
    }
    if (!busy) continue;
    const AttentionHead<T, float> head(c, forgotten(of_batch));
    float* const lse = c.lse + head.number * c.tokens;
#pragma unroll
    for (int u = 0; u < tiles; ++u) {
      const LaneRows rows(first_query + 16 * u, false);
      float factor[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float total = quad_sum(sum[u][e]);
        factor[e] = (c.dropout ? c.keep_scale : 1.0f) / total;
        if (threadIdx.x % 4 == 0 && rows.row[e] < c.tokens) lse[rows.row[e]] = reference[u][e] * kLn2 + logf(total);
      }
      RowTile<D> rounded;
      round_rows<T, D>(rounded, o[u], factor[0], factor[1]);
      store_rows<T, D>(rounded, head.in_output(static_cast<T*>(c.y), c), c.out_stride(), rows, c.tokens, c.d);
    }
  }
}

}  // namespace sdp
