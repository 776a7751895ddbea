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
  int64_t channels, height, width;
  int kernel;
  int64_t strip;               // output rows per strip
  DepthwiseView x, y;          // forward: input and output; backward: y is dx
  DepthwiseView grad;          // backward
  const void *mean, *rstd;     // of the LayerNorm applied while loading x: (B, H, W) with strides below, or null
  int64_t statistics_batch;    // elements from one sample's statistics to the next; pixels lie in order
  const void *norm_weight, *norm_bias;  // accumulator type, (C,)
  const void* weight;          // accumulator type, (groups, k·k, lanes)
  const void* bias;            // accumulator type, (groups, lanes), or null
  void *dweight, *dbias;       // accumulator type, (groups, k·k, lanes) and (groups, lanes) of one block
};

struct DepthwiseTable {
  void (*forward[kDtypes])(const DepthwiseCase&, int64_t sample, int64_t group, void* scratch);
  void (*backward[kDtypes])(const DepthwiseCase&, int64_t sample, int64_t group, void* scratch);
  int64_t vector_bytes;
};
SDP_DECLARE_TABLE(DepthwiseTable, depthwise_table)

}  // namespace sdp
