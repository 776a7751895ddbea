// The softmax of register attention's scores, a vector of rows at a time, and its gradient: limits, exponentials, dropout.
//
// Scores of 16-bit types come in units of ln 2 (q carries the factor), so that their exponential is a power of two. In fp32
// the factor's own rounding would lean all weights to one side, and the exponential is the activations'.
#pragma once
#include "cpu/register_attention_parts.h"

namespace sdp {
namespace {

constexpr double kLn2 = 0.69314718055994530942;

template <class T>
constexpr double kScoreUnit = sizeof(T) == 2 ? kLn2 : 1.0;

// 2ˣ = 2ⁿ · 2^f with |f| ≤ ½ for x ≤ 127; far below what fp32 can hold it is 0. The polynomial's relative error is below
// 3e-6, a hundredth and less of what rounding the weights to 16 bits does.
SDP_HOST_DEVICE Floats power_of_two(Floats x) {
  const float c[] = {9.999992847e-01f, 6.931217909e-01f, 2.402474433e-01f, 5.591785908e-02f, 9.570102207e-03f};
#if SDP_LEVEL == 2
  const Floats bounded = at_least(x, -160.0f);  // an infinity less its own rounding would not be a number
  const Floats n = (Floats)_mm512_roundscale_ps((__m512)bounded, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return (Floats)_mm512_scalef_ps((__m512)horner(c, bounded - n), (__m512)n);
#else
  const Floats bounded = at_least(at_most(x, 127.0f), -126.0f), shifted = bounded + 12582912.0f;  // as in reduced_exponential
  const Floats power = bit_cast<Floats>((bit_cast<Bits>(shifted) + 127u) << 23);
  return x < -126.0f ? Floats{} : horner(c, bounded - (shifted - 12582912.0f)) * power;
#endif
}
template <class T>
SDP_HOST_DEVICE Vector<T> score_exponential(Vector<T> x) {
  if constexpr (sizeof(T) == 2) return power_of_two(x);
  else return exponential(x);
}

// log x of positive normal numbers: x = 2ⁿ·m with m in [√½, √2), log m = 2·artanh((m − 1)/(m + 1)) by its series.
SDP_HOST_DEVICE Floats logarithm(Floats x) {
  const Bits smallest = Bits{} + 0x3f3504f3u, above = bit_cast<Bits>(x) - smallest;  // √½'s bits
  const auto n = (decltype(Floats{} < Floats{}))above >> 23;
  const Floats m = bit_cast<Floats>((above & 0x7fffffu) + smallest), s = (m - 1.0f) / (m + 1.0f);
  const float c[] = {2.0f, 2.0f / 3, 2.0f / 5, 2.0f / 7, 2.0f / 9};
  const Floats whole = __builtin_convertvector(n, Floats);  // its products with the first part of ln 2 are exact
  return whole * 0.693359375f + (whole * -2.12194440e-4f + s * horner(c, s * s));
}
SDP_HOST_DEVICE Doubles logarithm(Doubles x) { return by_lane(x, [](double v) { return __builtin_log(v); }); }

// Scores of keys that the query may not read, and of the columns behind the last key, become −∞.
template <class V>
inline void limit_row(const AttentionCase& c, int64_t query, V* scores, int64_t columns) {
  constexpr int lanes = sizeof(V) / sizeof(scores[0][0]);
  const bool image = query >= c.registers;
  const int64_t first = image && c.images_read_images ? c.registers : 0;
  const int64_t last = !image && c.registers_read_registers ? c.registers : c.tokens;
  const V nothing = V{} - __builtin_inf();
  for (int64_t j = 0; j * lanes < first; ++j) scores[j] = first_lanes<V>(first - j * lanes) ? nothing : scores[j];
  for (int64_t j = last / lanes; j < columns; ++j) scores[j] = first_lanes<V>(last - j * lanes) ? scores[j] : nothing;
}

// Calls body(column in vectors, dropout factors) along a query's row of scores.
template <class V, class Body>
inline void along_dropout(const AttentionCase& c, int64_t item, int64_t query, const Body& body) {
  constexpr int lanes = sizeof(V) / sizeof(V{}[0]);
  static_assert(kDropoutChunk % lanes == 0, "whole vectors");
  DropoutFactors drawn;
  for (int64_t first = 0; first < c.tokens; first += kDropoutChunk) {
    const int count = c.tokens - first < kDropoutChunk ? int(c.tokens - first) : kDropoutChunk;
    const int64_t place = (item % c.heads * c.tokens + query) * c.tokens + first;
    const float* factors = drawn.draw(c.dropout, uint32_t(item / c.heads), place, count);
    for (int i = 0; i < count; i += lanes) {
      V kept{};
      for (int lane = 0; lane < lanes && i + lane < count; ++lane) kept[lane] = factors[i + lane];
      body((first + i) / lanes, kept);
    }
  }
}

// Rows of scores ← their exponentials, relative to a row's maximum, dropped; writes lse, and to `inverses` one over the sums
// before dropping. Like the norms' sums, maxima and sums are joined for a vector of rows at a time.
template <class T>
void soften_rows(const AttentionCase& c, int64_t item, int64_t first, int64_t count, int64_t columns, int64_t pitch,
                 Vector<T>* scores, Accumulator<T>* inverses) {
  using A = Accumulator<T>;
  using V = Vector<T>;
  constexpr int lanes = kLanes<T>;
  A* lse = static_cast<A*>(c.lse) + item * c.tokens;
  for (const int64_t end = first + count; first < end; first += lanes, scores += lanes * pitch, inverses += lanes) {
    const int some = end - first < lanes ? int(end - first) : lanes;
    V most[lanes], sums[lanes];
    for (int row = some; row < lanes; ++row) most[row] = V{}, sums[row] = V{} + A(1);
    for (int row = 0; row < some; ++row) {
      const V* from = scores + row * pitch;
      limit_row(c, first + row, scores + row * pitch, columns);
      V top = from[0];
      for (int64_t j = 1; j < columns; ++j) top = from[j] > top ? from[j] : top;
      most[row] = top;
    }
    A tops[lanes];
    store(tops, joined_lanes(most, [](V a, V b) { return a > b ? a : b; }));
    for (int row = 0; row < some; ++row) {
      V *at = scores + row * pitch, sum{};
      const V top = V{} + tops[row];
      for (int64_t j = 0; j < columns; ++j) {
        at[j] = score_exponential<T>(at[j] - top);
        sum += at[j];
      }
      sums[row] = sum;
      if (c.dropout.scale != 0.0f)
        along_dropout<V>(c, item, first + row, [=](int64_t j, V kept) { at[j] *= kept; });
    }
    const V totals = lane_sums(sums);
    store(inverses, A(1) / totals);
    store_part(lse + first, load(tops) * A(kScoreUnit<T>) + logarithm(totals), some);
  }
}

// Rows of scores ← the weights that v was multiplied by, of dscores ← the gradient of the scores, from that of these
// weights.
template <class T>
void differentiate_rows(const AttentionCase& c, int64_t item, int64_t first, int64_t count, int64_t columns, int64_t pitch,
                        Vector<T>* scores, Vector<T>* dscores) {
  using A = Accumulator<T>;
  using V = Vector<T>;
  constexpr int lanes = kLanes<T>;
  const A* lse = static_cast<const A*>(c.lse) + item * c.tokens;
  for (const int64_t end = first + count; first < end; first += lanes, scores += lanes * pitch, dscores += lanes * pitch) {
    const int some = end - first < lanes ? int(end - first) : lanes;
    V sums[lanes];
    for (int row = some; row < lanes; ++row) sums[row] = V{};
    for (int row = 0; row < some; ++row) {
      V *at = scores + row * pitch, *dat = dscores + row * pitch, sum{};
      limit_row(c, first + row, at, columns);
      if (c.dropout.scale != 0.0f)
        along_dropout<V>(c, item, first + row, [=](int64_t j, V kept) { dat[j] *= kept; });
      const V shift = V{} + lse[first + row] * A(1 / kScoreUnit<T>);
      for (int64_t j = 0; j < columns; ++j) {
        at[j] = score_exponential<T>(at[j] - shift);
        sum += at[j] * dat[j];
      }
      sums[row] = sum;
    }
    A deltas[lanes];
    store(deltas, lane_sums(sums));
    for (int row = 0; row < some; ++row) {
      V *at = scores + row * pitch, *dat = dscores + row * pitch;
      const V delta = V{} + deltas[row];
      for (int64_t j = 0; j < columns; ++j) dat[j] = at[j] * (dat[j] - delta);
      if (c.dropout.scale != 0.0f)
        along_dropout<V>(c, item, first + row, [=](int64_t j, V kept) { at[j] *= kept; });
    }
  }
}

}  // namespace
}  // namespace sdp
