// What every launcher needs: launching, the device's limits, dimensions merged over tensors, and dtype dispatch.
#pragma once
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <vector>

#include "common/allocate.h"
#include "common/block.cuh"
#include "common/pack.cuh"

namespace sdp {

using torch::stable::Tensor;

inline cudaStream_t current_stream(const Tensor& t) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// launch(kernel, geometry, arguments...) as the operators' .cuh files ask for it. A grid without blocks is an error to
// CUDA, and more than 2³¹ − 1 don't fit in its first dimension.
struct Launcher {
  cudaStream_t stream;

  template <class... Parameters, class... Arguments>
  void operator()(void (*kernel)(Parameters...), const LaunchGeometry& g, const Arguments&... arguments) const {
    if (g.blocks == 0) return;
    STD_TORCH_CHECK(g.blocks < int64_t(1) << 31, "too many blocks for one launch: ", g.blocks);
    if (g.shared > 48 * 1024)  // above, a kernel has to ask for it
      STD_CUDA_CHECK(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                          cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(g.shared)));
    kernel<<<static_cast<unsigned>(g.blocks), g.threads, static_cast<size_t>(g.shared), stream>>>(
        static_cast<Parameters>(arguments)...);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
};

inline DeviceLimits device_limits(const Tensor& t) {
  int block = 0, multiprocessor = 0;
  const int device = t.get_device_index();
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device));
  return {block, multiprocessor};
}

// A parameter (C,) as kernels read it: without gaps, in fp32 or in x's dtype. Under autocast it may come in any other.
inline Tensor readable(const Tensor& parameter, const Tensor& x) {
  using torch::headeronly::ScalarType;
  const ScalarType dtype = parameter.scalar_type();
  const bool as_it_is = dtype == ScalarType::Float || dtype == x.scalar_type();
  const Tensor read = as_it_is ? parameter : torch::stable::to(parameter, ScalarType::Float);
  return read.is_contiguous() ? read : torch::stable::contiguous(read);
}

// Calls body(T{}) with the storage type; a functor instead of a macro, so that launches may hold commas.
template <class Body>
void dispatch_dtype(const Tensor& t, const Body& body) {
  using torch::headeronly::ScalarType;
  switch (t.scalar_type()) {
    case ScalarType::Float: return body(float{});
    case ScalarType::BFloat16: return body(__nv_bfloat16{});
    case ScalarType::Half: return body(__half{});
    default: STD_TORCH_CHECK(false, "expected float32, bfloat16 or float16");
  }
}

struct MergedDim {
  int64_t size;
  std::vector<int64_t> stride;  // one per tensor
};

// Dimensions of equally shaped tensors, outermost first in the first tensor's memory order, those of size 1 dropped and
// those that lie one after the other in every tensor merged.
inline std::vector<MergedDim> merge_dims(const std::vector<const Tensor*>& tensors) {
  std::vector<MergedDim> dims, merged;
  for (int64_t d = 0; d < tensors[0]->dim(); ++d) {
    MergedDim dim{tensors[0]->size(d), {}};
    for (const Tensor* t : tensors) dim.stride.push_back(t->stride(d));
    if (dim.size != 1) dims.push_back(dim);
  }
  std::stable_sort(dims.begin(), dims.end(),
                   [](const MergedDim& a, const MergedDim& b) { return a.stride[0] > b.stride[0]; });
  for (const MergedDim& dim : dims) {
    bool joins = !merged.empty();
    for (size_t k = 0; joins && k < tensors.size(); ++k) joins = merged.back().stride[k] == dim.stride[k] * dim.size;
    if (joins) {
      merged.back().size *= dim.size;
      merged.back().stride = dim.stride;
    } else {
      merged.push_back(dim);
    }
  }
  return merged;
}

}  // namespace sdp
