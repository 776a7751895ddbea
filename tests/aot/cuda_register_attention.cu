// Every kernel of register attention that ships, instantiated by the code that chooses between them.
#include "cuda_launcher.cuh"
//
#include "cuda/register_attention.cuh"

namespace {

template <class T>
void each(T*) {
  const sdp::AttentionCase<float> c{};
  const sdp::AttentionPlan plan{};
  sdp::register_attention_forward<T>(c, plan, Launcher{});
  sdp::register_attention_backward<T>(c, plan, sdp::AttentionGradients<float>{}, Launcher{});
}

}  // namespace

void every_kernel(float* a, __nv_bfloat16* b, __half* c) { each(a), each(b), each(c); }
