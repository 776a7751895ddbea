// Products of small matrices, in two forms: of accumulators, and of pairs of bf16 where the processor multiplies those.
//
// A matrix is rows of vectors, `pitch` vectors apart. All products are one form: elements of A, broadcast one by one, times
// rows of vectors of B, in a tile of C that stays in registers. Matrices come as accumulators; a form's `along`, `down`,
// `stacked` and `turned` make its operands of them, into the memory that the names with a `_size` count in vectors:
//   A: along (the sum runs along the matrix' rows), down (along its columns)
//   B: stacked (the sum runs down the matrix' rows), turned (the matrix transposed)
#pragma once
#include "cpu/levels.h"
#include "cpu/simd.h"

namespace sdp {
namespace {

// Rows × vectors of a tile: 24 + 3 + 1 of 32 registers, 12 + 3 + 1 of AVX2's 16, 8 + 2 + 1 of SSE's.
constexpr int kTileRows = kVectorRegisters == 32 ? 8 : 4, kTileColumns = kVectorRegisters == 32 || SDP_LEVEL > 0 ? 3 : 2;

constexpr int64_t rounded_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Element (i, k) of A lies at[i · row + k · step].
template <class E>
struct Left {
  const E* at;
  int64_t row, step;
};
template <class V>
struct Right {
  const V* at;
  int64_t pitch;
};

// to[j, i] = from[i, j], both of elements; `rows` and `columns` in squares of a vector's lanes.
template <class V>
void transpose_matrix(const V* from, int64_t from_pitch, V* to, int64_t to_pitch, int64_t rows, int64_t columns) {
  constexpr int lanes = sizeof(V) / sizeof(V{}[0]);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) {
      V square[lanes];
      for (int lane = 0; lane < lanes; ++lane) square[lane] = from[(i * lanes + lane) * from_pitch + j];
      transpose(square);
      for (int lane = 0; lane < lanes; ++lane) to[(j * lanes + lane) * to_pitch + i] = square[lane];
    }
}

// A form's product of whole matrices, `columns` of B and C in vectors; the rows are rounded up to kTileRows, which A and C
// have to have.
template <class Form, int N, class V>
void product_columns(const Left<typename Form::Element>& a, Right<typename Form::Vectors> b, V* c, int64_t c_pitch,
                     int64_t rows, int64_t depth, bool add) {
  for (int64_t i = 0; i < rows; i += kTileRows)
    Form::template tile<kTileRows, N>({a.at + i * a.row, a.row, a.step}, b, c + i * c_pitch, c_pitch, depth, add);
}
template <class Form, class V>
void product(const Left<typename Form::Element>& a, Right<typename Form::Vectors> b, V* c, int64_t c_pitch, int64_t rows,
             int64_t columns, int64_t summed, bool add) {
  const int64_t depth = (summed + Form::kSummed - 1) / Form::kSummed;
  while (columns > 0) {
    const int64_t width = columns == 4 || columns < kTileColumns ? (columns < 2 ? columns : 2) : kTileColumns;
    if (width == 3) product_columns<Form, kTileColumns>(a, b, c, c_pitch, rows, depth, add);
    else if (width == 2) product_columns<Form, 2>(a, b, c, c_pitch, rows, depth, add);
    else product_columns<Form, 1>(a, b, c, c_pitch, rows, depth, add);
    b.at += width, c += width, columns -= width;
  }
}

// Of accumulators; the matrix itself is the operand wherever it need not be turned.
template <class A>
struct Accumulated {
  using V = typename VectorOf<A>::type;
  using Element = A;
  using Vectors = V;
  static constexpr int lanes = VectorOf<A>::lanes;
  static constexpr int64_t kSummed = 1;  // elements of the sum in an operand's Element

  static int64_t along_size(int64_t, int64_t) { return 0; }
  static int64_t down_size(int64_t, int64_t) { return 0; }
  static int64_t turned_size(int64_t, int64_t columns, int64_t pitch) { return columns * lanes * pitch; }

  static Left<A> along(const V* m, int64_t pitch, int64_t, int64_t, V*) {
    return {reinterpret_cast<const A*>(m), pitch * lanes, 1};
  }
  static Left<A> down(const V* m, int64_t pitch, int64_t, int64_t, V*) {
    return {reinterpret_cast<const A*>(m), 1, pitch * lanes};
  }
  static Right<V> stacked(const V* m, int64_t pitch, int64_t, int64_t, V*) { return {m, pitch}; }
  // rows: a multiple of the lanes.
  static Right<V> turned(const V* m, int64_t pitch, int64_t rows, int64_t columns, V* to, int64_t to_pitch) {
    transpose_matrix(m, pitch, to, to_pitch, rows / lanes, columns);
    return {to, to_pitch};
  }

  template <int M, int N>
  static inline void tile(const Left<A>& a, const Right<V>& b, V* c, int64_t c_pitch, int64_t depth, bool add) {
    V sums[M][N];
    SDP_UNROLL for (int i = 0; i < M; ++i)
      SDP_UNROLL for (int j = 0; j < N; ++j) sums[i][j] = add ? c[i * c_pitch + j] : V{};
    const A* factors = a.at;
    const V* from = b.at;
    for (int64_t k = 0; k < depth; ++k, factors += a.step, from += b.pitch) {
      V row[N];
      SDP_UNROLL for (int j = 0; j < N; ++j) row[j] = from[j];
      SDP_UNROLL for (int i = 0; i < M; ++i) {
        const V factor = V{} + factors[i * a.row];
        SDP_UNROLL for (int j = 0; j < N; ++j) sums[i][j] += factor * row[j];
      }
    }
    SDP_UNROLL for (int i = 0; i < M; ++i)
      SDP_UNROLL for (int j = 0; j < N; ++j) c[i * c_pitch + j] = sums[i][j];
  }
};

#if SDP_LEVEL == 2 && SDP_KNOWS_BF16_PAIRS
#define SDP_BF16_PAIRS 1
#define SDP_MULTIPLIES_PAIRS __attribute__((target("avx512bf16")))

// Of pairs of bf16 that follow each other in the sum, multiplied and added to fp32 by one instruction (AVX512_BF16, which
// the host side asks the processor for). Rows that a sum of odd length lacks have to be 0.
struct Paired {
  using V = Floats;
  using Element = uint32_t;
  using Vectors = Bits;
  static constexpr int lanes = VectorOf<float>::lanes;
  static constexpr int64_t kSummed = 2;

  static int64_t along_pitch(int64_t columns) { return (columns + 1) / 2; }
  static int64_t along_size(int64_t rows, int64_t columns) { return rows * along_pitch(columns); }
  static int64_t down_size(int64_t rows, int64_t columns) { return (rows + 1) / 2 * columns; }
  static int64_t turned_size(int64_t rows, int64_t columns, int64_t pitch) {
    return along_pitch(columns) * lanes * pitch + along_size(rows, columns);
  }

  static SDP_MULTIPLIES_PAIRS Left<uint32_t> along(const V* m, int64_t pitch, int64_t rows, int64_t columns, Bits* to) {
    const int64_t to_pitch = along_pitch(columns);
    for (int64_t i = 0; i < rows; ++i, m += pitch, to += to_pitch) {
      for (int64_t j = 0; j < columns / 2; ++j) to[j] = (Bits)_mm512_cvtne2ps_pbh((__m512)m[2 * j + 1], (__m512)m[2 * j]);
      if (columns % 2 != 0) to[columns / 2] = (Bits)_mm512_cvtne2ps_pbh(_mm512_setzero_ps(), (__m512)m[columns - 1]);
    }
    return {reinterpret_cast<const uint32_t*>(to - rows * to_pitch), to_pitch * lanes, 1};
  }
  static SDP_MULTIPLIES_PAIRS Right<Bits> stacked(const V* m, int64_t pitch, int64_t rows, int64_t columns, Bits* to) {
    const __m512i alternating = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                                 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    for (int64_t i = 0; i < rows; i += 2)
      for (int64_t j = 0; j < columns; ++j) {
        const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)m[(i + 1) * pitch + j], (__m512)m[i * pitch + j]);
        to[i / 2 * columns + j] = (Bits)_mm512_permutexvar_epi16(alternating, both);
      }
    return {to, columns};
  }
  static Left<uint32_t> down(const V* m, int64_t pitch, int64_t rows, int64_t columns, Bits* to) {
    stacked(m, pitch, rows, columns, to);
    return {reinterpret_cast<const uint32_t*>(to), 1, columns * lanes};
  }
  static Right<Bits> turned(const V* m, int64_t pitch, int64_t rows, int64_t columns, Bits* to, int64_t to_pitch) {
    const int64_t pairs = along_pitch(columns);
    Bits* between = to + pairs * lanes * to_pitch;
    along(m, pitch, rows, columns, between);
    transpose_matrix(between, pairs, to, to_pitch, rows / lanes, pairs);
    return {to, to_pitch};
  }

  template <int M, int N>
  static SDP_MULTIPLIES_PAIRS void tile(const Left<uint32_t>& a, const Right<Bits>& b, V* c,
                                                         int64_t c_pitch, int64_t depth, bool add) {
    __m512 sums[M][N];
    SDP_UNROLL for (int i = 0; i < M; ++i)
      SDP_UNROLL for (int j = 0; j < N; ++j) sums[i][j] = add ? (__m512)c[i * c_pitch + j] : (__m512)V{};
    const uint32_t* factors = a.at;
    const Bits* from = b.at;
    for (int64_t k = 0; k < depth; ++k, factors += a.step, from += b.pitch) {
      __m512bh row[N];
      SDP_UNROLL for (int j = 0; j < N; ++j) row[j] = (__m512bh)from[j];
      SDP_UNROLL for (int i = 0; i < M; ++i) {
        const __m512bh factor = (__m512bh)(Bits{} + factors[i * a.row]);
        SDP_UNROLL for (int j = 0; j < N; ++j) sums[i][j] = _mm512_dpbf16_ps(sums[i][j], factor, row[j]);
      }
    }
    SDP_UNROLL for (int i = 0; i < M; ++i)
      SDP_UNROLL for (int j = 0; j < N; ++j) c[i * c_pitch + j] = (V)sums[i][j];
  }
};
#endif

}  // namespace
}  // namespace sdp
