// The SIMD level an operator's kernels are compiled for, and the one this machine runs.
//
// Every csrc/cpu/<op>.cpp is compiled once per level (SDP_LEVEL = 0 baseline, 1 AVX2 + FMA + F16C, 2 AVX-512 F/BW/DQ/VL)
// and defines its table of functions in that level's namespace; its level-0 object also holds the host side. Processors other
// than x86-64 have the baseline alone: on ARM (aarch64) that is NEON, which every such processor has.
#pragma once

// Whether the compiler knows AVX512_BF16, which level 2 uses where the processor has it.
#if defined(__clang__) ? __clang_major__ >= 9 : __GNUC__ >= 10
#define SDP_KNOWS_BF16_PAIRS 1
#else
#define SDP_KNOWS_BF16_PAIRS 0
#endif

#if SDP_LEVEL == 2
#define SDP_LEVEL_NAMESPACE level2
#elif SDP_LEVEL == 1
#define SDP_LEVEL_NAMESPACE level1
#else
#define SDP_LEVEL_NAMESPACE level0
#endif

// Declares TABLE of TYPE in every level that is built; SDP_ACTIVE_TABLE(TABLE) is the one to call.
#if SDP_LEVELS == 3
#define SDP_DECLARE_TABLE(TYPE, TABLE)               \
  namespace level0 { extern const TYPE TABLE; }      \
  namespace level1 { extern const TYPE TABLE; }      \
  namespace level2 { extern const TYPE TABLE; }
#define SDP_ACTIVE_TABLE(TABLE) \
  (::sdp::active_level() == 2 ? level2::TABLE : ::sdp::active_level() == 1 ? level1::TABLE : level0::TABLE)
#else
#define SDP_DECLARE_TABLE(TYPE, TABLE) namespace level0 { extern const TYPE TABLE; }
#define SDP_ACTIVE_TABLE(TABLE) level0::TABLE
#endif

namespace sdp {
// library.cpp
int active_level();        // the highest level the processor has, or SDP_KERNELS_CPU_LEVEL if lower
bool has_bf16_pairs();     // AVX512_BF16 at level 2: multiplies pairs of bf16
// Whether linear's own GEMMs are faster than PyTorch's on this processor, which must have bf16 pairs:
bool multiplies_bf16();    // without a matrix unit (AMX), with which PyTorch's is several times faster
bool multiplies_fp32();    // an AMD one, for which PyTorch's (MKL) leaves half of each vector unused
}
