// One warp and one instruction at a time, for the test of what lane holds what. Registers: (32, count) words.
#include "library.h"
//
#include "simt_mma.h"
//
#include "common/mma.cuh"

namespace {

template <class E>
__global__ void product(const uint32_t* a, const uint32_t* b, float* d) {
  uint32_t left[4], right[2];
  float sum[4];
  std::memcpy(left, a + 4 * threadIdx.x, sizeof left);
  std::memcpy(right, b + 2 * threadIdx.x, sizeof right);
  std::memcpy(sum, d + 4 * threadIdx.x, sizeof sum);
  sdp::mma_m16n8k16<E>(sum, left, right);
  std::memcpy(d + 4 * threadIdx.x, sum, sizeof sum);
}

// from: 32 rows of 8 elements, in shared memory 48 bytes apart.
template <int N, bool Transposed, bool Barrier>
__global__ void matrices(const uint16_t* from, uint32_t* out) {
  SDP_DYNAMIC_SHARED(memory);
  uint16_t* rows = reinterpret_cast<uint16_t*>(memory);
  const int other = 31 - threadIdx.x;  // a row that another lane will ask for
  for (int i = 0; i < 8; ++i) rows[24 * other + i] = from[8 * other + i];
  if (Barrier) __syncwarp();
  uint32_t r[N];
  sdp::ldmatrix<N, Transposed>(r, rows + (threadIdx.x < 8 * N ? 24 * threadIdx.x : 1));
  for (int i = 0; i < 8; ++i) rows[24 * threadIdx.x + i] = 0;  // whoever comes later has read already
  std::memcpy(out + N * threadIdx.x, r, sizeof r);
}

__global__ void transposition(const uint32_t* from, uint32_t* out) {
  out[threadIdx.x] = sdp::movmatrix_transposed(from[threadIdx.x]);
}

// Two groups of copies, the second one with zeros in every other place; what is there before and after each wait.
template <int Bytes>
__global__ void copies(const uint8_t* from, uint8_t* out) {
  SDP_DYNAMIC_SHARED(memory);
  uint8_t *first = memory + Bytes * threadIdx.x, *second = first + Bytes * blockDim.x;
  sdp::copy_async<Bytes>(first, from + Bytes * threadIdx.x);
  sdp::copy_async_commit();
  sdp::copy_async<Bytes>(second, from + Bytes * threadIdx.x, threadIdx.x % 2 == 0);
  sdp::copy_async_commit();
  uint8_t* mine = out + 6 * Bytes * threadIdx.x;
  auto note = [&](int time) {
    std::memcpy(mine + 2 * time * Bytes, first, Bytes);
    std::memcpy(mine + (2 * time + 1) * Bytes, second, Bytes);
  };
  note(0);
  sdp::copy_async_wait<1>();
  note(1);
  sdp::copy_async_wait<0>();
  note(2);
}

__global__ void pairs(const float* x, uint32_t* packed, float* unpacked, float* powers) {
  const int i = threadIdx.x;
  packed[i] = sdp::pack_pair<T>(x[2 * i], x[2 * i + 1]);
  unpacked[2 * i] = sdp::low_of<T>(packed[i]), unpacked[2 * i + 1] = sdp::high_of<T>(packed[i]);
  powers[2 * i] = sdp::fast_exp2(x[2 * i]), powers[2 * i + 1] = sdp::fast_exp2(x[2 * i + 1]);
}

template <int N>
void load(int transposed, int barrier, const uint16_t* from, uint32_t* out) {
  const sdp::LaunchGeometry g{1, 32, 32 * 48};
  if (!barrier) Launcher{}(&matrices<N, false, false>, g, from, out);
  else if (transposed) Launcher{}(&matrices<N, true, true>, g, from, out);
  else Launcher{}(&matrices<N, false, true>, g, from, out);
}

}  // namespace

extern "C" {

void run_mma(const uint32_t* a, const uint32_t* b, float* d) {
  Launcher{}(&product<T>, sdp::LaunchGeometry{1, 32, 0}, a, b, d);
}
void run_ldmatrix(int count, int transposed, int barrier, const uint16_t* from, uint32_t* out) {
  if (count == 1) load<1>(transposed, barrier, from, out);
  else if (count == 2) load<2>(transposed, barrier, from, out);
  else load<4>(transposed, barrier, from, out);
}
void run_movmatrix(const uint32_t* from, uint32_t* out) {
  Launcher{}(&transposition, sdp::LaunchGeometry{1, 32, 0}, from, out);
}
void run_copies(int bytes, const uint8_t* from, uint8_t* out) {
  const sdp::LaunchGeometry g{1, 32, 64 * bytes};
  if (bytes == 4) Launcher{}(&copies<4>, g, from, out);
  else if (bytes == 8) Launcher{}(&copies<8>, g, from, out);
  else Launcher{}(&copies<16>, g, from, out);
}
void run_pairs(const float* x, uint32_t* packed, float* unpacked, float* powers) {
  Launcher{}(&pairs, sdp::LaunchGeometry{1, 32, 0}, x, packed, unpacked, powers);
}
}
