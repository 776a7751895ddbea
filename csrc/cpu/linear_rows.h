// The passes around `linear`'s GEMM, a row at a time and in it a chunk of columns: rows with gaps, and the last few columns
// of one whose width is no whole number of vectors, are copied into a buffer first, so that one form is left, whole
// vectors side by side.
#pragma once
#include "cpu/activations_bf16.h"
#include "cpu/linear_case.h"

namespace sdp {
namespace SDP_LEVEL_NAMESPACE {

constexpr int kChunk = kDropoutChunk;

template <class T>
struct Staged {
  T values[kChunk];

  // A chunk of a row as whole vectors: where it stands, if nothing is in the way, or a copy with zeros behind it.
  SDP_HOST_DEVICE const T* read(const T* row, int64_t stride, int64_t first, int count) {
    if (stride == 1 && count % VectorOf<Accumulator<T>>::lanes == 0) return row + first;
    for (int i = 0; i < count; ++i) values[i] = row[(first + i) * stride];
    memset(values + count, 0, (kChunk - count) * sizeof(T));
    return values;
  }
  // The same for a contiguous row to be written; `finish` brings what lies in the buffer to it.
  SDP_HOST_DEVICE T* open(T* row, int64_t first, int count) {
    return count % VectorOf<Accumulator<T>>::lanes == 0 ? row + first : values;
  }
  SDP_HOST_DEVICE void finish(T* row, int64_t first, int count, const T* opened) {
    if (opened == values) memcpy(row + first, values, count * sizeof(T));
  }
};

template <class R>
inline const R* row_of(const TokenView& view, int64_t sample, int64_t token) {
  return reinterpret_cast<const R*>(view.data) + sample * view.batch + token * view.token;
}

// Dropout's factors are fp32 whatever the accumulator.
SDP_HOST_DEVICE Floats load_factors(const float* p, float) { return load(p); }
SDP_HOST_DEVICE Doubles load_factors(const float* p, double) {
  typedef float Half __attribute__((vector_size(kVectorBytes / 2)));
  return __builtin_convertvector(load_bytes<Half>(p), Doubles);
}

// One chunk of columns, `width` elements in whole vectors; null pointers are what the case goes without.
template <class T, class R>
struct ForwardChunk {
  const T* z;
  const R* residual;
  const float* factors;
  const Accumulator<T>* scale;
  R* y;

  template <class Act>
  SDP_HOST_DEVICE void run(Accumulator<T> keep, int width, Act act) const {
    for (int i = 0; i < width; i += kLanes<T>) {
      Vector<T> value = act(load(z + i)).value;
      if (keep != Accumulator<T>(1)) value *= keep;
      if (factors != nullptr) value *= load_factors(factors + i, Accumulator<T>());
      if (scale != nullptr) value *= load(scale + i);
      if (residual != nullptr) value += load(residual + i);
      store(y + i, value);
    }
  }
};

template <class T, class R>
struct BackwardChunk {
  const T* z;
  const R* grad;
  const float* factors;
  const Accumulator<T>* scale;
  T *dz, *activated;
  Accumulator<T>*dscale, *dbias;

  template <class Act>
  SDP_HOST_DEVICE void run(Accumulator<T> keep, int width, Act act) const {
    for (int i = 0; i < width; i += kLanes<T>) {
      Vector<T> value = load(grad + i);
      if (keep != Accumulator<T>(1)) value *= keep;
      if (factors != nullptr) value *= load_factors(factors + i, Accumulator<T>());
      if (z != nullptr) {
        const auto both = act(load(z + i));
        if (dscale != nullptr) store(dscale + i, load(dscale + i) + value * both.value);
        if (activated != nullptr) store(activated + i, both.value);
        value *= both.slope;
      }
      if (scale != nullptr) value *= load(scale + i);
      store(dbias + i, load(dbias + i) + value);
      store(dz + i, value);
    }
  }
};

// The models' activations as constants, so that their code is inlined into the loop over a chunk; the others by one call a
// vector, because nine inlined forms of every loop would take longer to compile than all other kernels together.
template <class V>
__attribute__((noinline)) Activated<V> activated_at_run_time(V x, Activation activation) {
  return activated(x, activation);
}
template <class T, class Body>
inline void with_activation(Activation activation, const Body& body) {
#ifdef SDP_BF16_PAIRS
  if constexpr (std::is_same<T, PairedBFloat16>::value) {
    if (activation == kGelu) return body([](auto x) { return bf16_gelu(x); });
    if (activation == kKelu) return body([](auto x) { return bf16_kelu(x); });
  }
#endif
  switch (activation) {
    case kKelu: return body([](auto x) { return activated(x, kKelu); });
    case kGelu: return body([](auto x) { return activated(x, kGelu); });
    case kNone: return body([](auto x) { return activated(x, kNone); });
    default: return body([=](auto x) { return activated_at_run_time(x, activation); });
  }
}

// Calls body(first column, columns, dropout's factors or null) for each chunk of a row.
template <class Body>
SDP_HOST_DEVICE void for_chunks(const EpilogueCase& c, int64_t sample, int64_t token, const Body& body) {
  DropoutFactors drawn;
  for (int64_t first = 0; first < c.columns; first += kChunk) {
    const int count = c.columns - first < kChunk ? int(c.columns - first) : kChunk;
    const bool drops = c.dropout.scale != 0.0f;
    body(first, count, drops ? drawn.draw(c.dropout, uint32_t(sample), token * c.columns + first, count) : nullptr);
  }
}

template <class T, class R>
void forward(const EpilogueCase& c, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  const A* scale = static_cast<const A*>(c.scale);
  with_activation<T>(c.activation, [&](auto act) {
    Staged<T> staged_z;
    Staged<R> staged_residual, staged_y;
    for (int64_t row = begin; row < end; ++row) {
      const int64_t sample = row / c.tokens, token = row % c.tokens;
      const T* z = row_of<T>(c.z, sample, token);
      R* y = static_cast<R*>(c.out) + row * c.columns;
      const R* residual = c.residual.data == nullptr ? nullptr : row_of<R>(c.residual, sample, token);
      const A keep = token < c.registers ? A(0) : c.mask == nullptr ? A(1) : A(c.mask[sample]);
      if (keep == A(0)) {  // what a sample or a register drops may be NaN
        for (int64_t i = 0; i < c.columns; ++i) y[i] = residual == nullptr ? R{} : residual[i * c.residual.column];
        continue;
      }
      for_chunks(c, sample, token, [&](int64_t first, int count, const float* factors) {
        const ForwardChunk<T, R> chunk{staged_z.read(z, c.z.column, first, count),
                                       residual == nullptr ? nullptr
                                                           : staged_residual.read(residual, c.residual.column, first, count),
                                       factors, scale == nullptr ? nullptr : scale + first,
                                       staged_y.open(y, first, count)};
        chunk.run(keep, count, act);
        staged_y.finish(y, first, count, chunk.y);
      });
    }
  });
}

template <class T, class R>
void backward(const EpilogueCase& c, int64_t begin, int64_t end, int64_t block) {
  using A = Accumulator<T>;
  const A* scale = static_cast<const A*>(c.scale);
  A* dbias = static_cast<A*>(c.dbias) + block * c.pitch;
  A* dscale = c.dscale == nullptr ? nullptr : static_cast<A*>(c.dscale) + block * c.pitch;
  with_activation<T>(c.activation, [&](auto act) {
    Staged<T> staged_z, staged_dz, staged_activated;
    Staged<R> staged_grad;
    for (int64_t row = begin; row < end; ++row) {
      const int64_t sample = row / c.tokens, token = row % c.tokens;
      const T* z = c.z.data == nullptr ? nullptr : row_of<T>(c.z, sample, token);
      const R* grad = row_of<R>(c.grad, sample, token);
      T* dz = static_cast<T*>(c.out) + row * c.columns;
      T* h = c.activated == nullptr ? nullptr : static_cast<T*>(c.activated) + row * c.columns;
      const A keep = token < c.registers ? A(0) : c.mask == nullptr ? A(1) : A(c.mask[sample]);
      if (keep == A(0)) {
        memset(dz, 0, c.columns * sizeof(T));
        if (h != nullptr) memset(h, 0, c.columns * sizeof(T));
        continue;
      }
      for_chunks(c, sample, token, [&](int64_t first, int count, const float* factors) {
        const BackwardChunk<T, R> chunk{z == nullptr ? nullptr : staged_z.read(z, c.z.column, first, count),
                                        staged_grad.read(grad, c.grad.column, first, count),
                                        factors,
                                        scale == nullptr ? nullptr : scale + first,
                                        staged_dz.open(dz, first, count),
                                        h == nullptr ? nullptr : staged_activated.open(h, first, count),
                                        dscale == nullptr ? nullptr : dscale + first,
                                        dbias + first};
        chunk.run(keep, count, act);
        staged_dz.finish(dz, first, count, chunk.dz);
        if (h != nullptr) staged_activated.finish(h, first, count, chunk.activated);
      });
    }
  });
}

}  // namespace SDP_LEVEL_NAMESPACE
}  // namespace sdp
