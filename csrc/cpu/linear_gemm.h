// Matrix products with fp32 sums: of fp32, and of bf16 two at a time (AVX-512 with AVX512_BF16).
//
// C = A·B. What one instruction multiplies is a unit: an fp32 element, or a pair of bf16 that follow each other in the sum.
// A tile of C, kRows × three vectors, stays in registers while the sum runs; A's units are broadcast from where they stand,
// B lies packed in panels as wide as a tile: one line of vectors for each unit of its rows. An element of C is summed in the
// order of the units, in chains of Unit<T>::chain that are added up, whatever lies around it and whichever thread computes it.
#pragma once
#include "cpu/levels.h"
#include "cpu/simd.h"

namespace sdp {

// B, summed × columns, in panels of kPanel columns (the last one in whole vectors) of `units` lines each; what a line has
// beside B's elements is 0.
struct Panels {
  static constexpr int64_t kPanel = 48;
  uint32_t* data;
  int64_t summed, columns, units;

  int64_t count() const { return (columns + kPanel - 1) / kPanel; }
  uint32_t* panel(int64_t i) const { return data + i * units * kPanel; }
};

// A matrix by rows, columns side by side.
struct ProductRows {
  const char* data;
  int64_t pitch;  // from a row to the next, in bytes
};

// Where a product goes: to the elements of its dtype, with the bias (a multiple of 16 elements long) added first if there is
// one; or, if `sums` is set, to fp32 unrounded, and added to what is there if asked for.
struct ProductOut {
  char* rounded;
  const float* bias;
  float* sums;
  bool add;
  int64_t pitch;  // in elements
  bool turned = false;  // its transpose is what is written, without a bias
};

struct ProductTable {
  // Packs panels [begin, end) of the transpose of `from` (columns × summed, whole units), or of `from` itself.
  void (*pack_turned)(ProductRows from, const Panels& to, int64_t begin, int64_t end);
  void (*pack)(ProductRows from, const Panels& to, int64_t begin, int64_t end);
  // C (rows × b.columns) = A·B with A (rows × b.summed, whole units).
  void (*rows)(ProductRows a, const Panels& b, const ProductOut& c, int64_t rows);
  // Panels [begin, end) of C (columns × b.columns) = Aᵀ·B with A (b.summed × columns), or of its transpose; the memory is
  // for ⌈columns / 16⌉ · 16 · b.units units.
  void (*turned)(ProductRows a, const Panels& b, const ProductOut& c, int64_t columns, int64_t begin, int64_t end,
                 uint32_t* memory);
};
// By dtype; null where a level has none.
struct ProductTables {
  ProductTable of[kDtypes];
};
SDP_DECLARE_TABLE(ProductTables, product_tables)

#if SDP_LEVEL == 2 && SDP_KNOWS_BF16_PAIRS
#define SDP_MULTIPLIES
namespace level2 {
namespace {

constexpr int kRows = 8, kVectors = 3, kLine = 16;  // kLine: units, or sums, in a vector
constexpr int64_t kUnitBytes = 4;

// The first `count` of 16 elements or units, the others 0.
inline __mmask16 first_lanes(int64_t count) { return count >= 16 ? 0xffff : count <= 0 ? 0 : (1u << count) - 1; }

template <class T> struct Unit;
template <> struct Unit<float> {
  static constexpr int64_t elements = 1, chain = 128;  // rounding errors grow with a chain's length
  // Units of 16 columns from a row of B.
  static __m512i of_rows(const float* row, const float*, __mmask16 there) { return _mm512_maskz_loadu_epi32(there, row); }
};
template <> struct Unit<BFloat16> {
  static constexpr int64_t elements = 2, chain = 4096;  // its results are rounded far more coarsely than its sums
  // Elements of one row in the lower halves, of the next (if there is one) in the upper.
  static __m512i of_rows(const BFloat16* row, const BFloat16* next, __mmask16 there) {
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, row));
    if (next == nullptr) return low;
    return _mm512_or_si512(low, _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, next)), 16));
  }
};
template <class T>
inline const T* row_at(ProductRows a, int64_t row) { return reinterpret_cast<const T*>(a.data + row * a.pitch); }

inline void pack_turned(ProductRows from, const Panels& to, int64_t begin, int64_t end) {
  for (int64_t p = begin; p < end; ++p) {
    const int64_t first = p * Panels::kPanel, width = to.columns - first < Panels::kPanel ? to.columns - first : Panels::kPanel;
    const int64_t vectors = (width + kLine - 1) / kLine;
    for (int64_t unit = 0; unit < to.units; unit += kLine) {
      const __mmask16 there = first_lanes(to.units - unit);
      for (int64_t v = 0; v < vectors; ++v) {
        Bits square[kLine];
        for (int i = 0; i < kLine; ++i) {
          const int64_t column = v * kLine + i;
          const char* row = from.data + (first + column) * from.pitch + kUnitBytes * unit;
          square[i] = column < width ? (Bits)_mm512_maskz_loadu_epi32(there, row) : Bits{};
        }
        transpose(square);
        uint32_t* line = to.panel(p) + (unit * vectors + v) * kLine;
        for (int64_t i = 0; i < kLine && unit + i < to.units; ++i)
          _mm512_storeu_si512(line + i * vectors * kLine, (__m512i)square[i]);
      }
    }
  }
}

template <class T>
void pack(ProductRows from, const Panels& to, int64_t begin, int64_t end) {
  constexpr int64_t kAtOnce = 16;  // units: a panel's lines are written in runs, and the rows are read before they leave
  for (int64_t first_unit = 0; first_unit < to.units; first_unit += kAtOnce)
    for (int64_t p = begin; p < end; ++p) {
      const int64_t first = p * Panels::kPanel, width = to.columns - first < Panels::kPanel ? to.columns - first : Panels::kPanel;
      const int64_t vectors = (width + kLine - 1) / kLine;
      for (int64_t unit = first_unit; unit < first_unit + kAtOnce && unit < to.units; ++unit) {
        const int64_t at = unit * Unit<T>::elements;
        const T *row = row_at<T>(from, at) + first, *next = at + 1 < to.summed ? row_at<T>(from, at + 1) + first : nullptr;
        uint32_t* line = to.panel(p) + unit * vectors * kLine;
        for (int64_t i = 0; i < vectors * kLine; i += kLine)
          _mm512_storeu_si512(line + i, Unit<T>::of_rows(row + i, next == nullptr ? nullptr : next + i, first_lanes(width - i)));
      }
    }
}

template <class T> inline __m512 multiplied(__m512 sum, __m512i a, __m512i b);
template <>
__attribute__((target("avx512bf16"))) inline __m512 multiplied<BFloat16>(__m512 sum, __m512i a, __m512i b) {
  return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}
template <>
__attribute__((target("avx512bf16"))) inline __m512 multiplied<float>(__m512 sum, __m512i a, __m512i b) {
  return _mm512_fmadd_ps((__m512)a, (__m512)b, sum);
}
inline void store_rounded(float* to, __mmask16 there, __m512 value) { _mm512_mask_storeu_ps(to, there, value); }
__attribute__((target("avx512bf16"))) inline void store_rounded(BFloat16* to, __mmask16 there, __m512 value) {
  _mm256_mask_storeu_epi16(to, there, (__m256i)_mm512_cvtneps_pbh(value));
}

// A tile, by its columns: eight elements side by side.
template <class T, int N>
__attribute__((target("avx512bf16"))) void store_turned(const __m512 (&sums)[kRows][N], const ProductOut& c, int64_t rows,
                                                        int64_t columns) {
  const __mmask16 there = first_lanes(rows < kRows ? rows : kRows);
  SDP_UNROLL for (int j = 0; j < N; ++j) {
    Bits square[kLine] = {};
    SDP_UNROLL for (int i = 0; i < kRows; ++i) square[i] = (Bits)sums[i][j];
    transpose(square);
    for (int64_t i = 0; i < kLine && j * kLine + i < columns; ++i) {
      const int64_t at = (j * kLine + i) * c.pitch;
      const __m512 value = (__m512)square[i];
      if (c.sums == nullptr) store_rounded(reinterpret_cast<T*>(c.rounded) + at, there, value);
      else _mm512_mask_storeu_ps(c.sums + at, there,
                                 c.add ? _mm512_add_ps(_mm512_maskz_loadu_ps(there, c.sums + at), value) : value);
    }
  }
}

// One tile: row i of A begins at a[i], its units are Step bytes apart. Only `rows` and `columns` of it are written.
template <class T, int N, int Step>
__attribute__((target("avx512bf16"))) void tile(const char* const (&a)[kRows], const uint32_t* b, int64_t units,
                                                const ProductOut& c, int64_t rows, int64_t columns) {
  constexpr int64_t kChain = Unit<T>::chain;
  __m512 sums[kRows][N], earlier[kRows][N];  // of a chain, in registers, and of those before it
  for (int64_t unit = 0;;) {
    SDP_UNROLL for (int i = 0; i < kRows; ++i)
      SDP_UNROLL for (int j = 0; j < N; ++j) sums[i][j] = _mm512_setzero_ps();
    for (const int64_t end = units - unit < kChain ? units : unit + kChain; unit < end; ++unit, b += N * kLine) {
      __m512i line[N];
      SDP_UNROLL for (int j = 0; j < N; ++j) line[j] = _mm512_loadu_si512(b + j * kLine);
      SDP_UNROLL for (int i = 0; i < kRows; ++i) {
        int factor;
        memcpy(&factor, a[i] + unit * Step, sizeof(factor));
        SDP_UNROLL for (int j = 0; j < N; ++j) sums[i][j] = multiplied<T>(sums[i][j], _mm512_set1_epi32(factor), line[j]);
      }
    }
    if (unit == units) break;
    SDP_UNROLL for (int i = 0; i < kRows; ++i)
      SDP_UNROLL for (int j = 0; j < N; ++j)
        earlier[i][j] = unit == kChain ? sums[i][j] : _mm512_add_ps(earlier[i][j], sums[i][j]);
  }
  if (units > kChain) {
    SDP_UNROLL for (int i = 0; i < kRows; ++i)
      SDP_UNROLL for (int j = 0; j < N; ++j) sums[i][j] = _mm512_add_ps(earlier[i][j], sums[i][j]);
  }
  if (c.turned) return store_turned<T, N>(sums, c, rows, columns);
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
        store_rounded(reinterpret_cast<T*>(c.rounded) + at, there, _mm512_add_ps(sums[i][j], bias));
      }
    }
  }
}

inline ProductOut moved(ProductOut c, int64_t row, int64_t column, int64_t element) {
  const int64_t by = c.turned ? column * c.pitch + row : row * c.pitch + column;
  if (c.sums != nullptr) c.sums += by;
  else c.rounded += by * element;
  if (c.bias != nullptr) c.bias += column;
  return c;
}

template <class T, int Step>
void tile_of(const char* const (&a)[kRows], const Panels& b, int64_t panel, const ProductOut& c, int64_t row, int64_t rows) {
  const int64_t first = panel * Panels::kPanel, columns = b.columns - first;
  const ProductOut to = moved(c, row, first, sizeof(T));
  if (columns > 2 * kLine) tile<T, 3, Step>(a, b.panel(panel), b.units, to, rows, columns);
  else if (columns > kLine) tile<T, 2, Step>(a, b.panel(panel), b.units, to, rows, columns);
  else tile<T, 1, Step>(a, b.panel(panel), b.units, to, rows, columns);
}

template <class T>
void rows(ProductRows a, const Panels& b, const ProductOut& c, int64_t count) {
  for (int64_t p = 0; p < b.count(); ++p)
    for (int64_t row = 0; row < count; row += kRows) {
      const char* starts[kRows];
      for (int i = 0; i < kRows; ++i)  // rows behind the last are that one again
        starts[i] = a.data + (row + i < count ? row + i : count - 1) * a.pitch;
      tile_of<T, kUnitBytes>(starts, b, p, c, row, count - row);
    }
}

template <class T>
void turned(ProductRows a, const Panels& b, const ProductOut& c, int64_t columns, int64_t begin, int64_t end,
            uint32_t* memory) {
  constexpr int64_t kAhead = 24, kLineElements = 64 / sizeof(T);  // rows: too far apart for the processor to foresee them
  for (int64_t unit = 0; unit < b.units; ++unit) {
    const int64_t first = unit * Unit<T>::elements;
    const T* row = row_at<T>(a, first);
    const T* next = first + 1 < b.summed ? row_at<T>(a, first + 1) : nullptr;
    const bool foreseen = first + Unit<T>::elements - 1 + kAhead < b.summed;
    for (int64_t column = 0; column < columns; column += kLine) {
      if (foreseen && column % kLineElements == 0)
        for (int64_t i = 0; i < Unit<T>::elements; ++i) prefetch(row_at<T>(a, first + kAhead + i) + column);
      const __m512i units = Unit<T>::of_rows(row + column, next == nullptr ? nullptr : next + column,
                                             first_lanes(columns - column));
      uint32_t* to = memory + (column * b.units) + unit * kRows;
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_castsi512_si256(units));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + b.units * kRows), _mm512_extracti64x4_epi64(units, 1));
    }
  }
  for (int64_t p = begin; p < end; ++p)
    for (int64_t row = 0; row < columns; row += kRows) {
      const char* starts[kRows];
      for (int i = 0; i < kRows; ++i) starts[i] = reinterpret_cast<const char*>(memory + row * b.units + i);
      tile_of<T, kUnitBytes * kRows>(starts, b, p, c, row, columns - row);
    }
}

template <class T>
constexpr ProductTable products_of() { return {pack_turned, pack<T>, rows<T>, turned<T>}; }

}  // namespace
}  // namespace level2
#endif

}  // namespace sdp
