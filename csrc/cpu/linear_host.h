// What both files of `linear` on the CPU need on the host side: from an operator's arguments to the case of a pass, and the
// two-stage sums of a backward pass. Included at level 0 only.
#pragma once
#include <optional>
#include <string>

#include "cpu/dropout.h"
#include "cpu/host.h"
#include "cpu/linear_case.h"

namespace sdp {

inline Activation activation_of(const std::string& name) {
  static const char* const names[] = {"none", "kelu", "gelu", "fast_gelu", "relu", "tanh", "sigmoid", "leaky_relu", "selu"};
  for (int i = 0; i <= kSelu; ++i)
    if (name == names[i]) return static_cast<Activation>(i);
  STD_TORCH_CHECK(false, "unknown activation ", name);
}

inline EpiloguePair pair_of(int z, int residual) {
  if (z == kBFloat16 && multiplies_bf16()) {
    if (residual == kBFloat16) return kPairedBFloat16Pair;
    if (residual == kFloat32) return kPairedBFloat16InFloat32;
  }
  if (z == residual) return static_cast<EpiloguePair>(z);
  STD_TORCH_CHECK(residual == kFloat32 && (z == kBFloat16 || z == kFloat16),
                  "residual and grad must have z's dtype, or float32 with 16 bits");
  return z == kBFloat16 ? kBFloat16InFloat32 : kFloat16InFloat32;
}

inline const float* mask_of(const Tensor& mask) {
  STD_TORCH_CHECK(mask.is_contiguous() && dtype_index(mask) == kFloat32, "path_mask must be contiguous float32 (B,)");
  return static_cast<const float*>(mask.const_data_ptr());
}

inline TokenView view_of(const Tensor& t) { return {const_cast<char*>(bytes(t)), t.stride(0), t.stride(1), t.stride(2)}; }

constexpr int64_t kDropoutStream = 0;  // reference/philox.py

// What a forward pass does to z, with the widened γ that the case points at.
class Epilogue {
 public:
  Epilogue(const std::string& activation, const std::optional<Tensor>& layer_scale, const std::optional<Tensor>& path_mask,
           const std::optional<Tensor>& residual, int64_t registers, double dropout, const std::optional<Tensor>& rng,
           int64_t layer)
      : layer_scale_(layer_scale) {
    c_.registers = registers, c_.activation = activation_of(activation);
    if (path_mask) c_.mask = mask_of(*path_mask);
    if (dropout > 0) c_.dropout = dropout_source(*rng, dropout, layer, kDropoutStream);
    if (residual) c_.residual = view_of(*residual);
  }
  // The case without its z, which is of `dtype`.
  EpilogueCase& prepare(const Tensor& y, int dtype) {
    if (layer_scale_) scale_ = widened(*layer_scale_, dtype);
    c_.tokens = y.size(1), c_.columns = y.size(2), c_.out = mutable_bytes(y), c_.scale = scale_.get();
    return c_;
  }
  bool is_identity() const {
    return c_.activation == kNone && c_.registers == 0 && c_.mask == nullptr && c_.dropout.scale == 0.0f &&
           c_.residual.data == nullptr && !layer_scale_;
  }

 private:
  EpilogueCase c_{};
  std::optional<Tensor> layer_scale_;
  Scratch scale_;
};

// A backward pass' partial sums over blocks of rows, which depend on the shape alone; the case points at them.
class BlockSums {
 public:
  int64_t rows, per_block, blocks;

  BlockSums(EpilogueCase& c, const Tensor& z, bool wants_dscale)
      : rows(z.size(0) * c.tokens), wants_dscale_(wants_dscale) {
    constexpr int64_t kBlocks = 64;
    per_block = std::max<int64_t>(32, (rows + kBlocks - 1) / kBlocks);
    blocks = (rows + per_block - 1) / per_block;
    c.pitch = (c.columns + kWidestVector - 1) / kWidestVector * kWidestVector;
    const int64_t partial = blocks * c.pitch * accumulator_bytes(dtype_index(z));
    dbias_ = Scratch(partial, true);
    if (wants_dscale) dscale_ = Scratch(partial, true);
    c.dbias = dbias_.get(), c.dscale = dscale_.get();
  }
  // (dγ, dbias), dγ empty unless wanted.
  std::pair<Tensor, Tensor> added(const EpilogueCase& c, const Tensor& z) const {
    const auto sums = [&](const Scratch& partial, bool wanted) {
      Tensor out = allocate(z, {wanted ? c.columns : 0}, accumulator_dtype(z));
      if (wanted) {
        std::vector<double> total = block_sums(partial, blocks, c.pitch, dtype_index(z));
        total.resize(c.columns);
        write_rounded(out, total);
      }
      return out;
    };
    return {sums(dscale_, wants_dscale_), sums(dbias_, true)};
  }

 private:
  bool wants_dscale_;
  Scratch dscale_, dbias_;
};

// Runs the pass alone, for a case with z, grad, out and what else it has; returns (dγ, dbias).
inline std::pair<Tensor, Tensor> run_backward(EpilogueCase& c, const Tensor& z, int grad_dtype, bool wants_dscale) {
  const BlockSums sums(c, z, wants_dscale);
  const auto kernel = SDP_ACTIVE_TABLE(epilogue_table).backward[pair_of(dtype_index(z), grad_dtype)];
  parallel(sums.blocks, 4 * sums.per_block * c.columns, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block)
      kernel(c, block * sums.per_block, std::min(sums.rows, (block + 1) * sums.per_block), block);
  });
  return sums.added(c, z);
}

}  // namespace sdp
