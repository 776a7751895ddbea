// A call: BACKWARD B T HEADS D REGISTERS READS READS LAYER, whether each of four parameters is THERE, WIDE DROPOUT
// LIMIT LIMIT MULTIPROCESSORS FORM ORDER.
#include "register_attention.cpp"
//
#include "sanitize.h"

namespace {

void call() {
  const int64_t backward = number();
  int64_t sizes[8], norms[8] = {}, gradients[4] = {}, there[4], told[4];
  for (int64_t& n : sizes) n = number();
  for (int64_t& n : there) n = number();
  const int64_t wide = number(), dropout = number();
  const int64_t limits[3] = {number(), number(), number()};
  const int form = int(number());
  simt::settings.order = number();
  for (int i = 0; i < 4; ++i) {
    if (!there[i]) continue;
    norms[2 * i] = reinterpret_cast<int64_t>(wide ? static_cast<void*>(memory<A>(sizes[3])) : memory<T>(sizes[3]));
    norms[2 * i + 1] = wide;
    gradients[i] = reinterpret_cast<int64_t>(memory<A>(sizes[3]));
  }
  const int64_t rows = sizes[0] * sizes[1] * sizes[2], rng[3] = {12345678987654321, 7, 2};
  const double numbers[3] = {1e-5, 0.2, dropout ? 0.25 : 0};
  T *qkv = memory<T>(3 * rows * sizes[3]), *y = memory<T>(rows * sizes[3]);
  A* lse = memory<A>(rows);
  if (!backward) return register_attention_fwd(sizes, numbers, norms, qkv, y, lse, rng, limits, form, told);
  T *grad = memory<T>(rows * sizes[3]), *dqkv = memory<T>(3 * rows * sizes[3]);
  register_attention_bwd(sizes, numbers, norms, grad, qkv, y, lse, dqkv, gradients, rng, limits, form, told);
}

}  // namespace
