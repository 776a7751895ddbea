// Small kernels that do what the emulator must notice, or must get right. usage: machine NAME [ORDER]; no name: the
// list.
#include "simt.h"
#include "common/block.cuh"

namespace {

__global__ void right(int* out) {  // each warp's sum, through shared memory, in another warp's hands
  SDP_DYNAMIC_SHARED(memory);
  int* sums = reinterpret_cast<int*>(memory);
  const int sum = sdp::sum_lanes(int(threadIdx.x), 1, sdp::kWarp);
  if (simt::lane() == 0) sums[threadIdx.x / 32] = sum;
  __syncthreads();
  out[threadIdx.x] = sums[(threadIdx.x / 32 + 1) % (blockDim.x / 32)];
}
__global__ void broadcast(int* out) { out[threadIdx.x] = __shfl_sync(sdp::kAllLanes, int(threadIdx.x), 7); }
__global__ void missing_barrier(int* out) {
  SDP_DYNAMIC_SHARED(memory);
  int* shared = reinterpret_cast<int*>(memory);
  shared[threadIdx.x] = threadIdx.x;
  out[threadIdx.x] = shared[blockDim.x - 1 - threadIdx.x];
}
__global__ void poison(int* out) {
  SDP_DYNAMIC_SHARED(memory);
  const float value = reinterpret_cast<float*>(memory)[threadIdx.x];
  out[threadIdx.x] = value != value;
}
__global__ void half_the_block(int*) {
  if (threadIdx.x < 32) __syncthreads();
}
__global__ void two_places(int*) {
  if (threadIdx.x < 32) __syncthreads();
  else
    __syncthreads();
}
__global__ void left_early(int*) {
  if (threadIdx.x == 5) return;
  __syncthreads();
}
__global__ void half_a_warp(int* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_xor_sync(sdp::kAllLanes, 1, 1);
}
__global__ void part_mask(int* out) { out[threadIdx.x] = __shfl_xor_sync(0xffffu, 1, 1); }
__global__ void shared_overflow(int*) {
  SDP_DYNAMIC_SHARED(memory);
  volatile int* shared = reinterpret_cast<int*>(memory);
  shared[blockDim.x] = 1;
}
__global__ void global_overflow(int* out) {
  volatile int* p = out;
  p[blockDim.x + threadIdx.x] = 1;
}
__global__ void signed_overflow(int* out) { out[threadIdx.x] = 0x7fffffff + int(threadIdx.x); }
__global__ void misaligned(int* out) {
  *reinterpret_cast<volatile int*>(reinterpret_cast<char*>(out) + 1) = 1;
}
__global__ void order(int* out) { out[out[blockDim.x]++] = threadIdx.x; }

struct Entry {
  const char* name;
  void (*kernel)(int*);
} const entries[] = {
#define ENTRY(name) {#name, &name}
    ENTRY(right), ENTRY(broadcast), ENTRY(missing_barrier), ENTRY(poison), ENTRY(half_the_block), ENTRY(two_places),
    ENTRY(left_early), ENTRY(half_a_warp), ENTRY(part_mask), ENTRY(shared_overflow), ENTRY(global_overflow),
    ENTRY(signed_overflow), ENTRY(misaligned), ENTRY(order)};

}  // namespace

int main(int count, char** words) {
  constexpr int threads = 64;
  for (const Entry& entry : entries) {
    if (count < 2) std::printf("%s\n", entry.name);
    else if (entry.name == std::string(words[1])) {
      simt::settings.order = count > 2 ? std::atoi(words[2]) : 0;
      const bool counts = entry.name == std::string("order");
      int* out = static_cast<int*>(std::malloc((threads + counts) * sizeof(int)));
      if (counts) out[threads] = 0;
      simt::launch(entry.kernel, 1, threads, threads * int64_t(sizeof(int)), out);
      for (int i = 0; i < threads; ++i) std::printf("%d ", out[i]);
      std::free(out);
    }
  }
}
