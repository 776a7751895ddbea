// LayerNorm over the channels, forward and backward on the CPU, optionally fused with the residual add before it.
//
// Two shapes of loop. Rows: channels lie next to each other (channels_last, token buffers); one pixel at a time, lanes
// over channels. Columns: pixels lie next to each other (contiguous NCHW); a tile of pixels is read once into a
// packed fp32 buffer, lanes over pixels. Tensors whose strides don't suit are read lane by lane, never copied as a whole.
//
// Weight gradients: the pixels are cut into blocks that depend on the shape alone; each block sums in order into its own
// row of partial sums, and the rows are added in order. So they are bitwise equal for any number of threads.
#include "cpu/layer_norm_2d_columns.h"
#include "cpu/layer_norm_2d_rows.h"

namespace sdp {
namespace SDP_LEVEL_NAMESPACE {

#define SDP_ALL_DTYPES(KERNEL) {KERNEL<double>, KERNEL<float>, KERNEL<BFloat16>, KERNEL<Float16>}
extern const LayerNormTable layer_norm_table = {SDP_ALL_DTYPES(forward_rows), SDP_ALL_DTYPES(forward_columns),
                                                SDP_ALL_DTYPES(backward_rows), SDP_ALL_DTYPES(backward_columns),
                                                kTileVectors * kVectorBytes};

}  // namespace SDP_LEVEL_NAMESPACE
}  // namespace sdp

#if SDP_LEVEL == 0
#include <optional>

#include "cpu/host.h"

namespace sdp {
namespace {

PictureView view_of(const Tensor& t) {
  char* data = const_cast<char*>(bytes(t));
  if (t.dim() == 4) return {data, t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
  return {data, t.stride(0), t.stride(2), 0, t.stride(1)};
}

struct Geometry {
  int64_t batch, channels, height, width, pixels;
  bool rows;  // lanes over channels; else lanes over pixels

  // `like` is the tensor whose strides decide: the output, which follows the input's layout.
  explicit Geometry(const Tensor& like) : batch(like.size(0)) {
    const bool picture = like.dim() == 4;
    channels = like.size(picture ? 1 : 2);
    height = picture ? like.size(2) : 1;
    width = like.size(picture ? 3 : 1);
    pixels = height * width;
    rows = !picture || like.stride(1) == 1;
  }
  Tensor allocate_statistics(const Tensor& x) const {
    return x.dim() == 4 ? allocate(x, {batch, height, width}, accumulator_dtype(x))
                        : allocate(x, {batch, width}, accumulator_dtype(x));
  }
};

// Cuts the flat range [begin, end) of pixel groups, `per_sample` to a sample, at the samples' borders.
template <class Body>
void by_sample(int64_t begin, int64_t end, int64_t per_sample, const Body& body) {
  while (begin < end) {
    const int64_t sample = begin / per_sample, from = begin % per_sample;
    const int64_t to = std::min(per_sample, from + end - begin);
    body(sample, from, to);
    begin += to - from;
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_2d_fwd(const Tensor& x, const std::optional<Tensor>& residual,
                                                             const Tensor& weight, const Tensor& bias, double eps,
                                                             int64_t registers) {
  Tensor y = allocate_like(x);
  Tensor sum = residual ? allocate_like(x) : allocate(x, {0});
  const Geometry g(y);
  Tensor mean = g.allocate_statistics(x), rstd = g.allocate_statistics(x);
  const int dtype = dtype_index(x);
  const WideParameter wide_weight(weight, dtype), wide_bias(bias, dtype);

  LayerNormCase c{};
  c.channels = g.channels, c.width = g.width, c.pixels = g.pixels, c.registers = registers, c.eps = eps;
  c.x = view_of(x), c.y = view_of(y);
  if (residual) c.residual = view_of(*residual), c.sum = view_of(sum);
  c.weight = wide_weight.get(), c.bias = wide_bias.get();
  c.mean = mutable_bytes(mean), c.rstd = mutable_bytes(rstd);

  const LayerNormTable& table = SDP_ACTIVE_TABLE(layer_norm_table);
  if (x.numel() == 0) return {y, mean, rstd, sum};
  if (g.rows) {
    parallel(g.batch * g.pixels, g.channels, [&](int64_t begin, int64_t end) {
      by_sample(begin, end, g.pixels, [&](int64_t sample, int64_t from, int64_t to) {
        table.forward_rows[dtype](c, sample, from, to);
      });
    });
  } else {
    const int64_t tile = table.tile_bytes / accumulator_bytes(dtype), tiles = (g.pixels + tile - 1) / tile;
    parallel(g.batch * tiles, g.channels * tile, [&](int64_t begin, int64_t end) {
      const Scratch scratch(g.channels * table.tile_bytes);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = i % tiles * tile;
        table.forward_columns[dtype](c, i / tiles, first, std::min(g.pixels, first + tile), scratch.get());
      }
    });
  }
  return {y, mean, rstd, sum};
}

int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// For at most 64 blocks of about `wanted` tiles, a multiple of 4 of them: two or four threads get as many each.
int64_t tiles_per_block(int64_t count, int64_t wanted) {
  constexpr int64_t kBlocks = 64, kThreads = 4;
  const int64_t blocks = std::min(kBlocks, divided_up(count, wanted));
  return std::max<int64_t>(1, divided_up(count, blocks <= 1 ? 1 : divided_up(blocks, kThreads) * kThreads));
}

// The blocks' partial sums added in order and rounded once, to the parameter's dtype.
Tensor total(const Scratch& partial, int64_t blocks, int dtype, const Tensor& like) {
  Tensor out = allocate(like, {like.numel()});
  write_rounded(out, block_sums(partial, blocks, like.numel(), dtype));
  return out;
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_2d_bwd(const Tensor& grad, const std::optional<Tensor>& grad_sum,
                                                     const Tensor& x, const Tensor& weight, const Tensor& mean,
                                                     const Tensor& rstd, int64_t registers) {
  STD_TORCH_CHECK(grad.scalar_type() == x.scalar_type(), "layer_norm_2d_bwd: grad must have x's dtype");
  STD_TORCH_CHECK(mean.is_contiguous() && rstd.is_contiguous(), "layer_norm_2d_bwd: mean and rstd must be contiguous");
  Tensor dx = allocate_like(x);
  const Geometry g(dx);
  const int dtype = dtype_index(x);
  const WideParameter wide_weight(weight, dtype);

  const LayerNormTable& table = SDP_ACTIVE_TABLE(layer_norm_table);
  const int64_t tile = g.rows ? 1 : table.tile_bytes / accumulator_bytes(dtype);
  const int64_t tiles = (g.pixels + tile - 1) / tile, count = g.batch * tiles;  // tiles of one pixel are rows
  const int64_t per_block = tiles_per_block(count, g.rows ? 128 : 2), blocks = divided_up(count, per_block);
  const int64_t partial_bytes = blocks * g.channels * accumulator_bytes(dtype);
  const Scratch dweight(partial_bytes, true), dbias(partial_bytes, true);

  LayerNormCase c{};
  c.channels = g.channels, c.width = g.width, c.pixels = g.pixels, c.registers = registers;
  c.x = view_of(x), c.grad = view_of(grad), c.dx = view_of(dx);
  if (grad_sum) c.grad_sum = view_of(*grad_sum);
  c.weight = wide_weight.get(), c.dweight = dweight.get(), c.dbias = dbias.get();
  c.mean = const_cast<char*>(bytes(mean)), c.rstd = const_cast<char*>(bytes(rstd));

  if (x.numel() != 0) {
    parallel(blocks, per_block * tile * g.channels, [&](int64_t begin, int64_t end) {
      const Scratch scratch(g.rows ? 0 : 2 * g.channels * table.tile_bytes);
      for (int64_t block = begin; block < end; ++block)
        by_sample(block * per_block, std::min(count, (block + 1) * per_block), tiles,
                  [&](int64_t sample, int64_t from, int64_t to) {
                    if (g.rows) {
                      table.backward_rows[dtype](c, sample, from, to, block);
                      return;
                    }
                    for (int64_t i = from; i < to; ++i)
                      table.backward_columns[dtype](c, sample, i * tile, std::min(g.pixels, (i + 1) * tile), block,
                                                    scratch.get());
                  });
    });
  }
  return {dx, total(dweight, blocks, dtype, weight), total(dbias, blocks, dtype, weight)};
}

}  // namespace
}  // namespace sdp

STABLE_TORCH_LIBRARY_IMPL(sdp_kernels_cpp, CPU, m) {
  m.impl("layer_norm_2d_fwd", TORCH_BOX(&sdp::layer_norm_2d_fwd));
  m.impl("layer_norm_2d_bwd", TORCH_BOX(&sdp::layer_norm_2d_bwd));
}
#endif
