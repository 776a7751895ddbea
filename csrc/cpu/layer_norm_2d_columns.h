// LayerNorm2d where pixels lie next to each other (contiguous NCHW): lanes over pixels, a tile of them read once.
#pragma once
#include "cpu/layer_norm_2d_case.h"

namespace sdp {
namespace SDP_LEVEL_NAMESPACE {

constexpr int kTileVectors = 4;

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

}  // namespace SDP_LEVEL_NAMESPACE
}  // namespace sdp
