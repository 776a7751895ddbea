// LayerNorm2d where channels lie next to each other: channels_last pictures and token buffers, lanes over channels.
//
// kRows pixels side by side: their sums are independent chains, and weights and partial sums are loaded once for all of
// them. A row's own order of additions is the same for one row as for kRows, so a pixel's result does not depend on its place.
#pragma once
#include "cpu/layer_norm_2d_case.h"

namespace sdp {
namespace SDP_LEVEL_NAMESPACE {

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
  for (int r = 0; r < R; ++r)  // row after row: interleaved, stores would hit loads of other rows at the same page offset
    along_channels<T>(c.channels, [&](int64_t i, int count) {
      const V w = get<true>(weight, 1, i, count), b = get<true>(bias, 1, i, count);
      const V unit = (get<Unit>(x.row[r], x.channel, i, count) - mean[r]) * rstd[r];
      put<Unit>(y.row[r], y.channel, i, unit * w + b, count);
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
  for (int r = 0; r < R; ++r)
    along_channels<T>(c.channels, [&](int64_t i, int count) {
      const V w = get<true>(weight, 1, i, count);
      x.prefetch_next(r, i);
      grad.prefetch_next(r, i);
      const V unit = (get<Unit>(x.row[r], x.channel, i, count) - mean[r]) * rstd[r];
      V out = (get<Unit>(grad.row[r], grad.channel, i, count) * w - scaled_mean[r] - unit * product_mean[r]) * rstd[r];
      if constexpr (Adds) out += get<Unit>(grad_sum.row[r], grad_sum.channel, i, count);
      put<Unit>(dx.row[r], dx.channel, i, out, count);
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

}  // namespace SDP_LEVEL_NAMESPACE
}  // namespace sdp
