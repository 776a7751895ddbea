// Register attention: what a kernel is told, and what all of its kernels share. No torch.
#pragma once
#include <cmath>

#include "common/block.cuh"
#include "common/macros.h"
#include "common/pack.cuh"
#include "common/philox.cuh"

namespace sdp {

// weight and bias (d,) of a norm over a head's d channels, of the accumulator's type if wide, else of qkv's; either may
// be absent (null) and is 1 or 0 then.
struct AttentionNorm {
  bool there;
  const void *weight, *bias;
  bool wide_weight, wide_bias;
};

template <class A>
struct AttentionCase {
  int64_t batch;
  int tokens, heads, d;
  const void* qkv;  // (B, T, 3, h, d) without gaps
  void* y;          // (B, T, h·d)
  A* lse;           // (B, h, T)
  const void* grad;  // backward: (B, T, h·d) without gaps
  void* dqkv;
  A* partial;  // backward: (2, blocks / 2, 2, d) sums for the weights and biases of the k norm, then of the q norm
  AttentionNorm q_norm, k_norm;
  A eps, scale;
  int registers;
  bool image_reads_registers, registers_read_image;
  bool dropout;
  const int64_t* rng;
  uint32_t place, threshold;
  A keep_scale;  // 1 / (1 − rate)

  SDP_HOST_DEVICE bool limited() const { return !(image_reads_registers && registers_read_image); }
  SDP_HOST_DEVICE int64_t row_stride() const { return int64_t(3) * heads * d; }      // of qkv
  SDP_HOST_DEVICE int64_t out_stride() const { return int64_t(heads) * d; }          // of y and grad
  // Member by member: a reference to either would have the whole case copied to a thread's own memory.
  SDP_HOST_DEVICE AttentionNorm norm_of(bool queries) const {
    return {queries ? q_norm.there : k_norm.there, queries ? q_norm.weight : k_norm.weight,
            queries ? q_norm.bias : k_norm.bias, queries ? q_norm.wide_weight : k_norm.wide_weight,
            queries ? q_norm.wide_bias : k_norm.wide_bias};
  }
  // Whether the query must not read the key, both inside the sequence.
  SDP_HOST_DEVICE bool forbids(int query, int key) const {
    const bool to_image = query < registers;
    return to_image != (key < registers) && !(to_image ? registers_read_image : image_reads_registers);
  }
};

// Sizes of both passes; the rest is filled in by whoever has the tensors. attend is one of reference.ATTEND.
template <class A>
AttentionCase<A> attention_case(int64_t batch, int tokens, int heads, int d, double eps, double scale, int registers,
                                bool image_reads_registers, bool registers_read_image) {
  AttentionCase<A> c{};
  c.batch = batch, c.tokens = tokens, c.heads = heads, c.d = d;
  c.eps = static_cast<A>(eps), c.scale = static_cast<A>(scale);
  c.registers = registers, c.image_reads_registers = image_reads_registers;
  c.registers_read_image = registers_read_image;
  return c;
}

constexpr int kAttentionStream = 2;  // reference/philox.py's ATTENTION

template <class A>
void set_dropout(AttentionCase<A>& c, double rate, const int64_t* rng, int64_t layer) {
  c.dropout = rate > 0;
  c.rng = rng;
  c.place = static_cast<uint32_t>(layer * 4 + kAttentionStream);
  const double threshold = std::nearbyint(rate * 4294967296.0);
  c.threshold = threshold > 4294967295.0 ? 0xffffffffu : static_cast<uint32_t>(threshold);
  c.keep_scale = static_cast<float>(1 / (1 - rate));  // rounded as the reference rounds it
}

// How a call is divided: rows in steps of `chunk` (all of them where they fit) are in shared memory at a time, and each
// of `parts` blocks per head and role takes `rounds` rounds of the rows on the other side. wgmma: with warpgroups.
struct AttentionPlan {
  int chunk, rounds, parts;
  LaunchGeometry geometry;
  bool wgmma;
};

// The same number, of which the compiler knows nothing: what is computed from it is not computed early, and does not
// occupy registers in a loop that leaves none.
__device__ __forceinline__ int forgotten(int x) {
#ifdef __CUDA_ARCH__
  asm volatile("" : "+r"(x));
#endif
  return x;
}

// Where a block's head lies.
template <class T, class A>
struct AttentionHead {
  int64_t sample, number, offset;  // number: sample · h + head; offset: of its q in qkv, in elements
  int head;
  const T *queries, *keys, *values;
  __device__ __forceinline__ AttentionHead(const AttentionCase<A>& c, int of_batch)
      : sample(of_batch / c.heads), number(of_batch), head(of_batch % c.heads) {
    offset = sample * c.tokens * c.row_stride() + head * c.d;
    queries = static_cast<const T*>(c.qkv) + offset;
    keys = queries + c.heads * c.d, values = keys + c.heads * c.d;
  }
  // Into y or grad, whose rows are c.out_stride() apart.
  template <class P>
  __device__ __forceinline__ P* in_output(P* p, const AttentionCase<A>& c) const {
    return p + (sample * c.tokens * c.heads + head) * c.d;
  }
  // First position of the head's weights in dropout's masks, in rows of T.
  __device__ __forceinline__ int64_t first_row(const AttentionCase<A>& c) const { return int64_t(head) * c.tokens; }
};

template <class T>
__device__ __forceinline__ Accumulator<T> norm_parameter(const void* p, bool wide, int channel, Accumulator<T> absent) {
  if (p == nullptr) return absent;
  return wide ? static_cast<const Accumulator<T>*>(p)[channel] : widen(static_cast<const T*>(p)[channel]);
}

// Second stage of the norms' gradients: partial (2, blocks, 2, d) to k weight, k bias, q weight, q bias (null: not
// wanted), in an order that depends on the number of blocks alone.
template <class A>
struct AttentionGradients {
  A *k_weight, *k_bias, *q_weight, *q_bias;
};
constexpr int kAttentionStrips = 32;

inline LaunchGeometry attention_sums_geometry(int d, int64_t accumulator_bytes) {
  return {ceil_div(4 * d, kWarp), kAttentionStrips * kWarp, kAttentionStrips * kWarp * accumulator_bytes};
}
template <class A>
__global__ void __launch_bounds__(kAttentionStrips* kWarp)
    register_attention_sums(const A* __restrict__ partial, int64_t blocks, int d, AttentionGradients<A> gradients) {
  SDP_DYNAMIC_SHARED(shared);
  A* sums = reinterpret_cast<A*>(shared);
  const int lane = threadIdx.x % kWarp, strip = threadIdx.x / kWarp;
  const int column = blockIdx.x * kWarp + lane, which = column / d;
  A* const out = which == 0   ? gradients.k_weight
                 : which == 1 ? gradients.k_bias
                 : which == 2 ? gradients.q_weight
                 : which == 3 ? gradients.q_bias
                              : nullptr;
  const bool wanted = out != nullptr;
  A sum = 0;
  if (wanted) {
    const A* from = partial + (which / 2) * blocks * 2 * d + column % (2 * d);
#pragma unroll 8
    for (int64_t block = strip; block < blocks; block += kAttentionStrips) sum += from[block * 2 * d];
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (strip != 0 || !wanted) return;
#pragma unroll
  for (int i = 1; i < kAttentionStrips; ++i) sum += sums[i * kWarp + lane];
  out[column % d] = sum;
}

}  // namespace sdp
