// Register attention on the CPU, one head of one sample at a time: forward, and backward with the scores computed again.
//
// K is normalised once and kept transposed for the scores, V as it is; queries come kQueries at a time, so that a row of
// scores is whole (no running maximum), and nothing of (T, T) is ever kept. q carries the scale. Backward keeps K, Kᵀ and
// Vᵀ, and adds to dK and dV block after block, in order; the norms' gradients are summed per head and added in order.
#include "cpu/register_attention_parts.h"
#include "cpu/register_attention_products.h"
#include "cpu/register_attention_softmax.h"

namespace sdp {
namespace SDP_LEVEL_NAMESPACE {

constexpr int64_t kQueries = 32;  // rows of the score matrix in memory at a time; a multiple of a vector's lanes

// Where the matrices stand in a thread's memory, each on a cache line; behind them the operands that Form makes of them.
template <class T, class Form>
struct Workspace {
  using V = Vector<T>;
  using P = typename Form::Vectors;
  static constexpr int lanes = kLanes<T>;
  int64_t width, columns, pitch, rows;  // vectors of a head, vectors of a row of scores and their pitch, rows of K
  V *k, *v, *q, *grad, *scores, *dscores, *out, *dk, *dv;
  Statistics<V> *k_statistics, *q_statistics;
  P *k_turned, *k_stacked, *v_turned, *v_stacked, *q_along, *q_stacked, *grad_along, *grad_stacked;
  P *scores_along, *scores_down, *dscores_along, *dscores_down;
  int64_t bytes = 0;

  Workspace(const AttentionCase& c, bool backward, void* memory) {
    width = (c.d + lanes - 1) / lanes, rows = rounded_up(c.tokens, 16);
    columns = rows / lanes, pitch = columns | 1;  // odd, so that neighbouring rows fall into different sets of the cache
    const auto take = [&](auto*& at, int64_t count) {
      at = reinterpret_cast<std::remove_reference_t<decltype(at)>>(static_cast<char*>(memory) + bytes);
      bytes += rounded_up(count * int64_t(sizeof(*at)), 64);
    };
    take(k_statistics, columns), take(q_statistics, rounded_up(kQueries, lanes) / lanes);
    take(k, rows * width), take(v, rows * width), take(q, kQueries * width), take(out, kQueries * width);
    take(scores, kQueries * pitch);
    take(k_turned, Form::turned_size(rows, width, pitch)), take(q_along, Form::along_size(kQueries, width));
    if (!backward) {
      take(v_stacked, Form::down_size(rows, width)), take(scores_along, Form::along_size(kQueries, columns));
      return;
    }
    take(grad, kQueries * width), take(dscores, kQueries * pitch), take(dk, rows * width);
    dv = v;  // v is needed until it is turned
    take(v_turned, Form::turned_size(rows, width, pitch)), take(k_stacked, Form::down_size(rows, width));
    take(q_stacked, Form::down_size(kQueries, width)), take(grad_along, Form::along_size(kQueries, width));
    take(grad_stacked, Form::down_size(kQueries, width)), take(scores_down, Form::down_size(kQueries, columns));
    take(dscores_down, Form::down_size(kQueries, columns)), take(dscores_along, Form::along_size(kQueries, columns));
  }
};

// K normalised, and V; rows behind the last token are 0.
template <class T, class Form>
void pack_keys(const AttentionCase& c, int64_t item, const Workspace<T, Form>& w) {
  query_or_key_rows<T>(c, item, 1, 0, c.tokens, Accumulator<T>(1), w.k, w.k_statistics);
  read_rows<T>(head_rows<T>(c, c.qkv, item, 2, 0), c.tokens, w.v);
  for (int64_t i = c.tokens * w.width; i < w.rows * w.width; ++i) w.k[i] = w.v[i] = Vector<T>{};
}

// Rows `count` of the matrices that a sum over the queries runs through: 0, if such a sum may take two at a time.
template <class V>
void end_with_zeros(int64_t count, int64_t vectors, int64_t pitch, V* matrix) {
  for (int64_t i = 0; i < vectors && count % 2 != 0; ++i) matrix[count * pitch + i] = V{};
}

// Asks for rows of qkv that the thread's next item will read, a few at a time while this one computes.
template <class T>
SDP_HOST_DEVICE void prefetch_next(const AttentionCase& c, const AttentionView& view, int64_t item, int part, int64_t first,
                                   int64_t count) {
  if (item + 1 < c.items) prefetch_rows<false>(head_rows<T>(c, view, item + 1, part, first), count);
}

template <class T, class Form>
void forward(const AttentionCase& c, int64_t item, void* memory) {
  using A = Accumulator<T>;
  const Workspace<T, Form> w(c, false, memory);
  pack_keys<T>(c, item, w);
  const auto k_turned = Form::turned(w.k, w.width, w.rows, w.width, w.k_turned, w.pitch);
  const auto v = Form::stacked(w.v, w.width, w.rows, w.width, w.v_stacked);
  for (int64_t first = 0; first < c.tokens; first += kQueries) {
    const int64_t count = c.tokens - first < kQueries ? c.tokens - first : kQueries;
    query_or_key_rows<T>(c, item, 0, first, count, A(c.scale / kScoreUnit<T>), w.q, w.q_statistics);
    const auto q = Form::along(w.q, w.width, count, w.width, w.q_along);
    for (int part = 0; part < 3; ++part) prefetch_next<T>(c, c.qkv, item, part, first, count);
    prefetch_rows<true>(result_rows<T>(c, item, first), count);
    product<Form>(q, k_turned, w.scores, w.pitch, count, w.columns, c.d, false);
    A inverses[kQueries];
    soften_rows<T>(c, item, first, count, w.columns, w.pitch, w.scores, inverses);
    const auto weights = Form::along(w.scores, w.pitch, count, w.columns, w.scores_along);
    product<Form>(weights, v, w.out, w.width, count, w.width, c.tokens, false);
    write_rows(result_rows<T>(c, item, first), count, w.out, [&](int64_t i) { return inverses[i]; });
  }
}

template <class T, class Form>
void backward(const AttentionCase& c, int64_t item, void* memory) {
  using A = Accumulator<T>;
  const Workspace<T, Form> w(c, true, memory);
  pack_keys<T>(c, item, w);
  const auto k_turned = Form::turned(w.k, w.width, w.rows, w.width, w.k_turned, w.pitch);
  const auto v_turned = Form::turned(w.v, w.width, w.rows, w.width, w.v_turned, w.pitch);
  const auto k = Form::stacked(w.k, w.width, w.rows, w.width, w.k_stacked);
  for (int64_t first = 0; first < c.tokens; first += kQueries) {
    const int64_t count = c.tokens - first < kQueries ? c.tokens - first : kQueries;
    query_or_key_rows<T>(c, item, 0, first, count, A(c.scale / kScoreUnit<T>), w.q, w.q_statistics);
    read_rows<T>(head_rows<T>(c, c.grad, item, 0, first), count, w.grad);
    const auto q = Form::along(w.q, w.width, count, w.width, w.q_along);
    const auto grad = Form::along(w.grad, w.width, count, w.width, w.grad_along);
    prefetch_next<T>(c, c.qkv, item, 0, first, count), prefetch_next<T>(c, c.qkv, item, 1, first, count);
    product<Form>(q, k_turned, w.scores, w.pitch, count, w.columns, c.d, false);
    prefetch_next<T>(c, c.qkv, item, 2, first, count), prefetch_next<T>(c, c.grad, item, 0, first, count);
    product<Form>(grad, v_turned, w.dscores, w.pitch, count, w.columns, c.d, false);
    differentiate_rows<T>(c, item, first, count, w.columns, w.pitch, w.scores, w.dscores);
    // dV and dK: sums over the queries of this block, which may come in pairs.
    end_with_zeros(count, w.columns, w.pitch, w.scores), end_with_zeros(count, w.columns, w.pitch, w.dscores);
    end_with_zeros(count, w.width, w.width, w.grad), end_with_zeros(count, w.width, w.width, w.q);
    const auto weights = Form::down(w.scores, w.pitch, count, w.columns, w.scores_down);
    const auto dweights = Form::down(w.dscores, w.pitch, count, w.columns, w.dscores_down);
    const auto grad_stacked = Form::stacked(w.grad, w.width, count, w.width, w.grad_stacked);
    const auto q_stacked = Form::stacked(w.q, w.width, count, w.width, w.q_stacked);
    prefetch_rows<true>(gradient_rows<T>(c, item, 2, first), count);
    product<Form>(weights, grad_stacked, w.dv, w.width, c.tokens, w.width, count, first > 0);
    prefetch_rows<true>(gradient_rows<T>(c, item, 1, first), count);
    product<Form>(dweights, q_stacked, w.dk, w.width, c.tokens, w.width, count, first > 0);
    const auto dscores = Form::along(w.dscores, w.pitch, count, w.columns, w.dscores_along);
    prefetch_rows<true>(gradient_rows<T>(c, item, 0, first), count);
    product<Form>(dscores, k, w.out, w.width, count, w.width, c.tokens, false);
    query_or_key_rows_backward<T>(c, item, 0, first, count, A(c.scale), w.out, w.q_statistics);
  }
  // The rows of q that dK is a sum of had the scores' unit.
  query_or_key_rows_backward<T>(c, item, 1, 0, c.tokens, A(kScoreUnit<T>), w.dk, w.k_statistics);
  write_rows(gradient_rows<T>(c, item, 2, 0), c.tokens, w.dv, [](int64_t) { return A(1); });
}

template <class T, class Form>
int64_t forward_bytes(const AttentionCase& c) { return Workspace<T, Form>(c, false, nullptr).bytes; }
template <class T, class Form>
int64_t backward_bytes(const AttentionCase& c) { return Workspace<T, Form>(c, true, nullptr).bytes; }

#ifdef SDP_BF16_PAIRS
#define SDP_PAIRS(KERNEL) KERNEL<BFloat16, Paired>
#else
#define SDP_PAIRS(KERNEL) nullptr
#endif
#define SDP_ALL_FORMS(KERNEL)                                                                            \
  {KERNEL<double, Accumulated<double>>,  KERNEL<float, Accumulated<float>>, KERNEL<BFloat16, Accumulated<float>>, \
   KERNEL<Float16, Accumulated<float>>, SDP_PAIRS(KERNEL)}
extern const AttentionTable attention_table = {SDP_ALL_FORMS(forward), SDP_ALL_FORMS(backward),
                                               SDP_ALL_FORMS(forward_bytes), SDP_ALL_FORMS(backward_bytes)};

}  // namespace SDP_LEVEL_NAMESPACE
}  // namespace sdp

#if SDP_LEVEL == 0
#include <optional>
#include <string>

#include "cpu/dropout.h"
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
    items = c.items = qkv.size(0) * c.heads;
    c.images_read_images = attend == "image_to_image" || attend == "separate";
    c.registers_read_registers = attend == "registers_to_registers" || attend == "separate";
    c.eps = eps, c.scale = scale;
    c.qkv = {const_cast<char*>(bytes(qkv)), qkv.stride(0), qkv.stride(1), qkv.stride(2), qkv.stride(3), qkv.stride(4)};
    for (int i = 0; i < 2; ++i) c.norm_weight[i] = parameters[2 * i].get(), c.norm_bias[i] = parameters[2 * i + 1].get();
    constexpr int64_t kAttentionStream = 2;  // of the masks, as in reference/philox.py
    if (dropout > 0) c.dropout = dropout_source(*rng, dropout, layer, kAttentionStream);
  }

  // Runs a kernel over all heads of all samples; what an item computes does not depend on which thread does it.
  template <class Kernels, class Bytes>
  void run(const Kernels& kernels, const Bytes& bytes_needed) const {
    const int form = dtype == kBFloat16 && kernels[kBFloat16Pairs] != nullptr && has_bf16_pairs() ? kBFloat16Pairs : dtype;
    const int64_t needed = bytes_needed[form](c);
    const auto kernel = kernels[form];
    parallel(items, c.tokens * c.tokens * c.d, [&](int64_t begin, int64_t end) {
      const Scratch memory(needed);
      for (int64_t item = begin; item < end; ++item) kernel(c, item, memory.get());
    });
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
  call.run(table.forward, table.forward_bytes);
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
  call.run(table.backward, table.backward_bytes);

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
