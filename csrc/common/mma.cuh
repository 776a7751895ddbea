// Tensor cores and their operands: mma.sync m16n8k16, ldmatrix, movmatrix, cp.async, and ex2. No torch.
//
// A fragment is what each lane of a warp holds of a small matrix. With g = lane / 4, t = lane % 4, and a register that
// holds two neighbours, the lower index in its lower half (PTX ISA, "Matrix fragments for mma.m16n8k16"):
//   A (16×16)  a[0]: row g, columns 2t, 2t+1;  a[1]: row g+8;  a[2]: row g, columns 2t+8, 2t+9;  a[3]: row g+8 of these
//   B (16×8)   b[0]: rows 2t, 2t+1, column g;  b[1]: rows 2t+8, 2t+9
//   D (16×8)   d[0], d[1]: row g, columns 2t, 2t+1;  d[2], d[3]: row g+8
//   8×8        one register: row g, columns 2t, 2t+1
// So two D tiles side by side, rounded and packed, are an A: what one product leaves in registers, the next one takes.
//
// All of these want the whole warp. They order no memory: what other lanes wrote needs a barrier before ldmatrix.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace sdp {

#ifdef __CUDACC__

// Older GPUs don't have all of this; kernels that use it must not be launched there, but compile.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#define SDP_MMA_ASM(...) __trap()
#define SDP_MMA_PURE_ASM(...) __trap()
#else
#define SDP_MMA_ASM(...) asm volatile(__VA_ARGS__)
#define SDP_MMA_PURE_ASM(...) asm(__VA_ARGS__)
#endif

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// d += a · b, T = __nv_bfloat16 or __half; products exact, sums fp32.
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    SDP_MMA_ASM(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    static_assert(std::is_same_v<T, __half>);
    SDP_MMA_ASM(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

// N (1, 2, 4) matrices of 8×8 16-bit elements from shared memory: r[m] is this lane's part of matrix m, whose row i
// starts at the address that lane 8m + i gives, aligned to 16 bytes. Addresses of lanes from 8N on don't matter.
// Transposed: this lane's part of the transposed matrix.
template <int N, bool Transposed = false>
__device__ __forceinline__ void ldmatrix(uint32_t (&r)[N], const void* row) {
  static_assert(N == 1 || N == 2 || N == 4);
  const uint32_t address = shared_address(row);
  if constexpr (N == 1 && !Transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(address) : "memory");
  else if constexpr (N == 1)
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(address) : "memory");
  else if constexpr (N == 2 && !Transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(address)
                 : "memory");
  else if constexpr (N == 2)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(address)
                 : "memory");
  else if constexpr (!Transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

// This lane's part of an 8×8 matrix to its part of the transposed one.
__device__ __forceinline__ uint32_t movmatrix_transposed(uint32_t part) {
  uint32_t out;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(part));
  return out;
}

// Starts copying Bytes (4, 8, 16; both addresses aligned to that) from global to shared memory; zeros if not `there`,
// and then `from` is not read.
template <int Bytes>
__device__ __forceinline__ void copy_async(void* to, const void* from, bool there = true) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16);
  const int bytes = there ? Bytes : 0;
  if constexpr (Bytes == 16)  // past the first-level cache
    SDP_MMA_ASM("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes)
                : "memory");
  else
    SDP_MMA_ASM("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(to)), "l"(from), "n"(Bytes),
                "r"(bytes)
                : "memory");
}
// Ends this thread's group of copies.
__device__ __forceinline__ void copy_async_commit() { SDP_MMA_ASM("cp.async.commit_group;" ::: "memory"); }
// Waits until all of this thread's groups but the newest `Left` have landed; other threads see them after a barrier.
template <int Left>
__device__ __forceinline__ void copy_async_wait() {
  SDP_MMA_ASM("cp.async.wait_group %0;" ::"n"(Left) : "memory");
}

// 2ˣ within 2 units in the last place; 0 for −∞, and for what would be subnormal.
__device__ __forceinline__ float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two numbers rounded to T in one register, `low` in its lower half.
template <class T>
__device__ __forceinline__ uint32_t pack_pair(float low, float high) {
  uint32_t out = 0;
  if constexpr (std::is_same_v<T, __nv_bfloat16>)
    SDP_MMA_PURE_ASM("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  else
    SDP_MMA_PURE_ASM("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
}

#else  // tests/simt/simt_mma.h, included before, does what the instructions do

using simt::copy_async;
using simt::copy_async_commit;
using simt::copy_async_wait;
using simt::fast_exp2;
using simt::ldmatrix;
using simt::mma_m16n8k16;
using simt::movmatrix_transposed;
using simt::pack_pair;

#endif

// The numbers in a register of two.
template <class T>
__device__ __forceinline__ float low_of(uint32_t pair) {
#ifdef __CUDACC__
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return __uint_as_float(pair << 16);
  else return __half2float(__ushort_as_half(static_cast<unsigned short>(pair)));
#else
  return simt::element_of<T>(pair & 0xffffu);
#endif
}
template <class T>
__device__ __forceinline__ float high_of(uint32_t pair) {
#ifdef __CUDACC__
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return __uint_as_float(pair & 0xffff0000u);
  else return __half2float(__ushort_as_half(static_cast<unsigned short>(pair >> 16)));
#else
  return simt::element_of<T>(pair >> 16);
#endif
}

}  // namespace sdp
