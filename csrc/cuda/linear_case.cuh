// What `linear` does around its GEMM: what a kernel is told, and how a thread reads and writes its columns. No torch.
#pragma once
#include "common/activations.cuh"
#include "common/block.cuh"
#include "common/pack.cuh"
#include "common/philox.cuh"

namespace sdp {

// (B, T, N) by strides in elements. No data: the tensor is absent.
struct TokenView {
  void* data = nullptr;
  int64_t batch = 0, token = 0, column = 0;
  bool packed = false;  // a thread's columns are aligned 16-byte accesses
};

// z is of type T; residual, y and dy of R: T, or fp32 beside a 16-bit z. Sums and γ are computed in T's accumulator.
template <class A>
struct EpilogueCase {
  int64_t rows, tokens, registers;  // B·T rows; tokens of a sample, or all rows where samples don't matter
  int columns, activation;
  TokenView z, residual, grad;  // z is absent where backward does not depend on it; residual in forward, may be absent
  void* out;                    // forward y of R, backward dz of T: contiguous
  const void* scale;            // γ (N,), or null
  bool wide_scale;              // of the accumulator's type, else of T
  const float* mask;            // (B,), or null
  const int64_t* rng;           // (3,), or null: nothing drops; positions count row-major within a sample
  uint32_t threshold, place;    // an element is kept when its word is at least the threshold
  float kept;                   // what it is multiplied by then
  int lanes, strips;            // threads next to each other along a row, and how often that fits
  int64_t block_rows;           // of a block
  A* partial;                   // backward: (chunks of rows, 2 or 1, N): sums for dγ where there is γ, and for dbias

  int sums() const { return scale == nullptr ? 1 : 2; }
};

// A view of a tensor; strides of dimensions of size 1 mean nothing and are set so that dimensions merge.
inline TokenView token_view(const void* data, int64_t batch_size, int64_t tokens, int64_t columns, int64_t batch,
                            int64_t token, int64_t column) {
  if (columns == 1) column = 1;
  if (tokens == 1) token = columns * column;
  if (batch_size == 1) batch = tokens * token;
  return {const_cast<void*>(data), batch, token, column, false};
}

// Where a thread stands: `line` of the block's `lines` rows at a time, columns [at, at + size).
struct EpiloguePlace {
  int lane, line, lines, at;
};
template <class T, class A>
__device__ __forceinline__ EpiloguePlace place_of(const EpilogueCase<A>& c) {
  EpiloguePlace p;
  p.lane = threadIdx.x & (c.lanes - 1), p.line = int(threadIdx.x) / c.lanes, p.lines = int(blockDim.x) / c.lanes;
  p.at = (int(blockIdx.x % unsigned(c.strips)) * c.lanes + p.lane) * kPackSize<T>;
  return p;
}

// Which of the chunks of rows is the block's.
template <class A>
__device__ __forceinline__ int64_t chunk_of(const EpilogueCase<A>& c) { return blockIdx.x / unsigned(c.strips); }

// A row, found by one division and then followed from row to row.
struct RowPlace {
  int64_t row, sample, token;
};
template <class A>
__device__ __forceinline__ RowPlace row_of(const EpilogueCase<A>& c, int64_t row) {
  if (c.tokens == c.rows) return {row, 0, row};
  if (((row | c.tokens) >> 32) == 0) {  // a division of half the width takes a fifth of the time
    const uint32_t sample = uint32_t(row) / uint32_t(c.tokens);
    return {row, sample, int64_t(uint32_t(row) - sample * uint32_t(c.tokens))};
  }
  return {row, row / c.tokens, row % c.tokens};
}
template <class A>
__device__ __forceinline__ void advance(const EpilogueCase<A>& c, RowPlace& p, int64_t rows) {
  p.row += rows, p.token += rows;
  while (p.token >= c.tokens && p.row < c.rows) p.token -= c.tokens, ++p.sample;
}

// What the row's branch is multiplied by; 0 for a register, for a dropped sample and beyond the last row: what is
// behind is not looked at then, and may be NaN.
template <class A>
__device__ __forceinline__ float keep_of(const EpilogueCase<A>& c, const RowPlace& p) {
  if (p.row >= c.rows || p.token < c.registers) return 0;
  return c.mask == nullptr ? 1.0f : c.mask[p.sample];
}

// Size columns of a row, in 16-byte packs.
template <class T, int Size>
struct Columns {
  static constexpr int pack = kPackSize<T>;
  static_assert(Size % pack == 0);
  Pack<T> packs[Size / pack];

  __device__ __forceinline__ T& operator[](int j) { return packs[j / pack].items[j % pack]; }
  // Keeps 16-bit columns two to a register until they are used.
  __device__ __forceinline__ void forget() {
#pragma unroll
    for (int i = 0; i < Size / pack; ++i) forget_derived(packs[i]);
  }
};

// Beyond the last column: 0.
template <bool Packed, int Size, class T>
__device__ __forceinline__ Columns<T, Size> load_columns(const TokenView& v, const RowPlace& p, int at, int columns) {
  const T* row = static_cast<const T*>(v.data) + p.sample * v.batch + p.token * v.token;
  Columns<T, Size> out;
  if (Packed || v.packed) {
#pragma unroll
    for (int j = 0; j < Size; j += kPackSize<T>) out.packs[j / kPackSize<T>] = load_pack(row + at + j);
  } else {
#pragma unroll
    for (int j = 0; j < Size; ++j) out[j] = at + j < columns ? row[(at + j) * v.column] : narrow<T>(0);
  }
  return out;
}
template <bool Packed, int Size, class T>
__device__ __forceinline__ void store_columns(T* row, int at, int columns, Columns<T, Size>& values) {
  if (Packed) {
#pragma unroll
    for (int j = 0; j < Size; j += kPackSize<T>) store_pack(row + at + j, values.packs[j / kPackSize<T>]);
  } else {
#pragma unroll
    for (int j = 0; j < Size; ++j)
      if (at + j < columns) row[at + j] = values[j];
  }
}

// γ of the thread's columns; beyond the last one 0.
template <bool Packed, class T>
__device__ __forceinline__ void load_scale(Accumulator<T> (&out)[kPackSize<T>], const EpilogueCase<Accumulator<T>>& c,
                                           int at) {
  using A = Accumulator<T>;
  constexpr int size = kPackSize<T>;
  TokenView view;
  view.data = const_cast<void*>(c.scale), view.column = 1;
  if (c.wide_scale) {
    auto values = load_columns<Packed, size, A>(view, {0, 0, 0}, at, c.columns);
#pragma unroll
    for (int j = 0; j < size; ++j) out[j] = values[j];
  } else {
    auto values = load_columns<Packed, size, T>(view, {0, 0, 0}, at, c.columns);
#pragma unroll
    for (int j = 0; j < size; ++j) out[j] = widen(values[j]);
  }
}

// Bit j: the element in column at + j is kept. Size neighbours fall into few blocks of four words.
template <int Size, class A>
__device__ __forceinline__ uint32_t kept_columns(const EpilogueCase<A>& c, const RowPlace& p, int at) {
  const PhiloxSource source = philox_source(c.rng, c.place);
  const int64_t position = p.token * c.columns + at;
  const int skipped = int(position % 4);
  uint32_t bits = 0;
#pragma unroll
  for (int i = 0; 4 * i < Size + 3; ++i)
    if (4 * i < skipped + Size)
      bits |= philox_keeps(source, uint32_t(p.sample), uint32_t(position / 4 + i), c.threshold) << (4 * i);
  return bits >> skipped;
}

}  // namespace sdp
