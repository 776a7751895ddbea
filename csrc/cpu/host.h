// The host side's tools: dtype index, contiguous runs over tensors of any strides, threads. Included at level 0 only.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

namespace sdp {

using torch::stable::Tensor;

inline int dtype_index(const Tensor& t) {
  using torch::headeronly::ScalarType;
  switch (t.scalar_type()) {
    case ScalarType::Double: return 0;
    case ScalarType::Float: return 1;
    case ScalarType::BFloat16: return 2;
    case ScalarType::Half: return 3;
    default: break;
  }
  STD_TORCH_CHECK(false, "expected float64, float32, bfloat16 or float16");
}

inline int64_t element_bytes(int dtype) { return dtype == 0 ? 8 : dtype == 1 ? 4 : 2; }

// Runs body(begin, end) on chunks of [0, count); a chunk is worth at least `grain` units of work of `cost` each.
template <class Body>
void parallel(int64_t count, int64_t cost, const Body& body) {
  constexpr int64_t kWorkPerThread = 16384;  // elements; below that a thread costs more than it saves
  const int64_t grain = std::max<int64_t>(1, kWorkPerThread / std::max<int64_t>(1, cost));
  if (count <= grain) {
    if (count > 0) body(int64_t(0), count);
    return;
  }
  torch::stable::parallel_for(0, count, grain, body);
}

// N tensors of one shape as rows: the last dimension (in the first tensor's memory order) is the row, the others are
// counted through. Dimensions that lie one after the other in all tensors are merged.
template <int N>
struct Rows {
  int64_t length = 1, count = 1;
  std::array<int64_t, N> step{};  // stride along the row
  std::vector<int64_t> sizes;     // of the outer dimensions, outermost first
  std::vector<std::array<int64_t, N>> strides;

  explicit Rows(const std::array<const Tensor*, N>& tensors) {
    struct Dim { int64_t size; std::array<int64_t, N> stride; };
    std::vector<Dim> dims;
    for (int64_t d = 0; d < tensors[0]->dim(); ++d) {
      Dim dim{tensors[0]->size(d), {}};
      for (int k = 0; k < N; ++k) dim.stride[k] = tensors[k]->stride(d);
      if (dim.size != 1) dims.push_back(dim);
    }
    std::stable_sort(dims.begin(), dims.end(), [](const Dim& a, const Dim& b) { return a.stride[0] > b.stride[0]; });
    std::vector<Dim> merged;
    for (const Dim& dim : dims) {
      bool joins = !merged.empty();
      for (int k = 0; k < N && joins; ++k) joins = merged.back().stride[k] == dim.stride[k] * dim.size;
      if (joins) {
        merged.back().size *= dim.size;
        merged.back().stride = dim.stride;
      } else {
        merged.push_back(dim);
      }
    }
    if (merged.empty()) {
      step.fill(1);
    } else {
      length = merged.back().size;
      step = merged.back().stride;
      merged.pop_back();
    }
    for (const Dim& dim : merged) {
      count *= dim.size;
      sizes.push_back(dim.size);
      strides.push_back(dim.stride);
    }
  }

  // Calls body(offsets, from, to): part [from, to) of one row, `offsets` being the row's first element in each tensor.
  template <class Body>
  void for_each(const Body& body) const {
    if (count * length == 0) return;
    if (count == 1) {
      parallel(length, 1, [&](int64_t from, int64_t to) { body(std::array<int64_t, N>{}, from, to); });
      return;
    }
    parallel(count, length, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        std::array<int64_t, N> offset{};
        int64_t rest = row;
        for (size_t d = sizes.size(); d-- > 0; rest /= sizes[d])
          for (int k = 0; k < N; ++k) offset[k] += rest % sizes[d] * strides[d][k];
        body(offset, int64_t(0), length);
      }
    });
  }
};

// Element i of a 1-D tensor of any stride, widened; for parameters, where speed doesn't matter.
inline double read_element(const Tensor& t, int64_t i) {
  const void* data = t.const_data_ptr();
  const int64_t at = i * t.stride(0);
  switch (dtype_index(t)) {
    case 0: return static_cast<const double*>(data)[at];
    case 1: return static_cast<const float*>(data)[at];
    case 2: return static_cast<const torch::headeronly::BFloat16*>(data)[at];
    default: return static_cast<const torch::headeronly::Half*>(data)[at];
  }
}
inline void write_element(const Tensor& t, int64_t i, double value) {
  void* data = t.mutable_data_ptr();
  switch (dtype_index(t)) {
    case 0: static_cast<double*>(data)[i] = value; return;
    case 1: static_cast<float*>(data)[i] = static_cast<float>(value); return;
    case 2: static_cast<torch::headeronly::BFloat16*>(data)[i] = static_cast<float>(value); return;
    default: static_cast<torch::headeronly::Half*>(data)[i] = static_cast<float>(value);
  }
}

inline const char* bytes(const Tensor& t) { return static_cast<const char*>(t.const_data_ptr()); }
inline char* mutable_bytes(const Tensor& t) { return static_cast<char*>(t.mutable_data_ptr()); }

}  // namespace sdp
