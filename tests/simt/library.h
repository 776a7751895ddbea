// What the emulator's library of one operator consists of besides the operator: the stand-in for csrc/common/host.cuh's
// Launcher, and the settings that tests change through ctypes. Storage type: -DSIMT_TYPE=...
// Included first: the emulator defines what the kernels' sources expect of a CUDA compiler.
#pragma once
#include "simt.h"
//
#include "common/block.cuh"
#include "common/pack.cuh"

using T = SIMT_TYPE;
using A = sdp::Accumulator<T>;

namespace {

struct Launcher {
  template <class... Parameters, class... Arguments>
  void operator()(void (*kernel)(Parameters...), const sdp::LaunchGeometry& g, const Arguments&... arguments) const {
    simt::launch(kernel, g.blocks, g.threads, g.shared, arguments...);
  }
};

}  // namespace

extern "C" {

void simt_set(unsigned order, unsigned block_order, const char* skipped, int dry) {
  simt::settings.order = order, simt::settings.block_order = block_order, simt::settings.skipped = skipped;
  simt::settings.dry = dry;
}
// "name count" per line of all barriers that were reached so far; forgets them.
const char* simt_reached() {
  static std::string out;
  out.clear();
  for (const auto& [place, count] : simt::settings.reached) out += place + " " + std::to_string(count) + "\n";
  simt::settings.reached.clear();
  return out.c_str();
}
const char* simt_launches() {
  static std::string out;
  out.swap(simt::settings.launches);
  simt::settings.launches.clear();
  return out.c_str();
}
}
