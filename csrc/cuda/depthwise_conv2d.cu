// Depthwise convolution on CUDA: tensors to cases, and the registration of the operator.
#include <optional>
#include <tuple>

#include "common/host.cuh"
#include "cuda/depthwise_conv2d.cuh"

namespace sdp {
namespace {

using torch::headeronly::ScalarType;

// The picture in a tensor: (B, C, H, W), or the rows of a token buffer (B, T, C) from `registers` on.
DepthwiseView view_of(const Tensor& t, const int64_t (&sizes)[4], int64_t registers) {
  const char* data = static_cast<const char*>(t.const_data_ptr());
  if (t.dim() == 4) return depthwise_view(data, sizes, t.stride(0), t.stride(1), t.stride(2), t.stride(3));
  data += registers * t.stride(1) * t.element_size();
  return depthwise_view(data, sizes, t.stride(0), t.stride(2), sizes[3] * t.stride(1), t.stride(1));
}

bool has_tensor_cores(const Tensor& t) {  // of the kind that mma.sync m16n8k16 asks for
  int major = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, t.get_device_index()));
  return major >= 8;
}

// A case, and what its pointers point into.
struct Prepared {
  DepthwiseCase<float> c{};
  int64_t sizes[4];
  int kernel;
  Tensor norm_weight, norm_bias;

  Prepared(const Tensor& x, const Tensor& weight, const std::vector<int64_t>& grid, int64_t registers,
           const std::optional<Tensor>& mean, const std::optional<Tensor>& rstd, const std::optional<Tensor>& gamma,
           const std::optional<Tensor>& beta) {
    const bool picture = x.dim() == 4;
    STD_TORCH_CHECK(picture || grid.size() == 2, "depthwise_conv2d: a token buffer needs grid = [H, W]");
    STD_TORCH_CHECK(weight.scalar_type() == x.scalar_type(), "depthwise_conv2d: weight must have x's dtype");
    sizes[0] = x.size(0), sizes[1] = x.size(picture ? 1 : 2);
    sizes[2] = picture ? x.size(2) : grid[0], sizes[3] = picture ? x.size(3) : grid[1];
    kernel = static_cast<int>(weight.size(3));
    STD_TORCH_CHECK(sizes[0] * sizes[2] * sizes[3] < int64_t(1) << 31, "depthwise_conv2d: at most 2^31 - 1 pixels");
    c.batch = static_cast<int>(sizes[0]), c.channels = static_cast<int>(sizes[1]);
    c.height = static_cast<int>(sizes[2]), c.width = static_cast<int>(sizes[3]);
    c.registers = picture ? 0 : static_cast<int>(registers);
    c.x = view_of(x, sizes, registers);
    c.weight = weight.const_data_ptr();
    c.weight_channel = weight.stride(0), c.weight_row = weight.stride(2), c.weight_column = weight.stride(3);
    if (!mean) return;
    STD_TORCH_CHECK(mean->is_contiguous() && rstd->is_contiguous(), "depthwise_conv2d: statistics must be contiguous");
    c.mean = static_cast<const float*>(mean->const_data_ptr()) + c.registers;
    c.rstd = static_cast<const float*>(rstd->const_data_ptr()) + c.registers;
    c.statistics_batch = mean->stride(0);
    norm_weight = readable(*gamma, x), norm_bias = readable(*beta, x);
    c.norm_weight = norm_weight.const_data_ptr(), c.norm_bias = norm_bias.const_data_ptr();
    c.wide_norm_weight = norm_weight.scalar_type() == ScalarType::Float;
    c.wide_norm_bias = norm_bias.scalar_type() == ScalarType::Float;
  }
};

Tensor depthwise_conv2d_fwd(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                            std::vector<int64_t> grid, int64_t registers, const std::optional<Tensor>& mean,
                            const std::optional<Tensor>& rstd, const std::optional<Tensor>& norm_weight,
                            const std::optional<Tensor>& norm_bias) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor y = allocate_like(x);
  if (x.numel() == 0) return y;
  Prepared p(x, weight, grid, registers, mean, rstd, norm_weight, norm_bias);
  p.c.out = view_of(y, p.sizes, registers);
  if (bias) p.c.bias = bias->const_data_ptr(), p.c.bias_channel = bias->stride(0);
  dispatch_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const DepthwisePlan plan = depthwise_conv2d_plan<T>(p.c, p.kernel, false, has_tensor_cores(x));
    depthwise_conv2d_forward<T>(p.c, p.kernel, plan, Launcher{current_stream(x)});
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
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor dx = allocate_like(x);
  Prepared p(x, weight, grid, registers, mean, rstd, norm_weight, norm_bias);
  Tensor dweight = allocate(weight, {p.sizes[1], 1, p.kernel, p.kernel}, ScalarType::Float);
  Tensor dbias = allocate(weight, {p.sizes[1]}, ScalarType::Float);
  if (weight.numel() == 0) return {dx, dweight, dbias};
  p.c.out = view_of(dx, p.sizes, registers), p.c.grad = view_of(grad, p.sizes, registers);
  dispatch_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const DepthwisePlan plan = depthwise_conv2d_plan<T>(p.c, p.kernel, true, has_tensor_cores(x));
    const Tensor partial = allocate(
        x, {plan.tile.splits, p.c.channels, p.kernel * p.kernel + 1}, ScalarType::Float);
    p.c.partial = static_cast<float*>(partial.mutable_data_ptr());
    depthwise_conv2d_backward<T>(p.c, p.kernel, plan, static_cast<float*>(dweight.mutable_data_ptr()),
                                 static_cast<float*>(dbias.mutable_data_ptr()), Launcher{current_stream(x)});
  });
  return {dx, dweight, dbias};
}

}  // namespace
}  // namespace sdp

STABLE_TORCH_LIBRARY_IMPL(sdp_kernels_cpp, CUDA, m) {
  m.impl("depthwise_conv2d_fwd", TORCH_BOX(&sdp::depthwise_conv2d_fwd));
  m.impl("depthwise_conv2d_bwd", TORCH_BOX(&sdp::depthwise_conv2d_bwd));
}
