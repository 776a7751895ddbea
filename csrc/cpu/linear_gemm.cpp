// `linear`'s GEMMs of our own, for processors on which PyTorch's are slower (`multiplies`): forward and backward with the
// passes of linear.cpp behind them, each over a few rows of the product while they are in the cache; and plain products.
#include "cpu/linear_gemm.h"

namespace sdp {
namespace SDP_LEVEL_NAMESPACE {

#ifdef SDP_MULTIPLIES
extern const ProductTables product_tables = {{{}, products_of<float>(), products_of<BFloat16>(), {}}};
#else
extern const ProductTables product_tables = {};
#endif

}  // namespace SDP_LEVEL_NAMESPACE
}  // namespace sdp

#if SDP_LEVEL == 0
#include "cpu/linear_host.h"

namespace sdp {
namespace {

constexpr int64_t kRowsAtOnce = 96;      // of a product, which the pass behind it finds in the cache
constexpr int64_t kWideRowsAtOnce = 64;  // of one that comes to its pass in fp32

bool multiplies(int dtype) {
  return (dtype == kBFloat16 && multiplies_bf16()) || (dtype == kFloat32 && multiplies_fp32());
}
int64_t unit_elements(int dtype) { return dtype == kBFloat16 ? 2 : 1; }
const ProductTable& products(int dtype) { return SDP_ACTIVE_TABLE(product_tables).of[dtype]; }

// Rows of a matrix (…, columns), and the tensor that holds them side by side.
struct Matrix {
  Tensor held;
  int dtype;
  int64_t rows, columns, pitch;

  explicit Matrix(const Tensor& t)
      : held(torch::stable::contiguous(t)), dtype(dtype_index(t)), rows(1), columns(t.size(t.dim() - 1)),
        pitch(columns * element_bytes(dtype)) {
    STD_TORCH_CHECK(multiplies(dtype), "linear's own GEMM is for bfloat16 and float32 on processors where it is faster than "
                    "PyTorch's, not for this dtype on this one");
    for (int64_t i = 0; i + 1 < t.dim(); ++i) rows *= t.size(i);
  }
  ProductRows from(int64_t row) const { return {bytes(held) + row * pitch, pitch}; }
};

// B of a product, packed; turned: its transpose is what lies there. Holds rows [begin, end) of it.
class Packed {
 public:
  const int dtype;

  Packed(const Matrix& m, bool turned, int64_t begin, int64_t end)
      : dtype(m.dtype), b_{nullptr, turned ? m.columns : end - begin, turned ? m.rows : m.columns, 0} {
    b_.units = (b_.summed + unit_elements(m.dtype) - 1) / unit_elements(m.dtype);
    memory_ = Scratch(b_.count() * b_.units * Panels::kPanel * int64_t(sizeof(uint32_t)));
    b_.data = static_cast<uint32_t*>(memory_.get());
    const auto pack = turned ? products(m.dtype).pack_turned : products(m.dtype).pack;
    parallel(b_.count(), Panels::kPanel * b_.summed,
             [&](int64_t first, int64_t last) { pack(m.from(begin), b_, first, last); });
  }
  Packed(const Matrix& weight, bool turned) : Packed(weight, turned, 0, weight.rows) {
    STD_TORCH_CHECK(b_.summed % unit_elements(weight.dtype) == 0, "linear's own GEMM sums an even number of bfloat16 products, "
                    "got ", b_.summed);
  }
  const Panels& operator*() const { return b_; }
  const Panels* operator->() const { return &b_; }

 private:
  Panels b_;
  Scratch memory_;
};

// The kernels for a·b, which read as much of a as b has units.
const ProductTable& products_for(const Matrix& a, const Packed& b) {
  STD_TORCH_CHECK(a.dtype == b.dtype, "linear's own GEMM: both factors must have the same dtype");
  STD_TORCH_CHECK(a.columns == b->summed, "linear's own GEMM: the weight must sum ", a.columns, " products, got ", b->summed);
  return products(a.dtype);
}

// Rows from `row` on of a product (B, T, N), as if the whole stood there.
TokenView around(void* first, int64_t row, int64_t tokens, int64_t columns, int64_t element) {
  return {static_cast<char*>(first) - row * columns * element, tokens * columns, columns, 1};
}

// Calls body(begin, end) on runs of at most kRowsAtOnce of the rows.
template <class Body>
void for_rows(int64_t rows, int64_t cost, const Body& body) {
  constexpr int64_t kUnit = 8;  // rows of a tile
  parallel((rows + kUnit - 1) / kUnit, kUnit * cost, [&](int64_t begin, int64_t end) {
    const int64_t last = std::min(rows, end * kUnit);
    for (int64_t row = begin * kUnit; row < last; row += kRowsAtOnce) body(row, std::min(last, row + kRowsAtOnce));
  });
}

// c = a·b + bias for all rows.
void multiply(const Matrix& a, const Packed& b, const Tensor& c, const float* bias) {
  const int64_t element = element_bytes(a.dtype), columns = b->columns;
  const ProductTable& kernels = products_for(a, b);
  for_rows(a.rows, a.columns * columns, [&](int64_t begin, int64_t end) {
    const ProductOut to{mutable_bytes(c) + begin * columns * element, bias, nullptr, false, columns};
    kernels.rows(a.from(begin), *b, to, end - begin);
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
  Tensor y = allocate(residual ? *residual : x, {x.size(0), x.size(1), w.rows});
  Epilogue epilogue(activation, layer_scale, path_mask, residual, registers, dropout, rng, layer);
  const EpilogueCase& c = epilogue.prepare(y, a.dtype);
  const bool keeps = keep && c.activation != kNone;
  Tensor z = allocate(x, keeps ? std::vector<int64_t>{x.size(0), x.size(1), w.rows} : std::vector<int64_t>{0});
  const Scratch wide = bias ? widened(*bias, a.dtype) : Scratch();
  const float* shift = static_cast<const float*>(wide.get());
  if (epilogue.is_identity()) {
    multiply(a, b, y, shift);
    return {y, z};
  }
  const int64_t element = element_bytes(a.dtype);
  const ProductTable& kernels = products_for(a, b);
  const auto kernel = SDP_ACTIVE_TABLE(epilogue_table).forward[pair_of(a.dtype, dtype_index(y))];
  for_rows(a.rows, a.columns * w.rows, [&](int64_t begin, int64_t end) {
    const Scratch passing(keeps ? 0 : (end - begin) * w.rows * element);
    char* made = keeps ? mutable_bytes(z) + begin * w.rows * element : static_cast<char*>(passing.get());
    kernels.rows(a.from(begin), *b, {made, shift, nullptr, false, w.rows}, end - begin);
    EpilogueCase here = c;
    here.z = around(made, begin, c.tokens, w.rows, element);
    kernel(here, begin, end);
  });
  return {y, z};
}

// The GEMM and one pass in its place that reads z once for the slope and the value. Of our own, the product comes to it in
// fp32, and dz is rounded once.
std::tuple<Tensor, Tensor, Tensor> linear_gemm_bwd(const Tensor& d, const Tensor& weight, const Tensor& z,
                                                   std::string activation, int64_t registers) {
  STD_TORCH_CHECK(d.dim() == 3 && z.dim() == 3, "linear_gemm_bwd: d and z must be (B, T, …)");
  const std::vector<int64_t> shape = {z.size(0), z.size(1), z.size(2)};
  Tensor h = allocate(z, shape);
  EpilogueCase c{};
  c.tokens = shape[1], c.columns = shape[2], c.registers = registers, c.activation = activation_of(activation);
  c.z = view_of(z), c.activated = mutable_bytes(h);
  const int dtype = dtype_index(d);
  if (!multiplies(dtype) || weight.size(0) % unit_elements(dtype) != 0) {
    Tensor dz = torch::stable::contiguous(torch::stable::matmul(d, weight));
    c.grad = view_of(dz), c.out = mutable_bytes(dz);
    return {dz, h, run_backward(c, z, dtype, false).second};
  }
  const Matrix a(d);
  const Packed b(Matrix(weight), false);
  STD_TORCH_CHECK(d.size(0) == shape[0] && d.size(1) == shape[1] && b->columns == shape[2],
                  "linear's own GEMM: z must be as d·weight is, (", d.size(0), ", ", d.size(1), ", ", b->columns, ")");
  Tensor dz = allocate(z, shape);
  c.out = mutable_bytes(dz);
  const BlockSums sums(c, z, false);
  const ProductTable& kernels = products_for(a, b);
  const auto kernel = SDP_ACTIVE_TABLE(epilogue_table).backward[pair_of(dtype_index(z), kFloat32)];
  parallel(sums.blocks, sums.per_block * a.columns * c.columns, [&](int64_t begin, int64_t end) {
    const int64_t start = begin * sums.per_block, last = std::min(sums.rows, end * sums.per_block);
    const Scratch passing(std::min(last - start, kWideRowsAtOnce) * c.columns * int64_t(sizeof(float)));
    for (int64_t row = start, next; row < last; row = next) {
      next = std::min(last, row + kWideRowsAtOnce);
      const ProductOut to{nullptr, nullptr, static_cast<float*>(passing.get()), false, c.columns};
      kernels.rows(a.from(row), *b, to, next - row);
      EpilogueCase here = c;
      here.grad = around(passing.get(), row, c.tokens, c.columns, sizeof(float));
      for (int64_t first = row, stop; first < next; first = stop) {
        const int64_t block = first / sums.per_block;
        stop = std::min(next, (block + 1) * sums.per_block);
        kernel(here, first, stop, block);
      }
    }
  });
  return {dz, h, sums.added(c, z).second};
}

Tensor linear_gemm_dgrad(const Tensor& d, const Tensor& weight) {
  const Matrix a(d), w(weight);
  const Packed b(w, false);
  Tensor dx = allocate(d, {d.size(0), d.size(1), w.columns});
  multiply(a, b, dx, nullptr);
  return dx;
}

// dᵀ·x, in fp32 if `wide`, summed over kSummed bytes of a column at a time, so that what is packed of them stays in the
// caches. The narrower matrix is packed as a whole, the wider one kColumns at a time: where that is x, the transpose is what
// comes out.
Tensor linear_gemm_wgrad(const Tensor& d, const Tensor& x, bool wide) {
  constexpr int64_t kSummed = 6144, kColumns = 96;
  const bool turned = x.size(2) > d.size(2);
  const Matrix a(turned ? x : d), m(turned ? d : x);
  STD_TORCH_CHECK(a.rows == m.rows && a.dtype == m.dtype, "linear_gemm_wgrad: d and x must have the same rows and dtype");
  const bool narrow = a.dtype != kFloat32 && !wide;
  Tensor dweight = allocate(d, {d.size(2), x.size(2)}, narrow ? d.scalar_type() : accumulator_dtype(d));
  const int64_t element = element_bytes(a.dtype), unit = unit_elements(a.dtype), outputs = a.columns * m.columns;
  const int64_t pitch = x.size(2), step = turned ? 1 : pitch;  // from one of a's columns to the next
  const int64_t parts = std::max<int64_t>(1, (a.rows * element + kSummed - 1) / kSummed);
  const int64_t part = ((a.rows + parts - 1) / parts + unit - 1) / unit * unit;
  const bool rounds = narrow && parts > 1;  // after the last part
  const Scratch unrounded(rounds ? outputs * int64_t(sizeof(float)) : 0);
  void* to = rounds ? unrounded.get() : dweight.mutable_data_ptr();
  float* sums = narrow && parts == 1 ? nullptr : static_cast<float*>(to);
  const int64_t blocks = (a.columns + kColumns - 1) / kColumns, threads = torch::stable::get_num_threads();
  for (int64_t i = 0; i < parts; ++i) {
    const int64_t begin = std::min(a.rows, i * part), end = std::min(a.rows, begin + part);
    const Packed b(m, false, begin, end);
    int64_t groups = 1;  // of panels: more of them, until the threads have alike to do
    const auto idle = [&] { return (blocks * groups + threads - 1) / threads * threads * 10 > blocks * groups * 11; };
    while (groups < b->count() && idle()) ++groups;
    parallel(blocks * groups, kColumns * m.columns * (end - begin) / groups, [&](int64_t first, int64_t last) {
      const Scratch memory(kColumns * b->units * int64_t(sizeof(uint32_t)));
      for (int64_t place = first; place < last; ++place) {
        const int64_t column = place / groups * kColumns, group = place % groups, panels = b->count();
        ProductOut c{nullptr, nullptr, nullptr, i > 0, pitch, turned};
        if (sums != nullptr) c.sums = sums + column * step;
        else c.rounded = mutable_bytes(dweight) + column * step * element;
        ProductRows from = a.from(begin);
        from.data += column * element;
        products(a.dtype).turned(from, *b, c, std::min(kColumns, a.columns - column), panels * group / groups,
                                 panels * (group + 1) / groups, static_cast<uint32_t*>(memory.get()));
      }
    });
  }
  if (rounds) {
    auto* rounded = static_cast<torch::headeronly::BFloat16*>(dweight.mutable_data_ptr());
    parallel(outputs, 1, [&](int64_t first, int64_t last) { std::copy(sums + first, sums + last, rounded + first); });
  }
  return dweight;
}

}  // namespace
}  // namespace sdp

STABLE_TORCH_LIBRARY_IMPL(sdp_kernels_cpp, CPU, m) {
  m.impl("linear_gemm_fwd", TORCH_BOX(&sdp::linear_gemm_fwd));
  m.impl("linear_gemm_bwd", TORCH_BOX(&sdp::linear_gemm_bwd));
  m.impl("linear_gemm_dgrad", TORCH_BOX(&sdp::linear_gemm_dgrad));
  m.impl("linear_gemm_wgrad", TORCH_BOX(&sdp::linear_gemm_wgrad));
}
#endif
