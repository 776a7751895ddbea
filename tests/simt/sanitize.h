// A program that runs an operator's kernels under AddressSanitizer and UBSan: reads calls, one per line, and makes them
// on memory that ends where the tensor does. Values are other tests' business. sanitize_<op>.cpp includes the operator's
// library and this, and defines `void call()`, which reads the numbers of one call.
#pragma once
#include <iostream>
#include <random>

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

void call();

}  // namespace

int main() {
  int calls = 0;
  for (std::string word; std::cin >> word; ++calls) {  // the operator's name
    call();
    for (void* p : taken) std::free(p);
    taken.clear();
  }
  std::printf("%d calls\n", calls);
}
