// One channel group (a vector's lanes) of one strip of picture rows at a time: the strip is packed into a buffer
// (row, column, lane) with its zero border, so that layout, dtype, borders and a LayerNorm folded into the load all end
// there. The convolution itself sees one form: for each kernel row, a run of outputs is kept in registers while its inputs
// stream past, each loaded once for all the outputs it belongs to. The input gradient is the same with the filter turned
// by 180°. The weight gradient adds dy·x over the strip with a few kernel rows' sums in registers. Meanwhile the rows of
// the next strip are asked for.
#pragma once
#include "cpu/depthwise_conv2d_products.h"
#include "cpu/depthwise_conv2d_rows.h"

namespace sdp {
namespace SDP_LEVEL_NAMESPACE {

// Rows [first, last) of a channel group into packed[(row − first), border + column, lane]. Rows outside the picture are
// zero if asked for, else left as they are. With a norm, what is packed is (x − mean)·rstd·weight + bias, rounded as a
// tensor of T would be.
template <class T>
void pack(const DepthwiseCase& c, const DepthwiseView& view, bool normed, bool zeros, int64_t sample, int64_t group,
          int64_t first, int64_t last, int border, typename ProductsOf<T>::type::Packed* packed) {
  using A = Accumulator<T>;
  using V = Vector<T>;
  using M = typename ProductsOf<T>::type;
  const DepthwiseGroup g = group_of<T>(c.channels, group);
  const int64_t pitch = c.width + 2 * border;
  V scale{}, shift{};
  if (normed) {
    scale = load_part(static_cast<const A*>(c.norm_weight) + g.channel, g.count);
    shift = load_part(static_cast<const A*>(c.norm_bias) + g.channel, g.count);
  }
  for (int64_t row = first; row < last; ++row, packed += pitch) {
    if (row < 0 || row >= c.height) {
      for (int64_t i = 0; zeros && i < pitch; ++i) packed[i] = typename M::Packed{};
      continue;
    }
    const int64_t place = sample * c.statistics_batch + row * c.width;
    const A *mean = static_cast<const A*>(c.mean) + place, *rstd = static_cast<const A*>(c.rstd) + place;
    M out{packed + border};
    load_row(view, row_of<T>(view, sample, g.channel, row), g.count, c.width, [&](int64_t column, V value) {
      out.put(column, normed ? rounded<T>((value - mean[column]) * rstd[column] * scale + shift) : value);
    });
    out.end(c.width);
  }
}

// Zero columns beside the rows of a packed buffer; packing leaves them as they are.
template <class Packed>
void clear_sides(Packed* packed, int64_t rows, int64_t width, int border) {
  for (int64_t row = 0; row < rows; ++row, packed += width + 2 * border)
    for (int i = 0; i < border; ++i) packed[i] = packed[border + width + i] = Packed{};
}

// Outputs of one row of a strip whose packed rows start at first − border, without the kernel rows outside the picture.
template <class M>
void convolve_row_of(const DepthwiseCase& c, const KernelFunctions<M>& functions, const typename M::Packed* in,
                     const typename M::Packed* factors, typename M::Sum start, int64_t first, int64_t row,
                     typename M::Sum* out) {
  const int64_t border = c.kernel / 2, pitch = c.width + 2 * border;
  const int64_t top = row < border ? border - row : 0;
  const int64_t bottom = row + border >= c.height ? c.height + border - row : c.kernel;
  functions.convolve_row(in + (row - first + top) * pitch, pitch, factors + top * functions.products, bottom - top, start,
                         out, c.width);
}

template <class T>
void forward(const DepthwiseCase& c, int64_t begin, int64_t end, void* scratch) {
  using V = Vector<T>;
  using M = typename ProductsOf<T>::type;
  const KernelFunctions<M> functions = functions_of<M>(c.kernel);
  const int border = c.kernel / 2, taps = c.kernel * c.kernel;
  const int64_t rows = c.strip + 2 * border;
  auto* in = static_cast<typename M::Packed*>(scratch);
  V* out = reinterpret_cast<V*>(in + rows * (c.width + 2 * border));
  clear_sides(in, rows, c.width, border);
  typename M::Packed factors[kMostTaps];
  for (int64_t item = begin; item < end; ++item) {
    const int64_t sample = item / c.groups, group = item % c.groups;
    const DepthwiseGroup g = group_of<T>(c.channels, group);
    functions.factors(static_cast<const V*>(c.weight) + group * taps, false, factors);
    const V start = c.bias == nullptr ? V{} : static_cast<const V*>(c.bias)[group];
    for (int64_t first = 0; first < c.height; first += c.strip) {
      const int64_t last = first + c.strip < c.height ? first + c.strip : c.height;
      pack<T>(c, c.x, c.mean != nullptr, false, sample, group, first - border, last + border, border, in);
      for (int64_t row = first; row < last; ++row) {
        convolve_row_of<M>(c, functions, in, factors, start, first, row, out);
        store_row(c.y, row_of<T>(c.y, sample, g.channel, row), g.count, c.width, out);
        // What the next strip needs in this one's place, be it of this item or of the next.
        const bool here = row + c.strip < c.height;
        const int64_t ahead = row + c.strip - (here ? 0 : c.height), next = here ? item : item + 1;
        if (next == end || ahead >= c.height) continue;
        prefetch_row<T, false>(c.x, c.channels, c.width, next / c.groups, next % c.groups, ahead);
        prefetch_row<T, true>(c.y, c.channels, c.width, next / c.groups, next % c.groups, ahead);
      }
    }
  }
}

template <class T>
void backward(const DepthwiseCase& c, int64_t begin, int64_t end, void* scratch) {
  using V = Vector<T>;
  using M = typename ProductsOf<T>::type;
  const KernelFunctions<M> functions = functions_of<M>(c.kernel);
  const int border = c.kernel / 2, taps = c.kernel * c.kernel;
  const int64_t pitch = c.width + 2 * border, rows = c.strip + 2 * border;
  auto *in = static_cast<typename M::Packed*>(scratch), *grad = in + rows * pitch;
  V* out = reinterpret_cast<V*>(grad + rows * pitch);
  clear_sides(in, rows, c.width, border), clear_sides(grad, rows, c.width, border);
  typename M::Packed factors[kMostTaps];
  for (int64_t item = begin; item < end; ++item) {
    const int64_t block = item / c.groups, group = item % c.groups, from = block * c.block;
    const int64_t to = from + c.block < c.batch ? from + c.block : c.batch;
    const DepthwiseGroup g = group_of<T>(c.channels, group);
    functions.factors(static_cast<const V*>(c.weight) + group * taps, true, factors);
    V *dw = static_cast<V*>(c.dweight) + item * taps, *db = static_cast<V*>(c.dbias) + item;
    for (int64_t sample = from; sample < to; ++sample)
      for (int64_t first = 0; first < c.height; first += c.strip) {
        const int64_t last = first + c.strip < c.height ? first + c.strip : c.height;
        pack<T>(c, c.grad, false, false, sample, group, first - border, last + border, border, grad);
        pack<T>(c, c.x, c.mean != nullptr, true, sample, group, first - border, last + border, border, in);
        for (int64_t row = first; row < last; ++row) {
          convolve_row_of<M>(c, functions, grad, factors, V{}, first, row, out);
          store_row(c.y, row_of<T>(c.y, sample, g.channel, row), g.count, c.width, out);
          const bool here = row + c.strip < c.height, same = here || sample + 1 < to;
          const int64_t ahead = row + c.strip - (here ? 0 : c.height), next = same ? item : item + 1;
          const int64_t of = here ? sample : same ? sample + 1 : next / c.groups * c.block;
          if (next == end || ahead >= c.height) continue;
          prefetch_row<T, false>(c.grad, c.channels, c.width, of, next % c.groups, ahead);
          prefetch_row<T, false>(c.x, c.channels, c.width, of, next % c.groups, ahead);
          prefetch_row<T, true>(c.y, c.channels, c.width, of, next % c.groups, ahead);
        }
        const auto* inner = grad + border * pitch + border;
        functions.correlate(in, inner, pitch, first, last, c.height, c.width, dw);
        *db += total<M>(inner, pitch, last - first, c.width);
      }
  }
}

template <class T>
void gather(const DepthwiseView& view, int64_t channels, int64_t rows, int64_t columns, void* to) {
  DepthwiseCase c{};
  c.channels = channels, c.height = rows, c.width = columns;
  Vector<T>* out = static_cast<Vector<T>*>(to);
  for (int64_t group = 0; group * kLanes<T> < channels; ++group, out += rows * columns)
    pack<T>(c, view, false, false, 0, group, 0, rows, 0, out);
}

template <class T>
void scatter(const DepthwiseView& view, int64_t channels, int64_t rows, int64_t columns, const void* from, int64_t blocks) {
  using V = Vector<T>;
  const V* in = static_cast<const V*>(from);
  const int64_t groups = (channels + kLanes<T> - 1) / kLanes<T>, size = groups * rows * columns;
  for (int64_t group = 0; group < groups; ++group)
    for (int64_t row = 0; row < rows; ++row, in += columns) {
      V sums[9 + kLanes<T>] = {};
      for (int64_t column = 0; column < columns; ++column) {
        sums[column] = in[column];
        for (int64_t block = 1; block < blocks; ++block) sums[column] += in[block * size + column];
      }
      const DepthwiseGroup g = group_of<T>(channels, group);
      store_row(view, row_of<T>(view, 0, g.channel, row), g.count, columns, sums);
    }
}

}  // namespace SDP_LEVEL_NAMESPACE
}  // namespace sdp
