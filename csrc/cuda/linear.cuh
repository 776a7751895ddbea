// What `linear` does around its GEMM: which kernel runs, with what geometry. No torch and no <<<>>> here:
// `launch(kernel, geometry, arguments...)` is the caller's, so that the emulator runs what a GPU would.
//
// Bytes per element: forward z, y and the residual, backward dy, z and dz, once each (backward without activation and γ
// does not read z); partial sums are at most 8 bytes per column for each of few hundred blocks.
#pragma once
#include "cuda/linear_kernels.cuh"

namespace sdp {

constexpr int64_t kForwardTurns = 4;  // of a forward block: what is found once for all its rows costs a fraction then

template <class A>
EpilogueCase<A> epilogue_case(int64_t batch, int64_t tokens, int64_t columns, int64_t registers, int activation) {
  EpilogueCase<A> c{};
  c.rows = batch * tokens, c.tokens = tokens, c.columns = static_cast<int>(columns);
  c.registers = registers, c.activation = activation;
  return c;
}

// What is launched: decided by the shape, and by strides and addresses.
struct EpiloguePlan {
  bool packed;  // 16-byte accesses everywhere
  int64_t chunks;
  LaunchGeometry geometry;
};

// Sets the case's geometry, merges its samples where they don't matter, and marks its packed views.
template <class T, class R>
EpiloguePlan epilogue_plan(EpilogueCase<Accumulator<T>>& c, bool backward, int64_t multiprocessors = 132) {
  constexpr int size = kPackSize<T>;
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  EpiloguePlan plan{};
  plan.packed = c.columns % size == 0 && aligned(c.scale) && aligned(c.out);
  bool level = c.registers == 0 && c.mask == nullptr && c.rng == nullptr;
  for (TokenView* v : {&c.z, &c.residual, &c.grad}) {
    if (v->data == nullptr) continue;
    const int64_t step = v == &c.z ? size : 16 / int64_t(sizeof(R));
    v->packed = c.columns % size == 0 && v->column == 1 && v->batch % step == 0 && v->token % step == 0 &&
                aligned(v->data);
    plan.packed = plan.packed && v->packed;
    level = level && v->batch == c.tokens * v->token;
  }
  if (level) c.tokens = c.rows;

  // As many lanes along a row as leave the fewest idle, the more the better.
  const int64_t accesses = ceil_div(c.columns, size);
  c.lanes = kWarp;
  for (int lanes : {16, 8})
    if (ceil_div(accesses, lanes) * lanes < ceil_div(accesses, c.lanes) * c.lanes) c.lanes = lanes;
  c.strips = accesses == 0 ? 1 : static_cast<int>(ceil_div(accesses, c.lanes));
  const int64_t lines = kEpilogueThreads / c.lanes;
  const bool common = plan.packed && c.activation <= kGelu;
  if (!backward) {
    const int64_t step = lines * epilogue_depth(common ? c.activation : kAnyActivation);
    int64_t turns = ceil_div(c.rows, step) * c.strips / (multiprocessors * 16);  // several blocks for each place
    turns = turns < 1 ? 1 : turns > kForwardTurns ? kForwardTurns : turns;
    c.block_rows = step * turns;
    plan.chunks = ceil_div(c.rows, c.block_rows);
    plan.geometry = {c.strips * plan.chunks, kEpilogueThreads, 0};
    return plan;
  }
  // How sums are split must depend on the shape alone, not on strides.
  const int64_t most = multiprocessors * backward_resident<T, R> / c.strips, useful = ceil_div(c.rows, 4 * lines);
  const int64_t chunks = most < 1 ? 1 : most < useful ? most : useful;
  c.block_rows = chunks == 0 ? lines : ceil_div(ceil_div(c.rows, chunks), lines) * lines;
  plan.chunks = ceil_div(c.rows, c.block_rows);
  const int64_t slots = int64_t(c.sums()) * kEpilogueWarps * size * c.lanes;
  plan.geometry = {c.strips * plan.chunks, kEpilogueThreads, slots * int64_t(sizeof(Accumulator<T>))};
  return plan;
}

// Calls body with what the kernel is compiled for.
template <class Body>
void with_epilogue_kind(const EpiloguePlan& plan, int activation, const Body& body) {
  if (!plan.packed) return body(std::integral_constant<int, kAnyActivation>(), std::false_type());
  switch (activation) {
    case kNone: return body(std::integral_constant<int, kNone>(), std::true_type());
    case kKelu: return body(std::integral_constant<int, kKelu>(), std::true_type());
    case kGelu: return body(std::integral_constant<int, kGelu>(), std::true_type());
    default: return body(std::integral_constant<int, kAnyActivation>(), std::true_type());
  }
}

template <class T, class R, class Launch>
void linear_epilogue_forward(const EpilogueCase<Accumulator<T>>& c, const EpiloguePlan& plan, const Launch& launch) {
  if (plan.geometry.blocks == 0) return;
  with_epilogue_kind(plan, c.activation, [&](auto kind, auto packed) {
    constexpr auto kernel = &linear_epilogue_rows_fwd<T, R, decltype(kind)::value, decltype(packed)::value>;
    launch(kernel, plan.geometry, c);
  });
}

// dscale is null where there is no γ.
template <class T, class R, class Launch>
void linear_epilogue_backward(const EpilogueCase<Accumulator<T>>& c, const EpiloguePlan& plan, Accumulator<T>* dscale,
                              Accumulator<T>* dbias, const Launch& launch) {
  using A = Accumulator<T>;
  if (c.columns == 0) return;
  if (plan.geometry.blocks != 0)
    with_epilogue_kind(plan, c.activation, [&](auto kind, auto packed) {
      constexpr auto kernel = &linear_epilogue_rows_bwd<T, R, decltype(kind)::value, decltype(packed)::value>;
      launch(kernel, plan.geometry, c);
    });
  const LaunchGeometry sums{ceil_div(int64_t(c.sums()) * c.columns, kWarp), kEpilogueStrips * kWarp,
                            kEpilogueStrips * kWarp * int64_t(sizeof(A))};
  launch(&linear_epilogue_sums<A>, sums, c.partial, plan.chunks, int64_t(c.columns), c.sums(), dscale, dbias);
}

}  // namespace sdp
