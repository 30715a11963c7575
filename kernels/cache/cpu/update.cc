#include "kernels/cache/cpu/update.h"

#include <cstdint>
#include <cstring>

#include "kernels/cache/cc/layout.h"
#include "kernels/cache/cpu/rows.h"

namespace kernels {
namespace cache {
namespace {

// Writes the rows of all heads of one token to the cache row `row` and those
// after it.
void WriteToken(const UpdateArgs& args, int64_t sequence, int64_t token,
                int64_t row, int64_t dim, const uint8_t* src,
                const Scales& scale, uint8_t* cache) {
  const CacheShape& shape = args.shape;
  const int64_t from_bytes = dim * ElementSize(args.new_element);
  const int64_t to_bytes = dim * ElementSize(args.element);
  const int64_t from_stride = NewHeadStride(args);
  src += NewRow(args, sequence, token) * from_bytes;
  uint8_t* dst = cache + row * to_bytes;
  if (args.element != args.new_element) {
    RowConversion rows;
    rows.from = args.new_element;
    rows.to = args.element;
    rows.source = src;
    rows.target = dst;
    rows.rows = shape.heads;
    rows.dim = dim;
    rows.source_stride = from_stride * dim;
    rows.target_stride = shape.head_stride() * dim;
    if (scale.given()) rows.scale = scale.At(sequence);
    rows.scale_stride = scale.head_stride;
    ConvertRows(rows);
  } else if (!shape.heads_first) {
    std::memcpy(dst, src, shape.heads * to_bytes);
  } else {
    for (int64_t n = 0; n < shape.heads; ++n) {
      std::memcpy(dst + n * shape.head_stride() * to_bytes,
                  src + n * from_stride * from_bytes, to_bytes);
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

}  // namespace cache
}  // namespace kernels
