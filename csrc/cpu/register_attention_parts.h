// What register attention does to rows: packed with their LayerNorm and back, the limits and masks of the softmax's rows.
#pragma once
#include "cpu/activations.h"
#include "cpu/register_attention_case.h"

namespace sdp {
namespace {

constexpr int64_t kQueries = 32;  // rows of the score matrix in memory at a time

// A row of d elements, `stride` apart, as vectors; lanes behind the last element are 0.
template <class T>
inline void read_row(const T* from, int64_t stride, int64_t d, Vector<T>* to) {
  constexpr int lanes = kLanes<T>;
  int64_t i = 0;
  if (stride == 1)
    for (; i + lanes <= d; i += lanes) *to++ = load(from + i);
  for (; i < d; i += lanes) *to++ = load_part(from + i * stride, d - i < lanes ? int(d - i) : lanes, stride);
}
template <class T>
inline void write_row(T* to, int64_t d, const Vector<T>* from, Accumulator<T> factor) {
  constexpr int lanes = kLanes<T>;
  int64_t i = 0;
  for (; i + lanes <= d; i += lanes) store(to + i, *from++ * factor);
  if (i < d) store_part(to + i, *from * factor, int(d - i));
}

// x ← x̂ = (x − mean) / √(var + eps) over d elements of a row, with 0 in the lanes behind; returns 1 / √(var + eps).
template <class V, class A>
inline A standardise(V* x, int64_t d, A eps) {
  constexpr int lanes = VectorOf<A>::lanes;
  const int64_t width = (d + lanes - 1) / lanes;
  V sum{}, squares{};
  for (int64_t i = 0; i < width; ++i) sum += x[i];
  const A mean = horizontal_sum(sum) / A(d);
  for (int64_t i = 0; i < width; ++i) x[i] -= mean;
  for (int64_t lane = d - (width - 1) * lanes; lane < lanes; ++lane) x[width - 1][lane] = 0;
  for (int64_t i = 0; i < width; ++i) squares += x[i] * x[i];
  const A variance = horizontal_sum(squares) / A(d) + eps;
  const A inverse = A(1) / (sizeof(A) == 4 ? A(__builtin_sqrtf(float(variance))) : A(__builtin_sqrt(double(variance))));
  for (int64_t i = 0; i < width; ++i) x[i] *= inverse;
  return inverse;
}

// A matrix (T, d) inside qkv or its gradient: part 0 q, 1 k, 2 v.
template <class T>
inline const T* token_row(const AttentionView& view, int64_t sample, int64_t token, int64_t part, int64_t head) {
  return reinterpret_cast<const T*>(view.data) + sample * view.batch + token * view.token + part * view.part +
         head * view.head;
}

// Token's row of q (part 0) or k (1), normalised if it has a norm, times `factor`.
template <class T>
inline void normed_row(const AttentionCase& c, int64_t sample, int64_t head, int64_t token, int part,
                       Accumulator<T> factor, Vector<T>* to) {
  using A = Accumulator<T>;
  constexpr int lanes = kLanes<T>;
  read_row(token_row<T>(c.qkv, sample, token, part, head), c.qkv.column, c.d, to);
  const A *weight = static_cast<const A*>(c.norm_weight[part]), *bias = static_cast<const A*>(c.norm_bias[part]);
  if (weight != nullptr) standardise(to, c.d, A(c.eps));
  for (int64_t i = 0; i * lanes < c.d; ++i)
    to[i] = (weight == nullptr ? to[i] : to[i] * load(weight + i * lanes) + load(bias + i * lanes)) * factor;
}

// From the gradient of what normed_row returned without its factor to that of qkv's row; `gradient` is overwritten.
template <class T>
inline void normed_row_backward(const AttentionCase& c, int64_t item, int64_t sample, int64_t head, int64_t token,
                                int part, Vector<T>* gradient) {
  using A = Accumulator<T>;
  using V = Vector<T>;
  constexpr int lanes = kLanes<T>;
  const int64_t width = (c.d + lanes - 1) / lanes;
  T* to = static_cast<T*>(c.dqkv) + (((sample * c.tokens + token) * 3 + part) * c.heads + head) * c.d;
  if (const A* weight = static_cast<const A*>(c.norm_weight[part])) {
    A *dweight = static_cast<A*>(c.norm_gradients) + (item * 4 + part * 2) * kHeadLimit, *dbias = dweight + kHeadLimit;
    V x[kHeadLimit / lanes], sum{}, along{};
    read_row(token_row<T>(c.qkv, sample, token, part, head), c.qkv.column, c.d, x);
    const A inverse = standardise(x, c.d, A(c.eps));
    for (int64_t i = 0; i < width; ++i) {
      store(dweight + i * lanes, load(dweight + i * lanes) + gradient[i] * x[i]);
      store(dbias + i * lanes, load(dbias + i * lanes) + gradient[i]);
      gradient[i] *= load(weight + i * lanes);
      sum += gradient[i], along += gradient[i] * x[i];
    }
    const A mean = horizontal_sum(sum) / A(c.d), slope = horizontal_sum(along) / A(c.d);
    for (int64_t i = 0; i < width; ++i) gradient[i] = (gradient[i] - mean - x[i] * slope) * inverse;
  }
  write_row(to, c.d, gradient, A(1));
}

// Scores of keys that the query may not read, and of the columns behind the last key, become −∞.
template <class V>
inline void limit_row(const AttentionCase& c, int64_t query, V* scores, int64_t columns) {
  constexpr int lanes = sizeof(V) / sizeof(scores[0][0]);
  const bool image = query >= c.registers;
  const int64_t first = image && c.images_read_images ? c.registers : 0;
  const int64_t last = !image && c.registers_read_registers ? c.registers : c.tokens;
  const auto forbid = [&](int64_t from, int64_t to) {
    for (int64_t j = from; j < to; ++j) scores[j / lanes][j % lanes] = -__builtin_inf();
  };
  forbid(0, first);
  forbid(last, columns * lanes);
}

template <class V>
inline auto horizontal_maximum(V v) {
  auto top = v[0];
  for (unsigned i = 1; i < sizeof(V) / sizeof(top); ++i) top = v[i] > top ? v[i] : top;
  return top;
}

// Calls body(column in vectors, dropout factors) along a query's row of scores.
template <class V, class Body>
inline void along_dropout(const AttentionCase& c, int64_t sample, int64_t head, int64_t query, const Body& body) {
  constexpr int lanes = sizeof(V) / sizeof(V{}[0]);
  static_assert(kDropoutChunk % lanes == 0, "whole vectors");
  DropoutFactors drawn;
  for (int64_t first = 0; first < c.tokens; first += kDropoutChunk) {
    const int count = c.tokens - first < kDropoutChunk ? int(c.tokens - first) : kDropoutChunk;
    const float* factors = drawn.draw(c.dropout, uint32_t(sample), (head * c.tokens + query) * c.tokens + first, count);
    for (int i = 0; i < count; i += lanes) {
      V kept{};
      for (int lane = 0; lane < lanes && i + lane < count; ++lane) kept[lane] = factors[i + lane];
      body((first + i) / lanes, kept);
    }
  }
}

}  // namespace
}  // namespace sdp
