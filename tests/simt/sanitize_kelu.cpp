// A call: BACKWARD ELEMENTS DIMS, sizes and strides of y, x, grad, then the elements of y, x and grad.
#include "kelu.cpp"
//
#include "sanitize.h"

namespace {

void call() {
  const int64_t backward = number(), elements = number(), dims = number();
  std::vector<int64_t> strides(4 * dims + 1);
  for (int64_t i = 0; i < 4 * dims; ++i) strides[i] = number();
  T *y = memory<T>(number()), *x = memory<T>(number()), *grad = memory<T>(number());
  kelu(backward ? grad : nullptr, x, y, elements, int(dims), strides.data());
}

}  // namespace
