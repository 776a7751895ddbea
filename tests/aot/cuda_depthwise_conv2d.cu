// Every CUDA kernel of depthwise_conv2d that ships, instantiated by the code that chooses between them.
#include "cuda_launcher.cuh"
//
#include "cuda/depthwise_conv2d.cuh"

namespace {

template <class T>
void each(T*) {
  sdp::DepthwiseCase<float> c{};
  const sdp::DepthwisePlan plan = sdp::depthwise_conv2d_plan<T>(c, 7, false, true);
  sdp::depthwise_conv2d_forward<T>(c, 7, plan, Launcher{});
  sdp::depthwise_conv2d_backward<T>(c, 7, plan, nullptr, nullptr, Launcher{});
}

}  // namespace

void every_kernel(float* a, __nv_bfloat16* b, __half* c) { each(a), each(b), each(c); }
