// Register attention by fused multiply-adds, for fp32 (and fp64 in the emulator): a warp has four rows, and the rows of
// the other side come by in shared memory, 32 at a time, one per lane for scores, one after the other for sums.
#pragma once
#include "cuda/register_attention_case.cuh"

namespace sdp {

constexpr int kFmaWarps = 8, kFmaRows = 4, kFmaStep = 32;  // rows of a warp, rows of the other side at a time
constexpr int kFmaChannels = 4;                            // of a lane: d ≤ 128
static_assert(kFmaWarps * kFmaRows == kFmaStep);

__device__ __forceinline__ float natural_exp(float x) { return expf(x); }
__device__ __forceinline__ double natural_exp(double x) { return exp(x); }
__device__ __forceinline__ float natural_log(float x) { return logf(x); }
__device__ __forceinline__ double natural_log(double x) { return log(x); }

// Both sides' two matrices of 32 rows (the other side's with an odd pitch), lse and δ of 32 queries, the warps' sums.
inline int64_t attention_fma_shared(int d, int64_t accumulator_bytes) {
  return (2 * kFmaStep * d + 2 * kFmaStep * (d + 1) + 2 * kFmaStep + kFmaWarps * 2 * d) * accumulator_bytes;
}
template <class A>
struct FmaMemory {
  A *own_first, *own_second, *other_first, *other_second, *lse, *delta, *sums;
  int pitch;
  __device__ __forceinline__ FmaMemory(unsigned char* shared, int d)
      : own_first(reinterpret_cast<A*>(shared)), pitch(d + 1) {
    own_second = own_first + kFmaStep * d;
    other_first = own_second + kFmaStep * d;
    other_second = other_first + kFmaStep * pitch;
    lse = other_second + kFmaStep * pitch;
    delta = lse + kFmaStep;
    sums = delta + kFmaStep;
  }
};

template <class A>
struct FmaStatistics {
  A mean, rstd;
};
// A row's channels lane, lane + 32, …; zero beyond d, or all of them if the row is none.
template <class T>
__device__ __forceinline__ void fma_load(Accumulator<T> (&x)[kFmaChannels], const T* row, bool there, int d) {
#pragma unroll
  for (int i = 0; i < kFmaChannels; ++i) {
    const int channel = threadIdx.x % kWarp + i * kWarp;
    x[i] = there && channel < d ? widen(row[channel]) : Accumulator<T>(0);
  }
}
template <class A>
__device__ __forceinline__ FmaStatistics<A> fma_statistics(const A (&x)[kFmaChannels], int d, A eps) {
  A sum = 0, squares = 0;
#pragma unroll
  for (int i = 0; i < kFmaChannels; ++i) sum += x[i];
  const A mean = sum_lanes(sum, 1, kWarp) / d;
#pragma unroll
  for (int i = 0; i < kFmaChannels; ++i)
    if (int(threadIdx.x % kWarp) + i * kWarp < d) squares += (x[i] - mean) * (x[i] - mean);
  return {mean, reciprocal_root(sum_lanes(squares, 1, kWarp) / d + eps)};
}
// A row to shared memory, normalised and rounded as qkv's type if there is a norm.
template <class T>
__device__ __forceinline__ void fma_share(Accumulator<T>* to, const T* row, bool there, const AttentionNorm& norm,
                                          int d, Accumulator<T> eps) {
  using A = Accumulator<T>;
  A x[kFmaChannels];
  fma_load(x, row, there, d);
  FmaStatistics<A> s{0, 1};
  if (norm.there) s = fma_statistics(x, d, eps);
#pragma unroll
  for (int i = 0; i < kFmaChannels; ++i) {
    const int channel = threadIdx.x % kWarp + i * kWarp;
    if (channel >= d) continue;
    A y = x[i];
    if (norm.there && there) {
      const A weight = norm_parameter<T>(norm.weight, norm.wide_weight, channel, 1);
      const A bias = norm_parameter<T>(norm.bias, norm.wide_bias, channel, 0);
      y = widen(narrow<T>((x[i] - s.mean) * s.rstd * weight + bias));
    }
    to[channel] = y;
  }
}

// Products of four rows of this side with one of the other.
template <class A>
__device__ __forceinline__ void fma_products(A (&sums)[kFmaRows], const A* own, const A* other, int d) {
#pragma unroll
  for (int r = 0; r < kFmaRows; ++r) sums[r] = 0;
#pragma unroll 4
  for (int channel = 0; channel < d; ++channel)
#pragma unroll
    for (int r = 0; r < kFmaRows; ++r) sums[r] += own[r * d + channel] * other[channel];
}
// totals += Σ over the other side's rows of the weight that its lane holds times the row.
template <class A>
__device__ __forceinline__ void fma_add_rows(A (&totals)[kFmaRows][kFmaChannels], const A (&weights)[kFmaRows],
                                             const A* other, int pitch, int d) {
  for (int j = 0; j < kFmaStep; ++j) {
    A row[kFmaChannels];
#pragma unroll
    for (int i = 0; i < kFmaChannels; ++i) {
      const int channel = threadIdx.x % kWarp + i * kWarp;
      row[i] = channel < d ? other[j * pitch + channel] : A(0);
    }
#pragma unroll
    for (int r = 0; r < kFmaRows; ++r) {
      const A weight = __shfl_sync(kAllLanes, weights[r], j);
#pragma unroll
      for (int i = 0; i < kFmaChannels; ++i) totals[r][i] += weight * row[i];
    }
  }
}

template <class A>
__device__ __forceinline__ bool fma_keeps(const AttentionCase<A>& c, const PhiloxSource& source, uint32_t sample,
                                          int64_t head, int query, int key) {
  const uint64_t position = static_cast<uint64_t>(head * c.tokens + query) * c.tokens + key;
  return philox_keeps(source, sample, static_cast<uint32_t>(position / 4), c.threshold) >> position % 4 & 1;
}

template <class T>
__global__ void __launch_bounds__(kFmaWarps* kWarp)
    register_attention_fma_fwd(AttentionCase<Accumulator<T>> c, AttentionPlan plan) {
  using A = Accumulator<T>;
  SDP_DYNAMIC_SHARED(shared);
  const FmaMemory<A> memory(shared, c.d);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const AttentionHead<T, A> head(c, blockIdx.x / plan.parts);
  const int first_query = blockIdx.x % plan.parts * kFmaStep + warp * kFmaRows;
  const int64_t stride = c.row_stride();
  const AttentionNorm q_norm = c.norm_of(true), k_norm = c.norm_of(false);
  PhiloxSource source{};
  if (c.dropout) source = philox_source(c.rng, c.place);

  A* const own = memory.own_first + warp * kFmaRows * c.d;
  A reference[kFmaRows], sum[kFmaRows], o[kFmaRows][kFmaChannels] = {};
  for (int r = 0; r < kFmaRows; ++r) {
    const int query = first_query + r;
    fma_share(own + r * c.d, head.queries + query * stride, query < c.tokens, q_norm, c.d,
              c.eps);
  }
#pragma unroll
  for (int r = 0; r < kFmaRows; ++r) reference[r] = A(-1e30), sum[r] = 0;
  for (int first = 0; first < c.tokens; first += kFmaStep) {
    if (first > 0) __syncthreads();
    for (int r = 0; r < kFmaRows; ++r) {
      const int at = warp * kFmaRows + r, key = first + at;
      const bool there = key < c.tokens;
      fma_share(memory.other_first + at * memory.pitch, head.keys + key * stride, there,
                k_norm, c.d, c.eps);
      fma_share(memory.other_second + at * memory.pitch, head.values + key * stride, there, AttentionNorm{}, c.d,
                c.eps);
    }
    __syncthreads();
    A weight[kFmaRows];
    fma_products(weight, own, memory.other_first + lane * memory.pitch, c.d);
    const int key = first + lane;
#pragma unroll
    for (int r = 0; r < kFmaRows; ++r) {
      const int query = first_query + r;
      const bool counts = key < c.tokens && !(c.limited() && c.forbids(query, key));
      const A score = counts ? weight[r] * c.scale : A(-INFINITY);
      A highest = score;
      for (int bit = 1; bit < kWarp; bit *= 2) {
        const A other = __shfl_xor_sync(kAllLanes, highest, bit);
        highest = other > highest ? other : highest;
      }
      const A next = highest > reference[r] ? highest : reference[r], factor = natural_exp(reference[r] - next);
      weight[r] = natural_exp(score - next);
      sum[r] = sum[r] * factor + sum_lanes(weight[r], 1, kWarp);
      reference[r] = next;
#pragma unroll
      for (int i = 0; i < kFmaChannels; ++i) o[r][i] *= factor;
      if (c.dropout && !fma_keeps(c, source, head.sample, head.head, query, key)) weight[r] = 0;
    }
    fma_add_rows(o, weight, memory.other_second, memory.pitch, c.d);
  }
  T* const out = head.in_output(static_cast<T*>(c.y), c);
#pragma unroll
  for (int r = 0; r < kFmaRows; ++r) {
    const int query = first_query + r;
    if (query >= c.tokens) continue;
    const A factor = (c.dropout ? c.keep_scale : A(1)) / sum[r];
#pragma unroll
    for (int i = 0; i < kFmaChannels; ++i)
      if (lane + i * kWarp < c.d) out[query * c.out_stride() + lane + i * kWarp] = narrow<T>(o[r][i] * factor);
    if (lane == 0) c.lse[head.number * c.tokens + query] = reference[r] + natural_log(sum[r]);
  }
}

// As on tensor cores: even blocks have keys (own K, V; Q, dY come by), odd ones queries (own Q, dY; K, V come by).
template <class T>
__global__ void __launch_bounds__(kFmaWarps* kWarp)
    register_attention_fma_bwd(AttentionCase<Accumulator<T>> c, AttentionPlan plan) {
  using A = Accumulator<T>;
  SDP_DYNAMIC_SHARED(shared);
  const FmaMemory<A> memory(shared, c.d);
  const bool of_queries = blockIdx.x % 2;
  const int block = blockIdx.x / 2, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const AttentionHead<T, A> head(c, block / plan.parts);
  const int first_own = block % plan.parts * kFmaStep + warp * kFmaRows;
  const int64_t stride = c.row_stride();
  const AttentionNorm q_norm = c.norm_of(true), k_norm = c.norm_of(false);
  PhiloxSource source{};
  if (c.dropout) source = philox_source(c.rng, c.place);
  const T* const grad = head.in_output(static_cast<const T*>(c.grad), c);
  const T* const out = head.in_output(static_cast<const T*>(c.y), c);

  // Two rows of a side to shared memory; of a query also δ and lse, which the warp's lanes all return.
  auto share_query = [&](A* first, A* second, int query, A& lse, A& delta) {
    const bool there = query < c.tokens;
    fma_share(first, head.queries + query * stride, there, q_norm, c.d, c.eps);
    A dy[kFmaChannels], y[kFmaChannels], sum = 0;
    fma_load(dy, grad + query * c.out_stride(), there, c.d);
    fma_load(y, out + query * c.out_stride(), there, c.d);
#pragma unroll
    for (int i = 0; i < kFmaChannels; ++i) {
      sum += dy[i] * y[i];
      if (lane + i * kWarp < c.d) second[lane + i * kWarp] = dy[i];
    }
    delta = sum_lanes(sum, 1, kWarp);
    lse = there ? c.lse[head.number * c.tokens + query] : A(INFINITY);
  };
  auto share_key = [&](A* first, A* second, int key) {
    const bool there = key < c.tokens;
    fma_share(first, head.keys + key * stride, there, k_norm, c.d, c.eps);
    fma_share(second, head.values + key * stride, there, AttentionNorm{}, c.d, c.eps);
  };

  A *const own_first = memory.own_first + warp * kFmaRows * c.d, *const own_second = own_first + kFmaStep * c.d;
  A own_lse[kFmaRows] = {}, own_delta[kFmaRows] = {};
#pragma unroll
  for (int r = 0; r < kFmaRows; ++r) {
    if (of_queries) share_query(own_first + r * c.d, own_second + r * c.d, first_own + r, own_lse[r], own_delta[r]);
    else share_key(own_first + r * c.d, own_second + r * c.d, first_own + r);
  }
  A first_gradient[kFmaRows][kFmaChannels] = {}, second_gradient[kFmaRows][kFmaChannels] = {};
  for (int first = 0; first < c.tokens; first += kFmaStep) {
    if (first > 0) __syncthreads();
    for (int r = 0; r < kFmaRows; ++r) {
      const int at = warp * kFmaRows + r;
      A *const one = memory.other_first + at * memory.pitch, *const two = memory.other_second + at * memory.pitch;
      if (of_queries) {
        share_key(one, two, first + at);
      } else {
        A lse, delta;
        share_query(one, two, first + at, lse, delta);
        if (lane == 0) memory.lse[at] = lse, memory.delta[at] = delta;
      }
    }
    __syncthreads();
    A scores[kFmaRows], products[kFmaRows];
    fma_products(scores, own_first, memory.other_first + lane * memory.pitch, c.d);
    fma_products(products, own_second, memory.other_second + lane * memory.pitch, c.d);
#pragma unroll
    for (int r = 0; r < kFmaRows; ++r) {
      const int query = of_queries ? first_own + r : first + lane, key = of_queries ? first + lane : first_own + r;
      const bool counts = query < c.tokens && key < c.tokens && !(c.limited() && c.forbids(query, key));
      const A lse = of_queries ? own_lse[r] : memory.lse[lane], delta = of_queries ? own_delta[r] : memory.delta[lane];
      const A weight = counts ? natural_exp(scores[r] * c.scale - lse) : A(0);
      A kept = 1;
      if (c.dropout) kept = fma_keeps(c, source, head.sample, head.head, query, key) ? c.keep_scale : A(0);
      scores[r] = weight * (products[r] * kept - delta);
      products[r] = weight * kept;
    }
    fma_add_rows(first_gradient, scores, memory.other_first, memory.pitch, c.d);
    if (!of_queries) fma_add_rows(second_gradient, products, memory.other_second, memory.pitch, c.d);
  }

  const AttentionNorm norm = c.norm_of(of_queries);
  const int64_t offset = head.offset + (of_queries ? 0 : c.heads * c.d);
  const T* const inputs = static_cast<const T*>(c.qkv) + offset;
  T* const gradients = static_cast<T*>(c.dqkv) + offset;
  A weight_sums[kFmaChannels] = {}, bias_sums[kFmaChannels] = {};
#pragma unroll
  for (int r = 0; r < kFmaRows; ++r) {
    const int row = first_own + r;
    if (row >= c.tokens) continue;
    A x[kFmaChannels], plain = 0, projected = 0;
    fma_load(x, inputs + row * stride, true, c.d);
    FmaStatistics<A> s{0, 1};
    if (norm.there) s = fma_statistics(x, c.d, c.eps);
    A weighted[kFmaChannels];
#pragma unroll
    for (int i = 0; i < kFmaChannels; ++i) {
      const int channel = lane + i * kWarp;
      const A g = channel < c.d ? first_gradient[r][i] * c.scale : A(0);
      weighted[i] = g;
      if (!norm.there || channel >= c.d) continue;
      x[i] = (x[i] - s.mean) * s.rstd;
      weight_sums[i] += g * x[i], bias_sums[i] += g;
      weighted[i] = g * norm_parameter<T>(norm.weight, norm.wide_weight, channel, 1);
      plain += weighted[i], projected += weighted[i] * x[i];
    }
    if (norm.there) {
      plain = sum_lanes(plain, 1, kWarp) / c.d, projected = sum_lanes(projected, 1, kWarp) / c.d;
#pragma unroll
      for (int i = 0; i < kFmaChannels; ++i) weighted[i] = s.rstd * (weighted[i] - plain - x[i] * projected);
    }
#pragma unroll
    for (int i = 0; i < kFmaChannels; ++i) {
      const int channel = lane + i * kWarp;
      if (channel >= c.d) continue;
      gradients[row * stride + channel] = narrow<T>(weighted[i]);
      if (!of_queries) gradients[row * stride + c.heads * c.d + channel] = narrow<T>(second_gradient[r][i]);
    }
  }
  if (!norm.there) return;
#pragma unroll
  for (int i = 0; i < kFmaChannels; ++i) {
    const int channel = lane + i * kWarp;
    if (channel >= c.d) continue;
    memory.sums[warp * 2 * c.d + channel] = weight_sums[i];
    memory.sums[warp * 2 * c.d + c.d + channel] = bias_sums[i];
  }
  __syncthreads();
  A* const partial = c.partial + ((of_queries ? gridDim.x / 2 : 0) + block) * 2 * c.d;
  for (int i = threadIdx.x; i < 2 * c.d; i += blockDim.x) {
    A sum = 0;
    for (int w = 0; w < kFmaWarps; ++w) sum += memory.sums[w * 2 * c.d + i];
    partial[i] = sum;
  }
}

}  // namespace sdp
