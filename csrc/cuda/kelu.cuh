// KeLü forward and backward: the kernels and their launch geometry. No torch and no <<<>>> here.
#pragma once
#include <cstdint>

#include "common/kelu.h"
#include "common/pack.cuh"

namespace sdp {

constexpr int kKeluThreads = 256;
constexpr int kKeluPacksPerThread = 4;  // independent 16-byte loads in flight per tensor
constexpr int kKeluMaxDims = 8;         // after merging dimensions

struct KeluGeometry {
  int64_t blocks;
  int threads;
};

// One block per kKeluThreads · kKeluPacksPerThread packs; the elements left over after the packs go to the last block.
template <class T>
inline KeluGeometry kelu_dense_geometry(int64_t elements) {
  const int64_t per_block = int64_t(kKeluThreads) * kKeluPacksPerThread * Pack<T>::size;
  return {(elements + per_block - 1) / per_block, kKeluThreads};
}
inline KeluGeometry kelu_strided_geometry(int64_t elements) {
  return {(elements + kKeluThreads - 1) / kKeluThreads, kKeluThreads};
}

template <class T, bool Backward>
__device__ __forceinline__ T kelu_element(T grad, T x) {
  using A = Accumulator<T>;
  if (Backward) return narrow<T>(widen(grad) * kelu_slope<A>(widen(x)));
  return narrow<T>(kelu_value<A>(widen(x)));
}

// All tensors dense in one order, 16-byte aligned. grad is null in forward.
template <class T, bool Backward>
__global__ void __launch_bounds__(kKeluThreads) kelu_dense(const T* __restrict__ grad, const T* __restrict__ x,
                                                           T* __restrict__ y, int64_t elements) {
  constexpr int size = Pack<T>::size;
  const int64_t packs = elements / size;
  const int64_t first = int64_t(blockIdx.x) * kKeluThreads * kKeluPacksPerThread + threadIdx.x;
  Pack<T> xs[kKeluPacksPerThread], grads[kKeluPacksPerThread];
#pragma unroll
  for (int i = 0; i < kKeluPacksPerThread; ++i) {
    const int64_t at = first + int64_t(i) * kKeluThreads;
    if (at < packs) {
      xs[i] = reinterpret_cast<const Pack<T>*>(x)[at];
      if (Backward) grads[i] = reinterpret_cast<const Pack<T>*>(grad)[at];
    }
  }
#pragma unroll
  for (int i = 0; i < kKeluPacksPerThread; ++i) {
    const int64_t at = first + int64_t(i) * kKeluThreads;
    if (at < packs) {
#pragma unroll
      for (int j = 0; j < size; ++j)
        xs[i].items[j] = kelu_element<T, Backward>(Backward ? grads[i].items[j] : xs[i].items[j], xs[i].items[j]);
      reinterpret_cast<Pack<T>*>(y)[at] = xs[i];
    }
  }
  const int64_t tail = packs * size + threadIdx.x;
  if (blockIdx.x == gridDim.x - 1 && tail < elements)
    y[tail] = kelu_element<T, Backward>(Backward ? grad[tail] : x[tail], x[tail]);
}

// Any strides: y, x, grad by strides over the same merged sizes, the last dimension fastest.
struct KeluStrides {
  int dims;
  int64_t size[kKeluMaxDims], y[kKeluMaxDims], x[kKeluMaxDims], grad[kKeluMaxDims];
};

template <class T, bool Backward>
__global__ void __launch_bounds__(kKeluThreads)
    kelu_strided(const T* __restrict__ grad, const T* __restrict__ x, T* __restrict__ y, int64_t elements,
                 KeluStrides strides) {
  int64_t rest = int64_t(blockIdx.x) * kKeluThreads + threadIdx.x;
  if (rest >= elements) return;
  int64_t y_at = 0, x_at = 0, grad_at = 0;
  for (int d = strides.dims - 1; d >= 0; --d) {
    const int64_t index = rest % strides.size[d];
    rest /= strides.size[d];
    y_at += index * strides.y[d];
    x_at += index * strides.x[d];
    grad_at += index * strides.grad[d];
  }
  y[y_at] = kelu_element<T, Backward>(Backward ? grad[grad_at] : x[x_at], x[x_at]);
}

}  // namespace sdp
