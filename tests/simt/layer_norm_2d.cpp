// LayerNorm's CUDA kernels for the emulator: does what csrc/cuda/layer_norm_2d.cu does around `launch`.
#include "library.h"
//
#include "cuda/layer_norm_2d.cuh"

namespace {

// views: data and strides of B, C, H, W per tensor; sizes: B, C, H, W.
sdp::PictureView view(const int64_t* views, int i, const sdp::PictureSizes& s) {
  const int64_t* v = views + 5 * i;
  if (v[0] == 0) return {};
  return sdp::picture_view(reinterpret_cast<void*>(v[0]), s, v[1], v[2], v[3], v[4]);
}

// What was decided: kernel family, packed (2: half), on chip, sums on chip, pixels of a tile.
void tell(const sdp::LayerNormPlan& p, int64_t* told) {
  told[0] = int64_t(p.shape), told[1] = p.half_packed ? 2 : p.packed, told[2] = p.columns.on_chip, told[3] = p.columns.sums_on_chip;
  told[4] = p.columns.pixels;
}

}  // namespace

extern "C" {

// views: x, residual, y, sum.
void layer_norm_2d_fwd(const int64_t* sizes, const int64_t* views, int64_t registers, double eps, const void* weight,
                       const void* bias, int wide_weight, int wide_bias, void* mean, void* rstd,
                       const int64_t* limits, int64_t* told) {
  const sdp::PictureSizes s{sizes[0], sizes[1], sizes[2], sizes[3]};
  auto c = sdp::layer_norm_case<A>(s, registers, eps);
  c.x = view(views, 0, s), c.residual = view(views, 1, s), c.y = view(views, 2, s), c.sum = view(views, 3, s);
  c.weight = weight, c.bias = bias, c.wide_weight = wide_weight, c.wide_bias = wide_bias;
  c.mean = static_cast<A*>(mean), c.rstd = static_cast<A*>(rstd);
  const sdp::LayerNormPlan plan = sdp::layer_norm_plan<T>(c, false, {limits[0], limits[1], limits[2]});
  tell(plan, told);
  sdp::layer_norm_2d_forward<T>(c, plan, Launcher{});
}

// views: x, grad, grad_sum, dx.
void layer_norm_2d_bwd(const int64_t* sizes, const int64_t* views, int64_t registers, const void* weight, int wide,
                       const void* mean, const void* rstd, void* dweight, void* dbias, const int64_t* limits,
                       int64_t* told) {
  const sdp::PictureSizes s{sizes[0], sizes[1], sizes[2], sizes[3]};
  auto c = sdp::layer_norm_case<A>(s, registers, 0);
  c.x = view(views, 0, s), c.grad = view(views, 1, s), c.grad_sum = view(views, 2, s), c.dx = view(views, 3, s);
  c.weight = weight, c.wide_weight = wide;
  c.mean = static_cast<A*>(const_cast<void*>(mean)), c.rstd = static_cast<A*>(const_cast<void*>(rstd));
  const sdp::LayerNormPlan plan = sdp::layer_norm_plan<T>(c, true, {limits[0], limits[1], limits[2]});
  tell(plan, told);
  const size_t bytes = simt::settings.dry ? 0 : plan.geometry.blocks * 2 * c.channels * sizeof(A);
  c.partial = static_cast<A*>(std::malloc(bytes + (bytes == 0)));
  std::memset(c.partial, 0xff, bytes);
  if (wide) sdp::layer_norm_2d_backward<T>(c, plan, static_cast<A*>(dweight), static_cast<A*>(dbias), Launcher{});
  else sdp::layer_norm_2d_backward<T>(c, plan, static_cast<T*>(dweight), static_cast<T*>(dbias), Launcher{});
  std::free(c.partial);
}
}
