// What the depthwise convolution's kernels are told, and the table of them.
#pragma once
#include "cpu/levels.h"
#include "cpu/simd.h"

namespace sdp {

// A picture (B, C, H, W), or the image rows of a token buffer, by strides in elements.
struct DepthwiseView {
  char* data = nullptr;
  int64_t batch = 0, channel = 0, row = 0, column = 0;
};

struct DepthwiseCase {
  int64_t batch, channels, height, width;
  int64_t groups;              // of as many channels as a vector has lanes
  int kernel;
  int64_t strip;               // output rows per strip
  DepthwiseView x, y;          // forward: input and output; backward: y is dx
  DepthwiseView grad;          // backward
  const void *mean, *rstd;     // of the LayerNorm applied while loading x: (B, H, W) with strides below, or null
  int64_t statistics_batch;    // elements from one sample's statistics to the next; pixels lie in order
  const void *norm_weight, *norm_bias;  // accumulator type, (C,)
  const void* weight;          // accumulator type, (groups, k·k, lanes)
  const void* bias;            // accumulator type, (groups, lanes), or null
  void *dweight, *dbias;       // accumulator type, one (groups, k·k, lanes) and (groups, lanes) per block of samples
  int64_t block;               // samples in such a block
};

// The dtypes, and bf16 once more for processors that multiply pairs of them; null at levels without.
constexpr int kDepthwisePairs = kDtypes, kDepthwiseForms = kDtypes + 1;

struct DepthwiseTable {
  // Items [begin, end): a channel group of a sample (forward) or of a block of samples (backward), groups innermost.
  void (*forward[kDepthwiseForms])(const DepthwiseCase&, int64_t begin, int64_t end, void* scratch);
  void (*backward[kDepthwiseForms])(const DepthwiseCase&, int64_t begin, int64_t end, void* scratch);
  // A parameter, seen as one picture of `rows` × `columns`, to (groups, rows · columns, lanes) of accumulator type.
  void (*gather[kDtypes])(const DepthwiseView&, int64_t channels, int64_t rows, int64_t columns, void* to);
  // The sums of `blocks` of these, added in order, to a parameter's gradient, which is rounded.
  void (*scatter[kDtypes])(const DepthwiseView&, int64_t channels, int64_t rows, int64_t columns, const void* from,
                           int64_t blocks);
  int64_t vector_bytes;
};
SDP_DECLARE_TABLE(DepthwiseTable, depthwise_table)

}  // namespace sdp
