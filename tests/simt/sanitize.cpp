// Runs kernels under AddressSanitizer and UBSan: reads calls, one per line, and makes them on memory that ends where
// the tensor does. Values are other tests' business.
//   norm BACKWARD REGISTERS WIDE LIMIT LIMIT MULTIPROCESSORS ORDER B C H W, then four tensors (absent: 0 elements)
//   kelu BACKWARD ELEMENTS DIMS, sizes and strides of y, x, grad, then three tensors
// A tensor is: elements, strides of B, C, H, W (kelu: elements only).
#include <iostream>
#include <random>

#include "kernels.cpp"

namespace {

std::mt19937 random_bits(1);
std::vector<void*> taken;  // by the current call

// Exactly `count` elements, aligned to 16 bytes as CUDA's allocations are.
template <class E>
E* memory(int64_t count) {
  E* p = static_cast<E*>(std::aligned_alloc(16, (count * sizeof(E) + 15) / 16 * 16));
  taken.push_back(p);
#if defined(__SANITIZE_ADDRESS__)
  ASAN_POISON_MEMORY_REGION(reinterpret_cast<char*>(p) + count * sizeof(E),
                            (count * sizeof(E) + 15) / 16 * 16 - count * sizeof(E));
#endif
  for (int64_t i = 0; i < count; ++i) p[i] = sdp::narrow<E>(int(random_bits() % 4001) * 0.001f - 2);
  return p;
}

int64_t number() {
  int64_t n = 0;
  if (!(std::cin >> n)) std::abort();
  return n;
}

void norm() {
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

void kelu_call() {
  const int64_t backward = number(), elements = number(), dims = number();
  std::vector<int64_t> strides(4 * dims + 1);
  for (int64_t i = 0; i < 4 * dims; ++i) strides[i] = number();
  T *y = memory<T>(number()), *x = memory<T>(number()), *grad = memory<T>(number());
  kelu(backward ? grad : nullptr, x, y, elements, int(dims), strides.data());
}

}  // namespace

int main() {
  int calls = 0;
  for (std::string word; std::cin >> word; ++calls) {
    word == "norm" ? norm() : kelu_call();
    for (void* p : taken) std::free(p);
    taken.clear();
  }
  std::printf("%d calls\n", calls);
}
