// What `linear` does around its GEMM on the CPU, one pass each way:
//   forward   y = residual + mask · γ · drop(act(z))
//   backward  dz = mask · γ · drop · dy · act′(z), with dγ = Σ mask · drop · dy · act(z) and dbias = Σ dz over the rows
// z (B, T, N) is the GEMM's result. Register rows of y are the residual's, or 0; those of dz are 0. Sums over
// rows are two-stage in blocks that depend on the shape alone, added in order.
#include "cpu/activations.h"
#include "cpu/levels.h"
#include "cpu/philox.h"
#include "cpu/simd.h"

namespace sdp {

// (B, T, N) by strides in elements.
struct TokenView {
  char* data = nullptr;
  int64_t batch = 0, token = 0, column = 0;
};

struct EpilogueCase {
  int64_t tokens, columns, registers;
  Activation activation;
  TokenView z;                 // (B, T, N) of T; null in backward where nothing depends on it
  TokenView residual, grad;    // of R; residual may be null; grad is dy
  void* out;                   // forward y of R, backward dz of T; contiguous
  const void* scale;           // γ, accumulator type, or null
  const float* mask;           // (B,) or null
  DropoutSource dropout;       // positions count row-major within a sample
  void *dscale, *dbias;        // accumulator type, one row of N partial sums per block; dscale may be null
};

// Storage of z and of residual, y and dy: alike, or the latter fp32 beside a 16-bit z.
enum EpiloguePair { kFloat64Pair, kFloat32Pair, kBFloat16Pair, kFloat16Pair, kBFloat16InFloat32, kFloat16InFloat32, kPairs };

struct EpilogueTable {
  void (*forward[kPairs])(const EpilogueCase&, int64_t begin, int64_t end);
  void (*backward[kPairs])(const EpilogueCase&, int64_t begin, int64_t end, int64_t block);
};
SDP_DECLARE_TABLE(EpilogueTable, epilogue_table)

namespace SDP_LEVEL_NAMESPACE {

template <class T>
SDP_HOST_DEVICE Vector<T> read(const T* p, int64_t stride, int64_t i, int count) {
  return stride == 1 && count == kLanes<T> ? load(p + i) : load_part(p + i * stride, count, stride);
}
template <class T>
SDP_HOST_DEVICE void write(T* p, int64_t i, Vector<T> v, int count) {
  count == kLanes<T> ? store(p + i, v) : store_part(p + i, v, count);
}

template <class R>
inline const R* row_of(const TokenView& view, int64_t sample, int64_t token) {
  return reinterpret_cast<const R*>(view.data) + sample * view.batch + token * view.token;
}

// Calls body(first column, lanes in use, dropout factors of these columns) along a row; the factors are a plain 1 where
// nothing drops.
template <class T, class Body>
inline __attribute__((always_inline)) void along_columns(const EpilogueCase& c, int64_t sample, int64_t token,
                                                         const Body& body) {
  using V = Vector<T>;
  constexpr int lanes = kLanes<T>;
  const V one = V{} + Accumulator<T>(1);
  if (c.dropout.scale == 0.0f) {
    int64_t i = 0;
    for (; i + lanes <= c.columns; i += lanes) body(i, lanes, one);
    if (i < c.columns) body(i, int(c.columns - i), one);
    return;
  }
  DropoutFactors drawn;
  for (int64_t first = 0; first < c.columns; first += kDropoutChunk) {
    const int count = c.columns - first < kDropoutChunk ? int(c.columns - first) : kDropoutChunk;
    const float* factors = drawn.draw(c.dropout, uint32_t(sample), token * c.columns + first, count);
    for (int i = 0; i < count; i += lanes) {
      const int left = count - i < lanes ? count - i : lanes;
      V kept{};
      for (int lane = 0; lane < left; ++lane) kept[lane] = factors[i + lane];
      body(first + i, left, kept);
    }
  }
}

// The common activations as constants, so that their code is inlined into the loop over a row; the others by one call a
// vector, because nine inlined forms in every loop would take longer to compile than all other kernels together.
struct RunTimeActivation {
  Activation value;
};
template <class V, Activation value>
SDP_HOST_DEVICE V apply(V x, std::integral_constant<Activation, value>) { return activate(x, value); }
template <class V, Activation value>
SDP_HOST_DEVICE V apply_slope(V x, std::integral_constant<Activation, value>) { return activation_slope(x, value); }
template <class V>
__attribute__((noinline)) V apply(V x, RunTimeActivation activation) { return activate(x, activation.value); }
template <class V>
__attribute__((noinline)) V apply_slope(V x, RunTimeActivation activation) {
  return activation_slope(x, activation.value);
}

template <class Body>
inline void with_activation(Activation activation, const Body& body) {
  switch (activation) {
    case kKelu: return body(std::integral_constant<Activation, kKelu>());
    case kGelu: return body(std::integral_constant<Activation, kGelu>());
    case kNone: return body(std::integral_constant<Activation, kNone>());
    default: return body(RunTimeActivation{activation});
  }
}

template <class T, class R>
void forward(const EpilogueCase& c, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  using V = Vector<T>;
  const A* scale = static_cast<const A*>(c.scale);
  with_activation(c.activation, [&](auto activation) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t sample = row / c.tokens, token = row % c.tokens;
      const T* z = row_of<T>(c.z, sample, token);
      R* y = static_cast<R*>(c.out) + row * c.columns;
      const R* residual = c.residual.data == nullptr ? nullptr : row_of<R>(c.residual, sample, token);
      const A keep = token < c.registers ? A(0) : c.mask == nullptr ? A(1) : A(c.mask[sample]);
      along_columns<T>(c, sample, token, [&](int64_t i, int count, V kept) {
        V value{};
        if (keep != A(0)) {  // what a sample or a register drops may be NaN
          value = apply(read(z, c.z.column, i, count), activation) * (kept * keep);
          if (scale != nullptr) value *= read(scale, 1, i, count);
        }
        if (residual != nullptr) value += read(residual, c.residual.column, i, count);
        write(y, i, value, count);
      });
    }
  });
}

template <class T, class R>
void backward(const EpilogueCase& c, int64_t begin, int64_t end, int64_t block) {
  using A = Accumulator<T>;
  using V = Vector<T>;
  const A* scale = static_cast<const A*>(c.scale);
  A* dbias = static_cast<A*>(c.dbias) + block * c.columns;
  A* dscale = c.dscale == nullptr ? nullptr : static_cast<A*>(c.dscale) + block * c.columns;
  with_activation(c.activation, [&](auto activation) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t sample = row / c.tokens, token = row % c.tokens;
      const T* z = c.z.data == nullptr ? nullptr : row_of<T>(c.z, sample, token);
      const R* grad = row_of<R>(c.grad, sample, token);
      T* dz = static_cast<T*>(c.out) + row * c.columns;
      const A keep = token < c.registers ? A(0) : c.mask == nullptr ? A(1) : A(c.mask[sample]);
      along_columns<T>(c, sample, token, [&](int64_t i, int count, V kept) {
        V value{};
        if (keep != A(0)) {
          value = read(grad, c.grad.column, i, count) * (kept * keep);
          const V before = z == nullptr ? V{} : read(z, c.z.column, i, count);
          if (dscale != nullptr)
            write(dscale, i, read(dscale, 1, i, count) + value * apply(before, activation), count);
          if (scale != nullptr) value *= read(scale, 1, i, count);
          if (z != nullptr) value *= apply_slope(before, activation);
          write(dbias, i, read(dbias, 1, i, count) + value, count);
        }
        write(dz, i, value, count);
      });
    }
  });
}

#define SDP_ALL_PAIRS(KERNEL)                                                                             \
  {KERNEL<double, double>,     KERNEL<float, float>,    KERNEL<BFloat16, BFloat16>, \
   KERNEL<Float16, Float16>, KERNEL<BFloat16, float>, KERNEL<Float16, float>}
extern const EpilogueTable epilogue_table = {SDP_ALL_PAIRS(forward), SDP_ALL_PAIRS(backward)};

}  // namespace SDP_LEVEL_NAMESPACE
}  // namespace sdp

#if SDP_LEVEL == 0
#include <cmath>
#include <optional>
#include <string>

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

DropoutSource dropout_source(const Tensor& rng, double rate, int64_t layer) {
  const int64_t *state = static_cast<const int64_t*>(rng.const_data_ptr()), step = rng.stride(0);
  const uint64_t seed = static_cast<uint64_t>(state[0]);
  return {static_cast<uint32_t>(seed),
          static_cast<uint32_t>(seed >> 32),
          static_cast<uint32_t>(state[step]),
          static_cast<uint32_t>(layer * 4),
          static_cast<uint32_t>(state[2 * step]),
          static_cast<uint32_t>(std::nearbyint(rate * 4294967296.0)),
          static_cast<float>(1.0 / (1.0 - rate))};
}

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
  if (dropout > 0) c.dropout = dropout_source(*rng, dropout, layer);
  if (residual) c.residual = view_of(*residual);
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
  Tensor dz = torch::stable::new_empty(z, {z.size(0), z.size(1), z.size(2)});
  const int dtype = dtype_index(z);
  const Scratch scale = layer_scale ? widened(*layer_scale, dtype) : Scratch();
  EpilogueCase c{};
  c.tokens = z.size(1), c.columns = z.size(2), c.registers = registers, c.activation = activation_of(activation);
  if (c.activation != kNone || layer_scale) c.z = view_of(z);
  c.out = mutable_bytes(dz), c.scale = scale.get(), c.grad = view_of(grad);
  if (path_mask) c.mask = mask_of(*path_mask);
  if (dropout > 0) c.dropout = dropout_source(*rng, dropout, layer);
  const int64_t rows = z.size(0) * c.tokens;
  constexpr int64_t kBlocks = 64;
  const int64_t per_block = std::max<int64_t>(128, (rows + kBlocks - 1) / kBlocks);
  const int64_t blocks = (rows + per_block - 1) / per_block, partial = blocks * c.columns * accumulator_bytes(dtype);
  const Scratch dbias(partial, true), dscale = layer_scale ? Scratch(partial, true) : Scratch();
  c.dbias = dbias.get(), c.dscale = dscale.get();
  const auto kernel = SDP_ACTIVE_TABLE(epilogue_table).backward[pair_of(dtype, dtype_index(grad))];
  parallel(blocks, 4 * per_block * c.columns, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block)
      kernel(c, block * per_block, std::min(rows, (block + 1) * per_block), block);
  });
  const auto sums = [&](const Scratch& partial_sums, bool wanted) {
    Tensor out = torch::stable::new_empty(z, {wanted ? c.columns : 0}, accumulator_dtype(z));
    if (wanted) write_rounded(out, block_sums(partial_sums, blocks, c.columns, dtype));
    return out;
  };
  return {dz, sums(dscale, layer_scale.has_value()), sums(dbias, true)};
}

}  // namespace
}  // namespace sdp

STABLE_TORCH_LIBRARY_IMPL(sdp_kernels_cpp, CPU, m) {
  m.impl("linear_epilogue_fwd", TORCH_BOX(&sdp::linear_epilogue_fwd));
  m.impl("linear_epilogue_bwd", TORCH_BOX(&sdp::linear_epilogue_bwd));
}
#endif
