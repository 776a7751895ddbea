// Depthwise convolution, forward and backward: which kernel runs, with what geometry. No torch and no <<<>>> here:
// `launch(kernel, geometry, arguments...)` is the caller's, so that the emulator runs what a GPU would.
//
// Bytes per element of s bytes: forward 2s, backward 3s (x and dy are read once, for dx and the weights' gradient), and
// the rows that neighbouring tiles of a large image both need. Geometry follows from the shape alone, not from the device.
#pragma once
#include "cuda/depthwise_conv2d_fma.cuh"
#include "cuda/depthwise_conv2d_mma.cuh"

namespace sdp {

enum class DepthwiseKernel : int { kFma, kMma };

struct DepthwisePlan {
  DepthwiseKernel kernel;
  DepthwiseTile tile;
  LaunchGeometry geometry;
};

// Shared memory of a block, at most.
constexpr int64_t kFmaShared = 79 * 1024;          // two on a multiprocessor of 164 KB
constexpr int64_t kMmaForwardShared = 72 * 1024;   // three on one of 228 KB, two on one of 164 KB
constexpr int64_t kMmaBackwardShared = 98 * 1024;  // two on one of 228 KB; the most that some devices have
constexpr int kDepthwiseMaxColumns = 64;   // of a tile

// A window of a tile with what surrounds it, or without; its pitches stand.
inline void window_with_border(DepthwiseWindow& w, const DepthwiseTile& t, int border, int height, int width) {
  const bool whole_rows = t.column_tiles == 1, whole_columns = t.row_tiles == 1;
  // Where the tile is the image, its surroundings are zeros for good and only the image is moved.
  w.row = whole_columns ? 0 : -border, w.rows = whole_columns ? height : t.rows + 2 * border;
  w.column = whole_rows ? 0 : -kDepthwiseMargin;
  w.columns = whole_rows ? static_cast<int>(ceil_div(width, 4)) * 4 : t.columns + 2 * kDepthwiseMargin;
  w.at = (whole_columns ? border * w.row_pitch : 0) + (whole_rows ? kDepthwiseMargin : 0);
}
inline void window_without_border(DepthwiseWindow& w, const DepthwiseTile& t, int height, int width) {
  w.row = w.column = w.at = 0;
  w.rows = t.row_tiles == 1 ? height : t.rows;
  w.columns = t.column_tiles == 1 ? static_cast<int>(ceil_div(width, 4)) * 4 : t.columns;
}

// The tile's rows and columns: as few tiles as `fits(tile)` allows, all about the same.
template <class Fits>
void shape_tile(DepthwiseTile& t, int strip, int height, int width, const Fits& fits) {
  t.images = 1;
  t.column_tiles = static_cast<int>(ceil_div(width, kDepthwiseMaxColumns));
  t.columns = static_cast<int>(ceil_div(ceil_div(width, t.column_tiles), kDepthwiseColumns)) * kDepthwiseColumns;
  t.blocks = t.columns / kDepthwiseColumns;
  for (t.row_tiles = 1;; ++t.row_tiles) {
    t.rows = static_cast<int>(ceil_div(ceil_div(height, t.row_tiles), strip)) * strip;
    t.strips = t.rows / strip;
    if (t.rows == strip || fits(t)) break;
  }
  t.row_tiles = static_cast<int>(ceil_div(height, t.rows));
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
  t.items = static_cast<int>(ceil_div(batch, t.images) * t.row_tiles * t.column_tiles);
  t.splits = t.items == 0 ? 0 : static_cast<int>(depthwise_splits(t.items, t.groups, slots));
  t.by_images = divider(t.images), t.by_width = divider(width), t.by_height = divider(height);
  t.by_strips = divider(t.strips), t.by_blocks = divider(t.blocks);
  for (DepthwiseWindow* w : {&t.x, &t.grad, &t.out})
    if (w->rows > 0) prepare_window<T>(*w, t, height, width);
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

// Bytes of shared memory of a tile whose rows, columns and images stand; sets its windows.
template <class T>
int64_t fma_shape_planes(DepthwiseTile& t, int kernel, bool backward, int height, int width) {
  t.x.row_pitch = t.columns + 2 * kDepthwiseMargin;
  t.x.image_pitch = (t.rows + kernel - 1) * t.x.row_pitch;
  t.x.plane_pitch = odd_pitch<T>(t.images * t.x.image_pitch);
  window_with_border(t.x, t, kernel / 2, height, width);
  t.x_elements = plane_elements<T>(t.channels, t.x.plane_pitch);
  if (backward) t.grad = t.x, t.grad_elements = t.x_elements;
  t.out.row_pitch = t.columns, t.out.image_pitch = t.rows * t.columns;
  t.out.plane_pitch = odd_pitch<T>(t.images * t.out.image_pitch);
  window_without_border(t.out, t, height, width);
  const int64_t elements =
      int64_t(t.x_elements) + t.grad_elements + plane_elements<T>(t.channels, t.out.plane_pitch);
  return fma_parameters(kernel, t.channels) * int64_t(sizeof(Accumulator<T>)) + elements * int64_t(sizeof(T));
}

template <class T>
DepthwisePlan depthwise_fma_plan(const DepthwiseCase<Accumulator<T>>& c, int kernel, bool backward,
                                 int64_t multiprocessors) {
  DepthwisePlan plan{};
  plan.kernel = DepthwiseKernel::kFma;
  DepthwiseTile& t = plan.tile;
  t.channels = (backward ? 32 : 64) / int(sizeof(T)), t.log_channels = log2_of(t.channels);
  auto shared = [&](DepthwiseTile& tile) {
    return fma_shape_planes<T>(tile, kernel, backward, c.height, c.width);
  };
  shape_tile(t, patch_rows(kernel, backward), c.height, c.width,
             [&](DepthwiseTile& tile) { return shared(tile) <= kFmaShared; });
  const int most = fma_threads(backward) / t.channels;  // patches at a time
  while (t.row_tiles * t.column_tiles == 1 && t.images * t.strips * t.blocks < most && 2 * t.images <= c.batch) {
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

// Pitches with which the 8 cells that an ldmatrix reads at a time meet different banks, or as few the same as can be.
inline void mma_pitches(DepthwiseWindow& w, const DepthwiseTile& t, int rows, int row_pitch) {
  int least = kMmaCells + 1;
  for (int row_pad = 0; row_pad <= 8; row_pad += 8)
    for (int image_pad = 0; image_pad < 64; image_pad += 8) {
      const int row = row_pitch + row_pad, image = rows * row + image_pad;
      int worst = 0;
      for (int half = 0; half < 2; ++half) {
        int meets[8] = {};
        for (int r = half * 8; r < half * 8 + 8 && r / t.blocks < t.units; ++r) {
          const int unit = r / t.blocks, strip = unit / t.images;
          const int place = ((unit - strip * t.images) * image + strip * kMmaRows * row) / 8 + r % t.blocks;
          const int met = ++meets[place % 8];
          worst = met > worst ? met : worst;
        }
      }
      if (worst < least) least = worst, w.row_pitch = row, w.image_pitch = image;
    }
  w.plane_pitch = t.images * w.image_pitch;
}

template <class T>
int64_t mma_shape_planes(DepthwiseTile& t, int kernel, bool backward, int height, int width) {
  t.units = kMmaCells / t.blocks;
  DepthwiseWindow& bordered = backward ? t.grad : t.x;  // and written back in place
  mma_pitches(bordered, t, t.rows + kernel - 1, t.columns + 2 * kDepthwiseMargin);
  window_with_border(bordered, t, kernel / 2, height, width);
  t.out = bordered;
  window_without_border(t.out, t, height, width);
  t.out.at = kDepthwiseMargin;
  if (backward) {
    mma_pitches(t.x, t, t.rows, t.columns);
    window_without_border(t.x, t, height, width);
    t.grad_elements = plane_elements<T>(t.channels, t.grad.plane_pitch);
  }
  t.x_elements = plane_elements<T>(t.channels, t.x.plane_pitch);
  return mma_parameters(kernel) * 4 + (int64_t(t.x_elements) + t.grad_elements) * int64_t(sizeof(T));
}

template <class T>
DepthwisePlan depthwise_mma_plan(const DepthwiseCase<float>& c, int kernel, bool backward, int64_t multiprocessors) {
  DepthwisePlan plan{};
  plan.kernel = DepthwiseKernel::kMma;
  DepthwiseTile& t = plan.tile;
  t.channels = kMmaChannels, t.log_channels = kMmaLogChannels;
  const int64_t most = backward ? kMmaBackwardShared : kMmaForwardShared;
  auto shared = [&](DepthwiseTile& tile) {
    return mma_shape_planes<T>(tile, kernel, backward, c.height, c.width);
  };
  shape_tile(t, kMmaRows, c.height, c.width, [&](DepthwiseTile& tile) { return shared(tile) <= most; });
  // Images to a tile: as few products with cells that are none as can be.
  auto idle = [](const DepthwiseTile& tile) {
    const int cells = tile.strips * tile.images * tile.blocks;
    return ceil_div(tile.strips * tile.images, tile.units) * kMmaCells * 1000 / cells;
  };
  DepthwiseTile more = t;
  shared(t), shared(more);
  while (t.row_tiles * t.column_tiles == 1 && 2 * more.images <= c.batch && more.images < kMmaCells) {
    more.images *= 2;
    if (shared(more) > most) break;
    if (idle(more) < idle(t)) t = more;
  }
  plan.geometry.shared = shared(t), plan.geometry.threads = kMmaWarps * kWarp;
  const int64_t resident = depthwise_resident(mma_resident(kernel, backward), plan.geometry.shared);
  share_items<T>(t, c.batch, c.channels, c.height, c.width, multiprocessors * resident);
  plan.geometry.blocks = int64_t(t.groups) * t.splits;
  return plan;
}

// Tensor cores multiply the 16-bit types; the 3×3 forward pass is short of memory, not of multiplications, and keeps what
// is not finite where it belongs.
template <class T>
bool depthwise_on_tensor_cores(int kernel, bool backward) {
  return sizeof(T) == 2 && (kernel > 3 || backward);
}

// Decides, and marks how the case's tensors are accessed. Of multiprocessors every device counts as an H200.
template <class T>
DepthwisePlan depthwise_conv2d_plan(DepthwiseCase<Accumulator<T>>& c, int kernel, bool backward, bool tensor_cores,
                                    int64_t multiprocessors = DeviceLimits{}.multiprocessors) {
  DepthwisePlan plan;
  if constexpr (sizeof(T) == 2) {
    if (tensor_cores && depthwise_on_tensor_cores<T>(kernel, backward))
      plan = depthwise_mma_plan<T>(c, kernel, backward, multiprocessors);
    else plan = depthwise_fma_plan<T>(c, kernel, backward, multiprocessors);
  } else {
    plan = depthwise_fma_plan<T>(c, kernel, backward, multiprocessors);
  }
  const DepthwiseTile& t = plan.tile;
  c.x.access = depthwise_access<T>(c.x, t.x, t, c.channels, c.height, c.width);
  if (backward) c.grad.access = depthwise_access<T>(c.grad, t.grad, t, c.channels, c.height, c.width);
  c.out.access = depthwise_access<T>(c.out, t.out, t, c.channels, c.height, c.width);
  return plan;
}

// Second stage of the weight gradients: adds the splits' sums, in an order that depends on their number alone.
constexpr int kTapStrips = 8;

template <class A>
LaunchGeometry depthwise_sums_geometry(int64_t columns) {
  return {ceil_div(columns, kWarp), kTapStrips * kWarp, kTapStrips * kWarp * int64_t(sizeof(A))};
}

template <class A>
__global__ void __launch_bounds__(kTapStrips* kWarp)
    depthwise_sums(const A* __restrict__ partial, int64_t splits, int64_t channels, int taps, A* __restrict__ dweight,
                   A* __restrict__ dbias) {
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
  if (tap < taps) dweight[channel * taps + tap] = sum;
  else dbias[channel] = sum;
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
  with_kernel_size(kernel, [&](auto size) {
    if constexpr (sizeof(T) == 2 && size > 3)
      if (plan.kernel == DepthwiseKernel::kMma)
        return launch(&depthwise_mma_fwd<T, size>, plan.geometry, c, plan.tile);
    launch(&depthwise_fma_fwd<T, size>, plan.geometry, c, plan.tile);
  });
}

// c.partial must have plan.tile.splits rows; dweight is (C, 1, k, k), dbias (C,), without gaps.
template <class T, class Launch>
void depthwise_conv2d_backward(const DepthwiseCase<Accumulator<T>>& c, int kernel, const DepthwisePlan& plan,
                               Accumulator<T>* dweight, Accumulator<T>* dbias, const Launch& launch) {
  using A = Accumulator<T>;
  if (plan.geometry.blocks > 0)
    with_kernel_size(kernel, [&](auto size) {
      if constexpr (sizeof(T) == 2)
        if (plan.kernel == DepthwiseKernel::kMma)
          return launch(&depthwise_mma_bwd<T, size>, plan.geometry, c, plan.tile);
      launch(&depthwise_fma_bwd<T, size>, plan.geometry, c, plan.tile);
    });
  const A* partial = c.partial;
  const int taps = kernel * kernel;
  launch(&depthwise_sums<A>, depthwise_sums_geometry<A>(int64_t(c.channels) * (taps + 1)), partial,
         int64_t(plan.tile.splits), int64_t(c.channels), taps, dweight, dbias);
}

}  // namespace sdp
