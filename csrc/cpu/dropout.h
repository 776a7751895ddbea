// The host side of dropout: from an operator's arguments to what the kernels draw with.
#pragma once
#include <cmath>

#include "cpu/host.h"
#include "cpu/philox.h"

namespace sdp {

// rng: (seed, step, first_sample) of any stride; stream as in sdp_kernels/reference/philox.py.
inline DropoutSource dropout_source(const Tensor& rng, double rate, int64_t layer, int64_t stream) {
  const int64_t *state = static_cast<const int64_t*>(rng.const_data_ptr()), step = rng.stride(0);
  const uint64_t seed = static_cast<uint64_t>(state[0]);
  return {static_cast<uint32_t>(seed),
          static_cast<uint32_t>(seed >> 32),
          static_cast<uint32_t>(state[step]),
          static_cast<uint32_t>(layer * 4 + stream),
          static_cast<uint32_t>(state[2 * step]),
          static_cast<uint32_t>(std::min(std::nearbyint(rate * 4294967296.0), 4294967295.0)),  // a word can be kept
          static_cast<float>(1.0 / (1.0 - rate))};
}

}  // namespace sdp
