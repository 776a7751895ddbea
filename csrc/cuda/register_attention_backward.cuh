// Register attention backward on tensor cores: two roles, blocks of both side by side, so that what both read of a head
// comes from memory once.
//
// Keys: Q, normalised, and dY of a head in shared memory, a warp's 16 keys in registers: Sᵀ = K Qᵀ and dPᵀ = V dYᵀ,
//   from them dV += Pᵀ dY and dK += dSᵀ Q. Queries: K and V in shared memory, 16 queries in registers: dQ += dS K.
// Scores are computed in both, seven products instead of five; in exchange no sum crosses warps, any T fits, and
// nothing but the gradients is written. dS = P ∘ (dP − δ), P = exp(S − lse), δ = Σ dY ∘ Y over a row's channels.
#pragma once
#include "cuda/register_attention_backward_parts.cuh"

namespace sdp {

// At D = 128 registers hold K, dK and dV of a warp's keys, not V as well: each lane keeps its part in shared memory.
template <int D>
constexpr bool kShelvesValues = D > 96;

// Two matrices of `rows` tokens, lse and δ of them, the norms' parameters, the warps' sums for these, and their V.
template <int D>
constexpr int64_t attention_backward_shared(int64_t rows, int warps) {
  return 2 * rows * D * 2 + 2 * rows * 4 + 4 * D * 4 + warps * (2 * D * 4 + (kShelvesValues<D> ? 16 * D * 2 : 0));
}

template <int D>
struct BackwardMemory {
  uint16_t *first, *second;  // Q and dY, or K and V
  float *lse, *delta;        // lse in base 2
  float *q_parameters, *k_parameters;
  float* sums;
  uint32_t* shelf;  // this lane's: four words for each k, 4 · 32 words apart
  __device__ __forceinline__ BackwardMemory(unsigned char* shared, int chunk) {
    first = reinterpret_cast<uint16_t*>(shared);
    second = first + chunk * D;
    lse = reinterpret_cast<float*>(second + chunk * D);
    delta = lse + chunk;
    q_parameters = delta + chunk;
    k_parameters = q_parameters + 2 * D;
    sums = k_parameters + 2 * D;
    shelf = reinterpret_cast<uint32_t*>(sums + blockDim.x / kWarp * 2 * D) + threadIdx.x / kWarp * 8 * D +
            threadIdx.x % kWarp * 4;
  }
  __device__ __forceinline__ float* warp_sums() const { return sums + threadIdx.x / kWarp * 2 * D; }
};

// Tokens first … first + rows of Q, normalised and with the scale's sign, dY, lse and δ into shared memory. Lean: by
// warps that have keys at work.
template <class T, int D, bool Lean>
__device__ __forceinline__ void share_queries(const AttentionCase<float>& c, const AttentionHead<T, float>& head,
                                              const BackwardMemory<D>& memory, uint32_t sign_bits, int first,
                                              int rows) {
  const LanePlace lane;
  const T* const grad = head.in_output(static_cast<const T*>(c.grad), c);
  const T* const out = head.in_output(static_cast<const T*>(c.y), c);
  const float* const lse = c.lse + head.number * c.tokens;
#pragma unroll 1
  for (int at = threadIdx.x / kWarp * 16; at < rows && first + at < c.tokens; at += blockDim.x / 2) {
    const LaneRows from(first + at, false);
    float delta[2];
    if (Lean) {
      uint16_t *const queries = memory.first + at * D, *const grads = memory.second + at * D;
      copy_rows<T, D>(queries, head.queries, c.row_stride(), from, c.tokens, c.d);
      copy_rows<T, D>(grads, grad, c.out_stride(), from, c.tokens, c.d);
      if (c.q_norm.there) norm_rows_in_place<T, D>(queries, memory.q_parameters, from, c.tokens, c.d, c.eps);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const T* p = out + from.row[e] * c.out_stride();
        const int columns = from.row[e] < c.tokens ? c.d : 0;
        float sum = 0;
#pragma unroll(D > 96 ? 1 : 2)
        for (int i = 0; i < D / 8; ++i) {
          const int place = chunk_offset<D>(lane.group + 8 * e, i / 2, i % 2) + 2 * lane.member;
          *reinterpret_cast<uint32_t*>(queries + place) ^= sign_bits;
          const uint32_t pair = *reinterpret_cast<const uint32_t*>(grads + place);
          if (first_column(i / 2) < columns) {
            const T* y = p + first_column(i / 2) + i % 2 * 2;
            sum += low_of<T>(pair) * widen(y[0]) + high_of<T>(pair) * widen(y[1]);
          }
        }
        delta[e] = quad_sum(sum);
      }
    } else {
      RowTile<D> q, dy, y;
      load_rows<T, D>(q, head.queries, c.row_stride(), from, c.tokens, c.d);
      load_rows<T, D>(dy, grad, c.out_stride(), from, c.tokens, c.d);
      load_rows<T, D>(y, out, c.out_stride(), from, c.tokens, c.d);
      row_products<T, D>(dy, y, delta);
      if (c.q_norm.there) norm_rows<T, D>(q, memory.q_parameters, from, c.tokens, c.d, c.eps);
      xor_rows<D>(q, sign_bits);
      share_rows<D>(q, memory.first, at);
      share_rows<D>(dy, memory.second, at);
    }
    if (lane.member == 0)
#pragma unroll
      for (int e = 0; e < 2; ++e) {  // rows beyond the sequence weigh nothing
        const int row = at + lane.group + 8 * e;
        memory.delta[row] = delta[e];
        memory.lse[row] = from.row[e] < c.tokens ? lse[from.row[e]] * kLog2e : INFINITY;
      }
  }
}

template <class T, int D>
__device__ __forceinline__ void backward_of_keys(const AttentionCase<float>& c, const AttentionPlan& plan, int of_batch,
                                                 int part, const BackwardMemory<D>& memory) {
  const int warps = blockDim.x / kWarp;
  const ScoreScale scale(c.scale);
  const bool all_on_chip = plan.chunk >= c.tokens;
  if (all_on_chip) {
    share_queries<T, D, false>(c, AttentionHead<T, float>(c, of_batch), memory, scale.sign_bits, 0, plan.chunk);
    __syncthreads();
  }
  for (int round = 0; round < plan.rounds; ++round) {
    const int turn = (threadIdx.x / kWarp + of_batch) % warps;
    const int first_key = ((part * plan.rounds + round) * warps + turn) * 16;
    const bool busy = first_key < c.tokens;
    const LaneRows rows(first_key, false);
    RowTile<D> k, v;
    {
      const AttentionHead<T, float> head(c, forgotten(of_batch));
      load_rows<T, D>(k, head.keys, c.row_stride(), rows, c.tokens, c.d);
      load_rows<T, D>(v, head.values, c.row_stride(), rows, c.tokens, c.d);
    }
    if (c.k_norm.there) norm_rows<T, D>(k, memory.k_parameters, rows, c.tokens, c.d, c.eps);
    xor_rows<D>(k, scale.hidden_zero());
    xor_rows<D>(v, scale.hidden_zero());
    if constexpr (kShelvesValues<D>)
#pragma unroll
      for (int i = 0; i < D / 16; ++i)
        store_pack(memory.shelf + i * 4 * kWarp, Pack<uint32_t>{{v.x[i][0], v.x[i][1], v.x[i][2], v.x[i][3]}});
    float dk[D / 8][4] = {}, dv[D / 8][4] = {};

    for (int first = 0; first < c.tokens; first += plan.chunk) {
      if (!all_on_chip) {
        if (first > 0 || round > 0) __syncthreads();
        share_queries<T, D, true>(c, AttentionHead<T, float>(c, forgotten(of_batch)), memory, scale.sign_bits, first,
                                  plan.chunk);
        __syncthreads();
      }
      if (!busy) continue;
#pragma unroll 1
      for (int at = 0; at < plan.chunk && first + at < c.tokens; at += 16) {
        const int lane = lane_of_tile<D>();
        const uint16_t *queries = memory.first + at * D, *grads = memory.second + at * D;
        float s[2][4] = {}, dp[2][4] = {};
#pragma unroll
        for (int i = 0; i < D / 16; ++i) {
          uint32_t b[4];
          load_over_columns<D>(b, queries, i, lane);
          mma_pair<T>(s[0], s[1], k.x[i], b);
          load_over_columns<D>(b, grads, i, lane);
          if constexpr (kShelvesValues<D>) {
            const Pack<uint32_t> a = load_pack(memory.shelf + i * 4 * kWarp);
            mma_pair<T>(dp[0], dp[1], a.items, b);
          } else {
            mma_pair<T>(dp[0], dp[1], v.x[i], b);
          }
        }
        forbid_queries(s, c, rows, first + at, first_key);
        uint32_t kept = 0xff;
        if (c.dropout)
          kept = draw_columns(c, int64_t(of_batch % c.heads) * c.tokens + first + at, of_batch / c.heads, first_key);
        uint32_t p[4], ds[4];
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          const Pack<float, 2> lse = load_pack<float, 2>(memory.lse + at + 8 * n + 2 * LanePlace().member);
          const Pack<float, 2> delta = load_pack<float, 2>(memory.delta + at + 8 * n + 2 * LanePlace().member);
          float weight[4], gradient[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            weight[i] = fast_exp2(s[n][i] * scale.in_base_2 - lse.items[i % 2]);
            float dropped = dp[n][i];
            if (c.dropout) dropped = kept >> (4 * (i / 2) + 2 * n + i % 2) & 1 ? dropped * c.keep_scale : 0;
            gradient[i] = weight[i] * (dropped - delta.items[i % 2]);
            if (c.dropout && !(kept >> (4 * (i / 2) + 2 * n + i % 2) & 1)) weight[i] = 0;
          }
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            p[2 * n + e] = pack_pair<T>(weight[2 * e], weight[2 * e + 1]);
            ds[2 * n + e] = pack_pair<T>(gradient[2 * e], gradient[2 * e + 1]);
          }
        }
#pragma unroll
        for (int i = 0; i < D / 16; ++i) {
          uint32_t b[4];
          load_over_rows<D>(b, grads, i, lane);
          mma_pair<T>(dv[2 * i], dv[2 * i + 1], p, b);
          load_over_rows<D>(b, queries, i, lane);
          mma_pair<T>(dk[2 * i], dk[2 * i + 1], ds, b);
        }
      }
    }
    if (!busy) continue;
    const AttentionHead<T, float> head(c, forgotten(of_batch));
    T* const out = static_cast<T*>(c.dqkv) + head.offset + c.heads * c.d;
    const float factor = c.dropout ? c.keep_scale : 1.0f;
    round_rows<T, D>(v, dv, factor, factor);
    store_rows<T, D>(v, out + c.heads * c.d, c.row_stride(), rows, c.tokens, c.d);
    finish_rows<T, D>(c, c.k_norm, dk, scale.magnitude, head.keys, out, memory.k_parameters, rows, memory.warp_sums());
  }
}

template <class T, int D>
__device__ __forceinline__ void backward_of_queries(const AttentionCase<float>& c, const AttentionPlan& plan,
                                                    int of_batch, int part, const BackwardMemory<D>& memory) {
  const int warps = blockDim.x / kWarp;
  const ScoreScale scale(c.scale);
  const bool all_on_chip = plan.chunk >= c.tokens;
  if (all_on_chip) {
    share_keys<T, D, false>(c, AttentionHead<T, float>(c, of_batch), memory.k_parameters, 0, plan.chunk, memory.first,
                            memory.second);
    __syncthreads();
  }
  for (int round = 0; round < plan.rounds; ++round) {
    const int turn = (threadIdx.x / kWarp + of_batch) % warps;
    const int first_query = ((part * plan.rounds + round) * warps + turn) * 16;
    const bool busy = first_query < c.tokens;
    const LaneRows rows(first_query, false);
    RowTile<D> q, dy;
    float delta[2], lse[2];
    load_queries<T, D>(c, of_batch, scale, memory, rows, q, dy, delta, lse);
    xor_rows<D>(dy, scale.hidden_zero());
    float dq[D / 8][4] = {};

    for (int first = 0; first < c.tokens; first += plan.chunk) {
      if (!all_on_chip) {
        if (first > 0 || round > 0) __syncthreads();
        share_keys<T, D, true>(c, AttentionHead<T, float>(c, forgotten(of_batch)), memory.k_parameters, first,
                               plan.chunk, memory.first, memory.second);
        __syncthreads();
      }
      if (!busy) continue;
      const int64_t first_row = int64_t(of_batch % c.heads) * c.tokens + first_query;
      const uint32_t sample = of_batch / c.heads;
      RowDraws<1> draws{};
      if (c.dropout) draws.current = draws.draw(c, first_row, sample, first);
#pragma unroll 1
      for (int at = 0; at < plan.chunk && first + at < c.tokens; at += 16) {
        const int lane = lane_of_tile<D>();
        const uint16_t *keys = memory.first + at * D, *values = memory.second + at * D;
        float s[2][4] = {}, dp[2][4] = {};
#pragma unroll
        for (int i = 0; i < D / 16; ++i) {
          uint32_t b[4];
          load_over_columns<D>(b, keys, i, lane);
          mma_pair<T>(s[0], s[1], q.x[i], b);
          load_over_columns<D>(b, values, i, lane);
          mma_pair<T>(dp[0], dp[1], dy.x[i], b);
        }
        forbid_keys(s, c, rows, first_query, first + at);
        if (c.dropout) {
          const uint32_t kept = draws.next(c, first_row, sample, first + at);
#pragma unroll
          for (int n = 0; n < 2; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i)
              dp[n][i] = kept >> (4 * (i / 2) + 2 * n + i % 2) & 1 ? dp[n][i] * c.keep_scale : 0;
        }
        uint32_t ds[4];
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          float gradient[4];
#pragma unroll
          for (int i = 0; i < 4; ++i)
            gradient[i] = fast_exp2(s[n][i] * scale.in_base_2 - lse[i / 2]) * (dp[n][i] - delta[i / 2]);
#pragma unroll
          for (int e = 0; e < 2; ++e) ds[2 * n + e] = pack_pair<T>(gradient[2 * e], gradient[2 * e + 1]);
        }
#pragma unroll
        for (int i = 0; i < D / 16; ++i) {
          uint32_t b[4];
          load_over_rows<D>(b, keys, i, lane);
          mma_pair<T>(dq[2 * i], dq[2 * i + 1], ds, b);
        }
      }
    }
    if (!busy) continue;
    const AttentionHead<T, float> head(c, forgotten(of_batch));
    T* const out = static_cast<T*>(c.dqkv) + head.offset;
    finish_rows<T, D>(c, c.q_norm, dq, c.scale, head.queries, out, memory.q_parameters, rows, memory.warp_sums());
  }
}

template <class T, int D>
__global__ void __launch_bounds__(kAttentionThreadBound<D>)
    register_attention_mma_bwd(AttentionCase<float> c, AttentionPlan plan) {
  SDP_DYNAMIC_SHARED(shared);
  const BackwardMemory<D> memory(shared, plan.chunk);
  const bool of_queries = blockIdx.x % 2;
  const int block = blockIdx.x / 2, part = block % plan.parts, of_batch = block / plan.parts;
#pragma unroll
  for (int i = 0; i < D / 16; ++i) memory.warp_sums()[i * kWarp + threadIdx.x % kWarp] = 0;
  share_norm<T, D>(memory.q_parameters, c.q_norm, c.d);
  share_norm<T, D>(memory.k_parameters, c.k_norm, c.d);
  __syncthreads();
  if (of_queries) backward_of_queries<T, D>(c, plan, of_batch, part, memory);
  else backward_of_keys<T, D>(c, plan, of_batch, part, memory);
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

}  // namespace sdp
