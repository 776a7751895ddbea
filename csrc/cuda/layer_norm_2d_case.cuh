// LayerNorm over channels: what a kernel is told, for every layout. No torch.
#pragma once
#include <initializer_list>

#include "common/block.cuh"
#include "common/pack.cuh"

namespace sdp {

// A tensor (B, C, H, W) by strides in elements; a token buffer (B, T, C) has H = 1, W = T. No data: the tensor is
// absent.
struct PictureView {
  void* data = nullptr;
  int64_t batch = 0, channel = 0, row = 0, column = 0;
  bool packed = false;  // rows only: a pack of channels is one aligned 16-byte access
};

struct PictureSizes {
  int64_t batch, channels, height, width;
};

// Strides of dimensions of size 1 mean nothing; they are set so that dimensions merge.
inline PictureView picture_view(const void* data, const PictureSizes& s, int64_t batch, int64_t channel, int64_t row,
                                int64_t column) {
  if (s.width == 1) column = row;
  if (s.height == 1) row = s.width * column;
  if (s.batch == 1) batch = s.height * s.width * column;
  if (s.channels == 1) channel = 1;
  return {const_cast<void*>(data), batch, channel, row, column, false};
}

template <class A>
struct LayerNormCase {
  int channels;
  int64_t rows, pixels, width;  // pixels of all samples, of a sample, of a picture's row: merged where strides allow
  int64_t registers;            // the first pixels of a sample that are none
  A eps;
  PictureView x, residual, y, sum;    // forward: residual and sum may be absent
  PictureView grad, grad_sum, dx;     // backward (x too): grad_sum may be absent
  const void *weight, *bias;          // (C,) of the accumulator's type if `wide_...`, else of x's
  bool wide_weight, wide_bias;
  A *mean, *rstd;                     // (rows,)
  A* partial;                         // backward: (blocks, 2, C) sums for dweight and dbias

  // The tensors that are there, forward's and backward's alike.
  template <class Body>
  void each_view(const Body& body) {
    for (PictureView* v : {&x, &residual, &y, &sum, &grad, &grad_sum, &dx})
      if (v->data != nullptr) body(*v);
  }
};

template <class A>
LayerNormCase<A> layer_norm_case(const PictureSizes& s, int64_t registers, double eps) {
  LayerNormCase<A> c{};
  c.channels = static_cast<int>(s.channels);
  c.width = s.width, c.pixels = s.height * s.width, c.rows = s.batch * c.pixels;
  c.registers = registers, c.eps = static_cast<A>(eps);
  return c;
}

// Forgets the picture's rows, and the samples, where every tensor steps evenly over them: saves divisions.
template <class A>
void merge_pixels(LayerNormCase<A>& c) {
  bool even = true, level = c.registers == 0;
  c.each_view([&](const PictureView& v) { even = even && v.row == c.width * v.column; });
  if (even) c.width = c.pixels;
  c.each_view([&](const PictureView& v) { level = level && v.batch == c.pixels * v.column; });
  if (even && level) c.pixels = c.width = c.rows;
}

inline bool aligned_to(const void* p, int64_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

// Where a pixel, counted over all samples, lies.
struct PixelPlace {
  int64_t sample, row, column;
  bool is_register;
};

template <class A>
__device__ __forceinline__ PixelPlace place_of(const LayerNormCase<A>& c, int64_t pixel) {
  PixelPlace p{0, 0, pixel, false};
  if (c.pixels != c.rows) {
    p.sample = pixel / c.pixels;
    p.column = pixel - p.sample * c.pixels;
  }
  p.is_register = p.column < c.registers;
  if (c.width != c.pixels) {
    p.row = p.column / c.width;
    p.column -= p.row * c.width;
  }
  return p;
}
__device__ __forceinline__ int64_t offset_of(const PictureView& v, const PixelPlace& p) {
  return p.sample * v.batch + p.row * v.row + p.column * v.column;
}

// weight or bias at one channel.
template <class T>
__device__ __forceinline__ Accumulator<T> parameter_at(const void* p, bool wide, int channel) {
  return wide ? static_cast<const Accumulator<T>*>(p)[channel] : widen(static_cast<const T*>(p)[channel]);
}

template <class T>
__device__ __forceinline__ Pack<T> add_packs(const Pack<T>& a, const Pack<T>& b) {
  Pack<T> sum;
#pragma unroll
  for (int i = 0; i < Pack<T>::size; ++i) sum.items[i] = narrow<T>(widen(a.items[i]) + widen(b.items[i]));
  return sum;
}
template <class T>
__device__ __forceinline__ Pack<T> zero_pack() {
  Pack<T> zero;
#pragma unroll
  for (int i = 0; i < Pack<T>::size; ++i) zero.items[i] = narrow<T>(0);
  return zero;
}

// The backward kernels' blocks go on from tile to tile, so that each leaves one row of partial sums. There are as many
// as the multiprocessors hold at a time, `resident` each.
inline int64_t backward_blocks(int64_t tiles, int resident, const DeviceLimits& device) {
  return tiles < device.multiprocessors * resident ? tiles : device.multiprocessors * resident;
}

// Second stage of the weight gradients: adds the blocks' partial sums, in an order that depends on their number alone.
constexpr int kSumStrips = 32;

inline LaunchGeometry layer_norm_sums_geometry(int64_t channels, int64_t accumulator_bytes) {
  return {ceil_div(2 * channels, kWarp), kSumStrips * kWarp, kSumStrips * kWarp * accumulator_bytes};
}

template <class A, class W>
__global__ void __launch_bounds__(kSumStrips* kWarp)
    layer_norm_sums(const A* __restrict__ partial, int64_t blocks, int64_t channels, W* __restrict__ dweight,
                    W* __restrict__ dbias) {
  SDP_DYNAMIC_SHARED(shared);
  A* sums = reinterpret_cast<A*>(shared);
  const int lane = threadIdx.x % kWarp, strip = threadIdx.x / kWarp;
  const int64_t column = int64_t(blockIdx.x) * kWarp + lane;
  A sum = 0;
  if (column < 2 * channels) {
#pragma unroll 8
    for (int64_t block = strip; block < blocks; block += kSumStrips) sum += partial[block * 2 * channels + column];
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (strip != 0 || column >= 2 * channels) return;
#pragma unroll
  for (int i = 1; i < kSumStrips; ++i) sum += sums[i * kWarp + lane];
  if (column < channels) dweight[column] = narrow<W>(sum);
  else dbias[column - channels] = narrow<W>(sum);
}

}  // namespace sdp
