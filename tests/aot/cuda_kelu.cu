// Every KeLü kernel that ships, instantiated by the code that chooses between them.
#include "cuda_launcher.cuh"
//
#include "cuda/kelu.cuh"

namespace {

template <class T>
void each(T* p) {
  const sdp::KeluStrides strides{};
  sdp::kelu_launch<T, false>(nullptr, p, p, 0, strides, Launcher{});
  sdp::kelu_launch<T, true>(p, p, p, 0, strides, Launcher{});
}

}  // namespace

void every_kernel(float* a, __nv_bfloat16* b, __half* c) { each(a), each(b), each(c); }
