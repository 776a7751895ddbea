// Rows of pictures in memory, of any layout and dtype, to and from vectors whose lanes are a group of channels.
#pragma once
#include "cpu/depthwise_conv2d_case.h"

namespace sdp {
namespace SDP_LEVEL_NAMESPACE {

// The channels of one vector: all lanes, or fewer in the last group.
struct DepthwiseGroup {
  int64_t channel;
  int count;
};
template <class T>
inline DepthwiseGroup group_of(int64_t channels, int64_t group) {
  const int64_t channel = group * kLanes<T>, left = channels - channel;
  return {channel, left < kLanes<T> ? int(left) : kLanes<T>};
}

template <class T>
inline T* row_of(const DepthwiseView& view, int64_t sample, int64_t channel, int64_t row) {
  return reinterpret_cast<T*>(view.data) + sample * view.batch + channel * view.channel + row * view.row;
}

// A square of channels × columns from memory where columns lie in order, as one vector of channels per column. 16-bit
// elements are turned in pairs of columns, at half the cost.
template <class T>
inline __attribute__((always_inline)) void load_turned(const T* from, int64_t channel, int count, int across,
                                                       Vector<T> (&block)[kLanes<T>]) {
  constexpr int lanes = kLanes<T>;
  if constexpr (sizeof(T) == 2) {
    Bits pairs[lanes / 2];
    SDP_UNROLL for (int i = 0; i < lanes / 2; ++i)
      pairs[i] = joined(load_bits_part(from + 2 * i * channel, 2 * i < count ? across : 0),
                        load_bits_part(from + (2 * i + 1) * channel, 2 * i + 1 < count ? across : 0));
    interleave_rows<lanes>(pairs);
    SDP_UNROLL for (int i = 0; i < lanes / 2; ++i) {
      block[2 * i] = widen_low(pairs[i], T());
      block[2 * i + 1] = widen_high(pairs[i], T());
    }
  } else {
    SDP_UNROLL for (int lane = 0; lane < lanes; ++lane)
      block[lane] = load_part(from + lane * channel, lane < count ? across : 0);
    transpose(block);
  }
}

template <class T>
inline __attribute__((always_inline)) void store_turned(T* to, int64_t channel, int count, int across,
                                                        Vector<T> (&block)[kLanes<T>]) {
  constexpr int lanes = kLanes<T>;
  if constexpr (sizeof(T) == 2) {
    Bits pairs[lanes / 2];
    SDP_UNROLL for (int i = 0; i < lanes / 2; ++i) pairs[i] = round_to_pair(block[2 * i], block[2 * i + 1], T());
    interleave_rows<lanes / 2>(pairs);
    SDP_UNROLL for (int i = 0; i < lanes / 2; ++i) {
      if (2 * i < count) store_bits_part(to + 2 * i * channel, half_of<0>(pairs[i]), across);
      if (2 * i + 1 < count) store_bits_part(to + (2 * i + 1) * channel, half_of<1>(pairs[i]), across);
    }
  } else {
    transpose(block);
    SDP_UNROLL for (int lane = 0; lane < lanes; ++lane)
      if (lane < count) store_part(to + lane * channel, block[lane], across);
  }
}

// Calls emit(column, vector of channels) for the columns of a row, in order.
template <class T, class Emit>
inline __attribute__((always_inline)) void load_row(const DepthwiseView& view, const T* from, int count, int64_t width,
                                                    Emit&& emit) {
  constexpr int lanes = kLanes<T>;
  if (view.channel == 1 && count == lanes) {
    for (int64_t column = 0; column < width; ++column) emit(column, load(from + column * view.column));
  } else if (view.column == 1 && view.channel != 1) {
    for (int64_t column = 0; column < width; column += lanes) {
      const int across = width - column < lanes ? int(width - column) : lanes;
      Vector<T> block[lanes];
      load_turned(from + column, view.channel, count, across, block);
      SDP_UNROLL for (int i = 0; i < lanes; ++i)
        if (i < across) emit(column + i, block[i]);
    }
  } else {
    for (int64_t column = 0; column < width; ++column)
      emit(column, load_part(from + column * view.column, count, view.channel));
  }
}

// `packed` may be read for as many vectors behind the row as there are lanes.
template <class T>
void store_row(const DepthwiseView& view, T* to, int count, int64_t width, const Vector<T>* packed) {
  constexpr int lanes = kLanes<T>;
  if (view.channel == 1 && count == lanes) {
    for (int64_t column = 0; column < width; ++column) store(to + column * view.column, packed[column]);
  } else if (view.column == 1 && view.channel != 1) {
    for (int64_t column = 0; column < width; column += lanes) {
      const int across = width - column < lanes ? int(width - column) : lanes;
      Vector<T> block[lanes];
      SDP_UNROLL for (int i = 0; i < lanes; ++i) block[i] = packed[column + i];
      store_turned(to + column, view.channel, count, across, block);
    }
  } else {
    for (int64_t column = 0; column < width; ++column)
      store_part(to + column * view.column, packed[column], count, view.channel);
  }
}

// Asks for a row of a channel group that will be read or, with Write, written later. The asm keeps GCC from dropping calls
// of a function that does nothing but prefetch, which it takes for one without effect.
template <class T, bool Write>
void prefetch_row(const DepthwiseView& view, int64_t channels, int64_t width, int64_t sample, int64_t group, int64_t row) {
  const DepthwiseGroup g = group_of<T>(channels, group);
  const T* from = row_of<T>(view, sample, g.channel, row);
  const bool across = view.channel == 1;
  const int64_t count = across ? width : view.column == 1 ? g.count : 0, step = across ? view.column : view.channel;
  for (int64_t i = 0; i < count; ++i) __builtin_prefetch(from + i * step, Write);
  asm volatile("");
}

}  // namespace SDP_LEVEL_NAMESPACE
}  // namespace sdp
