// The kernels for columns: contiguous NCHW, or any strides. See layer_norm_2d_tile.cuh for who has what.
#pragma once
#include "cuda/layer_norm_2d_tile.cuh"

namespace sdp {

template <class T, int N, bool OnChip>
__global__ void __launch_bounds__(OnChip ? kColumnMaxThreads : kColumnThreads, OnChip || N == 1 ? 1 : 2)
    layer_norm_columns_fwd(const LayerNormCase<Accumulator<T>> c, ColumnPlan plan) {
  using A = Accumulator<T>;
  constexpr int items = kPackSize<T>, batch = N > 1 ? 4 : 2;  // loads in flight
  SDP_DYNAMIC_SHARED(shared);
  const ColumnMemory<T> memory(shared, c.channels, plan, 1);
  ColumnThread<T, N> self(plan, memory, &c.x, &c.residual, &c.y, &c.sum);
  const int64_t first = int64_t(blockIdx.x) * plan.pixels;
  self.enter(c, first);
  const bool adds = c.residual.data != nullptr;

  // First read: the channels' sum, or (not on chip) running mean and squares, Welford's way.
  A mean[1][items] = {}, squares[1][items] = {};
  int count = 0;
  for (int start = self.group; start < c.channels; start += batch * self.groups) {
    Pack<T> xs[batch];
#pragma unroll
    for (int u = 0; u < batch; ++u) {
      const int channel = start + u * self.groups;
      if (channel < c.channels) xs[u] = self.load(0, channel);
    }
    if (adds) {
#pragma unroll
      for (int u = 0; u < batch; ++u) {
        const int channel = start + u * self.groups;
        if (channel < c.channels) xs[u] = add_packs(xs[u], self.load(1, channel));
      }
    }
#pragma unroll
    for (int u = 0; u < batch; ++u) {
      const int channel = start + u * self.groups;
      if (channel < c.channels) {
        if (adds) self.store(3, channel, xs[u]);
        if (OnChip) {
          memory.tile[channel * self.lanes + self.lane] = xs[u];
#pragma unroll
          for (int i = 0; i < items; ++i) mean[0][i] += self.value(xs[u], i);
        } else {
          const A share = A(1) / A(++count);
#pragma unroll
          for (int i = 0; i < items; ++i) {
            const A x = self.value(xs[u], i), away = x - mean[0][i];
            mean[0][i] += away * share;
            squares[0][i] += away * (x - mean[0][i]);
          }
        }
      }
    }
  }
  A own[items];
#pragma unroll
  for (int i = 0; i < items; ++i) {
    own[i] = mean[0][i];
    if (!OnChip) mean[0][i] *= A(count);
  }
  self.sum_groups(mean);
#pragma unroll
  for (int i = 0; i < items; ++i) mean[0][i] /= A(c.channels);
  if (OnChip) {
    for (int channel = self.group; channel < c.channels; channel += self.groups) {
      const Pack<T> x = memory.tile[channel * self.lanes + self.lane];
#pragma unroll
      for (int i = 0; i < items; ++i) {
        const A centred = self.value(x, i) - mean[0][i];
        squares[0][i] += centred * centred;
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < items; ++i) squares[0][i] += A(count) * (own[i] - mean[0][i]) * (own[i] - mean[0][i]);
  }
  self.sum_groups(squares);
  A(&rstd)[items] = squares[0];
#pragma unroll
  for (int i = 0; i < items; ++i) rstd[i] = reciprocal_root(squares[0][i] / A(c.channels) + c.eps);
  if (self.group == 0) {
#pragma unroll
    for (int i = 0; i < items; ++i) {
      if (self.exists >> i & 1) {
        const bool alive = self.alive >> i & 1;
        c.mean[first + self.pixel_of(i)] = alive ? mean[0][i] : A(0);
        c.rstd[first + self.pixel_of(i)] = alive ? rstd[i] : A(0);
      }
    }
  }
  // Second read.
#pragma unroll 4
  for (int channel = self.group; channel < c.channels; channel += self.groups) {
    Pack<T> x;
    if (OnChip) x = memory.tile[channel * self.lanes + self.lane];
    else x = adds ? self.load(3, channel) : self.load(0, channel);
    const A weight = parameter_at<T>(c.weight, c.wide_weight, channel);
    const A bias = parameter_at<T>(c.bias, c.wide_bias, channel);
#pragma unroll
    for (int i = 0; i < items; ++i) {
      const A y = (widen(x.items[i]) - mean[0][i]) * rstd[i] * weight + bias;
      x.items[i] = narrow<T>(N > 1 || (self.alive >> i & 1) ? y : A(0));
    }
    self.store(2, channel, x);
  }
}

template <class T, int N, bool OnChip>
__global__ void __launch_bounds__(OnChip ? kColumnMaxThreads : kColumnThreads, OnChip || N == 1 ? 1 : 2)
    layer_norm_columns_bwd(const LayerNormCase<Accumulator<T>> c, ColumnPlan plan) {
  using A = Accumulator<T>;
  constexpr int items = kPackSize<T>, batch = N > 1 ? 2 : 1;
  SDP_DYNAMIC_SHARED(shared);
  const ColumnMemory<T> memory(shared, c.channels, plan, 2);
  ColumnThread<T, N> self(plan, memory, &c.x, &c.grad, &c.dx, &c.grad_sum);
  const bool adds = c.grad_sum.data != nullptr;
  A* partial = c.partial + int64_t(blockIdx.x) * 2 * c.channels;
  A* sums = plan.sums_on_chip ? memory.sums : partial;  // a channel's are touched by one thread only: no barriers
  Pack<T>* grad_tile = memory.tile + c.channels * self.lanes;
  if (self.lane == 0)
    for (int channel = self.group; channel < c.channels; channel += self.groups)
      sums[channel] = sums[c.channels + channel] = 0;

  for (int64_t first = int64_t(blockIdx.x) * plan.pixels; first < c.rows; first += int64_t(gridDim.x) * plan.pixels) {
    self.enter(c, first);
    A mean[items], rstd[items], totals[2][items] = {};
#pragma unroll
    for (int i = 0; i < items; ++i) {
      const bool alive = self.alive >> i & 1;
      mean[i] = alive ? c.mean[first + self.pixel_of(i)] : A(0);
      rstd[i] = alive ? c.rstd[first + self.pixel_of(i)] : A(0);
    }
    // The same number of turns in every thread of a warp: they sum over lanes together.
    for (int begin = 0; begin < c.channels; begin += batch * self.groups) {
      Pack<T> xs[batch], grads[batch];
#pragma unroll
      for (int u = 0; u < batch; ++u) {
        const int channel = begin + u * self.groups + self.group;
        if (channel < c.channels) xs[u] = self.load(0, channel), grads[u] = self.load(1, channel);
      }
#pragma unroll
      for (int u = 0; u < batch; ++u) {
        const int channel = begin + u * self.groups + self.group;
        const bool mine = channel < c.channels;
        A weight_sum = 0, bias_sum = 0;
        if (mine) {
          if (OnChip) {
            memory.tile[channel * self.lanes + self.lane] = xs[u];
            grad_tile[channel * self.lanes + self.lane] = grads[u];
          }
          const A weight = parameter_at<T>(c.weight, c.wide_weight, channel);
#pragma unroll
          for (int i = 0; i < items; ++i) {
            const A grad = self.value(grads[u], i), unit = (self.value(xs[u], i) - mean[i]) * rstd[i];
            totals[0][i] += grad * weight;
            totals[1][i] += grad * weight * unit;
            weight_sum += grad * unit;
            bias_sum += grad;
          }
        }
        weight_sum = sum_lanes(weight_sum, 1, self.lanes);
        bias_sum = sum_lanes(bias_sum, 1, self.lanes);
        if (mine && self.lane == 0) {
          sums[channel] += weight_sum;
          sums[c.channels + channel] += bias_sum;
        }
      }
    }
    self.sum_groups(totals);
#pragma unroll
    for (int i = 0; i < items; ++i) totals[0][i] /= A(c.channels), totals[1][i] /= A(c.channels);
#pragma unroll (N > 1 && OnChip ? 2 : 1)
    for (int channel = self.group; channel < c.channels; channel += self.groups) {
      Pack<T> x = OnChip ? memory.tile[channel * self.lanes + self.lane] : self.load(0, channel);
      const Pack<T> grads = OnChip ? grad_tile[channel * self.lanes + self.lane] : self.load(1, channel);
      Pack<T> more;
      if (adds) more = self.load(3, channel);
      const A weight = parameter_at<T>(c.weight, c.wide_weight, channel);
#pragma unroll
      for (int i = 0; i < items; ++i) {
        const A unit = (self.value(x, i) - mean[i]) * rstd[i];
        A dx = (self.value(grads, i) * weight - totals[0][i] - unit * totals[1][i]) * rstd[i];
        if (adds) dx += widen(more.items[i]);
        x.items[i] = narrow<T>(dx);
      }
      self.store(2, channel, x);
    }
  }
  if (plan.sums_on_chip && self.lane == 0)
    for (int channel = self.group; channel < c.channels; channel += self.groups) {
      partial[channel] = sums[channel];
      partial[c.channels + channel] = sums[c.channels + channel];
    }
}

}  // namespace sdp
