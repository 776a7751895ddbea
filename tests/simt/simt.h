// Runs CUDA C++ kernels on the CPU: every thread is a fiber, and fibers change at barriers and shuffles only.
//
// Blocks run one after the other, in any order, with dynamic shared memory that is poisoned (all bits set: NaN) and
// ends where the launch said, which AddressSanitizer watches. Within a block the order of fibers is chosen:
//   0 ascending, 1 descending: each in turn up to its next barrier;
//   2, 3 the same warp by warp, a warp going on as far as it can, so that nothing hides behind warps in lockstep;
//   any greater number: at random, that number being the seed.
// Stricter than a GPU: barriers and shuffles want every thread, alive, at the same line of the source, or the run is
// aborted. What it cannot see: races that no order of whole barrier-to-barrier stretches shows, and the memory model.
#pragma once
#include <dlfcn.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#define SIMT_UNPOISON(p, n) ASAN_UNPOISON_MEMORY_REGION(p, n)
#else
#define SIMT_UNPOISON(p, n) ((void)0)
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__ __restrict
#define __shared__ static_assert(false, "shared memory is dynamic: SDP_DYNAMIC_SHARED")
#define SDP_DYNAMIC_SHARED(name) unsigned char* const name = simt::block->shared
#define __syncthreads() simt::block_barrier(__FILE__, __LINE__)
#define __syncwarp() simt::warp_barrier(__FILE__, __LINE__)
#define __shfl_xor_sync(mask, value, bits) simt::shuffle(__LINE__, mask, value, simt::lane() ^ (bits))
#define __any_sync(mask, value) simt::any(__LINE__, mask, value)
#define __shfl_sync(mask, value, source) simt::shuffle(__LINE__, mask, value, source)

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
};
inline uint3 threadIdx{}, blockIdx{};
inline dim3 blockDim{}, gridDim{};

namespace simt {

constexpr int kLanes = 32;
constexpr size_t kStack = 64 * 1024;

// What a test sets and reads.
struct Settings {
  unsigned order = 0, block_order = 0;  // block_order: 0 ascending, 1 descending, else the seed of a shuffle
  std::string skipped;                  // "file.cuh:line" of a barrier that is not there
  bool dry = false;                     // only tell what would be launched
  std::map<std::string, int64_t> reached;  // barriers, as in `skipped`, and how often a thread came there
  std::string launches;                 // "symbol blocks threads shared" per line
};
inline Settings settings;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "simt: %s in block %u, thread %u\n", what, blockIdx.x, threadIdx.x);
  std::fflush(stderr);
  std::abort();
}

#if defined(__x86_64__)
using Context = void*;
extern "C" void simt_switch(Context* save, Context to);
asm(R"(
.text
.weak simt_switch
.type simt_switch, @function
simt_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
)");
inline void switch_to(Context& save, Context& to) { simt_switch(&save, to); }
inline void prepare(Context& context, char* stack, void (*entry)()) {
  auto top = reinterpret_cast<uintptr_t>(stack + kStack) & ~uintptr_t(15);
  void** sp = reinterpret_cast<void**>(top) - 1;
  *--sp = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--sp = nullptr;
  context = sp;
}
#else
using Context = ucontext_t;
inline void switch_to(Context& save, Context& to) { swapcontext(&save, &to); }
inline void prepare(Context& context, char* stack, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack, context.uc_stack.ss_size = kStack, context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}
#endif

struct Copy {  // started by cp.async, not there yet; from nowhere: zeros
  void* to;
  const void* from;
  int bytes, group;
};
struct Products;  // started by wgmma, not there yet (simt_wgmma.h)
struct Fiber {
  Context context;
  bool done = false, waiting = false;
  std::vector<Copy> copies;
  int groups = 0;  // of copies, ended so far
  std::shared_ptr<Products> products;
};
struct alignas(16) Exchange {  // what a lane shows in a warp-wide matrix instruction
  unsigned char bytes[48];
};
struct Barrier {  // of a block or of a warp
  int arrived = 0, line = 0;
};
struct Block {
  std::vector<Fiber> fibers;
  std::vector<char> stacks;
  std::vector<Barrier> warps;
  std::vector<uint64_t> values;  // what each thread shows in a shuffle: two slots, taken in turn
  std::vector<unsigned> turn;
  std::vector<Exchange> exchanges;  // the same for matrices (simt_mma.h)
  std::vector<unsigned> exchange_turn;
  Barrier all;
  Context scheduler;
  std::function<void()> body;
  unsigned char* shared = nullptr;
  size_t shared_bytes = 0;
  std::vector<unsigned char> async_view;  // shared memory as products see it: as of the last fence between the two
  std::function<void()> at_exit;          // what each thread is asked when it leaves
  unsigned current = 0;
};
inline Block* block = nullptr;

inline unsigned lane() { return block->current % kLanes; }
inline void pause() { switch_to(block->fibers[block->current].context, block->scheduler); }

inline void wait(Barrier& barrier, unsigned first, unsigned last, int line) {
  Block& b = *block;
  if (barrier.arrived == 0) barrier.line = line;
  else if (barrier.line != line) fail("barrier divergence: threads wait at different lines");
  ++barrier.arrived;
  for (unsigned i = first; i < last; ++i)
    if (b.fibers[i].done) fail("barrier divergence: a thread has left before it");
  if (barrier.arrived == int(last - first)) {
    barrier.arrived = 0;
    for (unsigned i = first; i < last; ++i) b.fibers[i].waiting = false;
  } else {
    b.fibers[b.current].waiting = true;
    pause();
  }
}
inline void warp_wait(int line) {
  const unsigned first = block->current / kLanes * kLanes;
  wait(block->warps[first / kLanes], first, std::min<unsigned>(first + kLanes, block->fibers.size()), line);
}
inline bool absent(const char* file, int line) {
  const char* name = std::strrchr(file, '/');
  const std::string place = std::string(name ? name + 1 : file) + ":" + std::to_string(line);
  ++settings.reached[place];
  return place == settings.skipped;
}
inline void block_barrier(const char* file, int line) {
  if (!absent(file, line)) wait(block->all, 0, block->fibers.size(), line);
}
inline void warp_barrier(const char* file, int line) {
  if (!absent(file, line)) warp_wait(line);
}
template <class T>
T shuffle(int line, unsigned mask, T value, unsigned source) {
  Block& b = *block;
  static_assert(sizeof(T) <= 8);
  if (mask != 0xffffffffu || b.fibers.size() % kLanes != 0) fail("shuffles want whole warps");
  if (source >= unsigned(kLanes)) fail("shuffle from a lane that is none");
  const unsigned slot = b.turn[b.current]++ % 2 * b.fibers.size(), first = b.current / kLanes * kLanes;
  std::memcpy(&b.values[slot + b.current], &value, sizeof(T));
  warp_wait(line);
  std::memcpy(&value, &b.values[slot + first + source], sizeof(T));
  return value;
}

inline bool any(int line, unsigned mask, bool value) {
  for (int bits = 1; bits < kLanes; bits *= 2) value |= shuffle(line, mask, value, lane() ^ bits);
  return value;
}

inline void entry() {
  block->body();
  if (!block->fibers[block->current].copies.empty()) fail("a thread leaves with copies on their way");
  if (block->at_exit) block->at_exit();
  block->fibers[block->current].done = true;
  if (block->all.arrived > 0 || block->warps[block->current / kLanes].arrived > 0)
    fail("barrier divergence: a thread leaves while others wait");
  pause();
  std::abort();
}

inline void resume(unsigned i) {
  block->current = i;
  threadIdx = {i, 0, 0};
  switch_to(block->scheduler, block->fibers[i].context);
}

inline void run_block(unsigned threads, size_t shared, const std::function<void()>& body) {
  static Block own;
  Block& b = own;
  block = &b;
  b.body = body;
  b.fibers.assign(threads, {});
  b.warps.assign((threads + kLanes - 1) / kLanes, {});
  b.values.assign(2 * threads, 0);
  b.turn.assign(threads, 0);
  b.exchange_turn.assign(threads, 0);
  b.all = {};
  // New memory, nothing copied: AddressSanitizer has marked parts of the old stacks.
  if (b.stacks.size() < threads * kStack) b.stacks = std::vector<char>(threads * kStack);
  SIMT_UNPOISON(b.stacks.data(), b.stacks.size());
  b.shared = static_cast<unsigned char*>(std::malloc(shared + (shared == 0)));  // ends exactly there
  std::memset(b.shared, 0xff, shared);
  b.shared_bytes = shared, b.async_view.clear(), b.at_exit = nullptr;
  for (unsigned i = 0; i < threads; ++i) prepare(b.fibers[i].context, b.stacks.data() + i * kStack, &entry);

  std::mt19937 random(settings.order + blockIdx.x * 7919);
  std::vector<unsigned> ready;
  auto can = [&](unsigned i) { return !b.fibers[i].done && !b.fibers[i].waiting; };
  auto turn = [&](unsigned begin, unsigned end, bool down) {  // one turn over [begin, end); whether anything ran
    bool any = false;
    for (unsigned i = begin; i < end; ++i) {
      const unsigned at = down ? end - 1 - (i - begin) : i;
      if (can(at)) resume(at), any = true;
    }
    return any;
  };
  const bool down = settings.order == 1 || settings.order == 3;
  for (bool any = true; any;) {
    any = false;
    if (settings.order < 2) {
      any = turn(0, threads, down);
    } else if (settings.order < 4) {
      const unsigned warps = b.warps.size();
      for (unsigned k = 0; k < warps; ++k) {
        const unsigned first = (down ? warps - 1 - k : k) * kLanes;
        while (turn(first, std::min(first + kLanes, threads), down)) any = true;
      }
    } else {  // a random warp goes one step, now and then several
      ready.clear();
      for (unsigned i = 0; i < threads; ++i)
        if (can(i)) ready.push_back(i);
      any = !ready.empty();
      if (any) {
        const unsigned first = ready[random() % ready.size()] / kLanes * kLanes;
        for (unsigned steps = 1 + random() % 8; steps > 0; --steps)
          turn(first, std::min(first + kLanes, threads), random() % 2);
      }
    }
  }
  for (const Fiber& fiber : b.fibers)
    if (!fiber.done) fail("barrier divergence: threads wait for ever");
  std::free(b.shared);
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared, const Arguments&... arguments) {
  if (blocks < 1 || threads < 1 || threads > 1024 || blocks > 0x7fffffff) fail("launch out of range");
  Dl_info info{};
  dladdr(reinterpret_cast<void*>(kernel), &info);
  settings.launches += std::string(info.dli_sname ? info.dli_sname : "?") + " " + std::to_string(blocks) + " " +
                       std::to_string(threads) + " " + std::to_string(shared) + "\n";
  if (settings.dry) return;
  std::vector<unsigned> order(blocks);
  for (int64_t i = 0; i < blocks; ++i) order[i] = settings.block_order == 1 ? blocks - 1 - i : i;
  std::mt19937 random(settings.block_order);
  for (int64_t i = blocks - 1; i > 0 && settings.block_order > 1; --i) std::swap(order[i], order[random() % (i + 1)]);
  blockDim = {unsigned(threads), 1, 1};
  gridDim = {unsigned(blocks), 1, 1};
  for (const unsigned i : order) {
    blockIdx = {i, 0, 0};
    run_block(threads, shared, [&] { kernel(static_cast<Parameters>(arguments)...); });
  }
}

}  // namespace simt

inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
