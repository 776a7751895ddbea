// LayerNorm over channels, forward and backward: which kernel runs, with what geometry. No torch and no <<<>>> here:
// `launch(kernel, geometry, arguments...)` is the caller's, so that the emulator runs what a GPU would.
//
// Bytes per element of s bytes: forward 2s (4s with residual), backward 3s (4s with grad_sum), plus 8 bytes per pixel
// of statistics and at most 792 · 16 bytes per channel of partial sums. Where channels times 8 pixels don't fit on
// chip, NCHW reads x (and grad) a second time.
#pragma once
#include "cuda/layer_norm_2d_columns.cuh"
#include "cuda/layer_norm_2d_row_kernels.cuh"

namespace sdp {

enum class LayerNormShape { kTeams, kBlocks, kColumns };

// What is launched: decided by the shape, the strides and the device's shared memory.
struct LayerNormPlan {
  LayerNormShape shape;
  bool packed;       // 16-byte accesses everywhere
  bool half_packed;  // columns of 16-bit elements: 8-byte ones
  TeamShape team;
  ColumnPlan columns;
  LaunchGeometry geometry;
};

// Also merges the case's pixels and marks its packed views.
template <class T>
LayerNormPlan layer_norm_plan(LayerNormCase<Accumulator<T>>& c, bool backward, const DeviceLimits& device) {
  constexpr int size = kPackSize<T>;
  constexpr int64_t wide = sizeof(Accumulator<T>);
  merge_pixels(c);
  LayerNormPlan plan{};
  const PictureView& out = backward ? c.dx : c.y;
  if (out.channel == 1 && c.channels <= kRowMaxChannels) {
    plan.packed = c.channels % size == 0 && aligned_to(c.weight, 16) && (backward || aligned_to(c.bias, 16));
    c.each_view([&](PictureView& v) {
      v.packed = c.channels % size == 0 && v.channel == 1 && v.batch % size == 0 && v.row % size == 0 &&
                 v.column % size == 0 && aligned_to(v.data, 16);
      plan.packed = plan.packed && v.packed;
    });
    if (c.channels <= kTeamChannels) {
      plan.shape = LayerNormShape::kTeams;
      plan.team = team_shape<T>(c.channels);
      plan.geometry = backward ? team_backward_geometry(c.rows, plan.team, c.channels, wide, device)
                               : team_forward_geometry(c.rows, plan.team);
    } else {
      plan.shape = LayerNormShape::kBlocks;
      plan.geometry = backward ? block_backward_geometry(c.rows, c.channels, wide, device)
                               : block_forward_geometry(c.rows, c.channels, wide);
    }
    return plan;
  }
  plan.shape = LayerNormShape::kColumns;
  plan.columns = column_plan<T>(c.channels, backward ? 2 : 1, device);
  auto neighbours = [&](int count) {  // so many pixels can be one access
    bool can = c.pixels % count == 0 && c.width == c.pixels && c.registers == 0;
    c.each_view([&](PictureView& v) {
      can = can && v.column == 1 && v.batch % count == 0 && v.channel % count == 0 &&
            aligned_to(v.data, count * int64_t(sizeof(T)));
    });
    return can;
  };
  plan.packed = neighbours(size);
  plan.half_packed = !plan.packed && sizeof(T) == 2 && plan.columns.on_chip && neighbours(size / 2);
  plan.geometry =
      backward ? column_backward_geometry(c.rows, plan.columns, device) : column_forward_geometry(c.rows, plan.columns);
  return plan;
}

// Calls body with the plan's `Values` as a constant.
template <class Body>
void with_values(int values, const Body& body) {
  switch (values) {
    case 8: return body(std::integral_constant<int, 8>());
    case 16: return body(std::integral_constant<int, 16>());
    case 24: return body(std::integral_constant<int, 24>());
    default: return body(std::integral_constant<int, 32>());
  }
}

template <class T, class Launch>
void layer_norm_2d_forward(const LayerNormCase<Accumulator<T>>& c, const LayerNormPlan& plan, const Launch& launch) {
  const LaunchGeometry& g = plan.geometry;
  if (plan.shape == LayerNormShape::kTeams) {
    if (!plan.packed) return launch(&layer_norm_teams_fwd<T, kTeamValues, false>, g, c, plan.team.lanes);
    return with_values(plan.team.values, [&](auto values) {
      launch(&layer_norm_teams_fwd<T, values, true>, g, c, plan.team.lanes);
    });
  }
  if (plan.shape == LayerNormShape::kBlocks)
    return launch(plan.packed ? &layer_norm_block_fwd<T, true> : &layer_norm_block_fwd<T, false>, g, c);
  constexpr int N = kPackSize<T>;
  if constexpr (sizeof(T) == 2)
    if (plan.half_packed) return launch(&layer_norm_columns_fwd<T, N / 2, true>, g, c, plan.columns);
  if (plan.columns.on_chip)
    return launch(plan.packed ? &layer_norm_columns_fwd<T, N, true> : &layer_norm_columns_fwd<T, 1, true>, g, c,
                  plan.columns);
  launch(plan.packed ? &layer_norm_columns_fwd<T, N, false> : &layer_norm_columns_fwd<T, 1, false>, g, c, plan.columns);
}

// c.partial must have plan.geometry.blocks rows. W: the parameters' type.
template <class T, class W, class Launch>
void layer_norm_2d_backward(const LayerNormCase<Accumulator<T>>& c, const LayerNormPlan& plan, W* dweight, W* dbias,
                            const Launch& launch) {
  using A = Accumulator<T>;
  constexpr int N = kPackSize<T>;
  const LaunchGeometry& g = plan.geometry;
  if (g.blocks == 0) {
    // nothing but zeros to add up
  } else if (plan.shape == LayerNormShape::kTeams) {
    if (plan.packed)
      with_values(plan.team.values, [&](auto values) {
        launch(&layer_norm_teams_bwd<T, values, true>, g, c, plan.team.lanes);
      });
    else launch(&layer_norm_teams_bwd<T, kTeamValues, false>, g, c, plan.team.lanes);
  } else if (plan.shape == LayerNormShape::kBlocks) {
    launch(plan.packed ? &layer_norm_block_bwd<T, true> : &layer_norm_block_bwd<T, false>, g, c);
  } else if (plan.half_packed) {
    if constexpr (sizeof(T) == 2) launch(&layer_norm_columns_bwd<T, N / 2, true>, g, c, plan.columns);
  } else if (plan.columns.on_chip) {
    launch(plan.packed ? &layer_norm_columns_bwd<T, N, true> : &layer_norm_columns_bwd<T, 1, true>, g, c, plan.columns);
  } else {
    launch(plan.packed ? &layer_norm_columns_bwd<T, N, false> : &layer_norm_columns_bwd<T, 1, false>, g, c,
           plan.columns);
  }
  const A* partial = c.partial;
  launch(&layer_norm_sums<A, W>, layer_norm_sums_geometry(c.channels, sizeof(A)), partial, g.blocks,
         int64_t(c.channels), dweight, dbias);
}

}  // namespace sdp
