// Register attention backward: what its kernels with tensor cores share. `Memory` is a kernel's shared memory, with the
// norms' parameters.
#pragma once
#include "cuda/register_attention_forward.cuh"

namespace sdp {

template <class T, int D>
__device__ __forceinline__ void row_products(const RowTile<D>& a, const RowTile<D>& b, float (&products)[2]) {
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    float sum = 0;
#pragma unroll
    for (int k = 0; k < D / 16; ++k)
#pragma unroll
      for (int j = 0; j < 4; ++j) sum += row_element<T>(a.x[k], e, j) * row_element<T>(b.x[k], e, j);
    products[e] = quad_sum(sum);
  }
}

// From the gradient of a tile's rows after the norm (`tiles` times `factor`) to that of the rows as they came, stored.
// inputs and out: the head's rows of q or k, and of their gradient.
template <class T, int D>
__device__ __forceinline__ void finish_rows(const AttentionCase<float>& c, const AttentionNorm& norm,
                                            const float (&tiles)[D / 8][4], float factor, const T* inputs, T* out,
                                            const float* weights, const LaneRows& rows, float* warp_sums) {
  RowTile<D> r;
  if (norm.there) {
    float sums[D / 2];
    load_rows<T, D>(r, inputs, c.row_stride(), rows, c.tokens, c.d);
    norm_rows_backward<T, D>(r, tiles, factor, weights, rows, c.tokens, c.d, c.eps, sums);
    store_rows<T, D>(r, out, c.row_stride(), rows, c.tokens, c.d);
    add_column_sums(warp_sums, sums);
  } else {
    round_rows<T, D>(r, tiles, factor, factor);
    store_rows<T, D>(r, out, c.row_stride(), rows, c.tokens, c.d);
  }
}

// 16 queries of this warp in registers, δ and lse (in base 2) of them.
template <class T, int D, class Memory>
__device__ __forceinline__ void load_queries(const AttentionCase<float>& c, int of_batch, const ScoreScale& scale,
                                             const Memory& memory, const LaneRows& rows, RowTile<D>& q,
                                             RowTile<D>& dy, float (&delta)[2], float (&lse)[2]) {
  const AttentionHead<T, float> head(c, forgotten(of_batch));
  RowTile<D> y;
  load_rows<T, D>(q, head.queries, c.row_stride(), rows, c.tokens, c.d);
  load_rows<T, D>(dy, head.in_output(static_cast<const T*>(c.grad), c), c.out_stride(), rows, c.tokens, c.d);
  load_rows<T, D>(y, head.in_output(static_cast<const T*>(c.y), c), c.out_stride(), rows, c.tokens, c.d);
  row_products<T, D>(dy, y, delta);
#pragma unroll
  for (int e = 0; e < 2; ++e)
    lse[e] = rows.row[e] < c.tokens ? c.lse[head.number * c.tokens + rows.row[e]] * kLog2e : INFINITY;
  if (c.q_norm.there) norm_rows<T, D>(q, memory.q_parameters, rows, c.tokens, c.d, c.eps);
  xor_rows<D>(q, scale.sign_bits);
}

}  // namespace sdp
