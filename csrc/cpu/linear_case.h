// What the kernels around `linear`'s GEMM are told, and the table of them.
#pragma once
#include "cpu/activations.h"
#include "cpu/levels.h"
#include "cpu/philox.h"

namespace sdp {

// (B, T, N) by strides in elements.
struct TokenView {
  char* data = nullptr;
  int64_t batch = 0, token = 0, column = 0;
};

struct EpilogueCase {
  int64_t tokens, columns, registers;
  Activation activation;
  TokenView z;                 // (B, T, N) of T; null in backward where nothing depends on it
  TokenView residual, grad;    // of R; residual may be null; grad is dy
  void* out;                   // forward y of R, backward dz of T (also in grad's place); contiguous
  void* activated;             // backward: act(z) of T, contiguous, or null
  const void* scale;           // γ, accumulator type, padded like a row of sums, or null
  const float* mask;           // (B,) or null
  DropoutSource dropout;       // positions count row-major within a sample
  int64_t pitch;               // from one row of sums to the next: N rounded up to whole vectors
  void *dscale, *dbias;        // accumulator type, one row of partial sums per block; dscale may be null
};

// Storage of z and of residual, y and dy: alike, or the latter fp32 beside a 16-bit z. With bf16 pairs, as where linear's
// own GEMM multiplies them (activations_bf16.h).
enum EpiloguePair {
  kFloat64Pair, kFloat32Pair, kBFloat16Pair, kFloat16Pair, kBFloat16InFloat32, kFloat16InFloat32, kPairedBFloat16Pair,
  kPairedBFloat16InFloat32, kPairs
};

struct EpilogueTable {
  void (*forward[kPairs])(const EpilogueCase&, int64_t begin, int64_t end);
  void (*backward[kPairs])(const EpilogueCase&, int64_t begin, int64_t end, int64_t block);
};
SDP_DECLARE_TABLE(EpilogueTable, epilogue_table)

constexpr int64_t kWidestVector = 16;  // elements of a row of sums are a multiple of this, at any level

}  // namespace sdp
