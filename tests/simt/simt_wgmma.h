// The emulator's warpgroup products: what csrc/common/wgmma.cuh names. Each warp computes its quarter of the rows.
//
// A product is done when it is waited for, not before; until then its sums are poisoned. The run is aborted if registers
// of A or D, or the shared memory that it reads, have changed meanwhile; if there was no wgmma_fence since the last
// wait; or if registers that it takes have changed since the last fence (of those that a product of this thread has
// taken before). Shared memory is seen as it was at the last async_proxy_fence of any thread. What it cannot see: that a
// thread relies on another one's fence.
#pragma once
#include "simt_mma.h"

namespace simt {

// Where in shared memory the element of B lies whose summed index is k and whose column is n, in bytes (PTX ISA,
// "Matrix descriptor", "Strides", "Shared memory layout"). over_rows: neighbours in memory have neighbouring n.
inline uint32_t place_in_operand(uint64_t descriptor, bool over_rows, uint32_t k, uint32_t n) {
  const uint32_t start = (descriptor & 0x3fff) << 4, leading = (descriptor >> 16 & 0x3fff) << 4;
  const uint32_t stride = (descriptor >> 32 & 0x3fff) << 4, mode = descriptor >> 62;
  if (descriptor >> 49 & 7) fail("a descriptor with a base offset, which nobody has needed so far");
  const uint32_t width = mode == 0 ? 16 : 256u >> mode, elements = width / 2;  // bytes of a row of the pattern
  uint32_t place = start;
  if (over_rows && mode == 0) place += n % 8 * 2 + n / 8 * stride + k % 8 * 16 + k / 8 * leading;
  else if (over_rows) place += n % elements * 2 + n / elements * leading + k % 8 * width + k / 8 * stride;
  else if (mode == 0) place += n % 8 * 16 + n / 8 * stride + k / 8 * leading + k % 8 * 2;
  else place += n % 8 * width + n / 8 * stride + k * 2;
  return place ^ ((place >> 7) % (width / 16) << 4);
}

inline uint64_t panel_descriptor(const void* start, uint32_t leading) {
  const ptrdiff_t place = static_cast<const unsigned char*>(start) - block->shared;
  if (place < 0 || size_t(place) >= block->shared_bytes || place % 16 || leading % 16) fail("no operand begins there");
  if (place >> 18 || leading >> 18) fail("further than a descriptor reaches");
  return uint64_t(place) >> 4 | uint64_t(leading) >> 4 << 16 | uint64_t(512 >> 4) << 32 | uint64_t(2) << 62;
}

struct Operand {  // B as a warp's product found it: (16, columns)
  std::vector<uint32_t> places;
  std::vector<uint16_t> found;
  std::vector<float> values;
};
struct Product {
  float* d;
  const uint32_t* a;
  uint32_t held[4];    // A's registers
  float rows[2][16];   // of A, this lane's
  bool add;
  int group;
  std::vector<float> before;  // D, if no product on its way writes there
  std::shared_ptr<Operand> b;
};
struct Started {
  uint64_t descriptor;
  size_t columns;
  bool over_rows;
  bool operator==(const Started& o) const {
    return descriptor == o.descriptor && columns == o.columns && over_rows == o.over_rows;
  }
};
struct Products {
  std::vector<Product> started;
  std::map<float*, std::vector<float>> sums;              // of products done whose successors are not
  std::map<const void*, std::vector<uint32_t>> at_fence;  // registers that products take, as they were then
  int groups = 0;
  bool fenced = false;
  std::vector<Started> all;      // that this thread has started
  std::shared_ptr<Operand> found;  // lane 0's: the warp's newest B, and how many there have been
  size_t looked_for = 0;
};
constexpr uint32_t kOnItsWay = 0xffc0dead;

inline Products& products() {
  auto& mine = block->fibers[block->current].products;
  if (mine == nullptr) mine = std::make_shared<Products>();
  block->at_exit = [] {
    const Fiber& fiber = block->fibers[block->current];
    if (fiber.products == nullptr) return fail("a thread leaves without its warpgroup's products");
    if (!fiber.products->started.empty()) fail("a thread leaves with products on their way");
    const unsigned first = block->current / 128 * 128;
    for (unsigned i = first; i < first + 128; ++i)
      if (i != block->current && !block->fibers[i].done) return;
    for (unsigned i = first; i < first + 128; ++i)  // the last to leave
      if (block->fibers[i].products == nullptr ||
          block->fibers[i].products->all.size() != fiber.products->all.size())
        fail("a warp starts fewer products than another");
  };
  return *mine;
}
inline std::vector<uint32_t> words_at(const void* p, size_t count) {
  std::vector<uint32_t> words(count);
  std::memcpy(words.data(), p, 4 * count);
  return words;
}

inline void async_proxy_fence(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  if (absent(file, line)) return;
  block->async_view.assign(block->shared, block->shared + block->shared_bytes);
}
inline void wgmma_fence(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  if (absent(file, line)) return;
  Products& mine = products();
  mine.fenced = true;
  for (auto& [p, words] : mine.at_fence) words = words_at(p, words.size());
}
inline void wgmma_commit(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  if (!absent(file, line)) ++products().groups;
}
template <class... Sums>
void wgmma_hold(Sums&...) {}

template <class T>
std::shared_ptr<Operand> operand(uint64_t descriptor, bool over_rows, size_t columns) {
  auto b = std::make_shared<Operand>();
  if (block->async_view.empty()) block->async_view.assign(block->shared_bytes, 0xff);
  for (uint32_t k = 0; k < 16; ++k)
    for (uint32_t n = 0; n < columns; ++n) {
      const uint32_t place = place_in_operand(descriptor, over_rows, k, n);
      if (place + 2 > block->shared_bytes) fail("a product reads beyond shared memory");
      uint16_t bits;
      std::memcpy(&bits, block->async_view.data() + place, 2);
      b->places.push_back(place), b->found.push_back(bits), b->values.push_back(element_of<T>(bits));
    }
  return b;
}

template <class T, bool OverRows, bool Add, int Tiles>
void wgmma(float (&d)[Tiles][4], const uint32_t (&a)[4], uint64_t descriptor, int line = __builtin_LINE()) {
  struct Words {
    uint32_t a[4];
  };
  if (block->fibers.size() % 128 != 0) fail("products want whole warpgroups");
  Products& mine = products();
  if (!mine.fenced) fail("a product without a fence behind the last access to registers");
  auto taken = [&](const void* p, size_t count) {
    auto [known, fresh] = mine.at_fence.try_emplace(p, words_at(p, count));
    if (!fresh && known->second.size() == count && known->second != words_at(p, count))
      fail("registers of a product have changed since the last fence");
    known->second = words_at(p, count);
  };
  const size_t number = mine.all.size();
  mine.all.push_back({descriptor, 8 * Tiles, OverRows});
  for (unsigned warp = 0; warp < 4; ++warp) {  // whoever of the warpgroup has come this far has started the same
    const auto& other = block->fibers[block->current / 128 * 128 + warp * kLanes].products;
    if (other != nullptr && other->all.size() > number && !(other->all[number] == mine.all[number]))
      fail("the warps of a group start different products");
  }
  Product product{&d[0][0], a, {}, {}, Add, mine.groups, {}, nullptr};
  taken(a, 4);
  std::memcpy(product.held, a, sizeof product.held);
  Words words;
  std::memcpy(words.a, a, sizeof words.a);
  const Words* all = exchange(line, words);
  const unsigned group = lane() / 4;
  for (int e = 0; e < 2; ++e)
    for (int k = 0; k < 16; ++k)
      product.rows[e][k] = element_of<T>(all[4 * group + k % 8 / 2].a[k / 8 * 2 + e] >> 16 * (k % 2) & 0xffffu);
  bool follows = false;
  for (const Product& other : mine.started) follows = follows || other.d == product.d;
  if (!follows) {
    taken(product.d, 4 * Tiles);
    product.before.assign(product.d, product.d + 4 * Tiles);
    for (int i = 0; i < 4 * Tiles; ++i) std::memcpy(product.d + i, &kOnItsWay, 4);
    mine.at_fence[product.d] = words_at(product.d, 4 * Tiles);
  }
  // The first of the warp's lanes to come here looks for all; none starts the next product before all have come.
  Products& head = *block->fibers[block->current / kLanes * kLanes].products;
  if (head.looked_for != number + 1) head.found = operand<T>(descriptor, OverRows, 8 * Tiles);
  head.looked_for = number + 1;
  product.b = head.found;
  mine.started.push_back(std::move(product));
}

inline void finish(Products& mine, const Product& product, bool last) {
  const size_t columns = product.b->values.size() / 16, count = columns / 2;
  if (std::memcmp(product.a, product.held, sizeof product.held) != 0)
    fail("registers of A have changed while a product was on its way");
  for (size_t i = 0; i < product.b->places.size(); ++i)
    if (std::memcmp(block->shared + product.b->places[i], &product.b->found[i], 2) != 0)
      fail("shared memory is not, or no longer, as a product has read it");
  std::vector<float>& sums = mine.sums[product.d];
  if (!product.before.empty()) sums = product.before;
  if (!product.add) std::fill(sums.begin(), sums.end(), 0.0f);
  for (size_t i = 0; i < count; ++i) {
    const size_t column = i / 4 * 8 + lane() % 4 * 2 + i % 2, e = i % 4 / 2;
    float sum = sums[i];
    for (int k = 0; k < 16; ++k) sum += product.rows[e][k] * product.b->values[k * columns + column];
    sums[i] = sum;
  }
  if (!last) return;
  for (size_t i = 0; i < count; ++i)
    if (std::memcmp(product.d + i, &kOnItsWay, 4) != 0) fail("sums have changed while a product was on its way");
  std::memcpy(product.d, sums.data(), 4 * count);
  mine.at_fence[product.d] = words_at(product.d, count);
  mine.sums.erase(product.d);
}
template <int Left>
void wgmma_wait(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  if (absent(file, line)) return;
  Products& mine = products();
  mine.fenced = false;
  size_t done = 0;
  while (done < mine.started.size() && mine.started[done].group + Left < mine.groups) ++done;
  for (size_t i = 0; i < done; ++i) {
    bool last = true;
    for (size_t j = i + 1; j < mine.started.size(); ++j) last = last && mine.started[j].d != mine.started[i].d;
    finish(mine, mine.started[i], last);
  }
  mine.started.erase(mine.started.begin(), mine.started.begin() + done);
}

}  // namespace simt
