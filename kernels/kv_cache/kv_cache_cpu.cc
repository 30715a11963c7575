#include "kernels/kv_cache/kv_cache_cpu.h"

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "kernels/kv_cache/cache_layout.h"
#include "kernels/kv_cache/rows.h"

namespace kernels {
namespace kv_cache {
namespace {

// Converts `n` elements through a small buffer that stays in the first-level
// cache.
void Convert(Element from, const uint8_t* src, Element to, uint8_t* dst,
             int64_t n, float scale) {
  constexpr int64_t kChunk = 512;
  float buffer[kChunk];
  for (int64_t i = 0; i < n; i += kChunk) {
    const int64_t count = std::min(kChunk, n - i);
    RowToFloat(from, src + i * ElementSize(from), count, buffer);
    RowFromFloat(to, buffer, count, scale, dst + i * ElementSize(to));
  }
}

// Writes the rows of all heads of one token to the cache row `row` and those
// after it.
void WriteToken(const UpdateArgs& args, int64_t sequence, int64_t token,
                int64_t row, int64_t dim, const uint8_t* src,
                const Scales& scale, uint8_t* cache) {
  const CacheShape& shape = args.shape;
  const int64_t from_bytes = dim * ElementSize(args.new_element);
  const int64_t to_bytes = dim * ElementSize(args.element);
  const bool quantize = args.element != args.new_element;
  if (!shape.heads_first && !quantize) {
    std::memcpy(
        cache + row * to_bytes,
        src + (sequence * args.tokens + token) * shape.heads * from_bytes,
        shape.heads * to_bytes);
    return;
  }
  for (int64_t n = 0; n < shape.heads; ++n) {
    const int64_t from =
        shape.heads_first ? (sequence * shape.heads + n) * args.tokens + token
                          : (sequence * args.tokens + token) * shape.heads + n;
    uint8_t* dst = cache + (row + n * shape.head_stride()) * to_bytes;
    if (quantize) {
      Convert(args.new_element, src + from * from_bytes, args.element, dst, dim,
              scale.OrOne(sequence, n));
    } else {
      std::memcpy(dst, src + from * from_bytes, to_bytes);
    }
  }
}

}  // namespace

void UpdateTokens(const UpdateArgs& args, int64_t sequence, int64_t first,
                  int64_t last) {
  const Addressing& addressing = args.addressing;
  for (int64_t token = first; token < last; ++token) {
    const int64_t position = int64_t{args.index[sequence]} + token;
    if (position < 0) continue;
    const int64_t row =
        addressing.RowOf(args.shape, sequence, addressing.SlotOf(position));
    if (row < 0) continue;
    if (args.new_k != nullptr) {
      WriteToken(args, sequence, token, row, args.shape.k_dim, args.new_k,
                 args.k_scale, args.cache_k);
    }
    if (args.new_v != nullptr) {
      WriteToken(args, sequence, token, row, args.shape.v_dim, args.new_v,
                 args.v_scale, args.cache_v);
    }
  }
}

}  // namespace kv_cache
}  // namespace kernels
