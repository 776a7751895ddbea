// Every LayerNorm kernel that ships, instantiated by the code that chooses between them.
#include "cuda_launcher.cuh"
//
#include "cuda/layer_norm_2d.cuh"

namespace {

template <class T>
void each(T* p) {
  const sdp::LayerNormCase<float> c{};
  const sdp::LayerNormPlan plan{};
  sdp::layer_norm_2d_forward<T>(c, plan, Launcher{});
  sdp::layer_norm_2d_backward<T>(c, plan, p, p, Launcher{});
  float* wide = nullptr;
  sdp::layer_norm_2d_backward<T>(c, plan, wide, wide, Launcher{});
}

}  // namespace

void every_kernel(float* a, __nv_bfloat16* b, __half* c) { each(a), each(b), each(c); }
