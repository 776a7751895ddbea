// Depthwise k×k convolution on the CPU: forward, and input, weight and bias gradient in one pass over the gradient.
//
// Each sample block has its own partial weight gradient; blocks depend on the shape alone and are added in order.
#include "cpu/depthwise_conv2d_strips.h"

namespace sdp {
namespace SDP_LEVEL_NAMESPACE {

#ifdef SDP_BF16_PAIRS
#define SDP_PAIRS(KERNEL) KERNEL<PairedBFloat16>
#else
#define SDP_PAIRS(KERNEL) nullptr
#endif
#define SDP_ALL_DTYPES(KERNEL) KERNEL<double>, KERNEL<float>, KERNEL<BFloat16>, KERNEL<Float16>
extern const DepthwiseTable depthwise_table = {{SDP_ALL_DTYPES(forward), SDP_PAIRS(forward)},
                                               {SDP_ALL_DTYPES(backward), SDP_PAIRS(backward)},
                                               {SDP_ALL_DTYPES(gather)},
                                               {SDP_ALL_DTYPES(scatter)},
                                               kVectorBytes};

}  // namespace SDP_LEVEL_NAMESPACE
}  // namespace sdp

#if SDP_LEVEL == 0
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

// A parameter (C, 1, k, k) or (C,), or its gradient, as the pictures of one sample.
DepthwiseView view_of_parameter(const Tensor& t) {
  char* data = const_cast<char*>(bytes(t));
  if (t.dim() == 1) return {data, 0, t.stride(0), 0, 0};
  return {data, 0, t.stride(0), t.stride(2), t.stride(3)};
}

// What forward and backward share: shapes, strips, threads.
struct DepthwisePlan {
  const DepthwiseTable& table = SDP_ACTIVE_TABLE(depthwise_table);
  DepthwiseCase c{};
  int dtype, form;
  int64_t lanes, buffer_bytes, row_bytes;
  Scratch weight, bias, norm_weight, norm_bias;  // of accumulator type; the case points at them

  DepthwisePlan(const Tensor& x, const Tensor& filters, const std::vector<int64_t>& grid) : dtype(dtype_index(x)) {
    const bool picture = x.dim() == 4;
    c.batch = x.size(0), c.channels = x.size(picture ? 1 : 2);
    c.height = picture ? x.size(2) : grid[0];
    c.width = picture ? x.size(3) : grid[1];
    c.kernel = static_cast<int>(filters.size(3));
    form = dtype == kBFloat16 && table.forward[kDepthwisePairs] != nullptr && has_bf16_pairs() ? kDepthwisePairs : dtype;
    lanes = table.vector_bytes / accumulator_bytes(dtype);
    c.groups = (c.channels + lanes - 1) / lanes;
    const int64_t border = c.kernel / 2;
    row_bytes = (c.width + 2 * border) * table.vector_bytes;
    constexpr int64_t kStripBytes = 96 * 1024;  // well inside a level-2 cache; a whole 28×28 picture
    c.strip = std::min(c.height, std::max<int64_t>(4, kStripBytes / row_bytes - 2 * border));
    buffer_bytes = (c.strip + 2 * border) * row_bytes;
    weight = gathered(filters, c.kernel), c.weight = weight.get();
  }
  Scratch gathered(const Tensor& parameter, int64_t kernel) const {
    Scratch out(c.groups * kernel * kernel * table.vector_bytes);
    table.gather[dtype](view_of_parameter(parameter), c.channels, kernel, kernel, out.get());
    return out;
  }

  // LayerNorm to apply while loading x.
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

  // Runs a kernel over items worth `cost` each; `buffers` packed strips, and a row of results that runs may write past.
  template <class Kernels>
  void run(const Kernels& kernels, int64_t items, int64_t cost, int64_t buffers) const {
    parallel(items, cost * c.height * c.width * lanes, [&](int64_t begin, int64_t end) {
      const Scratch scratch(buffers * buffer_bytes + row_bytes + 4 * table.vector_bytes);
      kernels[form](c, begin, end, scratch.get());
    });
  }
};

Tensor depthwise_conv2d_fwd(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                            std::vector<int64_t> grid, int64_t registers, const std::optional<Tensor>& mean,
                            const std::optional<Tensor>& rstd, const std::optional<Tensor>& norm_weight,
                            const std::optional<Tensor>& norm_bias) {
  Tensor y = allocate_like(x);
  zero_registers(y, registers);
  if (x.numel() == 0) return y;
  DepthwisePlan plan(x, weight, grid);
  plan.fold(mean, rstd, norm_weight, norm_bias, registers, x.dim() == 4);
  DepthwiseCase& c = plan.c;
  c.x = view_of(x, registers, c.width), c.y = view_of(y, registers, c.width);
  if (bias) plan.bias = plan.gathered(*bias, 1), c.bias = plan.bias.get();
  plan.run(plan.table.forward, c.batch * c.groups, 4, 1);
  return y;
}

std::tuple<Tensor, Tensor, Tensor> depthwise_conv2d_bwd(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                                        std::vector<int64_t> grid, int64_t registers,
                                                        const std::optional<Tensor>& mean,
                                                        const std::optional<Tensor>& rstd,
                                                        const std::optional<Tensor>& norm_weight,
                                                        const std::optional<Tensor>& norm_bias) {
  STD_TORCH_CHECK(grad.scalar_type() == x.scalar_type(), "depthwise_conv2d_bwd: grad must have x's dtype");
  Tensor dx = allocate_like(x);
  zero_registers(dx, registers);
  DepthwisePlan plan(x, weight, grid);
  plan.fold(mean, rstd, norm_weight, norm_bias, registers, x.dim() == 4);
  DepthwiseCase& c = plan.c;
  c.x = view_of(x, registers, c.width), c.y = view_of(dx, registers, c.width);
  c.grad = view_of(grad, registers, c.width);

  constexpr int64_t kBlocks = 16;
  c.block = std::max<int64_t>(1, (c.batch + kBlocks - 1) / kBlocks);
  const int64_t blocks = std::max<int64_t>(1, (c.batch + c.block - 1) / c.block), items = blocks * c.groups;
  const Scratch dweight(items * c.kernel * c.kernel * plan.table.vector_bytes, true);
  const Scratch dbias(items * plan.table.vector_bytes, true);
  c.dweight = dweight.get(), c.dbias = dbias.get();
  if (x.numel() != 0) plan.run(plan.table.backward, items, 8 * c.block, 2);
  Tensor dw = allocate(weight, {c.channels, 1, c.kernel, c.kernel}, accumulator_dtype(x));
  Tensor db = allocate(weight, {c.channels}, accumulator_dtype(x));
  const auto scatter = plan.table.scatter[dtype_index(dw)];
  scatter(view_of_parameter(dw), c.channels, c.kernel, c.kernel, c.dweight, blocks);
  scatter(view_of_parameter(db), c.channels, 1, 1, c.dbias, blocks);
  return {dx, dw, db};
}

}  // namespace
}  // namespace sdp

STABLE_TORCH_LIBRARY_IMPL(sdp_kernels_cpp, CPU, m) {
  m.impl("depthwise_conv2d_fwd", TORCH_BOX(&sdp::depthwise_conv2d_fwd));
  m.impl("depthwise_conv2d_bwd", TORCH_BOX(&sdp::depthwise_conv2d_bwd));
}
#endif
