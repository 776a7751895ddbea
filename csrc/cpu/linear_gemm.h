// Matrix products of bf16 with fp32 sums, for processors that multiply pairs of bf16 (AVX512_BF16).
//
// C = A·B. A tile of C, kRows × three vectors, stays in registers while the sum runs; A's pairs are broadcast from where
// they stand, B lies packed in panels as wide as a tile: one line of vectors for each pair of its rows. An element of C is one
// chain of sums in the order of the pairs, whatever lies around it and whichever thread computes it.
#pragma once
#include "cpu/simd.h"
#include "cpu/levels.h"

namespace sdp {

// B, summed × columns, in panels of kPanel columns (the last one in whole vectors) of `pairs` lines each; what a line has
// beside B's elements is 0.
struct Panels {
  static constexpr int64_t kPanel = 48;
  uint32_t* data;
  int64_t summed, columns;

  int64_t pairs() const { return (summed + 1) / 2; }
  int64_t count() const { return (columns + kPanel - 1) / kPanel; }
  uint32_t* panel(int64_t i) const { return data + i * pairs() * kPanel; }
};

// A matrix of bf16 by rows, columns side by side.
struct Bf16Rows {
  const BFloat16* data;
  int64_t pitch;  // from a row to the next, in elements
};

// Where a product goes: rounded, with the bias (a multiple of 16 elements long) added first if there is one; or, if `sums`
// is set, unrounded, and added to what is there if asked for.
struct ProductOut {
  BFloat16* rounded;
  const float* bias;
  float* sums;
  bool add;
  int64_t pitch;
};

struct ProductTable {
  // Packs panels [begin, end) of the transpose of `from` (columns × summed, an even number), or of `from` itself.
  void (*pack_turned)(Bf16Rows from, const Panels& to, int64_t begin, int64_t end);
  void (*pack)(Bf16Rows from, const Panels& to, int64_t begin, int64_t end);
  // C (rows × b.columns) = A·B with A (rows × b.summed, an even number).
  void (*rows)(Bf16Rows a, const Panels& b, ProductOut c, int64_t rows);
  // Panels [begin, end) of C (columns × b.columns) = Aᵀ·B with A (b.summed × columns); the memory is for
  // ⌈columns / 16⌉ · 16 · b.pairs() pairs.
  void (*turned)(Bf16Rows a, const Panels& b, ProductOut c, int64_t columns, int64_t begin, int64_t end, uint32_t* memory);
};
SDP_DECLARE_TABLE(ProductTable, product_table)

#if SDP_LEVEL == 2 && (defined(__clang__) ? __clang_major__ >= 9 : __GNUC__ >= 10)
#define SDP_MULTIPLIES_BF16
namespace level2 {
namespace {

constexpr int kRows = 8, kVectors = 3, kLine = 16;  // kLine: pairs, or sums, in a vector

// The first `count` of 16 elements or pairs, the others 0.
inline __mmask16 first_lanes(int64_t count) { return count >= 16 ? 0xffff : count <= 0 ? 0 : (1u << count) - 1; }

inline void pack_turned(Bf16Rows from, const Panels& to, int64_t begin, int64_t end) {
  const int64_t pairs = to.pairs();
  for (int64_t p = begin; p < end; ++p) {
    const int64_t first = p * Panels::kPanel, width = to.columns - first < Panels::kPanel ? to.columns - first : Panels::kPanel;
    const int64_t vectors = (width + kLine - 1) / kLine;
    for (int64_t pair = 0; pair < pairs; pair += kLine) {
      const __mmask16 there = first_lanes(pairs - pair);
      for (int64_t v = 0; v < vectors; ++v) {
        Bits square[kLine];
        for (int i = 0; i < kLine; ++i) {
          const int64_t column = v * kLine + i;
          const BFloat16* row = from.data + (first + column) * from.pitch + 2 * pair;
          square[i] = column < width ? (Bits)_mm512_maskz_loadu_epi32(there, row) : Bits{};
        }
        transpose(square);
        uint32_t* line = to.panel(p) + (pair * vectors + v) * kLine;
        for (int64_t i = 0; i < kLine && pair + i < pairs; ++i)
          _mm512_storeu_si512(line + i * vectors * kLine, (__m512i)square[i]);
      }
    }
  }
}

// Elements of one row in the lower halves, of the next in the upper.
inline __m512i interleaved_rows(const BFloat16* row, const BFloat16* next, __mmask16 there) {
  const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, row));
  if (next == nullptr) return low;
  return _mm512_or_si512(low, _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, next)), 16));
}

inline void pack(Bf16Rows from, const Panels& to, int64_t begin, int64_t end) {
  constexpr int64_t kAtOnce = 16;  // pairs: a panel's lines are written in runs, and the rows are read before they leave
  const int64_t pairs = to.pairs();
  for (int64_t first_pair = 0; first_pair < pairs; first_pair += kAtOnce)
    for (int64_t p = begin; p < end; ++p) {
      const int64_t first = p * Panels::kPanel, width = to.columns - first < Panels::kPanel ? to.columns - first : Panels::kPanel;
      const int64_t vectors = (width + kLine - 1) / kLine;
      for (int64_t pair = first_pair; pair < first_pair + kAtOnce && pair < pairs; ++pair) {
        const BFloat16* row = from.data + 2 * pair * from.pitch + first;
        const BFloat16* next = 2 * pair + 1 < to.summed ? row + from.pitch : nullptr;
        uint32_t* line = to.panel(p) + pair * vectors * kLine;
        for (int64_t at = 0; at < vectors * kLine; at += kLine)
          _mm512_storeu_si512(line + at, interleaved_rows(row + at, next == nullptr ? nullptr : next + at, first_lanes(width - at)));
      }
    }
}

// One tile: row i of A begins at a[i], its pairs are Step bytes apart. Only `rows` and `columns` of it are written.
template <int N, int Step>
__attribute__((target("avx512bf16"))) void tile(const char* const (&a)[kRows], const uint32_t* b, int64_t pairs,
                                                const ProductOut& c, int64_t rows, int64_t columns) {
  __m512 sums[kRows][N];
  SDP_UNROLL for (int i = 0; i < kRows; ++i)
    SDP_UNROLL for (int j = 0; j < N; ++j) sums[i][j] = _mm512_setzero_ps();
  for (int64_t at = 0; at < pairs * Step; at += Step, b += N * kLine) {
    __m512bh line[N];
    SDP_UNROLL for (int j = 0; j < N; ++j) line[j] = (__m512bh)_mm512_loadu_si512(b + j * kLine);
    SDP_UNROLL for (int i = 0; i < kRows; ++i) {
      int pair;
      memcpy(&pair, a[i] + at, sizeof(pair));
      SDP_UNROLL for (int j = 0; j < N; ++j)
        sums[i][j] = _mm512_dpbf16_ps(sums[i][j], (__m512bh)_mm512_set1_epi32(pair), line[j]);
    }
  }
  SDP_UNROLL for (int i = 0; i < kRows; ++i) {
    if (i >= rows) return;
    SDP_UNROLL for (int j = 0; j < N; ++j) {
      const __mmask16 there = first_lanes(columns - j * kLine);
      const int64_t at = i * c.pitch + j * kLine;
      if (c.sums != nullptr) {
        const __m512 before = c.add ? _mm512_maskz_loadu_ps(there, c.sums + at) : _mm512_setzero_ps();
        _mm512_mask_storeu_ps(c.sums + at, there, _mm512_add_ps(before, sums[i][j]));
      } else {
        const __m512 bias = c.bias == nullptr ? _mm512_setzero_ps() : _mm512_loadu_ps(c.bias + j * kLine);
        _mm256_mask_storeu_epi16(c.rounded + at, there, (__m256i)_mm512_cvtneps_pbh(_mm512_add_ps(sums[i][j], bias)));
      }
    }
  }
}

inline ProductOut moved(ProductOut c, int64_t row, int64_t column) {
  const int64_t by = row * c.pitch + column;
  if (c.sums != nullptr) c.sums += by;
  else c.rounded += by;
  if (c.bias != nullptr) c.bias += column;
  return c;
}

template <int Step>
void tile_of(const char* const (&a)[kRows], const Panels& b, int64_t panel, const ProductOut& c, int64_t row, int64_t rows) {
  const int64_t first = panel * Panels::kPanel, columns = b.columns - first;
  const ProductOut to = moved(c, row, first);
  if (columns > 2 * kLine) tile<3, Step>(a, b.panel(panel), b.pairs(), to, rows, columns);
  else if (columns > kLine) tile<2, Step>(a, b.panel(panel), b.pairs(), to, rows, columns);
  else tile<1, Step>(a, b.panel(panel), b.pairs(), to, rows, columns);
}

inline void rows(Bf16Rows a, const Panels& b, ProductOut c, int64_t count) {
  for (int64_t p = 0; p < b.count(); ++p)
    for (int64_t row = 0; row < count; row += kRows) {
      const char* starts[kRows];
      for (int i = 0; i < kRows; ++i)  // rows behind the last are that one again
        starts[i] = reinterpret_cast<const char*>(a.data + (row + i < count ? row + i : count - 1) * a.pitch);
      tile_of<4>(starts, b, p, c, row, count - row);
    }
}

inline void turned(Bf16Rows a, const Panels& b, ProductOut c, int64_t columns, int64_t begin, int64_t end, uint32_t* memory) {
  constexpr int64_t kAhead = 24;  // rows: a matrix' rows are too far apart for the processor to foresee them
  const int64_t pairs = b.pairs();
  for (int64_t pair = 0; pair < pairs; ++pair) {
    const BFloat16* row = a.data + 2 * pair * a.pitch;
    const bool whole = 2 * pair + 1 < b.summed, foreseen = 2 * pair + 1 + kAhead < b.summed;
    for (int64_t column = 0; column < columns; column += kLine) {
      const BFloat16* at = row + column;
      if (foreseen && column % 32 == 0) prefetch(at + kAhead * a.pitch), prefetch(at + (kAhead + 1) * a.pitch);
      const __m512i both = interleaved_rows(at, whole ? at + a.pitch : nullptr, first_lanes(columns - column));
      uint32_t* to = memory + (column * pairs) + pair * kRows;
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_castsi512_si256(both));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + pairs * kRows), _mm512_extracti64x4_epi64(both, 1));
    }
  }
  for (int64_t p = begin; p < end; ++p)
    for (int64_t row = 0; row < columns; row += kRows) {
      const char* starts[kRows];
      for (int i = 0; i < kRows; ++i) starts[i] = reinterpret_cast<const char*>(memory + row * pairs + i);
      tile_of<4 * kRows>(starts, b, p, c, row, columns - row);
    }
}

}  // namespace
}  // namespace level2
#endif

}  // namespace sdp
