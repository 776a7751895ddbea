// The kernels for rows: up to kTeamChannels a team of 1 to 32 lanes has a row, several teams to a warp when rows are
// short; above, a block has one.
#pragma once
#include "cuda/layer_norm_2d_rows.cuh"

namespace sdp {

constexpr int kTeamThreads = 256;    // of a block of teams, forward
constexpr int kTeamBackwardThreads = 128;
constexpr int kTeamValues = 32;      // channels of a row in one lane, at most
constexpr int kTeamChannels = kWarp * kTeamValues;
constexpr int kBlockValues = 16;     // the same where a block has a row
constexpr int kBlockMaxThreads = 512;
constexpr int kRowMaxChannels = kBlockMaxThreads * kBlockValues;

// Lanes of a team and channels of each lane: as few idle lanes as can be, then as few channels.
struct TeamShape {
  int lanes, values;
};
template <class T>
inline TeamShape team_shape(int channels) {
  const int packs = static_cast<int>(ceil_div(channels, kPackSize<T>));
  TeamShape best{};
  int best_slots = 0;
  for (int lanes = kWarp; lanes >= 1; lanes /= 2) {
    const int values = static_cast<int>(ceil_div(ceil_div(packs, lanes) * kPackSize<T>, 8)) * 8;
    if (values <= kTeamValues && (best.lanes == 0 || values * lanes < best_slots)) {
      best = {lanes, values};
      best_slots = values * lanes;
    }
  }
  return best;
}

// ---- teams ----------------------------------------------------------------------------------------------------------

// Backward blocks per multiprocessor that the registers allow: 8 to 24 warps, with 32 to 48 KB of loads in flight.
constexpr int team_backward_resident(int values) { return values <= 8 ? 6 : values <= 16 ? 4 : values <= 24 ? 3 : 2; }

inline LaunchGeometry team_forward_geometry(int64_t rows, const TeamShape& team) {
  return {ceil_div(rows, kTeamThreads / team.lanes), kTeamThreads, 0};
}
inline LaunchGeometry team_backward_geometry(int64_t rows, const TeamShape& team, int channels,
                                             int64_t accumulator_bytes, const DeviceLimits& device) {
  const int64_t groups = ceil_div(rows, kTeamBackwardThreads / team.lanes);
  return {backward_blocks(groups, team_backward_resident(team.values), device),
          kTeamBackwardThreads,
          (padded_channels(channels) + kTeamBackwardThreads / kWarp * channels) * accumulator_bytes};
}

template <class T, int Values, bool Packed>
__global__ void __launch_bounds__(kTeamThreads)
    layer_norm_teams_fwd(const LayerNormCase<Accumulator<T>> c, int lanes) {
  const int lane = threadIdx.x & (lanes - 1);
  const int64_t row = int64_t(blockIdx.x) * (kTeamThreads / lanes) + threadIdx.x / lanes;
  forward_row<T, Values, Packed>(c, row, row < c.rows, lane, lanes,
                                 [&](Accumulator<T> value, int) { return sum_lanes(value, 1, lanes); });
}

template <class T, int Values, bool Packed>
__global__ void __launch_bounds__(kTeamBackwardThreads, team_backward_resident(Values))
    layer_norm_teams_bwd(const LayerNormCase<Accumulator<T>> c, int lanes) {
  using A = Accumulator<T>;
  constexpr int size = kPackSize<T>, warps = kTeamBackwardThreads / kWarp;
  SDP_DYNAMIC_SHARED(shared);
  A* weights = reinterpret_cast<A*>(shared);
  A* warp_sums = weights + (c.channels + 7) / 8 * 8;  // (warps, C)
  const int lane = threadIdx.x & (lanes - 1), teams = kTeamBackwardThreads / lanes;
  A weight_sum[Values] = {}, bias_sum[Values] = {};
  read_weights<T>(weights, c);
  for (int64_t first = int64_t(blockIdx.x) * teams; first < c.rows; first += int64_t(gridDim.x) * teams) {
    const int64_t row = first + threadIdx.x / lanes;
    backward_row<T, Values, Packed>(c, weights, row, row < c.rows, lane, lanes, weight_sum, bias_sum,
                                    [&](A& a, A& b) { a = sum_lanes(a, 1, lanes), b = sum_lanes(b, 1, lanes); });
  }
#pragma unroll
  for (int k = 0; k < 2; ++k) {  // dweight, dbias: over the warp's teams, then over the warps
    A(&sums)[Values] = k == 0 ? weight_sum : bias_sum;
    if (k == 1) __syncthreads();
#pragma unroll
    for (int i = 0; i < Values; ++i) {
      const A sum = sum_lanes(sums[i], lanes, kWarp);
      const int channel = (i / size * lanes + lane) * size + i % size;
      if (int(threadIdx.x) % kWarp == lane && channel < c.channels)
        warp_sums[threadIdx.x / kWarp * c.channels + channel] = sum;
    }
    __syncthreads();
    A* partial = c.partial + (int64_t(blockIdx.x) * 2 + k) * c.channels;
    for (int channel = threadIdx.x; channel < c.channels; channel += kTeamBackwardThreads) {
      A sum = 0;
#pragma unroll
      for (int w = 0; w < warps; ++w) sum += warp_sums[w * c.channels + channel];
      partial[channel] = sum;
    }
  }
}

// ---- a block per row ------------------------------------------------------------------------------------------------

inline int block_row_threads(int channels) {
  return static_cast<int>(ceil_div(ceil_div(channels, kBlockValues), kWarp)) * kWarp;
}
inline LaunchGeometry block_forward_geometry(int64_t rows, int channels, int64_t accumulator_bytes) {
  const int threads = block_row_threads(channels);
  return {rows, threads, 2 * threads / kWarp * accumulator_bytes};
}
inline LaunchGeometry block_backward_geometry(int64_t rows, int channels, int64_t accumulator_bytes,
                                              const DeviceLimits& device) {
  const int threads = block_row_threads(channels);
  return {backward_blocks(rows, kBlockMaxThreads / threads, device), threads,
          (padded_channels(channels) + 4 * threads / kWarp) * accumulator_bytes};
}

// Sums over the block, the same in every thread; `slots` has Count accumulators per warp, used by nobody else
// meanwhile.
template <class A, int Count>
__device__ __forceinline__ void sum_block(A (&values)[Count], A* slots) {
#pragma unroll
  for (int k = 0; k < Count; ++k) {
    values[k] = sum_lanes(values[k], 1, kWarp);
    if (threadIdx.x % kWarp == 0) slots[threadIdx.x / kWarp * Count + k] = values[k];
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < Count; ++k) values[k] = 0;
  for (int w = 0; w < int(blockDim.x) / kWarp; ++w)
#pragma unroll
    for (int k = 0; k < Count; ++k) values[k] += slots[w * Count + k];
}

template <class T, bool Packed>
__global__ void __launch_bounds__(kBlockMaxThreads) layer_norm_block_fwd(const LayerNormCase<Accumulator<T>> c) {
  using A = Accumulator<T>;
  SDP_DYNAMIC_SHARED(shared);
  A* slots = reinterpret_cast<A*>(shared);
  forward_row<T, kBlockValues, Packed>(c, blockIdx.x, true, threadIdx.x, blockDim.x, [&](A value, int turn) {
    A sum[1] = {value};
    sum_block(sum, slots + turn * (blockDim.x / kWarp));
    return sum[0];
  });
}

template <class T, bool Packed>
__global__ void __launch_bounds__(kBlockMaxThreads) layer_norm_block_bwd(const LayerNormCase<Accumulator<T>> c) {
  using A = Accumulator<T>;
  constexpr int size = kPackSize<T>;
  SDP_DYNAMIC_SHARED(shared);
  A* weights = reinterpret_cast<A*>(shared);
  A* slots = weights + (c.channels + 7) / 8 * 8;  // twice: slow warps may still read the last row's
  A weight_sum[kBlockValues] = {}, bias_sum[kBlockValues] = {};
  int buffer = 0;
  read_weights<T>(weights, c);
  for (int64_t row = blockIdx.x; row < c.rows; row += gridDim.x, buffer ^= 1)
    backward_row<T, kBlockValues, Packed>(c, weights, row, true, threadIdx.x, blockDim.x, weight_sum, bias_sum,
                                          [&](A& a, A& b) {
                                            A sums[2] = {a, b};
                                            sum_block(sums, slots + buffer * 2 * (blockDim.x / kWarp));
                                            a = sums[0], b = sums[1];
                                          });
  A* partial = c.partial + int64_t(blockIdx.x) * 2 * c.channels;
#pragma unroll
  for (int i = 0; i < kBlockValues; ++i) {
    const int channel = (i / size * int(blockDim.x) + int(threadIdx.x)) * size + i % size;
    if (channel < c.channels) {
      partial[channel] = weight_sum[i];
      partial[c.channels + channel] = bias_sum[i];
    }
  }
}

}  // namespace sdp
