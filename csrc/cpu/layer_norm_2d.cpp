// LayerNorm over the channels, forward and backward on the CPU, optionally fused with the residual add before it.
//
// Two shapes of loop. Rows: channels lie next to each other (channels_last, token buffers); one pixel at a time, lanes
// over channels. Columns: pixels lie next to each other (contiguous NCHW); a tile of kTilePixels<T> pixels is read once into a
// packed fp32 buffer, lanes over pixels. Tensors whose strides don't suit are read lane by lane, never copied as a whole.
//
// Weight gradients: the pixels are cut into blocks that depend on the shape alone; each block sums in order into its own
// row of partial sums, and the rows are added in order. So they are bitwise equal for any number of threads.
#include "cpu/levels.h"
#include "cpu/simd.h"

namespace sdp {

// A tensor (B, C, H, W) by strides in elements; a token buffer (B, T, C) has H = 1, W = T.
struct PictureView {
  char* data = nullptr;
  int64_t batch = 0, channel = 0, row = 0, column = 0;
};

struct LayerNormCase {
  int64_t channels, width, pixels, registers;  // pixels per sample, `width` of them per picture row
  double eps;
  PictureView x, residual, y, sum;             // forward: residual and sum may be null
  PictureView grad, grad_sum, dx;              // backward: grad_sum may be null
  void *weight, *bias;                         // accumulator type, (C,)
  void *mean, *rstd;                           // accumulator type, (B, pixels)
  void *dweight, *dbias;                       // accumulator type, one row of C partial sums per block
};

struct LayerNormTable {
  void (*forward_rows[kDtypes])(const LayerNormCase&, int64_t sample, int64_t begin, int64_t end);
  void (*forward_columns[kDtypes])(const LayerNormCase&, int64_t sample, int64_t begin, int64_t end, void* scratch);
  void (*backward_rows[kDtypes])(const LayerNormCase&, int64_t sample, int64_t begin, int64_t end, int64_t block);
  void (*backward_columns[kDtypes])(const LayerNormCase&, int64_t sample, int64_t begin, int64_t end, int64_t block,
                                    void* scratch);
  int64_t tile_bytes;  // accumulators of one channel's pixels in a tile
};
SDP_DECLARE_TABLE(LayerNormTable, layer_norm_table)

namespace SDP_LEVEL_NAMESPACE {

constexpr int kTileVectors = 4;

template <class T>
inline T* at(const PictureView& view, const LayerNormCase& c, int64_t sample, int64_t pixel) {
  return reinterpret_cast<T*>(view.data) + sample * view.batch + pixel / c.width * view.row +
         pixel % c.width * view.column;
}

// ---- rows ------------------------------------------------------------------------------------------------------------
//
// kRows pixels side by side: their sums are independent chains, and weights and partial sums are loaded once for all of
// them. A row's own order of additions is the same for one row as for kRows, so a pixel's result does not depend on its place.

constexpr int kRows = 4;

// Lanes of channels [i, i + count); Unit: the channels are known to lie next to each other.
template <bool Unit, class T>
inline Vector<T> get(const T* p, int64_t stride, int64_t i, int count) {
  if (Unit || stride == 1) return count == kLanes<T> ? load(p + i) : load_part(p + i, count);
  return load_part(p + i * stride, count, stride);
}
template <bool Unit, class T>
inline void put(T* p, int64_t stride, int64_t i, Vector<T> v, int count) {
  if (Unit || stride == 1) return count == kLanes<T> ? store(p + i, v) : store_part(p + i, v, count);
  store_part(p + i * stride, v, count, stride);
}

// Calls body(first channel, lanes in use) along C; the inlined body sees a constant in all calls but the last.
template <class T, class Body>
inline __attribute__((always_inline)) void along_channels(int64_t channels, const Body& body) {
  constexpr int lanes = kLanes<T>;
  int64_t i = 0;
  for (; i + lanes <= channels; i += lanes) body(i, lanes);
  if (i < channels) body(i, int(channels - i));
}

// Lanes beyond `count` set to zero.
template <class T>
inline Vector<T> first_lanes(Vector<T> v, int count) {
  for (int i = count; i < kLanes<T>; ++i) v[i] = 0;
  return v;
}

// One tensor's rows of kRows (or one) neighbouring pixels.
template <class T, int R>
struct RowPointers {
  T* row[R];
  int64_t channel;
  RowPointers(const PictureView& view, const LayerNormCase& c, int64_t sample, int64_t pixel) : channel(view.channel) {
    for (int r = 0; r < R; ++r) row[r] = view.data == nullptr ? nullptr : at<T>(view, c, sample, pixel + r);
  }
  // Asks for row r of the next group while this one is being worked on: processors don't see that far ahead themselves.
  void prefetch_next(int r, int64_t i) const {
    if constexpr (R > 1) prefetch(row[r] + R * (row[1] - row[0]) + i);
  }
};

template <class T, int R, bool Unit>
inline void forward_group(const LayerNormCase& c, int64_t sample, int64_t pixel) {
  using A = Accumulator<T>;
  using V = Vector<T>;
  const A *weight = static_cast<const A*>(c.weight), *bias = static_cast<const A*>(c.bias);
  RowPointers<T, R> x(c.x, c, sample, pixel);
  const RowPointers<T, R> y(c.y, c, sample, pixel);
  V total[R] = {}, squares[R] = {};
  if (c.residual.data != nullptr) {
    const RowPointers<T, R> residual(c.residual, c, sample, pixel), sum(c.sum, c, sample, pixel);
    along_channels<T>(c.channels, [&](int64_t i, int count) {
      for (int r = 0; r < R; ++r) {
        const V added = get<Unit>(x.row[r], x.channel, i, count) + get<Unit>(residual.row[r], residual.channel, i, count);
        put<Unit>(sum.row[r], sum.channel, i, added, count);
        total[r] += rounded<T>(added);  // what backward will see
      }
    });
    x = sum;
  } else {
    along_channels<T>(c.channels, [&](int64_t i, int count) {
      for (int r = 0; r < R; ++r) total[r] += get<Unit>(x.row[r], x.channel, i, count);
    });
  }
  A mean[R], rstd[R];
  for (int r = 0; r < R; ++r) mean[r] = horizontal_sum(total[r]) / A(c.channels);
  along_channels<T>(c.channels, [&](int64_t i, int count) {
    for (int r = 0; r < R; ++r) {
      x.prefetch_next(r, i);
      V centred = get<Unit>(x.row[r], x.channel, i, count) - mean[r];
      if (count < kLanes<T>) centred = first_lanes<T>(centred, count);
      squares[r] += centred * centred;
    }
  });
  for (int r = 0; r < R; ++r) rstd[r] = A(1) / __builtin_sqrt(horizontal_sum(squares[r]) / A(c.channels) + A(c.eps));
  along_channels<T>(c.channels, [&](int64_t i, int count) {
    const V w = get<true>(weight, 1, i, count), b = get<true>(bias, 1, i, count);
    for (int r = 0; r < R; ++r) {
      const V unit = (get<Unit>(x.row[r], x.channel, i, count) - mean[r]) * rstd[r];
      put<Unit>(y.row[r], y.channel, i, unit * w + b, count);
    }
  });
  for (int r = 0; r < R; ++r) {
    static_cast<A*>(c.mean)[sample * c.pixels + pixel + r] = mean[r];
    static_cast<A*>(c.rstd)[sample * c.pixels + pixel + r] = rstd[r];
  }
}

// A register row: sum as usual, y = 0 and no statistics.
template <class T>
inline void forward_register(const LayerNormCase& c, int64_t sample, int64_t pixel) {
  const RowPointers<T, 1> x(c.x, c, sample, pixel), residual(c.residual, c, sample, pixel), sum(c.sum, c, sample, pixel),
      y(c.y, c, sample, pixel);
  along_channels<T>(c.channels, [&](int64_t i, int count) {
    if (c.residual.data != nullptr)
      put<false>(sum.row[0], sum.channel, i,
                 get<false>(x.row[0], x.channel, i, count) + get<false>(residual.row[0], residual.channel, i, count), count);
    put<false>(y.row[0], y.channel, i, Vector<T>{}, count);
  });
  static_cast<Accumulator<T>*>(c.mean)[sample * c.pixels + pixel] = 0;
  static_cast<Accumulator<T>*>(c.rstd)[sample * c.pixels + pixel] = 0;
}

inline bool unit_or_absent(const PictureView& view) { return view.data == nullptr || view.channel == 1; }

template <class T>
void forward_rows(const LayerNormCase& c, int64_t sample, int64_t pixel, int64_t end) {
  for (; pixel < end && pixel < c.registers; ++pixel) forward_register<T>(c, sample, pixel);
  const bool unit = unit_or_absent(c.x) && unit_or_absent(c.residual) && unit_or_absent(c.sum) && unit_or_absent(c.y);
  for (; unit && pixel + kRows <= end; pixel += kRows) forward_group<T, kRows, true>(c, sample, pixel);
  for (; pixel < end; ++pixel)
    unit ? forward_group<T, 1, true>(c, sample, pixel) : forward_group<T, 1, false>(c, sample, pixel);
}

// Adds is a constant so that every instance of this group rounds alike: a branch around the last addition would let the
// compiler fuse it with the multiplication in one instance and not in another.
template <class T, int R, bool Unit, bool Adds>
inline void backward_group(const LayerNormCase& c, int64_t sample, int64_t pixel, int64_t block) {
  using A = Accumulator<T>;
  using V = Vector<T>;
  const A* weight = static_cast<const A*>(c.weight);
  A *dweight = static_cast<A*>(c.dweight) + block * c.channels, *dbias = static_cast<A*>(c.dbias) + block * c.channels;
  const RowPointers<T, R> x(c.x, c, sample, pixel), grad(c.grad, c, sample, pixel), grad_sum(c.grad_sum, c, sample, pixel),
      dx(c.dx, c, sample, pixel);
  A mean[R], rstd[R], scaled_mean[R], product_mean[R];
  for (int r = 0; r < R; ++r) {
    mean[r] = static_cast<const A*>(c.mean)[sample * c.pixels + pixel + r];
    rstd[r] = static_cast<const A*>(c.rstd)[sample * c.pixels + pixel + r];
  }
  V scaled_total[R] = {}, product_total[R] = {};
  along_channels<T>(c.channels, [&](int64_t i, int count) {
    const V w = get<true>(weight, 1, i, count);
    V dw = get<true>(dweight, 1, i, count), db = get<true>(dbias, 1, i, count);
    for (int r = 0; r < R; ++r) {
      const V dy = get<Unit>(grad.row[r], grad.channel, i, count);
      V unit = (get<Unit>(x.row[r], x.channel, i, count) - mean[r]) * rstd[r];
      if (count < kLanes<T>) unit = first_lanes<T>(unit, count);
      const V scaled = dy * w;
      scaled_total[r] += scaled;
      product_total[r] += scaled * unit;
      dw += dy * unit;
      db += dy;
    }
    put<true>(dweight, 1, i, dw, count);
    put<true>(dbias, 1, i, db, count);
  });
  for (int r = 0; r < R; ++r) {
    scaled_mean[r] = horizontal_sum(scaled_total[r]) / A(c.channels);
    product_mean[r] = horizontal_sum(product_total[r]) / A(c.channels);
  }
  along_channels<T>(c.channels, [&](int64_t i, int count) {
    const V w = get<true>(weight, 1, i, count);
    for (int r = 0; r < R; ++r) {
      x.prefetch_next(r, i);
      grad.prefetch_next(r, i);
      const V unit = (get<Unit>(x.row[r], x.channel, i, count) - mean[r]) * rstd[r];
      V out = (get<Unit>(grad.row[r], grad.channel, i, count) * w - scaled_mean[r] - unit * product_mean[r]) * rstd[r];
      if constexpr (Adds) out += get<Unit>(grad_sum.row[r], grad_sum.channel, i, count);
      put<Unit>(dx.row[r], dx.channel, i, out, count);
    }
  });
}

template <class T>
inline void backward_register(const LayerNormCase& c, int64_t sample, int64_t pixel) {
  const RowPointers<T, 1> grad_sum(c.grad_sum, c, sample, pixel), dx(c.dx, c, sample, pixel);
  along_channels<T>(c.channels, [&](int64_t i, int count) {
    const bool adds = c.grad_sum.data != nullptr;
    put<false>(dx.row[0], dx.channel, i, adds ? get<false>(grad_sum.row[0], grad_sum.channel, i, count) : Vector<T>{},
               count);
  });
}

template <class T, bool Adds>
void backward_pixels(const LayerNormCase& c, int64_t sample, int64_t pixel, int64_t end, int64_t block) {
  const bool unit = unit_or_absent(c.x) && unit_or_absent(c.grad) && unit_or_absent(c.grad_sum) && unit_or_absent(c.dx);
  for (; unit && pixel + kRows <= end; pixel += kRows) backward_group<T, kRows, true, Adds>(c, sample, pixel, block);
  for (; pixel < end; ++pixel)
    unit ? backward_group<T, 1, true, Adds>(c, sample, pixel, block) : backward_group<T, 1, false, Adds>(c, sample, pixel, block);
}

template <class T>
void backward_rows(const LayerNormCase& c, int64_t sample, int64_t pixel, int64_t end, int64_t block) {
  for (; pixel < end && pixel < c.registers; ++pixel) backward_register<T>(c, sample, pixel);
  c.grad_sum.data != nullptr ? backward_pixels<T, true>(c, sample, pixel, end, block)
                             : backward_pixels<T, false>(c, sample, pixel, end, block);
}

// ---- columns ---------------------------------------------------------------------------------------------------------

// Pixels [first, first + count) of a sample in one tensor: `base` at channel 0, lanes `stride` apart within a picture row.
template <class T>
struct Column {
  T* pointer[kTileVectors];     // of each vector of pixels
  int64_t stride, channel;
  bool split;                   // a vector may cross picture rows that are not evenly spaced: see `offset`
  int64_t offset[kTileVectors * kLanes<T>];

  Column(const PictureView& view, const LayerNormCase& c, int64_t sample, int64_t first, int count)
      : stride(view.column), channel(view.channel), split(view.row != c.width * view.column) {
    T* origin = at<T>(view, c, sample, first);
    for (int i = 0; i < count && split; ++i) offset[i] = at<T>(view, c, sample, first + i) - origin;
    for (int v = 0; v < kTileVectors; ++v) pointer[v] = split ? origin : origin + v * kLanes<T> * stride;
  }
  Vector<T> get(int64_t ch, int v, int count) const {
    const T* p = pointer[v] + ch * channel;
    if (split) {
      T lanes[kLanes<T>] = {};
      for (int i = 0; i < count; ++i) lanes[i] = p[offset[v * kLanes<T> + i]];
      return load(lanes);
    }
    return stride == 1 && count == kLanes<T> ? load(p) : load_part(p, count, stride);
  }
  void put(int64_t ch, int v, Vector<T> value, int count) const {
    T* p = pointer[v] + ch * channel;
    if (split) {
      T lanes[kLanes<T>];
      store(lanes, value);
      for (int i = 0; i < count; ++i) p[offset[v * kLanes<T> + i]] = lanes[i];
    } else if (stride == 1 && count == kLanes<T>) {
      store(p, value);
    } else {
      store_part(p, value, count, stride);
    }
  }
};

// Calls body(v, lanes in use) for each vector of a tile; a full tile's loop is unrolled.
template <class T, class Body>
inline void along_tile(int count, const Body& body) {
  constexpr int lanes = kLanes<T>;
  if (count == kTileVectors * lanes) {
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) body(v, lanes);
  } else {
    for (int v = 0; v * lanes < count; ++v) body(v, count - v * lanes < lanes ? count - v * lanes : lanes);
  }
}

template <class T>
void forward_columns(const LayerNormCase& c, int64_t sample, int64_t first, int64_t end, void* scratch) {
  using A = Accumulator<T>;
  using V = Vector<T>;
  const int count = int(end - first);
  const A *weight = static_cast<const A*>(c.weight), *bias = static_cast<const A*>(c.bias);
  V* tile = static_cast<V*>(scratch);  // (C, kTileVectors)
  const Column<T> x(c.x, c, sample, first, count), y(c.y, c, sample, first, count);
  V mean[kTileVectors] = {}, rstd[kTileVectors] = {};
  if (c.residual.data != nullptr) {
    const Column<T> residual(c.residual, c, sample, first, count), sum(c.sum, c, sample, first, count);
    for (int64_t ch = 0; ch < c.channels; ++ch)
      along_tile<T>(count, [&](int v, int lanes) {
        const V added = x.get(ch, v, lanes) + residual.get(ch, v, lanes);
        sum.put(ch, v, added, lanes);
        mean[v] += tile[ch * kTileVectors + v] = rounded<T>(added);  // what backward will see
      });
  } else {
    for (int64_t ch = 0; ch < c.channels; ++ch)
      along_tile<T>(count, [&](int v, int lanes) { mean[v] += tile[ch * kTileVectors + v] = x.get(ch, v, lanes); });
  }
  for (V& m : mean) m /= A(c.channels);
  for (int64_t ch = 0; ch < c.channels; ++ch)
    along_tile<T>(count, [&](int v, int) {
      const V centred = tile[ch * kTileVectors + v] - mean[v];
      rstd[v] += centred * centred;
    });
  A *means = static_cast<A*>(c.mean) + sample * c.pixels + first;
  A* rstds = static_cast<A*>(c.rstd) + sample * c.pixels + first;
  along_tile<T>(count, [&](int v, int lanes) {
    for (int i = 0; i < kLanes<T>; ++i) rstd[v][i] = A(1) / __builtin_sqrt(rstd[v][i] / A(c.channels) + A(c.eps));
    store_part(means + v * kLanes<T>, mean[v], lanes);
    store_part(rstds + v * kLanes<T>, rstd[v], lanes);
  });
  for (int64_t ch = 0; ch < c.channels; ++ch)
    along_tile<T>(count, [&](int v, int lanes) {
      y.put(ch, v, (tile[ch * kTileVectors + v] - mean[v]) * rstd[v] * weight[ch] + bias[ch], lanes);
    });
}

template <class T>
void backward_columns(const LayerNormCase& c, int64_t sample, int64_t first, int64_t end, int64_t block,
                      void* scratch) {
  using A = Accumulator<T>;
  using V = Vector<T>;
  const int count = int(end - first);
  const A* weight = static_cast<const A*>(c.weight);
  A *dweight = static_cast<A*>(c.dweight) + block * c.channels, *dbias = static_cast<A*>(c.dbias) + block * c.channels;
  V *units = static_cast<V*>(scratch), *scaleds = units + c.channels * kTileVectors;  // each (C, kTileVectors)
  const Column<T> x(c.x, c, sample, first, count), grad(c.grad, c, sample, first, count), dx(c.dx, c, sample, first, count);
  V mean[kTileVectors] = {}, rstd[kTileVectors] = {}, scaled_mean[kTileVectors] = {}, product_mean[kTileVectors] = {};
  const A* means = static_cast<const A*>(c.mean) + sample * c.pixels + first;
  const A* rstds = static_cast<const A*>(c.rstd) + sample * c.pixels + first;
  along_tile<T>(count, [&](int v, int lanes) {
    mean[v] = load_part(means + v * kLanes<T>, lanes);
    rstd[v] = load_part(rstds + v * kLanes<T>, lanes);
  });
  for (int64_t ch = 0; ch < c.channels; ++ch) {
    V weight_sum{}, bias_sum{};
    along_tile<T>(count, [&](int v, int lanes) {
      const V dy = grad.get(ch, v, lanes);  // 0 in unused lanes
      const V unit = (x.get(ch, v, lanes) - mean[v]) * rstd[v], scaled = dy * weight[ch];
      units[ch * kTileVectors + v] = unit;
      scaleds[ch * kTileVectors + v] = scaled;
      scaled_mean[v] += scaled;
      product_mean[v] += scaled * unit;
      weight_sum += dy * unit;
      bias_sum += dy;
    });
    dweight[ch] += horizontal_sum(weight_sum);
    dbias[ch] += horizontal_sum(bias_sum);
  }
  for (int v = 0; v < kTileVectors; ++v) {
    scaled_mean[v] /= A(c.channels);
    product_mean[v] /= A(c.channels);
  }
  const bool adds = c.grad_sum.data != nullptr;
  const Column<T> grad_sum(adds ? c.grad_sum : c.grad, c, sample, first, count);
  for (int64_t ch = 0; ch < c.channels; ++ch)
    along_tile<T>(count, [&](int v, int lanes) {
      const int64_t i = ch * kTileVectors + v;
      V out = (scaleds[i] - scaled_mean[v] - units[i] * product_mean[v]) * rstd[v];
      if (adds) out += grad_sum.get(ch, v, lanes);
      dx.put(ch, v, out, lanes);
    });
}

#define SDP_ALL_DTYPES(KERNEL) {KERNEL<double>, KERNEL<float>, KERNEL<BFloat16>, KERNEL<Float16>}
extern const LayerNormTable layer_norm_table = {SDP_ALL_DTYPES(forward_rows), SDP_ALL_DTYPES(forward_columns),
                                                SDP_ALL_DTYPES(backward_rows), SDP_ALL_DTYPES(backward_columns),
                                                kTileVectors * kVectorBytes};

}  // namespace SDP_LEVEL_NAMESPACE
}  // namespace sdp

#if SDP_LEVEL == 0
#include <optional>

#include "cpu/host.h"

namespace sdp {
namespace {

PictureView view_of(const Tensor& t) {
  char* data = const_cast<char*>(bytes(t));
  if (t.dim() == 4) return {data, t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
  return {data, t.stride(0), t.stride(2), 0, t.stride(1)};
}

struct Geometry {
  int64_t batch, channels, width, pixels;
  bool rows;  // lanes over channels; else lanes over pixels

  // `like` is the tensor whose strides decide: the output, which follows the input's layout.
  explicit Geometry(const Tensor& like) : batch(like.size(0)) {
    const bool picture = like.dim() == 4;
    channels = like.size(picture ? 1 : 2);
    width = picture ? like.size(3) : like.size(1);
    pixels = picture ? like.size(2) * width : width;
    rows = !picture || like.stride(1) == 1;
  }
  std::vector<int64_t> statistics_shape(const Tensor& x) const {
    return x.dim() == 4 ? std::vector<int64_t>{batch, x.size(2), x.size(3)} : std::vector<int64_t>{batch, pixels};
  }
};

// Cuts the flat range [begin, end) of pixel groups, `per_sample` to a sample, at the samples' borders.
template <class Body>
void by_sample(int64_t begin, int64_t end, int64_t per_sample, const Body& body) {
  while (begin < end) {
    const int64_t sample = begin / per_sample, from = begin % per_sample;
    const int64_t to = std::min(per_sample, from + end - begin);
    body(sample, from, to);
    begin += to - from;
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_2d_fwd(const Tensor& x, const std::optional<Tensor>& residual,
                                                             const Tensor& weight, const Tensor& bias, double eps,
                                                             int64_t registers) {
  Tensor y = torch::stable::empty_like(x);
  Tensor sum = residual ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0});
  const Geometry g(y);
  Tensor mean = torch::stable::new_empty(x, g.statistics_shape(x), accumulator_dtype(x));
  Tensor rstd = torch::stable::new_empty(x, g.statistics_shape(x), accumulator_dtype(x));
  const int dtype = dtype_index(x);
  const Scratch wide_weight = widened(weight, dtype), wide_bias = widened(bias, dtype);

  LayerNormCase c{};
  c.channels = g.channels, c.width = g.width, c.pixels = g.pixels, c.registers = registers, c.eps = eps;
  c.x = view_of(x), c.y = view_of(y);
  if (residual) c.residual = view_of(*residual), c.sum = view_of(sum);
  c.weight = wide_weight.get(), c.bias = wide_bias.get();
  c.mean = mutable_bytes(mean), c.rstd = mutable_bytes(rstd);

  const LayerNormTable& table = SDP_ACTIVE_TABLE(layer_norm_table);
  if (x.numel() == 0) return {y, mean, rstd, sum};
  if (g.rows) {
    parallel(g.batch * g.pixels, g.channels, [&](int64_t begin, int64_t end) {
      by_sample(begin, end, g.pixels, [&](int64_t sample, int64_t from, int64_t to) {
        table.forward_rows[dtype](c, sample, from, to);
      });
    });
  } else {
    const int64_t tile = table.tile_bytes / accumulator_bytes(dtype), tiles = (g.pixels + tile - 1) / tile;
    parallel(g.batch * tiles, g.channels * tile, [&](int64_t begin, int64_t end) {
      const Scratch scratch(g.channels * table.tile_bytes);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = i % tiles * tile;
        table.forward_columns[dtype](c, i / tiles, first, std::min(g.pixels, first + tile), scratch.get());
      }
    });
  }
  return {y, mean, rstd, sum};
}

// The blocks' partial sums added in order and rounded once, to the parameter's dtype.
Tensor total(const Scratch& partial, int64_t blocks, int dtype, const Tensor& like) {
  Tensor out = torch::stable::new_empty(like, {like.numel()});
  const std::vector<double> sums = block_sums(partial, blocks, like.numel(), dtype);
  for (size_t i = 0; i < sums.size(); ++i) write_element(out, i, sums[i]);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_2d_bwd(const Tensor& grad, const std::optional<Tensor>& grad_sum,
                                                     const Tensor& x, const Tensor& weight, const Tensor& mean,
                                                     const Tensor& rstd, int64_t registers) {
  STD_TORCH_CHECK(grad.scalar_type() == x.scalar_type(), "layer_norm_2d_bwd: grad must have x's dtype");
  STD_TORCH_CHECK(mean.is_contiguous() && rstd.is_contiguous(), "layer_norm_2d_bwd: mean and rstd must be contiguous");
  Tensor dx = torch::stable::empty_like(x);
  const Geometry g(dx);
  const int dtype = dtype_index(x);
  const Scratch wide_weight = widened(weight, dtype);

  const LayerNormTable& table = SDP_ACTIVE_TABLE(layer_norm_table);
  const int64_t tile = g.rows ? 1 : table.tile_bytes / accumulator_bytes(dtype);
  const int64_t tiles = (g.pixels + tile - 1) / tile, count = g.batch * tiles;  // tiles of one pixel are rows
  constexpr int64_t kBlocks = 64;
  const int64_t per_block = std::max((count + kBlocks - 1) / kBlocks, g.rows ? int64_t(128) : int64_t(2));
  const int64_t blocks = (count + per_block - 1) / per_block;
  const int64_t partial_bytes = blocks * g.channels * accumulator_bytes(dtype);
  const Scratch dweight(partial_bytes, true), dbias(partial_bytes, true);

  LayerNormCase c{};
  c.channels = g.channels, c.width = g.width, c.pixels = g.pixels, c.registers = registers;
  c.x = view_of(x), c.grad = view_of(grad), c.dx = view_of(dx);
  if (grad_sum) c.grad_sum = view_of(*grad_sum);
  c.weight = wide_weight.get(), c.dweight = dweight.get(), c.dbias = dbias.get();
  c.mean = const_cast<char*>(bytes(mean)), c.rstd = const_cast<char*>(bytes(rstd));

  if (x.numel() != 0) {
    parallel(blocks, per_block * tile * g.channels, [&](int64_t begin, int64_t end) {
      const Scratch scratch(g.rows ? 0 : 2 * g.channels * table.tile_bytes);
      for (int64_t block = begin; block < end; ++block)
        by_sample(block * per_block, std::min(count, (block + 1) * per_block), tiles,
                  [&](int64_t sample, int64_t from, int64_t to) {
                    if (g.rows) {
                      table.backward_rows[dtype](c, sample, from, to, block);
                      return;
                    }
                    for (int64_t i = from; i < to; ++i)
                      table.backward_columns[dtype](c, sample, i * tile, std::min(g.pixels, (i + 1) * tile), block,
                                                    scratch.get());
                  });
    });
  }
  return {dx, total(dweight, blocks, dtype, weight), total(dbias, blocks, dtype, weight)};
}

}  // namespace
}  // namespace sdp

STABLE_TORCH_LIBRARY_IMPL(sdp_kernels_cpp, CPU, m) {
  m.impl("layer_norm_2d_fwd", TORCH_BOX(&sdp::layer_norm_2d_fwd));
  m.impl("layer_norm_2d_bwd", TORCH_BOX(&sdp::layer_norm_2d_bwd));
}
#endif
