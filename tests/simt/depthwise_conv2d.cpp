// Depthwise convolution's CUDA kernels for the emulator: does what csrc/cuda/depthwise_conv2d.cu does around `launch`.
#include "simt.h"
#include "simt_mma.h"
//
#include "library.h"
//
#include "cuda/depthwise_conv2d.cuh"

namespace {

// What a test says: sizes B, C, H, W; registers; kernel size; strides of weight (3) and bias (1); strides of the
// statistics; whether the norm's parameters are wide (2); whether there are tensor cores; multiprocessors.
struct Numbers {
  int64_t sizes[4], registers, kernel, weight[3], bias, statistics, wide[2], tensor_cores, multiprocessors;
};

// views: data and strides of B, C, H, W per tensor, from the first pixel on. norm: mean, rstd, weight, bias.
sdp::DepthwiseCase<A> case_of(const Numbers& n, const int64_t* views, const void* weight, const void* bias,
                              const void* const* norm, bool backward) {
  sdp::DepthwiseCase<A> c{};
  c.batch = int(n.sizes[0]), c.channels = int(n.sizes[1]), c.height = int(n.sizes[2]), c.width = int(n.sizes[3]);
  c.registers = int(n.registers);
  auto view = [&](int i) {
    const int64_t* v = views + 5 * i;
    return sdp::depthwise_view(reinterpret_cast<void*>(v[0]), n.sizes, v[1], v[2], v[3], v[4]);
  };
  c.x = view(0), c.out = view(1);
  if (backward) c.grad = view(2);
  c.weight = weight, c.weight_channel = n.weight[0], c.weight_row = n.weight[1], c.weight_column = n.weight[2];
  c.bias = bias, c.bias_channel = n.bias;
  c.mean = static_cast<const A*>(norm[0]), c.rstd = static_cast<const A*>(norm[1]), c.statistics_batch = n.statistics;
  c.norm_weight = norm[2], c.norm_bias = norm[3], c.wide_norm_weight = n.wide[0], c.wide_norm_bias = n.wide[1];
  return c;
}

// What was decided: kernel, access of x, out and grad, images and splits of the tiles, rows and columns of tiles.
sdp::DepthwisePlan plan_of(const Numbers& n, sdp::DepthwiseCase<A>& c, bool backward, int64_t* told) {
  sdp::DepthwisePlan plan = sdp::depthwise_conv2d_plan<T>(c, int(n.kernel), backward, n.tensor_cores, n.multiprocessors);
  const sdp::DepthwiseTile& t = plan.tile;
  const int64_t numbers[] = {int64_t(plan.kernel), int64_t(c.x.access), int64_t(c.out.access), int64_t(c.grad.access),
                             t.images,             t.splits,            t.row_tiles,           t.column_tiles};
  std::copy(std::begin(numbers), std::end(numbers), told);
  return plan;
}

}  // namespace

extern "C" {

// views: x, y.
void depthwise_conv2d_fwd(const int64_t* numbers, const int64_t* views, const void* weight, const void* bias,
                          const void* const* norm, int64_t* told) {
  Numbers n;
  std::memcpy(&n, numbers, sizeof(n));
  auto c = case_of(n, views, weight, bias, norm, false);
  const sdp::DepthwisePlan plan = plan_of(n, c, false, told);
  sdp::depthwise_conv2d_forward<T>(c, int(n.kernel), plan, Launcher{});
}

// views: x, dx, grad.
void depthwise_conv2d_bwd(const int64_t* numbers, const int64_t* views, const void* weight, const void* const* norm,
                          void* dweight, void* dbias, int64_t* told) {
  Numbers n;
  std::memcpy(&n, numbers, sizeof(n));
  auto c = case_of(n, views, weight, nullptr, norm, true);
  const sdp::DepthwisePlan plan = plan_of(n, c, true, told);
  const size_t count = size_t(plan.tile.splits) * c.channels * (n.kernel * n.kernel + 1);
  const size_t bytes = simt::settings.dry ? 0 : count * sizeof(A);
  c.partial = static_cast<A*>(std::malloc(bytes + (bytes == 0)));
  std::memset(c.partial, 0xff, bytes);
  sdp::depthwise_conv2d_backward<T>(c, int(n.kernel), plan, static_cast<A*>(dweight), static_cast<A*>(dbias), Launcher{});
  std::free(c.partial);
}
}
