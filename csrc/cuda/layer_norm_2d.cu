// LayerNorm over channels on CUDA: tensors to cases, and the registration of the operator.
#include <optional>
#include <tuple>

#include "common/host.cuh"
#include "cuda/layer_norm_2d.cuh"

namespace sdp {
namespace {

using torch::headeronly::ScalarType;

bool is_picture(const Tensor& t) { return t.dim() == 4; }

PictureSizes sizes_of(const Tensor& t) {
  if (is_picture(t)) return {t.size(0), t.size(1), t.size(2), t.size(3)};
  return {t.size(0), t.size(2), 1, t.size(1)};
}

PictureView view_of(const Tensor& t) {
  const void* data = t.const_data_ptr();
  if (is_picture(t)) return picture_view(data, sizes_of(t), t.stride(0), t.stride(1), t.stride(2), t.stride(3));
  return picture_view(data, sizes_of(t), t.stride(0), t.stride(2), 0, t.stride(1));
}

Tensor new_statistics(const Tensor& x) {
  std::vector<int64_t> shape{x.size(0)};
  if (is_picture(x)) shape.insert(shape.end(), {x.size(2), x.size(3)});
  else shape.push_back(x.size(1));
  return allocate(x, shape, ScalarType::Float);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_2d_fwd(const Tensor& x, const std::optional<Tensor>& residual,
                                                             const Tensor& weight, const Tensor& bias, double eps,
                                                             int64_t registers) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor y = allocate_like(x);
  Tensor sum = residual ? allocate_like(x) : allocate(x, {0});
  Tensor mean = new_statistics(x), rstd = new_statistics(x);
  if (x.numel() == 0) return {y, mean, rstd, sum};
  const Tensor read_weight = readable(weight, x), read_bias = readable(bias, x);

  auto c = layer_norm_case<float>(sizes_of(x), registers, eps);
  c.x = view_of(x), c.y = view_of(y);
  if (residual) c.residual = view_of(*residual), c.sum = view_of(sum);
  c.weight = read_weight.const_data_ptr(), c.bias = read_bias.const_data_ptr();
  c.wide_weight = read_weight.scalar_type() == ScalarType::Float;
  c.wide_bias = read_bias.scalar_type() == ScalarType::Float;
  c.mean = static_cast<float*>(mean.mutable_data_ptr()), c.rstd = static_cast<float*>(rstd.mutable_data_ptr());
  dispatch_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const LayerNormPlan plan = layer_norm_plan<T>(c, false, device_limits(x));
    layer_norm_2d_forward<T>(c, plan, Launcher{current_stream(x)});
  });
  return {y, mean, rstd, sum};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_2d_bwd(const Tensor& grad, const std::optional<Tensor>& grad_sum,
                                                     const Tensor& x, const Tensor& weight, const Tensor& mean,
                                                     const Tensor& rstd, int64_t registers) {
  STD_TORCH_CHECK(grad.scalar_type() == x.scalar_type(), "layer_norm_2d_bwd: grad must have x's dtype");
  STD_TORCH_CHECK(mean.is_contiguous() && rstd.is_contiguous(), "layer_norm_2d_bwd: mean and rstd must be contiguous");
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor dx = allocate_like(x);
  const Tensor read_weight = readable(weight, x);
  const std::vector<int64_t> shape{weight.numel()};
  Tensor dweight = allocate(read_weight, shape), dbias = allocate(read_weight, shape);

  auto c = layer_norm_case<float>(sizes_of(x), registers, 0);
  c.x = view_of(x), c.grad = view_of(grad), c.dx = view_of(dx);
  if (grad_sum) c.grad_sum = view_of(*grad_sum);
  c.weight = read_weight.const_data_ptr();
  c.wide_weight = read_weight.scalar_type() == ScalarType::Float;
  c.mean = static_cast<float*>(const_cast<void*>(mean.const_data_ptr()));
  c.rstd = static_cast<float*>(const_cast<void*>(rstd.const_data_ptr()));
  dispatch_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const LayerNormPlan plan = layer_norm_plan<T>(c, true, device_limits(x));
    const Tensor partial = allocate(x, {plan.geometry.blocks, 2, c.channels}, ScalarType::Float);
    c.partial = static_cast<float*>(partial.mutable_data_ptr());
    const Launcher launcher{current_stream(x)};
    auto run = [&](auto* first) {
      using W = std::remove_pointer_t<decltype(first)>;
      layer_norm_2d_backward<T>(c, plan, static_cast<W*>(dweight.mutable_data_ptr()),
                                static_cast<W*>(dbias.mutable_data_ptr()), launcher);
    };
    if (c.wide_weight) run(static_cast<float*>(nullptr));
    else run(static_cast<T*>(nullptr));
  });
  const auto as_weight = [&](const Tensor& gradient) {
    if (gradient.scalar_type() == weight.scalar_type()) return gradient;
    return torch::stable::to(gradient, weight.scalar_type());
  };
  return {dx, as_weight(dweight), as_weight(dbias)};
}

}  // namespace
}  // namespace sdp

STABLE_TORCH_LIBRARY_IMPL(sdp_kernels_cpp, CUDA, m) {
  m.impl("layer_norm_2d_fwd", TORCH_BOX(&sdp::layer_norm_2d_fwd));
  m.impl("layer_norm_2d_bwd", TORCH_BOX(&sdp::layer_norm_2d_bwd));
}
