// Depthwise convolution with fused multiply-adds: any floating type, any kernel size.
//
// A thread has a patch of one channel, 2 or 4 rows of 8 outputs, and goes through the rows of its inputs once: each row of
// 16 is loaded in 16-byte packs and used for every row of outputs it meets. Neighbouring threads have neighbouring
// channels, whose planes are an odd number of 16-byte units apart: no bank conflicts. The order of each output's sum
// depends on the kernel size alone.
#pragma once
#include "cuda/depthwise_conv2d_planes.cuh"

namespace sdp {

// Rows of a patch. Backward holds k · k sums besides.
constexpr int patch_rows(int kernel, bool backward) { return backward || kernel == 9 ? 2 : 4; }
constexpr int kPatchInputs = kDepthwiseColumns + 2 * kDepthwiseMargin;

constexpr int fma_threads(bool backward) { return backward ? 128 : 256; }  // of a block, at most
// Blocks of so many threads that a multiprocessor's registers hold.
constexpr int fma_resident(int kernel, bool backward) { return !backward || kernel == 9 ? 2 : kernel == 7 ? 3 : 4; }

// Accumulators of fixed size in shared memory: k · k weights, the bias and the norm's two parameters per channel.
inline int64_t fma_parameters(int kernel, int channels) { return int64_t(kernel * kernel + 3) * channels; }

template <class T>
__device__ __forceinline__ void load_inputs(Accumulator<T> (&row)[kPatchInputs], const T* p) {
#pragma unroll
  for (int i = 0; i < kPatchInputs; i += kPackSize<T>) {
    const Pack<T> pack = load_pack(p + i);
#pragma unroll
    for (int j = 0; j < kPackSize<T>; ++j) row[i + j] = widen(pack.items[j]);
  }
}

// sums[o][n] += Σ in[o + kh][n + kw] · weight(kh, kw); `in` points at the patch's first row of inputs.
template <class T, int K, int Rows, class Weight>
__device__ __forceinline__ void convolve_patch(Accumulator<T> (&sums)[Rows][kDepthwiseColumns], const T* in, int pitch,
                                               const Weight& weight) {
  using A = Accumulator<T>;
#pragma unroll
  for (int i = 0; i < Rows + K - 1; ++i) {
    A row[kPatchInputs];
    load_inputs(row, in + i * pitch);
#pragma unroll
    for (int o = 0; o < Rows; ++o) {
      if (i - o < 0 || i - o >= K) continue;
#pragma unroll
      for (int kw = 0; kw < K; ++kw) {
        const A w = weight(i - o, kw);
#pragma unroll
        for (int n = 0; n < kDepthwiseColumns; ++n) sums[o][n] += row[n + kw + kDepthwiseMargin - K / 2] * w;
      }
    }
  }
}

// What a block of either kernel knows.
template <class T, int K>
struct FmaBlock {
  using A = Accumulator<T>;
  int first_channel, split, channel;
  A *weights, *bias, *norm;  // (k · k, channels), (channels,), (2, channels)
  T* planes;

  __device__ __forceinline__ FmaBlock(unsigned char* shared, const DepthwiseCase<A>& c, const DepthwiseTile& t,
                                      bool turned) {
    split = blockIdx.x / t.groups, first_channel = (blockIdx.x - split * t.groups) << t.log_channels;
    channel = threadIdx.x & (t.channels - 1);
    weights = reinterpret_cast<A*>(shared);
    bias = weights + K * K * t.channels, norm = bias + t.channels;
    planes = reinterpret_cast<T*>(norm + 2 * t.channels);
    for (int i = threadIdx.x; i < K * K * t.channels; i += blockDim.x) {
      const int tap = i >> t.log_channels;
      weights[i] = widen(tap_of<T, K>(c, first_channel + (i & (t.channels - 1)), tap / K, tap % K, turned));
    }
    for (int i = threadIdx.x; i < t.channels; i += blockDim.x)
      bias[i] = c.bias != nullptr && first_channel + i < c.channels
                    ? widen(static_cast<const T*>(c.bias)[(first_channel + i) * c.bias_channel])
                    : A(0);
    read_norm<T>(norm, c, t, first_channel);
    clear_registers<T>(c, t, first_channel, split);
  }
  __device__ __forceinline__ DepthwiseMove<T> move(const DepthwiseCase<A>& c, const DepthwiseView& view,
                                                   const DepthwiseWindow& window, const DepthwiseTile& t,
                                                   T* to) const {
    return {view, window, t, to, c.batch, c.channels, c.height, c.width, first_channel};
  }
  __device__ __forceinline__ DepthwiseMove<T> move_x(const DepthwiseCase<A>& c, const DepthwiseTile& t) const {
    return {c.x,           t.x, t,       planes, c.batch, c.channels, c.height, c.width, first_channel, norm, c.mean,
            c.rstd,        c.statistics_batch};
  }
};

// Where a patch begins in the planes of a window.
struct PatchPlace {
  int image, row, column;
};
__device__ __forceinline__ PatchPlace patch_at(const DepthwiseTile& t, int patch, int rows) {
  const int strip = quotient(patch, t.by_blocks), image = quotient(strip, t.by_strips);
  return {image, (strip - image * t.strips) * rows, (patch - strip * t.blocks) * kDepthwiseColumns};
}
template <class T>
__device__ __forceinline__ int patch_offset(const DepthwiseWindow& w, int channel, const PatchPlace& p) {
  return plane_start<T>(channel, w.plane_pitch) + p.image * w.image_pitch + p.row * w.row_pitch + p.column;
}

template <class T, int Rows>
__device__ __forceinline__ void store_patch(T* out, int pitch, const Accumulator<T> (&sums)[Rows][kDepthwiseColumns]) {
#pragma unroll
  for (int o = 0; o < Rows; ++o)
#pragma unroll
    for (int n = 0; n < kDepthwiseColumns; n += kPackSize<T>) {
      Pack<T> pack;
#pragma unroll
      for (int j = 0; j < kPackSize<T>; ++j) pack.items[j] = narrow<T>(sums[o][n + j]);
      store_pack(out + o * pitch + n, pack);
    }
}

template <class T, int K>
__global__ void __launch_bounds__(fma_threads(false), fma_resident(K, false))
    depthwise_fma_fwd(const DepthwiseCase<Accumulator<T>> c, const DepthwiseTile t) {
  using A = Accumulator<T>;
  constexpr int rows = patch_rows(K, false);
  SDP_DYNAMIC_SHARED(shared);
  const FmaBlock<T, K> b(shared, c, t, false);
  T *in = b.planes, *out = in + t.x_elements;
  clear_units(in, t.x_elements / kPackSize<T>);
  __syncthreads();  // margins are zero, parameters there
  const int patches = t.images * t.strips * t.blocks, step = blockDim.x >> t.log_channels;
  for (int item = b.split; item < t.items; item += t.splits) {
    const DepthwiseItem at = item_at(t, item);
    b.move_x(c, t).template go<true>(at);
    __syncthreads();
    for (int patch = threadIdx.x >> t.log_channels; patch < patches; patch += step) {
      const PatchPlace place = patch_at(t, patch, rows);
      A sums[rows][kDepthwiseColumns];
#pragma unroll
      for (int o = 0; o < rows; ++o)
#pragma unroll
        for (int n = 0; n < kDepthwiseColumns; ++n) sums[o][n] = b.bias[b.channel];
      convolve_patch<T, K, rows>(sums, in + patch_offset<T>(t.x, b.channel, place), t.x.row_pitch,
                           [&](int kh, int kw) { return b.weights[((kh * K + kw) << t.log_channels) + b.channel]; });
      store_patch<T, rows>(out + patch_offset<T>(t.out, b.channel, place), t.out.row_pitch, sums);
    }
    __syncthreads();
    b.move(c, c.out, t.out, t, out).template go<false>(at);
  }
}

// dw[kh][kw] += Σ dy[o][n] · x[o + kh][n + kw] and db += Σ dy over a patch; both pointers are to its first row of inputs.
template <class T, int K, int Rows>
__device__ __forceinline__ void correlate_patch(Accumulator<T> (&dw)[K * K], Accumulator<T>& db, const T* x,
                                                const T* dy, int pitch) {
  using A = Accumulator<T>;
  A grads[Rows][kDepthwiseColumns];
#pragma unroll
  for (int o = 0; o < Rows; ++o)
#pragma unroll
    for (int n = 0; n < kDepthwiseColumns; n += kPixelGroup<T>) {
      const auto pack = load_pack<T, kPixelGroup<T>>(dy + (o + K / 2) * pitch + kDepthwiseMargin + n);
#pragma unroll
      for (int j = 0; j < kPixelGroup<T>; ++j) {
        grads[o][n + j] = widen(pack.items[j]);
        db += grads[o][n + j];
      }
    }
#pragma unroll
  for (int i = 0; i < Rows + K - 1; ++i) {
    A row[kPatchInputs];
    load_inputs(row, x + i * pitch);
#pragma unroll
    for (int o = 0; o < Rows; ++o) {
      if (i - o < 0 || i - o >= K) continue;
#pragma unroll
      for (int kw = 0; kw < K; ++kw)
#pragma unroll
        for (int n = 0; n < kDepthwiseColumns; ++n)
          dw[(i - o) * K + kw] += grads[o][n] * row[n + kw + kDepthwiseMargin - K / 2];
    }
  }
}

// dx, and the block's sums for dweight and dbias; x and dy are read once.
template <class T, int K>
__global__ void __launch_bounds__(fma_threads(true), fma_resident(K, true))
    depthwise_fma_bwd(const DepthwiseCase<Accumulator<T>> c, const DepthwiseTile t) {
  using A = Accumulator<T>;
  constexpr int rows = patch_rows(K, true);
  SDP_DYNAMIC_SHARED(shared);
  const FmaBlock<T, K> b(shared, c, t, true);
  T *x = b.planes, *dy = x + t.x_elements, *dx = dy + t.grad_elements;
  clear_units(x, (t.x_elements + t.grad_elements) / kPackSize<T>);
  __syncthreads();  // margins are zero, parameters there
  const int patches = t.images * t.strips * t.blocks, step = blockDim.x >> t.log_channels;
  A dw[K * K] = {}, db = 0;
  for (int item = b.split; item < t.items; item += t.splits) {
    const DepthwiseItem at = item_at(t, item);
    b.move_x(c, t).template go<true>(at);
    b.move(c, c.grad, t.grad, t, dy).template go<true>(at);
    __syncthreads();
#pragma unroll 1
    for (int patch = threadIdx.x >> t.log_channels; patch < patches; patch += step) {
      const PatchPlace place = patch_at(t, patch, rows);
      const int from = patch_offset<T>(t.x, b.channel, place);  // dy lies alike
      correlate_patch<T, K, rows>(dw, db, x + from, dy + from, t.x.row_pitch);
      A sums[rows][kDepthwiseColumns] = {};
      convolve_patch<T, K, rows>(sums, dy + from, t.grad.row_pitch,
                           [&](int kh, int kw) { return b.weights[((kh * K + kw) << t.log_channels) + b.channel]; });
      store_patch<T, rows>(dx + patch_offset<T>(t.out, b.channel, place), t.out.row_pitch, sums);
    }
    __syncthreads();
    b.move(c, c.out, t.out, t, dx).template go<false>(at);
  }
  // Over the block's patches, a row of the kernel at a time, the bias last. x's and dy's planes are free now.
  A* sums = reinterpret_cast<A*>(x);  // (taps, threads)
  A* partial = c.partial + (int64_t(b.split) * c.channels + b.first_channel) * (K * K + 1);
#pragma unroll
  for (int kh = 0; kh <= K; ++kh) {
    const int taps = kh < K ? K : 1;
    if (kh > 0) __syncthreads();
#pragma unroll
    for (int kw = 0; kw < K; ++kw)
      if (kw < taps) sums[kw * blockDim.x + threadIdx.x] = kh < K ? dw[kh < K ? kh * K + kw : 0] : db;
    __syncthreads();
    for (int i = threadIdx.x; i < taps << t.log_channels; i += blockDim.x) {
      const int tap = i >> t.log_channels, channel = i & (t.channels - 1);
      A sum = 0;
      for (int k = channel; k < int(blockDim.x); k += t.channels) sum += sums[tap * blockDim.x + k];
      if (b.first_channel + channel < c.channels) partial[int64_t(channel) * (K * K + 1) + kh * K + tap] = sum;
    }
  }
}

}  // namespace sdp
