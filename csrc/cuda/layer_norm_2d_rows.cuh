// LayerNorm where channels lie next to each other (channels_last pictures, token buffers): one row, a pixel's channels,
// held in the registers of its lanes.
//
// Every lane owns packs of neighbouring channels, whether they can be loaded as packs (Packed) or not, so that results
// don't depend on strides or alignment. Rows are read once and written once.
#pragma once
#include "cuda/layer_norm_2d_case.cuh"

namespace sdp {

// Row tensors, channels [at, at + size) of one row: a pack where the view allows, else one by one; 0 beyond the last
// channel.
template <bool Packed, class T>
__device__ __forceinline__ Pack<T> load_channels(const PictureView& v, int64_t row, int at, int channels) {
  const T* p = static_cast<const T*>(v.data) + row;
  if constexpr (Packed) {
    return load_pack(p + at);
  } else {
    if (v.packed) return load_pack(p + at);
    Pack<T> pack;
#pragma unroll
    for (int j = 0; j < Pack<T>::size; ++j)
      pack.items[j] = at + j < channels ? p[(at + j) * v.channel] : narrow<T>(0);
    return pack;
  }
}
template <bool Packed, class T>
__device__ __forceinline__ void store_channels(const PictureView& v, int64_t row, int at, int channels,
                                               const Pack<T>& pack) {
  T* p = static_cast<T*>(v.data) + row;
  if constexpr (Packed) {
    store_pack(p + at, pack);
  } else {
    if (v.packed) return store_pack(p + at, pack);
#pragma unroll
    for (int j = 0; j < Pack<T>::size; ++j)
      if (at + j < channels) p[(at + j) * v.channel] = pack.items[j];
  }
}

// weight or bias at channels [at, at + size).
template <bool Packed, class T>
__device__ __forceinline__ void load_parameters(Accumulator<T> (&out)[kPackSize<T>], const void* p, bool wide, int at,
                                                int channels) {
  using A = Accumulator<T>;
  constexpr int size = kPackSize<T>, wide_size = kPackSize<A>;
  if (!Packed) {
#pragma unroll
    for (int j = 0; j < size; ++j) out[j] = at + j < channels ? parameter_at<T>(p, wide, at + j) : A(0);
  } else if (wide) {
#pragma unroll
    for (int j = 0; j < size; j += wide_size) {
      const Pack<A> pack = load_pack(static_cast<const A*>(p) + at + j);
#pragma unroll
      for (int k = 0; k < wide_size; ++k) out[j + k] = pack.items[k];
    }
  } else {
    const Pack<T> pack = load_pack(static_cast<const T*>(p) + at);
#pragma unroll
    for (int j = 0; j < size; ++j) out[j] = widen(pack.items[j]);
  }
}

// One row's forward in `Values / size` packs per lane; the lane's first channel is lane · size, packs are `lanes` packs
// apart. `sum_row(value, turn)` adds over the row's lanes; its turns are numbered so that it may use memory of its own
// for each.
template <class T, int Values, bool Packed, class SumRow>
__device__ __forceinline__ void forward_row(const LayerNormCase<Accumulator<T>>& c, int64_t row, bool exists, int lane,
                                            int lanes, const SumRow& sum_row) {
  using A = Accumulator<T>;
  constexpr int size = kPackSize<T>, packs = Values / size;
  const PixelPlace place = place_of(c, exists ? row : 0);
  const bool alive = exists && !place.is_register;
  const int64_t x_at = offset_of(c.x, place), y_at = offset_of(c.y, place);
  Pack<T> held[packs];
#pragma unroll
  for (int i = 0; i < packs; ++i) {
    const int at = (i * lanes + lane) * size;
    held[i] = exists && at < c.channels ? load_channels<Packed, T>(c.x, x_at, at, c.channels) : zero_pack<T>();
  }
  if (c.residual.data != nullptr) {
    const int64_t residual_at = offset_of(c.residual, place), sum_at = offset_of(c.sum, place);
#pragma unroll
    for (int i = 0; i < packs; ++i) {
      const int at = (i * lanes + lane) * size;
      if (exists && at < c.channels) {
        held[i] = add_packs(held[i], load_channels<Packed, T>(c.residual, residual_at, at, c.channels));
        store_channels<Packed, T>(c.sum, sum_at, at, c.channels, held[i]);
      }
    }
  }
  A total = 0, squares = 0;
#pragma unroll
  for (int i = 0; i < packs; ++i)
#pragma unroll
    for (int j = 0; j < size; ++j) total += widen(held[i].items[j]);
  const A mean = sum_row(total, 0) / A(c.channels);
#pragma unroll
  for (int i = 0; i < packs; ++i) {
    const int at = (i * lanes + lane) * size;
#pragma unroll
    for (int j = 0; j < size; ++j) {
      const A centred = at + j < c.channels ? widen(held[i].items[j]) - mean : A(0);
      squares += centred * centred;
    }
  }
  const A rstd = reciprocal_root(sum_row(squares, 1) / A(c.channels) + c.eps);
  if (!exists) return;
  if (lane == 0) {
    c.mean[row] = alive ? mean : A(0);
    c.rstd[row] = alive ? rstd : A(0);
  }
#pragma unroll
  for (int i = 0; i < packs; ++i) {
    const int at = (i * lanes + lane) * size;
    if (at < c.channels) {
      A weight[size], bias[size];
      load_parameters<Packed, T>(weight, c.weight, c.wide_weight, at, c.channels);
      load_parameters<Packed, T>(bias, c.bias, c.wide_bias, at, c.channels);
#pragma unroll
      for (int j = 0; j < size; ++j) {
        const A y = (widen(held[i].items[j]) - mean) * rstd * weight[j] + bias[j];
        held[i].items[j] = narrow<T>(alive ? y : A(0));
      }
      store_channels<Packed, T>(c.y, y_at, at, c.channels, held[i]);
    }
  }
}

// Backward blocks, which see many rows, keep the weight as accumulators in shared memory, with zeros up to a whole
// pack.
inline int64_t padded_channels(int64_t channels) { return ceil_div(channels, 8) * 8; }

template <class T>
__device__ __forceinline__ void read_weights(Accumulator<T>* weights, const LayerNormCase<Accumulator<T>>& c) {
  for (int i = threadIdx.x; i < (c.channels + 7) / 8 * 8; i += blockDim.x)
    weights[i] = i < c.channels ? parameter_at<T>(c.weight, c.wide_weight, i) : Accumulator<T>(0);
  __syncthreads();
}
template <class T>
__device__ __forceinline__ void copy_weights(Accumulator<T> (&out)[kPackSize<T>], const Accumulator<T>* weights) {
  using A = Accumulator<T>;
#pragma unroll
  for (int j = 0; j < kPackSize<T>; j += kPackSize<A>) {
    const Pack<A> pack = load_pack(weights + j);
#pragma unroll
    for (int k = 0; k < kPackSize<A>; ++k) out[j + k] = pack.items[k];
  }
}

// One row's backward, laid out as forward_row; adds to this lane's sums for dweight and dbias. `sum_row(a, b)` replaces
// both by their sums over the row's lanes. `weights` is read_weights'.
template <class T, int Values, bool Packed, class SumRow>
__device__ __forceinline__ void backward_row(const LayerNormCase<Accumulator<T>>& c, const Accumulator<T>* weights,
                                             int64_t row, bool exists, int lane, int lanes,
                                             Accumulator<T> (&weight_sum)[Values], Accumulator<T> (&bias_sum)[Values],
                                             const SumRow& sum_row) {
  using A = Accumulator<T>;
  constexpr int size = kPackSize<T>, packs = Values / size;
  const PixelPlace place = place_of(c, exists ? row : 0);
  const bool alive = exists && !place.is_register, adds = c.grad_sum.data != nullptr;
  const int64_t x_at = offset_of(c.x, place), grad_at = offset_of(c.grad, place);
  Pack<T> xs[packs], grads[packs], more[packs];
#pragma unroll
  for (int i = 0; i < packs; ++i) {
    const int at = (i * lanes + lane) * size;
    const bool mine = alive && at < c.channels;
    xs[i] = mine ? load_channels<Packed, T>(c.x, x_at, at, c.channels) : zero_pack<T>();
    grads[i] = mine ? load_channels<Packed, T>(c.grad, grad_at, at, c.channels) : zero_pack<T>();
  }
  if (adds) {  // asked for early, so that it arrives while the sums are taken
    const int64_t more_at = offset_of(c.grad_sum, place);
#pragma unroll
    for (int i = 0; i < packs; ++i) {
      const int at = (i * lanes + lane) * size;
      more[i] =
          exists && at < c.channels ? load_channels<Packed, T>(c.grad_sum, more_at, at, c.channels) : zero_pack<T>();
    }
  }
  const A mean = alive ? c.mean[row] : A(0), rstd = alive ? c.rstd[row] : A(0);
  A scaled_total = 0, product_total = 0;
#pragma unroll
  for (int i = 0; i < packs; ++i) {
    const int at = (i * lanes + lane) * size;
    if (at < c.channels) {
      A weight[size];
      copy_weights<T>(weight, weights + at);
#pragma unroll
      for (int j = 0; j < size; ++j) {
        const A grad = widen(grads[i].items[j]), unit = (widen(xs[i].items[j]) - mean) * rstd;
        const A scaled = grad * weight[j];
        scaled_total += scaled;
        product_total += scaled * unit;
        weight_sum[i * size + j] += grad * unit;
        bias_sum[i * size + j] += grad;
      }
    }
  }
  sum_row(scaled_total, product_total);
  const A scaled_mean = scaled_total / A(c.channels), product_mean = product_total / A(c.channels);
  if (!exists) return;
  const int64_t dx_at = offset_of(c.dx, place);
#pragma unroll
  for (int i = 0; i < packs; ++i) {
    const int at = (i * lanes + lane) * size;
    if (at < c.channels) {
      A weight[size];
      copy_weights<T>(weight, weights + at);
      forget_derived(xs[i]), forget_derived(grads[i]);
#pragma unroll
      for (int j = 0; j < size; ++j) {
        const A unit = (widen(xs[i].items[j]) - mean) * rstd, scaled = widen(grads[i].items[j]) * weight[j];
        A dx = (scaled - scaled_mean - unit * product_mean) * rstd;
        if (adds) dx += widen(more[i].items[j]);
        xs[i].items[j] = narrow<T>(dx);
      }
      store_channels<Packed, T>(c.dx, dx_at, at, c.channels, xs[i]);
    }
  }
}

}  // namespace sdp
