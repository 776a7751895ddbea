// One warpgroup and a few instructions at a time, for the test of what lies where and what must be waited for.
#include "library.h"
//
#include "simt_wgmma.h"
//
#include "common/wgmma.cuh"

namespace {

// d (128, 4 · Tiles) += a (128, 4 words) · b, `bytes` of shared memory with the descriptor given relative to it.
template <int Tiles, bool OverRows>
__global__ void product(const uint32_t* a, const uint8_t* b, int64_t bytes, uint64_t descriptor, float* d) {
  SDP_SWIZZLED_SHARED(memory);
  for (int64_t i = threadIdx.x; i < bytes; i += blockDim.x) memory[i] = b[i];
  sdp::async_proxy_fence();
  __syncthreads();
  uint32_t left[4];
  float sum[Tiles][4], fresh[Tiles][4];
  std::memcpy(left, a + 4 * threadIdx.x, sizeof left);
  std::memcpy(sum, d + 4 * Tiles * threadIdx.x, sizeof sum);
  sdp::wgmma_fence();
  sdp::wgmma<T, OverRows, true>(sum, left, descriptor);
  sdp::wgmma_commit();
  sdp::wgmma<T, OverRows, false>(fresh, left, descriptor);
  sdp::wgmma_commit();
  sdp::wgmma_wait<1>();
  sdp::wgmma_hold(sum);
  std::memcpy(d + 4 * Tiles * threadIdx.x, sum, sizeof sum);
  sdp::wgmma_wait<0>();
  sdp::wgmma_hold(fresh);
  std::memcpy(d + 4 * Tiles * (128 + threadIdx.x), fresh, sizeof fresh);
}

// The same with a mistake: what each of them must come to is said in test_simt_wgmma.py.
enum Mistake { none, no_proxy_fence, proxy_fence_first, no_fence, no_commit, no_wait, early, a_changes, d_changes,
               memory_changes, a_changed_behind_fence, d_changed_behind_fence, warps_differ, warp_leaves };
__global__ void mistaken(int mistake, const uint32_t* a, const uint8_t* b, int64_t bytes, uint64_t descriptor,
                         float* d) {
  SDP_SWIZZLED_SHARED(memory);
  if (mistake == proxy_fence_first) sdp::async_proxy_fence();
  for (int64_t i = threadIdx.x; i < bytes; i += blockDim.x) memory[i] = b[i];
  if (mistake != no_proxy_fence && mistake != proxy_fence_first) sdp::async_proxy_fence();
  __syncthreads();
  uint32_t left[4];
  float sum[4][4] = {};
  std::memcpy(left, a + 4 * threadIdx.x, sizeof left);
  if (mistake != no_fence) sdp::wgmma_fence();
  if (threadIdx.x < 96 || mistake != warp_leaves)
    sdp::wgmma<T, false, true>(sum, left, descriptor + (mistake == warps_differ && threadIdx.x >= 32 ? 2 : 0));
  if (mistake != no_commit) sdp::wgmma_commit();
  if (mistake == early) std::memcpy(d + 16 * threadIdx.x, sum, sizeof sum);
  if (mistake == a_changes) left[1] ^= 1;
  if (mistake == d_changes) sum[3][3] = 1;
  if (mistake == memory_changes && threadIdx.x == 0) memory[0] ^= 1;
  if (mistake != no_wait) sdp::wgmma_wait<0>();
  sdp::wgmma_hold(sum);
  if (mistake != early) std::memcpy(d + 16 * threadIdx.x, sum, sizeof sum);
  if (mistake == a_changed_behind_fence || mistake == d_changed_behind_fence) {
    sdp::wgmma_fence();
    if (mistake == a_changed_behind_fence) left[2] ^= 1;
    else sum[0][0] = 1;
    sdp::wgmma<T, false, true>(sum, left, descriptor);
    sdp::wgmma_commit();
    sdp::wgmma_wait<0>();
  }
}

template <bool OverRows>
void run(int tiles, const uint32_t* a, const uint8_t* b, int64_t bytes, uint64_t descriptor, float* d) {
  const sdp::LaunchGeometry g{1, 128, bytes};
  if (tiles == 4) Launcher{}(&product<4, OverRows>, g, a, b, bytes, descriptor, d);
  else if (tiles == 6) Launcher{}(&product<6, OverRows>, g, a, b, bytes, descriptor, d);
  else if (tiles == 8) Launcher{}(&product<8, OverRows>, g, a, b, bytes, descriptor, d);
  else Launcher{}(&product<12, OverRows>, g, a, b, bytes, descriptor, d);
}

__global__ void descriptors(uint32_t start, uint32_t leading, uint64_t* out) {
  SDP_SWIZZLED_SHARED(memory);
  if (threadIdx.x == 0) *out = sdp::panel_descriptor(memory + start, leading);
}

}  // namespace

extern "C" {

void run_wgmma(int tiles, int over_rows, const uint32_t* a, const uint8_t* b, int64_t bytes, uint64_t descriptor,
               float* d) {
  if (over_rows) run<true>(tiles, a, b, bytes, descriptor, d);
  else run<false>(tiles, a, b, bytes, descriptor, d);
}
void run_mistaken(int mistake, const uint32_t* a, const uint8_t* b, int64_t bytes, uint64_t descriptor, float* d) {
  Launcher{}(&mistaken, sdp::LaunchGeometry{1, 128, bytes}, mistake, a, b, bytes, descriptor, d);
}
unsigned place(uint64_t descriptor, int over_rows, unsigned k, unsigned n) {
  return simt::place_in_operand(descriptor, over_rows, k, n);
}
uint64_t panel_descriptor(unsigned start, unsigned leading, int64_t bytes) {
  uint64_t out = 0;
  Launcher{}(&descriptors, sdp::LaunchGeometry{1, 32, bytes}, start, leading, &out);
  return out;
}
}
