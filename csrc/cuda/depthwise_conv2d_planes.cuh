// Between memory and planes: a tile's pixels of a block's channels, in 16-byte accesses where the layout allows.
//
// Threads take one slot after the other. A slot of neighbouring channels is a small square, pixels × channels, that is
// transposed in registers; a slot of neighbouring columns is a pack that may go on in the next row or channel.
#pragma once
#include "cuda/depthwise_conv2d_case.cuh"

namespace sdp {

// Elements move as words: compilers keep 16 bytes of halves together only if nobody names the halves.
using Words = Pack<uint32_t, 4>;

__device__ __forceinline__ uint32_t low_halves(uint32_t a, uint32_t b) {
#ifdef __CUDACC__
  return __byte_perm(a, b, 0x5410);
#else
  return (a & 0xffffu) | b << 16;
#endif
}
__device__ __forceinline__ uint32_t high_halves(uint32_t a, uint32_t b) {
#ifdef __CUDACC__
  return __byte_perm(a, b, 0x7632);
#else
  return a >> 16 | (b & 0xffff0000u);
#endif
}
template <int N = 4>
__device__ __forceinline__ Pack<uint32_t, N> load_words(const void* p) {
  return load_pack<uint32_t, N>(static_cast<const uint32_t*>(p));
}
template <int N>
__device__ __forceinline__ void store_words(void* p, const Pack<uint32_t, N>& words) {
  store_pack(static_cast<uint32_t*>(p), words);
}

// A square, kPixelGroup<T> pixels of kPackSize<T> channels, by its pixels; and one channel's pixels of it.
template <class T>
using Line = Pack<uint32_t, kPixelGroup<T> * int(sizeof(T)) / 4>;

template <class T>
__device__ __forceinline__ Line<T> line_of(const Words (&square)[kPixelGroup<T>], int channel) {
  Line<T> line;
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t a = square[2 * i].items[channel / 2], b = square[2 * i + 1].items[channel / 2];
      line.items[i] = channel % 2 ? high_halves(a, b) : low_halves(a, b);
    }
  } else {
    constexpr int words = sizeof(T) / 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) line.items[i] = square[i / words].items[channel * words + i % words];
  }
  return line;
}
// The other way: all of a square's lines to its pixels.
template <class T>
__device__ __forceinline__ Words pixel_of(const Line<T> (&lines)[kPackSize<T>], int pixel) {
  Words out;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 2) {
      const uint32_t a = lines[2 * i].items[pixel / 2], b = lines[2 * i + 1].items[pixel / 2];
      out.items[i] = pixel % 2 ? high_halves(a, b) : low_halves(a, b);
    } else {
      constexpr int words = sizeof(T) / 4;
      out.items[i] = lines[i / words].items[pixel * words + i % words];
    }
  }
  return out;
}

// threadIdx.x, which the compiler believes to be new each time: what follows from it is not kept in registers from tile to
// tile, beside the sums of the weights' gradient.
__device__ __forceinline__ int thread_index() {
#ifdef __CUDACC__
  int index;
  asm volatile("mov.u32 %0, %tid.x;" : "=r"(index));
  return index;
#else
  return threadIdx.x;
#endif
}

// One tensor's way to its planes (In) or from them.
template <class T>
struct DepthwiseMove {
  using A = Accumulator<T>;
  const DepthwiseView& view;
  const DepthwiseWindow& window;
  const DepthwiseTile& tile;
  T* planes;
  int batch, channels, height, width;  // the tensor's
  int first_channel;
  const A* norm = nullptr;       // (2, tile.channels) weights and biases, in shared memory
  const A *mean = nullptr, *rstd = nullptr;  // null: no norm
  int64_t statistics_batch = 0;

  __device__ __forceinline__ T normalised(T value, A mean, A rstd, int channel) const {
    const A wide = (widen(value) - mean) * rstd;
    return narrow<T>(wide * norm[channel] + norm[tile.channels + channel]);
  }
  // The same for a pack of channels from `channel` on.
  __device__ __forceinline__ void normalise(Words& words, A mean, A rstd, int channel) const {
    Pack<T> pack;
    memcpy(&pack, &words, 16);
#pragma unroll
    for (int j = 0; j < kPackSize<T>; ++j) pack.items[j] = normalised(pack.items[j], mean, rstd, channel + j);
    memcpy(&words, &pack, 16);
  }
  __device__ __forceinline__ bool exists(int image, int channel, int row) const {
    return image < batch && first_channel + channel < channels && unsigned(row) < unsigned(height);
  }
  __device__ __forceinline__ int64_t offset(int image, int channel, int row, int column) const {
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
    for (int slot = thread_index(); slot < count; slot += blockDim.x) {
      int channel = slot & (tile.channels - 1), rest = along_channels ? slot >> tile.log_channels : slot;
      const int row_index = quotient(rest, window.by_columns), column = rest - row_index * window.columns;
      rest = quotient(row_index, window.by_rows);
      const int row = row_index - rest * window.rows;
      int image = rest;
      if (!along_channels) channel = quotient(rest, tile.by_images), image = rest - channel * tile.images;
      const int n = item.image + image;
      const int h = item.row + window.row + row, w = item.column + window.column + column;
      const bool there = exists(n, channel, h) && unsigned(w) < unsigned(width);
      T* in_plane = plane_at(image, channel, row, column);
      T* in_memory = static_cast<T*>(view.data) + (there ? offset(n, channel, h, w) : 0);
      if (In) {
        T value = there ? *in_memory : narrow<T>(A(0));
        if (there && mean != nullptr) {
          const int64_t pixel = n * statistics_batch + int64_t(h) * width + w;
          value = normalised(value, mean[pixel], rstd[pixel], channel);
        }
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
    for (int slot = thread_index(); slot < count; slot += blockDim.x) {
      const int channel = (slot & ((1 << log_packs) - 1)) * size, rest = slot >> log_packs;
      const int row_index = quotient(rest, window.by_groups), column = (rest - row_index * groups) * pixels;
      const int image = quotient(row_index, window.by_rows), row = row_index - image * window.rows;
      const int n = item.image + image;
      const int h = item.row + window.row + row, w = item.column + window.column + column;
      const bool there = exists(n, channel, h);
      T* in_plane = plane_at(image, channel, row, column);
      T* in_memory = static_cast<T*>(view.data) + (there ? offset(n, channel, h, w) : 0);
      if (In) {
        Words square[pixels];
#pragma unroll
        for (int p = 0; p < pixels; ++p) {
          square[p] = {};
          if (there && unsigned(w + p) < unsigned(width)) square[p] = load_words(in_memory + p * view.column);
        }
        if (there && mean != nullptr) {
          const int64_t pixel = n * statistics_batch + int64_t(h) * width + w;
#pragma unroll
          for (int p = 0; p < pixels; ++p)
            if (unsigned(w + p) < unsigned(width)) normalise(square[p], mean[pixel + p], rstd[pixel + p], channel);
        }
#pragma unroll
        for (int j = 0; j < size; ++j) store_words(in_plane + j * window.plane_pitch, line_of<T>(square, j));
      } else if (there) {
        Line<T> lines[size];
#pragma unroll
        for (int j = 0; j < size; ++j) lines[j] = load_words<Line<T>::size>(in_plane + j * window.plane_pitch);
#pragma unroll
        for (int p = 0; p < pixels; ++p)
          if (unsigned(w + p) < unsigned(width)) store_words(in_memory + p * view.column, pixel_of<T>(lines, p));
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
    for (int slot = thread_index(); slot < count; slot += blockDim.x) {
      const int line = quotient(slot, by_packs);
      const int image = planes_follow ? line : line >> tile.log_channels;
      int channel = planes_follow ? 0 : line & (tile.channels - 1);
      const int element = (slot - line * packs) * size - (planes_follow ? 0 : window.lead);
      int row = element < 0 ? -1 : quotient(element, tile.by_width), column = element - row * width;
      if (planes_follow) {
        channel = quotient(row, tile.by_height);
        row -= channel * height;
      }
      const int n = item.image + image;
      const bool there = exists(n, channel, top + row);
      T* in_memory = static_cast<T*>(view.data) + (there ? offset(n, channel, top + row, column) : 0);
      Words words{};
      if (In && there) {
        words = load_words(in_memory);
        if (mean != nullptr) normalise_run(words, n, top + row, column, channel);
      }
#pragma unroll
      for (int j = 0; j < size; j += Run) {
        T* in_plane = plane_at(image, channel, row, column);
        if (unsigned(row) < unsigned(window.rows) && (In || there)) {
          if constexpr (Run * sizeof(T) == 2) {
            uint16_t* half = reinterpret_cast<uint16_t*>(in_plane);
            if (In) *half = static_cast<uint16_t>(words.items[j / 2] >> j % 2 * 16);
            else words.items[j / 2] |= uint32_t(*half) << j % 2 * 16;
          } else {
            constexpr int count = Run * sizeof(T) / 4;
            Pack<uint32_t, count> run;
            if (!In) run = load_words<count>(in_plane);
#pragma unroll
            for (int k = 0; k < count; ++k) {
              uint32_t& word = words.items[j * int(sizeof(T)) / 4 + k];
              if (In) run.items[k] = word;
              else word = run.items[k];
            }
            if (In) store_words(in_plane, run);
          }
        }
        if (Run < size) {
          column += Run;
          if (column == width) {
            column = 0;
            if (++row == height && planes_follow) row = 0, ++channel;
          }
        }
      }
      if (!In && there) store_words(in_memory, words);
    }
  }
  // Pixels that follow one another from (row, column) on; channels may, too.
  __device__ __forceinline__ void normalise_run(Words& words, int image, int row, int column, int channel) const {
    Pack<T> pack;
    memcpy(&pack, &words, 16);
    const A *means = mean + image * statistics_batch, *rstds = rstd + image * statistics_batch;
    int pixel = row * width + column;
#pragma unroll
    for (int j = 0; j < kPackSize<T>; ++j) {
      pack.items[j] = normalised(pack.items[j], means[pixel], rstds[pixel], channel);
      if (++pixel == height * width) pixel = 0, ++channel;
    }
    memcpy(&words, &pack, 16);
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
  for (int n = split; n < c.batch; n += t.splits)
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
      const int channel = first_channel + (i & (t.channels - 1)), row = i >> t.log_channels;
      if (channel < c.channels)
        static_cast<T*>(c.out.data)[n * c.out.batch + channel * c.out.channel - (row + 1) * c.out.column] =
            narrow<T>(Accumulator<T>(0));
    }
}

}  // namespace sdp
