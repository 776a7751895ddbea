// One call of LayerNorm2d as the kernels see it, and the table of functions each SIMD level provides.
#pragma once
#include "cpu/levels.h"
#include "cpu/simd.h"

namespace sdp {

// A tensor (B, C, H, W) by strides in elements; a token buffer (B, T, C) has H = 1, W = T.
struct PictureView {
  char* data = nullptr;
  int64_t batch = 0, channel = 0, row = 0, column = 0;
};

struct LayerNormCase {
  int64_t channels, width, pixels, registers;  // pixels per sample, `width` of them per picture row
  double eps;
  PictureView x, residual, y, sum;             // forward: residual and sum may be null
  PictureView grad, grad_sum, dx;              // backward: grad_sum may be null
  void *weight, *bias;                         // accumulator type, (C,)
  void *mean, *rstd;                           // accumulator type, (B, pixels)
  void *dweight, *dbias;                       // accumulator type, one row of C partial sums per block
};

struct LayerNormTable {
  void (*forward_rows[kDtypes])(const LayerNormCase&, int64_t sample, int64_t begin, int64_t end);
  void (*forward_columns[kDtypes])(const LayerNormCase&, int64_t sample, int64_t begin, int64_t end, void* scratch);
  void (*backward_rows[kDtypes])(const LayerNormCase&, int64_t sample, int64_t begin, int64_t end, int64_t block);
  void (*backward_columns[kDtypes])(const LayerNormCase&, int64_t sample, int64_t begin, int64_t end, int64_t block,
                                    void* scratch);
  int64_t tile_bytes;  // accumulators of one channel's pixels in a tile
};
SDP_DECLARE_TABLE(LayerNormTable, layer_norm_table)

namespace SDP_LEVEL_NAMESPACE {

template <class T>
inline T* at(const PictureView& view, const LayerNormCase& c, int64_t sample, int64_t pixel) {
  return reinterpret_cast<T*>(view.data) + sample * view.batch + pixel / c.width * view.row +
         pixel % c.width * view.column;
}

}  // namespace SDP_LEVEL_NAMESPACE
}  // namespace sdp
