// A call: BACKWARD REGISTERS ACTIVATION WIDE_SCALE LAYER MULTIPROCESSORS ORDER SCALE MASK DROPOUT(‰) WIDE B T N, then z
// and the residual or grad (absent: 0 elements), each elements and strides of B, T, N.
#include "linear.cpp"
//
#include "sanitize.h"

namespace {

void call() {
  const int64_t backward = number();
  const int64_t numbers[5] = {number(), number(), number(), number(), number()};
  simt::settings.order = number();
  const int64_t scaled = number(), masked = number();
  const double dropout = number() / 1000.0;
  const int64_t wide = number(), sizes[3] = {number(), number(), number()};
  int64_t views[8] = {}, told[3];
  for (int t = 0; t < 2; ++t) {
    const int64_t count = number();
    void* data = nullptr;
    if (count > 0) data = t == 1 && wide ? static_cast<void*>(memory<A>(count)) : memory<T>(count);
    views[4 * t] = reinterpret_cast<int64_t>(data);
    for (int d = 1; d <= 3; ++d) views[4 * t + d] = number();
  }
  const int64_t elements = sizes[0] * sizes[1] * sizes[2];
  const void* scale = nullptr;
  if (scaled) scale = numbers[2] ? static_cast<void*>(memory<A>(sizes[2])) : memory<T>(sizes[2]);
  const float* mask = masked ? memory<float>(sizes[0]) : nullptr;
  int64_t* rng = memory<int64_t>(3);
  if (backward) {
    A *dscale = memory<A>(scaled ? sizes[2] : 0), *dbias = memory<A>(sizes[2]);
    T* dz = memory<T>(elements);
    linear_epilogue_bwd(sizes, views, numbers, scale, mask, dropout, rng, dz, dscale, dbias, wide, told);
  } else {
    void* y = wide ? static_cast<void*>(memory<A>(elements)) : memory<T>(elements);
    linear_epilogue_fwd(sizes, views, numbers, scale, mask, dropout, rng, y, wide, told);
  }
}

}  // namespace
