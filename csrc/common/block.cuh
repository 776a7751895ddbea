// What kernels share within a block: dynamic shared memory by name and sums over lanes. No torch.
//
// All shared memory is dynamic, its size a host function's result, so that the emulator can poison it and watch its
// end.
#pragma once
#include <cstdint>

#ifndef SDP_DYNAMIC_SHARED  // the emulator brings its own
#define SDP_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

namespace sdp {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// How a kernel is launched: one-dimensional grid and blocks, bytes of dynamic shared memory.
struct LaunchGeometry {
  int64_t blocks;
  int threads;
  int64_t shared;
};

// Shared memory of the device in bytes: at most for one block, and of a whole multiprocessor. Of multiprocessors every
// device counts as an H200: how sums are split over blocks must depend on shapes alone.
struct DeviceLimits {
  int64_t block_shared, multiprocessor_shared;
  int64_t multiprocessors = 132;
};
constexpr int64_t kReservedShared = 1024;  // the runtime's own, for every resident block

// Sum over the lanes whose numbers differ in the bits from `first` up to, not including, `end` (powers of two): the
// same bits in every lane, since addition commutes.
template <class A>
__device__ __forceinline__ A sum_lanes(A value, int first, int end) {
  for (int bit = first; bit < end; bit *= 2) value += __shfl_xor_sync(kAllLanes, value, bit);
  return value;
}

__device__ __forceinline__ float reciprocal_root(float x) { return rsqrtf(x); }
__device__ __forceinline__ double reciprocal_root(double x) { return 1 / sqrt(x); }

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace sdp
