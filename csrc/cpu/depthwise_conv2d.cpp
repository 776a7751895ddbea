// Depthwise k×k convolution on the CPU: forward, and input, weight and bias gradient in one pass over the gradient.
//
// One channel group (a vector's lanes) of one strip of picture rows at a time: the strip is packed into an fp32 buffer
// (row, column, lane) with its zero border, so that layout, dtype, borders and a LayerNorm folded into the load all end
// there. The convolution itself sees one form: for each kernel row, a run of outputs is kept in registers while its inputs
// stream past, each loaded once for all the outputs it belongs to. The input gradient is the same with the filter turned
// by 180°. The weight gradient adds dy·x over the strip with one kernel row's sums in registers.
//
// Each sample block has its own partial weight gradient; blocks depend on the shape alone and are added in order.
#include "cpu/levels.h"
#include "cpu/simd.h"

namespace sdp {

// A picture (B, C, H, W), or the image rows of a token buffer, by strides in elements.
struct DepthwiseView {
  char* data = nullptr;
  int64_t batch = 0, channel = 0, row = 0, column = 0;
};

struct DepthwiseCase {
  int64_t channels, height, width;
  int kernel;
  int64_t strip;               // output rows per strip
  DepthwiseView x, y;          // forward: input and output; backward: y is dx
  DepthwiseView grad;          // backward
  const void *mean, *rstd;     // of the LayerNorm applied while loading x: (B, H, W) with strides below, or null
  int64_t statistics_batch;    // elements from one sample's statistics to the next; pixels lie in order
  const void *norm_weight, *norm_bias;  // accumulator type, (C,)
  const void* weight;          // accumulator type, (groups, k·k, lanes)
  const void* bias;            // accumulator type, (groups, lanes), or null
  void *dweight, *dbias;       // accumulator type, (groups, k·k, lanes) and (groups, lanes) of one block
};

struct DepthwiseTable {
  void (*forward[kDtypes])(const DepthwiseCase&, int64_t sample, int64_t group, void* scratch);
  void (*backward[kDtypes])(const DepthwiseCase&, int64_t sample, int64_t group, void* scratch);
  int64_t vector_bytes;
};
SDP_DECLARE_TABLE(DepthwiseTable, depthwise_table)

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

#define SDP_ALL_DTYPES(KERNEL) {KERNEL<double>, KERNEL<float>, KERNEL<BFloat16>, KERNEL<Float16>}
extern const DepthwiseTable depthwise_table = {SDP_ALL_DTYPES(forward), SDP_ALL_DTYPES(backward), kVectorBytes};

}  // namespace SDP_LEVEL_NAMESPACE
}  // namespace sdp

#if SDP_LEVEL == 0
#include <memory>
#include <optional>

#include "cpu/host.h"

namespace sdp {
namespace {

// The picture in a tensor: (B, C, H, W), or the rows of a token buffer (B, T, C) from `registers` on.
DepthwiseView view_of(const Tensor& t, int64_t registers, int64_t width) {
  char* data = const_cast<char*>(bytes(t));
  if (t.dim() == 4) return {data, t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
  data += registers * t.stride(1) * element_bytes(dtype_index(t));
  return {data, t.stride(0), t.stride(2), width * t.stride(1), t.stride(1)};
}

// (C, …) parameter with `taps` elements per channel as accumulator type (groups, taps, lanes), zero beyond C.
Scratch grouped(const Tensor& parameter, int64_t channels, int64_t taps, int64_t lanes, int dtype) {
  const int64_t groups = (channels + lanes - 1) / lanes, kernel = taps == 1 ? 1 : parameter.size(3);
  Scratch out(groups * taps * lanes * accumulator_bytes(dtype), true);
  const int64_t channel = parameter.stride(0), row = taps == 1 ? 0 : parameter.stride(2);
  const int64_t column = taps == 1 ? 0 : parameter.stride(3);
  with_data(parameter, [&](const auto* p) {
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t tap = 0; tap < taps; ++tap) {
        const int64_t offset = c * channel + tap / kernel * row + tap % kernel * column;
        out.write(((c / lanes) * taps + tap) * lanes + c % lanes, static_cast<double>(p[offset]), dtype);
      }
  });
  return out;
}

// What forward and backward share: shapes, strips, threads.
struct DepthwisePlan {
  DepthwiseCase c{};
  int dtype;
  int64_t batch, lanes, groups, buffer_bytes;

  DepthwisePlan(const Tensor& x, const Tensor& weight, const std::vector<int64_t>& grid, int64_t vector_bytes)
      : dtype(dtype_index(x)), batch(x.size(0)) {
    const bool picture = x.dim() == 4;
    c.channels = x.size(picture ? 1 : 2);
    c.height = picture ? x.size(2) : grid[0];
    c.width = picture ? x.size(3) : grid[1];
    c.kernel = static_cast<int>(weight.size(3));
    lanes = vector_bytes / accumulator_bytes(dtype);
    groups = (c.channels + lanes - 1) / lanes;
    const int64_t border = c.kernel / 2, row_bytes = (c.width + 2 * border) * vector_bytes;
    constexpr int64_t kStripBytes = 96 * 1024;  // well inside a level-2 cache; a whole 28×28 picture
    c.strip = std::min(c.height, std::max<int64_t>(4, kStripBytes / row_bytes - 2 * border));
    buffer_bytes = (c.strip + 2 * border) * row_bytes;
  }
  int64_t row_bytes(int64_t vector_bytes) const { return c.width * vector_bytes; }

  // LayerNorm to apply while loading x; its parameters are held here.
  Scratch norm_weight, norm_bias;
  void fold(const std::optional<Tensor>& mean, const std::optional<Tensor>& rstd, const std::optional<Tensor>& weight,
            const std::optional<Tensor>& bias, int64_t registers, bool picture) {
    if (!mean) return;
    STD_TORCH_CHECK(mean->is_contiguous() && rstd->is_contiguous(), "depthwise_conv2d: statistics must be contiguous");
    const int64_t skipped = picture ? 0 : registers;
    c.mean = bytes(*mean) + skipped * accumulator_bytes(dtype);
    c.rstd = bytes(*rstd) + skipped * accumulator_bytes(dtype);
    c.statistics_batch = mean->stride(0);
    norm_weight = widened(*weight, dtype), norm_bias = widened(*bias, dtype);
    c.norm_weight = norm_weight.get(), c.norm_bias = norm_bias.get();
  }
};

Tensor depthwise_conv2d_fwd(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                            std::vector<int64_t> grid, int64_t registers, const std::optional<Tensor>& mean,
                            const std::optional<Tensor>& rstd, const std::optional<Tensor>& norm_weight,
                            const std::optional<Tensor>& norm_bias) {
  Tensor y = torch::stable::empty_like(x);
  zero_registers(y, registers);
  if (x.numel() == 0) return y;
  const DepthwiseTable& table = SDP_ACTIVE_TABLE(depthwise_table);
  DepthwisePlan plan(x, weight, grid, table.vector_bytes);
  plan.fold(mean, rstd, norm_weight, norm_bias, registers, x.dim() == 4);
  DepthwiseCase& c = plan.c;
  c.x = view_of(x, registers, c.width), c.y = view_of(y, registers, c.width);
  const Scratch wide = grouped(weight, c.channels, c.kernel * c.kernel, plan.lanes, plan.dtype);
  const Scratch start = bias ? grouped(*bias, c.channels, 1, plan.lanes, plan.dtype) : Scratch();
  c.weight = wide.get(), c.bias = start.get();
  parallel(plan.batch * plan.groups, c.height * c.width * plan.lanes * 4, [&](int64_t begin, int64_t end) {
    const Scratch scratch(plan.buffer_bytes + plan.row_bytes(table.vector_bytes));
    for (int64_t i = begin; i < end; ++i)
      table.forward[plan.dtype](c, i / plan.groups, i % plan.groups, scratch.get());
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> depthwise_conv2d_bwd(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                                        std::vector<int64_t> grid, int64_t registers,
                                                        const std::optional<Tensor>& mean,
                                                        const std::optional<Tensor>& rstd,
                                                        const std::optional<Tensor>& norm_weight,
                                                        const std::optional<Tensor>& norm_bias) {
  STD_TORCH_CHECK(grad.scalar_type() == x.scalar_type(), "depthwise_conv2d_bwd: grad must have x's dtype");
  Tensor dx = torch::stable::empty_like(x);
  zero_registers(dx, registers);
  const DepthwiseTable& table = SDP_ACTIVE_TABLE(depthwise_table);
  DepthwisePlan plan(x, weight, grid, table.vector_bytes);
  plan.fold(mean, rstd, norm_weight, norm_bias, registers, x.dim() == 4);
  const DepthwiseCase& c = plan.c;
  const int64_t taps = c.kernel * c.kernel;
  plan.c.x = view_of(x, registers, c.width), plan.c.y = view_of(dx, registers, c.width);
  plan.c.grad = view_of(grad, registers, c.width);
  const Scratch wide = grouped(weight, c.channels, taps, plan.lanes, plan.dtype);
  plan.c.weight = wide.get();

  constexpr int64_t kBlocks = 16;
  const int64_t per_block = std::max<int64_t>(1, (plan.batch + kBlocks - 1) / kBlocks);
  const int64_t blocks = (plan.batch + per_block - 1) / per_block;
  const int64_t dw_bytes = plan.groups * taps * table.vector_bytes, db_bytes = plan.groups * table.vector_bytes;
  const Scratch dweight(blocks * dw_bytes, true), dbias(blocks * db_bytes, true);
  if (x.numel() != 0) {
    parallel(blocks * plan.groups, per_block * c.height * c.width * plan.lanes * 8, [&](int64_t begin, int64_t end) {
      const Scratch scratch(2 * plan.buffer_bytes + plan.row_bytes(table.vector_bytes));
      for (int64_t i = begin; i < end; ++i) {
        const int64_t block = i / plan.groups;
        DepthwiseCase mine = c;
        mine.dweight = static_cast<char*>(dweight.get()) + block * dw_bytes;
        mine.dbias = static_cast<char*>(dbias.get()) + block * db_bytes;
        for (int64_t sample = block * per_block; sample < std::min(plan.batch, (block + 1) * per_block); ++sample)
          table.backward[plan.dtype](mine, sample, i % plan.groups, scratch.get());
      }
    });
  }
  Tensor dw = torch::stable::new_empty(weight, {c.channels, 1, c.kernel, c.kernel});
  Tensor db = torch::stable::new_empty(weight, {c.channels});
  const std::vector<double> dw_sums = block_sums(dweight, blocks, plan.groups * taps * plan.lanes, plan.dtype);
  const std::vector<double> db_sums = block_sums(dbias, blocks, plan.groups * plan.lanes, plan.dtype);
  std::vector<double> in_order(c.channels * taps);
  for (int64_t ch = 0; ch < c.channels; ++ch)
    for (int64_t tap = 0; tap < taps; ++tap)
      in_order[ch * taps + tap] = dw_sums[((ch / plan.lanes) * taps + tap) * plan.lanes + ch % plan.lanes];
  write_rounded(dw, in_order);
  write_rounded(db, {db_sums.begin(), db_sums.begin() + c.channels});
  return {dx, dw, db};
}

}  // namespace
}  // namespace sdp

STABLE_TORCH_LIBRARY_IMPL(sdp_kernels_cpp, CPU, m) {
  m.impl("depthwise_conv2d_fwd", TORCH_BOX(&sdp::depthwise_conv2d_fwd));
  m.impl("depthwise_conv2d_bwd", TORCH_BOX(&sdp::depthwise_conv2d_bwd));
}
#endif
