// A call: BACKWARD REGISTERS WIDE LIMIT LIMIT MULTIPROCESSORS ORDER B C H W, then four tensors (absent: 0 elements), each
// elements and strides of B, C, H, W.
#include "layer_norm_2d.cpp"
//
#include "sanitize.h"

namespace {

void call() {
  const int64_t backward = number(), registers = number(), wide = number();
  const int64_t limits[3] = {number(), number(), number()};
  simt::settings.order = number();
  const int64_t sizes[4] = {number(), number(), number(), number()};
  int64_t views[20] = {}, told[5];
  for (int t = 0; t < 4; ++t) {
    const int64_t count = number();
    views[5 * t] = count ? reinterpret_cast<int64_t>(memory<T>(count)) : 0;
    for (int d = 1; d <= 4; ++d) views[5 * t + d] = number();
  }
  const int64_t channels = sizes[1], rows = sizes[0] * sizes[2] * sizes[3];
  A *mean = memory<A>(rows), *rstd = memory<A>(rows);
  const void* weight = wide ? static_cast<void*>(memory<A>(channels)) : memory<T>(channels);
  void *first = wide ? static_cast<void*>(memory<A>(channels)) : memory<T>(channels),
       *second = wide ? static_cast<void*>(memory<A>(channels)) : memory<T>(channels);
  if (backward) layer_norm_2d_bwd(sizes, views, registers, weight, wide, mean, rstd, first, second, limits, told);
  else layer_norm_2d_fwd(sizes, views, registers, 1e-5, weight, first, wide, wide, mean, rstd, limits, told);
}

}  // namespace
