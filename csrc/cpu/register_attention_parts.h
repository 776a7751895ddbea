// What register attention does to rows of q, k, v and of gradients: read, normalised, written, and back through the norm.
//
// Where a vector holds 16 elements, the number of vectors in a row is a constant to the compiler (with_width), so that a
// row stays in registers; sums along rows are joined for a vector of rows at a time, since row by row their latency would
// be most of the work. As plain loops over memory these passes took as long as the products.
#pragma once
#include "cpu/activations.h"
#include "cpu/register_attention_case.h"

namespace sdp {
namespace {

template <class T>
constexpr int kMostVectors = kHeadLimit / kLanes<T>;  // of a row

// Calls body(vectors of a row of d elements), an integral constant where there are at most 8.
template <class T, class Body>
inline void with_width(int64_t d, const Body& body) {
  const int64_t width = (d + kLanes<T> - 1) / kLanes<T>;
  if constexpr (kMostVectors<T> > 8) {
    body(width);
  } else {
    switch (width) {
      case 1: return body(std::integral_constant<int64_t, 1>());
      case 2: return body(std::integral_constant<int64_t, 2>());
      case 3: return body(std::integral_constant<int64_t, 3>());
      case 4: return body(std::integral_constant<int64_t, 4>());
      case 5: return body(std::integral_constant<int64_t, 5>());
      case 6: return body(std::integral_constant<int64_t, 6>());
      case 7: return body(std::integral_constant<int64_t, 7>());
      default: return body(std::integral_constant<int64_t, 8>());
    }
  }
}

// A mask of the first `count` lanes of a V; none if count is below 0.
template <class V>
SDP_HOST_DEVICE auto first_lanes(int64_t count) {
  using Numbers = decltype(V{} < V{});
  using Number = std::remove_reference_t<decltype(Numbers{}[0])>;
  Numbers numbers;
  for (int i = 0; i < int(sizeof(V) / sizeof(Number)); ++i) numbers[i] = Number(i);
  return numbers < Number(count);
}

// Lane i: the lanes of rows[i] joined two by two. A lane's place becomes its row's number, since each round puts the number
// of the half that a row comes from before the place's bits, from the highest on.
template <class V, int lanes, class Join>
SDP_HOST_DEVICE V joined_lanes(V (&rows)[lanes], const Join& join) {
  using Lanes = std::make_integer_sequence<int, lanes>;
  SDP_UNROLL for (int half = lanes / 2; half > 0; half /= 2)
    SDP_UNROLL for (int i = 0; i < half; ++i)
      rows[i] = join(interleaved<0>(rows[i], rows[i + half], Lanes()),
                     interleaved<lanes / 2>(rows[i], rows[i + half], Lanes()));
  return rows[0];
}
template <class V, int lanes>
SDP_HOST_DEVICE V lane_sums(V (&rows)[lanes]) {
  return joined_lanes(rows, [](V a, V b) { return a + b; });
}

SDP_HOST_DEVICE Floats inverse_root(Floats x) {
#if SDP_LEVEL == 2
  return 1.0f / (Floats)_mm512_sqrt_ps((__m512)x);
#else
  return 1.0f / by_lane(x, [](float v) { return __builtin_sqrtf(v); });
#endif
}
SDP_HOST_DEVICE Doubles inverse_root(Doubles x) { return 1.0 / by_lane(x, [](double v) { return __builtin_sqrt(v); }); }

// Rows of d elements in a tensor; HeadRows<const T> are read.
template <class T>
struct HeadRows {
  T* at;
  int64_t pitch, stride, d;  // from a row to the next, from an element to the next

  T* row(int64_t i) const { return at + i * pitch; }
};

// Part 0 q, 1 k, 2 v of qkv, or part 0 of a gradient, from a token on.
template <class T>
SDP_HOST_DEVICE HeadRows<const T> head_rows(const AttentionCase& c, const AttentionView& view, int64_t item, int64_t part,
                                            int64_t first) {
  const int64_t at = item / c.heads * view.batch + first * view.token + part * view.part + item % c.heads * view.head;
  return {reinterpret_cast<const T*>(view.data) + at, view.token, view.column, c.d};
}
// The same of dqkv, and of y.
template <class T>
SDP_HOST_DEVICE HeadRows<T> gradient_rows(const AttentionCase& c, int64_t item, int64_t part, int64_t first) {
  const int64_t at = (item / c.heads * c.tokens + first) * 3 + part;
  return {static_cast<T*>(c.dqkv) + (at * c.heads + item % c.heads) * c.d, 3 * c.heads * c.d, 1, c.d};
}
template <class T>
SDP_HOST_DEVICE HeadRows<T> result_rows(const AttentionCase& c, int64_t item, int64_t first) {
  const int64_t at = item / c.heads * c.tokens + first;
  return {static_cast<T*>(c.y) + (at * c.heads + item % c.heads) * c.d, c.heads * c.d, 1, c.d};
}

// Asks for rows that will be read or written: they are too far apart for the processor to foresee them.
template <bool Written, class T>
SDP_HOST_DEVICE void prefetch_rows(const HeadRows<T>& rows, int64_t count) {
  constexpr int64_t line = 64 / sizeof(T);
  for (int64_t row = 0; row < count && rows.stride == 1; ++row)
    for (int64_t i = 0; i < rows.d + line - 1; i += line)
      __builtin_prefetch(rows.row(row) + (i < rows.d ? i : rows.d - 1), Written, 3);
}

// A row as vectors; lanes behind the last element are 0.
template <class T>
__attribute__((noinline)) void gather_row(const T* from, int64_t stride, int64_t d, Vector<T>* to) {
  constexpr int lanes = kLanes<T>;
  for (int64_t i = 0; i < d; i += lanes)
    *to++ = load_part(from + i * stride, d - i < lanes ? int(d - i) : lanes, stride);
}
template <class T, class Width>
SDP_HOST_DEVICE void read_row(const HeadRows<const T>& rows, int64_t row, Width width, Vector<T>* to) {
  constexpr int lanes = kLanes<T>;
  const T* from = rows.row(row);
  if (rows.stride != 1) return gather_row(from, rows.stride, rows.d, to);
  for (int64_t i = 0; i + 1 < width; ++i) to[i] = load(from + i * lanes);
  to[width - 1] = load_part(from + (width - 1) * lanes, int(rows.d - (width - 1) * lanes));
}
template <class T, class Width>
SDP_HOST_DEVICE void write_row(const HeadRows<T>& rows, int64_t row, Width width, const Vector<T>* from) {
  constexpr int lanes = kLanes<T>;
  for (int64_t i = 0; i + 1 < width; ++i) store(rows.row(row) + i * lanes, from[i]);
  store_part(rows.row(row) + (width - 1) * lanes, from[width - 1], int(rows.d - (width - 1) * lanes));
}

// Rows as they are, and back, factor(row) times each.
template <class T>
inline void read_rows(HeadRows<const T> rows, int64_t count, Vector<T>* to) {
  with_width<T>(rows.d, [=](auto width) {
    for (int64_t row = 0; row < count; ++row) read_row<T>(rows, row, width, to + row * width);
  });
}
template <class T, class Factor>
inline void write_rows(HeadRows<T> rows, int64_t count, const Vector<T>* from, const Factor& factor) {
  with_width<T>(rows.d, [=](auto width) {
    for (int64_t row = 0; row < count; ++row) {
      Vector<T> x[kMostVectors<T>];
      for (int64_t i = 0; i < width; ++i) x[i] = from[row * width + i] * factor(row);
      write_row(rows, row, width, x);
    }
  });
}

// A norm's parameters, kHeadLimit each; null without that norm. And the statistics of as many rows as a vector has lanes.
template <class A>
struct Norm {
  const A *weight, *bias;
  A eps;
};
template <class V>
struct Statistics {
  V mean, inverse;  // 1 / √(var + eps)
};

// Rows normalised, times `factor`; statistics[i / lanes] are kept of row i.
template <class T, class Width>
void normed_rows(HeadRows<const T> rows, int64_t count, Norm<Accumulator<T>> norm, Accumulator<T> factor, Width width,
                 Vector<T>* to, Statistics<Vector<T>>* statistics) {
  using A = Accumulator<T>;
  using V = Vector<T>;
  constexpr int lanes = kLanes<T>;
  const auto last = first_lanes<V>(rows.d - (width - 1) * lanes);
  for (; count > 0; count -= lanes, rows.at += lanes * rows.pitch, to += lanes * width, ++statistics) {
    const int64_t some = count < lanes ? count : lanes;
    V sums[lanes], squares[lanes];
    for (int64_t row = some; row < lanes; ++row) sums[row] = squares[row] = V{};
    for (int64_t row = 0; row < some; ++row) {
      V x[kMostVectors<T>];
      read_row<T>(rows, row, width, x);
      for (int64_t i = 0; i < width; ++i) sums[row] = i == 0 ? x[0] : sums[row] + x[i], to[row * width + i] = x[i];
    }
    statistics->mean = lane_sums(sums) / A(rows.d);
    const A* means = reinterpret_cast<const A*>(&statistics->mean);
    for (int64_t row = 0; row < some; ++row) {
      V square{};
      for (int64_t i = 0; i < width; ++i) {
        V x = to[row * width + i] - means[row];
        if (i + 1 == width) x = last ? x : V{};
        square += x * x, to[row * width + i] = x;
      }
      squares[row] = square;
    }
    statistics->inverse = inverse_root(lane_sums(squares) / A(rows.d) + norm.eps);
    const A* inverses = reinterpret_cast<const A*>(&statistics->inverse);
    V weights[kMostVectors<T>], biases[kMostVectors<T>];
    for (int64_t i = 0; i < width; ++i)
      weights[i] = load(norm.weight + i * lanes) * factor, biases[i] = load(norm.bias + i * lanes) * factor;
    for (int64_t row = 0; row < some; ++row)
      for (int64_t i = 0; i < width; ++i)
        to[row * width + i] = to[row * width + i] * inverses[row] * weights[i] + biases[i];
  }
}

// From `factor` times the gradients of what normed_rows returned without its factor to those of the rows it read. The
// gradients of weight and bias are added to, kHeadLimit after one another.
template <class T, class Width>
void normed_rows_backward(HeadRows<const T> rows, int64_t count, Norm<Accumulator<T>> norm, Accumulator<T> factor,
                          Width width, Vector<T>* gradients, const Statistics<Vector<T>>* statistics, HeadRows<T> to,
                          Accumulator<T>* dnorm) {
  using A = Accumulator<T>;
  using V = Vector<T>;
  constexpr int lanes = kLanes<T>;
  const auto last = first_lanes<V>(rows.d - (width - 1) * lanes);
  V dweights[kMostVectors<T>], dbiases[kMostVectors<T>], weights[kMostVectors<T>];
  for (int64_t i = 0; i < width; ++i) dweights[i] = dbiases[i] = V{}, weights[i] = load(norm.weight + i * lanes);
  for (; count > 0; count -= lanes, rows.at += lanes * rows.pitch, to.at += lanes * to.pitch, ++statistics) {
    const int64_t some = count < lanes ? count : lanes;
    const A* means = reinterpret_cast<const A*>(&statistics->mean);
    const A* inverses = reinterpret_cast<const A*>(&statistics->inverse);
    V sums[lanes], slopes[lanes], normed[lanes * kMostVectors<T>];
    for (int64_t row = some; row < lanes; ++row) sums[row] = slopes[row] = V{};
    for (int64_t row = 0; row < some; ++row) {
      V x[kMostVectors<T>], sum{}, slope{};
      read_row<T>(rows, row, width, x);
      for (int64_t i = 0; i < width; ++i) {
        x[i] = (x[i] - means[row]) * inverses[row];
        if (i + 1 == width) x[i] = last ? x[i] : V{};
        V gradient = gradients[row * width + i] * factor;
        dweights[i] += gradient * x[i], dbiases[i] += gradient;
        gradient *= weights[i];
        sum += gradient, slope += gradient * x[i];
        gradients[row * width + i] = gradient, normed[row * width + i] = x[i];
      }
      sums[row] = sum, slopes[row] = slope;
    }
    const V mean = lane_sums(sums) / A(rows.d), along = lane_sums(slopes) / A(rows.d);
    A shifts[lanes], tilts[lanes];
    store(shifts, mean), store(tilts, along);
    for (int64_t row = 0; row < some; ++row) {
      V x[kMostVectors<T>];
      for (int64_t i = 0; i < width; ++i)
        x[i] = (gradients[row * width + i] - shifts[row] - normed[row * width + i] * tilts[row]) * inverses[row];
      write_row(to, row, width, x);
    }
    gradients += lanes * width;
  }
  for (int64_t i = 0; i < width; ++i, dnorm += lanes) {
    store(dnorm, load(dnorm) + dweights[i]);
    store(dnorm + kHeadLimit, load(dnorm + kHeadLimit) + dbiases[i]);
  }
}

// Rows of q (part 0) or k (1) from a token on, and from their gradients to those of qkv.
template <class T>
inline void query_or_key_rows(const AttentionCase& c, int64_t item, int part, int64_t first, int64_t count,
                              Accumulator<T> factor, Vector<T>* to, Statistics<Vector<T>>* statistics) {
  using A = Accumulator<T>;
  const auto rows = head_rows<T>(c, c.qkv, item, part, first);
  const Norm<A> norm{static_cast<const A*>(c.norm_weight[part]), static_cast<const A*>(c.norm_bias[part]), A(c.eps)};
  with_width<T>(c.d, [=](auto width) {
    if (norm.weight != nullptr) return normed_rows<T>(rows, count, norm, factor, width, to, statistics);
    read_rows<T>(rows, count, to);
    for (int64_t i = 0; i < count * width; ++i) to[i] *= factor;
  });
}
template <class T>
inline void query_or_key_rows_backward(const AttentionCase& c, int64_t item, int part, int64_t first, int64_t count,
                                       Accumulator<T> factor, Vector<T>* gradients, const Statistics<Vector<T>>* statistics) {
  using A = Accumulator<T>;
  const auto rows = head_rows<T>(c, c.qkv, item, part, first);
  const auto to = gradient_rows<T>(c, item, part, first);
  const Norm<A> norm{static_cast<const A*>(c.norm_weight[part]), static_cast<const A*>(c.norm_bias[part]), A(c.eps)};
  A* dnorm = static_cast<A*>(c.norm_gradients) + (item * 4 + part * 2) * kHeadLimit;
  with_width<T>(c.d, [=](auto width) {
    if (norm.weight == nullptr) write_rows<T>(to, count, gradients, [=](int64_t) { return factor; });
    else normed_rows_backward<T>(rows, count, norm, factor, width, gradients, statistics, to, dnorm);
  });
}

}  // namespace
}  // namespace sdp
