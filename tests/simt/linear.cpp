// The CUDA kernels around linear's GEMM for the emulator: does what csrc/cuda/linear.cu does around `launch`.
#include "library.h"
//
#include "cuda/linear.cuh"

namespace {

// views: data and strides of B, T, N per tensor; sizes: B, T, N.
sdp::TokenView view(const int64_t* views, int i, const int64_t* sizes) {
  const int64_t* v = views + 4 * i;
  if (v[0] == 0) return {};
  return sdp::token_view(reinterpret_cast<void*>(v[0]), sizes[0], sizes[1], sizes[2], v[1], v[2], v[3]);
}

// numbers: registers, activation, whether γ is of the accumulator's type, layer, multiprocessors.
sdp::EpilogueCase<A> case_of(const int64_t* sizes, const int64_t* numbers, const void* scale, const float* mask,
                             double dropout, const int64_t* rng) {
  auto c = sdp::epilogue_case<A>(sizes[0], sizes[1], sizes[2], numbers[0], int(numbers[1]));
  c.scale = scale, c.wide_scale = numbers[2], c.mask = mask;
  if (dropout > 0) {
    c.rng = rng, c.place = uint32_t(numbers[3] * 4), c.kept = float(1 / (1 - dropout));
    c.threshold = uint32_t(std::min(std::nearbyint(dropout * 4294967296.0), 4294967295.0));
  }
  return c;
}

template <class R>
void forward(sdp::EpilogueCase<A>& c, int64_t multiprocessors, int64_t* told) {
  const sdp::EpiloguePlan plan = sdp::epilogue_plan<T, R>(c, false, multiprocessors);
  told[0] = plan.packed, told[1] = c.lanes, told[2] = plan.chunks;
  sdp::linear_epilogue_forward<T, R>(c, plan, Launcher{});
}

template <class R>
void backward(sdp::EpilogueCase<A>& c, int64_t multiprocessors, A* dscale, A* dbias, int64_t* told) {
  const sdp::EpiloguePlan plan = sdp::epilogue_plan<T, R>(c, true, multiprocessors);
  told[0] = plan.packed, told[1] = c.lanes, told[2] = plan.chunks;
  const size_t bytes = simt::settings.dry ? 0 : plan.chunks * c.sums() * c.columns * sizeof(A);
  c.partial = static_cast<A*>(std::malloc(bytes + (bytes == 0)));
  std::memset(c.partial, 0xff, bytes);
  sdp::linear_epilogue_backward<T, R>(c, plan, dscale, dbias, Launcher{});
  std::free(c.partial);
}

}  // namespace

extern "C" {

// views: z, residual. `wide`: y and the residual are of the accumulator's type.
void linear_epilogue_fwd(const int64_t* sizes, const int64_t* views, const int64_t* numbers, const void* scale,
                         const float* mask, double dropout, const int64_t* rng, void* y, int wide, int64_t* told) {
  auto c = case_of(sizes, numbers, scale, mask, dropout, rng);
  c.z = view(views, 0, sizes), c.residual = view(views, 1, sizes), c.out = y;
  if (wide) forward<A>(c, numbers[4], told);
  else forward<T>(c, numbers[4], told);
}

// views: z, grad. `wide`: grad is of the accumulator's type.
void linear_epilogue_bwd(const int64_t* sizes, const int64_t* views, const int64_t* numbers, const void* scale,
                         const float* mask, double dropout, const int64_t* rng, void* dz, void* dscale, void* dbias,
                         int wide, int64_t* told) {
  auto c = case_of(sizes, numbers, scale, mask, dropout, rng);
  if (c.activation != sdp::kNone || scale != nullptr) c.z = view(views, 0, sizes);
  c.grad = view(views, 1, sizes), c.out = dz;
  if (wide) backward<A>(c, numbers[4], static_cast<A*>(dscale), static_cast<A*>(dbias), told);
  else backward<T>(c, numbers[4], static_cast<A*>(dscale), static_cast<A*>(dbias), told);
}
}
