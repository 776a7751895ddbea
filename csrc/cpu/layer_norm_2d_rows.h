// LayerNorm2d where channels lie next to each other: channels_last pictures and token buffers, lanes over channels.
//
// One row at a time, front to back: processors fetch ahead a few streams of neighbouring lines, and one row is one stream
// per tensor. Several rows side by side would be several each, and memory the bottleneck twice over. A row is read from
// memory by its first pass and from the first-level cache by the others.
#pragma once
#include "cpu/layer_norm_2d_case.h"

namespace sdp {
namespace SDP_LEVEL_NAMESPACE {

constexpr int kChains = 4;  // sums over channels are added up in so many independent chains
constexpr int kLine = 64;   // bytes

// For the bodies of loops: a call per vector costs more than its work, and compilers don't inline large lambdas.
#define SDP_INLINED __attribute__((always_inline))

// load_part and store_part as functions of their own: where channels may lie apart a call costs little beside them, and in
// every form of every loop they would take a tenth of the library's compile time.
template <class T>
__attribute__((noinline)) Vector<T> load_lanes(const T* p, int count, int64_t stride) {
  return stride == 1 && count == kLanes<T> ? load(p) : load_part(p, count, stride);
}
template <class T>
__attribute__((noinline)) void store_lanes(T* p, Vector<T> v, int count, int64_t stride) {
  stride == 1 && count == kLanes<T> ? store(p, v) : store_part(p, v, count, stride);
}

// Lanes of channels [i, i + count); Unit: the channels are known to lie next to each other.
template <bool Unit, class T>
inline Vector<T> get(const T* p, int64_t stride, int64_t i, int count) {
  if constexpr (!Unit) return load_lanes(p + i * stride, count, stride);
  else return count == kLanes<T> ? load(p + i) : load_part(p + i, count);
}
template <bool Unit, class T>
inline void put(T* p, int64_t stride, int64_t i, Vector<T> v, int count) {
  if constexpr (!Unit) store_lanes(p + i * stride, v, count, stride);
  else count == kLanes<T> ? store(p + i, v) : store_part(p + i, v, count);
}

// Calls body(first channel, lanes in use, chain) along C; the inlined body sees constants in the first of the two loops.
// `ahead(first channel)` comes before every kChains vectors.
template <class T, class Ahead, class Body>
inline SDP_INLINED void along_channels(int64_t channels, const Ahead& ahead, const Body& body) {
  constexpr int lanes = kLanes<T>;
  int64_t i = 0;
  for (; i + kChains * lanes <= channels; i += kChains * lanes) {
    ahead(i);
    SDP_UNROLL for (int chain = 0; chain < kChains; ++chain) body(i + chain * lanes, lanes, chain);
  }
  for (; i < channels; i += lanes) body(i, i + lanes <= channels ? lanes : int(channels - i), 0);
}
template <class T, class Body>
inline SDP_INLINED void along_channels(int64_t channels, const Body& body) {
  along_channels<T>(channels, [](int64_t) SDP_INLINED {}, body);
}

template <class V>
inline auto sum_of_chains(const V (&chains)[kChains]) {
  return horizontal_sum((chains[0] + chains[1]) + (chains[2] + chains[3]));
}

// Lanes beyond `count` set to zero.
template <class T>
inline Vector<T> first_lanes(Vector<T> v, int count) {
  for (int i = count; i < kLanes<T>; ++i) v[i] = 0;
  return v;
}

// Where a pixel is; one division serves all tensors.
struct Place {
  int64_t sample, row, column, index;  // index: into mean and rstd
  SDP_INLINED Place(const LayerNormCase& c, int64_t sample, int64_t pixel)
      : sample(sample), row(pixel / c.width), column(pixel % c.width), index(sample * c.pixels + pixel) {}
};

// A pixel's channels in one tensor, which may be absent.
template <class T>
struct Row {
  T* data = nullptr;
  int64_t channel, ahead;
  SDP_INLINED Row(const PictureView& view, const LayerNormCase& c, const Place& place)
      : channel(view.channel), ahead(view.channel == 1 && view.column == c.channels ? kBytesAhead / int(sizeof(T)) : 0) {
    if (view.data == nullptr) return;
    data = reinterpret_cast<T*>(view.data) + place.sample * view.batch + place.row * view.row + place.column * view.column;
  }
  // Asks for the lines that lie kBytesAhead beyond the kChains vectors at channel i: the processor's own fetching stops
  // at every page's end. Nothing where rows don't follow one another.
  SDP_INLINED void fetch_ahead(int64_t i) const {
    constexpr int elements = kLine / sizeof(T);
    for (int j = 0; j < kChains * kLanes<T>; j += elements) prefetch(data + ahead + i + j);
  }
  static constexpr int kBytesAhead = 6144;
};

// Adds the residual, if there is one, and returns the mean of what is to be normalised.
template <class T, bool Unit>
inline Accumulator<T> mean_of(const LayerNormCase& c, const Place& place) {
  using V = Vector<T>;
  const Row<T> x(c.x, c, place);
  V totals[kChains] = {};
  if (c.residual.data != nullptr) {
    const Row<T> residual(c.residual, c, place), sum(c.sum, c, place);
    const auto ahead = [&](int64_t i) SDP_INLINED { x.fetch_ahead(i), residual.fetch_ahead(i); };
    along_channels<T>(c.channels, ahead, [&](int64_t i, int count, int chain) SDP_INLINED {
      const V added = get<Unit>(x.data, x.channel, i, count) + get<Unit>(residual.data, residual.channel, i, count);
      put<Unit>(sum.data, sum.channel, i, added, count);
      totals[chain] += rounded<T>(added);  // what backward will see
    });
  } else {
    const auto ahead = [&](int64_t i) SDP_INLINED { x.fetch_ahead(i); };
    along_channels<T>(c.channels, ahead, [&](int64_t i, int count, int chain) SDP_INLINED {
      totals[chain] += get<Unit>(x.data, x.channel, i, count);
    });
  }
  return sum_of_chains(totals) / Accumulator<T>(c.channels);
}

// What is normalised.
inline const PictureView& normalised(const LayerNormCase& c) { return c.residual.data == nullptr ? c.x : c.sum; }

template <class T, bool Unit>
inline Accumulator<T> rstd_of(const LayerNormCase& c, const Place& place, Accumulator<T> mean) {
  using A = Accumulator<T>;
  using V = Vector<T>;
  const Row<T> x(normalised(c), c, place);
  V squares[kChains] = {};
  along_channels<T>(c.channels, [&](int64_t i, int count, int chain) SDP_INLINED {
    V centred = get<Unit>(x.data, x.channel, i, count) - mean;
    if (count < kLanes<T>) centred = first_lanes<T>(centred, count);
    squares[chain] += centred * centred;
  });
  return A(1) / __builtin_sqrt(sum_of_chains(squares) / A(c.channels) + A(c.eps));
}

template <class T, bool Unit>
inline void normalise(const LayerNormCase& c, const Place& place, Accumulator<T> mean, Accumulator<T> rstd) {
  using A = Accumulator<T>;
  using V = Vector<T>;
  const A *weight = static_cast<const A*>(c.weight), *bias = static_cast<const A*>(c.bias);
  const Row<T> x(normalised(c), c, place), y(c.y, c, place);
  along_channels<T>(c.channels, [&](int64_t i, int count, int) SDP_INLINED {
    const V w = get<true>(weight, 1, i, count), b = get<true>(bias, 1, i, count);
    const V unit = (get<Unit>(x.data, x.channel, i, count) - mean) * rstd;
    put<Unit>(y.data, y.channel, i, unit * w + b, count);
  });
  static_cast<A*>(c.mean)[place.index] = mean;
  static_cast<A*>(c.rstd)[place.index] = rstd;
}

// The next row's mean comes before this row's last pass, so that waiting for the end of a sum is not idle. (Backward, where
// memory is what is waited for, gets slower that way.)
template <class T, bool Unit>
void forward_pixels(const LayerNormCase& c, int64_t sample, int64_t pixel, int64_t end) {
  if (pixel >= end) return;
  Place next(c, sample, pixel);
  auto next_mean = mean_of<T, Unit>(c, next);
  while (pixel < end) {
    const Place place = next;
    const auto mean = next_mean, rstd = rstd_of<T, Unit>(c, place, mean);
    if (++pixel < end) {
      next = Place(c, sample, pixel);
      next_mean = mean_of<T, Unit>(c, next);
    }
    normalise<T, Unit>(c, place, mean, rstd);
  }
}

// A register row: sum as usual, y = 0 and no statistics.
template <class T>
inline void forward_register(const LayerNormCase& c, const Place& place) {
  const Row<T> x(c.x, c, place), residual(c.residual, c, place), sum(c.sum, c, place),
      y(c.y, c, place);
  along_channels<T>(c.channels, [&](int64_t i, int count, int) SDP_INLINED {
    if (c.residual.data != nullptr)
      put<false>(sum.data, sum.channel, i,
                 get<false>(x.data, x.channel, i, count) + get<false>(residual.data, residual.channel, i, count), count);
    put<false>(y.data, y.channel, i, Vector<T>{}, count);
  });
  static_cast<Accumulator<T>*>(c.mean)[place.index] = 0;
  static_cast<Accumulator<T>*>(c.rstd)[place.index] = 0;
}

inline bool unit_or_absent(const PictureView& view) { return view.data == nullptr || view.channel == 1; }

template <class T>
void forward_rows(const LayerNormCase& c, int64_t sample, int64_t pixel, int64_t end) {
  for (; pixel < end && pixel < c.registers; ++pixel) forward_register<T>(c, {c, sample, pixel});
  const bool unit = unit_or_absent(c.x) && unit_or_absent(c.residual) && unit_or_absent(c.sum) && unit_or_absent(c.y);
  unit ? forward_pixels<T, true>(c, sample, pixel, end) : forward_pixels<T, false>(c, sample, pixel, end);
}

// Adds is a constant so that every instance of this row rounds alike: a branch around the last addition would let the
// compiler fuse it with the multiplication in one instance and not in another.
template <class T, bool Unit, bool Adds>
inline void backward_row(const LayerNormCase& c, const Place& place, int64_t block) {
  using A = Accumulator<T>;
  using V = Vector<T>;
  const A* weight = static_cast<const A*>(c.weight);
  A *dweight = static_cast<A*>(c.dweight) + block * c.channels, *dbias = static_cast<A*>(c.dbias) + block * c.channels;
  const Row<T> x(c.x, c, place), grad(c.grad, c, place), grad_sum(c.grad_sum, c, place),
      dx(c.dx, c, place);
  const A mean = static_cast<const A*>(c.mean)[place.index];
  const A rstd = static_cast<const A*>(c.rstd)[place.index];
  V scaled_totals[kChains] = {}, product_totals[kChains] = {};
  const auto ahead = [&](int64_t i) SDP_INLINED { x.fetch_ahead(i), grad.fetch_ahead(i); };
  along_channels<T>(c.channels, ahead, [&](int64_t i, int count, int chain) SDP_INLINED {
    const V dy = get<Unit>(grad.data, grad.channel, i, count);
    V unit = (get<Unit>(x.data, x.channel, i, count) - mean) * rstd;
    if (count < kLanes<T>) unit = first_lanes<T>(unit, count);
    const V scaled = dy * get<true>(weight, 1, i, count);
    scaled_totals[chain] += scaled;
    product_totals[chain] += scaled * unit;
    put<true>(dweight, 1, i, get<true>(dweight, 1, i, count) + dy * unit, count);
    put<true>(dbias, 1, i, get<true>(dbias, 1, i, count) + dy, count);
  });
  const A scaled_mean = sum_of_chains(scaled_totals) / A(c.channels);
  const A product_mean = sum_of_chains(product_totals) / A(c.channels);
  const auto ahead_of_sum = [&](int64_t i) SDP_INLINED {
    if constexpr (Adds) grad_sum.fetch_ahead(i);
  };
  along_channels<T>(c.channels, ahead_of_sum, [&](int64_t i, int count, int) SDP_INLINED {
    const V unit = (get<Unit>(x.data, x.channel, i, count) - mean) * rstd;
    const V scaled = get<Unit>(grad.data, grad.channel, i, count) * get<true>(weight, 1, i, count);
    V out = (scaled - scaled_mean - unit * product_mean) * rstd;
    if constexpr (Adds) out += get<Unit>(grad_sum.data, grad_sum.channel, i, count);
    put<Unit>(dx.data, dx.channel, i, out, count);
  });
}

template <class T>
inline void backward_register(const LayerNormCase& c, const Place& place) {
  const Row<T> grad_sum(c.grad_sum, c, place), dx(c.dx, c, place);
  along_channels<T>(c.channels, [&](int64_t i, int count, int) SDP_INLINED {
    const bool adds = c.grad_sum.data != nullptr;
    put<false>(dx.data, dx.channel, i, adds ? get<false>(grad_sum.data, grad_sum.channel, i, count) : Vector<T>{}, count);
  });
}

template <class T, bool Adds>
void backward_pixels(const LayerNormCase& c, int64_t sample, int64_t pixel, int64_t end, int64_t block) {
  const bool unit = unit_or_absent(c.x) && unit_or_absent(c.grad) && unit_or_absent(c.grad_sum) && unit_or_absent(c.dx);
  for (; pixel < end; ++pixel) {
    const Place place(c, sample, pixel);
    unit ? backward_row<T, true, Adds>(c, place, block) : backward_row<T, false, Adds>(c, place, block);
  }
}

template <class T>
void backward_rows(const LayerNormCase& c, int64_t sample, int64_t pixel, int64_t end, int64_t block) {
  for (; pixel < end && pixel < c.registers; ++pixel) backward_register<T>(c, {c, sample, pixel});
  c.grad_sum.data != nullptr ? backward_pixels<T, true>(c, sample, pixel, end, block)
                             : backward_pixels<T, false>(c, sample, pixel, end, block);
}

}  // namespace SDP_LEVEL_NAMESPACE
}  // namespace sdp
