// What `linear` does around its GEMM on the CPU, one pass each way:
//   forward   y = residual + mask · γ · drop(act(z))
//   backward  dz = mask · γ · drop · dy · act′(z), with dγ = Σ mask · drop · dy · act(z) and dbias = Σ dz over the rows
// and, where an activation lies between two layers, both from the second one's GEMM: dz = dy · act′(z) and again act(z).
// z (B, T, N) is the GEMM's result. Register rows of y are the residual's, or 0; those of dz are 0. Sums over
// rows are two-stage in blocks that depend on the shape alone, added in order.
//
// Of bf16 the GEMM is ours where the processor multiplies pairs of bf16 and has no matrix unit: the pass then runs over a
// few rows of z as soon as they are there.
#include "cpu/linear_gemm.h"
#include "cpu/linear_rows.h"

namespace sdp {
namespace SDP_LEVEL_NAMESPACE {

#ifdef SDP_MULTIPLIES_BF16
extern const ProductTable product_table = {pack_turned, pack, rows, turned};
#else
extern const ProductTable product_table = {};
#endif

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

constexpr int64_t kRowsAtOnce = 96;  // of a product, which the pass behind it finds in the cache

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

Tensor linear_epilogue_fwd(const Tensor& z, std::string activation, const std::optional<Tensor>& layer_scale,
                           const std::optional<Tensor>& path_mask, const std::optional<Tensor>& residual,
                           int64_t registers, double dropout, const std::optional<Tensor>& rng, int64_t layer) {
  STD_TORCH_CHECK(z.dim() == 3, "linear_epilogue_fwd: z must be (B, T, N)");
  Tensor y = torch::stable::new_empty(residual ? *residual : z, {z.size(0), z.size(1), z.size(2)});
  const int dtype = dtype_index(z);
  Epilogue epilogue(activation, layer_scale, path_mask, residual, registers, dropout, rng, layer);
  EpilogueCase& c = epilogue.prepare(y, dtype);
  c.z = view_of(z);
  const auto kernel = SDP_ACTIVE_TABLE(epilogue_table).forward[pair_of(dtype, dtype_index(y))];
  parallel(z.size(0) * c.tokens, 4 * c.columns, [&](int64_t begin, int64_t end) { kernel(c, begin, end); });
  return y;
}

void no_product(int64_t, int64_t) {}

// Runs the backward pass for a case with z, grad, out and what else it has; returns (dγ, dbias), dγ empty unless wanted.
// product(begin, end) makes these rows of grad.
template <class Product>
std::pair<Tensor, Tensor> run_backward(EpilogueCase& c, const Tensor& z, int grad_dtype, bool wants_dscale,
                                       const Product& product) {
  const int dtype = dtype_index(z);
  const int64_t rows = z.size(0) * c.tokens;
  constexpr int64_t kBlocks = 64;
  const int64_t per_block = std::max<int64_t>(32, ((rows + kBlocks - 1) / kBlocks + 7) / 8 * 8);
  const int64_t blocks = (rows + per_block - 1) / per_block;
  c.pitch = (c.columns + kWidestVector - 1) / kWidestVector * kWidestVector;
  const int64_t partial = blocks * c.pitch * accumulator_bytes(dtype);
  const Scratch dbias(partial, true), dscale = wants_dscale ? Scratch(partial, true) : Scratch();
  c.dbias = dbias.get(), c.dscale = dscale.get();
  const auto kernel = SDP_ACTIVE_TABLE(epilogue_table).backward[pair_of(dtype, grad_dtype)];
  parallel(blocks, 4 * per_block * c.columns, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block)
      for (int64_t row = block * per_block, last = std::min(rows, row + per_block); row < last; row += kRowsAtOnce) {
        const int64_t next = std::min(last, row + kRowsAtOnce);
        product(row, next);
        kernel(c, row, next, block);
      }
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
  auto [dscale, dbias] = run_backward(c, z, dtype_index(grad), layer_scale.has_value(), no_product);
  return {dz, dscale, dbias};
}

// Rows of a matrix (…, columns) of bf16, and the tensor that holds them side by side.
struct Matrix {
  Tensor held;
  int64_t rows, columns;

  explicit Matrix(const Tensor& t)
      : held(torch::stable::contiguous(t)), rows(1), columns(t.size(t.dim() - 1)) {
    STD_TORCH_CHECK(dtype_index(t) == kBFloat16 && multiplies_bf16(), "linear's own GEMM is for bfloat16, on processors that "
                    "multiply its pairs");
    for (int64_t i = 0; i + 1 < t.dim(); ++i) rows *= t.size(i);
  }
  Bf16Rows from(int64_t row) const { return {reinterpret_cast<const BFloat16*>(bytes(held)) + row * columns, columns}; }
};

// B of a product, packed; turned: its transpose is what lies there. Holds rows [begin, end) of it.
class Packed {
 public:
  Packed(const Matrix& m, bool turned, int64_t begin, int64_t end)
      : b_{nullptr, turned ? m.columns : end - begin, turned ? m.rows : m.columns},
        memory_(b_.count() * b_.pairs() * Panels::kPanel * int64_t(sizeof(uint32_t))) {
    b_.data = static_cast<uint32_t*>(memory_.get());
    const auto pack = turned ? SDP_ACTIVE_TABLE(product_table).pack_turned : SDP_ACTIVE_TABLE(product_table).pack;
    parallel(b_.count(), Panels::kPanel * b_.summed,
             [&](int64_t first, int64_t last) { pack(m.from(begin), b_, first, last); });
  }
  Packed(const Matrix& weight, bool turned) : Packed(weight, turned, 0, weight.rows) {
    STD_TORCH_CHECK(b_.summed % 2 == 0, "linear's own GEMM sums an even number of products, got ", b_.summed);
  }
  const Panels& operator*() const { return b_; }

 private:
  Panels b_;
  Scratch memory_;
};

// Calls body(begin, end) on runs of at most kRowsAtOnce of the rows.
template <class Body>
void for_rows(int64_t rows, int64_t cost, const Body& body) {
  constexpr int64_t kUnit = 8;  // rows of a tile
  parallel((rows + kUnit - 1) / kUnit, kUnit * cost, [&](int64_t begin, int64_t end) {
    const int64_t last = std::min(rows, end * kUnit);
    for (int64_t row = begin * kUnit; row < last; row += kRowsAtOnce) body(row, std::min(last, row + kRowsAtOnce));
  });
}

std::tuple<Tensor, Tensor> linear_gemm_fwd(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                           std::string activation, const std::optional<Tensor>& layer_scale,
                                           const std::optional<Tensor>& path_mask, const std::optional<Tensor>& residual,
                                           int64_t registers, double dropout, const std::optional<Tensor>& rng,
                                           int64_t layer, bool keep) {
  STD_TORCH_CHECK(x.dim() == 3, "linear_gemm_fwd: x must be (B, T, in)");
  const Matrix a(x), w(weight);
  const Packed b(w, true);
  Tensor y = torch::stable::new_empty(residual ? *residual : x, {x.size(0), x.size(1), w.rows});
  Epilogue epilogue(activation, layer_scale, path_mask, residual, registers, dropout, rng, layer);
  EpilogueCase& c = epilogue.prepare(y, kBFloat16);
  const bool plain = epilogue.is_identity(), keeps = keep && c.activation != kNone;
  Tensor z = keeps ? torch::stable::new_empty(x, {x.size(0), x.size(1), w.rows}) : torch::stable::new_empty(x, {0});
  const Scratch wide = bias ? widened(*bias, kBFloat16) : Scratch();
  const auto kernel = SDP_ACTIVE_TABLE(epilogue_table).forward[pair_of(kBFloat16, dtype_index(y))];
  for_rows(a.rows, a.columns * w.rows, [&](int64_t begin, int64_t end) {
    const Scratch passing(plain || keeps ? 0 : (end - begin) * w.rows * int64_t(sizeof(BFloat16)));
    BFloat16* to = plain || keeps ? reinterpret_cast<BFloat16*>(mutable_bytes(plain ? y : z)) + begin * w.rows
                                  : static_cast<BFloat16*>(passing.get());
    SDP_ACTIVE_TABLE(product_table).rows(a.from(begin), *b, {to, static_cast<const float*>(wide.get()), nullptr, false, w.rows},
                                         end - begin);
    if (plain) return;
    EpilogueCase here = c;
    here.z = {reinterpret_cast<char*>(to - begin * w.rows), c.tokens * w.rows, w.rows, 1};
    kernel(here, begin, end);
  });
  return {y, z};
}

// The GEMM and one pass in its place that reads z once for the slope and the value.
std::tuple<Tensor, Tensor, Tensor> linear_gemm_bwd(const Tensor& d, const Tensor& weight, const Tensor& z,
                                                   std::string activation, int64_t registers) {
  STD_TORCH_CHECK(d.dim() == 3 && z.dim() == 3, "linear_gemm_bwd: d and z must be (B, T, …)");
  Tensor h = torch::stable::new_empty(z, {z.size(0), z.size(1), z.size(2)});
  EpilogueCase c{};
  c.tokens = z.size(1), c.columns = z.size(2), c.registers = registers, c.activation = activation_of(activation);
  c.z = view_of(z), c.activated = mutable_bytes(h);
  const auto into = [&](const Tensor& dz) { c.grad = view_of(dz), c.out = mutable_bytes(dz); };
  if (dtype_index(d) != kBFloat16 || !multiplies_bf16() || weight.size(0) % 2 != 0) {
    Tensor dz = torch::stable::contiguous(torch::stable::matmul(d, weight));
    into(dz);
    return {dz, h, run_backward(c, z, dtype_index(dz), false, no_product).second};
  }
  const Matrix a(d);
  const Packed b(Matrix(weight), false);
  Tensor dz = torch::stable::new_empty(z, {z.size(0), z.size(1), z.size(2)});
  into(dz);
  const auto product = [&](int64_t begin, int64_t end) {
    BFloat16* to = static_cast<BFloat16*>(c.out) + begin * c.columns;
    SDP_ACTIVE_TABLE(product_table).rows(a.from(begin), *b, {to, nullptr, nullptr, false, c.columns}, end - begin);
  };
  return {dz, h, run_backward(c, z, kBFloat16, false, product).second};
}

Tensor linear_gemm_dgrad(const Tensor& d, const Tensor& weight) {
  const Matrix a(d), w(weight);
  const Packed b(w, false);
  Tensor dx = torch::stable::new_empty(d, {d.size(0), d.size(1), w.columns});
  for_rows(a.rows, a.columns * w.columns, [&](int64_t begin, int64_t end) {
    BFloat16* to = reinterpret_cast<BFloat16*>(mutable_bytes(dx)) + begin * w.columns;
    SDP_ACTIVE_TABLE(product_table).rows(a.from(begin), *b, {to, nullptr, nullptr, false, w.columns}, end - begin);
  });
  return dx;
}

// dᵀ·x, summed over kSummed rows at a time, so that what is packed of them stays in the caches.
Tensor linear_gemm_wgrad(const Tensor& d, const Tensor& x) {
  constexpr int64_t kSummed = 3072, kColumns = 96;
  const Matrix a(d), m(x);
  STD_TORCH_CHECK(a.rows == m.rows, "linear_gemm_wgrad: d and x must have the same rows");
  Tensor dweight = torch::stable::new_empty(d, {a.columns, m.columns});
  const int64_t parts = std::max<int64_t>(1, (a.rows + kSummed - 1) / kSummed), part = ((a.rows + parts - 1) / parts + 1) / 2 * 2;
  const int64_t outputs = a.columns * m.columns;
  const Scratch sums(parts > 1 ? outputs * int64_t(sizeof(float)) : 0);
  const int64_t blocks = (a.columns + kColumns - 1) / kColumns, threads = torch::stable::get_num_threads();
  for (int64_t i = 0; i < parts; ++i) {
    const int64_t begin = std::min(a.rows, i * part), end = std::min(a.rows, begin + part);
    const Packed b(m, false, begin, end);
    int64_t groups = 1;  // of panels: more of them, until the threads have alike to do
    const auto idle = [&] { return (blocks * groups + threads - 1) / threads * threads * 10 > blocks * groups * 11; };
    while (groups < (*b).count() && idle()) ++groups;
    parallel(blocks * groups, kColumns * m.columns * (end - begin) / groups, [&](int64_t first, int64_t last) {
      const Scratch memory(kColumns * (*b).pairs() * int64_t(sizeof(uint32_t)));
      for (int64_t unit = first; unit < last; ++unit) {
        const int64_t column = unit / groups * kColumns, group = unit % groups, panels = (*b).count();
        ProductOut c{nullptr, nullptr, nullptr, i > 0, m.columns};
        if (parts > 1) c.sums = static_cast<float*>(sums.get()) + column * m.columns;
        else c.rounded = reinterpret_cast<BFloat16*>(mutable_bytes(dweight)) + column * m.columns;
        Bf16Rows from = a.from(begin);
        from.data += column;
        SDP_ACTIVE_TABLE(product_table).turned(from, *b, c, std::min(kColumns, a.columns - column), panels * group / groups,
                                               panels * (group + 1) / groups, static_cast<uint32_t*>(memory.get()));
      }
    });
  }
  if (parts > 1) {
    auto* to = static_cast<torch::headeronly::BFloat16*>(dweight.mutable_data_ptr());
    const float* from = static_cast<const float*>(sums.get());
    parallel(outputs, 1, [&](int64_t first, int64_t last) { std::copy(from + first, from + last, to + first); });
  }
  return dweight;
}

}  // namespace
}  // namespace sdp

STABLE_TORCH_LIBRARY_IMPL(sdp_kernels_cpp, CPU, m) {
  m.impl("linear_epilogue_fwd", TORCH_BOX(&sdp::linear_epilogue_fwd));
  m.impl("linear_epilogue_bwd", TORCH_BOX(&sdp::linear_epilogue_bwd));
  m.impl("linear_gemm_fwd", TORCH_BOX(&sdp::linear_gemm_fwd));
  m.impl("linear_gemm_bwd", TORCH_BOX(&sdp::linear_gemm_bwd));
  m.impl("linear_gemm_dgrad", TORCH_BOX(&sdp::linear_gemm_dgrad));
  m.impl("linear_gemm_wgrad", TORCH_BOX(&sdp::linear_gemm_wgrad));
}
#endif
