// Register attention backward with warpgroups: what of a head is in shared memory, and the rows that a warp has in
// registers, from global memory and back.
#pragma once
#include "common/wgmma.cuh"
#include "cuda/register_attention_backward.cuh"

namespace sdp {

constexpr int kWgmmaStep = 48;  // rows of the other side at a time
template <int D>
constexpr int kWgmmaBlocks = D <= 32 ? 3 : 2;  // of one warpgroup, that registers do for on a multiprocessor

// Rows of a matrix in shared memory; steps begin at multiples of kWgmmaStep, the last where it ends with the matrix.
SDP_HOST_DEVICE int wgmma_rows(int tokens) {
  const int rows = (tokens + 15) / 16 * 16;
  return rows > kWgmmaStep ? rows : kWgmmaStep;
}
SDP_HOST_DEVICE int wgmma_steps(int rows) { return (rows + kWgmmaStep - 1) / kWgmmaStep; }

// Two matrices, lse and δ of each step's rows, the norms' parameters, and the warps' sums for these.
template <int D>
constexpr int64_t attention_wgmma_shared(int64_t rows, int warps) {
  return 2 * rows * D * 2 + 2 * ((rows + kWgmmaStep - 1) / kWgmmaStep * kWgmmaStep) * 4 + 4 * D * 4 + warps * 2 * D * 4;
}

template <int D>
struct WgmmaMemory {
  int rows;
  uint16_t *first, *second;  // Q and dY, or K and V
  float *lse, *delta;        // in base 2; by place_of_query
  float *q_parameters, *k_parameters;
  float* sums;
  __device__ __forceinline__ WgmmaMemory(unsigned char* shared, int count) : rows(count) {
    first = reinterpret_cast<uint16_t*>(shared);
    second = first + rows * D;
    lse = reinterpret_cast<float*>(second + rows * D);
    delta = lse + wgmma_steps(rows) * kWgmmaStep;
    q_parameters = delta + wgmma_steps(rows) * kWgmmaStep;
    k_parameters = q_parameters + 2 * D;
    sums = k_parameters + 2 * D;
  }
  __device__ __forceinline__ float* warp_sums() const { return sums + threadIdx.x / kWarp * 2 * D; }
  __device__ __forceinline__ uint32_t panel_bytes() const { return rows * kPanelColumns * 2; }
  // The last step begins with rows that have been in the one before: those weigh nothing in it.
  __device__ __forceinline__ int repeated() const { return wgmma_steps(rows) * kWgmmaStep - rows; }
  __device__ __forceinline__ int place_of_query(int row) const {
    return row < (wgmma_steps(rows) - 1) * kWgmmaStep ? row : row + repeated();
  }
};

// Two words of a row for each k, as share_rows puts them, in panels.
template <int D>
__device__ __forceinline__ void share_in_panels(const RowTile<D>& r, uint16_t* matrix, int rows, int first) {
  const LanePlace lane;
#pragma unroll
  for (int k = 0; k < D / 16; ++k)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = first + lane.group + i % 2 * 8;
      const int chunk = (k % 2 * 2 + i / 2) ^ (row / 2 % 4);
      *reinterpret_cast<uint32_t*>(matrix + (k / 2 * rows + row) * kPanelColumns + chunk * 8 + 2 * lane.member) =
          r.x[k][i];
    }
}

// Q, normalised and with the scale's sign, dY, lse and δ into shared memory.
template <class T, int D>
__device__ __forceinline__ void panels_of_queries(const AttentionCase<float>& c, const AttentionHead<T, float>& head,
                                                  const WgmmaMemory<D>& memory, uint32_t sign_bits) {
  const LanePlace lane;
  const T* const grad = head.in_output(static_cast<const T*>(c.grad), c);
  const T* const out = head.in_output(static_cast<const T*>(c.y), c);
  const float* const lse = c.lse + head.number * c.tokens;
  for (int i = threadIdx.x; i < memory.repeated(); i += blockDim.x) {
    const int place = (wgmma_steps(memory.rows) - 1) * kWgmmaStep + i;
    memory.lse[place] = INFINITY, memory.delta[place] = 0;
  }
#pragma unroll 1
  for (int at = threadIdx.x / kWarp * 16; at < memory.rows; at += blockDim.x / 2) {
    const LaneRows from(at, false);
    float delta[2];
    RowTile<D> q, dy, y;
    load_rows<T, D>(q, head.queries, c.row_stride(), from, c.tokens, c.d);
    load_rows<T, D>(dy, grad, c.out_stride(), from, c.tokens, c.d);
    load_rows<T, D>(y, out, c.out_stride(), from, c.tokens, c.d);
    row_products<T, D>(dy, y, delta);
    if (c.q_norm.there) norm_rows<T, D>(q, memory.q_parameters, from, c.tokens, c.d, c.eps);
    xor_rows<D>(q, sign_bits);
    share_in_panels<D>(q, memory.first, memory.rows, at);
    share_in_panels<D>(dy, memory.second, memory.rows, at);
    if (lane.member == 0)
#pragma unroll
      for (int e = 0; e < 2; ++e) {  // rows beyond the sequence weigh nothing
        const int place = memory.place_of_query(from.row[e]);
        memory.delta[place] = delta[e];
        memory.lse[place] = from.row[e] < c.tokens ? lse[from.row[e]] * kLog2e : INFINITY;
      }
  }
}
// K, normalised, and V.
template <class T, int D>
__device__ __forceinline__ void panels_of_keys(const AttentionCase<float>& c, const AttentionHead<T, float>& head,
                                               const WgmmaMemory<D>& memory) {
#pragma unroll 1
  for (int at = threadIdx.x / kWarp * 16; at < memory.rows; at += blockDim.x / 2) {
    const LaneRows from(at, false);
    RowTile<D> k, v;
    load_rows<T, D>(k, head.keys, c.row_stride(), from, c.tokens, c.d);
    load_rows<T, D>(v, head.values, c.row_stride(), from, c.tokens, c.d);
    if (c.k_norm.there) norm_rows<T, D>(k, memory.k_parameters, from, c.tokens, c.d, c.eps);
    share_in_panels<D>(k, memory.first, memory.rows, at);
    share_in_panels<D>(v, memory.second, memory.rows, at);
  }
}

// 16 keys, and V of them.
template <class T, int D>
__device__ __forceinline__ void load_keys(const AttentionCase<float>& c, int of_batch, const WgmmaMemory<D>& memory,
                                          const LaneRows& rows, RowTile<D>& k, RowTile<D>& v) {
  const AttentionHead<T, float> head(c, forgotten(of_batch));
  load_rows<T, D>(k, head.keys, c.row_stride(), rows, c.tokens, c.d);
  load_rows<T, D>(v, head.values, c.row_stride(), rows, c.tokens, c.d);
  if (c.k_norm.there) norm_rows<T, D>(k, memory.k_parameters, rows, c.tokens, c.d, c.eps);
}

// The gradients of 16 keys and of V, and of 16 queries, from their sums.
template <class T, int D>
__device__ __forceinline__ void finish_keys(const AttentionCase<float>& c, int of_batch, const ScoreScale& scale,
                                            const WgmmaMemory<D>& memory, const LaneRows& rows,
                                            const float (&dk)[D / 8][4], const float (&dv)[D / 8][4]) {
  const AttentionHead<T, float> head(c, forgotten(of_batch));
  T* const out = static_cast<T*>(c.dqkv) + head.offset + c.heads * c.d;
  RowTile<D> rounded;
  round_rows<T, D>(rounded, dv, 1.0f, 1.0f);
  store_rows<T, D>(rounded, out + c.heads * c.d, c.row_stride(), rows, c.tokens, c.d);
  finish_rows<T, D>(c, c.k_norm, dk, scale.magnitude, head.keys, out, memory.k_parameters, rows, memory.warp_sums());
}
template <class T, int D>
__device__ __forceinline__ void finish_queries(const AttentionCase<float>& c, int of_batch,
                                               const WgmmaMemory<D>& memory, const LaneRows& rows,
                                               const float (&dq)[D / 8][4]) {
  const AttentionHead<T, float> head(c, forgotten(of_batch));
  T* const out = static_cast<T*>(c.dqkv) + head.offset;
  finish_rows<T, D>(c, c.q_norm, dq, c.scale, head.queries, out, memory.q_parameters, rows, memory.warp_sums());
}

}  // namespace sdp
