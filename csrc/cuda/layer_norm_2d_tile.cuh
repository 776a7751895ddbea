// LayerNorm where pixels lie next to each other: contiguous NCHW, or any strides.
//
// A block has a tile of pixels. A thread has kPackSize of them ("items") and every groups-th channel: its group, its
// first channel, is thread / lanes, its place in the tile thread % lanes. OnChip, what a thread reads stays in its own
// slots of shared memory, so x (and in backward grad) is read once; else it is read twice, the second time from L2
// mostly. N neighbouring pixels move as one load: all items of a thread or half of them (contiguous, H·W a multiple:
// 14 · 14 is one of 4) or one at a time (any strides). The order of every sum depends on C, the dtype and the device's shared memory alone, not on the batch
// or the strides.
#pragma once
#include "cuda/layer_norm_2d_case.cuh"

namespace sdp {

constexpr int kColumnMaxThreads = 512;
constexpr int kColumnThreads = 256;  // where two blocks fit on a multiprocessor, or the tile does not fit at all
constexpr int kColumnTensors = 4;  // at most: x, residual, y, sum or x, grad, grad_sum, dx

struct ColumnPlan {
  int threads, pixels;  // of a block
  bool on_chip;         // the tile is
  bool sums_on_chip;    // backward's sums over the block's pixels are; else they are in its row of partial sums
  int64_t shared;
};

// Bytes of shared memory besides the tile: two quantities summed over groups, and a table of offsets with 1 flag per
// pixel.
inline int64_t column_scratch(int threads, int pixels, int64_t accumulator_bytes) {
  return (threads / kWarp + 1) * 2 * pixels * accumulator_bytes + pixels * (kColumnTensors * 8 + 8);
}

// `tensors`: how many stay on chip, 1 forward, 2 backward. Two blocks per multiprocessor overlap one's loads with the
// other's stores; 128-byte lines with one tensor and 64-byte ones with two are worth less than that, 8 pixels are the
// least.
template <class T>
inline ColumnPlan column_plan(int channels, int tensors, const DeviceLimits& device) {
  constexpr int64_t accumulator_bytes = sizeof(Accumulator<T>);
  const bool backward = tensors == 2;
  const int64_t sums = backward ? 2 * channels * accumulator_bytes : 0;
  auto plan = [&](int threads, int pixels, bool on_chip, bool sums_on_chip) {
    return ColumnPlan{threads, pixels, on_chip, sums_on_chip,
                      (on_chip ? int64_t(channels) * pixels * int64_t(sizeof(T)) * tensors : 0) +
                          (sums_on_chip ? sums : 0) + column_scratch(threads, pixels, accumulator_bytes)};
  };
  int wide = 64;  // few channels: more pixels instead of idle threads
  while (wide < kWarp * kPackSize<T> && kColumnThreads / (wide / kPackSize<T>) > channels) wide *= 2;
  for (int pixels = wide; pixels >= 32; pixels /= 2) {
    const ColumnPlan p = plan(kColumnThreads, pixels, true, backward);
    if (p.shared <= device.block_shared && 2 * (p.shared + kReservedShared) <= device.multiprocessor_shared) return p;
  }
  for (const bool sums_on_chip : {backward, false})
    for (int pixels = 64; pixels >= 8; pixels /= 2) {
      const ColumnPlan p = plan(kColumnMaxThreads, pixels, true, sums_on_chip);
      if (p.shared <= device.block_shared) return p;
    }
  const ColumnPlan p = plan(kColumnThreads, 64, false, backward);
  return 2 * (p.shared + kReservedShared) <= device.multiprocessor_shared ? p : plan(kColumnThreads, 64, false, false);
}

inline LaunchGeometry column_forward_geometry(int64_t rows, const ColumnPlan& p) {
  return {ceil_div(rows, p.pixels), p.threads, p.shared};
}
inline LaunchGeometry column_backward_geometry(int64_t rows, const ColumnPlan& p, const DeviceLimits& device) {
  return {backward_blocks(ceil_div(rows, p.pixels), kColumnMaxThreads / p.threads, device), p.threads, p.shared};
}

// Shared memory of a block, in this order.
template <class T>
struct ColumnMemory {
  using A = Accumulator<T>;
  Pack<T>* tile;     // (tensors, C, lanes)
  A* sums;           // (2, C)
  A* warp_sums;      // (warps, 2, pixels)
  A* totals;         // (2, pixels)
  int64_t* offsets;  // (kColumnTensors, pixels), of the first of N pixels
  unsigned* flags;   // (pixels,): 1 exists, 2 is no register

  __device__ ColumnMemory(unsigned char* memory, int channels, const ColumnPlan& p, int tensors) {
    tile = reinterpret_cast<Pack<T>*>(memory);
    if (p.on_chip) memory += int64_t(tensors) * channels * p.pixels * sizeof(T);
    sums = reinterpret_cast<A*>(memory);
    if (p.sums_on_chip) memory += int64_t(2) * channels * sizeof(A);
    warp_sums = reinterpret_cast<A*>(memory);
    memory += p.threads / kWarp * 2 * p.pixels * sizeof(A);
    totals = reinterpret_cast<A*>(memory);
    memory += 2 * p.pixels * sizeof(A);
    offsets = reinterpret_cast<int64_t*>(memory);
    memory += kColumnTensors * p.pixels * sizeof(int64_t);
    flags = reinterpret_cast<unsigned*>(memory);
  }
};

// A thread's pixels and channels in the current tile.
template <class T, int N>
struct ColumnThread {
  using A = Accumulator<T>;
  static constexpr int items = kPackSize<T>, parts = items / N;
  static constexpr bool packed = parts == 1;
  const PictureView* views[kColumnTensors];
  int lanes, lane, group, groups, tile_pixels;
  ColumnMemory<T> memory;
  unsigned exists = 0, alive = 0;                        // one bit per item
  int64_t at[packed ? kColumnTensors : 1] = {};          // offsets: one per tensor, or in memory.offsets

  __device__ ColumnThread(const ColumnPlan& plan, const ColumnMemory<T>& m, const PictureView* a, const PictureView* b,
                          const PictureView* c, const PictureView* d)
      : views{a, b, c, d}, tile_pixels(plan.pixels), memory(m) {
    lanes = plan.pixels / items, groups = plan.threads / lanes;
    lane = threadIdx.x & (lanes - 1), group = threadIdx.x / lanes;
  }
  // Number within the tile of an item's pixel.
  __device__ int pixel_of(int item) const { return (item / N * lanes + lane) * N + item % N; }

  __device__ void enter(const LayerNormCase<A>& c, int64_t first) {
    if constexpr (packed) {
      const int64_t pixel = first + lane * items;
      exists = alive = pixel < c.rows ? (1u << items) - 1 : 0;
      const PixelPlace place = place_of(c, exists ? pixel : 0);
#pragma unroll
      for (int t = 0; t < kColumnTensors; ++t) at[t] = offset_of(*views[t], place);
    } else {
      if (first >= int64_t(gridDim.x) * tile_pixels) __syncthreads();  // the tile before is done with the table
      for (int i = threadIdx.x; i < tile_pixels / N; i += blockDim.x) {
        const int64_t pixel = first + i * N;
        const PixelPlace place = place_of(c, pixel < c.rows ? pixel : 0);
#pragma unroll
        for (int t = 0; t < kColumnTensors; ++t) memory.offsets[t * tile_pixels + i] = offset_of(*views[t], place);
        memory.flags[i] = pixel < c.rows ? (place.is_register ? 1 : 3) : 0;
      }
      __syncthreads();
      exists = alive = 0;
#pragma unroll
      for (int item = 0; item < items; ++item) {
        const unsigned flags = memory.flags[pixel_of(item) / N];
        exists |= (flags & 1) << item;
        alive |= (flags >> 1) << item;
      }
    }
  }

  // A channel at this thread's pixels; 0 where there is no pixel.
  __device__ Pack<T> load(int t, int channel) const {
    const T* p = static_cast<const T*>(views[t]->data) + channel * views[t]->channel;
    if constexpr (packed) {
      return exists ? load_pack(p + at[t]) : zero_pack<T>();
    } else {
      Pack<T> pack = zero_pack<T>();
#pragma unroll
      for (int item = 0; item < items; item += N)
        if (exists >> item & 1) {
          const Pack<T, N> part = load_pack<T, N>(p + memory.offsets[t * tile_pixels + pixel_of(item) / N]);
#pragma unroll
          for (int k = 0; k < N; ++k) pack.items[item + k] = part.items[k];
        }
      return pack;
    }
  }
  __device__ void store(int t, int channel, const Pack<T>& pack) const {
    T* p = static_cast<T*>(views[t]->data) + channel * views[t]->channel;
    if constexpr (packed) {
      if (exists) store_pack(p + at[t], pack);
    } else {
#pragma unroll
      for (int item = 0; item < items; item += N)
        if (exists >> item & 1) {
          Pack<T, N> part;
#pragma unroll
          for (int k = 0; k < N; ++k) part.items[k] = pack.items[item + k];
          store_pack(p + memory.offsets[t * tile_pixels + pixel_of(item) / N], part);
        }
    }
  }
  // An item's value, 0 if it is a register row's or beyond the end.
  __device__ A value(const Pack<T>& pack, int item) const {
    return N > 1 || (alive >> item & 1) ? widen(pack.items[item]) : A(0);
  }

  // Sums over the channel groups, for each item. Two barriers; the memory is free again before the next call's first
  // one.
  template <int Count>
  __device__ void sum_groups(A (&values)[Count][items]) const {
    const int row = Count * tile_pixels;
#pragma unroll
    for (int k = 0; k < Count; ++k)
#pragma unroll
      for (int item = 0; item < items; ++item) {
        const A sum = sum_lanes(values[k][item], lanes, kWarp);
        if (int(threadIdx.x) % kWarp == lane)
          memory.warp_sums[threadIdx.x / kWarp * row + k * tile_pixels + pixel_of(item)] = sum;
      }
    __syncthreads();
    for (int i = threadIdx.x; i < row; i += blockDim.x) {
      A sum = 0;
      for (int w = 0; w < int(blockDim.x) / kWarp; ++w) sum += memory.warp_sums[w * row + i];
      memory.totals[i] = sum;
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < Count; ++k)
#pragma unroll
      for (int item = 0; item < items; ++item) values[k][item] = memory.totals[k * tile_pixels + pixel_of(item)];
  }
};

}  // namespace sdp
