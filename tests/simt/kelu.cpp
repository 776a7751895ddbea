// KeLü's CUDA kernels for the emulator: does what csrc/cuda/kelu.cu does around `launch`.
#include "library.h"
//
#include "cuda/kelu.cuh"

extern "C" {

// strides: sizes, then steps of y, x and grad, `dims` each. grad is null in forward.
void kelu(const void* grad, const void* x, void* y, int64_t elements, int dims, const int64_t* strides) {
  sdp::KeluStrides s{};
  s.dims = dims;
  for (int d = 0; d < dims; ++d) {
    s.size[d] = strides[d], s.y[d] = strides[dims + d];
    s.x[d] = strides[2 * dims + d], s.grad[d] = strides[3 * dims + d];
  }
  const T *from = static_cast<const T*>(x), *down = static_cast<const T*>(grad);
  if (grad == nullptr) sdp::kelu_launch<T, false>(down, from, static_cast<T*>(y), elements, s, Launcher{});
  else sdp::kelu_launch<T, true>(down, from, static_cast<T*>(y), elements, s, Launcher{});
}
}
