// Packs of neighbouring elements that move as one load or store, and the arithmetic type they widen to. No torch.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>

namespace sdp {

template <class T>
struct AccumulatorOf { using type = float; };
template <>
struct AccumulatorOf<double> { using type = double; };
template <class T>
using Accumulator = typename AccumulatorOf<T>::type;

template <class T>
__host__ __device__ __forceinline__ Accumulator<T> widen(T x) { return static_cast<Accumulator<T>>(x); }
__host__ __device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__host__ __device__ __forceinline__ float widen(__half x) { return __half2float(x); }

template <class T>
__host__ __device__ __forceinline__ T narrow(Accumulator<T> x) { return static_cast<T>(x); }
template <>
__host__ __device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }
template <>
__host__ __device__ __forceinline__ __half narrow<__half>(float x) { return __float2half_rn(x); }

template <class T>
constexpr int kPackSize = 16 / int(sizeof(T));

// By default 16 bytes: one LDG.128 / STG.128 when the address is aligned to it.
template <class T, int N = kPackSize<T>>
struct alignas(N * sizeof(T)) Pack {
  static constexpr int size = N;
  T items[N];
};

template <class T, int N = kPackSize<T>>
__device__ __forceinline__ Pack<T, N> load_pack(const T* p) {
  return *reinterpret_cast<const Pack<T, N>*>(p);
}
template <class T, int N>
__device__ __forceinline__ void store_pack(T* p, const Pack<T, N>& pack) {
  *reinterpret_cast<Pack<T, N>*>(p) = pack;
}

// Makes the compiler forget what it has derived from a pack, so that the pack stays in registers instead of that.
template <class T>
__device__ __forceinline__ void forget_derived(Pack<T>& pack) {
#ifdef __CUDA_ARCH__
  uint4 words;
  memcpy(&words, &pack, 16);
  asm volatile("" : "+r"(words.x), "+r"(words.y), "+r"(words.z), "+r"(words.w));
  memcpy(&pack, &words, 16);
#endif
}

}  // namespace sdp
