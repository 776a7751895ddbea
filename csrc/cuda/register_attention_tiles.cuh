// Register attention on tensor cores: 16 rows of a head in registers and in shared memory, and their LayerNorm.
//
// Order of columns. Of 32 slots a lane of an mma operand holds eight (2t, 2t+1, 2t+8, 2t+9, and 16 further); they stand
// for columns 8t … 8t+7, in every matrix: a product over columns does not care, and each access to global memory is 16
// bytes per lane. D: the head's channels rounded up to 32; what is beyond d, a multiple of 8, is zero.
#pragma once
#include "common/mma.cuh"
#include "cuda/register_attention_case.cuh"

namespace sdp {

// As operand A: x[k][e] and x[k][2 + e] hold two columns each, from first_column(k) on, of row g + 8e.
template <int D>
struct RowTile {
  uint32_t x[D / 16][4];
};

struct LanePlace {
  int group, member;
  __device__ __forceinline__ LanePlace() : group(threadIdx.x % kWarp / 4), member(threadIdx.x % 4) {}
};

__device__ __forceinline__ int first_column(int k) { return k / 2 * 32 + threadIdx.x % 4 * 8 + k % 2 * 4; }

// Keys of a tile are stored so that the scores which a lane holds belong to four neighbouring keys, 4t … 4t+3 (one
// block of Philox): slot i holds key key_in_slot(i).
__device__ __forceinline__ int key_in_slot(int slot) { return slot % 8 / 2 * 4 + slot / 8 * 2 + slot % 2; }

// Which two rows of a tile at `first` a lane loads: in order, or keys to their slots.
struct LaneRows {
  int row[2];
  __device__ __forceinline__ LaneRows(int first, bool slots) {
    const int group = LanePlace().group;
    row[0] = first + (slots ? key_in_slot(group) : group);
    row[1] = first + (slots ? key_in_slot(group + 8) : group + 8);
  }
};

// Rows from T on, and columns from d on, become zero.
template <class T, int D>
__device__ __forceinline__ void load_rows(RowTile<D>& r, const void* from, int64_t stride, const LaneRows& rows,
                                          int tokens, int d) {
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const T* p = static_cast<const T*>(from) + rows.row[e] * stride + first_column(0);
    const int columns = rows.row[e] < tokens ? d - first_column(0) : 0;
#pragma unroll
    for (int k = 0; k < D / 16; k += 2) {
      Pack<uint32_t> words{};
      if (16 * k < columns) words = load_pack(reinterpret_cast<const uint32_t*>(p + 16 * k));
#pragma unroll
      for (int i = 0; i < 4; ++i) r.x[k + i / 2][i % 2 * 2 + e] = words.items[i];
    }
  }
}
// One 16-byte store; written as an assignment, it is taken apart into four of 4 bytes here and there.
__device__ __forceinline__ void store_words(void* p, uint32_t first, uint32_t second, uint32_t third, uint32_t fourth) {
#ifdef __CUDACC__
  __stwb(static_cast<uint4*>(p), make_uint4(first, second, third, fourth));
#else
  store_pack(static_cast<uint32_t*>(p), Pack<uint32_t>{{first, second, third, fourth}});
#endif
}
template <class T, int D>
__device__ __forceinline__ void store_rows(const RowTile<D>& r, void* to, int64_t stride, const LaneRows& rows,
                                           int tokens, int d) {
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    T* p = static_cast<T*>(to) + rows.row[e] * stride + first_column(0);
    const int columns = rows.row[e] < tokens ? d - first_column(0) : 0;
#pragma unroll
    for (int k = 0; k < D / 16; k += 2)
      if (16 * k < columns)
        store_words(p + 16 * k, r.x[k][e], r.x[k][2 + e], r.x[k + 1][e], r.x[k + 1][2 + e]);
  }
}

// Two D tiles side by side, scaled per row and rounded, as rows of columns.
template <class T, int D>
__device__ __forceinline__ void round_rows(RowTile<D>& r, const float (&tiles)[D / 8][4], float upper, float lower) {
#pragma unroll
  for (int k = 0; k < D / 16; ++k)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* pair = tiles[2 * k + i / 2] + 2 * (i % 2);
      const float factor = i % 2 ? lower : upper;
      r.x[k][i] = pack_pair<T>(pair[0] * factor, pair[1] * factor);
    }
}

// XORs all words: with the sign bits, or with a zero that the compiler cannot see. The latter gives an operand that was
// loaded in pairs of words registers of its own, in the order that mma wants; otherwise it is copied at each use.
template <int D>
__device__ __forceinline__ void xor_rows(RowTile<D>& r, uint32_t bits) {
#pragma unroll
  for (int k = 0; k < D / 16; ++k)
#pragma unroll
    for (int i = 0; i < 4; ++i) r.x[k][i] ^= bits;
}

// A matrix in shared memory: rows of D elements, their 16-byte chunks permuted within groups of 8 (D % 64 = 0) or 4, so
// that the same chunk of 8 rows lies in 8 different groups of banks. Chunk 2k + odd of a row, in elements: one of 4 or
// 2 numbers that don't depend on the tile, and a constant.
template <int D>
__device__ __forceinline__ int chunk_offset(int row, int k, int odd) {
  constexpr int period = D % 64 == 0 ? 4 : 2;
  const int permutation = (D % 64 == 0 ? row % 8 : row / 2 % 4) ^ odd;
  return row * D + (k % period * 2 ^ permutation) * 8 + k / period * period * 16;
}
template <int D>
__device__ __forceinline__ void share_rows(const RowTile<D>& r, uint16_t* matrix, int first) {
  const LanePlace lane;
#pragma unroll
  for (int k = 0; k < D / 16; ++k)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      *reinterpret_cast<uint32_t*>(matrix + first * D + chunk_offset<D>(lane.group + i % 2 * 8, k, i / 2) +
                                   2 * lane.member) = r.x[k][i];
}
// The lane as the following two want it: at D = 128, where registers are scarce, places are found anew for each tile.
template <int D>
__device__ __forceinline__ int lane_of_tile() {
  return D > 96 ? forgotten(threadIdx.x % kWarp) : threadIdx.x % kWarp;
}
// Operand B of a product over columns 16k …: b[0], b[1] for rows 0 … 7 of the tile, b[2], b[3] for rows 8 … 15.
template <int D>
__device__ __forceinline__ void load_over_columns(uint32_t (&b)[4], const uint16_t* tile, int k, int lane) {
  ldmatrix<4>(b, tile + chunk_offset<D>(lane % 8 + lane / 16 * 8, k, lane / 8 % 2));
}
// Operand B of a product over the tile's rows: b[0], b[1] for columns 16k …, b[2], b[3] for 16k + 8 ….
template <int D>
__device__ __forceinline__ void load_over_rows(uint32_t (&b)[4], const uint16_t* tile, int k, int lane) {
  ldmatrix<4, true>(b, tile + chunk_offset<D>(lane % 16, k, lane / 16));
}
template <class T>
__device__ __forceinline__ void mma_pair(float (&left)[4], float (&right)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[4]) {
  const uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
  mma_m16n8k16<T>(left, a, first);
  mma_m16n8k16<T>(right, a, second);
}

__device__ __forceinline__ float quad_sum(float value) { return sum_lanes(value, 1, 4); }

// ---- LayerNorm: four lanes hold a row. Parameters lie in shared memory in fp32, (weight, bias) of D each, 0 beyond d.
template <class T, int D>
__device__ __forceinline__ void share_norm(float* parameters, const AttentionNorm& norm, int d) {
  for (int i = threadIdx.x; i < D; i += blockDim.x) {
    parameters[i] = i < d ? norm_parameter<T>(norm.weight, norm.wide_weight, i, 1) : 0;
    parameters[D + i] = i < d ? norm_parameter<T>(norm.bias, norm.wide_bias, i, 0) : 0;
  }
}

template <class T>
__device__ __forceinline__ float row_element(const uint32_t (&words)[4], int e, int j) {
  const uint32_t word = words[j / 2 * 2 + e];
  return j % 2 ? high_of<T>(word) : low_of<T>(word);
}

struct RowStatistics {
  float mean[2], rstd[2];
};
template <class T, int D>
__device__ __forceinline__ RowStatistics row_statistics(const RowTile<D>& r, int d, float eps) {
  const float share = 1.0f / static_cast<float>(d);
  RowStatistics s;
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    float sum = 0, squares = 0;
#pragma unroll
    for (int k = 0; k < D / 16; ++k)
#pragma unroll
      for (int j = 0; j < 4; ++j) sum += row_element<T>(r.x[k], e, j);
    s.mean[e] = quad_sum(sum) * share;
#pragma unroll
    for (int k = 0; k < D / 16; ++k)
      if (first_column(k) < d)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float centred = row_element<T>(r.x[k], e, j) - s.mean[e];
          squares += centred * centred;
        }
    s.rstd[e] = reciprocal_root(quad_sum(squares) * share + eps);
  }
  return s;
}

// Rows from T on stay zero: their rstd may be infinite.
template <class T, int D>
__device__ __forceinline__ void norm_rows(RowTile<D>& r, const float* parameters, const LaneRows& rows, int tokens,
                                          int d, float eps) {
  const RowStatistics s = row_statistics<T, D>(r, d, eps);
#pragma unroll
  for (int k = 0; k < D / 16; ++k) {
    const Pack<float> weight = load_pack(parameters + first_column(k));
    const Pack<float> bias = load_pack(parameters + D + first_column(k));
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float y[4];
#pragma unroll
      for (int j = 0; j < 4; ++j)
        y[j] = (row_element<T>(r.x[k], e, j) - s.mean[e]) * s.rstd[e] * weight.items[j] + bias.items[j];
      r.x[k][e] = rows.row[e] < tokens ? pack_pair<T>(y[0], y[1]) : 0;
      r.x[k][2 + e] = rows.row[e] < tokens ? pack_pair<T>(y[2], y[3]) : 0;
    }
  }
}

// The same from global to shared memory with hardly a register, for warps that have rows at work: each lane copies its
// words of a tile, then normalises them where they are.
template <class T, int D>
__device__ __forceinline__ void copy_rows(uint16_t* tile, const void* from, int64_t stride, const LaneRows& rows,
                                          int tokens, int d) {
  const LanePlace lane;
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const T* p = static_cast<const T*>(from) + rows.row[e] * stride + first_column(0);
    const int columns = rows.row[e] < tokens ? d - first_column(0) : 0;
#pragma unroll(D > 96 ? 1 : 2)
    for (int k = 0; k < D / 16; k += 2) {
      Pack<uint32_t> words{};
      if (16 * k < columns) words = load_pack(reinterpret_cast<const uint32_t*>(p + 16 * k));
#pragma unroll
      for (int i = 0; i < 4; ++i)
        *reinterpret_cast<uint32_t*>(tile + chunk_offset<D>(lane.group + 8 * e, k + i / 2, i % 2) + 2 * lane.member) =
            words.items[i];
    }
  }
}
template <class T, int D>
__device__ __forceinline__ void norm_rows_in_place(uint16_t* tile, const float* parameters, const LaneRows& rows,
                                                   int tokens, int d, float eps) {
  const LanePlace lane;
  const float share = 1.0f / static_cast<float>(d);
#pragma unroll 1
  for (int e = 0; e < 2; ++e) {
    auto word = [&](int k, int i) {
      return reinterpret_cast<uint32_t*>(tile + chunk_offset<D>(lane.group + 8 * e, k, i) + 2 * lane.member);
    };
    float sum = 0, squares = 0;
#pragma unroll(D > 96 ? 1 : 2)
    for (int i = 0; i < D / 8; ++i) {
      const uint32_t pair = *word(i / 2, i % 2);
      sum += low_of<T>(pair) + high_of<T>(pair);
    }
    const float mean = quad_sum(sum) * share;
#pragma unroll(D > 96 ? 1 : 2)
    for (int i = 0; i < D / 8; ++i) {
      const uint32_t pair = *word(i / 2, i % 2);
      const float low = low_of<T>(pair) - mean, high = high_of<T>(pair) - mean;
      if (first_column(i / 2) < d) squares += low * low + high * high;
    }
    const float rstd = reciprocal_root(quad_sum(squares) * share + eps);
    const bool inside = (e == 0 ? rows.row[0] : rows.row[1]) < tokens;  // else it stays zero: rstd may be infinite
#pragma unroll(D > 96 ? 1 : 2)
    for (int i = 0; i < D / 8; ++i) {
      const float* parameter = parameters + first_column(i / 2) + i % 2 * 2;
      const uint32_t pair = *word(i / 2, i % 2);
      const uint32_t normed = pack_pair<T>((low_of<T>(pair) - mean) * rstd * parameter[0] + parameter[D],
                                           (high_of<T>(pair) - mean) * rstd * parameter[1] + parameter[D + 1]);
      *word(i / 2, i % 2) = inside ? normed : 0;
    }
  }
}

// The gradient of 16 rows before the norm, from `gradient` (D tiles) of the normalised rows and the rows as they came,
// which it replaces. sums: this lane's part of the gradients of weight and bias, column first_column(k) + j at 4k + j.
template <class T, int D>
__device__ __forceinline__ void norm_rows_backward(RowTile<D>& r, const float (&gradient)[D / 8][4], float factor,
                                                   const float* weights, const LaneRows& rows, int tokens, int d,
                                                   float eps, float (&sums)[D / 2]) {
  const RowStatistics s = row_statistics<T, D>(r, d, eps);
  const float share = 1.0f / static_cast<float>(d);
#pragma unroll
  for (int i = 0; i < D / 2; ++i) sums[i] = 0;
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const bool inside = rows.row[e] < tokens;
    const float mean = s.mean[e], rstd = inside ? s.rstd[e] : 0;
    float plain = 0, projected = 0;
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
      const Pack<float> weight = load_pack(weights + first_column(k));
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float unit = (row_element<T>(r.x[k], e, j) - mean) * rstd;
        const float g = inside ? gradient[2 * k + j / 2][2 * e + j % 2] * factor : 0;
        sums[4 * k + j] += g * unit;
        sums[D / 4 + 4 * k + j] += g;
        plain += g * weight.items[j];
        projected += g * weight.items[j] * unit;
      }
    }
    plain = quad_sum(plain) * share;
    projected = quad_sum(projected) * share;
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
      const Pack<float> weight = load_pack(weights + first_column(k));
      float dx[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float unit = (row_element<T>(r.x[k], e, j) - mean) * rstd;
        const float g = inside ? gradient[2 * k + j / 2][2 * e + j % 2] * factor : 0;
        dx[j] = rstd * (g * weight.items[j] - plain - unit * projected);
      }
      r.x[k][e] = pack_pair<T>(dx[0], dx[1]);
      r.x[k][2 + e] = pack_pair<T>(dx[2], dx[3]);
    }
  }
}

// ---- Sums over the rows of a tile. Eight lanes hold a column; they halve the numbers they add three times, so that
// lane 16a + 8b + 4c + t ends with N / 8 sums: those from (4a + 2b + c) · N / 8 on.
template <int N>
__device__ __forceinline__ void halve_sums(float (&values)[N], int bit, int half) {
  const bool upper = threadIdx.x & bit;
#pragma unroll
  for (int i = 0; i < half; ++i) {
    const float away = upper ? values[i] : values[i + half];
    const float kept = upper ? values[i + half] : values[i];
    values[i] = kept + __shfl_xor_sync(kAllLanes, away, bit);
  }
}
// Adds them to the warp's own (N / 8, 32) numbers in shared memory, where each lane has its own.
template <int N>
__device__ __forceinline__ void add_column_sums(float* warp_sums, float (&values)[N]) {
  static_assert(N % 8 == 0);
  halve_sums(values, 16, N / 2);
  halve_sums(values, 8, N / 4);
  halve_sums(values, 4, N / 8);
#pragma unroll
  for (int i = 0; i < N / 8; ++i) warp_sums[i * kWarp + threadIdx.x % kWarp] += values[i];
}
// Where among a warp's numbers stands the sum number `which` (0 weight, 1 bias) of a column.
template <int D>
__device__ __forceinline__ int column_sum_place(int which, int column) {
  constexpr int n = D / 2, eighth = n / 8;
  const int index = which * (n / 2) + (column / 32 * 2 + column % 8 / 4) * 4 + column % 4;
  const int lane = index / eighth * 4 + column % 32 / 8;
  return index % eighth * kWarp + lane;
}

}  // namespace sdp
