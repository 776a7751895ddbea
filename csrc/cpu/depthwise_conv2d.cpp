// Depthwise k×k convolution on the CPU: forward, and input, weight and bias gradient in one pass over the gradient.
//
// Each sample block has its own partial weight gradient; blocks depend on the shape alone and are added in order.
#include "cpu/depthwise_conv2d_strips.h"

namespace sdp {
namespace SDP_LEVEL_NAMESPACE {

#define SDP_ALL_DTYPES(KERNEL) {KERNEL<double>, KERNEL<float>, KERNEL<BFloat16>, KERNEL<Float16>}
extern const DepthwiseTable depthwise_table = {SDP_ALL_DTYPES(forward), SDP_ALL_DTYPES(backward), kVectorBytes};

}  // namespace SDP_LEVEL_NAMESPACE
}  // namespace sdp

#if SDP_LEVEL == 0
#include <memory>
#include <optional>

#include "cpu/host.h"

namespace sdp {
namespace {

// The picture in a tensor: (B, C, H, W), or the rows of a token buffer (B, T, C) from `registers` on.
DepthwiseView view_of(const Tensor& t, int64_t registers, int64_t width) {
  char* data = const_cast<char*>(bytes(t));
  if (t.dim() == 4) return {data, t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
  data += registers * t.stride(1) * element_bytes(dtype_index(t));
  return {data, t.stride(0), t.stride(2), width * t.stride(1), t.stride(1)};
}

// (C, …) parameter with `taps` elements per channel as accumulator type (groups, taps, lanes), zero beyond C.
Scratch grouped(const Tensor& parameter, int64_t channels, int64_t taps, int64_t lanes, int dtype) {
  const int64_t groups = (channels + lanes - 1) / lanes, kernel = taps == 1 ? 1 : parameter.size(3);
  Scratch out(groups * taps * lanes * accumulator_bytes(dtype), true);
  const int64_t channel = parameter.stride(0), row = taps == 1 ? 0 : parameter.stride(2);
  const int64_t column = taps == 1 ? 0 : parameter.stride(3);
  with_data(parameter, [&](const auto* p) {
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t tap = 0; tap < taps; ++tap) {
        const int64_t offset = c * channel + tap / kernel * row + tap % kernel * column;
        out.write(((c / lanes) * taps + tap) * lanes + c % lanes, static_cast<double>(p[offset]), dtype);
      }
  });
  return out;
}

// What forward and backward share: shapes, strips, threads.
struct DepthwisePlan {
  DepthwiseCase c{};
  int dtype;
  int64_t batch, lanes, groups, buffer_bytes;

  DepthwisePlan(const Tensor& x, const Tensor& weight, const std::vector<int64_t>& grid, int64_t vector_bytes)
      : dtype(dtype_index(x)), batch(x.size(0)) {
    const bool picture = x.dim() == 4;
    c.channels = x.size(picture ? 1 : 2);
    c.height = picture ? x.size(2) : grid[0];
    c.width = picture ? x.size(3) : grid[1];
    c.kernel = static_cast<int>(weight.size(3));
    lanes = vector_bytes / accumulator_bytes(dtype);
    groups = (c.channels + lanes - 1) / lanes;
    const int64_t border = c.kernel / 2, row_bytes = (c.width + 2 * border) * vector_bytes;
    constexpr int64_t kStripBytes = 96 * 1024;  // well inside a level-2 cache; a whole 28×28 picture
    c.strip = std::min(c.height, std::max<int64_t>(4, kStripBytes / row_bytes - 2 * border));
    buffer_bytes = (c.strip + 2 * border) * row_bytes;
  }
  int64_t row_bytes(int64_t vector_bytes) const { return c.width * vector_bytes; }

  // LayerNorm to apply while loading x; its parameters are held here.
  Scratch norm_weight, norm_bias;
  void fold(const std::optional<Tensor>& mean, const std::optional<Tensor>& rstd, const std::optional<Tensor>& weight,
            const std::optional<Tensor>& bias, int64_t registers, bool picture) {
    if (!mean) return;
    STD_TORCH_CHECK(mean->is_contiguous() && rstd->is_contiguous(), "depthwise_conv2d: statistics must be contiguous");
    const int64_t skipped = picture ? 0 : registers;
    c.mean = bytes(*mean) + skipped * accumulator_bytes(dtype);
    c.rstd = bytes(*rstd) + skipped * accumulator_bytes(dtype);
    c.statistics_batch = mean->stride(0);
    norm_weight = widened(*weight, dtype), norm_bias = widened(*bias, dtype);
    c.norm_weight = norm_weight.get(), c.norm_bias = norm_bias.get();
  }
};

Tensor depthwise_conv2d_fwd(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                            std::vector<int64_t> grid, int64_t registers, const std::optional<Tensor>& mean,
                            const std::optional<Tensor>& rstd, const std::optional<Tensor>& norm_weight,
                            const std::optional<Tensor>& norm_bias) {
  Tensor y = torch::stable::empty_like(x);
  zero_registers(y, registers);
  if (x.numel() == 0) return y;
  const DepthwiseTable& table = SDP_ACTIVE_TABLE(depthwise_table);
  DepthwisePlan plan(x, weight, grid, table.vector_bytes);
  plan.fold(mean, rstd, norm_weight, norm_bias, registers, x.dim() == 4);
  DepthwiseCase& c = plan.c;
  c.x = view_of(x, registers, c.width), c.y = view_of(y, registers, c.width);
  const Scratch wide = grouped(weight, c.channels, c.kernel * c.kernel, plan.lanes, plan.dtype);
  const Scratch start = bias ? grouped(*bias, c.channels, 1, plan.lanes, plan.dtype) : Scratch();
  c.weight = wide.get(), c.bias = start.get();
  parallel(plan.batch * plan.groups, c.height * c.width * plan.lanes * 4, [&](int64_t begin, int64_t end) {
    const Scratch scratch(plan.buffer_bytes + plan.row_bytes(table.vector_bytes));
    for (int64_t i = begin; i < end; ++i)
      table.forward[plan.dtype](c, i / plan.groups, i % plan.groups, scratch.get());
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> depthwise_conv2d_bwd(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                                        std::vector<int64_t> grid, int64_t registers,
                                                        const std::optional<Tensor>& mean,
                                                        const std::optional<Tensor>& rstd,
                                                        const std::optional<Tensor>& norm_weight,
                                                        const std::optional<Tensor>& norm_bias) {
  STD_TORCH_CHECK(grad.scalar_type() == x.scalar_type(), "depthwise_conv2d_bwd: grad must have x's dtype");
  Tensor dx = torch::stable::empty_like(x);
  zero_registers(dx, registers);
  const DepthwiseTable& table = SDP_ACTIVE_TABLE(depthwise_table);
  DepthwisePlan plan(x, weight, grid, table.vector_bytes);
  plan.fold(mean, rstd, norm_weight, norm_bias, registers, x.dim() == 4);
  const DepthwiseCase& c = plan.c;
  const int64_t taps = c.kernel * c.kernel;
  plan.c.x = view_of(x, registers, c.width), plan.c.y = view_of(dx, registers, c.width);
  plan.c.grad = view_of(grad, registers, c.width);
  const Scratch wide = grouped(weight, c.channels, taps, plan.lanes, plan.dtype);
  plan.c.weight = wide.get();

  constexpr int64_t kBlocks = 16;
  const int64_t per_block = std::max<int64_t>(1, (plan.batch + kBlocks - 1) / kBlocks);
  const int64_t blocks = (plan.batch + per_block - 1) / per_block;
  const int64_t dw_bytes = plan.groups * taps * table.vector_bytes, db_bytes = plan.groups * table.vector_bytes;
  const Scratch dweight(blocks * dw_bytes, true), dbias(blocks * db_bytes, true);
  if (x.numel() != 0) {
    parallel(blocks * plan.groups, per_block * c.height * c.width * plan.lanes * 8, [&](int64_t begin, int64_t end) {
      const Scratch scratch(2 * plan.buffer_bytes + plan.row_bytes(table.vector_bytes));
      for (int64_t i = begin; i < end; ++i) {
        const int64_t block = i / plan.groups;
        DepthwiseCase mine = c;
        mine.dweight = static_cast<char*>(dweight.get()) + block * dw_bytes;
        mine.dbias = static_cast<char*>(dbias.get()) + block * db_bytes;
        for (int64_t sample = block * per_block; sample < std::min(plan.batch, (block + 1) * per_block); ++sample)
          table.backward[plan.dtype](mine, sample, i % plan.groups, scratch.get());
      }
    });
  }
  Tensor dw = torch::stable::new_empty(weight, {c.channels, 1, c.kernel, c.kernel});
  Tensor db = torch::stable::new_empty(weight, {c.channels});
  const std::vector<double> dw_sums = block_sums(dweight, blocks, plan.groups * taps * plan.lanes, plan.dtype);
  const std::vector<double> db_sums = block_sums(dbias, blocks, plan.groups * plan.lanes, plan.dtype);
  std::vector<double> in_order(c.channels * taps);
  for (int64_t ch = 0; ch < c.channels; ++ch)
    for (int64_t tap = 0; tap < taps; ++tap)
      in_order[ch * taps + tap] = dw_sums[((ch / plan.lanes) * taps + tap) * plan.lanes + ch % plan.lanes];
  write_rounded(dw, in_order);
  write_rounded(db, {db_sums.begin(), db_sums.begin() + c.channels});
  return {dx, dw, db};
}

}  // namespace
}  // namespace sdp

STABLE_TORCH_LIBRARY_IMPL(sdp_kernels_cpp, CPU, m) {
  m.impl("depthwise_conv2d_fwd", TORCH_BOX(&sdp::depthwise_conv2d_fwd));
  m.impl("depthwise_conv2d_bwd", TORCH_BOX(&sdp::depthwise_conv2d_bwd));
}
#endif
