// What `linear` does around its GEMM on the CPU, one pass each way:
//   forward   y = residual + mask · γ · drop(act(z))
//   backward  dz = mask · γ · drop · dy · act′(z), with dγ = Σ mask · drop · dy · act(z) and dbias = Σ dz over the rows
// and, where an activation lies between two layers, both from the second one's GEMM: dz = dy · act′(z) and again act(z).
// z (B, T, N) is the GEMM's result. Register rows of y are the residual's, or 0; those of dz are 0. Sums over
// rows are two-stage in blocks that depend on the shape alone, added in order.
#include "cpu/linear_rows.h"

namespace sdp {
namespace SDP_LEVEL_NAMESPACE {

#ifdef SDP_BF16_PAIRS
#define SDP_PAIRED(KERNEL) KERNEL<PairedBFloat16, PairedBFloat16>, KERNEL<PairedBFloat16, float>
#else
#define SDP_PAIRED(KERNEL) nullptr, nullptr
#endif
#define SDP_ALL_PAIRS(KERNEL)                                                                             \
  {KERNEL<double, double>,     KERNEL<float, float>,    KERNEL<BFloat16, BFloat16>, \
   KERNEL<Float16, Float16>, KERNEL<BFloat16, float>, KERNEL<Float16, float>, SDP_PAIRED(KERNEL)}
extern const EpilogueTable epilogue_table = {SDP_ALL_PAIRS(forward), SDP_ALL_PAIRS(backward)};

}  // namespace SDP_LEVEL_NAMESPACE
}  // namespace sdp

#if SDP_LEVEL == 0
#include "cpu/linear_host.h"

namespace sdp {
namespace {

Tensor linear_epilogue_fwd(const Tensor& z, std::string activation, const std::optional<Tensor>& layer_scale,
                           const std::optional<Tensor>& path_mask, const std::optional<Tensor>& residual,
                           int64_t registers, double dropout, const std::optional<Tensor>& rng, int64_t layer) {
  STD_TORCH_CHECK(z.dim() == 3, "linear_epilogue_fwd: z must be (B, T, N)");
  Tensor y = allocate(residual ? *residual : z, {z.size(0), z.size(1), z.size(2)});
  const int dtype = dtype_index(z);
  Epilogue epilogue(activation, layer_scale, path_mask, residual, registers, dropout, rng, layer);
  EpilogueCase& c = epilogue.prepare(y, dtype);
  c.z = view_of(z);
  const auto kernel = SDP_ACTIVE_TABLE(epilogue_table).forward[pair_of(dtype, dtype_index(y))];
  parallel(z.size(0) * c.tokens, 4 * c.columns, [&](int64_t begin, int64_t end) { kernel(c, begin, end); });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> linear_epilogue_bwd(const Tensor& grad, const Tensor& z, std::string activation,
                                                       const std::optional<Tensor>& layer_scale,
                                                       const std::optional<Tensor>& path_mask, int64_t registers,
                                                       double dropout, const std::optional<Tensor>& rng,
                                                       int64_t layer) {
  STD_TORCH_CHECK(z.dim() == 3, "linear_epilogue_bwd: z must be (B, T, N)");
  Tensor dz = allocate(z, {z.size(0), z.size(1), z.size(2)});
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

}  // namespace
}  // namespace sdp

STABLE_TORCH_LIBRARY_IMPL(sdp_kernels_cpp, CPU, m) {
  m.impl("linear_epilogue_fwd", TORCH_BOX(&sdp::linear_epilogue_fwd));
  m.impl("linear_epilogue_bwd", TORCH_BOX(&sdp::linear_epilogue_bwd));
}
#endif
