// The launcher that makes nvcc instantiate what the operators' launch functions choose between; compiled for inspection,
// never run.
#pragma once
#include <cuda_runtime.h>

#include "common/block.cuh"

namespace {

struct Launcher {
  template <class... Parameters, class... Arguments>
  void operator()(void (*kernel)(Parameters...), const sdp::LaunchGeometry& g, const Arguments&... arguments) const {
    kernel<<<static_cast<unsigned>(g.blocks), g.threads, static_cast<size_t>(g.shared)>>>(
        static_cast<Parameters>(arguments)...);
  }
};

}  // namespace
