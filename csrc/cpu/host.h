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
#include <memory>
#include <type_traits>
#include <vector>

#include "common/allocate.h"

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
    if (one_row(tensors)) {
      length = tensors[0]->numel();
      step.fill(1);
      return;
    }
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

  // All of them dense and with the same strides, as they nearly always are.
  static bool one_row(const std::array<const Tensor*, N>& tensors) {
    const Sizes first = tensors[0]->strides();
    for (int k = 1; k < N; ++k) {
      const Sizes strides = tensors[k]->strides();
      if (!std::equal(strides.begin(), strides.end(), first.begin(), first.end())) return false;
    }
    return detail::dense(*tensors[0]);
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

// Calls body with the tensor's data as a pointer to its own type.
template <class Body>
auto with_data(const Tensor& t, const Body& body) {
  void* data = const_cast<void*>(t.const_data_ptr());
  switch (dtype_index(t)) {
    case 0: return body(static_cast<double*>(data));
    case 1: return body(static_cast<float*>(data));
    case 2: return body(static_cast<torch::headeronly::BFloat16*>(data));
    default: return body(static_cast<torch::headeronly::Half*>(data));
  }
}

// Rounds each value once, to the type of `to` (contiguous, as many elements as values).
inline void write_rounded(const Tensor& to, const std::vector<double>& values) {
  with_data(to, [&](auto* p) {
    using T = std::remove_reference_t<decltype(*p)>;
    using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;
    for (size_t i = 0; i < values.size(); ++i) p[i] = static_cast<T>(static_cast<Wide>(values[i]));
  });
}

inline int64_t accumulator_bytes(int dtype) { return dtype == 0 ? 8 : 4; }
inline torch::headeronly::ScalarType accumulator_dtype(const Tensor& t) {
  using torch::headeronly::ScalarType;
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Memory for the length of a call, aligned to a cache line; zeroed if asked for.
class Scratch {
 public:
  Scratch() = default;
  explicit Scratch(int64_t size, bool zeroed = false) {
    const int64_t aligned = std::max<int64_t>(64, (size + 63) / 64 * 64);
    memory_.reset(std::aligned_alloc(64, aligned));
    STD_TORCH_CHECK(memory_ != nullptr, "out of memory: ", aligned, " bytes of scratch");
    if (zeroed) std::memset(memory_.get(), 0, aligned);
  }
  void* get() const { return memory_.get(); }
  void write(int64_t i, double value, int dtype) {
    if (dtype == 0) static_cast<double*>(get())[i] = value;
    else static_cast<float*>(get())[i] = static_cast<float>(value);
  }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<void, Free> memory_;
};

// (C,) parameter as accumulator type.
inline Scratch widened(const Tensor& parameter, int dtype) {
  Scratch wide(parameter.numel() * accumulator_bytes(dtype));
  with_data(parameter, [&, count = parameter.numel(), stride = parameter.stride(0)](const auto* p) {
    for (int64_t i = 0; i < count; ++i) wide.write(i, static_cast<double>(p[i * stride]), dtype);
  });
  return wide;
}

// A (C,) parameter to be read as accumulator type: itself where that is what it is, else a widened copy.
class WideParameter {
 public:
  WideParameter(const Tensor& parameter, int dtype) {
    const int wide = dtype == 0 ? 0 : 1;
    if (dtype_index(parameter) == wide && parameter.stride(0) == 1) {
      data_ = const_cast<void*>(parameter.const_data_ptr());
    } else {
      copy_ = widened(parameter, dtype);
      data_ = copy_.get();
    }
  }
  void* get() const { return data_; }

 private:
  Scratch copy_;
  void* data_;
};

// Partial sums (blocks, count) of accumulator type, added block after block in fp64.
inline std::vector<double> block_sums(const Scratch& partial, int64_t blocks, int64_t count, int dtype) {
  std::vector<double> sums(count);
  const auto add = [&](const auto* rows) {
    for (int64_t block = 0; block < blocks; ++block)
      for (int64_t i = 0; i < count; ++i) sums[i] += rows[block * count + i];
  };
  if (dtype == 0) add(static_cast<const double*>(partial.get()));
  else add(static_cast<const float*>(partial.get()));
  return sums;
}

inline const char* bytes(const Tensor& t) { return static_cast<const char*>(t.const_data_ptr()); }
inline char* mutable_bytes(const Tensor& t) { return static_cast<char*>(t.mutable_data_ptr()); }

// Writes 0 to the first `registers` rows of each sample of a token buffer (B, T, C).
inline void zero_registers(const Tensor& t, int64_t registers) {
  const int64_t size = element_bytes(dtype_index(t));
  for (int64_t b = 0; registers > 0 && b < t.size(0); ++b)
    for (int64_t r = 0; r < registers; ++r)
      for (int64_t c = 0; c < t.size(2); ++c)
        std::memset(mutable_bytes(t) + (b * t.stride(0) + r * t.stride(1) + c * t.stride(2)) * size, 0, size);
}

}  // namespace sdp
