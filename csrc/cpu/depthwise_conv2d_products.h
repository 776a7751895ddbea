// Rows of products: a convolution's outputs, and sums for the weight gradient, over pictures packed as (row, column, lane).
//
// A packed element is a column's value, or, where the processor multiplies pairs of bf16 (AVX512_BF16), the value of a
// column and that of the next: pairs lie at every column, so that they meet any pair of neighbouring taps or columns.
#pragma once
#include "cpu/bf16_pairs.h"

namespace sdp {

#ifdef SDP_BF16_PAIRS
SDP_HOST_DEVICE Bits round_to_pair(Floats low, Floats high, PairedBFloat16) {
  DoubleBits both;
  asm("vcvtne2ps2bf16 %1, %2, %0" : "=v"(both) : "v"(low), "v"(high));
  return bit_cast<Bits>(__builtin_shufflevector(both, both, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8, 24, 9,
                                                25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31));
}
SDP_HOST_DEVICE Floats widen_low(Bits pair, PairedBFloat16) { return widen_low(pair, BFloat16()); }
SDP_HOST_DEVICE Floats widen_high(Bits pair, PairedBFloat16) { return widen_high(pair, BFloat16()); }
#endif

namespace SDP_LEVEL_NAMESPACE {

template <class V>
struct Singles {
  using Packed = V;
  using Sum = V;
  static constexpr int columns = 1;  // in a packed element
  Packed* to;

  // Called for the columns of a row in order.
  SDP_HOST_DEVICE void put(int64_t column, V value) { to[column] = value; }
  SDP_HOST_DEVICE void end(int64_t) {}
  static SDP_HOST_DEVICE Packed factor(V tap, V) { return tap; }
  static SDP_HOST_DEVICE Packed first(Packed value) { return value; }
  static SDP_HOST_DEVICE void add(Sum& sum, Packed value, Packed factor) { sum += value * factor; }
};

template <class T>
struct ProductsOf { using type = Singles<Vector<T>>; };

#ifdef SDP_BF16_PAIRS
struct Pairs {
  using Packed = Bits;  // the column's bf16 in the lower half, the next one's in the upper
  using Sum = Floats;
  static constexpr int columns = 2;
  Packed* to;
  Bits before{};

  SDP_HOST_DEVICE void put(int64_t column, Floats value) {
    const Bits bits = bit_cast<Bits>(value);
    to[column - 1] = before >> 16 | bits;
    before = bits;
  }
  SDP_HOST_DEVICE void end(int64_t width) { to[width - 1] = before >> 16; }
  static SDP_HOST_DEVICE Packed factor(Floats tap, Floats next) { return bit_cast<Bits>(tap) >> 16 | bit_cast<Bits>(next); }
  static SDP_HOST_DEVICE Packed first(Packed value) { return value & 0xffffu; }
  static SDP_HOST_DEVICE void add(Sum& sum, Packed value, Packed factor) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(value), "v"(factor));
  }
};
template <>
struct ProductsOf<PairedBFloat16> { using type = Pairs; };
#endif

// A kernel row's products: the columns their packed values start at. Pairs cover an odd number of taps with the last one
// but one a second time, times 0: no value from outside the taps takes part.
template <class M>
constexpr int products_of(int kernel) { return (kernel + M::columns - 1) / M::columns; }
template <class M>
constexpr int start_of(int product, int kernel) {
  return product * M::columns + M::columns > kernel ? kernel - M::columns : product * M::columns;
}

// Factors of all products from a channel group's taps (k·k), `turned` by 180° for the input gradient.
template <class M, int K>
void factors_of(const typename M::Sum* taps, bool turned, typename M::Packed* factors) {
  for (int kh = 0; kh < K; ++kh)
    for (int i = 0; i < products_of<M>(K); ++i, ++factors) {
      const auto tap = [&](int kw) { return taps[turned ? K * K - 1 - kh * K - kw : kh * K + kw]; };
      const int start = start_of<M>(i, K);
      const bool again = start != i * M::columns;
      *factors = M::factor(again ? typename M::Sum{} : tap(start), start + 1 < K ? tap(start + 1) : typename M::Sum{});
    }
}

// P neighbouring outputs of one row: `in` points at the first one's first input of the first of `rows` kernel rows.
template <class M, int K, int P>
inline __attribute__((always_inline)) void convolve(const typename M::Packed* in, int64_t pitch,
                                                    const typename M::Packed* factors, int64_t rows,
                                                    typename M::Sum start, typename M::Sum* out) {
  constexpr int products = products_of<M>(K), last = start_of<M>(products - 1, K);
  typename M::Sum sums[P];
  for (int p = 0; p < P; ++p) sums[p] = start;
  for (int64_t kh = 0; kh < rows; ++kh, in += pitch, factors += products) {
#pragma GCC unroll 32
    for (int j = 0; j < P + last; ++j) {
      const typename M::Packed value = in[j];
#pragma GCC unroll 16
      for (int i = 0; i < products; ++i) {
        const int p = j - start_of<M>(i, K);
        if (p >= 0 && p < P) M::add(sums[p], value, factors[i]);
      }
    }
  }
  for (int p = 0; p < P; ++p) out[p] = sums[p];
}

// A row of outputs. `in` and `out` go on for at least 3 elements behind the row, which a short row's run takes along.
template <class M, int K>
void convolve_row(const typename M::Packed* in, int64_t pitch, const typename M::Packed* factors, int64_t rows,
                  typename M::Sum start, typename M::Sum* out, int64_t width) {
  int64_t i = 0;
  const auto runs = [&](auto constant) {
    constexpr int P = decltype(constant)::value;
    for (; i + P <= width; i += P) convolve<M, K, P>(in + i, pitch, factors, rows, start, out + i);
  };
  if constexpr (kVectorRegisters == 32) {  // as many as they hold beside a kernel row's factors
    if (width % 16 == 0) runs(std::integral_constant<int, 16>());
    runs(std::integral_constant<int, 14>());
  }
  runs(std::integral_constant<int, 7>());
  if (i < width && width > 7) {  // some of them again
    i = width - 7;
    runs(std::integral_constant<int, 7>());
  }
  for (; i < width; i += 4) convolve<M, K, 4>(in + i, pitch, factors, rows, start, out + i);
}

// dw[kh, kw] += Σ of dy[row, column] · x[row + kh, column + kw] over rows and columns, for R kernel rows.
template <class M, int K, int R>
void correlate_rows(const typename M::Packed* x, const typename M::Packed* dy, int64_t pitch, int64_t rows,
                    int64_t width, typename M::Sum* dw) {
  using Packed = typename M::Packed;
  constexpr int P = 4, step = M::columns;
  typename M::Sum sums[R][K];
  SDP_UNROLL for (int r = 0; r < R; ++r)
    SDP_UNROLL for (int kw = 0; kw < K; ++kw) sums[r][kw] = dw[r * K + kw];
  for (int64_t row = 0; row < rows; ++row, x += pitch, dy += pitch) {
    int64_t i = 0;
    for (; i + P * step <= width; i += P * step) {
      Packed g[P];
      SDP_UNROLL for (int p = 0; p < P; ++p) g[p] = dy[i + p * step];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 32
        for (int j = 0; j < (P - 1) * step + K; ++j) {
          const Packed value = x[r * pitch + i + j];
#pragma GCC unroll 16
          for (int p = 0; p < P; ++p)
            if (j - p * step >= 0 && j - p * step < K) M::add(sums[r][j - p * step], value, g[p]);
        }
      }
    }
    for (; i < width; i += step) {
      const Packed g = dy[i];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
        for (int kw = 0; kw < K; ++kw) {
          const Packed value = x[r * pitch + i + kw];
          M::add(sums[r][kw], i + step > width ? M::first(value) : value, g);
        }
    }
  }
  SDP_UNROLL for (int r = 0; r < R; ++r)
    SDP_UNROLL for (int kw = 0; kw < K; ++kw) dw[r * K + kw] = sums[r][kw];
}

// Kernel rows to go through the gradient with at a time, from kernel row kh on: enough sums that none waits for its previous
// addition, and as few as 32 registers hold beside four values of dy.
constexpr int rows_at_once(int kernel, int kh) {
  if (kVectorRegisters < 32) return 1;
  switch (kernel) {
    case 3: return 3;
    case 5: return kh == 0 ? 3 : 2;
    case 7: return kh == 2 ? 3 : 2;
    default: return kh == 4 ? 1 : 2;
  }
}

// For all kernel rows and output rows [first, last). Packed x starts at row first − border, with zeros outside the picture.
template <class M, int K, int Kh>
void correlate_from(const typename M::Packed* x, const typename M::Packed* dy, int64_t pitch, int64_t first, int64_t last,
               int64_t height, int64_t width, typename M::Sum* dw) {
  constexpr int border = K / 2, R = rows_at_once(K, Kh);
  const int64_t top = border - Kh - (R - 1), bottom = height + border - Kh;
  const int64_t from = first > top ? first : top, to = last < bottom ? last : bottom;
  const int64_t skipped = (from - first) * pitch;
  if (from < to) correlate_rows<M, K, R>(x + skipped + Kh * pitch, dy + skipped, pitch, to - from, width, dw + Kh * K);
  if constexpr (Kh + R < K) correlate_from<M, K, Kh + R>(x, dy, pitch, first, last, height, width, dw);
}

template <class M, int K>
void correlate(const typename M::Packed* x, const typename M::Packed* dy, int64_t pitch, int64_t first, int64_t last,
               int64_t height, int64_t width, typename M::Sum* dw) {
  correlate_from<M, K, 0>(x, dy, pitch, first, last, height, width, dw);
}

// Σ of packed rows.
template <class M>
typename M::Sum total(const typename M::Packed* dy, int64_t pitch, int64_t rows, int64_t width) {
  using Sum = typename M::Sum;
  const auto one = M::factor(Sum{} + 1, Sum{} + 1);
  Sum sums[4] = {};
  for (int64_t row = 0; row < rows; ++row, dy += pitch) {
    int64_t i = 0;
    for (; i + 4 * M::columns <= width; i += 4 * M::columns)
      SDP_UNROLL for (int p = 0; p < 4; ++p) M::add(sums[p], dy[i + p * M::columns], one);
    for (; i < width; i += M::columns) M::add(sums[0], dy[i], one);
  }
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// The functions of one kernel size.
template <class M>
struct KernelFunctions {
  int products;  // factors of a kernel row
  void (*factors)(const typename M::Sum* taps, bool turned, typename M::Packed* factors);
  decltype(&convolve_row<M, 3>) convolve_row;
  decltype(&correlate<M, 3>) correlate;
};
constexpr int kMostTaps = 81;

template <class M>
KernelFunctions<M> functions_of(int kernel) {
  switch (kernel) {
    case 3: return {products_of<M>(3), factors_of<M, 3>, convolve_row<M, 3>, correlate<M, 3>};
    case 5: return {products_of<M>(5), factors_of<M, 5>, convolve_row<M, 5>, correlate<M, 5>};
    case 7: return {products_of<M>(7), factors_of<M, 7>, convolve_row<M, 7>, correlate<M, 7>};
    default: return {products_of<M>(9), factors_of<M, 9>, convolve_row<M, 9>, correlate<M, 9>};
  }
}

}  // namespace SDP_LEVEL_NAMESPACE
}  // namespace sdp
