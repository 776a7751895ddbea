// Register attention on the CPU, one head of one sample at a time: forward, and backward with the scores computed again.
//
// K is normalised once and kept transposed for the scores, V as it is; queries come kQueries at a time, so that a row of
// scores is whole (no running maximum), and nothing of (T, T) is ever kept. q carries the scale. Backward keeps K, Kᵀ and
// Vᵀ, and adds to dK and dV block after block, in order; the norms' gradients are summed per head and added in order.
#include "cpu/register_attention_parts.h"

namespace sdp {
namespace SDP_LEVEL_NAMESPACE {

// Where the matrices stand in a thread's memory, each on a cache line.
template <class T>
struct Workspace {
  using V = Vector<T>;
  static constexpr int lanes = kLanes<T>;
  int64_t width, columns, pitch, rows;  // vectors of a head, vectors of a row of scores and their pitch, rows of K
  V *k, *k_turned, *v, *v_turned, *q, *grad, *scores, *dscores, *out, *dk, *dv;
  int64_t bytes = 0;

  Workspace(const AttentionCase& c, bool backward, void* memory) {
    width = (c.d + lanes - 1) / lanes, rows = rounded_up(c.tokens, 16);
    columns = rows / lanes, pitch = columns | 1;
    const auto take = [&](int64_t vectors) {
      V* at = reinterpret_cast<V*>(static_cast<char*>(memory) + bytes);
      bytes += rounded_up(vectors * int64_t(sizeof(V)), 64);
      return at;
    };
    k = take(rows * width), k_turned = take(width * lanes * pitch), v = take(rows * width);
    q = take(kQueries * width), scores = take(kQueries * pitch), out = take(kQueries * width);
    if (!backward) return;
    v_turned = take(width * lanes * pitch), grad = take(kQueries * width), dscores = take(kQueries * pitch);
    dk = take(rows * width), dv = v;  // v is needed until it is turned
  }
};

// K normalised, Kᵀ, and V; rows behind the last token are 0.
template <class T>
void pack_keys(const AttentionCase& c, int64_t sample, int64_t head, const Workspace<T>& w) {
  for (int64_t t = 0; t < w.rows; ++t) {
    Vector<T> *k = w.k + t * w.width, *v = w.v + t * w.width;
    for (int64_t i = 0; i < w.width && t >= c.tokens; ++i) k[i] = v[i] = Vector<T>{};
    if (t >= c.tokens) continue;
    normed_row<T>(c, sample, head, t, 1, Accumulator<T>(1), k);
    read_row(token_row<T>(c.qkv, sample, t, 2, head), c.qkv.column, c.d, v);
  }
  transpose_matrix<Accumulator<T>>(w.k, w.width, w.k_turned, w.pitch, w.columns, w.width);
}

template <class T>
void pack_queries(const AttentionCase& c, int64_t sample, int64_t head, int64_t first, int64_t count,
                  const Workspace<T>& w) {
  for (int64_t i = 0; i < count; ++i)
    normed_row<T>(c, sample, head, first + i, 0, Accumulator<T>(c.scale), w.q + i * w.width);
}

template <class A, class V>
const A* elements(const V* matrix) { return reinterpret_cast<const A*>(matrix); }

// scores ← exp(scores − their maximum), dropped; returns (the sum before dropping) and writes lse.
template <class T>
Accumulator<T> soften_row(const AttentionCase& c, int64_t sample, int64_t head, int64_t query, const Workspace<T>& w,
                          Vector<T>* scores) {
  using A = Accumulator<T>;
  using V = Vector<T>;
  limit_row(c, query, scores, w.columns);
  V most = scores[0], sum{};
  for (int64_t j = 1; j < w.columns; ++j) most = scores[j] > most ? scores[j] : most;
  const A top = horizontal_maximum(most);
  for (int64_t j = 0; j < w.columns; ++j) {
    scores[j] = exponential(scores[j] - top);
    sum += scores[j];
  }
  const A total = horizontal_sum(sum), log = sizeof(A) == 4 ? A(__builtin_logf(float(total))) : A(__builtin_log(double(total)));
  static_cast<A*>(c.lse)[(sample * c.heads + head) * c.tokens + query] = top + log;
  if (c.dropout.scale != 0.0f)
    along_dropout<V>(c, sample, head, query, [&](int64_t j, V kept) { scores[j] *= kept; });
  return total;
}

template <class T>
void forward(const AttentionCase& c, int64_t item, void* memory) {
  using A = Accumulator<T>;
  const Workspace<T> w(c, false, memory);
  const int64_t sample = item / c.heads, head = item % c.heads, lanes = w.lanes;
  pack_keys<T>(c, sample, head, w);
  for (int64_t first = 0; first < c.tokens; first += kQueries) {
    const int64_t count = c.tokens - first < kQueries ? c.tokens - first : kQueries;
    pack_queries<T>(c, sample, head, first, count, w);
    product(elements<A>(w.q), w.width * lanes, 1, w.k_turned, w.pitch, w.scores, w.pitch, count, w.columns, c.d, false);
    A totals[kQueries];
    for (int64_t i = 0; i < count; ++i)
      totals[i] = soften_row<T>(c, sample, head, first + i, w, w.scores + i * w.pitch);
    product(elements<A>(w.scores), w.pitch * lanes, 1, w.v, w.width, w.out, w.width, count, w.width, c.tokens, false);
    for (int64_t i = 0; i < count; ++i) {
      T* to = static_cast<T*>(c.y) + ((sample * c.tokens + first + i) * c.heads + head) * c.d;
      write_row(to, c.d, w.out + i * w.width, A(1) / totals[i]);
    }
  }
}

// scores ← the weights that v was multiplied by, dscores ← the gradient of the scores, from that of these weights.
template <class T>
void differentiate_row(const AttentionCase& c, int64_t sample, int64_t head, int64_t query, const Workspace<T>& w,
                       Vector<T>* scores, Vector<T>* dscores) {
  using A = Accumulator<T>;
  using V = Vector<T>;
  limit_row(c, query, scores, w.columns);
  const A lse = static_cast<const A*>(c.lse)[(sample * c.heads + head) * c.tokens + query];
  for (int64_t j = 0; j < w.columns; ++j) scores[j] = exponential(scores[j] - lse);
  if (c.dropout.scale != 0.0f)
    along_dropout<V>(c, sample, head, query, [&](int64_t j, V kept) { dscores[j] *= kept; });
  V sum{};
  for (int64_t j = 0; j < w.columns; ++j) sum += scores[j] * dscores[j];
  const A delta = horizontal_sum(sum);
  for (int64_t j = 0; j < w.columns; ++j) dscores[j] = scores[j] * (dscores[j] - delta);
  if (c.dropout.scale != 0.0f)
    along_dropout<V>(c, sample, head, query, [&](int64_t j, V kept) { scores[j] *= kept; });
}

template <class T>
void backward(const AttentionCase& c, int64_t item, void* memory) {
  using A = Accumulator<T>;
  const Workspace<T> w(c, true, memory);
  const int64_t sample = item / c.heads, head = item % c.heads, lanes = w.lanes;
  pack_keys<T>(c, sample, head, w);
  transpose_matrix<A>(w.v, w.width, w.v_turned, w.pitch, w.columns, w.width);
  for (int64_t first = 0; first < c.tokens; first += kQueries) {
    const int64_t count = c.tokens - first < kQueries ? c.tokens - first : kQueries;
    pack_queries<T>(c, sample, head, first, count, w);
    for (int64_t i = 0; i < count; ++i)
      read_row(token_row<T>(c.grad, sample, first + i, 0, head), c.grad.column, c.d, w.grad + i * w.width);
    const int64_t row = w.width * lanes, across = w.pitch * lanes;
    product(elements<A>(w.q), row, 1, w.k_turned, w.pitch, w.scores, w.pitch, count, w.columns, c.d, false);
    product(elements<A>(w.grad), row, 1, w.v_turned, w.pitch, w.dscores, w.pitch, count, w.columns, c.d, false);
    for (int64_t i = 0; i < count; ++i)
      differentiate_row<T>(c, sample, head, first + i, w, w.scores + i * w.pitch, w.dscores + i * w.pitch);
    // Down the columns of the scores: the queries of this block are what is summed over.
    product(elements<A>(w.scores), 1, across, w.grad, w.width, w.dv, w.width, c.tokens, w.width, count, first > 0);
    product(elements<A>(w.dscores), 1, across, w.q, w.width, w.dk, w.width, c.tokens, w.width, count, first > 0);
    product(elements<A>(w.dscores), across, 1, w.k, w.width, w.out, w.width, count, w.width, c.tokens, false);
    for (int64_t i = 0; i < count; ++i) {
      Vector<T>* dq = w.out + i * w.width;
      for (int64_t j = 0; j < w.width; ++j) dq[j] *= A(c.scale);
      normed_row_backward<T>(c, item, sample, head, first + i, 0, dq);
    }
  }
  for (int64_t t = 0; t < c.tokens; ++t) {
    normed_row_backward<T>(c, item, sample, head, t, 1, w.dk + t * w.width);
    T* to = static_cast<T*>(c.dqkv) + (((sample * c.tokens + t) * 3 + 2) * c.heads + head) * c.d;
    write_row(to, c.d, w.dv + t * w.width, A(1));
  }
}

template <class T>
int64_t forward_bytes(const AttentionCase& c) { return Workspace<T>(c, false, nullptr).bytes; }
template <class T>
int64_t backward_bytes(const AttentionCase& c) { return Workspace<T>(c, true, nullptr).bytes; }

#define SDP_ALL_DTYPES(KERNEL) {KERNEL<double>, KERNEL<float>, KERNEL<BFloat16>, KERNEL<Float16>}
extern const AttentionTable attention_table = {SDP_ALL_DTYPES(forward), SDP_ALL_DTYPES(backward),
                                               SDP_ALL_DTYPES(forward_bytes), SDP_ALL_DTYPES(backward_bytes)};

}  // namespace SDP_LEVEL_NAMESPACE
}  // namespace sdp

#if SDP_LEVEL == 0
#include <cmath>
#include <optional>
#include <string>

#include "cpu/host.h"

namespace sdp {
namespace {

using OptionalTensor = std::optional<Tensor>;

// A norm's parameter as accumulator type, kHeadLimit elements with zeros behind the last.
Scratch padded(const OptionalTensor& parameter, int dtype) {
  if (!parameter) return Scratch();
  Scratch wide(kHeadLimit * accumulator_bytes(dtype), true);
  with_data(*parameter, [&, count = parameter->numel(), stride = parameter->stride(0)](const auto* p) {
    for (int64_t i = 0; i < count; ++i) wide.write(i, static_cast<double>(p[i * stride]), dtype);
  });
  return wide;
}

// Everything that forward and backward have in common; owns the widened parameters that the case points at.
struct Call {
  AttentionCase c{};
  int dtype;
  int64_t items;
  Scratch parameters[4];

  Call(const Tensor& qkv, const OptionalTensor& q_weight, const OptionalTensor& q_bias, const OptionalTensor& k_weight,
       const OptionalTensor& k_bias, double eps, double scale, int64_t registers, const std::string& attend,
       double dropout, const OptionalTensor& rng, int64_t layer)
      : dtype(dtype_index(qkv)),
        parameters{padded(q_weight, dtype), padded(q_bias, dtype), padded(k_weight, dtype), padded(k_bias, dtype)} {
    STD_TORCH_CHECK(qkv.dim() == 5 && qkv.size(2) == 3, "register_attention: qkv must be (B, T, 3, h, d)");
    c.tokens = qkv.size(1), c.heads = qkv.size(3), c.d = qkv.size(4), c.registers = registers;
    STD_TORCH_CHECK(c.d <= kHeadLimit, "register_attention: d must be at most ", kHeadLimit);
    items = qkv.size(0) * c.heads;
    c.images_read_images = attend == "image_to_image" || attend == "separate";
    c.registers_read_registers = attend == "registers_to_registers" || attend == "separate";
    c.eps = eps, c.scale = scale;
    c.qkv = {const_cast<char*>(bytes(qkv)), qkv.stride(0), qkv.stride(1), qkv.stride(2), qkv.stride(3), qkv.stride(4)};
    for (int i = 0; i < 2; ++i) c.norm_weight[i] = parameters[2 * i].get(), c.norm_bias[i] = parameters[2 * i + 1].get();
    if (dropout > 0) c.dropout = dropout_source(*rng, dropout, layer);
  }

  // Runs a kernel over all heads of all samples; what an item computes does not depend on which thread does it.
  template <class Kernel, class Bytes>
  void run(Kernel kernel, Bytes bytes_needed) const {
    const int64_t needed = bytes_needed(c);
    parallel(items, c.tokens * c.tokens * c.d, [&](int64_t begin, int64_t end) {
      const Scratch memory(needed);
      for (int64_t item = begin; item < end; ++item) kernel(c, item, memory.get());
    });
  }

 private:
  static DropoutSource dropout_source(const Tensor& rng, double rate, int64_t layer) {
    constexpr int64_t kStream = 2;  // ATTENTION
    const int64_t *state = static_cast<const int64_t*>(rng.const_data_ptr()), step = rng.stride(0);
    const uint64_t seed = static_cast<uint64_t>(state[0]);
    return {static_cast<uint32_t>(seed),
            static_cast<uint32_t>(seed >> 32),
            static_cast<uint32_t>(state[step]),
            static_cast<uint32_t>(layer * 4 + kStream),
            static_cast<uint32_t>(state[2 * step]),
            static_cast<uint32_t>(std::nearbyint(rate * 4294967296.0)),
            static_cast<float>(1.0 / (1.0 - rate))};
  }
};

std::tuple<Tensor, Tensor> register_attention_fwd(const Tensor& qkv, const OptionalTensor& q_weight,
                                                  const OptionalTensor& q_bias, const OptionalTensor& k_weight,
                                                  const OptionalTensor& k_bias, double eps, double scale,
                                                  int64_t registers, std::string attend, double dropout,
                                                  const OptionalTensor& rng, int64_t layer) {
  Call call(qkv, q_weight, q_bias, k_weight, k_bias, eps, scale, registers, attend, dropout, rng, layer);
  AttentionCase& c = call.c;
  Tensor y = torch::stable::new_empty(qkv, {qkv.size(0), c.tokens, c.heads * c.d});
  Tensor lse = torch::stable::new_empty(qkv, {qkv.size(0), c.heads, c.tokens}, accumulator_dtype(qkv));
  c.y = mutable_bytes(y), c.lse = mutable_bytes(lse);
  const AttentionTable& table = SDP_ACTIVE_TABLE(attention_table);
  call.run(table.forward[call.dtype], table.forward_bytes[call.dtype]);
  return {y, lse};
}

// The weights of a row stand together, so Σ dy·y is summed from them and y is not read.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> register_attention_bwd(
    const Tensor& grad, const Tensor& qkv, const Tensor&, const Tensor& lse, const OptionalTensor& q_weight,
    const OptionalTensor& q_bias, const OptionalTensor& k_weight, const OptionalTensor& k_bias, double eps,
    double scale, int64_t registers, std::string attend, double dropout, const OptionalTensor& rng, int64_t layer) {
  Call call(qkv, q_weight, q_bias, k_weight, k_bias, eps, scale, registers, attend, dropout, rng, layer);
  AttentionCase& c = call.c;
  STD_TORCH_CHECK(dtype_index(grad) == call.dtype, "register_attention_bwd: grad must have qkv's dtype");
  STD_TORCH_CHECK(lse.is_contiguous(), "register_attention_bwd: lse must be contiguous");
  Tensor dqkv = torch::stable::new_empty(qkv, {qkv.size(0), c.tokens, 3, c.heads, c.d});
  const Scratch sums(call.items * 4 * kHeadLimit * accumulator_bytes(call.dtype), true);
  c.grad = {const_cast<char*>(bytes(grad)), grad.stride(0), grad.stride(1), 0, c.d * grad.stride(2), grad.stride(2)};
  c.lse = const_cast<char*>(bytes(lse)), c.dqkv = mutable_bytes(dqkv), c.norm_gradients = sums.get();
  const AttentionTable& table = SDP_ACTIVE_TABLE(attention_table);
  call.run(table.backward[call.dtype], table.backward_bytes[call.dtype]);

  const bool normed = q_weight || k_weight;
  const std::vector<double> total = block_sums(sums, normed ? call.items : 0, 4 * kHeadLimit, call.dtype);
  const auto gradient = [&](int part, const OptionalTensor& parameter) {
    Tensor out = torch::stable::new_empty(qkv, {parameter ? c.d : 0}, accumulator_dtype(qkv));
    const auto from = total.begin() + part * kHeadLimit;
    write_rounded(out, std::vector<double>(from, from + (parameter ? c.d : 0)));
    return out;
  };
  return {dqkv, gradient(0, q_weight), gradient(1, q_bias), gradient(2, k_weight), gradient(3, k_bias)};
}

}  // namespace
}  // namespace sdp

STABLE_TORCH_LIBRARY_IMPL(sdp_kernels_cpp, CPU, m) {
  m.impl("register_attention_fwd", TORCH_BOX(&sdp::register_attention_fwd));
  m.impl("register_attention_bwd", TORCH_BOX(&sdp::register_attention_bwd));
}
#endif
