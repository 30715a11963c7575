// The inner loop of decode attention: one sequence, a range of key-value heads,
// a range of cache slots, every query row of those heads. Compiled once for each
// instruction set; plain C++, knows nothing of XLA.
#ifndef KERNELS_DECODE_ATTENTION_TILE_KERNEL_H_
#define KERNELS_DECODE_ATTENTION_TILE_KERNEL_H_

#include <cstdint>

#include "kernels/kv_cache/cache_layout.h"

namespace kernels {
namespace decode_attention {

// Rows of the float32 copies of q, and of the accumulators, are padded to a
// multiple of the widest vector so that the inner loops need no remainder.
constexpr int64_t kLanes = 16;

inline int64_t PadToLanes(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// A float32 operand over [b, q_heads, q_tokens, slots]; a stride is 0 where the
// operand has size 1 on that axis, so nothing is ever broadcast in memory.
template <typename T>
struct PerLogit {
  const T* data = nullptr;
  int64_t batch_stride = 0;
  int64_t head_stride = 0;
  int64_t token_stride = 0;
  int64_t slot_stride = 0;
};

// What decides which keys a query sees and what is added to its logits.
struct Masking {
  bool causal = true;
  int64_t window_left = -1;   // keys before the query; -1: no limit
  int64_t window_right = -1;  // keys after the query; -1: no limit
  int64_t chunk = 0;          // chunked attention: keys of the query's chunk
  float softcap = 0.0f;       // 0: none
  const float* alibi = nullptr;  // [q_heads]
  PerLogit<float> bias;
  PerLogit<uint8_t> mask;
};

// Positions of one sequence.
struct Sequence {
  int64_t first_query = 0;  // position of query token 0
  int64_t num_queries = 0;  // query tokens that are not padding
  int64_t num_keys = 0;     // positions below this one hold keys
  int64_t padding = 0;      // positions below this one are never seen
};

struct Problem {
  kv_cache::Element element;
  const uint8_t* cache_k;
  const uint8_t* cache_v;
  kv_cache::CacheShape shape;
  kv_cache::Addressing addressing;
  int64_t q_tokens;
  int64_t q_heads;
  int64_t group;  // query heads that share one key-value head
  Masking masking;
  const Sequence* sequences;  // [b]

  int64_t rows_per_head() const { return q_tokens * group; }
};

// Running softmax of some query rows: the largest logit so far, the sum of the
// exponentials relative to it, and the weighted sum of the values.
struct Partial {
  float* largest;  // [rows]
  float* sum;      // [rows]
  float* acc;      // [rows, padded v_dim]
};

// Query row `r` of key-value head `n` is token `r / group`, query head
// `n * group + r % group`; its state is row `n * rows_per_head + r` of `out`.
struct Task {
  int64_t sequence;
  int64_t head_begin, head_end;
  int64_t row_begin, row_end;    // within one key-value head
  int64_t slot_begin, slot_end;  // logical slots of the sequence
  const float* q;   // [kv_heads, rows_per_head + kRowSlack, padded k_dim]
  const float* qv;  // the same over v_dim, or null
  Partial out;      // written, not accumulated into
};

// Zeroed rows after the last query row of each head, so that a block of rows
// may run over the end.
constexpr int64_t kRowSlack = 8;

// The keys a query at `token` sees: positions in [begin, end).
struct KeyRange {
  int64_t begin;
  int64_t end;
};

inline KeyRange VisibleKeys(const Masking& m, const Sequence& s,
                            int64_t token) {
  if (token >= s.num_queries) return {0, 0};
  const int64_t position = s.first_query + token;
  KeyRange range = {s.padding, s.num_keys};
  if (m.causal && range.end > position + 1) range.end = position + 1;
  if (m.window_right >= 0 && range.end > position + 1 + m.window_right) {
    range.end = position + 1 + m.window_right;
  }
  if (m.window_left >= 0 && range.begin < position - m.window_left) {
    range.begin = position - m.window_left;
  }
  if (m.chunk > 0 && position > 0) {
    const int64_t first = position - position % m.chunk;
    if (range.begin < first) range.begin = first;
  }
  if (range.begin < 0) range.begin = 0;
  if (range.end < range.begin) range.end = range.begin;
  return range;
}

using TileFunction = void (*)(const Problem&, const Task&);

struct TileKernel {
  const char* name;
  TileFunction run;
};

// Null where the compiler cannot target the instruction set.
const TileKernel* Avx512TileKernel();
const TileKernel* Avx2TileKernel();
const TileKernel* PortableTileKernel();

// The best of the above that this machine can run; decided once.
const TileKernel& BestTileKernel();

}  // namespace decode_attention
}  // namespace kernels

#endif  // KERNELS_DECODE_ATTENTION_TILE_KERNEL_H_
