// Depthwise convolution: what a kernel is told. No torch.
//
// A block has `channels` neighbouring channels and goes from tile to tile: rectangles of outputs, of several images
// where images are small. The inputs that a tile needs lie in shared memory as planes, one per channel and image, in
// rows with a margin of zeros; so the arithmetic knows nothing of layouts, and what moves between memory and planes
// (depthwise_conv2d_planes.cuh) nothing of arithmetic.
#pragma once
#include <initializer_list>

#include "common/block.cuh"
#include "common/pack.cuh"

namespace sdp {

constexpr int kDepthwiseColumns = 8;     // outputs that are computed side by side; the columns of a tile are a multiple
constexpr int kDepthwiseMargin = 4;      // columns of a plane before its first output: the widest kernel's border

// n / divisor for n · divisor < 2³², without dividing.
struct Divider {
  unsigned divisor, magic;
};
inline Divider divider(int64_t d) {
  return {static_cast<unsigned>(d), d == 1 ? 0u : static_cast<unsigned>(((uint64_t(1) << 32) + d - 1) / d)};
}
__device__ __forceinline__ int quotient(int n, const Divider& d) {
  return d.magic == 0 ? n : static_cast<int>((uint64_t(unsigned(n)) * d.magic) >> 32);
}

// How a tensor's elements are moved.
enum class DepthwiseAccess : int {
  kChannels,      // one by one, threads along channels
  kColumns,       // one by one, threads along columns
  kChannelPacks,  // 16 bytes of neighbouring channels
  kRowPacks,      // 16 bytes of neighbouring columns; rows of a tile follow one another
  kPlanePacks,    // the same, and channels follow one another too: packs may cross from one to the next
};

// The pixels of a picture (B, C, H, W), or of a token buffer's rows from `registers` on, by strides in elements.
struct DepthwiseView {
  void* data = nullptr;
  int64_t batch = 0, channel = 0, row = 0, column = 0;
  DepthwiseAccess access = DepthwiseAccess::kColumns;
};

// Strides of dimensions of size 1 mean nothing; they are set so that accesses can be wide.
inline DepthwiseView depthwise_view(const void* data, const int64_t (&sizes)[4], int64_t batch, int64_t channel,
                                    int64_t row, int64_t column) {
  if (sizes[3] == 1) column = row;
  if (sizes[2] == 1) row = sizes[3] * column;
  if (sizes[1] == 1) channel = column == 1 ? sizes[2] * sizes[3] : 1;
  if (sizes[0] == 1) batch = 0;
  return {const_cast<void*>(data), batch, channel, row, column};
}

template <class A>
struct DepthwiseCase {
  int batch, channels, height, width, registers;
  DepthwiseView x, out;  // out: y, or dx in backward
  DepthwiseView grad;    // backward only
  const void *weight, *bias;  // of x's dtype: (C, k, k) by strides, (C,) by its stride or absent
  int64_t weight_channel, weight_row, weight_column, bias_channel;
  // LayerNorm to apply while loading x, or null: statistics by image and pixel, (C,) of the accumulator's type or x's.
  const A *mean, *rstd;
  int64_t statistics_batch;
  const void *norm_weight, *norm_bias;
  bool wide_norm_weight, wide_norm_bias;
  A* partial;  // backward: (splits, C, k · k + 1) sums for dweight and dbias
};

// A rectangle of a tile's pixels that moves between memory and planes.
struct DepthwiseWindow {
  int row, column;    // its first pixel, from the tile's first output
  int rows, columns;  // columns: a multiple of 4
  int at;             // where that pixel lies in its plane
  int row_pitch, image_pitch, plane_pitch;  // elements
  int lead;  // elements before the first row that share a pack with it
  Divider by_columns, by_groups, by_rows, by_row_packs, by_plane_packs;  // groups: of pixels that are stored together
};

struct DepthwiseTile {
  int channels, log_channels;           // of a block: 2^log_channels
  int images, rows, columns;            // of a tile; rows and columns are whole strips and blocks
  int row_tiles, column_tiles;          // of an image
  int strips, blocks;                   // of a tile: strips of rows, blocks of 8 columns
  int units;                            // tensor cores: strips of images in a product
  int items;                            // tiles of all images
  int splits, groups;                   // blocks that share the items; groups of channels
  DepthwiseWindow x, grad, out;         // what is moved to planes, and back
  int x_elements, grad_elements;        // of all planes of a tensor
  Divider by_images, by_width, by_height, by_strips, by_blocks;
};

// Elements of a pack of pixels in a plane: channels × pixels are transposed in squares of about this.
template <class T>
constexpr int kPixelGroup = sizeof(T) == 8 ? 2 : 4;

// Where a channel's plane begins. With 8 channels to a pack, packs of channels are 32 bytes off from one another, so
// that a warp's stores of four packs meet different banks.
template <class T>
__host__ __device__ __forceinline__ int plane_start(int channel, int plane_pitch) {
  return channel * plane_pitch + (sizeof(T) == 2 ? channel / 8 * 16 : 0);
}
template <class T>
inline int plane_elements(int channels, int plane_pitch) {
  return plane_start<T>(channels - 1, plane_pitch) + plane_pitch;
}

// Rounded up to an odd number of 16-byte units: equal places of 8 neighbouring planes meet different banks.
template <class T>
inline int odd_pitch(int elements) {
  const int unit = kPackSize<T>, units = static_cast<int>(ceil_div(elements, unit));
  return (units | 1) * unit;
}

// Sets the dividers, once the rest is known.
template <class T>
void prepare_window(DepthwiseWindow& w, const DepthwiseTile& t, int height, int width) {
  w.by_columns = divider(w.columns), w.by_groups = divider(w.columns / kPixelGroup<T>), w.by_rows = divider(w.rows);
  w.lead = static_cast<int>(int64_t(w.row) * width & (kPackSize<T> - 1));
  w.by_row_packs = divider(ceil_div(w.lead + int64_t(w.rows) * width, kPackSize<T>));
  w.by_plane_packs = divider(ceil_div(int64_t(t.channels) * height * width, kPackSize<T>));
}

inline bool aligned_to_16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// The widest access that a tensor's strides and the windows it passes through allow.
template <class T>
DepthwiseAccess depthwise_access(const DepthwiseView& v, const DepthwiseWindow& w, const DepthwiseTile& t,
                                 int64_t channels, int64_t height, int64_t width) {
  constexpr int64_t size = kPackSize<T>;
  auto whole = [&](std::initializer_list<int64_t> steps) {
    bool all = aligned_to_16(v.data);
    for (const int64_t step : steps) all = all && step % size == 0;
    return all;
  };
  if (v.channel == 1 && whole({v.batch, v.row, v.column, channels})) return DepthwiseAccess::kChannelPacks;
  if (v.column == 1 && v.row == width && t.column_tiles == 1 && w.columns >= width) {
    if (whole({v.batch, v.channel, height * width, t.row_tiles == 1 ? 0 : t.rows * width}) && w.lead <= width)
      return DepthwiseAccess::kRowPacks;
    if (v.channel == height * width && t.row_tiles == 1 && w.row == 0 &&
        whole({v.batch, channels * height * width, t.channels * height * width}))
      return DepthwiseAccess::kPlanePacks;
  }
  return v.channel == 1 ? DepthwiseAccess::kChannels : DepthwiseAccess::kColumns;
}

// The first output of an item's tile.
struct DepthwiseItem {
  int image, row, column;
};
__device__ __forceinline__ DepthwiseItem item_at(const DepthwiseTile& t, int item) {
  const int tiles = t.row_tiles * t.column_tiles;
  const int images = item / tiles, rest = item - images * tiles, row = rest / t.column_tiles;
  return {images * t.images, row * t.rows, (rest - row * t.column_tiles) * t.columns};
}

// weight[channel] at a tap, 0 beyond the last channel; `turned`: rotated by 180°, for dx.
template <class T, int K>
__device__ __forceinline__ T tap_of(const DepthwiseCase<Accumulator<T>>& c, int channel, int kh, int kw, bool turned) {
  if (channel >= c.channels) return narrow<T>(Accumulator<T>(0));
  if (turned) kh = K - 1 - kh, kw = K - 1 - kw;
  return static_cast<const T*>(
      c.weight)[channel * c.weight_channel + kh * c.weight_row + kw * c.weight_column];
}

}  // namespace sdp
