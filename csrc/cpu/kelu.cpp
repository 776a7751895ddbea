// KeLü forward and backward on the CPU.
#include "cpu/activations.h"
#include "cpu/levels.h"

namespace sdp {

// n elements, each tensor advancing by its own step.
struct KeluTable {
  void (*forward[kDtypes])(const void* x, int64_t x_step, void* y, int64_t y_step, int64_t n);
  void (*backward[kDtypes])(const void* grad, int64_t grad_step, const void* x, int64_t x_step, void* dx,
                            int64_t dx_step, int64_t n);
};
SDP_DECLARE_TABLE(KeluTable, kelu_table)

namespace SDP_LEVEL_NAMESPACE {

template <class T>
void kelu_forward(const void* x_, int64_t x_step, void* y_, int64_t y_step, int64_t n) {
  const T* x = static_cast<const T*>(x_);
  T* y = static_cast<T*>(y_);
  constexpr int lanes = kLanes<T>;
  int64_t i = 0;
  if (x_step == 1 && y_step == 1)
    for (; i + lanes <= n; i += lanes) store(y + i, kelu(load(x + i)).value);
  for (; i < n; i += lanes) {
    const int count = n - i < lanes ? n - i : lanes;
    store_part(y + i * y_step, kelu(load_part(x + i * x_step, count, x_step)).value, count, y_step);
  }
}

template <class T>
void kelu_backward(const void* grad_, int64_t grad_step, const void* x_, int64_t x_step, void* dx_, int64_t dx_step,
                   int64_t n) {
  const T *grad = static_cast<const T*>(grad_), *x = static_cast<const T*>(x_);
  T* dx = static_cast<T*>(dx_);
  constexpr int lanes = kLanes<T>;
  int64_t i = 0;
  if (grad_step == 1 && x_step == 1 && dx_step == 1)
    for (; i + lanes <= n; i += lanes) store(dx + i, load(grad + i) * kelu(load(x + i)).slope);
  for (; i < n; i += lanes) {
    const int count = n - i < lanes ? n - i : lanes;
    const auto slope = kelu(load_part(x + i * x_step, count, x_step)).slope;
    store_part(dx + i * dx_step, load_part(grad + i * grad_step, count, grad_step) * slope, count, dx_step);
  }
}

extern const KeluTable kelu_table = {
    {kelu_forward<double>, kelu_forward<float>, kelu_forward<BFloat16>, kelu_forward<Float16>},
    {kelu_backward<double>, kelu_backward<float>, kelu_backward<BFloat16>, kelu_backward<Float16>},
};

}  // namespace SDP_LEVEL_NAMESPACE
}  // namespace sdp

#if SDP_LEVEL == 0
#include "cpu/host.h"

namespace sdp {

static Tensor kelu_fwd(const Tensor& x) {
  Tensor y = allocate_like(x);
  const int dtype = dtype_index(x);
  const int64_t size = element_bytes(dtype);
  const auto kernel = SDP_ACTIVE_TABLE(kelu_table).forward[dtype];
  const char* from = bytes(x);
  char* to = mutable_bytes(y);
  const Rows<2> rows({&y, &x});
  rows.for_each([=, &rows](const std::array<int64_t, 2>& offset, int64_t begin, int64_t end) {
    const auto [y_step, x_step] = rows.step;
    kernel(from + (offset[1] + begin * x_step) * size, x_step, to + (offset[0] + begin * y_step) * size, y_step,
           end - begin);
  });
  return y;
}

static Tensor kelu_bwd(const Tensor& grad, const Tensor& x) {
  STD_TORCH_CHECK(grad.scalar_type() == x.scalar_type(), "kelu_bwd: grad must have x's dtype");
  Tensor dx = allocate_like(x);
  const int dtype = dtype_index(x);
  const int64_t size = element_bytes(dtype);
  const auto kernel = SDP_ACTIVE_TABLE(kelu_table).backward[dtype];
  const char *grads = bytes(grad), *from = bytes(x);
  char* to = mutable_bytes(dx);
  const Rows<3> rows({&dx, &x, &grad});
  rows.for_each([=, &rows](const std::array<int64_t, 3>& offset, int64_t begin, int64_t end) {
    const auto [dx_step, x_step, grad_step] = rows.step;
    kernel(grads + (offset[2] + begin * grad_step) * size, grad_step, from + (offset[1] + begin * x_step) * size,
           x_step, to + (offset[0] + begin * dx_step) * size, dx_step, end - begin);
  });
  return dx;
}

}  // namespace sdp

STABLE_TORCH_LIBRARY_IMPL(sdp_kernels_cpp, CPU, m) {
  m.impl("kelu_fwd", TORCH_BOX(&sdp::kelu_fwd));
  m.impl("kelu_bwd", TORCH_BOX(&sdp::kelu_bwd));
}
#endif
