// What `linear` does around its GEMM on CUDA: tensors to cases, and the registration of the operator.
#include <cmath>
#include <optional>
#include <string>
#include <tuple>

#include "common/host.cuh"
#include "cuda/linear.cuh"

namespace sdp {
namespace {

using torch::headeronly::ScalarType;
using Case = EpilogueCase<float>;

int activation_of(const std::string& name) {
  static const char* const names[] = {"none", "kelu",    "gelu",       "fast_gelu", "relu",
                                      "tanh", "sigmoid", "leaky_relu", "selu"};
  for (int i = 0; i < kActivations; ++i)
    if (name == names[i]) return i;
  STD_TORCH_CHECK(false, "unknown activation ", name);
}

Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

TokenView view_of(const Tensor& t) {
  return token_view(t.const_data_ptr(), t.size(0), t.size(1), t.size(2), t.stride(0), t.stride(1), t.stride(2));
}

// Forward's and backward's common arguments; keeps what had to be copied alive.
struct Around {
  Case c;
  std::vector<Tensor> copies;

  Around(const Tensor& z, const std::string& activation, const std::optional<Tensor>& layer_scale,
         const std::optional<Tensor>& path_mask, int64_t registers, double dropout, const std::optional<Tensor>& rng,
         int64_t layer) {
    STD_TORCH_CHECK(z.dim() == 3, "linear_epilogue: z must be (B, T, N)");
    c = epilogue_case<float>(z.size(0), z.size(1), z.size(2), registers, activation_of(activation));
    if (layer_scale) {
      copies.push_back(readable(*layer_scale, z));
      c.scale = copies.back().const_data_ptr(), c.wide_scale = copies.back().scalar_type() == ScalarType::Float;
    }
    if (path_mask) {
      STD_TORCH_CHECK(path_mask->scalar_type() == ScalarType::Float, "linear_epilogue: path_mask must be float32");
      copies.push_back(dense(*path_mask));
      c.mask = static_cast<const float*>(copies.back().const_data_ptr());
    }
    if (dropout > 0) {
      copies.push_back(dense(*rng));
      c.rng = static_cast<const int64_t*>(copies.back().const_data_ptr());
      c.threshold = static_cast<uint32_t>(std::min(std::nearbyint(dropout * 4294967296.0), 4294967295.0));
      c.place = static_cast<uint32_t>(layer * 4), c.kept = static_cast<float>(1.0 / (1.0 - dropout));
    }
  }
};

// Calls body with z's type and that of y, dy and the residual.
template <class Body>
void dispatch_pair(const Tensor& z, const Tensor& outer, const Body& body) {
  dispatch_dtype(z, [&](auto zero) {
    if (outer.scalar_type() == z.scalar_type()) return body(zero, zero);
    STD_TORCH_CHECK(outer.scalar_type() == ScalarType::Float,
                    "linear_epilogue: residual and grad must have z's dtype, or float32 with 16 bits");
    body(zero, float{});
  });
}

Tensor linear_epilogue_fwd(const Tensor& z, std::string activation, const std::optional<Tensor>& layer_scale,
                           const std::optional<Tensor>& path_mask, const std::optional<Tensor>& residual,
                           int64_t registers, double dropout, const std::optional<Tensor>& rng, int64_t layer) {
  const torch::stable::accelerator::DeviceGuard guard(z.get_device_index());
  Around around(z, activation, layer_scale, path_mask, registers, dropout, rng, layer);
  Tensor y = allocate(residual ? *residual : z, {z.size(0), z.size(1), z.size(2)});
  if (z.numel() == 0) return y;
  Case& c = around.c;
  c.z = view_of(z), c.out = y.mutable_data_ptr();
  if (residual) c.residual = view_of(*residual);
  dispatch_pair(z, y, [&](auto inner, auto outer) {
    using T = decltype(inner);
    using R = decltype(outer);
    const EpiloguePlan plan = epilogue_plan<T, R>(c, false);
    linear_epilogue_forward<T, R>(c, plan, Launcher{current_stream(z)});
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> linear_epilogue_bwd(const Tensor& grad, const Tensor& z, std::string activation,
                                                       const std::optional<Tensor>& layer_scale,
                                                       const std::optional<Tensor>& path_mask, int64_t registers,
                                                       double dropout, const std::optional<Tensor>& rng,
                                                       int64_t layer) {
  const torch::stable::accelerator::DeviceGuard guard(z.get_device_index());
  Around around(z, activation, layer_scale, path_mask, registers, dropout, rng, layer);
  Case& c = around.c;
  Tensor dz = allocate(z, {z.size(0), z.size(1), z.size(2)});
  Tensor dscale = allocate(z, {layer_scale ? c.columns : 0}, ScalarType::Float);
  Tensor dbias = allocate(z, {c.columns}, ScalarType::Float);
  if (c.activation != kNone || layer_scale) c.z = view_of(z);
  c.grad = view_of(grad), c.out = dz.mutable_data_ptr();
  dispatch_pair(z, grad, [&](auto inner, auto outer) {
    using T = decltype(inner);
    using R = decltype(outer);
    const EpiloguePlan plan = epilogue_plan<T, R>(c, true);
    const Tensor partial = allocate(z, {plan.chunks, c.sums(), c.columns}, ScalarType::Float);
    c.partial = static_cast<float*>(partial.mutable_data_ptr());
    linear_epilogue_backward<T, R>(c, plan, static_cast<float*>(dscale.mutable_data_ptr()),
                                   static_cast<float*>(dbias.mutable_data_ptr()), Launcher{current_stream(z)});
  });
  return {dz, dscale, dbias};
}

}  // namespace
}  // namespace sdp

STABLE_TORCH_LIBRARY_IMPL(sdp_kernels_cpp, CUDA, m) {
  m.impl("linear_epilogue_fwd", TORCH_BOX(&sdp::linear_epilogue_fwd));
  m.impl("linear_epilogue_bwd", TORCH_BOX(&sdp::linear_epilogue_bwd));
}
