// Register attention, forward and backward: which kernel runs, with what geometry. No torch and no <<<>>> here:
// `launch(kernel, geometry, arguments...)` is the caller's, so that the emulator runs what a GPU would.
//
// Bytes per element of the result, of s bytes each: forward 4s, backward 8s where one block's other role finds what it
// reads of a head in the second-level cache, 13s where not; and 4 to 12 bytes per token and head. Where K and V of a
// head (Q and dY) don't fit on chip, they are read once per 256 rows (128 in backward and at d > 96).
#pragma once
#include "cuda/register_attention_backward.cuh"
#include "cuda/register_attention_fma.cuh"
#include "cuda/register_attention_wgmma.cuh"

namespace sdp {

// Calls body with d rounded up to what there are kernels for.
template <class Body>
void with_channels(int d, const Body& body) {
  if (d <= 32) return body(std::integral_constant<int, 32>());
  if (d <= 64) return body(std::integral_constant<int, 64>());
  if (d <= 96) return body(std::integral_constant<int, 96>());
  return body(std::integral_constant<int, 128>());
}

template <class T>
constexpr bool kAttentionFma = sizeof(T) > 2;  // which has no tensor cores that we use

// Whether the backward pass multiplies with warpgroups by default, where that serves. Not yet measured, so it does not:
// `python -m bench.gpu --part configurations` compares the two on a GPU.
constexpr bool kAttentionWgmma = false;

// Whether the backward pass has a kernel of warpgroup products for the case, given a device that has them: where two
// blocks share a multiprocessor, one computing while the other loads. Dropout and limits are the other kernels'.
template <class T>
bool attention_wgmma_serves(const AttentionCase<float>& c, const DeviceLimits& device) {
  if (kAttentionFma<T> || c.d > 96 || c.dropout || c.limited()) return false;
  bool fits = false;
  with_channels(c.d, [&](auto channels) {
    const int64_t shared = attention_wgmma_shared<channels>(wgmma_rows(c.tokens), kGroupWarps);
    fits = 2 * (shared + kReservedShared) <= device.multiprocessor_shared;
  });
  return fits;
}
template <class T>
AttentionPlan attention_wgmma_plan(const AttentionCase<float>& c) {
  AttentionPlan plan{};
  with_channels(c.d, [&](auto channels) {
    plan.wgmma = true, plan.parts = 1;
    plan.chunk = wgmma_rows(c.tokens);
    plan.rounds = static_cast<int>(ceil_div(c.tokens, kGroupRows)) - wgmma_has_tail(c.tokens);
    const int64_t shared = attention_wgmma_shared<channels>(plan.chunk, kGroupWarps);
    plan.geometry = {2 * c.batch * c.heads, kGroupWarps * kWarp, shared};
  });
  return plan;
}

// Depends on T, d and the device's shared memory; only the number of blocks depends on the batch. wgmma: warpgroup
// products are wanted where they serve, and the device has them.
template <class T, bool Fma = kAttentionFma<T>>
AttentionPlan attention_plan(const AttentionCase<Accumulator<T>>& c, bool backward, const DeviceLimits& device,
                             bool wgmma = false) {
  AttentionPlan plan{};
  if constexpr (!Fma)
    if (wgmma && backward && attention_wgmma_serves<T>(c, device)) return attention_wgmma_plan<T>(c);
  const int64_t heads = c.batch * c.heads, roles = backward ? 2 : 1;
  if constexpr (Fma) {
    plan.chunk = kFmaStep, plan.rounds = 1, plan.parts = static_cast<int>(ceil_div(c.tokens, kFmaStep));
    plan.geometry = {roles * heads * plan.parts, kFmaWarps * kWarp, attention_fma_shared(c.d, sizeof(Accumulator<T>))};
  } else {
    with_channels(c.d, [&](auto channels) {
      constexpr int D = channels;
      auto shared = [&](int64_t rows, int warps) {
        return backward ? attention_backward_shared<D>(rows, warps) : attention_forward_shared<D>(rows, warps);
      };
      const int64_t tiles = ceil_div(c.tokens, 16);
      int64_t rows = tiles * 16;
      int warps = kAttentionFewWarps<D>;
      if (2 * (shared(rows, warps) + kReservedShared) > device.multiprocessor_shared) warps = kAttentionManyWarps;
      const int64_t rounds = ceil_div(tiles, warps * (backward ? 1 : kAttentionRowTiles<D>));
      const bool all_on_chip = shared(rows, warps) <= device.block_shared;
      if (!all_on_chip) {
        rows = (device.block_shared - shared(0, warps)) / (shared(16, warps) - shared(0, warps)) * 16;
        if (rows < 16) rows = 16;  // more than the device has: its launch says so
      }
      plan.rounds = static_cast<int>(all_on_chip ? rounds : 1), plan.parts = static_cast<int>(all_on_chip ? 1 : rounds);
      plan.chunk = static_cast<int>(rows);
      plan.geometry = {roles * heads * plan.parts, warps * kWarp, shared(rows, warps)};
    });
  }
  return plan;
}

template <class T, bool Fma = kAttentionFma<T>, class Launch>
void register_attention_forward(const AttentionCase<Accumulator<T>>& c, const AttentionPlan& plan,
                                const Launch& launch) {
  if constexpr (Fma) launch(&register_attention_fma_fwd<T>, plan.geometry, c, plan);
  else
    with_channels(c.d, [&](auto channels) {
      launch(&register_attention_mma_fwd<T, channels>, plan.geometry, c, plan);
    });
}

// c.partial must have plan.geometry.blocks rows of (2, d) if there is a norm.
template <class T, bool Fma = kAttentionFma<T>, class Launch>
void register_attention_backward(const AttentionCase<Accumulator<T>>& c, const AttentionPlan& plan,
                                 const AttentionGradients<Accumulator<T>>& gradients, const Launch& launch) {
  using A = Accumulator<T>;
  if (plan.geometry.blocks > 0) {
    if constexpr (Fma) launch(&register_attention_fma_bwd<T>, plan.geometry, c, plan);
    else
      with_channels(c.d, [&](auto channels) {
        if constexpr (channels <= 96)
          if (plan.wgmma) return launch(&register_attention_wgmma_bwd<T, channels>, plan.geometry, c, plan);
        launch(&register_attention_mma_bwd<T, channels>, plan.geometry, c, plan);
      });
  }
  if (!c.q_norm.there && !c.k_norm.there) return;
  const A* partial = c.partial;
  launch(&register_attention_sums<A>, attention_sums_geometry(c.d, sizeof(A)), partial, plan.geometry.blocks / 2, c.d,
         gradients);
}

}  // namespace sdp
