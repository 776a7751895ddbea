// bf16 on a processor with AVX512_BF16 (level 2). Its instructions stand as text, so that they can be inlined into functions
// that are not compiled for that extension; they take subnormals for 0 and leave none.
#pragma once
#include "cpu/levels.h"
#include "cpu/simd.h"

#if SDP_LEVEL == 2 && SDP_KNOWS_BF16_PAIRS
#define SDP_BF16_PAIRS

namespace sdp {

struct PairedBFloat16 { uint16_t bits; };

SDP_HOST_DEVICE Floats widen(HalfBits half, PairedBFloat16) { return widen(half, BFloat16()); }
SDP_HOST_DEVICE HalfBits round_to(Floats x, PairedBFloat16) {
  HalfBits half;
  __asm__("vcvtneps2bf16 %1, %0" : "=v"(half) : "v"(x));
  return half;
}

}  // namespace sdp
#endif
