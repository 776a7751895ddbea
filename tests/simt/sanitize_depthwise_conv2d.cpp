// A call: BACKWARD ORDER NORM BIAS, the numbers of depthwise_conv2d.cpp, then the tensors x, out and grad (absent: 0
// elements), each elements, elements before the first pixel and strides of B, C, H, W.
#include "depthwise_conv2d.cpp"
//
#include "sanitize.h"

namespace {

void call() {
  const int64_t backward = number();
  simt::settings.order = number();
  const int64_t has_norm = number(), has_bias = number();
  Numbers n;
  int64_t numbers[sizeof(n) / sizeof(int64_t)], views[15] = {}, told[8];
  for (int64_t& value : numbers) value = number();
  std::memcpy(&n, numbers, sizeof(n));
  for (int t = 0; t < 3; ++t) {
    const int64_t count = number(), before = number();
    views[5 * t] = count ? reinterpret_cast<int64_t>(memory<T>(count) + before) : 0;
    for (int d = 1; d <= 4; ++d) views[5 * t + d] = number();
  }
  const int64_t channels = n.sizes[1], taps = n.kernel * n.kernel;
  const void* norm[4] = {};
  if (has_norm) {
    const int64_t pixels = (n.sizes[0] - 1) * n.statistics + n.sizes[2] * n.sizes[3];
    norm[0] = memory<A>(pixels), norm[1] = memory<A>(pixels);
    for (int i = 0; i < 2; ++i)
      norm[2 + i] = n.wide[i] ? static_cast<void*>(memory<A>(channels)) : memory<T>(channels);
  }
  T *weight = memory<T>((channels - 1) * n.weight[0] + (n.kernel - 1) * (n.weight[1] + n.weight[2]) + 1),
    *bias = has_bias ? memory<T>((channels - 1) * n.bias + 1) : nullptr;
  if (!backward) return depthwise_conv2d_fwd(numbers, views, weight, bias, norm, told);
  depthwise_conv2d_bwd(numbers, views, weight, norm, memory<A>(channels * taps), memory<A>(channels), told);
}

}  // namespace
