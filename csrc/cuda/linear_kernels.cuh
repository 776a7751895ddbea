// The passes around `linear`'s GEMM, and the second stage of their sums.
//
// A thread owns the columns of one 16-byte access of z, whether memory allows such accesses (Packed) or not, so that
// results don't depend on strides. Kind is the activation, or kAnyActivation.
#pragma once
#include "cuda/linear_case.cuh"

namespace sdp {

constexpr int kEpilogueThreads = 256;
constexpr int kEpilogueWarps = kEpilogueThreads / kWarp;

// Rows that a thread reads before it computes, and blocks that share a multiprocessor's registers: together they keep
// enough bytes on their way. The switch over all activations is for those that hardly any model uses.
constexpr int epilogue_depth(int kind) { return kind == kAnyActivation ? 1 : 2; }
template <class T, class R>
constexpr int backward_resident = sizeof(R) > sizeof(T) ? 2 : 3;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000  // computes in pairs, which takes more registers
template <class T, class R>
constexpr int forward_bound = sizeof(R) > sizeof(T) ? 2 : 3;
template <class T, class R>
constexpr int backward_bound = sizeof(T) == 2 ? 2 : 3;
#else
template <class T, class R>
constexpr int forward_bound = sizeof(R) > sizeof(T) ? 3 : 4;
template <class T, class R>
constexpr int backward_bound = backward_resident<T, R>;
#endif

// One row's share of forward.
template <class T, class R, int Kind, bool Packed>
__device__ __forceinline__ void forward_row(const EpilogueCase<Accumulator<T>>& c, const EpiloguePlace& here,
                                            int64_t row, float keep, Columns<T, kPackSize<T>>& z,
                                            Columns<R, kPackSize<T>>& residual) {
  using A = Accumulator<T>;
  constexpr int size = kPackSize<T>;
  A values[size] = {};
  residual.forget();
  if (keep != 0) {
    z.forget();
    with_activation<Kind>(c.activation, [&](auto activation) {
#pragma unroll
      for (int j = 0; j < size; ++j) values[j] = activated<A>(widen(z[j]), activation).value * A(keep);
    });
    if (c.rng != nullptr) {
      const uint32_t bits = kept_columns<size>(c, row_of(c, row), here.at);
#pragma unroll
      for (int j = 0; j < size; ++j) values[j] *= bits >> j & 1 ? A(c.kept) : A(0);
    }
    if (c.scale != nullptr) {  // from the cache for every row: registers are dearer
      A scale[size];
      load_scale<Packed, T>(scale, c, here.at);
#pragma unroll
      for (int j = 0; j < size; ++j) values[j] *= scale[j];
    }
  }
  Columns<R, size> y;
#pragma unroll
  for (int j = 0; j < size; ++j)
    y[j] = narrow<R>(c.residual.data == nullptr ? values[j] : values[j] + widen(residual[j]));
  store_columns<Packed>(static_cast<R*>(c.out) + row * c.columns, here.at, c.columns, y);
}

// y = residual + mask · γ · drop(act(z)); register rows are the residual's, or 0.
template <class T, class R, int Kind, bool Packed>
__global__ void __launch_bounds__(kEpilogueThreads, (forward_bound<T, R>))
    linear_epilogue_rows_fwd(const EpilogueCase<Accumulator<T>> c) {
  constexpr int size = kPackSize<T>, depth = epilogue_depth(Kind);
  const EpiloguePlace here = place_of<T>(c);
  if (here.at >= c.columns) return;
  const int64_t last = (chunk_of(c) + 1) * c.block_rows, end = last < c.rows ? last : c.rows;
  RowPlace row = row_of(c, chunk_of(c) * c.block_rows + here.line);
  while (row.row < end) {
    const int64_t first = row.row;
    Columns<T, size> zs[depth];
    Columns<R, size> residuals[depth];
    float keeps[depth];
#pragma unroll
    for (int i = 0; i < depth; ++i) {
      keeps[i] = row.row < end ? keep_of(c, row) : 0;
      if (keeps[i] != 0) zs[i] = load_columns<Packed, size, T>(c.z, row, here.at, c.columns);
      if (row.row < end && c.residual.data != nullptr)
        residuals[i] = load_columns<Packed, size, R>(c.residual, row, here.at, c.columns);
      advance(c, row, here.lines);
    }
#pragma unroll
    for (int i = 0; i < depth; ++i)
      if (first + i * here.lines < end)
        forward_row<T, R, Kind, Packed>(c, here, first + i * here.lines, keeps[i], zs[i], residuals[i]);
  }
}

// One row's share of backward, with dγ's and dbias's terms added to the thread's sums.
template <class T, class R, int Kind, bool Packed>
__device__ __forceinline__ void backward_row(const EpilogueCase<Accumulator<T>>& c, const EpiloguePlace& here,
                                             int64_t row, float keep, Columns<T, kPackSize<T>>& z,
                                             Columns<R, kPackSize<T>>& grad,
                                             const Accumulator<T> (&scale)[kPackSize<T>],
                                             Accumulator<T> (&scale_sum)[kPackSize<T>],
                                             Accumulator<T> (&bias_sum)[kPackSize<T>]) {
  using A = Accumulator<T>;
  constexpr int size = kPackSize<T>;
  Columns<T, size> dz;
#pragma unroll
  for (int j = 0; j < size; ++j) dz[j] = narrow<T>(0);
  if (keep != 0) {
    A values[size];
    z.forget(), grad.forget();
#pragma unroll
    for (int j = 0; j < size; ++j) values[j] = widen(grad[j]) * A(keep);
    if (c.rng != nullptr) {
      const uint32_t bits = kept_columns<size>(c, row_of(c, row), here.at);
#pragma unroll
      for (int j = 0; j < size; ++j) values[j] *= bits >> j & 1 ? A(c.kept) : A(0);
    }
    with_activation<Kind>(c.activation, [&](auto activation) {
      if (c.z.data == nullptr) return;
#pragma unroll
      for (int j = 0; j < size; ++j) {
        const Activated<A> a = activated<A>(widen(z[j]), activation);
        if (c.scale != nullptr) {
          scale_sum[j] += values[j] * a.value;
          values[j] *= scale[j];
        }
        values[j] *= a.slope;
      }
    });
#pragma unroll
    for (int j = 0; j < size; ++j) {
      bias_sum[j] += values[j];
      dz[j] = narrow<T>(values[j]);
    }
  }
  store_columns<Packed>(static_cast<T*>(c.out) + row * c.columns, here.at, c.columns, dz);
}

// dz = mask · γ · drop · dy · act′(z), and the block's sums: mask · drop · dy · act(z) for dγ, dz before rounding for
// dbias. Register rows of dz are 0.
template <class T, class R, int Kind, bool Packed>
__global__ void __launch_bounds__(kEpilogueThreads, (backward_bound<T, R>))
    linear_epilogue_rows_bwd(const EpilogueCase<Accumulator<T>> c) {
  using A = Accumulator<T>;
  constexpr int size = kPackSize<T>, depth = epilogue_depth(Kind);
  SDP_DYNAMIC_SHARED(shared);
  A* slots = reinterpret_cast<A*>(shared);  // (dγ and dbias, or dbias; warps, size, lanes)
  const EpiloguePlace here = place_of<T>(c);
  A scale[size] = {}, scale_sum[size] = {}, bias_sum[size] = {};
  if (here.at < c.columns) {
    if (c.scale != nullptr) load_scale<Packed, T>(scale, c, here.at);
    const int64_t last = (chunk_of(c) + 1) * c.block_rows, end = last < c.rows ? last : c.rows;
    RowPlace row = row_of(c, chunk_of(c) * c.block_rows + here.line);
    while (row.row < end) {
      const int64_t first = row.row;
      Columns<T, size> zs[depth];
      Columns<R, size> grads[depth];
      float keeps[depth];
#pragma unroll
      for (int i = 0; i < depth; ++i) {
        keeps[i] = row.row < end ? keep_of(c, row) : 0;
        if (keeps[i] != 0) {
          grads[i] = load_columns<Packed, size, R>(c.grad, row, here.at, c.columns);
          if (c.z.data != nullptr) zs[i] = load_columns<Packed, size, T>(c.z, row, here.at, c.columns);
        }
        advance(c, row, here.lines);
      }
#pragma unroll
      for (int i = 0; i < depth; ++i)
        if (first + i * here.lines < end)
          backward_row<T, R, Kind, Packed>(c, here, first + i * here.lines, keeps[i], zs[i], grads[i], scale, scale_sum,
                                           bias_sum);
    }
  }
  const int sums = c.scale == nullptr ? 1 : 2, in_warp = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  for (int k = 0; k < sums; ++k) {
#pragma unroll
    for (int j = 0; j < size; ++j) {
      const A sum = sum_lanes(k == sums - 1 ? bias_sum[j] : scale_sum[j], c.lanes, kWarp);
      if (in_warp < c.lanes) slots[((k * kEpilogueWarps + warp) * size + j) * c.lanes + here.lane] = sum;
    }
  }
  __syncthreads();
  const int owned = size * c.lanes;
  const int first = here.at - here.lane * size;  // the strip's first column
  for (int i = threadIdx.x; i < sums * owned; i += kEpilogueThreads) {
    const int k = i / owned, column = i % owned;
    if (first + column >= c.columns) continue;
    A sum = 0;
#pragma unroll
    for (int w = 0; w < kEpilogueWarps; ++w)
      sum += slots[((k * kEpilogueWarps + w) * size + column % size) * c.lanes + column / size];
    c.partial[(chunk_of(c) * sums + k) * c.columns + first + column] = sum;
  }
}

// Adds the blocks' partial sums (chunks, sums, N), in an order that depends on their number alone. dγ comes first.
constexpr int kEpilogueStrips = 16;

template <class A>
__global__ void __launch_bounds__(kEpilogueStrips* kWarp)
    linear_epilogue_sums(const A* __restrict__ partial, int64_t chunks, int64_t columns, int sums,
                         A* __restrict__ dscale, A* __restrict__ dbias) {
  SDP_DYNAMIC_SHARED(shared);
  A* slots = reinterpret_cast<A*>(shared);
  const int lane = threadIdx.x % kWarp, strip = threadIdx.x / kWarp;
  const int64_t column = int64_t(blockIdx.x) * kWarp + lane;
  A sum = 0;
  if (column < sums * columns) {
#pragma unroll 8
    for (int64_t chunk = strip; chunk < chunks; chunk += kEpilogueStrips)
      sum += partial[chunk * sums * columns + column];
  }
  slots[threadIdx.x] = sum;
  __syncthreads();
  if (strip != 0 || column >= sums * columns) return;
#pragma unroll
  for (int i = 1; i < kEpilogueStrips; ++i) sum += slots[i * kWarp + lane];
  const int64_t before_bias = (sums - 1) * columns;
  if (column < before_bias) dscale[column] = sum;
  else dbias[column - before_bias] = sum;
}

}  // namespace sdp
