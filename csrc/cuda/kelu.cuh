// KeLü forward and backward: the kernels, and which one is launched how. No torch and no <<<>>> here.
//
// Bytes per element of s bytes: forward 2s, backward 3s, which is the floor.
#pragma once
#include "common/block.cuh"
#include "common/kelu.h"
#include "common/pack.cuh"

namespace sdp {

constexpr int kKeluThreads = 256;
constexpr int kKeluPacksPerThread = 4;  // independent 16-byte loads in flight per tensor
constexpr int kKeluMaxDims = 8;         // after merging dimensions

// One block per kKeluThreads · kKeluPacksPerThread packs; the elements left over after the packs go to the last block.
template <class T>
inline LaunchGeometry kelu_dense_geometry(int64_t elements) {
  return {ceil_div(elements, int64_t(kKeluThreads) * kKeluPacksPerThread * kPackSize<T>), kKeluThreads, 0};
}
inline LaunchGeometry kelu_strided_geometry(int64_t elements) {
  return {ceil_div(elements, kKeluThreads), kKeluThreads, 0};
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
      xs[i] = load_pack(x + at * size);
      if (Backward) grads[i] = load_pack(grad + at * size);
    }
  }
#pragma unroll
  for (int i = 0; i < kKeluPacksPerThread; ++i) {
    const int64_t at = first + int64_t(i) * kKeluThreads;
    if (at < packs) {
#pragma unroll
      for (int j = 0; j < size; ++j)
        xs[i].items[j] = kelu_element<T, Backward>(Backward ? grads[i].items[j] : xs[i].items[j], xs[i].items[j]);
      store_pack(y + at * size, xs[i]);
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

// `strides` holds dimensions merged as far as they go; none or one of steps 1 is dense. grad is null in forward.
template <class T, bool Backward, class Launch>
void kelu_launch(const T* grad, const T* x, T* y, int64_t elements, const KeluStrides& strides, const Launch& launch) {
  bool dense = strides.dims <= 1;
  for (const void* p : {static_cast<const void*>(grad), static_cast<const void*>(x), static_cast<const void*>(y)})
    dense = dense && reinterpret_cast<uintptr_t>(p) % 16 == 0;
  if (strides.dims == 1) dense = dense && strides.y[0] == 1 && strides.x[0] == 1 && (!Backward || strides.grad[0] == 1);
  if (dense) return launch(&kelu_dense<T, Backward>, kelu_dense_geometry<T>(elements), grad, x, y, elements);
  launch(&kelu_strided<T, Backward>, kelu_strided_geometry(elements), grad, x, y, elements, strides);
}

}  // namespace sdp
