// The emulator's tensor cores: what csrc/common/mma.cuh names, computed by warps of fibers that all have to come.
//
// Stricter than a GPU where a GPU promises nothing: a lane reads the row whose address it gives to ldmatrix when it
// comes there, not when all have come, so that a row that another lane has yet to write shows without a barrier; and
// what cp.async copies is there after the wait, not before.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <memory>

#include "simt.h"

namespace simt {

template <class T>
float element_of(uint32_t bits);
template <>
inline float element_of<__nv_bfloat16>(uint32_t bits) {
  return __bfloat162float({static_cast<uint16_t>(bits)});
}
template <>
inline float element_of<__half>(uint32_t bits) {
  static const std::unique_ptr<float[]> table = [] {
    std::unique_ptr<float[]> all(new float[1 << 16]);
    for (int i = 0; i < 1 << 16; ++i) all[i] = __half2float({static_cast<uint16_t>(i)});
    return all;
  }();
  return table[bits];
}
template <class T>
uint32_t pack_pair(float low, float high) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>)
    return __float2bfloat16_rn(low).bits | uint32_t(__float2bfloat16_rn(high).bits) << 16;
  else return __float2half_rn(low).bits | uint32_t(__float2half_rn(high).bits) << 16;
}

// Shows `mine` to the warp and returns what all of it show, by lane. Like a shuffle's: two slots, taken in turn.
template <class Value>
const Value* exchange(int line, const Value& mine) {
  static_assert(sizeof(Value) <= sizeof(Exchange::bytes));
  Block& b = *block;
  if (b.fibers.size() % kLanes != 0) fail("matrices want whole warps");
  const size_t count = b.fibers.size(), first = b.current / kLanes * kLanes;
  if (b.exchanges.size() < 2 * count) b.exchanges.resize(2 * count);
  static_assert(alignof(Value) <= alignof(Exchange));
  Value* slots = reinterpret_cast<Value*>(&b.exchanges[(b.exchange_turn[b.current]++ % 2) * count + first]);
  slots[lane()] = mine;
  warp_wait(line);
  return slots;
}

struct MmaOperands {
  float a[8], b[4];
};
template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], int line = __builtin_LINE()) {
  MmaOperands mine;
  for (int i = 0; i < 8; ++i) mine.a[i] = element_of<T>(a[i / 2] >> 16 * (i % 2) & 0xffffu);
  for (int i = 0; i < 4; ++i) mine.b[i] = element_of<T>(b[i / 2] >> 16 * (i % 2) & 0xffffu);
  const MmaOperands* all = exchange(line, mine);
  const int group = lane() / 4, member = lane() % 4;
  for (int e = 0; e < 4; ++e) {
    const int column = 2 * member + e % 2, lower = e / 2;  // row group + 8 · lower
    float sum = d[e];
    for (int k = 0; k < 16; ++k)
      sum += all[4 * group + k % 8 / 2].a[4 * (k / 8) + 2 * lower + k % 2] *
             all[4 * column + k % 8 / 2].b[2 * (k / 8) + k % 2];
    d[e] = sum;
  }
}

struct MatrixRow {
  uint16_t elements[8];
};
template <int N, bool Transposed = false>
void ldmatrix(uint32_t (&r)[N], const void* row, int line = __builtin_LINE()) {
  static_assert(N == 1 || N == 2 || N == 4);
  MatrixRow mine{};
  if (lane() < 8 * N) {
    if (reinterpret_cast<uintptr_t>(row) % 16 != 0) fail("ldmatrix from an address that is not aligned to 16 bytes");
    mine = *static_cast<const MatrixRow*>(row);
  }
  const MatrixRow* all = exchange(line, mine);
  const int group = lane() / 4, pair = 2 * (lane() % 4);
  for (int m = 0; m < N; ++m)
    r[m] = Transposed ? all[8 * m + pair].elements[group] | uint32_t(all[8 * m + pair + 1].elements[group]) << 16
                      : all[8 * m + group].elements[pair] | uint32_t(all[8 * m + group].elements[pair + 1]) << 16;
}

inline uint32_t movmatrix_transposed(uint32_t part, int line = __builtin_LINE()) {
  const uint32_t* all = exchange(line, part);
  const int group = lane() / 4, pair = 2 * (lane() % 4);  // rows `pair` and the next, column `group`
  auto element = [&](int row, int column) { return all[4 * row + column / 2] >> 16 * (column % 2) & 0xffffu; };
  return element(pair, group) | element(pair + 1, group) << 16;
}

template <int Bytes>
void copy_async(void* to, const void* from, bool there = true) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16);
  if (reinterpret_cast<uintptr_t>(to) % Bytes != 0 || (there && reinterpret_cast<uintptr_t>(from) % Bytes != 0))
    fail("cp.async with an address that is not aligned");
  Fiber& fiber = block->fibers[block->current];
  fiber.copies.push_back({to, there ? from : nullptr, Bytes, fiber.groups});
}
inline void copy_async_commit() { ++block->fibers[block->current].groups; }
template <int Left>
void copy_async_wait() {
  Fiber& fiber = block->fibers[block->current];
  auto landed = [&](const Copy& copy) { return copy.group + Left < fiber.groups; };
  for (const Copy& copy : fiber.copies) {
    if (!landed(copy)) continue;
    if (copy.from != nullptr) std::memcpy(copy.to, copy.from, copy.bytes);
    else std::memset(copy.to, 0, copy.bytes);
  }
  fiber.copies.erase(std::remove_if(fiber.copies.begin(), fiber.copies.end(), landed), fiber.copies.end());
}

inline float fast_exp2(float x) { return x < -126 ? 0.0f : std::exp2(x); }

}  // namespace simt
