// Tensors for outputs, without a call through the dispatcher: with cold caches one costs as much as a small kernel.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/stableivalue_conversions.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/HeaderOnlyArrayRef.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <array>
#include <cstdint>

namespace sdp {

using torch::stable::Tensor;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

namespace detail {

inline constexpr int64_t kMostDims = 8;

inline Tensor empty_strided(const Tensor& like, int64_t dims, const int64_t* sizes, const int64_t* strides,
                            torch::headeronly::ScalarType dtype) {
  const int32_t dtype_code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  int32_t device_type, device_index;  // TORCH_ERROR_CODE_CHECK: torch 2.11 has no STABLE_ one
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dims, sizes, strides, dtype_code, device_type, device_index, &made));
  return Tensor(made);
}

// Whether the elements fill their memory, each once: then an output keeps the strides.
inline bool dense(const Tensor& t) {
  std::array<std::array<int64_t, 2>, kMostDims> by_stride;
  int64_t count = 0;
  const Sizes sizes = t.sizes(), strides = t.strides();
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] == 1) continue;
    if (sizes[d] == 0 || count == kMostDims) return false;
    int64_t at = count++;
    for (; at > 0 && by_stride[at - 1][0] > strides[d]; --at) by_stride[at] = by_stride[at - 1];
    by_stride[at] = {strides[d], sizes[d]};
  }
  int64_t expected = 1;
  for (int64_t i = 0; i < count; ++i) {
    if (by_stride[i][0] != expected) return false;
    expected *= by_stride[i][1];
  }
  return true;
}

}  // namespace detail

// A contiguous tensor of these sizes (eight at most) on like's device.
inline Tensor allocate(const Tensor& like, Sizes sizes, torch::headeronly::ScalarType dtype) {
  std::array<int64_t, detail::kMostDims> strides;
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0; stride *= std::max<int64_t>(1, sizes[d])) strides[d] = stride;
  return detail::empty_strided(like, sizes.size(), sizes.data(), strides.data(), dtype);
}
inline Tensor allocate(const Tensor& like, Sizes sizes) {
  return allocate(like, sizes, like.scalar_type());
}

// As torch.empty_like: in x's memory layout where x is dense.
inline Tensor allocate_like(const Tensor& x) {
  if (!detail::dense(x)) return torch::stable::empty_like(x);
  const Sizes sizes = x.sizes();
  return detail::empty_strided(x, sizes.size(), sizes.data(), x.strides().data(), x.scalar_type());
}

}  // namespace sdp
