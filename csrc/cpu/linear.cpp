// What `linear` does around its GEMM on the CPU, one pass each way:
//   forward   y = residual + mask · γ · drop(act(z))
//   backward  dz = mask · γ · drop · dy · act′(z), with dγ = Σ mask · drop · dy · act(z) and dbias = Σ dz over the rows
// and, where an activation lies between two layers, both from the second one's GEMM: dz = dy · act′(z) and again act(z).
// z (B, T, N) is the GEMM's result. Register rows of y are the residual's, or 0; those of dz are 0. Sums over
// rows are two-stage in blocks that depend on the shape alone, added in order.
#include "cpu/linear_rows.h"

namespace sdp {
namespace SDP_LEVEL_NAMESPACE {

#define SDP_ALL_PAIRS(KERNEL)                                                                             \
  {KERNEL<double, double>,     KERNEL<float, float>,    KERNEL<BFloat16, BFloat16>, \
   KERNEL<Float16, Float16>, KERNEL<BFloat16, float>, KERNEL<Float16, float>}
extern const EpilogueTable epilogue_table = {SDP_ALL_PAIRS(forward), SDP_ALL_PAIRS(backward)};

}  // namespace SDP_LEVEL_NAMESPACE
}  // namespace sdp

#if SDP_LEVEL == 0
#include <optional>
#include <string>

#include "cpu/dropout.h"
#include "cpu/host.h"

namespace sdp {
namespace {

Activation activation_of(const std::string& name) {
  static const char* const names[] = {"none", "kelu", "gelu", "fast_gelu", "relu", "tanh", "sigmoid", "leaky_relu", "selu"};
  for (int i = 0; i <= kSelu; ++i)
    if (name == names[i]) return static_cast<Activation>(i);
  STD_TORCH_CHECK(false, "unknown activation ", name);
}

EpiloguePair pair_of(int z, int residual) {
  if (z == residual) return static_cast<EpiloguePair>(z);
  STD_TORCH_CHECK(residual == 1 && (z == 2 || z == 3), "residual and grad must have z's dtype, or float32 with 16 bits");
  return z == 2 ? kBFloat16InFloat32 : kFloat16InFloat32;
}

const float* mask_of(const Tensor& mask) {
  STD_TORCH_CHECK(mask.is_contiguous() && dtype_index(mask) == kFloat32, "path_mask must be contiguous float32 (B,)");
  return static_cast<const float*>(mask.const_data_ptr());
}

constexpr int64_t kDropoutStream = 0;  // reference/philox.py

TokenView view_of(const Tensor& t) { return {const_cast<char*>(bytes(t)), t.stride(0), t.stride(1), t.stride(2)}; }

Tensor linear_epilogue_fwd(const Tensor& z, std::string activation, const std::optional<Tensor>& layer_scale,
                           const std::optional<Tensor>& path_mask, const std::optional<Tensor>& residual,
                           int64_t registers, double dropout, const std::optional<Tensor>& rng, int64_t layer) {
  STD_TORCH_CHECK(z.dim() == 3, "linear_epilogue_fwd: z must be (B, T, N)");
  Tensor y = torch::stable::new_empty(residual ? *residual : z, {z.size(0), z.size(1), z.size(2)});
  const int dtype = dtype_index(z);
  const Scratch scale = layer_scale ? widened(*layer_scale, dtype) : Scratch();
  EpilogueCase c{};
  c.tokens = z.size(1), c.columns = z.size(2), c.registers = registers, c.activation = activation_of(activation);
  c.z = view_of(z), c.out = mutable_bytes(y), c.scale = scale.get();
  if (path_mask) c.mask = mask_of(*path_mask);
  if (dropout > 0) c.dropout = dropout_source(*rng, dropout, layer, kDropoutStream);
  if (residual) c.residual = view_of(*residual);
  const auto kernel = SDP_ACTIVE_TABLE(epilogue_table).forward[pair_of(dtype, dtype_index(y))];
  parallel(z.size(0) * c.tokens, 4 * c.columns, [&](int64_t begin, int64_t end) { kernel(c, begin, end); });
  return y;
}

// Runs the backward pass for a case with z, grad, out and what else it has; returns (dγ, dbias), dγ empty unless wanted.
std::pair<Tensor, Tensor> run_backward(EpilogueCase& c, const Tensor& z, int grad_dtype, bool wants_dscale) {
  const int dtype = dtype_index(z);
  const int64_t rows = z.size(0) * c.tokens;
  constexpr int64_t kBlocks = 64;
  const int64_t per_block = std::max<int64_t>(128, (rows + kBlocks - 1) / kBlocks);
  const int64_t blocks = (rows + per_block - 1) / per_block;
  c.pitch = (c.columns + kWidestVector - 1) / kWidestVector * kWidestVector;
  const int64_t partial = blocks * c.pitch * accumulator_bytes(dtype);
  const Scratch dbias(partial, true), dscale = wants_dscale ? Scratch(partial, true) : Scratch();
  c.dbias = dbias.get(), c.dscale = dscale.get();
  const auto kernel = SDP_ACTIVE_TABLE(epilogue_table).backward[pair_of(dtype, grad_dtype)];
  parallel(blocks, 4 * per_block * c.columns, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block)
      kernel(c, block * per_block, std::min(rows, (block + 1) * per_block), block);
  });
  const auto sums = [&](const Scratch& partial_sums, bool wanted) {
    Tensor out = torch::stable::new_empty(z, {wanted ? c.columns : 0}, accumulator_dtype(z));
    if (wanted) {
      std::vector<double> total = block_sums(partial_sums, blocks, c.pitch, dtype);
      total.resize(c.columns);
      write_rounded(out, total);
    }
    return out;
  };
  return {sums(dscale, wants_dscale), sums(dbias, true)};
}

std::tuple<Tensor, Tensor, Tensor> linear_epilogue_bwd(const Tensor& grad, const Tensor& z, std::string activation,
                                                       const std::optional<Tensor>& layer_scale,
                                                       const std::optional<Tensor>& path_mask, int64_t registers,
                                                       double dropout, const std::optional<Tensor>& rng,
                                                       int64_t layer) {
  STD_TORCH_CHECK(z.dim() == 3, "linear_epilogue_bwd: z must be (B, T, N)");
  Tensor dz = torch::stable::new_empty(z, {z.size(0), z.size(1), z.size(2)});
  const Scratch scale = layer_scale ? widened(*layer_scale, dtype_index(z)) : Scratch();
  EpilogueCase c{};
  c.tokens = z.size(1), c.columns = z.size(2), c.registers = registers, c.activation = activation_of(activation);
  if (c.activation != kNone || layer_scale) c.z = view_of(z);
  c.out = mutable_bytes(dz), c.scale = scale.get(), c.grad = view_of(grad);
  if (path_mask) c.mask = mask_of(*path_mask);
  if (dropout > 0) c.dropout = dropout_source(*rng, dropout, layer, kDropoutStream);
  auto [dscale, dbias] = run_backward(c, z, dtype_index(grad), layer_scale.has_value());
  return {dz, dscale, dbias};
}

// PyTorch's GEMM, and one pass in its place that reads z once for the slope and the value.
std::tuple<Tensor, Tensor, Tensor> linear_gemm_bwd(const Tensor& d, const Tensor& weight, const Tensor& z,
                                                   std::string activation, int64_t registers) {
  STD_TORCH_CHECK(d.dim() == 3 && z.dim() == 3, "linear_gemm_bwd: d and z must be (B, T, …)");
  Tensor dz = torch::stable::contiguous(torch::stable::matmul(d, weight));
  Tensor h = torch::stable::new_empty(z, {z.size(0), z.size(1), z.size(2)});
  EpilogueCase c{};
  c.tokens = z.size(1), c.columns = z.size(2), c.registers = registers, c.activation = activation_of(activation);
  c.z = view_of(z), c.grad = view_of(dz), c.out = mutable_bytes(dz), c.activated = mutable_bytes(h);
  const Tensor dbias = run_backward(c, z, dtype_index(dz), false).second;
  return {dz, h, dbias};
}

}  // namespace
}  // namespace sdp

STABLE_TORCH_LIBRARY_IMPL(sdp_kernels_cpp, CPU, m) {
  m.impl("linear_epilogue_fwd", TORCH_BOX(&sdp::linear_epilogue_fwd));
  m.impl("linear_epilogue_bwd", TORCH_BOX(&sdp::linear_epilogue_bwd));
  m.impl("linear_gemm_bwd", TORCH_BOX(&sdp::linear_gemm_bwd));
}
#endif
