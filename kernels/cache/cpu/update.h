// Writes new keys and values into a cache, in place. Plain C++, knows nothing
// of XLA.
#ifndef KERNELS_CACHE_CPU_UPDATE_H_
#define KERNELS_CACHE_CPU_UPDATE_H_

#include <algorithm>
#include <cstdint>

#include "kernels/cache/cc/update_args.h"
#include "kernels/common/parallel_for.h"

namespace kernels {
namespace cache {

// Rows of the new keys, or values: that of a token's first head, and how many
// lie between neighbouring heads.
inline int64_t NewRow(const UpdateArgs& args, int64_t sequence, int64_t token) {
  return args.shape.heads_first
             ? sequence * args.shape.heads * args.tokens + token
             : (sequence * args.tokens + token) * args.shape.heads;
}
inline int64_t NewHeadStride(const UpdateArgs& args) {
  return args.shape.heads_first ? args.tokens : 1;
}

// Writes tokens [first, last) of one sequence. Positions that the cache does
// not hold are left out.
void UpdateTokens(const UpdateArgs& args, int64_t sequence, int64_t first,
                  int64_t last);

// Writes everything, on `pool` where there is enough to write.
template <typename Pool>
void Update(const UpdateArgs& args, Pool& pool) {
  constexpr int64_t kItemBytes = int64_t{64} << 10;
  const int64_t token_bytes = std::max<int64_t>(
      1, args.shape.heads * (args.shape.k_dim + args.shape.v_dim) *
             ElementSize(args.new_element));
  const int64_t per_item = std::max<int64_t>(1, kItemBytes / token_bytes);
  const int64_t items = (args.tokens + per_item - 1) / per_item;
  const int64_t batch = args.addressing.batch;
  const bool copies = args.element == args.new_element;
  ParallelFor(
      pool, batch * items, 2 * batch * args.tokens * token_bytes,
      [&](int64_t i) {
        const int64_t sequence = i / items;
        int64_t first, last;
        TokensToWrite(args, sequence, &first, &last);
        const int64_t begin = i % items * per_item;
        UpdateTokens(args, sequence, std::max(first, begin),
                     std::min(last, begin + per_item));
      },
      copies ? kInlineCopyBytes : kInlineBytes);
}

}  // namespace cache
}  // namespace kernels

#endif  // KERNELS_CACHE_CPU_UPDATE_H_
