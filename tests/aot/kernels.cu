// Every CUDA kernel that ships, instantiated by the code that chooses between them; compiled for inspection, never run.
#include <cuda_runtime.h>

#include "cuda/kelu.cuh"
#include "cuda/layer_norm_2d.cuh"

namespace {

struct Launcher {
  template <class... Parameters, class... Arguments>
  void operator()(void (*kernel)(Parameters...), const sdp::LaunchGeometry& g, const Arguments&... arguments) const {
    kernel<<<static_cast<unsigned>(g.blocks), g.threads, static_cast<size_t>(g.shared)>>>(
        static_cast<Parameters>(arguments)...);
  }
};

template <class T>
void each(T* p) {
  const sdp::KeluStrides strides{};
  sdp::kelu_launch<T, false>(nullptr, p, p, 0, strides, Launcher{});
  sdp::kelu_launch<T, true>(p, p, p, 0, strides, Launcher{});
  const sdp::LayerNormCase<float> c{};
  const sdp::LayerNormPlan plan{};
  sdp::layer_norm_2d_forward<T>(c, plan, Launcher{});
  sdp::layer_norm_2d_backward<T>(c, plan, p, p, Launcher{});
  float* wide = nullptr;
  sdp::layer_norm_2d_backward<T>(c, plan, wide, wide, Launcher{});
}

}  // namespace

void every_kernel(float* a, __nv_bfloat16* b, __half* c) {
  each(a);
  each(b);
  each(c);
}
