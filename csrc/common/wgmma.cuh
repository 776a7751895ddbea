// sm_90's warpgroup products: D (64×N, fp32) += A (64×16) · B (16×N), D and A in registers, B in shared memory. No torch.
//
// A warpgroup is four warps; rows 16w … 16w + 15 of A and D are those of warp w, each held as mma.cuh's A and D tiles:
// RowTile's words are an A, and d[n] is the tile of columns 8n … 8n + 7.
//
// B is told by a descriptor, its rows of 64 bytes swizzled: 16-byte chunk c of row r lies where chunk c ^ (r / 2 % 4)
// would (PTX ISA, "64-byte swizzling mode"), counted from an address that divides by 512. A matrix of more than 32
// columns lies in panels of 32, each with all rows.
//
// All of it is asynchronous. Between other accesses to registers of A or D and a product there has to be wgmma_fence; D
// may be read, and A changed, after wgmma_wait; what threads wrote to shared memory is seen after async_proxy_fence by
// those that wrote, and a barrier.
#pragma once
#include "common/mma.cuh"

namespace sdp {

constexpr int kGroupWarps = 4, kGroupRows = 16 * kGroupWarps;
constexpr int kPanelColumns = 32;        // of 16-bit elements, 64 bytes
constexpr int kPanelGroup = 8 * 64;      // bytes of eight rows of a panel: after them the swizzle repeats

// Machine code for sm_90a alone has these instructions. Elsewhere kernels that use them are empty, and must not run.
#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr bool kWarpgroups = false;
#else
constexpr bool kWarpgroups = true;
#endif

#ifdef __CUDACC__

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define SDP_WGMMA_ASM(...) asm volatile(__VA_ARGS__)
#else
#define SDP_WGMMA_ASM(...) __trap()
#endif

// Dynamic shared memory that begins where the swizzle does.
#define SDP_SWIZZLED_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]

// `start`: the operand's first row; `leading`: bytes from one panel to the next, where B's rows are the summed index.
__device__ __forceinline__ uint64_t panel_descriptor(const void* start, uint32_t leading) {
  return uint64_t(shared_address(start) >> 4 & 0x3fff) | uint64_t(leading >> 4 & 0x3fff) << 16 |
         uint64_t(kPanelGroup >> 4) << 32 | uint64_t(2) << 62;
}

__device__ __forceinline__ void wgmma_fence() { SDP_WGMMA_ASM("wgmma.fence.sync.aligned;" ::: "memory"); }
// Ends a group of products.
__device__ __forceinline__ void wgmma_commit() { SDP_WGMMA_ASM("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// What is given has its values by here, in registers, and none of them is read or changed earlier by what stands later.
template <int... Counts>
__device__ __forceinline__ void wgmma_hold(float (&... tiles)[Counts][4]) {
  auto hold = [](auto& d) {
#pragma unroll
    for (auto& tile : d)
#pragma unroll
      for (float& x : tile) asm volatile("" : "+f"(x)::"memory");
  };
  (hold(tiles), ...);
}
// Waits until all groups but the newest `Left` are done; wgmma_hold their sums next.
template <int Left>
__device__ __forceinline__ void wgmma_wait() {
  SDP_WGMMA_ASM("wgmma.wait_group.sync.aligned %0;" ::"n"(Left) : "memory");
}
__device__ __forceinline__ void async_proxy_fence() { SDP_WGMMA_ASM("fence.proxy.async.shared::cta;" ::: "memory"); }

// Operands of the instructions by name: sums that are added to or begun, four registers of A, and B's descriptor.
#define SDP_ADD(x) "+f"(x)
#define SDP_BEGIN(x) "=f"(x)
#define SDP_TILE(use, d, n) use(d[n][0]), use(d[n][1]), use(d[n][2]), use(d[n][3])
#define SDP_TILES4(use, d) SDP_TILE(use, d, 0), SDP_TILE(use, d, 1), SDP_TILE(use, d, 2), SDP_TILE(use, d, 3)
#define SDP_TILES6(use, d) SDP_TILES4(use, d), SDP_TILE(use, d, 4), SDP_TILE(use, d, 5)
#define SDP_TILES8(use, d) SDP_TILES6(use, d), SDP_TILE(use, d, 6), SDP_TILE(use, d, 7)
#define SDP_TILES12(use, d) \
  SDP_TILES8(use, d), SDP_TILE(use, d, 8), SDP_TILE(use, d, 9), SDP_TILE(use, d, 10), SDP_TILE(use, d, 11)
#define SDP_SUMS4 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define SDP_SUMS6 SDP_SUMS4 ",%16,%17,%18,%19,%20,%21,%22,%23"
#define SDP_SUMS8 SDP_SUMS6 ",%24,%25,%26,%27,%28,%29,%30,%31"
#define SDP_SUMS12 SDP_SUMS8 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define SDP_OTHERS4 "{%16,%17,%18,%19}, %20, p, 1, 1, %21;\n}"
#define SDP_OTHERS6 "{%24,%25,%26,%27}, %28, p, 1, 1, %29;\n}"
#define SDP_OTHERS8 "{%32,%33,%34,%35}, %36, p, 1, 1, %37;\n}"
#define SDP_OTHERS12 "{%48,%49,%50,%51}, %52, p, 1, 1, %53;\n}"
#define SDP_WGMMA(columns, tiles, type, add, use)                                                                      \
  SDP_WGMMA_ASM("{\n.reg .pred p;\nsetp.ne.b32 p, " add ", 0;\nwgmma.mma_async.sync.aligned.m64n" columns            \
                "k16.f32." type "." type " {" SDP_SUMS##tiles "}, " SDP_OTHERS##tiles                                  \
                : SDP_TILES##tiles(use, d)                                                                             \
                : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(int(OverRows)))
#define SDP_WGMMA_OF(columns, tiles)                                                                                   \
  if constexpr (Tiles == tiles && bf16 && Add) SDP_WGMMA(columns, tiles, "bf16", "1", SDP_ADD);                        \
  if constexpr (Tiles == tiles && bf16 && !Add) SDP_WGMMA(columns, tiles, "bf16", "0", SDP_BEGIN);                     \
  if constexpr (Tiles == tiles && !bf16 && Add) SDP_WGMMA(columns, tiles, "f16", "1", SDP_ADD);                        \
  if constexpr (Tiles == tiles && !bf16 && !Add) SDP_WGMMA(columns, tiles, "f16", "0", SDP_BEGIN)

// d = a · b, or d += a · b (Add); T = __nv_bfloat16 or __half, products exact, sums fp32. Rows in shared memory are B's
// columns, as K's are in Q Kᵀ, or (OverRows) its rows, as V's are in P V.
template <class T, bool OverRows, bool Add, int Tiles>
__device__ __forceinline__ void wgmma(float (&d)[Tiles][4], const uint32_t (&a)[4], uint64_t b) {
  static_assert(Tiles == 4 || Tiles == 6 || Tiles == 8 || Tiles == 12);
  constexpr bool bf16 = std::is_same_v<T, __nv_bfloat16>;
  static_assert(bf16 || std::is_same_v<T, __half>);
  SDP_WGMMA_OF("32", 4);
  SDP_WGMMA_OF("48", 6);
  SDP_WGMMA_OF("64", 8);
  SDP_WGMMA_OF("96", 12);
}

#else  // tests/simt/simt_wgmma.h, included before, does what the instructions do

#define SDP_SWIZZLED_SHARED(name) SDP_DYNAMIC_SHARED(name)

using simt::async_proxy_fence;
using simt::panel_descriptor;
using simt::wgmma;
using simt::wgmma_commit;
using simt::wgmma_fence;
using simt::wgmma_hold;
using simt::wgmma_wait;

#endif

}  // namespace sdp
