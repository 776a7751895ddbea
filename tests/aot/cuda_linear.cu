// Every kernel around linear's GEMM that ships, instantiated by the code that chooses between them.
#include "cuda_launcher.cuh"
//
#include "cuda/linear.cuh"

namespace {

template <class T, class R>
void each() {
  const sdp::EpilogueCase<float> c{};
  const sdp::EpiloguePlan plan{};
  sdp::linear_epilogue_forward<T, R>(c, plan, Launcher{});
  sdp::linear_epilogue_backward<T, R>(c, plan, nullptr, nullptr, Launcher{});
}

}  // namespace

void every_kernel() {
  each<float, float>();
  each<__nv_bfloat16, __nv_bfloat16>(), each<__half, __half>();
  each<__nv_bfloat16, float>(), each<__half, float>();
}
