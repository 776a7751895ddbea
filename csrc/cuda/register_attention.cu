// Register attention on CUDA: tensors to cases, and the registration of the operator.
#include <cstdlib>
#include <optional>
#include <string>
#include <tuple>

#include "common/host.cuh"
#include "cuda/register_attention.cuh"

namespace sdp {
namespace {

using torch::headeronly::ScalarType;
using Parameter = std::optional<Tensor>;

// Without gaps and aligned for 16-byte accesses; a copy if need be.
Tensor dense(const Tensor& t) {
  const Tensor contiguous = t.is_contiguous() ? t : torch::stable::contiguous(t);
  return reinterpret_cast<uintptr_t>(contiguous.const_data_ptr()) % 16 == 0 ? contiguous
                                                                            : torch::stable::clone(contiguous);
}

// What a call does, and what its pointers point into.
struct Prepared {
  Tensor qkv, grad, y, rng;
  Parameter parameters[4];
  AttentionCase<float> c;

  Prepared(const Tensor& packed, const Parameter& q_weight, const Parameter& q_bias, const Parameter& k_weight,
           const Parameter& k_bias, double eps, double scale, int64_t registers, const std::string& attend,
           double dropout, const Parameter& random, int64_t layer)
      : qkv(dense(packed)),
        c(attention_case<float>(qkv.size(0), static_cast<int>(qkv.size(1)), static_cast<int>(qkv.size(3)),
                                static_cast<int>(qkv.size(4)), eps, scale, static_cast<int>(registers),
                                attend == "all" || attend == "registers_to_registers",
                                attend == "all" || attend == "image_to_image")) {
    STD_TORCH_CHECK(c.d % 8 == 0 && c.d <= 128, "register_attention: d must be a multiple of 8 up to 128");
    c.qkv = qkv.const_data_ptr();
    const Parameter* given[4] = {&q_weight, &q_bias, &k_weight, &k_bias};
    const void* data[4] = {};
    bool wide[4] = {};
    for (int i = 0; i < 4; ++i) {
      if (!given[i]->has_value()) continue;
      parameters[i] = dense(readable(**given[i], packed));
      data[i] = parameters[i]->const_data_ptr();
      wide[i] = parameters[i]->scalar_type() == ScalarType::Float;
    }
    c.q_norm = {data[0] || data[1], data[0], data[1], wide[0], wide[1]};
    c.k_norm = {data[2] || data[3], data[2], data[3], wide[2], wide[3]};
    if (dropout > 0) {
      STD_TORCH_CHECK(random && random->scalar_type() == ScalarType::Long && random->numel() == 3,
                      "register_attention: dropout needs rng, int64 (3,)");
      rng = dense(*random);
      set_dropout(c, dropout, static_cast<const int64_t*>(rng.const_data_ptr()), layer);
    }
    int major = 0;
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, qkv.get_device_index()));
    STD_TORCH_CHECK(major >= 8 || qkv.scalar_type() == ScalarType::Float,
                    "register_attention: 16-bit types need a GPU of compute capability 8.0 or later");
  }
};

// Whether the backward pass is to multiply with warpgroups where that serves: SDP_KERNELS_CUDA_ATTENTION, "wgmma" or
// "mma", or the default says so; the GPU has them; and the code it was given is sm_90a's, not made from PTX for others.
bool wgmma_wanted(const Tensor& t) {
  const char* const set = std::getenv("SDP_KERNELS_CUDA_ATTENTION");
  const std::string wanted = set == nullptr ? "" : set;
  STD_TORCH_CHECK(wanted.empty() || wanted == "wgmma" || wanted == "mma",
                  "SDP_KERNELS_CUDA_ATTENTION must be wgmma or mma, got ", wanted);
  if (wanted.empty() ? !kAttentionWgmma : wanted != "wgmma") return false;
  int major = 0, minor = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, t.get_device_index()));
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, t.get_device_index()));
  if (major != 9 || minor != 0) return false;
  cudaFuncAttributes code{};
  STD_CUDA_CHECK(cudaFuncGetAttributes(
      &code, reinterpret_cast<const void*>(&register_attention_wgmma_bwd<__nv_bfloat16, 32>)));
  return code.binaryVersion == 90 && code.ptxVersion == 90;
}

std::tuple<Tensor, Tensor> register_attention_fwd(const Tensor& qkv, const Parameter& q_weight, const Parameter& q_bias,
                                                  const Parameter& k_weight, const Parameter& k_bias, double eps,
                                                  double scale, int64_t registers, std::string attend, double dropout,
                                                  const Parameter& rng, int64_t layer) {
  const torch::stable::accelerator::DeviceGuard guard(qkv.get_device_index());
  Prepared p(qkv, q_weight, q_bias, k_weight, k_bias, eps, scale, registers, attend, dropout, rng, layer);
  AttentionCase<float>& c = p.c;
  Tensor y = allocate(qkv, {c.batch, c.tokens, c.heads * c.d});
  Tensor lse = allocate(qkv, {c.batch, c.heads, c.tokens}, ScalarType::Float);
  if (qkv.numel() == 0) return {y, lse};
  c.y = y.mutable_data_ptr(), c.lse = static_cast<float*>(lse.mutable_data_ptr());
  dispatch_dtype(qkv, [&](auto zero) {
    using T = decltype(zero);
    register_attention_forward<T>(c, attention_plan<T>(c, false, device_limits(qkv)), Launcher{current_stream(qkv)});
  });
  return {y, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> register_attention_bwd(
    const Tensor& grad, const Tensor& qkv, const Tensor& y, const Tensor& lse, const Parameter& q_weight,
    const Parameter& q_bias, const Parameter& k_weight, const Parameter& k_bias, double eps, double scale,
    int64_t registers, std::string attend, double dropout, const Parameter& rng, int64_t layer) {
  STD_TORCH_CHECK(grad.scalar_type() == qkv.scalar_type(), "register_attention_bwd: grad must have qkv's dtype");
  const torch::stable::accelerator::DeviceGuard guard(qkv.get_device_index());
  Prepared p(qkv, q_weight, q_bias, k_weight, k_bias, eps, scale, registers, attend, dropout, rng, layer);
  AttentionCase<float>& c = p.c;
  p.grad = dense(grad), p.y = dense(y);
  const Tensor dense_lse = dense(lse);
  Tensor dqkv = allocate(qkv, {c.batch, c.tokens, 3, c.heads, c.d});
  auto gradient = [&](int i) {
    return allocate(qkv, {p.parameters[i] ? int64_t(c.d) : int64_t(0)}, ScalarType::Float);
  };
  Tensor gradients[4] = {gradient(0), gradient(1), gradient(2), gradient(3)};
  auto data = [&](int i) {
    return p.parameters[i] ? static_cast<float*>(gradients[i].mutable_data_ptr()) : nullptr;
  };
  c.grad = p.grad.const_data_ptr(), c.y = const_cast<void*>(p.y.const_data_ptr());
  c.lse = static_cast<float*>(const_cast<void*>(dense_lse.const_data_ptr()));
  c.dqkv = dqkv.mutable_data_ptr();
  dispatch_dtype(qkv, [&](auto zero) {
    using T = decltype(zero);
    const AttentionPlan plan = attention_plan<T>(c, true, device_limits(qkv), wgmma_wanted(qkv));
    const Tensor partial = allocate(
        qkv, {c.q_norm.there || c.k_norm.there ? plan.geometry.blocks : int64_t(0), 2, c.d}, ScalarType::Float);
    c.partial = static_cast<float*>(partial.mutable_data_ptr());
    register_attention_backward<T>(c, plan, AttentionGradients<float>{data(2), data(3), data(0), data(1)},
                                   Launcher{current_stream(qkv)});
  });
  return {dqkv, gradients[0], gradients[1], gradients[2], gradients[3]};
}

}  // namespace
}  // namespace sdp

STABLE_TORCH_LIBRARY_IMPL(sdp_kernels_cpp, CUDA, m) {
  m.impl("register_attention_fwd", TORCH_BOX(&sdp::register_attention_fwd));
  m.impl("register_attention_bwd", TORCH_BOX(&sdp::register_attention_bwd));
}
