// Launchers of KeLü on CUDA, and their registration.
#include "common/host.cuh"
#include "cuda/kelu.cuh"

namespace sdp {
namespace {

KeluStrides strides_of(const std::vector<MergedDim>& dims) {
  STD_TORCH_CHECK(dims.size() <= kKeluMaxDims, "kelu: at most ", kKeluMaxDims, " dimensions that can't be merged");
  KeluStrides s{};
  s.dims = static_cast<int>(dims.size());
  for (int d = 0; d < s.dims; ++d) {
    s.size[d] = dims[d].size, s.y[d] = dims[d].stride[0], s.x[d] = dims[d].stride[1];
    s.grad[d] = dims[d].stride.size() > 2 ? dims[d].stride[2] : 0;
  }
  return s;
}

Tensor kelu_fwd(const Tensor& x) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor y = allocate_like(x);
  if (x.numel() == 0) return y;
  dispatch_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    kelu_launch<T, false>(nullptr, static_cast<const T*>(x.const_data_ptr()), static_cast<T*>(y.mutable_data_ptr()),
                          x.numel(), strides_of(merge_dims({&y, &x})), Launcher{current_stream(x)});
  });
  return y;
}

Tensor kelu_bwd(const Tensor& grad, const Tensor& x) {
  STD_TORCH_CHECK(grad.scalar_type() == x.scalar_type(), "kelu_bwd: grad must have x's dtype");
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor dx = allocate_like(x);
  if (x.numel() == 0) return dx;
  dispatch_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    kelu_launch<T, true>(static_cast<const T*>(grad.const_data_ptr()), static_cast<const T*>(x.const_data_ptr()),
                         static_cast<T*>(dx.mutable_data_ptr()), x.numel(), strides_of(merge_dims({&dx, &x, &grad})),
                         Launcher{current_stream(x)});
  });
  return dx;
}

}  // namespace
}  // namespace sdp

STABLE_TORCH_LIBRARY_IMPL(sdp_kernels_cpp, CUDA, m) {
  m.impl("kelu_fwd", TORCH_BOX(&sdp::kelu_fwd));
  m.impl("kelu_bwd", TORCH_BOX(&sdp::kelu_bwd));
}
