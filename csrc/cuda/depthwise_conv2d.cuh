// Depthwise convolution, forward and backward: which kernel runs, with what geometry. No torch and no <<<>>> here:
// `launch(kernel, geometry, arguments...)` is the caller's, so that the emulator runs what a GPU would.
//
// Bytes per element of s bytes: forward 2s, backward 3s (x and dy are read once, for dx and the weights' gradient), and
// the rows that neighbouring tiles of a large image both need. Geometry follows from the shape alone, not from the device.
#pragma once
#include "cuda/depthwise_conv2d_fma.cuh"

namespace sdp {

enum class DepthwiseKernel : int { kFma, kMma };

struct DepthwisePlan {
  DepthwiseKernel kernel;
  DepthwiseTile tile;
  LaunchGeometry geometry;
};

constexpr int64_t kFmaShared = 79 * 1024;  // of a block, at most: two on a multiprocessor of 164 KB
constexpr int kDepthwiseMaxColumns = 64;   // of a tile

// A tile of `rows` rows and `images` images; its planes for T, with `out` planes of their own or written back in place.
template <class T>
void shape_planes(DepthwiseTile& t, int kernel, int height, int width, bool own_out, int image_padding) {
  const int border = kernel / 2;
  t.blocks = t.columns / kDepthwiseColumns;
  DepthwiseWindow &in = t.in, &out = t.out;
  in.row_pitch = t.columns + 2 * kDepthwiseMargin;
  in.image_pitch = (t.rows + 2 * border) * in.row_pitch + image_padding;
  in.plane_pitch = odd_pitch<T>(t.images * in.image_pitch);
  const bool whole_rows = t.column_tiles == 1, whole_columns = t.row_tiles == 1;
  // Where the tile is the image, its surroundings are zeros for good and only the image is moved.
  in.row = whole_columns ? 0 : -border, in.rows = whole_columns ? height : t.rows + 2 * border;
  in.column = whole_rows ? 0 : -kDepthwiseMargin;
  in.columns = whole_rows ? static_cast<int>(ceil_div(width, 4)) * 4 : t.columns + 2 * kDepthwiseMargin;
  in.at = (whole_columns ? border * in.row_pitch : 0) + (whole_rows ? kDepthwiseMargin : 0);
  out.row = out.column = 0, out.rows = whole_columns ? height : t.rows;
  out.columns = whole_rows ? in.columns : t.columns;
  out.at = own_out ? 0 : kDepthwiseMargin;
  out.row_pitch = own_out ? t.columns : in.row_pitch;
  out.image_pitch = own_out ? t.rows * out.row_pitch : in.image_pitch;
  out.plane_pitch = own_out ? odd_pitch<T>(t.images * out.image_pitch) : in.plane_pitch;
  t.plane_elements = plane_elements<T>(t.channels, in.plane_pitch);
}

// The tile's rows and columns: as few tiles as `fits(tile)` allows, all about the same.
template <class Fits>
void shape_tile(DepthwiseTile& t, int strip, int height, int width, const Fits& fits) {
  t.images = 1;
  t.column_tiles = static_cast<int>(ceil_div(width, kDepthwiseMaxColumns));
  t.columns = static_cast<int>(ceil_div(ceil_div(width, t.column_tiles), kDepthwiseColumns)) * kDepthwiseColumns;
  for (t.row_tiles = 1;; ++t.row_tiles) {
    t.rows = static_cast<int>(ceil_div(ceil_div(height, t.row_tiles), strip)) * strip;
    if (t.rows == strip || fits(t)) break;
  }
  t.row_tiles = static_cast<int>(ceil_div(height, t.rows));
  t.strips = t.rows / strip;
}

// In how many parts blocks take the tiles of a group of channels, `slots` blocks running at a time: as few rounds of as
// few tiles as can be, a block's beginning and end counting as half a tile.
inline int64_t depthwise_splits(int64_t items, int64_t groups, int64_t slots) {
  int64_t best = 0, best_time = 0;
  for (int64_t rounds = 1; rounds <= 3; ++rounds) {
    int64_t splits = rounds * slots / groups;
    splits = splits < 1 ? 1 : splits > items ? items : splits;
    const int64_t time = ceil_div(groups * splits, slots) * (2 * ceil_div(items, splits) + 1);
    if (best == 0 || time < best_time) best = splits, best_time = time;
  }
  return ceil_div(items, ceil_div(items, best));
}

// Blocks and dividers, once the tile stands.
template <class T>
void share_items(DepthwiseTile& t, int64_t batch, int channels, int height, int width, int64_t slots) {
  t.groups = static_cast<int>(ceil_div(channels, t.channels));
  t.items = ceil_div(batch, t.images) * t.row_tiles * t.column_tiles;
  t.splits = t.items == 0 ? 0 : static_cast<int>(depthwise_splits(t.items, t.groups, slots));
  t.by_images = divider(t.images), t.by_width = divider(width), t.by_height = divider(height);
  t.by_strips = divider(t.strips), t.by_blocks = divider(t.blocks);
  prepare_window<T>(t.in, t, height, width), prepare_window<T>(t.out, t, height, width);
}

// Blocks that an H200's multiprocessor holds.
inline int64_t depthwise_resident(int64_t by_registers, int64_t shared) {
  constexpr int64_t kMultiprocessorShared = 233472;
  const int64_t by_shared = kMultiprocessorShared / (shared + kReservedShared);
  return by_registers < by_shared ? by_registers : by_shared;
}

inline int log2_of(int n) {
  int log = 0;
  while (1 << (log + 1) <= n) ++log;
  return log;
}

template <class T>
DepthwisePlan depthwise_fma_plan(const DepthwiseCase<Accumulator<T>>& c, int kernel, bool backward,
                                 int64_t multiprocessors) {
  constexpr int64_t wide = sizeof(Accumulator<T>);
  const int strip = patch_rows(kernel, backward);
  DepthwisePlan plan{};
  plan.kernel = DepthwiseKernel::kFma;
  DepthwiseTile& t = plan.tile;
  t.channels = (backward ? 32 : 64) / int(sizeof(T)), t.log_channels = log2_of(t.channels);
  auto shared = [&](DepthwiseTile& tile) {
    shape_planes<T>(tile, kernel, c.height, c.width, true, 0);
    const int64_t elements =
        (backward ? 2 : 1) * tile.plane_elements + plane_elements<T>(tile.channels, tile.out.plane_pitch);
    return fma_parameters(kernel, tile.channels) * wide + elements * int64_t(sizeof(T));
  };
  shape_tile(t, strip, c.height, c.width, [&](DepthwiseTile& tile) { return shared(tile) <= kFmaShared; });
  const int most = fma_threads(backward) / t.channels;  // patches at a time
  while (t.row_tiles * t.column_tiles == 1 && t.images * t.strips * (t.columns / kDepthwiseColumns) < most &&
         2 * t.images <= c.batch) {
    DepthwiseTile more = t;
    more.images *= 2;
    if (shared(more) > kFmaShared) break;
    t = more;
  }
  plan.geometry.shared = shared(t);
  const int patches = t.images * t.strips * t.blocks;
  plan.geometry.threads = static_cast<int>(ceil_div((patches < most ? patches : most) * t.channels, kWarp)) * kWarp;
  const int64_t resident = depthwise_resident(
      fma_resident(kernel, backward) * fma_threads(backward) / plan.geometry.threads, plan.geometry.shared);
  share_items<T>(t, c.batch, c.channels, c.height, c.width, multiprocessors * resident);
  plan.geometry.blocks = int64_t(t.groups) * t.splits;
  return plan;
}

// Decides, and marks how the case's tensors are accessed. Of multiprocessors every device counts as an H200.
template <class T>
DepthwisePlan depthwise_conv2d_plan(DepthwiseCase<Accumulator<T>>& c, int kernel, bool backward, bool tensor_cores,
                                    int64_t multiprocessors = DeviceLimits{}.multiprocessors) {
  (void)tensor_cores;
  const DepthwisePlan plan = depthwise_fma_plan<T>(c, kernel, backward, multiprocessors);
  const DepthwiseTile& t = plan.tile;
  c.x.access = depthwise_access<T>(c.x, t.in, t, c.channels, c.height, c.width);
  if (backward) c.grad.access = depthwise_access<T>(c.grad, t.in, t, c.channels, c.height, c.width);
  c.out.access = depthwise_access<T>(c.out, t.out, t, c.channels, c.height, c.width);
  return plan;
}

// Second stage of the weight gradients: adds the splits' sums, in an order that depends on their number alone.
constexpr int kTapStrips = 8;

template <class T>
LaunchGeometry depthwise_sums_geometry(int64_t columns) {
  return {ceil_div(columns, kWarp), kTapStrips * kWarp, kTapStrips * kWarp * int64_t(sizeof(Accumulator<T>))};
}

template <class T>
__global__ void __launch_bounds__(kTapStrips* kWarp)
    depthwise_sums(const Accumulator<T>* __restrict__ partial, int64_t splits, int64_t channels, int taps,
                   T* __restrict__ dweight, T* __restrict__ dbias) {
  using A = Accumulator<T>;
  SDP_DYNAMIC_SHARED(shared);
  A* sums = reinterpret_cast<A*>(shared);
  const int lane = threadIdx.x % kWarp, strip = threadIdx.x / kWarp;
  const int64_t columns = channels * (taps + 1), column = int64_t(blockIdx.x) * kWarp + lane;
  A sum = 0;
  if (column < columns) {
#pragma unroll 4
    for (int64_t split = strip; split < splits; split += kTapStrips) sum += partial[split * columns + column];
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (strip != 0 || column >= columns) return;
#pragma unroll
  for (int i = 1; i < kTapStrips; ++i) sum += sums[i * kWarp + lane];
  const int64_t channel = column / (taps + 1);
  const int tap = static_cast<int>(column - channel * (taps + 1));
  if (tap < taps) dweight[channel * taps + tap] = narrow<T>(sum);
  else dbias[channel] = narrow<T>(sum);
}

// Calls body with the kernel size as a constant.
template <class Body>
void with_kernel_size(int kernel, const Body& body) {
  switch (kernel) {
    case 3: return body(std::integral_constant<int, 3>());
    case 5: return body(std::integral_constant<int, 5>());
    case 7: return body(std::integral_constant<int, 7>());
    default: return body(std::integral_constant<int, 9>());
  }
}

template <class T, class Launch>
void depthwise_conv2d_forward(const DepthwiseCase<Accumulator<T>>& c, int kernel, const DepthwisePlan& plan,
                              const Launch& launch) {
  with_kernel_size(kernel, [&](auto size) { launch(&depthwise_fma_fwd<T, size>, plan.geometry, c, plan.tile); });
}

// c.partial must have plan.tile.splits rows; dweight is (C, 1, k, k), dbias (C,), without gaps.
template <class T, class Launch>
void depthwise_conv2d_backward(const DepthwiseCase<Accumulator<T>>& c, int kernel, const DepthwisePlan& plan,
                               T* dweight, T* dbias, const Launch& launch) {
  using A = Accumulator<T>;
  if (plan.geometry.blocks > 0)
    with_kernel_size(kernel, [&](auto size) { launch(&depthwise_fma_bwd<T, size>, plan.geometry, c, plan.tile); });
  const A* partial = c.partial;
  const int taps = kernel * kernel;
  launch(&depthwise_sums<T>, depthwise_sums_geometry<T>(int64_t(c.channels) * (taps + 1)), partial,
         int64_t(plan.tile.splits), int64_t(c.channels), taps, dweight, dbias);
}

}  // namespace sdp
