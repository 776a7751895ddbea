// Register attention's CUDA kernels for the emulator: does what csrc/cuda/register_attention.cu does around `launch`.
#include "library.h"
//
#include "simt_wgmma.h"
//
#include "cuda/register_attention.cuh"

namespace {

// sizes: B, T, heads, d, registers, image reads registers, registers read image, layer; norms: four pointers and
// whether each is wide, q weight, q bias, k weight, k bias.
sdp::AttentionCase<A> case_of(const int64_t* sizes, const double* numbers, const int64_t* norms, const void* qkv,
                              void* y, void* lse, const int64_t* rng) {
  auto c = sdp::attention_case<A>(sizes[0], int(sizes[1]), int(sizes[2]), int(sizes[3]), numbers[0], numbers[1],
                                  int(sizes[4]), sizes[5], sizes[6]);
  sdp::set_dropout(c, numbers[2], rng, sizes[7]);
  auto pointer = [&](int i) { return reinterpret_cast<const void*>(norms[2 * i]); };
  c.q_norm = {norms[0] || norms[2], pointer(0), pointer(1), norms[1] != 0, norms[3] != 0};
  c.k_norm = {norms[4] || norms[6], pointer(2), pointer(3), norms[5] != 0, norms[7] != 0};
  c.qkv = qkv, c.y = y, c.lse = static_cast<A*>(lse);
  return c;
}

template <bool Fma>
void forward(sdp::AttentionCase<A>& c, const sdp::DeviceLimits& limits, int64_t* told) {
  const sdp::AttentionPlan plan = sdp::attention_plan<T, Fma>(c, false, limits);
  told[0] = plan.chunk, told[1] = plan.rounds, told[2] = plan.parts, told[3] = plan.wgmma;
  if (plan.geometry.blocks > 0) sdp::register_attention_forward<T, Fma>(c, plan, Launcher{});
}
template <bool Fma>
void backward(sdp::AttentionCase<A>& c, const sdp::DeviceLimits& limits, bool wgmma, const int64_t* outputs,
              int64_t* told) {
  const sdp::AttentionPlan plan = sdp::attention_plan<T, Fma>(c, true, limits, wgmma);
  told[0] = plan.chunk, told[1] = plan.rounds, told[2] = plan.parts, told[3] = plan.wgmma;
  const size_t bytes = simt::settings.dry ? 0 : plan.geometry.blocks * 2 * c.d * sizeof(A);
  c.partial = static_cast<A*>(std::malloc(bytes + (bytes == 0)));
  std::memset(c.partial, 0xff, bytes);
  auto out = [&](int i) { return reinterpret_cast<A*>(outputs[i]); };
  sdp::register_attention_backward<T, Fma>(c, plan, {out(2), out(3), out(0), out(1)}, Launcher{});
  std::free(c.partial);
}

}  // namespace

extern "C" {

// numbers: eps, scale, dropout. form: 1 by multiply-adds, also what has tensor cores; 2 with warpgroups, where they serve.
// told: chunk, rounds, parts, whether with warpgroups.
void register_attention_fwd(const int64_t* sizes, const double* numbers, const int64_t* norms, const void* qkv, void* y,
                            void* lse, const int64_t* rng, const int64_t* limits, int form, int64_t* told) {
  auto c = case_of(sizes, numbers, norms, qkv, y, lse, rng);
  const sdp::DeviceLimits device{limits[0], limits[1], limits[2]};
  if (form == 1 || sdp::kAttentionFma<T>) forward<true>(c, device, told);
  else if constexpr (!sdp::kAttentionFma<T>) forward<false>(c, device, told);
}

// gradients: q weight, q bias, k weight, k bias, 0 where not wanted.
void register_attention_bwd(const int64_t* sizes, const double* numbers, const int64_t* norms, const void* grad,
                            const void* qkv, const void* y, const void* lse, void* dqkv, const int64_t* gradients,
                            const int64_t* rng, const int64_t* limits, int form, int64_t* told) {
  auto c = case_of(sizes, numbers, norms, qkv, const_cast<void*>(y), const_cast<void*>(lse), rng);
  c.grad = grad, c.dqkv = dqkv;
  const sdp::DeviceLimits device{limits[0], limits[1], limits[2]};
  if (form == 1 || sdp::kAttentionFma<T>) backward<true>(c, device, false, gradients, told);
  else if constexpr (!sdp::kAttentionFma<T>) backward<false>(c, device, form == 2, gradients, told);
}
}
