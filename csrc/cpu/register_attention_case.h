// One call of register attention as the kernels see it, and the table of functions each SIMD level provides.
#pragma once
#include "cpu/levels.h"
#include "cpu/philox.h"
#include "cpu/simd.h"

namespace sdp {

constexpr int64_t kHeadLimit = 128;  // elements of a head; norm parameters are padded to that with zeros

// qkv (B, T, 3, h, d), or a gradient (B, T, h·d) with part = 0, by strides in elements.
struct AttentionView {
  char* data = nullptr;
  int64_t batch = 0, token = 0, part = 0, head = 0, column = 0;
};

struct AttentionCase {
  int64_t tokens, heads, d, registers;
  bool images_read_images, registers_read_registers;  // and nothing else
  double eps, scale;
  AttentionView qkv, grad;
  void *y, *lse, *dqkv;        // contiguous; lse of accumulator type
  const void* norm_weight[2];  // of q and of k: accumulator type, kHeadLimit elements; null without that norm
  const void* norm_bias[2];
  void* norm_gradients;        // accumulator type, (B·h, 4, kHeadLimit), zeroed: dweight and dbias of q, then of k
  DropoutSource dropout;       // positions count (head, query, key) row-major within a sample
  int64_t items;               // heads of all samples
};

// The dtypes, and bf16 once more for processors that multiply pairs of them; null at levels without.
constexpr int kBFloat16Pairs = kDtypes, kAttentionForms = kDtypes + 1;

struct AttentionTable {
  // An item is one head of one sample; memory is of as many bytes as the other two say, aligned to a cache line.
  void (*forward[kAttentionForms])(const AttentionCase&, int64_t item, void* memory);
  void (*backward[kAttentionForms])(const AttentionCase&, int64_t item, void* memory);
  int64_t (*forward_bytes[kAttentionForms])(const AttentionCase&);
  int64_t (*backward_bytes[kAttentionForms])(const AttentionCase&);
};
SDP_DECLARE_TABLE(AttentionTable, attention_table)

}  // namespace sdp
