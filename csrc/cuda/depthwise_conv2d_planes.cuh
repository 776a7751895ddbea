// Between memory and planes: a tile's pixels of a block's channels, in 16-byte accesses where the layout allows.
//
// Threads take one slot after the other. A slot of neighbouring channels is a small square, pixels × channels, that is
// transposed in registers; a slot of neighbouring columns is a pack that may go on in the next row or channel.
#pragma once
#include "cuda/depthwise_conv2d_case.cuh"

namespace sdp {

// One tensor's way to or from its planes. A, a template parameter of the functions, is T's accumulator.
template <class T>
struct DepthwiseMove {
  using A = Accumulator<T>;
  const DepthwiseView& view;
  const DepthwiseWindow& window;
  const DepthwiseTile& tile;
  T* planes;
  int64_t batch;                 // images that there are
  int channels, height, width;   // the picture's
  int first_channel;
  const A* norm = nullptr;       // (2, tile.channels) weights and biases, in shared memory
  const A *mean = nullptr, *rstd = nullptr;  // null: no norm
  int64_t statistics_batch = 0;

  __device__ __forceinline__ T normalised(T value, int64_t pixel, int channel) const {
    const A wide = (widen(value) - mean[pixel]) * rstd[pixel];
    return narrow<T>(wide * norm[channel] + norm[tile.channels + channel]);
  }
  __device__ __forceinline__ bool exists(int64_t image, int channel, int row) const {
    return image < batch && first_channel + channel < channels && unsigned(row) < unsigned(height);
  }
  __device__ __forceinline__ int64_t offset(int64_t image, int channel, int row, int column) const {
    return image * view.batch + (first_channel + channel) * view.channel + row * view.row + column * view.column;
  }
  __device__ __forceinline__ T* plane_at(int image, int channel, int row, int column) const {
    return planes + plane_start<T>(channel, window.plane_pitch) + window.at + image * window.image_pitch +
           row * window.row_pitch + column;
  }

  // ---- one by one ----
  template <bool In>
  __device__ __forceinline__ void elements(const DepthwiseItem& item) const {
    const bool along_channels = view.access == DepthwiseAccess::kChannels;
    const int count = tile.images * window.rows * window.columns << tile.log_channels;
    for (int slot = threadIdx.x; slot < count; slot += blockDim.x) {
      int channel = slot & (tile.channels - 1), rest = along_channels ? slot >> tile.log_channels : slot;
      const int row_index = quotient(rest, window.by_columns), column = rest - row_index * window.columns;
      rest = quotient(row_index, window.by_rows);
      const int row = row_index - rest * window.rows;
      int image = rest;
      if (!along_channels) channel = quotient(rest, tile.by_images), image = rest - channel * tile.images;
      const int64_t n = item.image + image;
      const int h = item.row + window.row + row, w = item.column + window.column + column;
      const bool there = exists(n, channel, h) && unsigned(w) < unsigned(width);
      T* in_plane = plane_at(image, channel, row, column);
      T* in_memory = static_cast<T*>(view.data) + (there ? offset(n, channel, h, w) : 0);
      if (In) {
        T value = there ? *in_memory : narrow<T>(A(0));
        if (there && mean != nullptr)
          value = normalised(value, n * statistics_batch + int64_t(h) * width + w, channel);
        *in_plane = value;
      } else if (there) {
        *in_memory = *in_plane;
      }
    }
  }

  // ---- neighbouring channels ----
  template <bool In>
  __device__ __forceinline__ void channel_packs(const DepthwiseItem& item) const {
    constexpr int size = kPackSize<T>, pixels = kPixelGroup<T>;
    const int groups = window.columns / pixels;
    const int log_packs = tile.log_channels - (size == 8 ? 3 : size == 4 ? 2 : 1);
    const int count = tile.images * window.rows * groups << log_packs;
#pragma unroll 2
    for (int slot = threadIdx.x; slot < count; slot += blockDim.x) {
      const int channel = (slot & ((1 << log_packs) - 1)) * size, rest = slot >> log_packs;
      const int row_index = quotient(rest, window.by_groups), column = (rest - row_index * groups) * pixels;
      const int image = quotient(row_index, window.by_rows), row = row_index - image * window.rows;
      const int64_t n = item.image + image;
      const int h = item.row + window.row + row, w = item.column + window.column + column;
      const bool there = exists(n, channel, h);
      T* in_plane = plane_at(image, channel, row, column);
      T* in_memory = static_cast<T*>(view.data) + (there ? offset(n, channel, h, w) : 0);
      Pack<T> square[pixels];
      if (In) {
#pragma unroll
        for (int p = 0; p < pixels; ++p) {
#pragma unroll
          for (int j = 0; j < size; ++j) square[p].items[j] = narrow<T>(A(0));
          if (there && unsigned(w + p) < unsigned(width)) square[p] = load_pack(in_memory + p * view.column);
        }
        if (there && mean != nullptr) {
#pragma unroll
          for (int p = 0; p < pixels; ++p)
            if (unsigned(w + p) < unsigned(width)) {
              const int64_t pixel = n * statistics_batch + int64_t(h) * width + w + p;
#pragma unroll
              for (int j = 0; j < size; ++j)
                square[p].items[j] = normalised(square[p].items[j], pixel, channel + j);
            }
        }
#pragma unroll
        for (int j = 0; j < size; ++j) {
          Pack<T, pixels> line;
#pragma unroll
          for (int p = 0; p < pixels; ++p) line.items[p] = square[p].items[j];
          store_pack(in_plane + j * window.plane_pitch, line);
        }
      } else if (there) {
#pragma unroll
        for (int j = 0; j < size; ++j) {
          const Pack<T, pixels> line = load_pack<T, pixels>(in_plane + j * window.plane_pitch);
#pragma unroll
          for (int p = 0; p < pixels; ++p) square[p].items[j] = line.items[p];
        }
#pragma unroll
        for (int p = 0; p < pixels; ++p)
          if (unsigned(w + p) < unsigned(width)) store_pack(in_memory + p * view.column, square[p]);
      }
    }
  }

  // ---- neighbouring columns ----
  // Run: so many elements of a pack stay in one row, aligned alike in memory and in the plane.
  template <bool In, int Run>
  __device__ __forceinline__ void row_packs(const DepthwiseItem& item) const {
    constexpr int size = kPackSize<T>;
    const bool planes_follow = view.access == DepthwiseAccess::kPlanePacks;
    const Divider& by_packs = planes_follow ? window.by_plane_packs : window.by_row_packs;
    const int packs = by_packs.divisor, top = item.row + window.row;
    const int count = packs * tile.images << (planes_follow ? 0 : tile.log_channels);
    for (int slot = threadIdx.x; slot < count; slot += blockDim.x) {
      const int line = quotient(slot, by_packs);
      const int image = planes_follow ? line : line >> tile.log_channels;
      int channel = planes_follow ? 0 : line & (tile.channels - 1);
      const int element = (slot - line * packs) * size - (planes_follow ? 0 : window.lead);
      int row = element < 0 ? -1 : quotient(element, tile.by_width), column = element - row * width;
      if (planes_follow) {
        channel = quotient(row, tile.by_height);
        row -= channel * height;
      }
      const int64_t n = item.image + image;
      const bool there = exists(n, channel, top + row);
      T* in_memory = static_cast<T*>(view.data) + (there ? offset(n, channel, top + row, column) : 0);
      Pack<T> pack;
      if (In) {
#pragma unroll
        for (int j = 0; j < size; ++j) pack.items[j] = narrow<T>(A(0));
        if (there) pack = load_pack(in_memory);
      }
#pragma unroll
      for (int j = 0; j < size; j += Run) {
        T* in_plane = plane_at(image, channel, row, column);
        const bool in_window = unsigned(row) < unsigned(window.rows);
        if (In && in_window) {
          Pack<T, Run> run;
#pragma unroll
          for (int k = 0; k < Run; ++k) {
            T value = pack.items[j + k];
            if (there && mean != nullptr)
              value = normalised(value, n * statistics_batch + int64_t(top + row) * width + column + k, channel);
            run.items[k] = value;
          }
          store_pack(in_plane, run);
        } else if (there && in_window) {
          const Pack<T, Run> run = load_pack<T, Run>(in_plane);
#pragma unroll
          for (int k = 0; k < Run; ++k) pack.items[j + k] = run.items[k];
        }
        if (Run < size) {
          column += Run;
          if (column == width) {
            column = 0;
            if (++row == height && planes_follow) row = 0, ++channel;
          }
        }
      }
      if (!In && there) store_pack(in_memory, pack);
    }
  }

  template <bool In>
  __device__ __forceinline__ void go(const DepthwiseItem& item) const {
    if (view.access == DepthwiseAccess::kChannelPacks) channel_packs<In>(item);
    else if (view.access < DepthwiseAccess::kChannelPacks) elements<In>(item);
    else if (width % kPixelGroup<T> == 0) row_packs<In, kPixelGroup<T>>(item);
    else if (sizeof(T) == 2 && width % 2 == 0) row_packs<In, 2>(item);
    else row_packs<In, 1>(item);
  }
};

// Zeros to the 16-byte units [0, units) at p.
__device__ __forceinline__ void clear_units(void* p, int units) {
  Pack<unsigned, 4> zero;
#pragma unroll
  for (int i = 0; i < 4; ++i) zero.items[i] = 0;
  for (int i = threadIdx.x; i < units; i += blockDim.x) store_pack(static_cast<unsigned*>(p) + i * 4, zero);
}

// norm (2, tile.channels): the LayerNorm's weight and bias of the block's channels.
template <class T>
__device__ __forceinline__ void read_norm(Accumulator<T>* norm, const DepthwiseCase<Accumulator<T>>& c,
                                          const DepthwiseTile& t, int first_channel) {
  using A = Accumulator<T>;
  if (c.mean == nullptr) return;
  for (int i = threadIdx.x; i < 2 * t.channels; i += blockDim.x) {
    const int channel = first_channel + (i & (t.channels - 1));
    const bool is_bias = i >= t.channels, wide = is_bias ? c.wide_norm_bias : c.wide_norm_weight;
    const void* p = is_bias ? c.norm_bias : c.norm_weight;
    A value = 0;
    if (channel < c.channels)
      value = wide ? static_cast<const A*>(p)[channel] : widen(static_cast<const T*>(p)[channel]);
    norm[i] = value;
  }
}

// Writes 0 to the output's register rows, of this block's channels and share of the images.
template <class T>
__device__ __forceinline__ void clear_registers(const DepthwiseCase<Accumulator<T>>& c, const DepthwiseTile& t,
                                                int first_channel, int split) {
  if (c.registers == 0) return;
  const int count = c.registers << t.log_channels;
  for (int64_t n = split; n < c.batch; n += t.splits)
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
      const int channel = first_channel + (i & (t.channels - 1)), row = i >> t.log_channels;
      if (channel < c.channels)
        static_cast<T*>(c.out.data)[n * c.out.batch + channel * c.out.channel - (row + 1) * c.out.column] =
            narrow<T>(Accumulator<T>(0));
    }
}

}  // namespace sdp
