// Depthwise convolution on tensor cores, for bfloat16 and float16: products with banded matrices, sums in fp32.
//
// A cell is 4 rows × 8 columns of outputs of one image; 16 cells of one channel make a product's 16 rows. For row i of
// the cells' inputs, A[cell, j] = in[i, w0 − 4 + j] (16 columns) and B_kh[j, n] = weight[kh, j − n − (4 − k/2)] within
// the band, 0 outside: row o of outputs gets Σ over kh = i − o of A · B_kh. One ldmatrix serves up to 4 products, and B
// depends on the channel only. dx is the same with weights turned and dy for x. The weights' gradient, per kh, is
// D_kh[j, n] = Σ over cells of dy[w0 − 4 + j] · x[w0 + n], whose diagonals are the taps: dw[kh, kw] = Σ D_kh[n + 4 + k/2 −
// kw, n].
//
// The price: outside of the band there are zeros, not nothing. An input that is not finite makes NaN of all columns of
// the cells whose windows contain it, 8 or 16 instead of k; rows, and other channels and images, are as they should be.
//
// A warp has two of the block's 16 channels to itself. Results are written over their inputs, row h over the row that
// held input h − k/2: cells are taken from top to bottom, and later ones read only below that.
#pragma once
#include "common/mma.cuh"
#include "cuda/depthwise_conv2d_planes.cuh"

namespace sdp {

constexpr int kMmaChannels = 16, kMmaLogChannels = 4;  // of a block
constexpr int kMmaWarps = 8;
constexpr int kMmaRows = 4;    // of a cell
constexpr int kMmaCells = 16;  // of a product
constexpr int kBandWords = 22;  // pairs of neighbours in a padded row of weights

// 4-byte words of fixed size in shared memory: bands, bias and norm, and 16 bytes of zeros.
constexpr int64_t mma_parameters(int kernel) { return kMmaChannels * (kernel * kBandWords + 3) + 4; }
// Blocks that a multiprocessor's registers hold.
constexpr int mma_resident(int kernel, bool backward) {
  return backward ? (kernel == 9 ? 1 : 2) : kernel == 9 ? 2 : 3;
}

template <class T, int K>
struct MmaBlock {
  int first_channel, split, warp, lane;
  uint32_t* bands;  // (channels, k, kBandWords)
  float *bias, *norm;
  T *zeros, *planes;

  __device__ __forceinline__ MmaBlock(unsigned char* shared, const DepthwiseCase<float>& c, const DepthwiseTile& t,
                                      bool turned) {
    warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    split = blockIdx.x / t.groups, first_channel = (blockIdx.x - split * t.groups) * kMmaChannels;
    bands = reinterpret_cast<uint32_t*>(shared);
    bias = reinterpret_cast<float*>(bands + kMmaChannels * K * kBandWords), norm = bias + kMmaChannels;
    zeros = reinterpret_cast<T*>(norm + 2 * kMmaChannels), planes = zeros + 8;
    for (int i = threadIdx.x; i < kMmaChannels * K * kBandWords; i += blockDim.x) {
      const int row = i / kBandWords, channel = row / K;
      uint32_t pair = 0;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int kw = i - row * kBandWords - 7 - (kDepthwiseMargin - K / 2) + e;
        if (kw < 0 || kw >= K) continue;
        const T weight = tap_of<T, K>(c, first_channel + channel, row - channel * K, kw, turned);
        uint16_t bits;
        memcpy(&bits, &weight, 2);
        pair |= uint32_t(bits) << 16 * e;
      }
      bands[i] = pair;
    }
    for (int i = threadIdx.x; i < kMmaChannels; i += blockDim.x)
      bias[i] = c.bias != nullptr && first_channel + i < c.channels
                    ? widen(static_cast<const T*>(c.bias)[(first_channel + i) * c.bias_channel])
                    : 0.f;
    read_norm<T>(norm, c, t, first_channel);
    clear_registers<T>(c, t, first_channel, split);
    clear_units(zeros, 1 + (t.x_elements + t.grad_elements) / 8);  // and the planes behind
  }
  __device__ __forceinline__ DepthwiseMove<T> move(const DepthwiseCase<float>& c, const DepthwiseView& view,
                                                   const DepthwiseWindow& window, const DepthwiseTile& t,
                                                   T* to) const {
    return {view, window, t, to, c.batch, c.channels, c.height, c.width, first_channel};
  }
  __device__ __forceinline__ DepthwiseMove<T> move_x(const DepthwiseCase<float>& c, const DepthwiseTile& t) const {
    return {c.x,    t.x,    t,      planes,
            c.batch, c.channels, c.height, c.width, first_channel, norm, c.mean, c.rstd, c.statistics_batch};
  }
  // This lane's part of the channel's bands.
  __device__ __forceinline__ void load_bands(uint32_t (&b)[K][2], int channel) const {
    const uint32_t* from = bands + channel * K * kBandWords + 2 * (lane % 4) - lane / 4 + 7;
#pragma unroll
    for (int kh = 0; kh < K; ++kh) b[kh][0] = from[kh * kBandWords], b[kh][1] = from[kh * kBandWords + 8];
  }
};

// Zeros above the images, where results were written; the rest of the surroundings stays as it is.
template <class T>
__device__ __forceinline__ void clear_top(T* planes, const DepthwiseWindow& w, const DepthwiseTile& t, int border) {
  if (t.row_tiles > 1) return;  // the surroundings are moved too
  const int units = border * w.row_pitch / 8, count = units * t.images * kMmaChannels;
  Pack<T> zero;
#pragma unroll
  for (int j = 0; j < 8; ++j) zero.items[j] = narrow<T>(0.f);
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    const int plane = i / units, image = plane / kMmaChannels;
    store_pack(planes + plane_start<T>(plane % kMmaChannels, w.plane_pitch) + image * w.image_pitch +
                   (i - plane * units) * 8,
               zero);
  }
}

// One of the 16 cells of a product, the first of which begins with unit `first`: units are (strip, image), strips slowest,
// and never divided.
struct MmaCell {
  int image, row, column;  // of its first output
  bool exists;
};
__device__ __forceinline__ MmaCell cell_at(const DepthwiseTile& t, int first, int index) {
  const int within = quotient(index, t.by_blocks), unit = first + within, strip = quotient(unit, t.by_images);
  return {unit - strip * t.images, strip * kMmaRows, (index - within * t.blocks) * kDepthwiseColumns,
          within < t.units && strip < t.strips};
}
__device__ __forceinline__ int cell_offset(const DepthwiseWindow& w, const MmaCell& cell) {
  return cell.image * w.image_pitch + cell.row * w.row_pitch + cell.column;
}

// Convolves one channel's planes in place. Pixels beyond the picture stay zero.
template <class T, int K>
__device__ __forceinline__ void convolve_planes(T* plane, const DepthwiseWindow& w, const DepthwiseTile& t, int height,
                                                int width, const uint32_t (&bands)[K][2], float bias) {
  const int lane = threadIdx.x % kWarp;
  for (int first = 0; first < t.strips * t.images; first += t.units) {
    const MmaCell cell = cell_at(t, first, lane % kMmaCells);
    const T* from = plane + (cell.exists ? cell_offset(w, cell) : 0) + lane / kMmaCells * 8;
    float sums[kMmaRows][4];
#pragma unroll
    for (int o = 0; o < kMmaRows; ++o) sums[o][0] = sums[o][1] = sums[o][2] = sums[o][3] = bias;
#pragma unroll
    for (int i = 0; i < kMmaRows + K - 1; ++i) {
      uint32_t a[4];
      ldmatrix<4>(a, from + i * w.row_pitch);
#pragma unroll
      for (int o = 0; o < kMmaRows; ++o)
        if (i - o >= 0 && i - o < K) mma_m16n8k16<T>(sums[o], a, bands[i - o]);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const MmaCell mine = cell_at(t, first, lane / 4 + 8 * half);
      const int column = mine.column + 2 * (lane % 4);
      T* to = plane + cell_offset(w, mine) + 2 * (lane % 4) + kDepthwiseMargin;
#pragma unroll
      for (int o = 0; o < kMmaRows; ++o) {
        if (!mine.exists || mine.row + o >= height || column >= width) continue;
        const uint32_t pair = pack_pair<T>(sums[o][2 * half], sums[o][2 * half + 1]);
        if (column + 1 < width) *reinterpret_cast<uint32_t*>(to + o * w.row_pitch) = pair;
        else *reinterpret_cast<uint16_t*>(to + o * w.row_pitch) = static_cast<uint16_t>(pair);
      }
    }
  }
}

template <class T, int K>
__global__ void __launch_bounds__(kMmaWarps* kWarp, mma_resident(K, false))
    depthwise_mma_fwd(const DepthwiseCase<float> c, const DepthwiseTile t) {
  SDP_DYNAMIC_SHARED(shared);
  const MmaBlock<T, K> b(shared, c, t, false);
  __syncthreads();  // margins are zero, parameters there
  for (int item = b.split; item < t.items; item += t.splits) {
    const DepthwiseItem at = item_at(t, item);
    clear_top(b.planes, t.x, t, K / 2);
    b.move_x(c, t).template go<true>(at);
    __syncthreads();
#pragma unroll 1
    for (int channel = b.warp; channel < kMmaChannels; channel += kMmaWarps) {
      uint32_t bands[K][2];
      b.load_bands(bands, channel);
      convolve_planes<T, K>(b.planes + plane_start<T>(channel, t.x.plane_pitch), t.x, t, c.height - at.row,
                            c.width - at.column, bands, b.bias[channel]);
    }
    __syncthreads();
    b.move(c, c.out, t.out, t, b.planes).template go<false>(at);
    __syncthreads();
  }
}

// Adds one channel's products to dw, a matrix per row of the kernel, and to db sums of dy: every 4th lane has one of
// the cells' 8 columns.
template <class T, int K>
__device__ __forceinline__ void correlate_planes(float (&dw)[K][4], float& db, const T* x, const T* dy,
                                                 const T* zeros, const DepthwiseTile& t) {
  const int lane = threadIdx.x % kWarp;
  const uint32_t one = pack_pair<T>(1.f, 1.f), ones[2] = {one, one};
  float column_sums[4] = {};  // a row for each of the window's 16 columns, the cells' own from 4 on; all columns alike
  for (int first = 0; first < t.strips * t.images; first += t.units) {
    // Cells that there are not have zeros in both: a zero times what is not finite would not do.
    const MmaCell left = cell_at(t, first, lane % 8 + lane / 16 * 8), right = cell_at(t, first, lane % kMmaCells);
    const T* dy_from = left.exists ? dy + cell_offset(t.grad, left) + lane / 8 % 2 * 8 : zeros;
    const T* x_from = right.exists ? x + cell_offset(t.x, right) + lane / kMmaCells * t.x.row_pitch : zeros;
    const int dy_pitch = left.exists ? t.grad.row_pitch : 0, x_pitch = right.exists ? t.x.row_pitch : 0;
    uint32_t cells[kMmaRows][2];
#pragma unroll
    for (int o = 0; o < kMmaRows; o += 2) {
      uint32_t two[4];
      ldmatrix<4, true>(two, x_from + o * x_pitch);
      cells[o][0] = two[0], cells[o][1] = two[1], cells[o + 1][0] = two[2], cells[o + 1][1] = two[3];
    }
#pragma unroll
    for (int i = 0; i < kMmaRows + K - 1; ++i) {
      uint32_t a[4];
      ldmatrix<4, true>(a, dy_from + i * dy_pitch);
#pragma unroll
      for (int o = 0; o < kMmaRows; ++o)
        if (i - o >= 0 && i - o < K) mma_m16n8k16<T>(dw[o + K - 1 - i], a, cells[o]);
      if (i >= K / 2 && i < K / 2 + kMmaRows) mma_m16n8k16<T>(column_sums, a, ones);
    }
  }
  db += lane < 16 ? column_sums[2] : column_sums[0];  // row lane / 4 + 8 or lane / 4
}

// dx, and the block's sums for dweight and dbias; x and dy are read once.
template <class T, int K>
__global__ void __launch_bounds__(kMmaWarps* kWarp, mma_resident(K, true))
    depthwise_mma_bwd(const DepthwiseCase<float> c, const DepthwiseTile t) {
  constexpr int turns = kMmaChannels / kMmaWarps;
  SDP_DYNAMIC_SHARED(shared);
  const MmaBlock<T, K> b(shared, c, t, true);
  T *x = b.planes, *dy = x + t.x_elements;
  float dw[turns][K][4] = {}, db[turns] = {};
  __syncthreads();  // margins are zero, parameters there
  for (int item = b.split; item < t.items; item += t.splits) {
    const DepthwiseItem at = item_at(t, item);
    clear_top(dy, t.grad, t, K / 2);
    b.move_x(c, t).template go<true>(at);
    b.move(c, c.grad, t.grad, t, dy).template go<true>(at);
    __syncthreads();
#pragma unroll
    for (int turn = 0; turn < turns; ++turn) {
      const int channel = turn * kMmaWarps + b.warp;
      T* plane = dy + plane_start<T>(channel, t.grad.plane_pitch);
      correlate_planes<T, K>(dw[turn], db[turn], x + plane_start<T>(channel, t.x.plane_pitch), plane, b.zeros, t);
      uint32_t bands[K][2];
      b.load_bands(bands, channel);
      convolve_planes<T, K>(plane, t.grad, t, c.height - at.row, c.width - at.column, bands, 0.f);
    }
    __syncthreads();
    b.move(c, c.out, t.out, t, dy).template go<false>(at);
    __syncthreads();
  }
  float* matrix = reinterpret_cast<float*>(x) + b.warp * 128;  // the planes are free now
  const int row = b.lane / 4, column = 2 * (b.lane % 4);
#pragma unroll
  for (int turn = 0; turn < turns; ++turn) {
    const int channel = b.first_channel + turn * kMmaWarps + b.warp;
    float* partial = c.partial + (int64_t(b.split) * c.channels + channel) * (K * K + 1);
#pragma unroll
    for (int kh = 0; kh < K; ++kh) {
      const float(&d)[4] = dw[turn][kh];
      if (turn + kh > 0) __syncwarp();
      matrix[row * 8 + column] = d[0], matrix[row * 8 + column + 1] = d[1];
      matrix[row * 8 + 64 + column] = d[2], matrix[row * 8 + 64 + column + 1] = d[3];
      __syncwarp();
      float sum = 0;
#pragma unroll
      for (int n = 0; n < 8; ++n) sum += matrix[(n + kDepthwiseMargin + K / 2 - b.lane % K) * 8 + n];
      if (channel < c.channels && b.lane < K) partial[kh * K + b.lane] = sum;
    }
    const float sum = sum_lanes(db[turn], 4, kWarp);
    if (channel < c.channels && b.lane == 0) partial[K * K] = sum;
  }
}

}  // namespace sdp
