// The pure C++ kernels, without XLA and Python: random problems against sums in
// double, the same bits on one thread and on four. Meant for the sanitizers.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "kernels/cache/cc/layout.h"
#include "kernels/cache/cpu/rows.h"
#include "kernels/cache/cpu/update.h"
#include "kernels/common/cpu_features.h"
#include "kernels/decode_attention/cpu/decode.h"
#include "tests/testing/cpu_loops.h"

namespace {

using kernels::cache::Element;
using kernels::cache::ElementSize;
using kernels::decode_attention::DecodeArgs;
using kernels::testing::ThreadPool;

#define EXPECT(condition, ...)                                             \
  do {                                                                     \
    if (!(condition)) {                                                    \
      std::fprintf(stderr, "%s:%d: " #condition ": ", __FILE__, __LINE__); \
      std::fprintf(stderr, __VA_ARGS__);                                   \
      std::fprintf(stderr, "\n");                                          \
      std::exit(1);                                                        \
    }                                                                      \
  } while (false)

// Exactly as large as needed, on the heap, so that a sanitizer sees a byte too
// far.
struct Bytes {
  explicit Bytes(int64_t size) : size(size), data(new uint8_t[size]) {}
  int64_t size;
  std::unique_ptr<uint8_t[]> data;
};

Bytes Random(std::mt19937& rng, int64_t count, Element element) {
  std::normal_distribution<float> normal;
  std::vector<float> values(count);
  for (float& v : values) v = normal(rng);
  Bytes bytes(count * ElementSize(element));
  kernels::cache::RowFromFloat(element, values.data(), count, 0.05f,
                               bytes.data.get());
  return bytes;
}

struct Sizes {
  int64_t batch, slots, heads, group, tokens, k_dim, v_dim;
  bool heads_first, ring, paged;
};

// The value of a cache element, without its scale.
double ElementValue(Element element, const uint8_t* p) {
  switch (element) {
    case Element::kInt8:
      return static_cast<int8_t>(*p);
    case Element::kE4m3:
    case Element::kE5m2: {
      const int mantissa_bits = element == Element::kE4m3 ? 3 : 2;
      const int bias = element == Element::kE4m3 ? 7 : 15;
      const int code = *p & 0x7f;
      const int exponent = code >> mantissa_bits;
      const int mantissa = code & ((1 << mantissa_bits) - 1);
      const double magnitude =
          exponent == 0 ? std::ldexp(mantissa, 1 - bias - mantissa_bits)
                        : std::ldexp((1 << mantissa_bits) + mantissa,
                                     exponent - bias - mantissa_bits);
      return *p & 0x80 ? -magnitude : magnitude;
    }
    default: {
      float value;
      kernels::cache::RowConversion one;
      one.from = element;
      one.source = p;
      one.target = &value;
      one.dim = 1;
      kernels::cache::ConvertRows(one);
      return value;
    }
  }
}

void Check(std::mt19937& rng, Element element, const Sizes& z) {
  const bool quantized = kernels::cache::IsQuantized(element);
  const Element kind = quantized ? Element::kF32 : element;
  const int64_t width = z.paged ? 2 : 1;
  const int64_t blocks = z.batch * width;
  DecodeArgs args = {};
  args.element = element;
  args.query_element = kind;
  args.out_element = Element::kF32;
  args.shape = {1, blocks, z.slots, z.heads, z.k_dim, z.v_dim, z.heads_first};
  const int64_t rows = blocks * z.slots * z.heads;
  const Bytes cache_k = Random(rng, rows * z.k_dim, element);
  const Bytes cache_v = Random(rng, rows * z.v_dim, element);
  const int64_t queries = z.batch * z.tokens * z.heads * z.group;
  const Bytes q = Random(rng, queries * z.k_dim, kind);
  const Bytes new_k = Random(rng, z.batch * z.tokens * z.heads * z.k_dim, kind);
  const Bytes new_v = Random(rng, z.batch * z.tokens * z.heads * z.v_dim, kind);
  std::vector<int32_t> table(blocks), layer(z.batch, 0), index(z.batch),
      count(z.batch);
  for (int64_t i = 0; i < blocks; ++i) {
    table[i] = static_cast<int32_t>(blocks - 1 - i);
  }
  const int64_t capacity = z.slots * width;
  for (int64_t i = 0; i < z.batch; ++i) {
    const int64_t most = z.ring ? 3 * capacity : capacity - z.tokens;
    index[i] = static_cast<int32_t>(rng() % (most + 1));
    count[i] = static_cast<int32_t>(i == 0 ? z.tokens : rng() % (z.tokens + 1));
  }
  const std::vector<float> scale(z.batch * z.heads, 0.05f);
  args.addressing.table = table.data();
  args.addressing.table_width = width;
  args.addressing.layer = {layer.data()};
  args.addressing.batch = z.batch;
  args.addressing.ring = z.ring ? capacity : 0;
  args.q = q.data.get();
  args.new_k = new_k.data.get();
  args.new_v = new_v.data.get();
  args.tokens = z.tokens;
  args.group = z.group;
  args.index = {index.data()};
  args.count = {count.data()};
  if (quantized) args.k_scale = {scale.data(), z.heads, 1};
  args.v_scale = args.k_scale;
  args.scale = 0.2f;
  if (z.ring) args.masking.window_left = capacity - z.tokens;

  std::vector<float> results[2], logs[2];
  Bytes caches[2][2] = {{Bytes(cache_k.size), Bytes(cache_v.size)},
                        {Bytes(cache_k.size), Bytes(cache_v.size)}};
  for (int run = 0; run < 2; ++run) {
    std::memcpy(caches[run][0].data.get(), cache_k.data.get(), cache_k.size);
    std::memcpy(caches[run][1].data.get(), cache_v.data.get(), cache_v.size);
    results[run].resize(queries * z.v_dim);
    logs[run].resize(queries);
    args.cache_k = caches[run][0].data.get();
    args.cache_v = caches[run][1].data.get();
    args.out = reinterpret_cast<uint8_t*>(results[run].data());
    args.lse = logs[run].data();
    ThreadPool pool(run == 0 ? 1 : 4);
    kernels::decode_attention::RunDecode(args, pool);
  }
  EXPECT(results[0] == results[1] && logs[0] == logs[1],
         "one thread and four differ");
  for (int i = 0; i < 2; ++i) {
    EXPECT(std::equal(caches[0][i].data.get(),
                      caches[0][i].data.get() + caches[0][i].size,
                      caches[1][i].data.get()),
           "caches of one thread and four differ");
  }

  const auto element_at = [&](int which, int64_t sequence, int64_t position,
                              int64_t head, int64_t c) {
    const int64_t slot = z.ring ? position % capacity : position;
    const int64_t block = table[sequence * width + slot / z.slots];
    const int64_t in_block = slot % z.slots;
    const int64_t row = z.heads_first
                            ? (block * z.heads + head) * z.slots + in_block
                            : (block * z.slots + in_block) * z.heads + head;
    const int64_t dim = which == 0 ? z.k_dim : z.v_dim;
    return ElementValue(element, caches[0][which].data.get() +
                                     (row * dim + c) * ElementSize(element)) *
           (quantized ? 0.05 : 1.0);
  };
  for (int64_t b = 0; b < z.batch; ++b) {
    for (int64_t i = 0; i < count[b]; ++i) {
      for (int64_t h = 0; h < z.heads * z.group; ++h) {
        const int64_t row = z.heads_first
                                ? (b * z.heads * z.group + h) * z.tokens + i
                                : (b * z.tokens + i) * z.heads * z.group + h;
        const int64_t p = index[b] + i;
        const int64_t first =
            z.ring ? std::max<int64_t>(0, p - (capacity - z.tokens)) : 0;
        std::vector<double> logits, sums(z.v_dim, 0.0);
        double largest = -INFINITY;
        for (int64_t j = first; j <= p; ++j) {
          double logit = 0;
          for (int64_t c = 0; c < z.k_dim; ++c) {
            const double value = ElementValue(
                kind, q.data.get() + (row * z.k_dim + c) * ElementSize(kind));
            logit += value * element_at(0, b, j, h / z.group, c) * 0.2;
          }
          logits.push_back(logit);
          largest = std::max(largest, logit);
        }
        double total = 0;
        for (int64_t j = first; j <= p; ++j) {
          const double weight = std::exp(logits[j - first] - largest);
          total += weight;
          for (int64_t c = 0; c < z.v_dim; ++c) {
            sums[c] += weight * element_at(1, b, j, h / z.group, c);
          }
        }
        for (int64_t c = 0; c < z.v_dim; ++c) {
          const double want = sums[c] / total;
          const double got = results[0][row * z.v_dim + c];
          EXPECT(std::abs(got - want) < 1e-4 * (1 + std::abs(want)),
                 "got %g, want %g (element %d)", got, want,
                 static_cast<int>(element));
        }
      }
    }
  }
}

}  // namespace

int main() {
  const Sizes sizes[] = {
      {3, 40, 2, 1, 1, 64, 64, false, false, false},
      {2, 33, 3, 4, 1, 20, 37, false, true, false},
      {2, 20, 2, 3, 2, 16, 16, true, false, true},
      {1, 700, 2, 2, 1, 128, 128, false, false, false},
      {2, 90, 2, 4, 5, 24, 40, true, false, false},
      {2, 70, 1, 8, 9, 33, 7, false, true, false},
      // Two blocks of rows, the second of which begins within a token.
      {1, 150, 1, 5, 40, 24, 40, false, false, false},
  };
  for (const char* level : {"baseline", "avx2", "avx512"}) {
    if (!kernels::SetSimdLevel(level)) {
      std::printf("this machine has no %s\n", level);
      continue;
    }
    std::mt19937 rng(0);
    for (const Element element :
         {Element::kF32, Element::kBf16, Element::kF16, Element::kInt8,
          Element::kE4m3, Element::kE5m2}) {
      for (const Sizes& z : sizes) Check(rng, element, z);
    }
  }
  std::printf("ok\n");
  return 0;
}
