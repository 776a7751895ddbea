// One channel group (a vector's lanes) of one strip of picture rows at a time: the strip is packed into an fp32 buffer
// (row, column, lane) with its zero border, so that layout, dtype, borders and a LayerNorm folded into the load all end
// there. The convolution itself sees one form: for each kernel row, a run of outputs is kept in registers while its inputs
// stream past, each loaded once for all the outputs it belongs to. The input gradient is the same with the filter turned
// by 180°. The weight gradient adds dy·x over the strip with one kernel row's sums in registers.
#pragma once
#include "cpu/depthwise_conv2d_case.h"

namespace sdp {
namespace SDP_LEVEL_NAMESPACE {

template <class T>
inline T* at(const DepthwiseView& view, int64_t sample, int64_t channel, int64_t row, int64_t column) {
  return reinterpret_cast<T*>(view.data) + sample * view.batch + channel * view.channel + row * view.row +
         column * view.column;
}

// Rows [first, last) of a channel group into packed[(row − first), border + column, lane]; rows and columns outside the
// picture are zero. With a norm, what is packed is (x − mean)·rstd·weight + bias, rounded as a tensor of T would be.
template <class T>
void pack(const DepthwiseCase& c, const DepthwiseView& view, bool normed, int64_t sample, int64_t group, int64_t first,
          int64_t last, int border, Vector<T>* packed) {
  using A = Accumulator<T>;
  using V = Vector<T>;
  constexpr int lanes = kLanes<T>;
  const int64_t channel = group * lanes, padded = c.width + 2 * border;
  const int count = c.channels - channel < lanes ? int(c.channels - channel) : lanes;
  V scale{}, shift{};
  if (normed) {
    scale = load_part(static_cast<const A*>(c.norm_weight) + channel, count);
    shift = load_part(static_cast<const A*>(c.norm_bias) + channel, count);
  }
  for (int64_t row = first; row < last; ++row, packed += padded) {
    if (row < 0 || row >= c.height) {
      for (int64_t i = 0; i < padded; ++i) packed[i] = V{};
      continue;
    }
    for (int i = 0; i < border; ++i) packed[i] = packed[padded - 1 - i] = V{};
    V* out = packed + border;
    const T* from = at<T>(view, sample, channel, row, 0);
    if (view.channel == 1 && count == lanes) {
      for (int64_t column = 0; column < c.width; ++column) out[column] = load(from + column * view.column);
    } else if (view.column == 1 && view.channel != 1) {  // lanes down, columns across: a block at a time
      for (int64_t column = 0; column < c.width; column += lanes) {
        const int across = c.width - column < lanes ? int(c.width - column) : lanes;
        V block[lanes] = {};
        for (int lane = 0; lane < count; ++lane) {
          const T* source = from + lane * view.channel + column;
          block[lane] = across == lanes ? load(source) : load_part(source, across);
        }
        transpose(block);
        for (int i = 0; i < across; ++i) out[column + i] = block[i];
      }
    } else {
      for (int64_t column = 0; column < c.width; ++column)
        out[column] = load_part(from + column * view.column, count, view.channel);
    }
    if (normed) {
      const int64_t place = sample * c.statistics_batch + row * c.width;
      const A *mean = static_cast<const A*>(c.mean) + place, *rstd = static_cast<const A*>(c.rstd) + place;
      for (int64_t column = 0; column < c.width; ++column)
        out[column] = rounded<T>((out[column] - mean[column]) * rstd[column] * scale + shift);
    }
  }
}

// One row of packed results to a tensor.
template <class T>
void unpack(const DepthwiseCase& c, const DepthwiseView& view, int64_t sample, int64_t group, int64_t row,
            const Vector<T>* packed) {
  constexpr int lanes = kLanes<T>;
  const int64_t channel = group * lanes;
  const int count = c.channels - channel < lanes ? int(c.channels - channel) : lanes;
  T* to = at<T>(view, sample, channel, row, 0);
  if (view.channel == 1 && count == lanes) {
    for (int64_t column = 0; column < c.width; ++column) store(to + column * view.column, packed[column]);
  } else if (view.column == 1 && view.channel != 1) {
    for (int64_t column = 0; column < c.width; column += lanes) {
      const int across = c.width - column < lanes ? int(c.width - column) : lanes;
      Vector<T> block[lanes] = {};
      for (int i = 0; i < across; ++i) block[i] = packed[column + i];
      transpose(block);
      for (int lane = 0; lane < count; ++lane) {
        T* target = to + lane * view.channel + column;
        across == lanes ? store(target, block[lane]) : store_part(target, block[lane], across);
      }
    }
  } else {
    for (int64_t column = 0; column < c.width; ++column)
      store_part(to + column * view.column, packed[column], count, view.channel);
  }
}

// P neighbouring outputs of one row: `in` points at the first one's top left input, packed rows `pitch` apart.
template <class V, int K, int P>
inline __attribute__((always_inline)) void convolve(const V* in, int64_t pitch, const V* weight, V start, V* out) {
  V sums[P];
  for (int p = 0; p < P; ++p) sums[p] = start;
  for (int kh = 0; kh < K; ++kh, in += pitch, weight += K) {
#pragma GCC unroll 32
    for (int j = 0; j < P + K - 1; ++j) {
      const V value = in[j];
#pragma GCC unroll 16
      for (int kw = 0; kw < K; ++kw) {
        const int p = j - kw;
        if (p >= 0 && p < P) sums[p] += value * weight[kw];
      }
    }
  }
  for (int p = 0; p < P; ++p) out[p] = sums[p];
}

// Outputs per run: as many as the level's registers hold beside a kernel row, 32 in AVX-512 and 16 below.
constexpr int kRun = SDP_LEVEL == 2 ? 14 : 7;

template <class V, int K>
void convolve_row(const V* in, int64_t pitch, const V* weight, V start, V* out, int64_t width) {
  int64_t i = 0;
  if (width % 16 == 0 && SDP_LEVEL == 2)
    for (; i + 16 <= width; i += 16) convolve<V, K, 16>(in + i, pitch, weight, start, out + i);
  for (; i + kRun <= width; i += kRun) convolve<V, K, kRun>(in + i, pitch, weight, start, out + i);
  for (; i + 4 <= width; i += 4) convolve<V, K, 4>(in + i, pitch, weight, start, out + i);
  for (; i < width; ++i) convolve<V, K, 1>(in + i, pitch, weight, start, out + i);
}

// dw[kh, kw] += Σ over the strip of dy[row, column] · x[row + kh, column + kw], all packed.
template <class V, int K>
void correlate(const V* x, int64_t x_pitch, const V* dy, int64_t dy_pitch, int64_t rows, int64_t width, V* dw) {
  constexpr int P = 4;
  for (int kh = 0; kh < K; ++kh) {
    V sums[K];
    for (int kw = 0; kw < K; ++kw) sums[kw] = dw[kh * K + kw];
    for (int64_t row = 0; row < rows; ++row) {
      const V *in = x + (row + kh) * x_pitch, *grad = dy + row * dy_pitch;
      int64_t i = 0;
      for (; i + P <= width; i += P) {
        V g[P];
        for (int p = 0; p < P; ++p) g[p] = grad[i + p];
#pragma GCC unroll 32
        for (int j = 0; j < P + K - 1; ++j) {
          const V value = in[i + j];
#pragma GCC unroll 16
          for (int p = 0; p < P; ++p)
            if (j - p >= 0 && j - p < K) sums[j - p] += value * g[p];
        }
      }
      for (; i < width; ++i)
        for (int kw = 0; kw < K; ++kw) sums[kw] += in[i + kw] * grad[i];
    }
    for (int kw = 0; kw < K; ++kw) dw[kh * K + kw] = sums[kw];
  }
}

template <class T, int K>
void forward_kernel(const DepthwiseCase& c, int64_t sample, int64_t group, void* scratch) {
  using V = Vector<T>;
  constexpr int border = K / 2;
  const int64_t pitch = c.width + 2 * border;
  V *in = static_cast<V*>(scratch), *out = in + (c.strip + 2 * border) * pitch;
  const V* weight = static_cast<const V*>(c.weight) + group * K * K;
  const V bias = c.bias == nullptr ? V{} : static_cast<const V*>(c.bias)[group];
  for (int64_t first = 0; first < c.height; first += c.strip) {
    const int64_t last = first + c.strip < c.height ? first + c.strip : c.height;
    pack<T>(c, c.x, c.mean != nullptr, sample, group, first - border, last + border, border, in);
    for (int64_t row = first; row < last; ++row) {
      convolve_row<V, K>(in + (row - first) * pitch, pitch, weight, bias, out, c.width);
      unpack<T>(c, c.y, sample, group, row, out);
    }
  }
}

template <class T, int K>
void backward_kernel(const DepthwiseCase& c, int64_t sample, int64_t group, void* scratch) {
  using V = Vector<T>;
  constexpr int border = K / 2;
  const int64_t pitch = c.width + 2 * border, size = (c.strip + 2 * border) * pitch;
  V *in = static_cast<V*>(scratch), *grad = in + size, *out = grad + size;
  V turned[K * K];
  for (int i = 0; i < K * K; ++i) turned[i] = static_cast<const V*>(c.weight)[group * K * K + K * K - 1 - i];
  V *dw = static_cast<V*>(c.dweight) + group * K * K, *db = static_cast<V*>(c.dbias) + group;
  for (int64_t first = 0; first < c.height; first += c.strip) {
    const int64_t last = first + c.strip < c.height ? first + c.strip : c.height;
    pack<T>(c, c.grad, false, sample, group, first - border, last + border, border, grad);
    pack<T>(c, c.x, c.mean != nullptr, sample, group, first - border, last + border, border, in);
    const V* inner = grad + border * pitch + border;
    for (int64_t row = first; row < last; ++row) {
      convolve_row<V, K>(grad + (row - first) * pitch, pitch, turned, V{}, out, c.width);
      unpack<T>(c, c.y, sample, group, row, out);
      V sum{};
      for (int64_t column = 0; column < c.width; ++column) sum += inner[(row - first) * pitch + column];
      *db += sum;
    }
    correlate<V, K>(in, pitch, inner, pitch, last - first, c.width, dw);
  }
}

template <class T>
void forward(const DepthwiseCase& c, int64_t sample, int64_t group, void* scratch) {
  switch (c.kernel) {
    case 3: return forward_kernel<T, 3>(c, sample, group, scratch);
    case 5: return forward_kernel<T, 5>(c, sample, group, scratch);
    case 7: return forward_kernel<T, 7>(c, sample, group, scratch);
    case 9: return forward_kernel<T, 9>(c, sample, group, scratch);
  }
}

template <class T>
void backward(const DepthwiseCase& c, int64_t sample, int64_t group, void* scratch) {
  switch (c.kernel) {
    case 3: return backward_kernel<T, 3>(c, sample, group, scratch);
    case 5: return backward_kernel<T, 5>(c, sample, group, scratch);
    case 7: return backward_kernel<T, 7>(c, sample, group, scratch);
    case 9: return backward_kernel<T, 9>(c, sample, group, scratch);
  }
}

}  // namespace SDP_LEVEL_NAMESPACE
}  // namespace sdp
